"""Paired differences as gains: turned so that more is better, and the right words for every interval."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from rsparse.exhibits import gains

ROWS = pd.DataFrame(
    [
        ("heldout", "diff_perplexity_log", 0.5, 0.02, 0.01, 0.03),
        ("average", "diff_acc", 0.5, -0.02, -0.03, -0.01),
        ("summaries", "diff_rouge_l", 0.25, 2.0, 1.0, 3.0),
        ("average", "diff_margin", 0.25, 0.1, math.nan, math.nan),
        ("winogrande", "diff_acc", 0.5, 9.0, 9.0, 9.0),
        ("average", "acc", 0.5, 9.0, 9.0, 9.0),
    ],
    columns=["task", "metric", "sparsity", "value", "low", "high"],
)


def test_gains_are_in_printed_units_and_a_saved_loss_is_one():
    found = gains.gains(ROWS)
    assert found[["sparsity", "measure"]].to_numpy().tolist() == [
        [0.25, "margin"], [0.25, "ROUGE-L"], [0.5, "accuracy"], [0.5, "held-out loss"],
    ]  # fmt: skip
    numbers = found[["value", "low", "high"]].to_numpy().tolist()
    assert numbers[1] == [2, 1, 3]
    assert numbers[2] == pytest.approx([-2, -3, -1]), "points"
    assert numbers[3] == pytest.approx([-0.02, -0.03, -0.01]), "a larger loss is a negative gain"
    assert numbers[0][0] == 0.1 and math.isnan(numbers[0][1]) and math.isnan(numbers[0][2])


def test_no_rows_are_no_gains():
    found = gains.gains(ROWS.iloc[:0])
    assert found.empty and {"measure", "value", "low", "high"} <= set(found)
    assert gains.panels(found, []).empty


def test_panels_carry_units_and_labels():
    found = gains.panels(gains.gains(ROWS), ["a", "b", "c", "d"])
    assert found["panel"].tolist()[2:] == ["accuracy (points)", "held-out loss (nats per token saved)"]
    assert found["label"].tolist() == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("intervals", "said"),
    [
        ([(0.1, 1, 2), (0.2, -2, -1), (0.3, -1, 1), (0.4, 1, 2)], "up at 10% and 40%, down at 20%, open at 30%"),
        ([(0.1, 0, 0), (0.2, math.nan, math.nan)], "open at 10% and 20%"),
        ([(0.1, 1, 2)], "up at 10%"),
    ],
)
def test_words_by_the_side_of_zero(intervals, said):
    frame = pd.DataFrame(intervals, columns=["sparsity", "low", "high"])
    assert gains.by_sign(frame, ("up", "down", "open")) == said


def test_intervals_as_text():
    assert gains.interval({"value": 1.24, "low": -0.04, "high": 2.5}, 1) == "+1.2 [-0.0, +2.5]", "on which side of zero"
    assert gains.interval({"value": -8e-20, "low": -0.0, "high": 0.0}, 1) == "+0.0 [+0.0, +0.0]", "zero has no side"
    assert gains.interval({"value": -0.5, "low": math.nan, "high": math.nan}, 2) == "-0.50"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 2, "+1.0 [+0.0, +2.0] *"), (-0.01, 2, "+1.0 [-0.0, +2.0]"), (0, 2, "+1.0 [+0.0, +2.0]"),
     (-3, -0.01, "+1.0 [-3.0, -0.0] *"), (math.nan, math.nan, "+1.0")],
)  # fmt: skip
def test_a_star_says_that_zero_is_outside(low, high, said):
    assert gains.starred({"value": 1.0, "low": low, "high": high}, 1) == said


@pytest.mark.parametrize(
    ("intervals", "said"),
    [
        ([("margin", 0.5, 1, 2)], "up in the one comparison"),
        ([("margin", 0.5, -1, 2)], "open in the one comparison"),
        ([("margin", 0.5, 1, 2), ("accuracy", 0.5, 1, 2)], "up in all 2 comparisons"),
        ([("margin", 0.5, -1, 2), ("margin", 0.4, math.nan, math.nan)], "open in any of 2 comparisons"),
        ([("margin", 0.4, 1, 2), ("margin", 0.5, -2, -1)],
         "up in 1 of 2 comparisons (margin at 40%), down in 1 (margin at 50%)"),
        ([("accuracy", 0.4, -2, -1), ("margin", 0.4, -2, -1), ("margin", 0.5, 0, 0), ("accuracy", 0.5, -1, 0)],
         "down in 2 of 4 comparisons (accuracy and margin at 40%), open in the others"),
    ],
)  # fmt: skip
def test_comparisons_are_counted_by_the_side_of_zero(intervals, said):
    frame = pd.DataFrame(intervals, columns=["measure", "sparsity", "low", "high"])
    assert gains.tally(frame, ("up", "down", "open")) == said


def test_embedded_tasks_are_called_analogues():
    assert gains.tasks("official") == "the eight tasks"
    assert gains.tasks("tiny-teal", "tasks of TEAL") == "embedded analogues of tasks of TEAL"


def test_what_is_the_same_is_said_once():
    said = {"accuracy": "better at 40%", "margin": "open at 40%", "ROUGE-L": "better at 40%"}
    assert gains.by_measure(said) == ["by accuracy and ROUGE-L, better at 40%", "by margin, open at 40%"]
    assert gains.listed(["a", "b", "c"]) == "a, b and c"
