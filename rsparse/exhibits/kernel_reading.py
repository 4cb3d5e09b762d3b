"""What timings of the kernels say: against torch, against the bytes, linear by linear.

A frame holds one row per timing with the fields of `kernels.bench` for columns, `device` by its name: what
`python -m kernels.bench` left in files (`published`), or what a run measured itself (`kernel_speed.wide`). Needs no
torch. Ratios are the other's time over ours: above 1, ours is faster.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kernels.gathering import MOST, gathered_tokens
from kernels.processors import shared
from kernels.shapes import SIZES
from rsparse.exhibits.gains import listed
from rsparse.paths import ROOT

CHAIN = "chain"
HEADLINE = {"sparsity": 0.5, "batch": 1, "inputs": "gaussian"}
"""Where what varies elsewhere is held."""
SETTING = ["device", "shape", "dtype", "sparsity", "rho", "batch", "inputs", "linear"]
"""Columns that tell one timing from another; the later of two of the same counts."""
BATCHES, BATCH_SPARSITIES = (2, 4, 8), (0.5, 0.75, 0.9)
"""What the command in data/results/kernels/README.md asked of batches."""
PARTS = {
    "launch us": "a launch that does nothing", "as many channels, all read us": "as many channels, all read",
    "sparse path us": "chosen by a mask", "ours us": "with the rank path",
}  # fmt: skip
"""Field -> what it times, each with something more than the one before."""
INPUTS = {"gaussian": "Gaussian", "published": "published activation quantiles", "heavy": "heavy-tailed (Student's t)"}
DTYPES = ("float32", "bfloat16", "float16", "int4")


def published(folder: str | Path) -> pd.DataFrame:
    """All timings in the JSON files below `folder` (relative to the checkout), files in order of their dates.

    ValueError where there is none.
    """
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / folder).rglob("*.json"))]
    documents.sort(key=lambda x: x["about"]["date"])
    rows = [
        row | {"where": row["device"], "device": _name(about, row), "torch": about["torch"], "date": about["date"][:10]}
        for about, found in ((x["about"], x["rows"]) for x in documents) for row in found
    ]  # fmt: skip
    if not rows:
        raise ValueError(f"{folder} holds no timings; expected JSON files of python -m kernels.bench")
    return pd.DataFrame(rows).drop_duplicates(SETTING, keep="last", ignore_index=True)


def _name(about: dict[str, Any], row: dict[str, Any]) -> str:
    """Of a device; a CPU's with the threads that were used."""
    return f"{about['device']}, {about['threads']} threads" if row["device"] == "cpu" else about["device"]


def devices(
    frame: pd.DataFrame, choose: Callable[[pd.DataFrame], pd.DataFrame]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Device by device, what `choose` takes of its timings; nothing of a device where that is empty."""
    for device, own in frame.groupby("device", sort=False):
        if len(chosen := choose(own)):
            yield device, chosen


def coverage(frame: pd.DataFrame) -> pd.DataFrame:
    """What was timed, a row per device and storage."""
    found = []
    for (device, dtype), own in sorted(frame.groupby(["device", "dtype"]), key=lambda x: _order(*x[0])):
        found.append({
            "device": device, "storage": dtype, "torch": ", ".join(sorted(set(own["torch"]))),
            "shapes": ", ".join(sorted(set(own["shape"]))), "bytes left unread (%)": _percents(own["sparsity"]),
            "tokens": ", ".join(f"{x:.0f}" for x in sorted(set(own["batch"]))),
            "inputs": ", ".join(x for x in INPUTS if x in set(own["inputs"])), "timings": len(own),
            "taken": " to ".join(sorted({own["date"].min(), own["date"].max()})),
        })  # fmt: skip
    return pd.DataFrame(found)


def coverage_reading(frame: pd.DataFrame) -> str:
    """Which devices, from when to when."""
    dates = sorted(set(frame["date"]))
    days = f"on {dates[0]}" if len(dates) == 1 else f"from {dates[0]} to {dates[-1]}"
    return f"{len(frame)} timings on {listed(sorted(set(frame['device'])))}, taken {days}."


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive values."""
    return float(np.exp(np.log(np.asarray(values, dtype=float)).mean()))


def linears(frame: pd.DataFrame) -> pd.DataFrame:
    """Without chains."""
    return frame[frame["linear"] != CHAIN]


def at(frame: pd.DataFrame, **where) -> pd.DataFrame:
    """The rows with these values."""
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return frame


# Sparsity


def sweep(frame: pd.DataFrame) -> pd.DataFrame:
    """One token's linears of the shape and storage with the most sparsities, in their order; none if it has one."""
    part = linears(at(frame, batch=1, inputs="gaussian"))
    counts = part.groupby(["shape", "dtype"])["sparsity"].nunique() if len(part) else pd.Series(dtype=int)
    if counts.empty or counts.max() < 2:
        return part.iloc[:0]
    shape, dtype = counts.idxmax()
    return at(part, shape=shape, dtype=dtype).sort_values("sparsity", kind="stable")


def sweep_table(own: pd.DataFrame) -> pd.DataFrame:
    """A row per sparsity: geometric means over linears, and how many times fewer bytes are read."""
    found = []
    for sparsity, part in own.groupby("sparsity"):
        saved = part["dense bytes"].sum() / part["bytes"].sum()
        found.append({
            "bytes left unread (%)": 100 * sparsity, "a block's linears (us)": part["ours us"].sum(),
            "torch's (us)": part["torch us"].sum(), "over torch": geometric_mean(part["over torch"]),
            "slowest linear": part["over torch"].min(), "over our dense": geometric_mean(part["over ours dense"]),
            "bytes, dense over read": saved, "of the bandwidth (%)": 100 * part["bandwidth share"].mean(),
        })  # fmt: skip
    return pd.DataFrame(found)


def sweep_reading(own: pd.DataFrame) -> str:
    """From where on ours is faster, and how what it gains compares with the bytes that it saves."""
    table = sweep_table(own)
    one, ends = own.iloc[0], [table.iloc[0], table.iloc[-1]]
    said = [
        f"{x['bytes left unread (%)']:.0f}% of the bytes unread, so {x['bytes, dense over read']:.2f} times fewer "
        f"read, give {x['over torch']:.2f} over torch (geometric mean) at {x['of the bandwidth (%)']:.0f}% of the "
        "bandwidth"
        for x in ends
    ]  # fmt: skip
    words = f"`{one['shape']}` in {one['dtype']}: {crossover(table)} {'; '.join(said)}."
    if (table["over torch"] > table["bytes, dense over read"]).any():
        dense = geometric_mean(own["torch us"] / own["ours dense us"])
        words += f" Our dense kernel takes {1 / dense:.2f} of torch's time: more than the bytes account for can be won."
    return words


def crossover(table: pd.DataFrame) -> str:
    """From which sparsity on our kernel is faster than torch, of `sweep_table`: between two measured ones, linear."""
    s, ratio = table["bytes left unread (%)"].to_numpy(), table["over torch"].to_numpy()
    if (ratio > 1).all():
        return f"ours is the faster one at every sparsity timed, from {s[0]:.0f}% on."
    if (ratio <= 1).all():
        return f"ours is the slower one at every sparsity timed, up to {s[-1]:.0f}%."
    below = int(np.flatnonzero(ratio <= 1)[-1])
    if below == len(s) - 1:
        return f"ours is faster at some sparsities timed, and not at {s[-1]:.0f}%."
    share = (1 - ratio[below]) / (ratio[below + 1] - ratio[below])
    return f"ours is the faster one from about {s[below] + share * (s[below + 1] - s[below]):.0f}% on."


# The rank path


def broken_down(frame: pd.DataFrame) -> pd.DataFrame:
    """The timings that were broken down by leaving out."""
    return frame[frame["sparse path us"].notna()] if "sparse path us" in frame else frame.iloc[:0]


def parts(own: pd.DataFrame) -> pd.DataFrame:
    """`broken_down` for `figures.grouped_bars`, in microseconds: a panel per shape, storage and
    sparsity, a group per linear."""
    return pd.DataFrame([
        {"panel": f"{row['shape']}, {row['dtype']}, {row['sparsity']:.0%}", "group": row["linear"], "series": name,
         "value": row[field]}
        for _, row in own.iterrows() for field, name in PARTS.items()
    ])  # fmt: skip


def breakdown_table(own: pd.DataFrame) -> pd.DataFrame:
    """Microseconds that each part adds to those before it; of the rank path also what its bytes alone would take."""
    steps = own[list(PARTS)].diff(axis=1)
    return pd.DataFrame({
        "shape": own["shape"], "storage": own["dtype"], "bytes left unread (%)": 100 * own["sparsity"],
        "linear": own["linear"], "launch": own["launch us"],
        "reading": steps["as many channels, all read us"], "mask": steps["sparse path us"],
        "rank path": steps["ours us"], "its bytes alone": 1e6 * _rank_seconds(own), "together": own["ours us"],
        "all channels, dense": own["ours dense us"],
    })  # fmt: skip


def _rank_seconds(own: pd.DataFrame) -> pd.Series:
    """rho is the sparse path's share of the bytes that are read."""
    return (1 - own["rho"]) * own["bytes"] / own["read bandwidth"]


def breakdown_reading(own: pd.DataFrame) -> str:
    """What the rank path adds, in share of the product, and whether bytes explain it."""
    table, said = breakdown_table(own), []
    for (shape, dtype, unread), part in table.groupby(["shape", "storage", "bytes left unread (%)"], sort=False):
        share = part["rank path"].sum() / part["together"].sum()
        bytes_ = part["its bytes alone"].sum() / part["together"].sum()
        took = f"{share:.1%} of" if share > 0 else "less than can be seen of"
        said.append(f"{took} `{shape}` in {dtype} at {unread:.0f}% (its bytes alone: {bytes_:.1%})")
    negative = int((table[["reading", "mask", "rank path"]] < 0).to_numpy().sum())
    words = f"The rank path takes {listed(said)}, summed over the linears."
    if negative:
        words += (
            f" {negative} of {3 * len(table)} differences in the table are below zero: each is of two "
            "measurements, which on a GPU are also tuned apart."
        )
    return words


# Several tokens


def batches(frame: pd.DataFrame) -> pd.DataFrame:
    """Timings of several tokens, and of one token at the same shape and storage; none without the former."""
    part = linears(at(frame, inputs="gaussian"))
    several = part[part["batch"] > 1]
    same = part[["shape", "dtype"]].apply(tuple, axis=1).isin(set(zip(several["shape"], several["dtype"], strict=True)))
    return part[same].sort_values(["sparsity", "batch"], kind="stable") if len(several) else several


def batch_table(own: pd.DataFrame, union: float) -> pd.DataFrame:
    """A row per sparsity and number of tokens. union: share of the rows up to which the library gathers."""
    found = []
    for (shape, dtype, sparsity, batch), part in own.groupby(["shape", "dtype", "sparsity", "batch"]):
        found.append({
            "shape": shape, "storage": dtype, "sparsity of a token (%)": 100 * sparsity, "tokens": int(batch),
            "rows wanted together (%)": 100 * (1 - sparsity**batch),
            "over torch": geometric_mean(part["over torch"]), "over our dense": geometric_mean(part["over ours dense"]),
            "gathered by the rule": _gathers(sparsity, batch, union),
        })  # fmt: skip
    return pd.DataFrame(found)


def _gathers(sparsity: float, batch: float, union: float) -> str:
    return "yes" if batch <= gathered_tokens(sparsity, union=union) else "no"


def batch_points(own: pd.DataFrame) -> pd.DataFrame:
    """For `figures.gathering`: columns tokens, wanted (share of the rows), sparsity, value (geometric mean)."""
    groups = own.groupby(["shape", "dtype", "sparsity", "batch"])
    return pd.DataFrame([
        {"tokens": int(key[3]), "sparsity": key[2], "wanted": 1 - key[2] ** key[3],
         "value": geometric_mean(part["over torch"])} for key, part in groups
    ])  # fmt: skip


def batch_reading(own: pd.DataFrame, union: float) -> str:
    """Where gathering for several tokens pays, whether the library's rule says the same, and what is missing."""
    table = batch_table(own, union)
    table = table[table["tokens"] > 1]
    pays = table[table["over torch"] > 1]
    wrong = table[(table["over torch"] > 1) != (table["gathered by the rule"] == "yes")]
    cells = [f"{row['tokens']} tokens at {row['sparsity of a token (%)']:.0f}%" for _, row in pays.iterrows()]
    words = f"For several tokens ours is faster at {listed(cells)}" if cells else "For several tokens ours is slower"
    words += f", of {len(table)} cells timed. " if cells else f" in all of the {len(table)} cells timed. "
    words += f"By the library's rule rows are gathered where at most {MOST} tokens want at most {union:.0%} of them; "
    words += "every cell agrees." if wrong.empty else f"{len(wrong)} of them say otherwise."
    return f"{words} {_missing(table)}"


def _missing(table: pd.DataFrame) -> str:
    there = {(round(row["sparsity of a token (%)"]), row["tokens"]) for _, row in table.iterrows()}
    missing = [f"{b} at {s:.0%}" for s in BATCH_SPARSITIES for b in BATCHES if (round(100 * s), b) not in there]
    if not missing:
        return "All cells that were asked for are there."
    return f"The table is not complete: missing are {listed(missing)} (tokens at sparsity)."


# Storage


def headline(frame: pd.DataFrame) -> pd.DataFrame:
    """At half of the bytes, one token, Gaussian inputs; chains too."""
    return at(frame, **HEADLINE)


def storage_table(own: pd.DataFrame) -> pd.DataFrame:
    """A row per shape and storage: geometric means over linears, the slowest linear, and the chain where timed."""
    found = []
    for (shape, dtype), part in sorted(own.groupby(["shape", "dtype"]), key=lambda x: _order(*x[0])):
        single, chain = linears(part), at(part, linear=CHAIN)
        found.append({
            "shape": shape, "storage": dtype, "over torch": geometric_mean(single["over torch"]),
            "slowest linear": single["over torch"].min(), "over our dense": geometric_mean(single["over ours dense"]),
            "chained, over torch": chain["over torch"].mean(),
            "chained, over our dense": chain["over ours dense"].mean(),
        })  # fmt: skip
    return pd.DataFrame(found)


def storage_bars(own: pd.DataFrame) -> pd.DataFrame:
    """`storage_table` for `figures.grouped_bars`: a panel per opponent, a group per shape, a series per storage."""
    table = storage_table(own)
    panels = {"over torch": "over torch's dense product", "over our dense": "over our own kernel, dense"}
    return pd.DataFrame([
        {"panel": title, "group": row["shape"], "series": row["storage"], "value": row[column]}
        for column, title in panels.items() for _, row in table.iterrows()
    ])  # fmt: skip


def storage_reading(own: pd.DataFrame) -> str:
    """The range over models of every storage, and what INT4 is compared with."""
    table, said = storage_table(own), []
    for dtype, part in table.groupby("storage", sort=False):
        chained = part["chained, over torch"].dropna()
        one = f"{dtype} {_range(part['over torch'])} over torch and {_range(part['over our dense'])} over our dense"
        said.append(one + (f", chained {_range(chained)} over torch" if len(chained) else ""))
    words = f"Ranges over {table['shape'].nunique()} shapes: {'; '.join(said)}."
    if "int4" in set(table["storage"]):
        words += (
            " INT4 stands beside torch's product in bfloat16, which reads nearly four times its bytes before any is "
            "left out: what it owes to sparsity alone is the ratio over our dense kernel."
        )
    return words


# Bytes


def roofline(frame: pd.DataFrame) -> pd.DataFrame:
    """Every linear at half of its bytes, by storage."""
    own = linears(headline(frame))
    return own.sort_values("dtype", key=lambda x: x.map(DTYPES.index), kind="stable")


def fastest(frame: pd.DataFrame) -> pd.Series:
    """Device -> bytes per second of its fastest reading: of a plain sum, of a product of torch's, or of ours."""
    own = linears(frame)
    products = pd.concat([1e6 * own["dense bytes"] / own["torch us"], 1e6 * own["bytes"] / own["ours us"]])
    highest = products.groupby(pd.concat([own["device"]] * 2).to_numpy()).max()
    return highest.clip(lower=own.groupby("device")["read bandwidth"].median())


def roofline_reading(own: pd.DataFrame) -> str:
    """The share of the bandwidth that products of every storage reach, lowest and highest, and the fastest reading."""
    said = []
    for dtype, part in own.groupby("dtype", sort=False):
        low, high = (part.loc[part["bandwidth share"].agg(x)] for x in ("idxmin", "idxmax"))
        ends = [f"{row['bandwidth share']:.0%} ({_size(row)})" for row in (low, high)]
        said.append(f"{dtype} {' to '.join(ends)}")
    speed = own["read bandwidth"].median() / 1e12
    most = fastest(own).max() / 1e12
    return (f"Of {speed:.2f} TB/s, as measured by plain reading (median): {'; '.join(said)}. The fastest reading is at "
            f"{most:.2f} TB/s, by which the bounds below are judged.")  # fmt: skip


# Inputs


def inputs(frame: pd.DataFrame) -> pd.DataFrame:
    """One token at half of the bytes, of the shapes and storages with several kinds of inputs."""
    part = linears(at(frame, sparsity=HEADLINE["sparsity"], batch=1))
    kinds = part.groupby(["shape", "dtype"])["inputs"].transform("nunique") if len(part) else part["sparsity"]
    return part[kinds > 1]


def inputs_bars(own: pd.DataFrame) -> pd.DataFrame:
    """For `figures.grouped_bars`: the ratio over torch, a panel per shape and storage, a series per kind of inputs."""
    order = own.assign(place=own["inputs"].map(list(INPUTS).index)).sort_values("place", kind="stable")
    return pd.DataFrame([
        {"panel": f"{row['shape']}, {row['dtype']}", "group": row["linear"], "series": INPUTS[row["inputs"]],
         "value": row["over torch"]} for _, row in order.iterrows()
    ])  # fmt: skip


def inputs_reading(own: pd.DataFrame) -> str:
    """How far other inputs move our own time, at most."""
    times = own.pivot_table(index=["shape", "dtype", "linear"], columns="inputs", values="ours us", sort=False)
    means = own.groupby("inputs")["over torch"].agg(geometric_mean)
    said = [f"{INPUTS[kind]} {means[kind]:.2f}" for kind in INPUTS if kind in means]
    change = (times.drop(columns="gaussian").div(times["gaussian"], axis=0) - 1).stack()
    (_, _, linear, kind), worst = change.abs().idxmax(), change.loc[change.abs().idxmax()]
    return (
        f"Geometric means over torch: {listed(said)}. Beside Gaussian inputs, our time changes by at most "
        f"{abs(worst):.1%} ({linear}, {INPUTS[kind]})."
    )


# This run's own


def live_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Microseconds and ratios of every timing; ±: the standard error over rounds, where there are several."""
    return pd.DataFrame({
        "linear": frame["linear"], "m x n": [_size(row) for _, row in frame.iterrows()],
        "inputs": frame["inputs"], "tokens": frame["batch"], "bytes left unread (%)": 100 * frame["sparsity"],
        "torch (us)": frame["torch us"], "ours, dense (us)": frame["ours dense us"], "ours (us)": frame["ours us"],
        "over torch": frame["over torch"], "±": frame.get("over torch stderr", math.nan),
        "over our dense": frame["over ours dense"],
        "of the bandwidth (%)": 100 * frame["bandwidth share"],
    })  # fmt: skip


def live_reading(frame: pd.DataFrame) -> str:
    """Geometric means by sparsity, on which machine; what was not timed."""
    one, said = frame.iloc[0], []
    for sparsity, part in linears(at(frame, batch=frame["batch"].min(), inputs=one["inputs"])).groupby("sparsity"):
        said.append(f"{geometric_mean(part['over torch']):.2f} over torch and "
                    f"{geometric_mean(part['over ours dense']):.2f} over our dense at {sparsity:.0%}")  # fmt: skip
    names = list(dict.fromkeys(linears(frame)["linear"]))
    words = (
        f"Measured by this run on {one['device']}: `{one['shape']}` in {one['dtype']}, random weights, "
        f"{listed(names)}. Geometric means: {'; '.join(said)}."
    )
    warning = shared(processor_share(frame))
    return f"**{warning}** {words}" if warning else words


def processor_share(frame: pd.DataFrame) -> float:
    """The least that threads on a CPU had of the time that they wanted a processor; NaN where that was not measured."""
    return float(frame["processor share"].min()) if "processor share" in frame else math.nan


def together(known: pd.DataFrame, live: pd.DataFrame) -> pd.DataFrame:
    """Published and this run's timings below one another, the latter's device marked as this run's."""
    return pd.concat([known, live.assign(device=live["device"] + " (this run)")], ignore_index=True)


def _size(row: pd.Series) -> str:
    return f"{row['m']:.0f}x{row['n']:.0f}" if row["linear"] != CHAIN else "a block"


def _percents(values: pd.Series) -> str:
    return ", ".join(f"{100 * x:.0f}" for x in sorted(set(values)))


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return low if low == high else f"{low} to {high}"


def _order(name: str, dtype: str) -> tuple[int, str, int]:
    """Shapes as the kernels list them, other names by the alphabet, storages as `DTYPES`."""
    return list(SIZES).index(name) if name in SIZES else 0, name, DTYPES.index(dtype)
