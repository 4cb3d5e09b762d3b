"""Intervals against direct computations, and against what their coverage promises."""

import math

import numpy as np
import pytest
from scipy import stats

from rsparse import intervals


def test_paired_is_students_t_over_item_differences():
    a, b = np.array([0.2, 1.4, -0.3, 0.9, 2.0]), np.array([0.1, 1.0, -0.9, 1.1, 1.2])
    found = intervals.paired(a, b)
    d = a - b
    stderr = math.sqrt(sum((x - d.mean()) ** 2 for x in d) / 4) / math.sqrt(5)
    assert found.mean == pytest.approx(d.mean())
    assert found.stderr == pytest.approx(stderr)
    assert found.high - found.mean == pytest.approx(2.7764451 * stderr)  # t table, 4 df, 97.5%
    assert found.mean - found.low == pytest.approx(2.7764451 * stderr)
    assert found.n == 5


def test_pairing_removes_what_both_runs_share():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=200)
    a, b = difficulty + 0.1 + 0.05 * rng.normal(size=200), difficulty + 0.05 * rng.normal(size=200)
    found = intervals.paired(a, b)
    assert found.low > 0.08 and found.high < 0.12
    assert found.stderr < intervals.mean(a).stderr / 5


def test_t_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    draws = [intervals.mean(rng.normal(3.0, 2.0, size=12), confidence=0.9) for _ in range(2000)]
    covered = np.mean([d.low <= 3.0 <= d.high for d in draws])
    assert 0.88 < covered < 0.92


def test_macro_weighs_tasks_alike_whatever_their_size():
    small, large = intervals.mean([0.0, 1.0, 1.0, 0.0]), intervals.mean([1.0, 1.0, 0.0, 1.0] * 25)
    found = intervals.macro([small, large])
    assert found.mean == pytest.approx((0.5 + 0.75) / 2)
    assert found.stderr == pytest.approx(math.hypot(small.stderr, large.stderr) / 2)
    assert found.n == 104
    reach = found.stderr * stats.t.ppf(0.975, 3)  # the small task dominates: about its 3 degrees of freedom
    assert found.high - found.mean == pytest.approx(reach, rel=0.05)


def test_single_items_and_equal_values_make_no_claim_beyond_themselves():
    assert intervals.mean([2.0, 2.0, 2.0]) == intervals.Interval(2.0, 2.0, 2.0, 0.0, 3)
    one = intervals.mean([2.0])
    assert one.mean == 2.0 and one.n == 1 and math.isnan(one.stderr) and math.isnan(one.low)
    assert math.isnan(intervals.macro([one, intervals.mean([1.0, 2.0])]).low)
    assert set(one.row()) == {"value", "stderr", "low", "high", "n"}


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_items_that_all_agree_may_still_differ_unseen(value):
    found = intervals.paired([value] * 25, [0.0] * 25, counted=True)
    assert intervals.mean([value] * 25).stderr == 0, "measured values that are equal are equal"
    unseen = stats.binomtest(0, 25).proportion_ci(0.95).high
    assert (found.low, found.high) == pytest.approx((max(value - unseen, -1), min(value + unseen, 1)))
    one_other = intervals.mean([value] * 24 + [value - 1], counted=True)
    assert found.stderr == pytest.approx(1 / 25) == pytest.approx(one_other.stderr)
    ties = intervals.macro([found] * 8)
    assert ties.low < value - 0.02, "eight small tasks that tie do not prove a bound of two points"


def test_a_share_has_its_exact_interval():
    assert intervals.share(40, 40).row() == pytest.approx(
        {"value": 1.0, "stderr": 0.0, "low": 0.025 ** (1 / 40), "high": 1.0, "n": 40}
    )
    rng = np.random.default_rng(4)
    draws = [intervals.share(int(rng.binomial(30, 0.9)), 30) for _ in range(1000)]
    assert np.mean([d.low <= 0.9 <= d.high for d in draws]) >= 0.95


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: intervals.paired([1, 2], [1]), "same items"),
        (lambda: intervals.mean([]), "n >= 1"),
        (lambda: intervals.mean([[1.0]]), r"\(1, 1\)"),
        (lambda: intervals.mean([1.0, float("nan")]), "nan"),
        (lambda: intervals.mean([1.0, 2.0], confidence=1.0), "confidence"),
        (lambda: intervals.macro([]), "at least one"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
