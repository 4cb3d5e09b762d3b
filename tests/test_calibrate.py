"""Calibration statistics: the right activations, once, streamed, and sequentially on the sparse model."""

import pytest
import torch

import rsparse
from rsparse.accounting import split_budget
from rsparse.calibrate import MAGNITUDE, ROUNDS, Score, check_ids, collect, run_decoder, statistics_key
from rsparse.models import decoder_linears
from rsparse.thresholds import column_norms


def recorded(model, ids) -> dict[str, torch.Tensor]:
    """Inputs of every decoder linear, (tokens, n), kept whole: what the library never does."""
    found: dict[str, list] = {}
    handles = [
        x.module.register_forward_pre_hook(
            lambda m, args, name=x.name: found.setdefault(name, []).append(args[0][0])
        )
        for x in decoder_linears(model)
    ]
    with torch.no_grad():
        for row in ids:
            model(row[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("norms", [False, True])
def test_statistics_are_of_the_inputs(build, ids, norms):
    model = build()
    linears, inputs = decoder_linears(model), recorded(model, ids)
    masks = [(x, Score(column_norms(x.module.weight) if norms else None)) for x in linears]
    found = collect(model, ids, masks)
    for x, mask in masks:
        statistics, seen = found[statistics_key(x, mask)], inputs[x.name]
        assert statistics.tokens == ids.numel()
        torch.testing.assert_close(statistics.mean_abs, seen.abs().mean(0))
        torch.testing.assert_close(statistics.mean_square, seen.square().mean(0))
        score = seen.abs() * (x.module.weight.detach().norm(dim=0) if norms else 1)
        low, high = (
            float(torch.quantile(score.flatten(), 0.6, interpolation=i)) for i in ("lower", "higher")
        )
        assert low * (1 - 2**-9) <= statistics.quantile(0.6) <= high * (1 + 2**-9)


def test_linears_that_read_one_activation_share_its_statistics(build, ids):
    model = build()
    linears = decoder_linears(model)
    found = collect(model, ids, [(x, MAGNITUDE) for x in linears])
    assert len(found) == 8  # attn_in, attn_out, mlp_in, mlp_hidden of two layers
    keys = {x.name: statistics_key(x, MAGNITUDE) for x in linears[:7]}
    q, k, v, o, gate, up, down = keys.values()
    assert q == k == v and gate == up and len({q, o, gate, down}) == 4
    weighted = Score(torch.ones(64))
    assert len({statistics_key(x, weighted) for x in linears}) == 14


def test_one_forward_pass_per_sample_and_no_logits(build, ids, monkeypatch):
    model, passes = build(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    model.lm_head.register_forward_pre_hook(lambda module, args: pytest.fail("logits were computed"))
    rsparse.sparsify(model, "teal", 0.5, calibration=ids)
    assert passes == [(1, 40)] * 4 * (2 + ROUNDS)  # dense, on the sparse model, and what was realised
    passes.clear()
    collect(model, ids, [(x, MAGNITUDE) for x in decoder_linears(model)])
    assert passes == [(1, 40)] * 4


@torch.no_grad()
@pytest.mark.parametrize("score", ["magnitude", "column-norm"])
def test_sequential_thresholds_by_brute_force(build, ids, score):
    """Linear by linear on the model that is sparse up to there, replayed with hooks on the dense model."""
    model = build()

    def weigh(linear, x):
        return x.abs() * (linear.module.weight.norm(dim=0) if score == "column-norm" else 1)

    def sparse(linear, x, line):
        U, S, Vh = torch.linalg.svd(linear.module.weight, full_matrices=False)
        A, B = U[:, : line.rank] * S[: line.rank], Vh[: line.rank].T
        keep = weigh(linear, x) > line.threshold
        return (x * keep) @ linear.module.weight.T + (x * ~keep) @ B @ A.T

    asked = dict(sparsity=0.5, rho=0.8, score=score, calibration=ids)
    static = rsparse.sparsify(model, threshold="static-dense", **asked)
    report = rsparse.sparsify(model, threshold="static-sequential", **asked)
    rsparse.restore(model)
    for x, line in zip(decoder_linears(model), report.linears, strict=True):
        seen = weigh(x, recorded(model, ids)[x.name]).flatten()
        split = split_budget(*x.shape, 0.5, 0.8)
        low, high = (
            float(torch.quantile(seen, 1 - split.kept / x.shape[1], interpolation=i))
            for i in ("lower", "higher")
        )
        assert low * (1 - 2**-9) <= line.threshold <= high * (1 + 2**-9), line.name
        assert line.realised == pytest.approx(1 - line.read, abs=0.005)
        x.module.register_forward_hook(lambda module, args, output, x=x, line=line: sparse(x, args[0], line))
    changed = [
        a.name
        for a, b in zip(report.linears, static.linears, strict=True)
        if abs(a.threshold / b.threshold - 1) > 0.02
    ]
    assert "model.layers.1.mlp.down_proj" in changed and "model.layers.0.self_attn.q_proj" not in changed


def test_a_model_whose_activations_are_not_finite(build, ids, logits):
    model = build()
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[2, 5]] = float("nan")
    for threshold in ("static", "static-sequential"):
        with pytest.raises(ValueError, match="calibration activations hold NaN or inf"):
            rsparse.sparsify(model, "teal", 0.5, threshold=threshold, calibration=ids)
        assert all(isinstance(x.module, torch.nn.Linear) for x in decoder_linears(model))
        assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 3), r"torch.float32 of shape \(2, 3\); expected token ids"),
        (torch.zeros(3, dtype=torch.long), r"torch.int64 of shape \(3,\)"),
        ([[1, 2]], "is a list; expected token ids"),
        (torch.zeros(0, 8, dtype=torch.long), r"shape \(0, 8\); expected at least one token"),
        (torch.zeros(8, 0, dtype=torch.long), r"shape \(8, 0\); expected at least one token"),
        (torch.tensor([[1, 97]]), r"holds token id 97; expected 0..96"),
        (torch.tensor([[1, -1]]), r"holds token id -1; expected 0..96"),
    ],
)
def test_ids_that_are_none(build, bad, message):
    model = build()
    with pytest.raises(ValueError, match=f"samples.*{message}"):
        check_ids(bad, model, "samples")


def test_a_pass_reads_no_cache(build, ids):
    model = build()
    seen = []
    model.model.register_forward_pre_hook(
        lambda m, a, kwargs: seen.append(kwargs.get("use_cache")), with_kwargs=True
    )
    run_decoder(model, ids)
    assert seen == [False] * 4
