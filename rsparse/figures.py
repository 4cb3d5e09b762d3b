"""Every plot of the book, in one style, and how figures and tables reach a page.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; lines differ in marker and dash too.
"""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython.display import HTML, Markdown, display
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, NullLocator

from rsparse.exhibits.comparison_reading import NAMES
from rsparse.exhibits.gains import DUST
from rsparse.exhibits.phase_reading import SIDES
from rsparse.models import KINDS
from rsparse.shapes import DENSITIES

STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 160,
    "text.usetex": False, "axes.titlesize": 10,
}  # fmt: skip
LOOK = {  # method -> colour, marker, dashes; beyond the palette's eight, grey and darker shades
    "dense": ("#000000", "D", ":"),
    "relufication": ("#999999", "P", (0, (1, 3))),
    "cats": ("#56B4E9", "<", (0, (5, 1))),
    "griffin": ("#CC79A7", "p", (0, (8, 2))),
    "chess": ("#8F8500", "X", (0, (3, 1, 1, 1, 1, 1))),
    "teal": ("#0072B2", "s", "--"),
    "teal-greedy": ("#003A5C", "h", (0, (8, 2, 2, 2))),
    "low-rank": ("#E69F00", "^", "-."),
    "wina": ("#009E73", "v", (0, (3, 1, 1, 1))),
    "wina-rotated": ("#004F3A", ">", (0, (3, 5, 1, 5))),
    "larosa": ("#7A3560", "*", (0, (2, 1))),
    "r-sparse": ("#D55E00", "o", "-"),
}
BASELINE_LOOKS = {"hf-eager": ("#999999", "P", (0, (1, 3))), "hf-static-compiled": ("#56B4E9", "X", "-.")}
"""Looks of Hugging Face's generation beside our engine's methods."""
VARIANTS = {
    "r-sparse (column-norm)": ("#8C3B00", "d", (0, (1, 1))),
    "r-sparse (whitened)": ("#6A3D9A", "H", (0, (4, 1, 1, 1))),
}
"""Looks of what is a method's variant and no method."""
SQUEEZED = 150
"""Where the differences of a figure span so many times the narrowest reach of an interval, its axis is logarithmic."""
PERCENT = ("acc", "acc_norm", "acc_or_norm", "rouge_l")
"""Metrics that end at 0 and 100%."""
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
styled = mpl.rc_context(
    STYLE
)  # as a decorator: the style holds whatever the reader's own matplotlib settings are


@styled
def show(figure: Figure, alt: str, caption: str = "") -> None:
    """Display a figure as PNG with its alternative text and caption as output metadata.

    Raises ValueError without an alternative text: a reader may not see the picture.
    """
    if not alt.strip():
        raise ValueError("alt is empty; expected a sentence that says what the figure shows")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    data = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": alt}
    display(data, raw=True, metadata={"image/png": {"alt": alt, "caption": caption}})


def say(text: str) -> None:
    """Display a sentence of Markdown whose numbers the cell has just computed; nothing of an empty one."""
    if text:
        display(Markdown(text))


def table(frame: pd.DataFrame, digits: int | Mapping[str, int] = 2, caption: str = "") -> None:
    """Display a table as plain HTML; floats with `digits` decimals (2 for columns that a mapping leaves
    out)."""

    def formatter(decimals: int):
        return lambda value: "" if pd.isna(value) else f"{value:.{decimals}f}"

    decimals = {
        name: digits if isinstance(digits, int) else digits.get(name, 2)
        for name in frame.select_dtypes("float")
    }
    text = frame.to_html(
        index=False, border=0, na_rep="", classes="rsparse-table",
        formatters={name: formatter(count) for name, count in decimals.items()},
    )  # fmt: skip
    caption = f">\n<caption>{html.escape(caption, quote=False)}</caption>\n" if caption else ">\n"
    display(HTML(text.replace(">\n", caption, 1)))


def panels(rows: int, columns: int, width: float, height: float, **options) -> tuple[Figure, np.ndarray]:
    """A figure in the book's style with a (rows, columns) array of axes; sizes in inches per panel."""
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


@styled
def score_maps(
    maps: Mapping[tuple[str, str], np.ndarray], rows: Mapping[str, str], columns: Sequence[str]
) -> Figure:
    """Heat maps of S, one column of panels per linear, one row per variant; colour is S over its mean (log scale).

    maps: (row key, column) -> array (components, channels), already shrunk. rows: key -> label.
    """
    figure, axes = panels(len(rows), len(columns), 1.3, 1.45)
    for i, (key, label) in enumerate(rows.items()):
        for j, column in enumerate(columns):
            axis, S = axes[i, j], maps[key, column]
            colours = dict(norm=LogNorm(0.03, 30, clip=True), cmap="cividis")
            image = axis.imshow(S / S.mean(), aspect="auto", interpolation="nearest", **colours)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            if i == 0:
                axis.set_title(column)
            if j == 0:
                axis.set_ylabel(f"{label}\ncomponents")
            if i == len(rows) - 1:
                axis.set_xlabel("channels")
    figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01, aspect=30, label="S over its mean")
    return figure


@styled
def concentration(frame: pd.DataFrame, metric: str, label: str) -> Figure:
    """One share of the score map per linear kind (panels), layer (axis) and control (lines), in percent.

    frame: the rows of figure-1-3, shares in 0..1. metric: such as share_top10. label: of the vertical axis.
    """
    titles = {
        "real": "model", "gaussian-w": "Gaussian W, model's x", "permuted-x": "model's W, shuffled x",
        "unsorted": "model, not sorted",
    }  # fmt: skip
    figure, axes = panels(2, 4, 2.3, 2.1, sharey=True)
    for axis, kind in zip(axes.flat, KINDS, strict=False):
        for number, (control, title) in enumerate(titles.items()):
            chosen = (frame["metric"] == metric) & (frame["linear"] == kind) & (frame["control"] == control)
            part = frame[chosen].sort_values("layer")
            axis.plot(part["layer"], 100 * part["value"], color=CYCLE[number], marker=MARKERS[number],
                      linestyle=DASHES[number], label=title)  # fmt: skip
        axis.set(title=kind, xlabel="layer", ylim=(0, 100))
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel(label, fontsize=mpl.rcParams["font.size"])
    axes[1, 3].axis("off")
    axes[1, 3].legend(*axes[0, 0].get_legend_handles_labels(), loc="center")
    return figure


@styled
def quality(frame: pd.DataFrame, measures: Mapping[tuple[str, str], str], by: str = "method") -> Figure:
    """Quality against model-level sparsity, one panel per measure, one line per method.

    frame: tidy rows; dense rows stand at sparsity 0 of every line. measures: (task, metric) -> axis label.
    by: the column whose values are the lines, where it is not the method; a dense row's value has no say.
    Points are means over seeds; bars are the standard error over items (of the first seed), and end where a
    percentage does.
    """
    wide = len(measures) if len(measures) < 4 else 2
    figure, axes = panels(-(-len(measures) // wide), wide, 3.6, 3.1)
    looks = _looks(frame.loc[frame["method"] != "dense", by], by)
    for axis, ((task, metric), label) in zip(axes.flat, measures.items(), strict=False):
        part = frame[(frame["task"] == task) & (frame["metric"] == metric)]
        scale = 100 if metric in PERCENT[:3] else 1
        dense = part["method"] == "dense"
        for name, (colour, marker, dash) in looks.items():
            line = part[dense | (part[by] == name)].groupby("sparsity")
            value, reach = scale * line["value"].mean(), scale * line["stderr"].first()
            if metric in PERCENT:
                reach = [np.minimum(reach, value), np.minimum(reach, 100 - value)]
            look = dict(color=colour, marker=marker, linestyle=dash, capsize=2)
            axis.errorbar(100 * value.index, value, reach, label=NAMES.get(name, name), **look)
        axis.set(xlabel="model-level sparsity (%)", ylabel=_folded(label))
        if metric == "perplexity":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter())  # plain numbers, and none where they would crowd
    for axis in axes.flat[len(measures) :]:
        axis.axis("off")
    if looks:
        _legend_below(figure, axes[0, 0], "bars: one standard error")
    return figure


def _folded(label: str, most: int = 34) -> str:
    """An axis label in lines that a panel is long enough for; the unit on a line of its own."""
    parts = [label] if len(label) <= most else label.replace(" (", "\n(").split("\n")
    return "\n".join(textwrap.fill(part, most) for part in parts)


def _legend_below(figure: Figure, axis: Axes, title: str) -> None:
    """What the lines of `axis` are, and in the title what its bars are."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), title=title)


def _looks(lines: pd.Series, by: str) -> dict[str, tuple]:
    """Colour, marker and dashes of every line: a method's own, else in order of appearance."""
    names = list(dict.fromkeys(lines))
    if by == "method":
        return {name: look for name, look in (LOOK | VARIANTS).items() if name in names}
    looks = zip(CYCLE, MARKERS, (*DASHES, *DASHES), strict=False)
    return dict(zip(names, looks, strict=False))


@styled
def added(frame: pd.DataFrame) -> Figure:
    """What every method adds to the dense model over model-level sparsity: a panel per measure, a line per method.

    frame: columns panel (the label of its axis), method, sparsity, value, low, high (95% intervals), in order. The
    axes are logarithmic on either side of zero: what methods add differs by orders of magnitude.
    """
    titles = list(dict.fromkeys(frame["panel"]))
    figure, axes = panels(1, max(1, len(titles)), 5.2, 4.4)
    looks = _looks(frame["method"], "method")
    for axis, title in zip(axes[0], titles, strict=False):
        part = frame[frame["panel"] == title]
        for place, (name, (colour, marker, dash)) in enumerate(looks.items()):
            line = part[part["method"] == name].sort_values("sparsity")
            aside = 0.15 * (place - (len(looks) - 1) / 2)  # else the bars of one budget hide one another
            look = dict(color=colour, marker=marker, linestyle=dash, capsize=2, markersize=5, elinewidth=0.8)
            reach = [line["value"] - line["low"], line["high"] - line["value"]]
            axis.errorbar(100 * line["sparsity"] + aside, line["value"], reach, label=NAMES.get(name, name), **look)
        axis.axhline(0, color="black", linewidth=1, linestyle=":")
        axis.set(xlabel="model-level sparsity (%)", ylabel=_folded(title, 40))
        _logarithmic(axis, "y", part)
    if looks:
        _legend_below(figure, axes[0, 0], "bars: 95% intervals of the paired difference")
    return figure


@styled
def rho_sweep(points: pd.DataFrame) -> Figure:
    """Held-out loss against rho, minus that at rho = 1, one panel per budget, with 95% intervals.

    points: columns sparsity, rho, diff_loss, low, high (nats per token).
    """
    budgets = sorted(points["sparsity"].unique())
    figure, axes = panels(1, len(budgets), 2.9, 2.9)
    for axis, sparsity in zip(axes[0], budgets, strict=True):
        part = points[points["sparsity"] == sparsity].sort_values("rho")
        reach = [part["diff_loss"] - part["low"], part["high"] - part["diff_loss"]]
        axis.errorbar(part["rho"], part["diff_loss"], reach, color=LOOK["r-sparse"][0], marker="o", capsize=2)
        axis.axhline(0, color="black", linewidth=1, linestyle=":")
        axis.set(title=f"sparsity {sparsity:.0%}", xlabel="rho (share of the sparse path)")
        axis.set_yscale("symlog", linthresh=0.1)
        axis.margins(y=0.08)
        low, high = axis.get_ylim()
        axis.set_yticks([tick for tick in (-10, -1, -0.1, 0, 0.1, 1, 10) if low <= tick <= high])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_ylabel("loss minus that at rho = 1\n(nats per token)")
    return figure


@styled
def differences(frame: pd.DataFrame, label: str, names: Sequence[str]) -> Figure:
    """Paired differences with 95% intervals, one row per comparison.

    frame: columns value, low, high; names: one label per row, in order. Zero means no difference.
    """
    figure, axes = panels(1, 1, 6.4, 0.6 + 0.32 * len(frame))
    _draw_differences(axes[0, 0], frame, label, names)
    return figure


@styled
def difference_panels(frame: pd.DataFrame) -> Figure:
    """Paired differences of several measures with 95% intervals: a panel per measure, a row per comparison.

    frame: columns panel (the label of its axis), label (of the row), value, low, high; panels and rows stand in the
    order in which they first appear.
    """
    names, titles = list(dict.fromkeys(frame["label"])), list(dict.fromkeys(frame["panel"]))
    columns = max(1, len(titles))
    figure, axes = panels(1, columns, min(6.4, 10.4 / columns), 0.8 + 0.32 * len(names), sharey=True)
    figure.get_layout_engine().set(wspace=0.05)  # else the numbers of two axes touch
    for axis, title in zip(axes[0], titles, strict=False):
        part = frame[frame["panel"] == title].set_index("label").reindex(names)
        _draw_differences(axis, part, title.replace(" (", "\n("), names)
    return figure


def _draw_differences(axis: Axes, frame: pd.DataFrame, label: str, names: Sequence[str]) -> None:
    """A filled point where the interval excludes zero, an empty one where it does not."""
    y = np.arange(len(frame))[::-1]
    sure = ((frame["low"] > 0) | (frame["high"] < 0)).to_numpy()
    reach = np.vstack([frame["value"] - frame["low"], frame["high"] - frame["value"]])
    for chosen, fill in ((sure, "#D55E00"), (~sure, "white")):
        axis.errorbar(frame["value"][chosen], y[chosen], xerr=reach[:, chosen], fmt="o", color="#D55E00",
                      markerfacecolor=fill, capsize=2)  # fmt: skip
    axis.axvline(0, color="black", linewidth=1, linestyle=":")
    axis.set(yticks=y, yticklabels=list(names), xlabel=label, ylim=(-0.7, len(frame) - 0.3))
    if _squeezed(frame):
        _logarithmic(axis, "x", frame)
        axis.set_xlabel(f"{label},\nlogarithmic on either side of zero")
    else:
        axis.xaxis.set_major_locator(MaxNLocator(_labels(axis)))


def _labels(axis: Axes) -> int:
    """How many numbers an axis has room for beside how many others."""
    return {1: 6, 2: 5}.get(len(axis.figure.axes), 4)


def _reach(frame: pd.DataFrame) -> float:
    """Half the width of the narrowest interval that has one; NaN where there is none."""
    reach = (frame["high"] - frame["low"]) / 2
    return reach[reach > DUST].min()


def _squeezed(frame: pd.DataFrame) -> bool:
    """Whether one difference far away would make a point of another's interval."""
    return _span(frame)[1] - _span(frame)[0] > SQUEEZED * _reach(frame)


def _span(frame: pd.DataFrame) -> tuple[float, float]:
    """The lowest and the highest place that is drawn, zero included."""
    ends = frame[["value", "low", "high"]]
    return min(0.0, ends.min().min()), max(0.0, ends.max().max())  # zero first: NaN, of no rows, is then not taken


def _logarithmic(axis: Axes, name: str, frame: pd.DataFrame) -> None:
    """Make the axis x or y logarithmic on either side of zero, linear only where the narrowest interval would be.

    Left linear where nothing is drawn far beyond that.
    """
    low, high = _span(frame)
    reach = _reach(frame)
    if not high - low > 10 * reach > 0:
        return
    linear = 10.0 ** np.round(np.log10(reach))
    getattr(axis, f"set_{name}scale")("symlog", linthresh=linear)
    one = getattr(axis, f"{name}axis")
    scale = one.get_transform()
    ends = scale.transform([low, high])
    pad = 0.06 * (ends[1] - ends[0])  # so that no marker is cut
    getattr(axis, f"set_{name}lim")(*scale.inverted().transform(ends + np.array([-pad, pad])))
    one.set_ticks(_decades(linear, low, high, _labels(axis) if name == "x" else 9))
    one.set_minor_locator(NullLocator())
    one.set_major_formatter("{x:g}")


def _decades(linear: float, low: float, high: float, most: int) -> list[float]:
    """Zero, and powers of ten from `linear` on as far as the ends on either side; fewer of them if they are many."""
    first = round(np.log10(linear))

    def powers(end: float) -> range:
        return range(first, int(np.floor(np.log10(end) + 1e-9)) + 1) if end >= linear else range(0)

    above, below = powers(high), powers(-low)
    step = max(1, -(-(len(above) + len(below)) // most))
    kept = range(max([first, *above, *below]), first - 1, -step)
    return [*(-(10.0**e) for e in reversed(below) if e in kept), 0.0, *(10.0**e for e in above if e in kept)]


@styled
def phases(frame: pd.DataFrame, measures: Mapping[tuple[str, str], str]) -> Figure:
    """Quality over the share of dropped inputs: a row of panels per side, a column per measure, a line per replacement.

    frame: rows of `phase_reading.lines`; those without a side (dense, the deployed methods) stand in every row.
    measures: (task, metric) -> axis label. Bars are one standard error; perplexity is on a logarithmic axis.
    """
    sides = [side for side in dict.fromkeys(frame["side"]) if side]
    counts = sorted(set(frame["phases"].dropna()))
    shades = dict(zip(counts, mpl.colormaps["viridis"](np.linspace(0, 0.85, len(counts))), strict=True))
    figure, axes = panels(len(sides), len(measures), 3.6, 2.9, sharex=True)
    for row, side in zip(axes, sides, strict=True):
        for axis, ((task, metric), label) in zip(row, measures.items(), strict=True):
            part = frame[(frame["task"] == task) & (frame["metric"] == metric) & frame["side"].isin(["", side])]
            scale = 100 if metric in PERCENT else 1
            dense = scale * part.loc[part["line"] == "dense", "value"].mean()
            axis.axhline(dense, color=LOOK["dense"][0], linestyle=":", label="dense")
            order = part[part["line"] != "dense"].sort_values("phases", kind="stable")
            for place, (line, own) in enumerate(order.groupby("line", sort=False)):
                aside = 0.35 * (place - order["line"].nunique() / 2)  # else the bars of one sparsity hide one another
                count, groups = own["phases"].iloc[0], own.groupby("sparsity")
                known = own["method"].iloc[0] in LOOK
                marker = LOOK[own["method"].iloc[0]][1] if known else MARKERS[counts.index(count) % len(MARKERS)]
                look = {"color": LOOK[own["method"].iloc[0]][0] if known else shades[count], "marker": marker}
                look["linestyle"] = "--" if known else "-"
                value, reach = scale * groups["value"].mean(), scale * groups["stderr"].first()
                if metric in PERCENT:
                    reach = [np.minimum(reach, value), np.minimum(reach, 100 - value)]
                axis.errorbar(100 * value.index + aside, value, reach, label=line, capsize=2, **look)
            axis.set(ylabel=_folded(label), xticks=100 * np.sort(order["sparsity"].unique()))
            if metric == "perplexity":
                axis.set_yscale("log")
        row[0].set_title(f"dropped by {SIDES.get(side, side)}", loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("inputs dropped, or bytes unread (%)")
    _legend_below(figure, axes[0, 0], "in the place of what is dropped; bars: one standard error")
    return figure


@styled
def residual_errors(curves: Mapping[str, Mapping[str, np.ndarray]], sides: Mapping[str, int]) -> Figure:
    """What low-rank factors leave of the residuals, in percent, against the rank: a panel per linear.

    curves: linear -> as `residuals.Curves`. sides: linear -> the smaller side of its weight, which ends the axis.
    """
    titles = {"svd": "singular vectors of W (deployed)", "whitened": "whitened", "hindsight": "best in hindsight"}
    figure, axes = panels(2, 4, 2.4, 2.2, sharey=True)
    for axis, (kind, own) in zip(axes.flat, curves.items(), strict=False):
        for number, (factors, title) in enumerate(titles.items()):
            axis.plot(own["ranks"], 100 * own[factors], color=CYCLE[number], linestyle=DASHES[number], label=title)
        axis.axvline(own["deployed"][0], color="black", linewidth=1, linestyle=":", label="rank that the budget buys")
        axis.set_xscale("log")
        axis.set(title=kind, xlabel="rank", ylim=(0, 102), xlim=(1, sides[kind]))
        axis.xaxis.set_major_formatter("{x:g}")
    for axis in axes[:, 0]:
        axis.set_ylabel("error (% of the\nresiduals' energy)")
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    axes[1, 3].legend(*axes[0, 0].get_legend_handles_labels(), loc="center")
    return figure


@styled
def spectra(curves: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Singular values of the residuals' outputs over the largest, a line per linear. curves: as `residual_errors`."""
    figure, axes = panels(1, 1, 6.4, 3.4)
    looks = zip(CYCLE, MARKERS, (*DASHES, *DASHES), strict=False)
    for (kind, own), (colour, marker, dash) in zip(curves.items(), looks, strict=False):
        axes[0, 0].plot(own["ranks"], own["spectrum"], color=colour, linestyle=dash, marker=marker, markersize=4,
                        label=kind)  # fmt: skip
    axes[0, 0].set(xlabel="component", ylabel="singular value\nover the largest", ylim=(0, 1.03))
    axes[0, 0].set_xscale("log")
    axes[0, 0].xaxis.set_major_formatter("{x:g}")
    axes[0, 0].legend()
    return figure


@styled
def token_sparsity(histograms: Mapping[tuple[str, float], np.ndarray]) -> Figure:
    """How much single tokens leave unread: shares of the tokens, a panel per budget, a line per method.

    histograms: (line, budget) -> shares of the tokens in bins of equal width from 0 to 1.
    """
    budgets = sorted({budget for _, budget in histograms})
    figure, axes = panels(1, len(budgets), 6.4 if len(budgets) == 1 else 4.2, 3.2, sharey=True)
    looks = LOOK | VARIANTS
    for axis, budget in zip(axes[0], budgets, strict=True):
        seen = []
        for (line, own), shares in histograms.items():
            if own == budget:
                edges = np.linspace(0, 100, len(shares) + 1)
                colour, _, dash = looks[line]
                look = {"color": colour, "linestyle": dash, "linewidth": 1.4, "label": NAMES.get(line, line)}
                axis.stairs(100 * shares, edges, **look)
                seen += [edges[:-1][shares > 0].min(), edges[1:][shares > 0].max()]
        axis.axvline(100 * budget, color="black", linewidth=1, linestyle=":", label="asked for")
        axis.set(xlabel="sparsity of a token (%)", title=f"sparsity {budget:.0%}", xlim=(min(seen) - 1, max(seen) + 1))
        axis.set_yscale("log")
    axes[0, 0].set_ylabel("share of the tokens (%)")
    _legend_below(figure, axes[0, 0], "")
    return figure


@styled
def block_spread(frame: pd.DataFrame) -> Figure:
    """Realised minus planned sparsity of every block over tokens: mean and one spread, and the worst token below.

    frame: columns sparsity, line, layer, value, spread, worst, in percentage points.
    """
    return _by_block(frame, frame["spread"], "realised minus planned (points)", "bars: one spread over tokens; "
                     "thin lines: the token that reads most", worst=True)  # fmt: skip


@styled
def block_errors(frame: pd.DataFrame) -> Figure:
    """Relative error of the residual stream behind every block. frame: columns sparsity, line, layer, value, low, high,
    in percent."""
    reach = (frame["high"] - frame["low"]) / 2
    return _by_block(frame, reach, "error of the residual stream (%)", "bars: 95% intervals over texts", log=True)


def _by_block(
    frame: pd.DataFrame, reach: pd.Series, label: str, bars: str, worst: bool = False, log: bool = False
) -> Figure:
    """A panel per budget, a line per method over blocks."""
    budgets, looks = sorted(frame["sparsity"].unique()), LOOK | VARIANTS
    figure, axes = panels(1, len(budgets), 6.4 if len(budgets) == 1 else 4.2, 3.4, sharey=True)
    for axis, budget in zip(axes[0], budgets, strict=True):
        part = frame[frame["sparsity"] == budget].assign(reach=reach)
        for place, (line, own) in enumerate(part.groupby("line", sort=False)):
            colour, marker, dash = looks[line]
            at = own["layer"] + 0.06 * (place - (part["line"].nunique() - 1) / 2)
            look = {"color": colour, "marker": marker, "linestyle": dash, "capsize": 2}
            axis.errorbar(at, own["value"], own["reach"], label=NAMES.get(line, line), **look)
            if worst:
                axis.plot(at, own["worst"], color=colour, linestyle=dash, linewidth=0.8)
        axis.set(title=f"sparsity {budget:.0%}", xlabel="block")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if log:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter())
        else:
            axis.axhline(0, color="black", linewidth=1, linestyle=":")
    axes[0, 0].set_ylabel(label)
    _legend_below(figure, axes[0, 0], bars)
    return figure


@styled
def similarity(frame: pd.DataFrame) -> Figure:
    """Similarity to the reference against the number of samples: a panel per measure, a line per linear.

    frame: columns measure, linear, samples, value.
    """
    measures = list(dict.fromkeys(frame["measure"]))
    figure, axes = panels(1, len(measures), 2.7, 3.0, sharey=True)
    for axis, measure in zip(axes[0], measures, strict=True):
        part = frame[frame["measure"] == measure]
        looks = zip(KINDS, CYCLE, MARKERS, (*DASHES, *DASHES), strict=False)
        for kind, colour, marker, dash in looks:
            own = part[part["linear"] == kind].sort_values("samples")
            axis.plot(own["samples"], own["value"], color=colour, marker=marker, linestyle=dash, label=kind)
        axis.set_xscale("log")
        axis.set(title=measure, xlabel="samples", ylim=(-0.05, 1.05))
        axis.set_xticks(sorted(set(part["samples"])), [f"{x:.0f}" for x in sorted(set(part["samples"]))])
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_ylabel("similarity to the reference\n(rank correlation; last panel: share)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, title="medians over layers")
    return figure


@styled
def allocation(frame: pd.DataFrame) -> Figure:
    """What a search gave every linear: heat maps of layer x kind, one panel per sparsity.

    frame: columns sparsity, layer, linear, value (the linear's sparsity, 0..1).
    """
    shown = frame.sort_values("sparsity", kind="stable")
    shown = shown.assign(panel=[f"sparsity {s:.0%}" for s in shown["sparsity"]], value=100 * shown["value"])
    return _by_linear(shown, 100, "sparsity of the linear (%)")


@styled
def rho_map(frame: pd.DataFrame) -> Figure:
    """What rho every linear has: heat maps of layer x kind, one panel per recipe.

    frame: columns panel (its title), layer, linear, value (rho); panels in order of appearance.
    """
    return _by_linear(frame, 1, "rho (share of the sparse path)")


def _by_linear(frame: pd.DataFrame, most: float, label: str) -> Figure:
    """Heat maps of values from 0 to `most`; a linear without one is left white."""
    titles = list(dict.fromkeys(frame["panel"]))
    figure, axes = panels(1, len(titles), 2.1, 2.9, sharey=frame["layer"].groupby(frame["panel"]).max().nunique() == 1)
    for axis, title in zip(axes[0], titles, strict=True):
        wide = frame[frame["panel"] == title].pivot_table(index="layer", columns="linear", values="value")
        wide = wide[[kind for kind in KINDS if kind in wide]]
        image = axis.imshow(wide, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0, vmax=most)
        axis.set(title=title, xticks=range(len(wide.columns)), xticklabels=wide.columns)
        axis.tick_params(axis="x", rotation=90)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.grid(False)
    axes[0, 0].set(ylabel="layer")
    figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01, aspect=30, label=label)
    return figure


@styled
def convergence(frame: pd.DataFrame) -> Figure:
    """What searches have gained against the evaluations spent: a panel per budget, a line per searcher and seed.

    frame: columns sparsity, searcher, seed, group, evaluations, gain (nats per token). Dotted: where the search of
    evolution goes on to the next group.
    """
    budgets = sorted(frame["sparsity"].unique())
    figure, axes = panels(1, len(budgets), 4.0, 3.2)
    looks = _looks(frame["searcher"], "searcher")
    for axis, sparsity in zip(axes[0], budgets, strict=True):
        part = frame[frame["sparsity"] == sparsity]
        for (searcher, _), line in part.groupby(["searcher", "seed"], sort=False):
            colour, _, dash = looks[searcher]
            known = searcher in axis.get_legend_handles_labels()[1]
            axis.plot(line["evaluations"], line["gain"], color=colour, linestyle=dash, alpha=0.9,
                      label=None if known else searcher)  # fmt: skip
        first = next(x for _, x in part.groupby(["searcher", "seed"], sort=False))
        for _, group in list(first.groupby("group"))[1:]:
            axis.axvline(group["evaluations"].iloc[0], color="#999999", linewidth=0.8, linestyle=":")
        axis.set(title=f"sparsity {sparsity:.0%}", xlabel="candidates evaluated")
        axis.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("gain found so far\n(nats per token of the searched text)")
    _legend_below(figure, axes[0, 0], "a line per seed; dotted: the next group begins")
    return figure


@styled
def recovery(frame: pd.DataFrame, enough: float) -> Figure:
    """Shares of planted and of null linears, in percent, against the size of the groups that are searched.

    frame: columns searcher, group_size, metric (recovered_share or false_share), value, low, high, as shares.
    enough: the share from which on a search counts as able to find what is there; a dashed line.
    """
    titles = {"recovered_share": "planted rho found (%)", "false_share": "rho below 1 where nothing\nis planted (%)"}
    figure, axes = panels(1, 2, 4.0, 3.2, sharey=True)
    looks = _looks(frame["searcher"], "searcher")
    sizes = sorted(frame["group_size"].unique())
    for axis, (metric, title) in zip(axes[0], titles.items(), strict=True):
        for place, (searcher, (colour, marker, dash)) in enumerate(looks.items()):
            line = frame[(frame["searcher"] == searcher) & (frame["metric"] == metric)].sort_values("group_size")
            reach = 100 * np.vstack([line["value"] - line["low"], line["high"] - line["value"]]).clip(min=0)
            aside = 1.04 ** (place - (len(looks) - 1) / 2)  # else the bars of one size hide one another
            axis.errorbar(aside * line["group_size"], 100 * line["value"], reach, color=colour, marker=marker,
                          linestyle=dash, capsize=2, label=searcher)  # fmt: skip
        axis.set_xscale("log")
        axis.set(xlabel="linears searched together", ylabel=title, ylim=(-4, 104))
        axis.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
    axes[0, 0].axhline(100 * enough, color="black", linewidth=1, linestyle="--")
    _legend_below(figure, axes[0, 0], f"bars: 95% intervals; dashed line: {enough:.0%}")
    return figure


@styled
def activations(histograms: Mapping[tuple[int, str], np.ndarray], sites: Mapping[str, str]) -> Figure:
    """Density of |x| over its mean, one row of panels per layer, one column per site; two shapes of the same mean.

    histograms: (layer, site) -> array (2, bins) of positions and densities. sites: key -> title.
    """
    layers = sorted({layer for layer, _ in histograms})
    figure, axes = panels(len(layers), len(sites), 2.2, 1.9, sharex=True)
    for row, layer in zip(axes, layers, strict=True):
        for axis, (site, title) in zip(row, sites.items(), strict=True):
            x, density = histograms[layer, site]
            axis.step(x, density, where="mid", color="#000000", label="model")
            for number, (name, at) in enumerate(DENSITIES.items()):
                axis.plot(x, at(x), color=CYCLE[number], linestyle=DASHES[1 + number], label=name.capitalize())
            axis.set_yscale("log")
            axis.set(ylim=(1e-3, 10))
            if layer == layers[0]:
                axis.set_title(f"{site}\n{title}")
        row[0].set_ylabel(f"layer {layer}\ndensity")
    for axis in axes[-1]:
        axis.set_xlabel("|x| over its mean")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@styled
def planted(frame: pd.DataFrame) -> Figure:
    """Best rho found against the planted one, one panel per noise level; points are jittered, the band is one
    grid step.

    frame: columns planted, found, noise, step.
    """
    levels = sorted(frame["noise"].unique())
    figure, axes = panels(1, len(levels), 2.9, 2.9, sharey=True)
    random = np.random.default_rng(0)
    for axis, level in zip(axes[0], levels, strict=True):
        part = frame[frame["noise"] == level]
        step = part["step"].iloc[0]
        axis.fill_between([0, 1], [-step, 1 - step], [step, 1 + step], color="#56B4E9", alpha=0.25,
                          label="one grid step")  # fmt: skip
        jitter = random.uniform(-0.25, 0.25, (2, len(part))) * step
        axis.plot(
            part["planted"] + jitter[0],
            part["found"] + jitter[1],
            "o",
            color="#D55E00",
            markersize=4,
            alpha=0.7,
        )
        axis.set(title=f"weight noise {level:g}", xlabel="planted rho", xlim=(0, 1), ylim=(-0.05, 1.05))
    axes[0, 0].set_ylabel("best rho found")
    axes[0, 0].legend(loc="upper left")
    return figure


@styled
def kernel_sweep(frame: pd.DataFrame) -> Figure:
    """One product's time, and what it gains, over the share of the bytes that is left unread; a line per linear.

    frame: columns linear, sparsity, "ours us", "torch us", "over torch", "dense bytes", bytes. Thin: torch's time.
    """
    figure, axes = panels(1, 2, 5.2, 3.8)
    time, ratio = axes[0]
    looks = dict(zip(dict.fromkeys(frame["linear"]), zip(CYCLE, MARKERS, DASHES, strict=False), strict=False))
    for linear, (colour, marker, dash) in looks.items():
        own = frame[frame["linear"] == linear]
        look = {"color": colour, "marker": marker, "linestyle": dash, "label": linear}
        time.plot(100 * own["sparsity"], own["ours us"], **look)
        time.plot(100 * own["sparsity"], own["torch us"], color=colour, linestyle=dash, linewidth=0.8)
        ratio.plot(100 * own["sparsity"], own["over torch"], **look)
    means = frame.groupby("sparsity")["over torch"].agg(lambda x: np.exp(np.log(x).mean()))
    ratio.plot(100 * means.index, means, color="black", marker="X", linewidth=2.4, label="geometric mean")
    limit = frame.groupby("sparsity")["dense bytes"].sum() / frame.groupby("sparsity")["bytes"].sum()
    look = {"color": "#666666", "linestyle": (0, (1, 2)), "linewidth": 2}
    ratio.plot(100 * limit.index, limit, label="dense bytes over bytes read", **look)
    ratio.axhline(1, color="black", linewidth=1, linestyle=":", label="as fast as torch")
    for axis, label in ((time, "microseconds (thin: torch's dense product)"), (ratio, "torch's time over ours")):
        axis.set(xlabel="bytes left unread (%)", ylabel=label)
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.set_yticks([x * 10**e for e in range(7) for x in (1, 1.5, 2, 3, 5, 7) if low <= x * 10**e <= high])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    _legend_below(figure, ratio, "")
    return figure


@styled
def grouped_bars(frame: pd.DataFrame, label: str, line: float | None = None, turned: bool = False) -> Figure:
    """Bars side by side: a panel per `panel`, a group per `group`, a bar per `series`, in order of appearance.

    line: a value to stand against, dotted. turned: groups' names upright, where there are many. Bars
    of a series share a hatch besides a colour.
    """
    titles, series = list(dict.fromkeys(frame["panel"])), list(dict.fromkeys(frame["series"]))
    figure, axes = panels(1, len(titles), max(3.4, 10.4 / len(titles)), 3.4, sharey=True)
    wide = 0.8 / len(series)
    for axis, title in zip(axes[0], titles, strict=True):
        part = frame[frame["panel"] == title]
        groups = list(dict.fromkeys(part["group"]))
        for place, name in enumerate(series):
            values = part[part["series"] == name].set_index("group")["value"].reindex(groups)
            at = np.arange(len(groups)) + wide * (place - (len(series) - 1) / 2)
            axis.bar(at, values, wide, color=CYCLE[place], hatch=("", "//", "..", "xx")[place % 4], edgecolor="white",
                     linewidth=0.5, label=name)  # fmt: skip
        if line is not None:
            axis.axhline(line, color="black", linewidth=1, linestyle=":")
        axis.set(title=title, xticks=range(len(groups)), xticklabels=[x.replace("-", "-\n", 1) for x in groups])
        axis.tick_params(axis="x", rotation=90 * turned)
        axis.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel(label)
    _legend_below(figure, axes[0, 0], "")
    return figure


@styled
def gathering(points: pd.DataFrame, union: float) -> Figure:
    """What gathering rows gains over torch, by the share of the rows that all tokens want together.

    points: columns tokens, wanted (a share), sparsity, value (torch's time over ours). union: where the library stops
    to gather for several tokens.
    """
    figure, axes = panels(1, 1, 8.6, 3.8)
    axis = axes[0, 0]
    for number, (tokens, own) in enumerate(points.groupby("tokens")):
        own = own.sort_values("wanted")
        axis.plot(100 * own["wanted"], own["value"], color=CYCLE[number], marker=MARKERS[number],
                  linestyle=DASHES[number % len(DASHES)], label=f"{tokens} token{'s' * (tokens > 1)}")  # fmt: skip
    wanted = np.linspace(max(5, 90 * points["wanted"].min()), 100, 50)
    look = {"color": "#666666", "linestyle": (0, (1, 2)), "linewidth": 2}
    axis.plot(wanted, 100 / wanted, label="all rows over rows wanted", **look)
    axis.axhline(1, color="black", linewidth=1, linestyle=":", label="as fast as torch")
    axis.axvline(100 * union, color="black", linewidth=1, linestyle="--", label="2 to 4 tokens: gathered left of this")
    axis.set(xlabel="rows that the tokens want together (%)", ylabel="torch's time over ours\n(geometric mean)")
    axis.set_ylim(0, 1.15 * points["value"].max())
    _legend_below(figure, axis, "")
    return figure


@styled
def roofline(frame: pd.DataFrame) -> Figure:
    """Bytes of a product against its time and the share of the bandwidth that it reaches; a look per storage.

    frame: columns dtype, bytes, "ours us", "bandwidth share", "read bandwidth" (bytes per second), a row per linear.
    """
    figure, axes = panels(1, 2, 5.2, 3.6, sharex=True)
    time, share = axes[0]
    for number, (dtype, own) in enumerate(frame.groupby("dtype", sort=False)):
        look = {"color": CYCLE[number], "marker": MARKERS[number], "linestyle": "", "alpha": 0.8, "label": dtype}
        time.plot(own["bytes"] / 1e6, own["ours us"], **look)
        share.plot(own["bytes"] / 1e6, 100 * own["bandwidth share"], **look)
    ends = np.array([frame["bytes"].min(), frame["bytes"].max()])
    limit = {"color": "black", "linestyle": "--", "linewidth": 1, "label": "plain reading"}
    time.plot(ends / 1e6, 1e6 * ends / frame["read bandwidth"].median(), **limit)
    share.axhline(100, **limit)
    for axis, label in ((time, "microseconds"), (share, "share of the bandwidth (%)")):
        axis.set(xlabel="megabytes that a token reads", ylabel=label)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
    time.set_yscale("log")
    time.yaxis.set_major_formatter("{x:g}")
    share.set_ylim(0, 110)
    _legend_below(figure, time, "")
    return figure


@styled
def speed_lines(points: pd.DataFrame, xlabel: str, ylabel: str, doubling: bool = False, level: float | None = None,
                mark: str = "", columns: int = 3) -> Figure:  # fmt: skip
    """Lines over x: a panel per `panel`, a line per `series`.

    points: columns panel, series, x, value; where there are such, look (a key of `LOOK` or `BASELINE_LOOKS`), ylabel
    (of the panel), limit (a dotted line besides) and mark (a level that is called `mark`). doubling: x doubles from
    tick to tick. level: a value to stand against, dotted. columns: panels in a row, at most.
    """
    titles = list(dict.fromkeys(points["panel"]))
    columns = min(columns, len(titles))
    figure, axes = panels(-(-len(titles) // columns), columns, min(7.0, 10.4 / columns), 3.1)
    looks, handles = _series_looks(points), {}
    for place, (axis, title) in enumerate(zip(axes.flat, titles, strict=False)):
        part = points[points["panel"] == title]
        for name, (colour, marker, dash) in looks.items():
            line = part[part["series"] == name].sort_values("x")
            if line.empty:
                continue
            (handles[name],) = axis.plot(line["x"], line["value"], color=colour, marker=marker, linestyle=dash)
            if "limit" in line:
                dots = {"color": colour, "linewidth": 1, "linestyle": (0, (1, 3))}
                (handles["bytes alone (dots)"],) = axis.plot(line["x"], line["limit"], **dots)
        if level is not None:
            handles["no gain"] = axis.axhline(level, color="black", linewidth=1, linestyle=":")
        if "mark" in part and part["mark"].notna().any():
            handles[mark] = axis.axhline(part["mark"].dropna().iloc[0], color="#666666", linewidth=1.5, linestyle="--")
        _speed_axis(axis, sorted(set(part["x"])), doubling)
        axis.set(title=title.strip(), xlabel=xlabel)
        if "ylabel" in part or place % columns == 0:
            axis.set_ylabel(part["ylabel"].iloc[0] if "ylabel" in part else ylabel)
    for axis in axes.flat[len(titles) :]:
        axis.axis("off")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def _series_looks(points: pd.DataFrame) -> dict[str, tuple]:
    """Colour, marker and dashes by series: its own `look`, else in order of appearance."""
    known = LOOK | BASELINE_LOOKS
    looks = dict(zip(points["series"], points["look"], strict=True)) if "look" in points else {}
    cycle = {name: tuple(x[i % len(x)] for x in (CYCLE, MARKERS, DASHES))
             for i, name in enumerate(dict.fromkeys(points["series"]))}  # fmt: skip
    return {name: known.get(looks.get(name), look) for name, look in cycle.items()}


def _speed_axis(axis: Axes, ticks: Sequence[float], doubling: bool) -> None:
    if doubling:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{x:.0f}" for x in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
    low, high = axis.get_ylim()
    axis.set_ylim(min(0, low), high + 0.05 * (high - min(0, low)))


@styled
def pareto(points: pd.DataFrame) -> Figure:
    """Loss against speed: a panel per pair of a speed's shape and a quality's model, a line per method by sparsity.

    points: columns panel, method, sparsity, speed (times dense), loss (nats per token), front. Ringed: on the front.
    """
    titles = list(dict.fromkeys(points["panel"]))
    figure, axes = panels(1, len(titles), max(3.6, 10.4 / max(2, len(titles))), 3.6)
    looks = _looks(points["method"], "method")
    for axis, title in zip(axes[0], titles, strict=True):
        part = points[points["panel"] == title]
        for place, (name, (colour, marker, dash)) in enumerate(looks.items()):
            line = part[part["method"] == name].sort_values("sparsity")
            axis.plot(line["speed"], line["loss"], color=colour, marker=marker, linestyle=dash,
                      label=NAMES.get(name, name))  # fmt: skip
            offset = ((-9, 8), (8, -3), (6, -12), (-24, 7))[place % 4]  # neighbours apart
            aside = dict(xytext=offset, textcoords="offset points", fontsize=7, color=colour)
            for _, point in line.iterrows():
                axis.annotate(f"{point['sparsity']:.0%}", (point["speed"], point["loss"]), **aside)
        ring = dict(markersize=11, fillstyle="none", color="black", label="on the front")
        axis.plot(part.loc[part["front"], "speed"], part.loc[part["front"], "loss"], "o", **ring)
        axis.axvline(1, color="black", linewidth=1, linestyle=":", label="as fast as dense")
        axis.set(title=title, xlabel="dense time over ours\n(same engine, one text)")
        axis.set_yscale("symlog", linthresh=0.01)
        axis.set_ylim(min(-0.004, 1.5 * part["loss"].min()), 3 * max(0.01, part["loss"].max()))
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("loss added to the dense model\n(nats per token, held-out text)")
    _legend_below(figure, axes[0, 0], "percent: model-level sparsity")
    return figure
