"""What a run timed on its own machine: a few decoder layers, their products apart from lm_head."""

from __future__ import annotations

import pandas as pd

from rsparse.exhibits.decode_bounds_reading import LAYERS_OVER_DENSE
from rsparse.exhibits.decode_reading import PARTS, at, label, ordered, over, panel
from rsparse.exhibits.decode_rows import SETTING, layers_range, layers_s


def rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Timings of some layers alone, on a CPU."""
    return ordered(frame[(frame["layers"] > 0) & (frame["where"] == "cpu")]) if len(frame) else frame


def timed(frame: pd.DataFrame) -> pd.DataFrame:
    """Those whose steps were timed by part."""
    column = "step_parts_s.head"
    return ordered(frame[frame[column].notna()]) if column in frame else frame.iloc[:0]


def bars(own: pd.DataFrame) -> pd.DataFrame:
    """For `figures.grouped_bars`: milliseconds, a group per part, a series per row."""
    shown = own[own["engine"] == "ours"]
    return pd.DataFrame([
        {"panel": f"{panel(row)}{_layers(row)}", "group": title, "series": label(row),
         "value": 1e3 * row[f"step_parts_s.{part}"]}
        for _, row in shown.iterrows() for part, title in PARTS.items()
    ])  # fmt: skip


def table(own: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds of a step, of lm_head, and of the layers; ratios to our dense engine, with and without lm_head."""
    found = []
    for (_, row), ratio in zip(own.iterrows(), over(own, "dense", own), strict=True):
        dense = _dense(own, row)
        low, high = layers_range(row, dense)
        found.append({
            "model": row["model"] + _layers(row), "storage": row["dtype"], "row": label(row),
            "realised (%)": 100 * row["realised"], "step (ms)": 1e3 * row["step_s"],
            "head (ms)": 1e3 * row["step_parts_s.head"], "layers (ms)": 1e3 * layers_s(row),
            "step, dense over it": ratio, "layers, dense over it": layers_s(dense) / layers_s(row),
            "range over repeats": "" if row["name"] == "dense" else f"{low:.2f} to {high:.2f}",
            "computed by": row["linears"],
        })  # fmt: skip
    return pd.DataFrame(found)


def reading(own: pd.DataFrame) -> str:
    """The layers' ratio at every sparse row, and the project's bound where it is of a CPU in float32."""
    said = []
    for _, row in own[own["name"] != "dense"].iterrows():
        value = layers_s(_dense(own, row)) / layers_s(row)
        one = f"{label(row)} {value:.2f}"
        if row["where"] == "cpu" and row["dtype"] == "float32" and row["name"] == "r-sparse" and row["layers"] > 0:
            one += f" ({'at least' if value >= LAYERS_OVER_DENSE else 'less than'} the {LAYERS_OVER_DENSE:g} asked for)"
        said.append(f"{one} in {panel(row)}{_layers(row)}")
    device = own["device"].iloc[0]
    return (f"Decoder layers alone on {device}, the dense ones' time over: {'; '.join(said)}. Whatever else the "
            "machine did meanwhile is in these numbers.")  # fmt: skip


def _dense(own: pd.DataFrame, row: pd.Series) -> pd.Series:
    """Our dense engine's row of the same setting; ValueError where there is none."""
    same = own[(own[SETTING] == row[SETTING]).all(axis=1)]
    found = at(same, name="dense")
    if found.empty:
        raise ValueError(f"{label(row)} has no dense row beside it; expected one in the same setting")
    return found.iloc[-1]


def _layers(row: pd.Series) -> str:
    count = int(row["layers"])
    return f", {count} layer{'s' * (count > 1)}" if count else ""
