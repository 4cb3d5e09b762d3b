"""What the kernels take here, against torch's dense product: `kernels.bench`, one linear at a time, as result rows.

Weights are random, at the shape of a real model: what they are does not change the time. Torch's threads are left as
they are. Times are of one machine, which is why its name is part of every key: another one measures anew.

Within one round the three products are timed one after the other, and what else a machine does drifts meanwhile: the
spread over whole rounds, not that of repeats, says what a ratio is worth.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
from tqdm import tqdm

from kernels import bench
from kernels.inputs import KINDS
from kernels.shapes import fused
from rsparse.models import check_device
from rsparse.provenance import device_name
from rsparse.results import Table

CHAIN = "chain"
"""What stands in the place of a linear: the linears of whole blocks one behind another."""
METRICS = {
    "torch us": "torch_us", "torch p20 us": "torch_us_p20", "torch p80 us": "torch_us_p80",
    "ours dense us": "ours_dense_us", "ours dense p20 us": "ours_dense_us_p20",
    "ours dense p80 us": "ours_dense_us_p80",
    "ours us": "ours_us", "ours p20 us": "ours_us_p20", "ours p80 us": "ours_us_p80",
    "over torch": "over_torch", "over ours dense": "over_ours_dense", "bytes": "read_bytes",
    "dense bytes": "dense_bytes", "bandwidth share": "bandwidth_share", "read bandwidth": "read_bandwidth",
    "processor share": "processor_share",
    "sparse path us": "sparse_path_us", "as many channels, all read us": "all_read_us", "launch us": "launch_us",
}  # fmt: skip
"""Field of `kernels.bench` -> metric of a row. p20, p80: quantiles over repeats; read_bandwidth in bytes per second."""
PLACE = ["model", "dtype", "sparsity", "rho", "batch", "inputs", "linear", "m", "n", "device", "where"]
"""Columns that tell one timing from another."""


@dataclass(frozen=True)
class Plan:
    """What is timed. shape: one of `kernels.shapes.SIZES`. sparsities: of the bytes read, low-rank path included.
    batches: tokens, each with a mask of its own. linears: of `kernels.shapes.fused`; [] takes all. rounds: of the whole
    measurement, each of weights of its own and `repeats` calls. breakdown: also by leaving out. chained: also the
    linears of whole blocks one behind another, which takes four blocks of memory.

    Raises ValueError for a name that does not exist, numbers out of range, or a device that is not there.
    """

    shape: str
    dtype: str
    device: str
    sparsities: Sequence[float]
    rho: float
    batches: Sequence[int]
    inputs: Sequence[str]
    linears: Sequence[str]
    repeats: int
    rounds: int
    breakdown: bool
    chained: bool

    def __post_init__(self) -> None:
        known = [one.name for one in fused(self.shape)]
        _check("dtype", [self.dtype], bench.DTYPES)
        _check("inputs", self.inputs, KINDS)
        _check("linears", self.linears, known)
        check_device(self.device)
        for name, low, high in (("sparsities", 0, 0.99), ("batches", 1, 16)):
            values = getattr(self, name)
            if not values or not all(low <= value <= high for value in values):
                raise ValueError(f"{name} are {values!r}; expected some of {low} to {high}")
        if not 0 <= self.rho <= 1:
            raise ValueError(f"rho is {self.rho}; expected 0 to 1")
        if self.repeats < 2 or self.rounds < 1:
            raise ValueError(f"repeats are {self.repeats}, rounds {self.rounds}; expected at least 2, and at least 1")
        object.__setattr__(self, "linears", [x for x in known if not self.linears or x in self.linears])

    def timings(self, seed: int) -> Iterator[tuple[bench.Asked, str]]:
        """Every measurement and the linear, or `CHAIN`, that it is of."""
        for inputs in self.inputs:
            for sparsity in self.sparsities:
                for batch in self.batches:
                    asked = bench.Asked(self.shape, self.dtype, sparsity, self.rho, batch, inputs, self.device,
                                        self.repeats, seed)  # fmt: skip
                    yield from ((asked, linear) for linear in self.linears)
                    if self.chained and inputs == "gaussian":  # the only inputs of a chain
                        yield asked, CHAIN


def _check(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [value for value in values if value not in known]:
        raise ValueError(f"{name}: {unknown}; expected some of {', '.join(known)}")


def measure(table: Table, plan: Plan, seed: int) -> None:
    """A row per timing and metric of `METRICS`: the mean over rounds and its standard error. A timing that the table
    holds already is not repeated."""
    device = device_name(plan.device)
    for asked, linear in tqdm(list(plan.timings(seed)), desc="timings"):
        breakdown = plan.breakdown and linear != CHAIN
        key = {"what": "kernels", "linear": linear, "breakdown": breakdown, "rounds": plan.rounds, "machine": device,
               **asdict(asked)}  # fmt: skip
        if table.find(key) is not None:
            continue
        started = time.monotonic()
        found = [_round(replace(asked, seed=seed + i), linear, breakdown) for i in range(plan.rounds)]
        costs = [{"what": "kernels", "seconds": time.monotonic() - started, "tokens": 0}]
        table.add(key, _rows(asked, found, device), costs=costs)


def _round(asked: bench.Asked, linear: str, breakdown: bool) -> dict[str, Any]:
    if linear == CHAIN:
        return bench.chain(asked)
    (found,) = bench.bench(asked, breakdown, [linear])
    return found


def _rows(asked: bench.Asked, rounds: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """outputs, channels: 0 of a chain. n: rounds."""
    found = rounds[0]
    base = {
        "model": f"random:{asked.shape}", "method": "r-sparse", "recipe": "uniform", "sparsity": asked.sparsity,
        "rho": asked.rho, "score": "magnitude", "threshold": "static", "dtype": asked.dtype, "seed": asked.seed,
        "task": "gemv", "n": len(rounds),
    }  # fmt: skip
    own = {"batch": asked.batch, "inputs": asked.inputs, "linear": found["linear"], "outputs": found.get("m", 0),
           "channels": found.get("n", 0), "device": device, "where": asked.device}  # fmt: skip
    return [base | own | {"metric": metric} | _mean([float(x[field]) for x in rounds])
            for field, metric in METRICS.items() if field in found]  # fmt: skip


def _mean(values: Sequence[float]) -> dict[str, float]:
    """stderr: NaN of a single one."""
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"value": statistics.fmean(values), "stderr": stderr}


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per timing, with the fields of `kernels.bench` for columns, as `kernel_reading.published` has them;
    in the order in which they were measured. Besides, "over torch stderr" where there were several rounds."""
    named = rows.rename(columns={"n": "rounds", "outputs": "m", "channels": "n"})
    spread = named[named["metric"] == METRICS["over torch"]]
    named = pd.concat([named, spread.assign(metric="over torch stderr", value=spread["stderr"].astype(float))])
    found = named.pivot_table(index=PLACE, columns="metric", values="value", sort=False).reset_index()
    found = found.rename(columns={metric: field for field, metric in METRICS.items()} | {"model": "shape"})
    return found.rename_axis(columns=None).assign(shape=found["shape"].str.removeprefix("random:"))
