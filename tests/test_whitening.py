"""Whitened factors and residual second moments against an SVD of the residuals themselves, in float64."""

import re

import pytest
import torch

import rsparse
from reference import chosen, llama_logits, only, recorded, weights_of
from rsparse import whitening
from rsparse.calibrate import MAGNITUDE, Calibration
from rsparse.decompose import FactorStore, svd_factors
from rsparse.models import decoder_linears
from rsparse.study import Setting
from rsparse.thresholds import column_norms
from rsparse.whitening import (
    output_basis,
    relative_errors,
    residual,
    residual_moments,
    second_moment,
    whitened,
    whitened_factors,
)

SHAPES = [(30, 20), (20, 30), (24, 24)]


def made(shape: tuple[int, int], tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (m, n) and residuals (tokens, n) of uneven channels, some of which are zero."""
    generator = torch.Generator().manual_seed(5)
    W = torch.randn(*shape, generator=generator, dtype=torch.float64)
    E = torch.randn(tokens, shape[1], generator=generator, dtype=torch.float64) @ torch.diag(
        torch.logspace(0, -2, shape[1], dtype=torch.float64)
    )
    return W, E * (torch.rand(E.shape, generator=generator) < 0.6)


def error(W, E, M) -> float:
    return float((E @ (W - M).T).square().sum() / (E @ W.T).square().sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_spectrum_is_that_of_the_residuals(shape):
    W, E = made(shape)
    S = torch.linalg.svdvals(E @ W.T)
    values, U = output_basis(W, second_moment(E))
    torch.testing.assert_close(values.sqrt(), S[: min(shape)], rtol=1e-6, atol=1e-6 * float(S[0]))
    torch.testing.assert_close(U.T @ U, torch.eye(min(shape), dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
def test_no_matrix_of_the_rank_keeps_the_residuals_better(shape):
    """Eckart and Young on the outputs: the error is that of their own truncated SVD, which knows every token."""
    W, E = made(shape)
    S = torch.linalg.svdvals(E @ W.T).square()
    for rank in (0, 1, 5, min(shape)):
        factors = whitened_factors(W, second_moment(E), rank)
        assert factors.A.shape == (shape[0], rank) and factors.B.shape == (shape[1], rank)
        best = float(S[rank:].sum() / S.sum())
        assert error(W, E, factors.A @ factors.B.T) == pytest.approx(best, rel=1e-6, abs=1e-12)
        if 0 < rank < min(shape):
            plain = svd_factors(W, rank)
            assert error(W, E, plain.A @ plain.B.T) > 1.01 * best


@pytest.mark.parametrize("tokens", [200, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_those_of_the_products(shape, tokens):
    W, E = made(shape, tokens)
    other = made(shape, 300)[1].flip(1)  # what factors were not made for
    for factors in (svd_factors(W, min(shape)), whitened_factors(W, second_moment(E), min(shape))):
        found = relative_errors(W, second_moment(other), factors)
        assert len(found) == min(shape) + 1
        for rank in (0, 1, 7, min(shape)):
            part = factors.leading(rank)
            assert float(found[rank]) == pytest.approx(error(W, other, part.A @ part.B.T), abs=1e-9)


def test_a_rank_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"rank is 21; expected 0..20"):
        whitened_factors(torch.zeros(30, 20), torch.eye(20), 21)


def test_residual_is_what_a_mask_leaves():
    x = torch.tensor([[3.0, -1.0, 0.5, -4.0]])
    assert residual(x, None, 1.0).tolist() == [[0, -1.0, 0.5, 0]]
    assert residual(x, torch.tensor([0.1, 5.0, 1.0, 0.1]), 1.0).tolist() == [[3.0, 0, 0.5, -4.0]]
    assert torch.equal(residual(x, None, float("inf")), x) and not residual(x, None, float("-inf")).any()


@pytest.mark.parametrize("norms", [False, True])
def test_moments_of_a_model_in_one_pass_or_in_many(build, ids, norms, monkeypatch):
    model = build()
    inputs, linears = recorded(model, ids)[0], decoder_linears(model)
    asked = [(x, column_norms(x.module.weight) if norms else None, 0.2) for x in linears]
    want = {}
    for x, weights, threshold in asked:
        rows = []
        for token in inputs[x.name]:
            score = [abs(float(v)) * (float(weights[j]) if norms else 1.0) for j, v in enumerate(token)]
            rows.append(token - only(token, chosen(score, 0, threshold)))
        E = torch.stack(rows)
        want[x.name] = E.T @ E
    for limit in (whitening.AT_ONCE, 1):
        monkeypatch.setattr(whitening, "AT_ONCE", limit)
        found = {name: C for names, C in residual_moments(model, ids, asked) for name in names}
        assert found.keys() == want.keys()
        for name, C in found.items():
            torch.testing.assert_close(C, want[name], rtol=1e-9, atol=1e-9)


def test_kept_factors_serve_smaller_ranks_and_no_other_tokens(build, ids, tmp_path, monkeypatch):
    model, store = build("float32"), FactorStore(tmp_path)
    calibration, linears = Calibration(model, ids), decoder_linears(model)[:2]
    first = whitened(calibration, {x.name: (x, None, 20, 6) for x in linears}, store)
    assert all(x.A.dtype == torch.float32 for x in first.values()) and len(store.computed) == 2
    monkeypatch.setattr(whitening, "whitened_factors", None)  # whoever would compute fails
    again = whitened(Calibration(model, ids), {x.name: (x, None, 20, 3) for x in linears}, FactorStore(tmp_path))
    for name, factors in again.items():
        assert torch.equal(factors.A, first[name].A[:, :3]) and torch.equal(factors.B, first[name].B[:, :3])
    for other, kept in ((ids.flip(0), 20), (ids, 19)):
        with pytest.raises(TypeError):
            whitened(Calibration(model, other), {x.name: (x, None, kept, 3) for x in linears}, FactorStore(tmp_path))


def by_hand(inputs, thresholds, kept: int, rank: int):
    """r-sparse with the exact top channels of every token, its factors from an SVD of the residuals W e."""
    bases = {}

    def linear(name, W, x, position):
        if name not in bases:
            E = inputs[name] * (inputs[name].abs() <= thresholds[name])
            bases[name] = torch.linalg.svd(E @ W.T, full_matrices=False).Vh[:rank].T
        U = bases[name]
        large = only(x, chosen(x.abs().tolist(), kept, None))
        return W @ large + U @ (U.T @ (W @ (x - large)))

    return linear


def test_r_sparse_with_whitened_factors_against_the_reference(build, ids, logits):
    """Square linears of one size, so that all have the kept channels and the rank of the first."""
    sizes = dict(num_key_value_heads=8, intermediate_size=64)
    model = build(**sizes)
    weights, inputs = weights_of(model), recorded(model, ids)[0]
    calibration = Calibration(model, ids)
    asked = dict(sparsity=0.5, rho=0.7, threshold="per-token", calibration=calibration)
    report = rsparse.sparsify(model, "r-sparse", factors="whitened", **asked)
    line = report.linears[0]
    assert {(x.kept, x.rank, x.factors) for x in report.linears} == {(line.kept, line.rank, "whitened")}
    found = logits(model, ids[:1])[0]
    dense = {x.name: calibration.statistics(x, MAGNITUDE) for x in decoder_linears(model)}
    thresholds = {name: statistics.quantile(1 - line.kept / 64) for name, statistics in dense.items()}
    linear = by_hand(inputs, thresholds, line.kept, line.rank)
    want = llama_logits(model.config, weights, ids[0].tolist(), linear)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))
    plain = rsparse.sparsify(model, "r-sparse", **asked)
    assert (logits(model, ids[:1])[0] - want).norm() > 1e3 * (found - want).norm(), "not the singular vectors of W"
    assert plain.planned == report.planned and plain.linears[0].factors == "svd", "the same bytes"


def test_a_recipe_may_ask_for_them(build, ids, logits, tmp_path):
    model = build("float32")
    recipe = rsparse.Recipe.uniform(model, 0.5, 0.7, factors="whitened")
    recipe.save(tmp_path / "recipe.json")
    again = rsparse.Recipe.load(tmp_path / "recipe.json")
    assert again == recipe and {ask.factors for ask in again.linears.values()} == {"whitened"}
    rsparse.sparsify(model, recipe=again, calibration=ids)
    by_recipe = logits(model, ids)
    rsparse.sparsify(model, "r-sparse", 0.5, 0.7, calibration=ids, factors="whitened")
    assert torch.equal(logits(model, ids), by_recipe)


def test_recipes_of_before_have_singular_vectors(build, tmp_path):
    recipe = rsparse.Recipe.uniform(build(), 0.5, 0.7)
    recipe.save(tmp_path / "recipe.json")
    text = (tmp_path / "recipe.json").read_text()
    older = re.sub(r',\s*"factors": "svd"', "", text)
    assert older != text
    (tmp_path / "older.json").write_text(older)
    assert rsparse.Recipe.load(tmp_path / "older.json") == recipe


def test_they_need_tokens_and_a_name(build, ids):
    model = build()
    with pytest.raises(ValueError, match="whitened factors need token ids"):
        rsparse.sparsify(model, "r-sparse", 0.5, 0.7, threshold="per-token", factors="whitened")
    with pytest.raises(ValueError, match="factors is 'white'; expected one of 'svd', 'whitened'"):
        rsparse.sparsify(model, "r-sparse", 0.5, 0.7, calibration=ids, factors="white")
    assert not hasattr(model, "_rsparse")
    assert Setting("r-sparse", 0.5, 0.7, threshold="per-token", factors="whitened").calibrated
    assert Setting("r-sparse", 0.5, 1.0, factors="whitened").canonical == Setting("teal", 0.5)
    assert Setting("r-sparse", 0.5, 0.0, factors="whitened").canonical.method == "r-sparse"
    assert Setting("r-sparse", 0.5, factors="whitened").columns()["factors"] == "whitened"
