"""What the kernels take here, against torch's dense product: `kernels.bench`, one linear at a time, as result rows.

Weights are random, at the shape of a real model: what they are does not change the time. Torch's threads are left as
they are. Times are of one machine, which is why its name is part of every key: another one measures anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
    "sparse path us": "sparse_path_us", "as many channels, all read us": "all_read_us", "launch us": "launch_us",
}  # fmt: skip
"""Field of `kernels.bench` -> metric of a row. p20, p80: quantiles over repeats; read_bandwidth in bytes per second."""
PLACE = ["model", "dtype", "sparsity", "rho", "batch", "inputs", "linear", "m", "n", "device", "where"]
"""Columns that tell one timing from another."""


@dataclass(frozen=True)
class Plan:
    """What is timed. shape: one of `kernels.shapes.SIZES`. sparsities: of the bytes read, low-rank path included.
    batches: tokens, each with a mask of its own. linears: of `kernels.shapes.fused`; [] takes all. breakdown: also by
    leaving out. chained: also the linears of whole blocks one behind another, which takes four blocks of memory.

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
        if not 0 <= self.rho <= 1 or self.repeats < 2:
            raise ValueError(f"rho is {self.rho}, repeats are {self.repeats}; expected 0 to 1, and at least 2")
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
    """A row per timing and metric of `METRICS`; a timing that the table holds already is not repeated."""
    device = device_name(plan.device)
    for asked, linear in tqdm(list(plan.timings(seed)), desc="timings"):
        breakdown = plan.breakdown and linear != CHAIN
        key = {"what": "kernels", "linear": linear, "breakdown": breakdown, "machine": device, **asdict(asked)}
        if table.find(key) is not None:
            continue
        started = time.monotonic()
        if linear == CHAIN:
            found = bench.chain(asked)
        else:
            (found,) = bench.bench(asked, breakdown, [linear])
        costs = [{"what": "kernels", "seconds": time.monotonic() - started, "tokens": 0}]
        table.add(key, _rows(asked, found, device), costs=costs)


def _rows(asked: bench.Asked, found: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """m, n: 0 of a chain."""
    base = {
        "model": f"random:{asked.shape}", "method": "r-sparse", "recipe": "uniform", "sparsity": asked.sparsity,
        "rho": asked.rho, "score": "magnitude", "threshold": "static", "dtype": asked.dtype, "seed": asked.seed,
        "task": "gemv", "n": asked.repeats,
    }  # fmt: skip
    own = {"batch": asked.batch, "inputs": asked.inputs, "linear": found["linear"], "outputs": found.get("m", 0),
           "channels": found.get("n", 0), "device": device, "where": asked.device}  # fmt: skip
    return [base | own | {"metric": metric, "value": float(found[field])}
            for field, metric in METRICS.items() if field in found]  # fmt: skip


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per timing, with the fields of `kernels.bench` for columns, as `kernel_reading.published` has them;
    in the order in which they were measured."""
    named = rows.rename(columns={"n": "repeats", "outputs": "m", "channels": "n"})
    found = named.pivot_table(index=PLACE, columns="metric", values="value", sort=False).reset_index()
    found = found.rename(columns={metric: field for field, metric in METRICS.items()} | {"model": "shape"})
    return found.rename_axis(columns=None).assign(shape=found["shape"].str.removeprefix("random:"))
