"""Plots: a picture with words for every kind of table, in the book's style, without warnings."""

from __future__ import annotations

import base64
import io
import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from rsparse import figures
from rsparse.models import KINDS


@pytest.fixture
def shown(monkeypatch):
    """What was displayed: [(data, metadata)]."""
    found: list[tuple] = []
    monkeypatch.setattr(
        figures, "display", lambda data, metadata=None, raw=False: found.append((data, metadata))
    )
    return found


def quality_rows(methods=("dense", "teal", "r-sparse", "low-rank"), seeds=(0,)) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "method": method,
                "sparsity": s,
                "task": task,
                "metric": metric,
                "value": 0.8 - s / 2,
                "stderr": 0.01,
            }
            for method in methods
            for s in ((0.0,) if method == "dense" else (0.3, 0.7))
            for task, metric in (("average", "acc"), ("heldout", "perplexity"))
            for _ in seeds
        ]
    )


def added_rows() -> pd.DataFrame:
    """Two panels of one method with a knob, one without, and a variant that adds a thousand times as much."""
    cells = [("teal", 0.25, 0.001), ("teal", 0.5, -0.002), ("relufication", 0.3, 0.01),
             ("r-sparse (column-norm)", 0.5, 2.0)]  # fmt: skip
    return pd.DataFrame([
        {"panel": panel, "method": method, "sparsity": s, "value": value, "low": value - 0.001, "high": value + 0.001}
        for panel in ("loss", "margin") for method, s, value in cells
    ])  # fmt: skip


def gained() -> pd.DataFrame:
    """Two searchers at two budgets, two groups each; evolution with two seeds."""
    lines = [("evolution", 0), ("evolution", 1), ("random", 0)]
    return pd.DataFrame([
        {"sparsity": s, "searcher": searcher, "seed": seed, "group": i // 2, "evaluations": i + 1, "gain": i * s}
        for s in (0.5, 0.7) for searcher, seed in lines for i in range(4)
    ])  # fmt: skip


def recovered() -> pd.DataFrame:
    """Shares of two searchers in groups of one and of eight linears."""
    return pd.DataFrame([
        {"searcher": searcher, "group_size": size, "metric": metric, "value": 1 / size, "low": 0.1, "high": 1.0}
        for searcher in ("evolution", "random") for size in (1, 8) for metric in ("recovered_share", "false_share")
    ])  # fmt: skip


def timed() -> pd.DataFrame:
    """Three linears at two sparsities, of two storages."""
    return pd.DataFrame([
        {"dtype": dtype, "linear": linear, "sparsity": s, "ours us": 10 * (1 - s), "torch us": 10.0,
         "over torch": 1 / (1 - s), "bytes": 1e6 * (1 - s), "dense bytes": 1e6, "bandwidth share": 0.5 + s / 4,
         "read bandwidth": 1e11} for dtype in ("float32", "int4") for linear in ("qkv", "o", "down") for s in (0.5, 0.9)
    ])  # fmt: skip


def all_figures() -> dict[str, Figure]:
    random = np.random.default_rng(0)
    maps = {(key, kind): random.random((5, 7)) ** 8 for kind in KINDS for key in ("a", "b")}
    maps["a", "k"][2] = 0.0  # a component that carries nothing
    shares = pd.DataFrame(
        [
            {"metric": "share_top10", "linear": kind, "control": control, "layer": layer, "value": 0.2}
            for kind in KINDS
            for control in ("real", "gaussian-w", "unsorted")  # one control is absent
            for layer in (0, 3)
        ]
    )
    points = pd.DataFrame(
        {"sparsity": [0.4, 0.4, 0.5], "rho": [0.0, 1.0, 1.0], "diff_loss": [3.0, 0.0, 0.0],
         "low": [2.0, 0, np.nan],
         "high": [4.0, 0, np.nan]}
    )  # fmt: skip
    paired = pd.DataFrame(
        {"value": [0.1, -0.2, 0.0], "low": [0.05, -0.5, np.nan], "high": [0.15, 0.1, np.nan]}
    )
    found = pd.DataFrame(
        {"planted": [0.2, 0.5], "found": [0.2, 1.0], "noise": [0.1, 0.3], "step": [0.1, 0.1]}
    )
    measures = {("average", "acc"): "accuracy (%)", ("heldout", "perplexity"): "perplexity"}
    chosen = pd.DataFrame([
        {"sparsity": s, "layer": i, "linear": kind, "value": s} for s in (0.4, 0.5) for i in (0, 1, 2) for kind in KINDS
    ])  # fmt: skip
    histogram = np.array([[0.5, 1.5, 2.5], [0.6, 0.2, 0.0]])  # an empty bin
    return {
        "score_maps": figures.score_maps(maps, {"a": "one", "b": "two"}, KINDS),
        "concentration": figures.concentration(shares, "share_top10", "share (%)"),
        "quality": figures.quality(quality_rows(), measures),
        "one method": figures.quality(quality_rows(["dense", "r-sparse"]), measures),
        "dense alone": figures.quality(quality_rows(["dense"]), measures),
        "not measured": figures.quality(quality_rows(), {("summaries", "rouge_l"): "ROUGE-L (%)"}),
        "rho_sweep": figures.rho_sweep(points),
        "differences": figures.differences(paired, "difference", ["one", "two", "three"]),
        "added": figures.added(added_rows()),
        "nothing added": figures.added(added_rows().iloc[:0]),
        "no differences": figures.differences(paired.iloc[:0], "difference", []),
        "difference_panels": figures.difference_panels(
            pd.concat([paired, paired[1:]]).assign(panel=["a (x)"] * 3 + ["b (y)"] * 2, label=[*"pqr", *"qr"])
        ),
        "lines": figures.quality(quality_rows().assign(line=lambda x: x["method"].str[0]), measures, by="line"),
        "planted": figures.planted(found),
        "allocation": figures.allocation(chosen),
        "rho_map": figures.rho_map(chosen.assign(panel=[f"s {s}" for s in chosen["sparsity"]])),
        "convergence": figures.convergence(gained()),
        "recovery": figures.recovery(recovered(), 0.9),
        "kernel_sweep": figures.kernel_sweep(timed()[:6]),
        "grouped_bars": figures.grouped_bars(
            pd.DataFrame({"panel": [*"ppqq"], "group": [*"abab"], "series": [*"xxxy"], "value": [1.0, 2, 3, 4]}),
            "y", 1.0,
        ),
        "gathering": figures.gathering(
            pd.DataFrame({"tokens": [1, 2, 2], "wanted": [0.5, 0.44, 0.75], "value": [1.7, 1.3, 0.9]}), 0.5
        ),
        "roofline": figures.roofline(timed()),
        "activations": figures.activations({(i, x): histogram for i in (0, 3) for x in "ab"}, {"a": "A", "b": "B"}),
    }


def test_every_figure_becomes_a_picture_with_words(shown):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, figure in all_figures().items():
            figures.show(figure, f"This is {name}.", f"Caption of {name}")
    for data, metadata in shown:
        image = imread(io.BytesIO(base64.b64decode(data["image/png"])))
        assert image.shape[0] > 100 and image[..., :3].std() > 0.01, "an empty picture"
        words = metadata["image/png"]
        assert words["alt"] == data["text/plain"] and words["alt"].startswith("This is")
        assert words["caption"].startswith("Caption")


def test_the_same_figure_is_the_same_picture(shown):
    for _ in range(2):
        figures.show(all_figures()["planted"], "Alt.")
    assert shown[0] == shown[1]


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_a_figure_without_words_is_refused(alt, shown):
    with pytest.raises(ValueError, match="alt is empty"):
        figures.show(Figure(), alt)
    assert not shown


def test_a_readers_own_settings_do_not_reach_the_book(shown):
    figures.show(all_figures()["quality"], "Alt.")
    with mpl.rc_context({"text.usetex": True, "legend.frameon": True, "font.size": 30, "axes.grid": False}):
        figures.show(all_figures()["quality"], "Alt.")  # with usetex, LaTeX would have to be there
        assert mpl.rcParams["font.size"] == 30
    assert shown[0] == shown[1]


def test_methods_differ_in_more_than_colour():
    lines = list(figures.LOOK.values())
    for part in range(3):
        assert len({line[part] for line in lines}) == len(lines)
    axes = all_figures()["quality"].axes[0]
    markers = [line.get_marker() for line in axes.lines if line.get_marker() not in ("|", "_", "None", "")]
    assert len(set(markers)) >= 3


def test_quality_starts_at_dense_and_is_in_percent():
    axes = all_figures()["one method"].axes[0]
    (line,) = (line for line in axes.lines if line.get_marker() == "o")
    assert line.get_xdata().tolist() == [0, 30, 70]
    assert line.get_ydata().tolist() == pytest.approx([80, 65, 45])


def test_differences_are_filled_where_zero_is_excluded():
    axes = all_figures()["differences"].axes[0]
    filled = {}
    for line in axes.lines:
        if line.get_marker() == "o":
            filled |= {float(y): line.get_markerfacecolor() for y in line.get_ydata()}
    assert (filled[2.0], filled[1.0], filled[0.0]) == ("#D55E00", "white", "white")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two", "three"]


def test_difference_panels_share_their_rows():
    left, right = all_figures()["difference_panels"].axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["p", "q", "r"]
    assert (left.get_xlabel(), right.get_xlabel()) == ("a\n(x)", "b\n(y)")

    def drawn(axis) -> dict[float, float]:
        points = [line for line in axis.lines if line.get_marker() == "o"]
        return {y: x for line in points for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True) if x == x}

    assert drawn(left) == {2: 0.1, 1: -0.2, 0: 0.0}
    assert drawn(right) == {1: -0.2, 0: 0.0}, "the row that a panel lacks stays empty"


def test_what_is_added_has_a_logarithmic_axis_and_every_method():
    left, right = all_figures()["added"].axes
    assert left.get_yscale() == right.get_yscale() == "symlog"
    assert [box.get_label() for box in left.containers] == ["ReLUfication", "uniform TEAL", "column-norm R-Sparse"]
    low, high = left.get_ylim()
    assert low < -0.003 and high > 2.001, "no marker is cut"
    assert left.get_yticks().tolist() == pytest.approx([-0.001, 0, 0.001, 0.01, 0.1, 1])


@pytest.mark.parametrize(
    ("ends", "most", "expected"),
    [((-0.02, 3.0), 9, [-0.01, 0, 0.01, 0.1, 1]), ((0.0, 3.0), 2, [0, 0.01, 1]), ((-0.001, 0.002), 2, [0])],
)
def test_decades_on_either_side_of_zero(ends, most, expected):
    assert figures._decades(0.01, *ends, most) == pytest.approx(expected)


def test_one_far_difference_does_not_hide_the_others():
    far = pd.DataFrame({"value": [3.0, -0.001], "low": [2.9, -0.004], "high": [3.1, 0.002]})
    axes = figures.differences(far, "difference", ["far", "near"]).axes[0]
    assert axes.get_xscale() == "symlog" and axes.xaxis.get_transform().linthresh <= 0.006
    low, high = axes.get_xlim()
    assert low < -0.004 and high > 3.1
    assert figures.differences(far[1:], "difference", ["near"]).axes[0].get_xscale() == "linear"


def test_bars_of_percentages_end_at_a_hundred():
    rows = quality_rows(["dense", "teal"]).assign(value=0.995)
    axes = figures.quality(rows, {("average", "acc"): "accuracy (%)"}).axes[0]
    (bars,) = axes.containers[0].lines[2]
    assert max(end for segment in bars.get_segments() for end in segment[:, 1]) == pytest.approx(100)
    assert figures._folded("average accuracy of all the eight tasks (%)").split("\n")[-1] == "(%)"


def test_quality_by_another_column_starts_every_line_at_dense():
    axes = all_figures()["lines"].axes[0]
    named = {box.get_label(): box.lines[0] for box in axes.containers}
    assert list(named) == ["t", "r", "l"]
    assert all(line.get_xdata().tolist() == [0, 30, 70] for line in named.values())
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in named.values()}) == 3


def test_convergence_names_every_searcher_once_and_marks_the_groups():
    left, right = all_figures()["convergence"].axes
    assert left.get_legend_handles_labels()[1] == ["evolution", "random"]
    curves = [line for line in left.lines if len(line.get_xdata()) == 4]
    assert len(curves) == 3 and [line.get_xdata()[0] for line in left.lines if line not in curves] == [3]
    assert right.get_title() == "sparsity 70%"


def test_recovery_is_in_percent_beside_what_is_enough():
    left, right = all_figures()["recovery"].axes
    (dashed,) = (line for line in left.lines if line.get_linestyle() == "--" and len(line.get_xdata()) == 2
                 and set(line.get_ydata()) == {90.0})  # fmt: skip
    assert dashed.get_color() == "black" and not any(set(x.get_ydata()) == {90.0} for x in right.lines)
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "8"]
    assert left.containers[0].lines[0].get_ydata().tolist() == pytest.approx([100, 12.5])


def test_tables_round_by_column_and_leave_gaps_empty(shown):
    frame = pd.DataFrame({"name": ["<a>", None], "x": [1.23456, np.nan], "y": [2.0, 3.0], "n": [1, 2]})
    figures.table(frame, {"x": 3}, "Shares < 1")
    html = shown[0][0].data
    assert "<td>1.235</td>" in html and "<td>2.00</td>" in html and "<td>1</td>" in html
    assert "NaN" not in html and "None" not in html and "&lt;a&gt;" in html
    assert html.count("<caption>Shares &lt; 1</caption>") == 1
    figures.table(frame, 0)
    assert "<td>1</td>" in shown[1][0].data and "<caption>" not in shown[1][0].data


def test_a_bar_that_was_not_measured_is_left_out():
    left, right = all_figures()["grouped_bars"].axes
    assert [bar.get_height() for bar in left.patches][:2] == [1, 2]
    heights = [bar.get_height() for bar in right.patches]
    assert heights[0] == 3 and np.isnan(heights[1]) and np.isnan(heights[2]) and heights[3] == 4


def test_the_sweep_shows_the_geometric_mean_beside_the_bytes():
    ratio = all_figures()["kernel_sweep"].axes[1]
    lines = {line.get_label(): line.get_ydata() for line in ratio.lines}
    assert lines["geometric mean"].tolist() == pytest.approx([2, 10])
    assert lines["dense bytes over bytes read"].tolist() == pytest.approx([2, 10])
