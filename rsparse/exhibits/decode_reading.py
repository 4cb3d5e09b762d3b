"""What timings of decoding say: against length, sparsity, batch, and part by part.

A frame holds flat rows: of the files that `python -m rsparse bench-decode` left (`decode_rows.published`), or of a
run's own table (`decode_rows.wide`). Needs no torch. Ratios are the other's time over ours: above 1, ours is faster.
Functions that choose return an empty frame where nothing was measured; `absent` puts that into words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from rsparse import paper
from rsparse.exhibits.comparison_reading import NAMES
from rsparse.exhibits.decode_rows import BASELINES, SETTING, is_speed
from rsparse.exhibits.gains import listed
from rsparse.exhibits.kernel_reading import devices

HALF = 0.5
LINE = 3
"""Lengths that make a line over length."""
OURS = "our dense engine"
LABELS = {"dense": OURS, "hf-eager": "Hugging Face, eager", "hf-static-compiled": "Hugging Face, compiled"}
METHODS = ("teal", "r-sparse", "cats", "griffin")
PARTS = {"qkv": "qkv", "attention": "attention", "out": "o", "gated": "gate+up", "down": "down", "head": "head",
         "left": "left over"}  # fmt: skip
"""Parts of a step by their names in the files, in the order of a block."""
DTYPES = ("float32", "bfloat16", "float16", "int4")
TEAL_SPARSITIES = (0.0, 0.25, 0.4, 0.5)


def speeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Without rows whose products read every weight for want of a kernel: their time is not their method's."""
    return frame[np.array([is_speed(row) for _, row in frame.iterrows()], dtype=bool)]


def whole(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of models with all of their layers."""
    return frame[frame["layers"] == 0]


def at(frame: pd.DataFrame, **where) -> pd.DataFrame:
    """The rows with these values."""
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return frame


def absent(frame: pd.DataFrame, choose: Callable[[pd.DataFrame], pd.DataFrame], what: str) -> str:
    """A sentence where no device's rows have what `choose` takes, else ""."""
    if any(True for _ in devices(frame, choose)):
        return ""
    return f"*No published file has {what} yet, so that nothing is shown here.*"


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """By model, storage, baselines first, then methods by sparsity."""
    names = [*BASELINES[1:], "dense", *METHODS]
    keys = pd.DataFrame({
        "model": frame["model"], "dtype": [DTYPES.index(x) for x in frame["dtype"]], "prompt": frame["prompt"],
        "name": [names.index(x) if x in names else len(names) for x in frame["name"]],
        "sparsity": frame["sparsity"], "batch": frame["batch"],
    }, index=frame.index)  # fmt: skip
    return frame.loc[keys.sort_values(list(keys), kind="stable").index]


def label(row: pd.Series) -> str:
    """A row as legends call it."""
    name = row["name"]
    return LABELS[name] if name in LABELS else f"{NAMES.get(name, name)} {row['sparsity']:.0%}"


def panel(row: pd.Series) -> str:
    """A model and its storage, as titles have them."""
    return f"{row['model']}, {row['dtype']}"


def with_most_rows(frame: pd.DataFrame, keys: Sequence[str], longest: bool = True) -> pd.DataFrame:
    """Of every group by `keys` the prompt and length with the most rows; of several the longest, or the shortest."""
    if frame.empty:
        return frame
    place = [*keys, "prompt", "new"]
    sizes = frame.groupby(place).size().reset_index(name="rows")
    order = sizes.sort_values(["rows", "prompt", "new"], ascending=[False, not longest, not longest])
    return frame.merge(order.drop_duplicates(list(keys))[place], on=place)


def over(frame: pd.DataFrame, baseline: str, among: pd.DataFrame, dtype: str | None = None) -> np.ndarray:
    """Time of `baseline`, a row of `among` of the same setting, over that of each row of `frame`; NaN without one.

    dtype: of the baseline, where it is not the row's own.
    """
    base = at(among, name=baseline) if dtype is None else at(among, name=baseline, dtype=dtype)
    keys = [name for name in SETTING if dtype is None or name != "dtype"]
    base = base.drop_duplicates(keys, keep="last")[[*keys, "step_s"]].rename(columns={"step_s": "base"})
    found = frame[[*keys, "step_s"]].merge(base, on=keys, how="left")
    return (found["base"] / found["step_s"]).to_numpy(dtype=float)


# What there is


def coverage(frame: pd.DataFrame) -> pd.DataFrame:
    """What was timed: a row per device, model, storage and lengths."""
    keys, found = ["device", "model", "layers", "dtype", "prompt", "new"], []
    for key, own in frame.groupby(keys, sort=False):
        device, model, layers, dtype, prompt, new = key
        names = list(dict.fromkeys(label(row) for _, row in ordered(own).iterrows()))
        found.append({
            "device": device, "model": model, "layers": f"{layers:.0f}" if layers else "all", "storage": dtype,
            "prompt": int(prompt), "new": int(new), "batches": ", ".join(f"{x:.0f}" for x in sorted(set(own["batch"]))),
            "rows": ", ".join(names), "measured": max(own["date"])[:10],
        })  # fmt: skip
    return pd.DataFrame(found)


def coverage_reading(frame: pd.DataFrame) -> str:
    """Which devices; how many rows are no speed and are left out from here on."""
    if frame.empty:
        return (
            "**Nothing is published yet:** `data/results/decode/` holds no file of `python -m rsparse bench-decode`. "
            "The sections below say so one by one; this machine's own timings are further down."
        )
    random = frame.loc[frame["weights"] == "random", "model"].nunique()
    words = f"{len(frame)} rows on {listed(sorted(set(frame['device'])))}; of {random} models the weights are random."
    return f"{words} {left_out(frame)}".strip()


def left_out(frame: pd.DataFrame) -> str:
    """Which rows are not shown as speeds."""
    out = frame[~frame.index.isin(speeds(frame).index)]
    if out.empty:
        return "Every sparse row was computed by kernels that leave unread what it leaves unread."
    names = listed(sorted({label(row) for _, row in out.iterrows()}))
    count = f"{len(out)} {'row was' if len(out) == 1 else 'rows were'}"
    return (f"{count} computed by the evaluation's modules, which read every weight ({names}): no speeds of a sparse "
            "method, and left out of everything below.")  # fmt: skip


# Length


def lengths(frame: pd.DataFrame) -> pd.DataFrame:
    """One text after the longest prompt, of settings timed at several lengths; the baselines and what is at half."""
    own = whole(at(frame, batch=1))
    columns = [name for name in own if name.startswith("tokens_per_s.")]
    own = own[own[columns].notna().sum(axis=1) >= LINE] if columns else own.iloc[:0]
    own = own[own["prompt"] == own["prompt"].max()]
    return ordered(own[own["name"].isin(BASELINES) | (own["sparsity"] == HALF)])


def length_points(own: pd.DataFrame) -> pd.DataFrame:
    """For `figures.speed_lines`: tokens per second of every row and length."""
    return pd.DataFrame([
        {"panel": panel(row), "series": label(row), "look": row["name"], "x": length,
         "value": row[f"tokens_per_s.{length}"]}
        for _, row in own.iterrows() for length in _lengths(own) if not pd.isna(row[f"tokens_per_s.{length}"])
    ])  # fmt: skip


def gain_points(own: pd.DataFrame) -> pd.DataFrame:
    """For `figures.speed_lines`: by how many percent R-Sparse is faster than every baseline, length by length; `mark`
    is the paper's gain, beside its own setting alone, FP32 over eager code."""
    found = []
    for _, row in at(own, name="r-sparse").iterrows():
        same = own[(own[SETTING] == row[SETTING]).all(axis=1)]
        for _, base in same[same["name"].isin(BASELINES)].iterrows():
            alike = row["dtype"] == "float32" and base["name"] == "hf-eager"
            mark = paper_gain(row["model"]) if alike else np.nan
            for length in _lengths(own):
                gain = 100 * (row[f"tokens_per_s.{length}"] / base[f"tokens_per_s.{length}"] - 1)
                found.append({"panel": panel(row), "series": f"over {label(base)}", "look": base["name"], "x": length,
                              "value": gain, "mark": mark})  # fmt: skip
    columns = ["panel", "series", "look", "x", "value", "mark"]
    return pd.DataFrame(found, columns=columns).dropna(subset=["value"])


def gain_table(own: pd.DataFrame) -> pd.DataFrame:
    """A row per model, storage and baseline: R-Sparse's gain at every length, and the paper's."""
    points = gain_points(own)
    found = []
    for (title, series), part in points.groupby(["panel", "series"], sort=False):
        model, _, dtype = title.partition(", ")
        found.append({"model": model, "storage": dtype, "gain": series}
                     | {f"{x} tokens (%)": value for x, value in zip(part["x"], part["value"], strict=True)}
                     | {"paper, A6000, up to (%)": part["mark"].iloc[0]})  # fmt: skip
    return pd.DataFrame(found)


def paper_gain(model: str) -> float:
    """Largest gain, in percent, that R-Sparse's Figure 6 has of a model; NaN where it has none."""
    rows = paper.reported(exhibit="figure-6", paper="r-sparse")
    rows = rows[(rows["metric"] == "speed_gain_max") & (rows["model"].str.lower() == model.lower())]
    return float(rows["value"].iloc[0]) if len(rows) else np.nan


def gain_reading(own: pd.DataFrame) -> str:
    """The range of the largest gains over each baseline, the paper's setting beside the paper, and the trend."""
    points = gain_points(own)
    if points.empty:
        return "R-Sparse at half of the bytes and a baseline beside it were not measured here."
    lines = points.sort_values("x", kind="stable").groupby(["panel", "series"], sort=False)
    table = lines.agg(most=("value", "max"), first=("value", "first"), last=("value", "last"), mark=("mark", "first"))
    said = [f"{_span(part['most'], 0)}% {name}" for name, part in table.groupby("series", sort=False)]
    words = f"Largest gains of R-Sparse at {HALF:.0%}, over models and storages: {listed(said)}."
    papers = [f"{row['most']:.0f}% for {title.partition(', ')[0]}, where the paper has {row['mark']:.0f}%"
              for (title, _), row in table.dropna(subset=["mark"]).iterrows()]  # fmt: skip
    words += f" In FP32 over eager code, the paper's setting on another GPU: {listed(papers)}." if papers else ""
    shrinks = (table["last"] < table["first"]).sum()
    return f"{words} From the shortest to the longest generation {shrinks} of {len(table)} gains shrink."


def _span(values: pd.Series, decimals: int = 2) -> str:
    low, high = (f"{x:.{decimals}f}" for x in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _lengths(own: pd.DataFrame) -> list[int]:
    return sorted(int(name.partition(".")[2]) for name in own if name.startswith("tokens_per_s."))


# TEAL


def teal(frame: pd.DataFrame) -> pd.DataFrame:
    """One text's TEAL rows at the sparsities of its paper's table, and every baseline of their settings."""
    own = whole(at(frame, batch=1))
    mine = own[(own["name"] == "teal") & own["sparsity"].isin(TEAL_SPARSITIES)]
    settings = set(mine[SETTING].apply(tuple, axis=1)) if len(mine) else set()
    same = own[np.array([tuple(row) in settings for row in own[SETTING].to_numpy()], dtype=bool)]
    return ordered(same[same["name"].isin(BASELINES) | same.index.isin(mine.index)])


def teal_table(own: pd.DataFrame) -> pd.DataFrame:
    """A row per setting and sparsity: ratios to the baselines beside what TEAL's paper reports of two GPUs."""
    part = own[own["name"] == "teal"]
    found = pd.DataFrame({
        "model": part["model"], "storage": part["dtype"], "prompt": part["prompt"].astype(int),
        "new": part["new"].astype(int), "sparsity (%)": [f"{100 * x:.0f}" for x in part["sparsity"]],
        "tokens/s": 1 / part["step_s"], f"over {OURS}": over(part, "dense", own),
        "over HF compiled": over(part, "hf-static-compiled", own), "over HF eager": over(part, "hf-eager", own),
    })  # fmt: skip
    for gpu in ("a6000", "a100"):
        found[f"TEAL's paper, {gpu.upper()}"] = [paper_teal(m, s, gpu) for m, s in zip(part["model"], part["sparsity"],
                                                                                       strict=True)]  # fmt: skip
    return found.dropna(axis="columns", how="all")


def paper_teal(model: str, sparsity: float, gpu: str) -> str:
    """Speed-up over a compiled dense loop that TEAL's Table 3 has; the range over its models where it is not known of
    this one; "" where neither is."""
    rows = paper.reported(exhibit="figure-6", paper="teal")
    rows = rows[(rows["task"] == f"decode-{gpu}") & np.isclose(rows["sparsity"], sparsity)]
    own = rows[(rows["model"].str.lower() == model.lower()) & (rows["metric"] == "speedup")]
    if len(own):
        return f"{own['value'].iloc[0]:.2f}"
    ends = [rows.loc[rows["metric"] == f"speedup_{end}", "value"] for end in ("min", "max")]
    return " to ".join(f"{x.iloc[0]:.2f}" for x in ends) + " (its models)" if all(map(len, ends)) else ""


def teal_reading(own: pd.DataFrame) -> str:
    """TEAL's ratio over our dense engine at the largest of its sparsities, setting by setting."""
    part = own[own["name"] == "teal"]
    part = part.assign(ratio=over(part, "dense", own)).dropna(subset=["ratio"])
    if part.empty:
        return "Our dense engine was not timed beside TEAL here."
    said = [f"{_span(rows['ratio'])} at {sparsity:.0%}" for sparsity, rows in part.groupby("sparsity")]
    return (f"TEAL over {OURS}, which like the baseline of TEAL's authors is the same loop without sparsity: "
            f"{listed(said)}. Their numbers are of other GPUs and trained weights."
            + _of_other_runs(own[own["name"] == "teal"], own, [(name, None) for name in BASELINES]))  # fmt: skip


# Parts of a step


def parts(frame: pd.DataFrame) -> pd.DataFrame:
    """One text's steps by part: our dense engine and every method at half or nearest to it, of every model, storage and
    prompt."""
    own, column = whole(at(frame, batch=1)), "step_parts_s.step"
    own = own[own[column].notna()] if column in own else own.iloc[:0]
    near = own.assign(near=(own["sparsity"] - HALF).abs()).sort_values("near", kind="stable")
    return ordered(own.loc[near.drop_duplicates(["model", "dtype", "prompt", "name"]).index])


def part_bars(own: pd.DataFrame) -> pd.DataFrame:
    """For `figures.grouped_bars`: milliseconds, a group per part, a series per row; of every model one storage,
    bfloat16 where it was timed, after the prompt with the most rows, the longest of several."""
    storages = own.groupby("model")["dtype"].agg(lambda x: "bfloat16" if "bfloat16" in set(x) else x.iloc[0])
    shown = with_most_rows(own[own["dtype"] == own["model"].map(storages)], ["model"])
    return pd.DataFrame([
        {"panel": f"{panel(row)}\nprompt of {row['prompt']:.0f} tokens", "group": title, "series": label(row),
         "value": 1e3 * row[f"step_parts_s.{part}"]}
        for _, row in shown.iterrows() for part, title in PARTS.items()
    ])  # fmt: skip


def part_table(own: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds of every part, of the whole step, and of what weights' bytes do not explain."""
    found = pd.DataFrame({"model": own["model"], "storage": own["dtype"], "prompt": own["prompt"].astype(int),
                          "row": [label(x) for _, x in own.iterrows()]})  # fmt: skip
    for part, title in PARTS.items():
        found[title] = 1e3 * own[f"step_parts_s.{part}"]
    return found.assign(**{"step": 1e3 * own["step_parts_s.step"], "beside the weights": 1e3 * own["non_weight_s"]})


def part_reading(own: pd.DataFrame) -> str:
    """What share of a step is products that a method can make sparse."""
    step = own["step_parts_s.step"]
    products = sum(own[f"step_parts_s.{part}"] for part in ("qkv", "out", "gated", "down")) / step
    rest = own["step_parts_s.attention"] / step
    names = pd.Series([label(row) for _, row in own.iterrows()], own.index)
    said = [f"{_span(100 * part, 0)}% of {name}'s" for name, part in products.groupby(names, sort=False)]
    prompts = listed([str(x) for x in sorted({int(x) for x in own["prompt"]})])
    return (f"The four products, which a method can make sparse, take {listed(said)} step, over models, storages and "
            f"prompts of {prompts} tokens; attention takes {_span(100 * rest, 0)}%.")  # fmt: skip


# Sparsity


def sweep(frame: pd.DataFrame) -> pd.DataFrame:
    """One text's rows of methods at a sparsity that have our dense engine beside them; of every model and storage the
    lengths with the most rows, the shortest prompt of several."""
    own = whole(at(frame, batch=1))
    own = own.assign(ratio=over(own, "dense", own)).dropna(subset=["ratio"])
    own = own[own["name"].isin(METHODS) & (own["sparsity"] > 0)]
    return ordered(with_most_rows(own, ["model", "dtype"], longest=False))


def sweep_points(own: pd.DataFrame) -> pd.DataFrame:
    """For `figures.speed_lines`: times our dense engine, by the sparsity that thresholds left, in percent; of models
    and storages with several sparsities, unless none has."""
    several = own.groupby(["model", "dtype"])["sparsity"].transform("nunique") > 1
    own = own[several] if several.any() else own
    return pd.DataFrame([
        {"panel": panel(row), "series": NAMES.get(row["name"], row["name"]), "look": row["name"],
         "x": 100 * row["realised"], "value": row["ratio"], "limit": row["byte_limit_over_dense"]}
        for _, row in own.iterrows()
    ])  # fmt: skip


def sweep_table(own: pd.DataFrame) -> pd.DataFrame:
    """Every method and sparsity: what was planned and realised, the ratio, and what bytes alone would give."""
    return pd.DataFrame({
        "model": own["model"], "storage": own["dtype"], "prompt": own["prompt"].astype(int),
        "method": [NAMES.get(x, x) for x in own["name"]], "planned (%)": 100 * own["planned"],
        "realised (%)": 100 * own["realised"], "tokens/s": 1 / own["step_s"], f"over {OURS}": own["ratio"],
        "byte limit": own["byte_limit_over_dense"], "computed by": own["linears"],
    })  # fmt: skip


def sweep_reading(own: pd.DataFrame) -> str:
    """From which sparsity on each method is faster than our dense engine, over all settings."""
    said = []
    for name, rows in own.groupby("name", sort=False):
        slow, fast = rows[rows["ratio"] <= 1], rows[rows["ratio"] > 1]
        most = rows.loc[rows["ratio"].idxmax()]
        start = f"{NAMES.get(name, name)} is faster in {len(fast)} of {len(rows)} timings"
        if len(slow):
            start += f", not at {slow['sparsity'].min():.0%} to {slow['sparsity'].max():.0%} in the others"
        said.append(f"{start}, by at most {most['ratio']:.2f} ({most['sparsity']:.0%}, {panel(most)}; bytes alone "
                    f"{most['byte_limit_over_dense']:.2f})")  # fmt: skip
    return f"Over {OURS}: {'; '.join(said)}."


# Several texts at a time


def batches(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of settings that were timed with several texts, our engine's alone, with a dense one beside each."""
    own = whole(frame)
    own = own[(own["engine"] == "ours")]
    own = own.assign(ratio=over(own, "dense", own)).dropna(subset=["ratio"])
    keys = ["model", "dtype", "prompt", "new", "name", "sparsity"]
    several = own[own["batch"] > 1]
    same = own.merge(several[keys].drop_duplicates(), on=keys) if len(several) else several
    return ordered(same[same["name"] != "dense"])


def batch_points(own: pd.DataFrame) -> pd.DataFrame:
    """For `figures.speed_lines`: the ratio to our dense engine at the same batch, and the bytes that the texts want
    together, a panel each."""
    found = []
    for _, row in own.iterrows():
        read = 100 * row["bytes.decoder"] / row["bytes.dense"]
        for place, value in ((f"over {OURS}", row["ratio"]), ("decoder bytes read (%)", read)):
            found.append({"panel": f"{panel(row)}:\n{place}", "ylabel": place, "series": label(row),
                          "x": row["batch"], "value": value})  # fmt: skip
    return pd.DataFrame(found)


def batch_table(own: pd.DataFrame) -> pd.DataFrame:
    """A row per method and batch: all texts' tokens per second, the ratio, the union that is read."""
    return pd.DataFrame({
        "model": own["model"], "storage": own["dtype"], "row": [label(row) for _, row in own.iterrows()],
        "texts": own["batch"].astype(int), "tokens/s, all texts": own["batch"] / own["step_s"],
        f"over {OURS}": own["ratio"], "decoder bytes read (%)": 100 * own["bytes.decoder"] / own["bytes.dense"],
        "byte limit": own["byte_limit_over_dense"], "computed by": own["linears"],
    })  # fmt: skip


def batch_reading(own: pd.DataFrame) -> str:
    """How much of the gain is left at the largest batch of each model and storage."""
    said = []
    for title, rows in own.groupby([f"{panel(x)}, {label(x)}" for _, x in own.iterrows()], sort=False):
        few, many = (rows.loc[rows["batch"].agg(x)] for x in ("idxmin", "idxmax"))
        read = [f"{x['bytes.decoder'] / x['bytes.dense']:.0%}" for x in (few, many)]
        said.append(f"{title}: {few['ratio']:.2f} with {few['batch']:.0f}, {many['ratio']:.2f} with "
                    f"{many['batch']:.0f}, where {read[1]} of the bytes are wanted instead of {read[0]}")  # fmt: skip
    return f"Over {OURS} at the same number of texts: {'; '.join(said)}."


# The three ratios


def ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """One text's rows of R-Sparse at half of the bytes, and what they are compared with."""
    own = whole(at(frame, batch=1))
    return ordered(own) if len(at(own, name="r-sparse", sparsity=HALF)) else own.iloc[:0]


def ratio_table(own: pd.DataFrame) -> pd.DataFrame:
    """A row per setting: tokens per second of R-Sparse, and its ratio to each of the baselines, named for what it is.
    """
    part = at(own, name="r-sparse", sparsity=HALF)
    return pd.DataFrame({
        "model": part["model"], "storage": part["dtype"], "prompt": part["prompt"].astype(int),
        "new": part["new"].astype(int), "tokens/s": 1 / part["step_s"],
        "byte limit": part["byte_limit_over_dense"], f"over {OURS}": over(part, "dense", own),
        "over HF compiled, same storage": over(part, "hf-static-compiled", own),
        "over HF eager, same storage": over(part, "hf-eager", own),
        "over HF eager in FP32": over(part, "hf-eager", own, "float32"),
    })  # fmt: skip


def ratio_reading(own: pd.DataFrame) -> str:
    """The range over settings of every ratio, and which baselines are missing."""
    found = ratio_table(own)
    names = [name for name in found if name.startswith("over ")]
    said, missing = [], []
    for name in names:
        values = found[name].dropna()
        if values.empty:
            missing.append(name.removeprefix("over "))
        else:
            said.append(f"{_span(values)} {name}")
    words = f"R-Sparse at {HALF:.0%}: {listed(said)}." if said else "No baseline was timed beside R-Sparse."
    words += f" Not measured beside it: {listed(missing)}." if missing else ""
    same = [(name, None) for name in BASELINES]
    return words + _of_other_runs(at(own, name="r-sparse", sparsity=HALF), own, [*same, ("hf-eager", "float32")])


def _of_other_runs(part: pd.DataFrame, among: pd.DataFrame, against: Sequence[tuple[str, str | None]]) -> str:
    """Which baselines (and of which storage, where not the row's own) are of another run than the rows of `part` that
    they stand beside; "" where none is."""
    found = set()
    for name, dtype in against:
        base = at(among, name=name) if dtype is None else at(among, name=name, dtype=dtype)
        keys = [x for x in SETTING if dtype is None or x != "dtype"]
        both = part[[*SETTING, "date"]].merge(base[[*keys, "date"]].rename(columns={"date": "of_base"}), on=keys)
        apart = both[both["date"] != both["of_base"]]
        said = LABELS[name] + (" in FP32" if dtype else "")
        found |= {f"{said} ({panel(row)})" for _, row in apart.iterrows() if row["dtype"] != dtype}
    return f" Timed in another run on the same kind of device: {listed(sorted(found))}." if found else ""
