"""The bounds that this project set itself for decoding, and whether timings meet them.

One text, random weights, half of the bytes left unread, rho = 0.95, a prompt of 5 tokens and 200 new ones. They were
set for one H200: other devices stand beside it and are not judged. That of the CPU is of decoder layers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rsparse.exhibits.decode_reading import at, over, whole
from rsparse.exhibits.decode_rows import layers_s

SIXTEEN = ("bfloat16", "float16")
SETTING = {"prompt": 5, "new": 200, "batch": 1}
SPARSITY, RHO = 0.5, 0.95
GPU = "H200"
LAYERS_OVER_DENSE = 1.4
LIMITS = {"llama-2-7b": 1.96, "llama-3-8b": 1.87}
"""What bytes alone allowed over dense at these settings, as computed before anything was timed."""


@dataclass(frozen=True)
class Bound:
    """Of one model in any of the storages. best: "max" or "min", which of them counts. measured: from the rows of one
    device and storage; NaN where they do not hold it."""

    text: str
    model: str
    dtypes: tuple[str, ...]
    bound: float
    measured: Callable[[pd.DataFrame], float]
    best: str = "max"

    def met(self, value: float) -> bool:
        return value >= self.bound if self.best == "max" else value <= self.bound


def _row(own: pd.DataFrame, name: str) -> pd.DataFrame:
    """The one row called so, at the bounds' sparsity unless it is dense; else none."""
    rows = at(own, name=name) if name == "dense" else at(own, name=name, sparsity=SPARSITY, rho=RHO)
    return rows.iloc[-1:]


def _rate(name: str) -> Callable[[pd.DataFrame], float]:
    return lambda own: float((1 / _row(own, name)["step_s"]).mean())


def _beside_the_weights(own: pd.DataFrame) -> float:
    return float(1e3 * _row(own, "dense")["non_weight_s"].mean())


def _memory(own: pd.DataFrame) -> float:
    dense, sparse = (float(_row(own, name)["gpu_peak_memory"].mean()) for name in ("dense", "r-sparse"))
    return sparse / dense if dense else float("nan")


BOUNDS = (
    Bound("dense, tokens/s", "llama-2-7b", SIXTEEN, 222, _rate("dense")),
    Bound("dense, tokens/s", "llama-3-8b", SIXTEEN, 202, _rate("dense")),
    Bound("dense, ms of a step beside the weights", "llama-2-7b", SIXTEEN, 1.25, _beside_the_weights, "min"),
    Bound("dense, ms of a step beside the weights", "llama-3-8b", SIXTEEN, 1.25, _beside_the_weights, "min"),
    Bound("R-Sparse, tokens/s", "llama-2-7b", SIXTEEN, 360, _rate("r-sparse")),
    Bound("R-Sparse, tokens/s", "llama-3-8b", SIXTEEN, 300, _rate("r-sparse")),
    Bound("R-Sparse, tokens/s", "llama-2-7b", ("float32",), 200, _rate("r-sparse")),
    Bound("GPU memory, R-Sparse over dense", "llama-2-7b", ("bfloat16",), 1.08, _memory, "min"),
)


def table(frame: pd.DataFrame, live: pd.DataFrame) -> pd.DataFrame:
    """A row per bound and GPU, and one for the decoder layers on each CPU that a frame has. live: this run's rows."""
    rows = [row for bound in BOUNDS for row in _of(bound, whole(at(frame, **SETTING, where="cuda")))]
    rows += layers_rows(pd.concat([frame, live.assign(device=live["device"] + " (this run)")])
                        if len(live) else frame)  # fmt: skip
    columns = ["bound", "model", "storage", "device", "asked", "measured", "met"]
    return pd.DataFrame(rows).reindex(columns=columns)


def _of(bound: Bound, frame: pd.DataFrame) -> list[dict[str, Any]]:
    about = {"bound": bound.text, "model": bound.model, "storage": " or ".join(bound.dtypes),
             "asked": f"{'at least' if bound.best == 'max' else 'at most'} {bound.bound:g}"}  # fmt: skip
    found = []
    for device, own in at(frame, model=bound.model).groupby("device", sort=False):
        values = {dtype: bound.measured(at(own, dtype=dtype)) for dtype in bound.dtypes}
        values = {dtype: value for dtype, value in values.items() if not pd.isna(value)}
        if values:
            dtype = (max if bound.best == "max" else min)(values, key=values.__getitem__)
            judged = ("yes" if bound.met(values[dtype]) else "no") if GPU in device else f"not judged: no {GPU}"
            found.append(about | {"storage": dtype, "device": device, "measured": values[dtype], "met": judged})
    if not any(row["met"] in ("yes", "no") for row in found):
        found.append(about | {"device": f"an {GPU}", "met": "not measured"})
    return found


def layers_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The CPU's bound: dense decoder layers' time over R-Sparse's, float32 and half of the bytes, lm_head left out."""
    about = {"bound": "decoder layers without lm_head, dense time over R-Sparse's", "storage": "float32",
             "asked": f"at least {LAYERS_OVER_DENSE:g}"}  # fmt: skip
    found = []
    keys = ["device", "model", "layers", "prompt", "new"]
    own = at(frame, where="cpu", dtype="float32", batch=1)
    for (device, model, layers, *_), part in own[own["layers"] > 0].groupby(keys, sort=False):
        dense, sparse = _row(part, "dense"), _row(part, "r-sparse")
        if len(dense) and len(sparse) and "step_parts_s.head" in part:
            value = layers_s(dense.iloc[0]) / layers_s(sparse.iloc[0])
            found.append(about | {"model": f"{model}, layers: {layers:.0f}", "device": device, "measured": value,
                                  "met": "yes" if value >= LAYERS_OVER_DENSE else "no"})  # fmt: skip
    return found or [about | {"model": "llama-2-7b", "device": "a CPU", "met": "not measured"}]


def limits(frame: pd.DataFrame) -> pd.DataFrame:
    """R-Sparse at the bounds' settings: what bytes alone allow, as projected and as read, and what was reached."""
    own = whole(at(frame, **SETTING, where="cuda"))
    part = at(own, name="r-sparse", sparsity=SPARSITY, rho=RHO)
    part = part[part["model"].isin(LIMITS)]
    ratio, limit = over(part, "dense", own), part["byte_limit_over_dense"] if len(part) else []
    return pd.DataFrame({
        "device": part["device"], "model": part["model"], "storage": part["dtype"],
        "projected byte limit": [LIMITS[x] for x in part["model"]], "byte limit of this run": limit,
        "over our dense engine": ratio, "over HF compiled": over(part, "hf-static-compiled", own),
        "over HF eager in FP32": over(part, "hf-eager", own, "float32"),
    })  # fmt: skip


def reading(found: pd.DataFrame) -> str:
    """How many bounds are met, what the others reached, and how many were not measured; of `table`."""
    judged, missed = found[found["met"].isin(["yes", "no"])], found[found["met"] == "no"]
    words = f"{(found['met'] == 'yes').sum()} of {len(judged)} bounds that were measured are met."
    if len(missed):
        said = [f"{row['bound']}, {row['model']} in {row['storage']} on {row['device']}: {row['measured']:.4g} instead "
                f"of {row['asked']}" for _, row in missed.iterrows()]  # fmt: skip
        words += f" Missed: {'; '.join(said)}."
    if absent := (found["met"] == "not measured").sum():
        words += f" {absent} {'was' if absent == 1 else 'were'} not measured."
    return words
