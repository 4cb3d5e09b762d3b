"""Scores, masks, and quantiles from a histogram whose size depends on nothing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsparse.thresholds import ScoreStatistics, channel_score, column_norms, keep_above, keep_top

SHARES = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
DRAWS = {
    "normal": lambda g: torch.randn(4000, 16, generator=g),
    "heavy": lambda g: (
        torch.randn(4000, 16, generator=g) / torch.rand(4000, 16, generator=g).clamp_min(1e-6) ** 2
    ),
    "small": lambda g: torch.randn(4000, 16, generator=g) * 1e-20,
    "outlier": lambda g: torch.randn(4000, 16, generator=g) * torch.tensor([1.0] * 15 + [1e6]),
}


def collected(x: torch.Tensor, norms: torch.Tensor | None = None, parts: int = 1) -> ScoreStatistics:
    statistics = ScoreStatistics(x.shape[-1], norms)
    for part in x.chunk(parts):
        statistics.add(part)
    return statistics


def dropped(score: torch.Tensor, threshold: float) -> float:
    return float((~keep_above(score, threshold)).double().mean())


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_quantile_against_torch(draw):
    x = draw(torch.Generator().manual_seed(0))
    statistics = collected(x)
    for share in SHARES:
        low, high = (
            float(torch.quantile(x.abs().double().flatten(), share, interpolation=i))
            for i in ("lower", "higher")
        )
        assert low * (1 - 2**-9) <= statistics.quantile(share) <= high * (1 + 2**-9)
        assert dropped(x.abs(), statistics.quantile(share)) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_of_16_bit_inputs_move_the_share_by_less_than_one_value(dtype):
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    statistics = collected(x)
    for share in SHARES:
        found = dropped(channel_score(x, None), statistics.quantile(share))
        assert share - 1e-9 <= found < share + 0.005  # a value in bf16 holds up to 0.3% of normal draws


@given(
    st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 3.0, 2.0**90]), min_size=1, max_size=40),
    st.floats(0.01, 0.99),
)
def test_whatever_the_ties_the_share_dropped_is_reached_and_no_value_more(values, share):
    x = torch.tensor(values)[:, None]
    threshold = collected(x).quantile(share)
    score = x.abs().flatten()
    assert dropped(score, threshold) >= share
    largest_dropped = score[score <= threshold].max()
    assert float((score < largest_dropped).double().mean()) <= share


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_shares_below_a_score_against_counting(draw):
    x = draw(torch.Generator().manual_seed(0))
    statistics = collected(x)
    scores = torch.tensor([statistics.quantile(share) for share in SHARES], dtype=torch.float64)
    assert statistics.below(scores).tolist() == pytest.approx(SHARES, abs=1e-6)
    counted = [float((x.abs() <= score).double().mean()) for score in scores]
    assert statistics.below(scores).tolist() == pytest.approx(counted, abs=2e-3)
    ends = statistics.below(torch.tensor([-1.0, 0.0, math.inf])).tolist()
    assert ends == pytest.approx([0, 0, 1])


def test_zeros_are_dropped_first():
    x = torch.cat([torch.zeros(60, 4), torch.rand(40, 4) + 1])
    statistics = collected(x)
    assert 0 <= statistics.quantile(0.5) < 1e-30
    assert dropped(x.abs(), statistics.quantile(0.5)) == 0.6
    assert collected(torch.zeros(3, 4)).quantile(0.5) < 1e-30


def test_shares_outside_the_open_interval():
    statistics = collected(torch.randn(10, 4))
    assert statistics.quantile(0.0) == -math.inf and statistics.quantile(1.0) == math.inf


def test_nothing_seen():
    with pytest.raises(ValueError, match="no calibration tokens"):
        ScoreStatistics(4).quantile(0.5)


def test_means_per_channel_and_streaming():
    x = torch.randn(2, 300, 8)
    once, parts = collected(x), collected(x.reshape(-1, 8), parts=7)
    torch.testing.assert_close(once.mean_abs, x.double().abs().mean((0, 1)), rtol=1e-6, atol=0)
    torch.testing.assert_close(once.mean_square, x.double().square().mean((0, 1)), rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.mean_abs, once.mean_abs, rtol=1e-6, atol=0)
    assert parts.tokens == once.tokens == 600 and parts.counts.equal(once.counts)


def test_weighted_scores():
    x, norms = torch.randn(2000, 8), torch.rand(8) + 0.1
    statistics = collected(x, norms)
    exact = float(torch.quantile((x.abs() * norms).flatten(), 0.4))
    assert statistics.quantile(0.4) == pytest.approx(exact, rel=2**-9)
    torch.testing.assert_close(
        statistics.mean_abs, x.double().abs().mean(0), rtol=1e-6, atol=0
    )  # of x, not the score


def test_memory_does_not_grow_with_tokens():
    statistics = ScoreStatistics(8)

    def held() -> int:
        return sum(
            v.untyped_storage().nbytes() for v in vars(statistics).values() if isinstance(v, torch.Tensor)
        )

    statistics.add(torch.randn(1, 8))
    before = held()
    for _ in range(20):
        statistics.add(torch.randn(1000, 8))
    assert held() == before < 1.1 * 2**20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calibration_refuses_what_is_not_finite(bad, dtype):
    x = torch.randn(10, 4).to(dtype)
    x[3, 2] = bad
    with pytest.raises(ValueError, match="NaN or inf"):
        ScoreStatistics(4).add(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_column_norms_and_scores_are_at_least_single_precision(dtype):
    W, x = (torch.randn(600, 5) * 300).to(dtype), torch.full((2, 5), 1e3).to(dtype)
    norms = column_norms(W)
    wide = torch.promote_types(dtype, torch.float32)
    assert norms.dtype == channel_score(x, norms).dtype == channel_score(x, None).dtype == wide
    torch.testing.assert_close(norms.double(), W.double().square().sum(0).sqrt(), rtol=1e-5, atol=0)
    assert torch.isfinite(channel_score(x, norms)).all()  # 7e6: beyond float16


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_keep_top_is_exact_under_ties(values, data):
    kept = data.draw(st.integers(0, len(values)))
    score = torch.tensor(values, dtype=torch.float32)
    mask = keep_top(score.repeat(3, 1), kept)
    assert mask.sum(-1).tolist() == [kept] * 3 and mask[0].equal(keep_top(score, kept))
    first = sorted(range(len(values)), key=lambda j: -values[j])[:kept]
    assert mask[0].nonzero().flatten().tolist() == sorted(first)  # of equal scores those of lowest index


def test_nan_and_inf_are_kept():
    score = torch.tensor([0.1, math.nan, 5.0, math.inf, 0.2])
    assert keep_top(score, 1).tolist() == [False, True, False, False, False]
    assert keep_top(score, 2).tolist() == [False, True, False, True, False]
    assert keep_above(score, 9.0).tolist() == [False, True, False, True, False]
    assert keep_above(score, math.inf).tolist() == [False, True, False, False, False]
    assert keep_above(score, -math.inf).all()


def test_a_score_at_the_threshold_is_dropped():
    assert keep_above(torch.tensor([0.5, 0.5000001]), 0.5).tolist() == [False, True]
