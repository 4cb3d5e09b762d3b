"""One linear against float64, and what must never be swallowed."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from rsparse.accounting import Split, split_budget
from rsparse.decompose import Factors, svd_factors
from rsparse.linears import KeptTally, SparseLinear, low_rank
from rsparse.protocol import TokenProtocol
from rsparse.thresholds import column_norms

M, N = 48, 64


def reference_output(
    x: Tensor, weight: Tensor, keep: Tensor, factors: Factors | None, bias: Tensor | None = None
) -> Tensor:
    """R-Sparse's linear in float64 and in three lines, for a given mask."""
    W, x = weight.double(), x.double()
    y = torch.where(keep, x, 0) @ W.T
    if factors is not None:
        y = y + torch.where(keep, 0, x) @ factors.B.double() @ factors.A.double().T
    return y if bias is None else y + bias.double()


MIXED = 0.5  # of 10 positions the last 5 are sparse


def make(kept, rank, threshold=None, norms=False, bias=False, tokens="all", dtype=torch.float32, m=M, n=N):
    """A SparseLinear whose protocol stands at a forward pass of 2 x 10 positions."""
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(n, m, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(generator=generator)
    factors = svd_factors(dense.weight, rank) if rank else None
    factors = factors and Factors(factors.A.to(dtype), factors.B.to(dtype))
    protocol = TokenProtocol(tokens)
    protocol.begin(input_ids=torch.zeros(2, 10, dtype=torch.long))
    weights = column_norms(dense.weight) if norms else None
    return SparseLinear(
        dense, Split(kept, rank, Fraction(0)), protocol, factors, weights, threshold
    ).requires_grad_(False)


def inputs(dtype=torch.float32, n=N):
    return torch.randn(2, 10, n, generator=torch.Generator().manual_seed(1)).to(dtype)


CONFIGURATIONS = {
    "per token": dict(kept=20, rank=6),
    "static": dict(kept=20, rank=6, threshold=0.7),
    "column norm": dict(kept=20, rank=6, norms=True),
    "column norm, static": dict(kept=20, rank=6, norms=True, threshold=5.0),
    "no low-rank path": dict(kept=20, rank=0),
    "no low-rank path, static": dict(kept=20, rank=0, threshold=0.7),
    "no sparse path": dict(kept=0, rank=6),
    "no sparse path, static": dict(kept=0, rank=6, threshold=math.inf),
    "nothing": dict(kept=0, rank=0),
    "one channel, full rank": dict(kept=1, rank=M),
}
every_configuration = pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)


def expected_mask(linear: SparseLinear, x: torch.Tensor, tokens) -> torch.Tensor:
    """Kept channels by a sort in float64, dense positions kept whole."""
    score = x.double().abs()
    if linear.norms is not None:
        score = score * linear.dense.weight.double().norm(dim=0)
    if linear.split.kept == 0:
        keep = torch.zeros_like(score, dtype=torch.bool)
    elif linear.threshold is None:
        keep = score.argsort(dim=-1, descending=True).argsort(dim=-1) < linear.split.kept
    else:
        keep = score > linear.threshold
    if tokens == MIXED:
        keep[:, :5] = True
    return keep


@every_configuration
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", ["all", MIXED])
def test_float32_against_a_float64_reference_with_the_same_mask(configuration, bias, tokens):
    linear, x = make(**configuration, bias=bias, tokens=tokens), inputs()
    keep = expected_mask(linear, x, tokens)
    factors = None if linear.A is None else svd_factors(linear.weight, linear.split.rank)
    W, wide = linear.weight.double(), x.double()
    y = torch.einsum("bpn,mn->bpm", wide * keep, W)
    if factors:
        y += torch.einsum("bpn,nr,mr->bpm", wide * ~keep, factors.B, factors.A)
    if bias:
        y += linear.bias.double()
    found = linear(x)
    assert found.dtype == torch.float32 and found.shape == (2, 10, M)
    assert float((found - y).norm() / y.norm().clamp_min(1e-300)) <= 3e-6
    torch.testing.assert_close(
        reference_output(x, linear.weight, keep, factors, linear.bias), y, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("m", "n"), [(1024, 1024), (256, 1024), (2816, 1024), (1024, 2816)])
@pytest.mark.parametrize("rho", [0.5, 0.95, 1.0])
def test_accuracy_holds_at_realistic_sizes(m, n, rho):
    split = split_budget(m, n, 0.5, rho)
    linear, x = make(split.kept, split.rank, m=m, n=n), inputs(n=n)
    factors = svd_factors(linear.weight, split.rank) if split.rank else None
    y = reference_output(x, linear.weight, expected_mask(linear, x, "all"), factors)
    assert float((linear(x) - y).norm() / y.norm()) <= 3e-6


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float64, 1e-14)]
)
def test_other_precisions(dtype, tolerance):
    linear, x = make(20, 6, dtype=dtype), inputs(dtype)
    y = reference_output(x, linear.weight, linear.keep(x), svd_factors(linear.weight, 6))
    found = linear(x)
    assert found.dtype == dtype and linear.keep(x).sum(-1).eq(20).all()
    assert float((found.double() - y).norm() / y.norm()) <= tolerance


def test_dense_positions_equal_the_dense_linear_bit_for_bit():
    for configuration in CONFIGURATIONS.values():
        linear, x = make(**configuration, tokens=MIXED), inputs()
        assert linear(x)[:, :5].equal(linear.dense(x)[:, :5])
        assert not linear(x)[:, 5:].equal(linear.dense(x)[:, 5:])


@every_configuration
def test_sparse_positions_alone_are_worked_on_and_a_tape_has_whole_masks(configuration):
    linear, x = make(**configuration, tokens=MIXED), inputs()
    gathered, seen = linear(x), []
    linear.tape = lambda mask: seen.append(mask.shape) or mask
    torch.testing.assert_close(linear(x), gathered, rtol=1e-5, atol=1e-5)
    assert seen == [x.shape]
    linear.tape, x[0, 0, 0] = None, math.inf  # at a dense position: elsewhere nothing changes
    assert torch.equal(linear(x)[:, 1:], gathered[:, 1:])


@pytest.mark.parametrize("shape", [(2, 9), (4, 5), (3, 10), (1, 10)])
def test_activations_of_another_pass_are_refused(shape):
    linear = make(20, 6, tokens=MIXED)
    with pytest.raises(ValueError, match=rf"{shape[0]} x {shape[1]} positions; expected 2 x 10"):
        linear(torch.zeros(*shape, N))


def test_no_sparse_position_calls_the_plain_linear():
    linear, x = make(20, 6, tokens=0.0), inputs()
    linear.protocol.tokens = "decode"
    linear.protocol.begin(input_ids=torch.zeros(2, 10, dtype=torch.long))
    assert linear(x).equal(linear.dense(x))


@every_configuration
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", ["all", MIXED])
def test_what_is_not_finite_surfaces(configuration, bad, tokens):
    linear, x = make(**configuration, tokens=tokens), inputs()
    for position in (2, 7):  # dense and sparse under the mixed rule
        broken = x.clone()
        broken[1, position, 5] = bad
        lost = torch.isfinite(linear(broken)).all(-1)
        assert not lost[1, position], f"position {position}"
        assert lost.sum() == 19  # and nowhere else


def test_what_is_not_finite_surfaces_through_the_low_rank_path():
    """The mask drops it here: |inf| is not above a threshold of inf."""
    linear, x = make(20, 6, threshold=math.inf), inputs()
    x[0, 0, 0] = math.inf
    assert not torch.isfinite(linear(x)[0, 0]).any()


def test_factors_exactly_when_the_rank_asks_for_them():
    dense, protocol = nn.Linear(4, 4), TokenProtocol("all")
    with pytest.raises(ValueError, match="rank is 2; expected factors"):
        SparseLinear(dense, Split(1, 2, Fraction(1)), protocol)
    with pytest.raises(ValueError, match="rank is 0; expected factors"):
        SparseLinear(dense, Split(1, 0, Fraction(1)), protocol, svd_factors(dense.weight, 1))


def test_it_stands_in_for_the_linear_it_wraps():
    linear = make(20, 6, bias=True)
    assert linear.weight is linear.dense.weight and linear.bias is linear.dense.bias
    assert (linear.in_features, linear.out_features) == (N, M)
    assert "kept=20, rank=6" in repr(linear) and not [k for k in linear.state_dict() if "dense" not in k]


def test_low_rank_is_two_thin_products():
    A, B, x, bias = torch.randn(5, 2), torch.randn(7, 2), torch.randn(3, 7), torch.randn(5)
    torch.testing.assert_close(low_rank(x, A, B, bias), x @ (A @ B.T).T + bias)


def test_the_tally_counts_sparse_positions_only():
    linear, x = make(20, 0, threshold=0.7, tokens=MIXED), inputs()
    linear.tally = KeptTally()
    linear(x)
    kept = (x[:, 5:].abs() > 0.7).sum(-1).double().flatten()
    assert linear.tally.tokens == 10
    assert linear.tally.mean == pytest.approx(float(kept.mean()))
    assert linear.tally.spread == pytest.approx(float(kept.std(correction=0)))


def test_an_empty_tally_says_so():
    assert math.isnan(KeptTally().mean) and math.isnan(KeptTally().spread)
