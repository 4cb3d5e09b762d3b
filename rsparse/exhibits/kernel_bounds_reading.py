"""The bounds that this project set itself for its kernels, and whether timings meet them.

Of half of the bytes, one token and Gaussian inputs. A bound is met on a device where every shape timed meets it. Shares
are of the fastest reading that a device has shown, in a product or in a plain sum, see `kernel_reading.fastest`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from kernels.processors import shared
from rsparse.exhibits.kernel_reading import CHAIN, at, fastest, geometric_mean, headline, linears, processor_share

SIXTEEN = ("bfloat16", "float16")
SHARED = "not judged: a shared machine"
PARTLY = "not judged: some linears alone"
WHOLE = 4
"""Fused linears of a block, which a mean is of."""


def _mean(own: pd.DataFrame) -> float:
    return geometric_mean(linears(own)["over torch"])


def _slowest(own: pd.DataFrame) -> float:
    return float(linears(own)["over torch"].min())


def _chained(own: pd.DataFrame) -> float:
    return float(at(own, linear=CHAIN)["over torch"].mean())


def _share(m: int, n: int) -> Callable[[pd.DataFrame], float]:
    def lowest(own: pd.DataFrame) -> float:
        wanted = at(linears(own), m=m, n=n)
        return float((1e6 * wanted["bytes"] / wanted["ours us"] / wanted["fastest"]).min())

    return lowest


def _ratio(m: int, n: int) -> Callable[[pd.DataFrame], float]:
    return lambda own: float(at(linears(own), m=m, n=n)["over torch"].min())


@dataclass(frozen=True)
class Bound:
    """At least so much, of the timings of one shape and storage; `measured` is NaN where they do not hold it.

    where: "cuda" or "cpu".
    """

    text: str
    dtypes: tuple[str, ...]
    at_least: float
    measured: Callable[[pd.DataFrame], float]
    where: str = "cuda"


BOUNDS = (
    Bound("geometric mean over torch, linear by linear", SIXTEEN, 1.7, _mean),
    Bound("over torch, chained through blocks", SIXTEEN, 1.65, _chained),
    Bound("slowest linear, over torch", SIXTEEN, 1.55, _slowest),
    Bound("geometric mean over torch, linear by linear", ("float32",), 1.95, _mean),
    Bound("over torch in bfloat16, 28672x4096", ("int4",), 4, _ratio(28672, 4096)),
    Bound("over torch in bfloat16, 4096x14336", ("int4",), 4, _ratio(4096, 14336)),
    Bound("share of the fastest reading, 28672x4096", SIXTEEN, 0.82, _share(28672, 4096)),
    Bound("share of the fastest reading, 12288x4096", SIXTEEN, 0.70, _share(12288, 4096)),
    Bound("share of the fastest reading, 4096x4096", SIXTEEN, 0.48, _share(4096, 4096)),
    Bound("geometric mean over torch, linear by linear", ("float32",), 1.5, _mean, "cpu"),
)


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per bound, storage and device: the lowest value over shapes, of which shape, and met or not."""
    found, frame = [], frame.assign(fastest=frame["device"].map(fastest(frame)))
    for bound in BOUNDS:
        for dtype in bound.dtypes:
            own = headline(at(frame, where=bound.where, dtype=dtype))
            rows = [_row(bound, part) for _, part in own.groupby("device", sort=False)]
            about = {"bound": bound.text, "storage": dtype, "at least": bound.at_least}
            absent = {"device": {"cuda": "a GPU", "cpu": "a CPU"}[bound.where], "met": "not measured"}
            found += [about | row for row in rows if row] or [about | absent]
    columns = ["bound", "storage", "device", "at least", "measured", "lowest of", "met", "shapes that meet it"]
    return pd.DataFrame(found).reindex(columns=columns)


def _row(bound: Bound, own: pd.DataFrame) -> dict[str, object]:
    values = {shape: bound.measured(part) for shape, part in own.groupby("shape")}
    values = {shape: value for shape, value in values.items() if not pd.isna(value)}
    if not values:
        return {}
    lowest = min(values, key=values.__getitem__)
    names = list(dict.fromkeys(linears(at(own, shape=lowest))["linear"]))
    of = lowest if len(names) == WHOLE else f"{lowest} ({', '.join(names)} alone)"
    good = sum(value >= bound.at_least for value in values.values())
    met = "yes" if good == len(values) else "no"
    if bound.measured is _mean and len(names) < WHOLE:
        met = PARTLY
    if shared(processor_share(own)):
        met = SHARED
    return {
        "device": own["device"].iloc[0], "measured": values[lowest], "lowest of": of, "met": met,
        "shapes that meet it": f"{good} of {len(values)}",
    }  # fmt: skip


def reading(found: pd.DataFrame) -> str:
    """How many bounds are met, and by how much the others are missed; of `table`."""
    measured, missed = found[found["met"].isin(["yes", "no"])], found[found["met"] == "no"]
    words = f"{(found['met'] == 'yes').sum()} of {len(measured)} bounds that were measured are met by every shape."
    if len(missed):
        said = [
            f"{row['bound']}, {row['storage']} on {row['device']}: {row['measured']:.2f} instead of {row['at least']:g}"
            for _, row in missed.iterrows()
        ]
        words += f" Missed, with the lowest shape: {'; '.join(said)}."
    if out := (found["met"] == SHARED).sum():
        words += f" {out} cannot be judged by times of a machine that others used meanwhile."
    if out := (found["met"] == PARTLY).sum():
        words += f" {out} {'is' if out == 1 else 'are'} of four linears, and only some of them were timed."
    if absent := (found["met"] == "not measured").sum():
        words += f" {absent} {'was' if absent == 1 else 'were'} not measured."
    return words
