"""Every plot of the book, in one style, and how figures and tables reach a page.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; lines differ in marker and dash too.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython.display import HTML, Markdown, display
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, NullLocator

from rsparse.models import KINDS

STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 160,
    "text.usetex": False, "axes.titlesize": 10,
}  # fmt: skip
LOOK = {  # method -> colour, marker, dashes
    "dense": ("#000000", "D", ":"),
    "teal": ("#0072B2", "s", "--"),
    "low-rank": ("#E69F00", "^", "-."),
    "wina": ("#009E73", "v", (0, (3, 1, 1, 1))),
    "r-sparse": ("#D55E00", "o", "-"),
}
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
    """Display a sentence of Markdown whose numbers the cell has just computed."""
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
def quality(frame: pd.DataFrame, measures: Mapping[tuple[str, str], str]) -> Figure:
    """Quality against model-level sparsity, one panel per measure, one line per method.

    frame: tidy rows; dense rows stand at sparsity 0 of every method. measures: (task, metric) -> axis label.
    Points are means over seeds; bars are the standard error over items (of the first seed).
    """
    figure, axes = panels(1, len(measures), 3.6, 3.1)
    methods = [m for m in LOOK if m in set(frame["method"]) and m != "dense"]
    for axis, ((task, metric), label) in zip(axes[0], measures.items(), strict=True):
        part = frame[(frame["task"] == task) & (frame["metric"] == metric)]
        scale = 100 if metric in ("acc", "acc_norm") else 1
        dense = part[part["method"] == "dense"]
        for method in methods:
            line = pd.concat([dense, part[part["method"] == method]]).groupby("sparsity")
            value, stderr = scale * line["value"].mean(), scale * line["stderr"].first()
            colour, marker, dash = LOOK[method]
            look = dict(color=colour, marker=marker, linestyle=dash, capsize=2)
            axis.errorbar(100 * value.index, value, stderr, label=method, **look)
        axis.set(xlabel="model-level sparsity (%)", ylabel=label)
        if metric == "perplexity":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter())  # plain numbers, and none where they would crowd
    if methods:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
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
    axis: Axes = axes[0, 0]
    y = np.arange(len(frame))[::-1]
    sure = ((frame["low"] > 0) | (frame["high"] < 0)).to_numpy()
    reach = np.vstack([frame["value"] - frame["low"], frame["high"] - frame["value"]])
    for chosen, fill in ((sure, "#D55E00"), (~sure, "white")):
        axis.errorbar(frame["value"][chosen], y[chosen], xerr=reach[:, chosen], fmt="o", color="#D55E00",
                      markerfacecolor=fill, capsize=2)  # fmt: skip
    axis.axvline(0, color="black", linewidth=1, linestyle=":")
    axis.set(yticks=y, yticklabels=list(names), xlabel=label, ylim=(-0.7, len(frame) - 0.3))
    axis.xaxis.set_major_locator(MaxNLocator(5))
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
