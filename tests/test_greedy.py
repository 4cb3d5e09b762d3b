"""TEAL's greedy search against Algorithm 1 in a few lines, and what is kept of it."""

import json
import math
from fractions import Fraction

import pytest
import torch

import rsparse
from reference import kept_of, llama_logits, masked, weights_of
from rsparse import greedy
from rsparse.apply import report_of
from rsparse.calibrate import Calibration
from rsparse.models import SCOPES, decoder_linears
from rsparse.paths import cache_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RSPARSE_CACHE", str(tmp_path))


@torch.no_grad()
def algorithm_1(model, ids, layer: int, kinds, sparsity: float) -> tuple[list[str], dict]:
    """The steps of one block and the sparsities that they make, with hooks on the whole dense model: the block's
    inputs are then those of the dense model, and nothing outside the block is masked."""
    block = {x.kind: x.module for x in decoder_linears(model) if x.layer == layer and x.kind in kinds}
    total = sum(x.weight.numel() for x in block.values())
    step = min(x.weight.numel() for x in block.values()) / total / 4
    inputs: dict[str, torch.Tensor] = {}

    def output(sparsities: dict[str, float]) -> torch.Tensor:
        seen, handles = [], []
        for kind, module in block.items():

            def mask(module, args, kind=kind):
                size = inputs.setdefault(kind, args[0].abs())
                if sparsities.get(kind, 0) > 0:
                    return (args[0] * (args[0].abs() > size.flatten().quantile(sparsities[kind])),)

            handles.append(module.register_forward_pre_hook(mask))
        handles.append(model.model.layers[layer].register_forward_hook(lambda m, a, y: seen.append(y)))
        model.model(ids)
        for handle in handles:
            handle.remove()
        return seen[0]

    target, steps, found = output({}), [], dict.fromkeys(block, 0.0)
    for i in range(math.ceil(sparsity / step - 1e-9)):
        errors = {}
        for kind, module in block.items():
            more = found[kind] + step * total / module.weight.numel()
            if more < 1 - 1e-9:
                gap = (target - output(found | {kind: more}))[:, ids.shape[1] * 3 // 4 :]
                errors[kind] = float(gap.square().sum(1).sqrt().mean())
        best = min(errors, key=errors.get)
        found[best] += min(step, sparsity - i * step) * total / block[best].weight.numel()  # of the last, a part
        steps.append(best)
    return steps, found


BUDGET = {"all": 0.14, "mlp": 0.6}  # about as many steps
FOUND: dict = {}


def by_brute_force(model, ids, layer: int, scope: str) -> tuple[list[str], dict]:
    """`algorithm_1` up to `BUDGET`, of the model and the ids that every test here has."""
    if (layer, scope) not in FOUND:
        FOUND[layer, scope] = algorithm_1(model, ids, layer, SCOPES[scope], BUDGET[scope])
    return FOUND[layer, scope]


@pytest.mark.parametrize("scope", ["all", "mlp"])
def test_the_search_by_brute_force(build, ids, scope):
    model = build()
    linears = [x for x in decoder_linears(model) if x.kind in SCOPES[scope]]
    steps = greedy.search(Calibration(model, ids), linears, BUDGET[scope])
    found = greedy.sparsities(Calibration(model, ids), linears, BUDGET[scope])
    for layer in range(2):
        expected, sparsities = by_brute_force(model, ids, layer, scope)
        assert steps[str(layer)] == expected and len(set(expected)) >= 3
        for x in linears:
            if x.layer == layer:
                assert found[x.name] == pytest.approx(sparsities[x.kind], abs=1e-9)


def test_grouped_keys_and_values_can_be_chosen(build):
    """A step of k must leave it something to read, however few bytes of its block k has."""
    model = build()
    block = [x for x in decoder_linears(model) if x.layer == 0]
    sizes = {x.kind: x.shape[0] * x.shape[1] for x in block}
    assert sizes["k"] < sizes["q"]
    taken = greedy.after(["k", "v", "k"], block, 3 * sizes["k"] / 4 / sum(sizes.values()))
    found = {x.kind: taken[x.name] for x in block}
    assert found == pytest.approx(dict.fromkeys(sizes, 0.0) | {"k": 0.5, "v": 0.25}, abs=1e-9)
    steps = greedy.search(Calibration(model, torch.arange(64)[None]), block, 0.9)
    assert {"k", "v"} <= set(steps["0"])


@pytest.mark.parametrize("threshold", ["per-token", "static"])
def test_logits(build, ids, logits, threshold):
    model, row = build(), ids[0, :12]
    weights = weights_of(model)
    asked = {}
    for layer in range(2):
        _, found = by_brute_force(model, ids, layer, "all")
        asked |= {x.name: found[x.kind] for x in decoder_linears(model) if x.layer == layer}
    report = rsparse.sparsify(model, "teal-greedy", 0.14, threshold=threshold, calibration=ids)
    lines = {x.name: x for x in report.linears}

    def linear(name, W, x, position):
        kept = kept_of(len(x), Fraction(round(asked[name], 9)).limit_denominator(10**6))
        assert lines[name].kept == kept
        return masked(kept, 0, threshold=None if threshold == "per-token" else lines[name].threshold)(
            name, W, x, position
        )

    expected = llama_logits(model.config, weights, row.tolist(), linear)
    torch.testing.assert_close(logits(model, row[None])[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.013, 0.1, 0.37, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("scope", ["all", "mlp", "attention"])
def test_every_block_is_as_sparse_as_asked(build, ids, scope, sparsity):
    """0.013 is less than a step, 0.37 no multiple of one, and at 0.97 no linear has room for another."""
    model = build()
    linears = [x for x in decoder_linears(model) if x.kind in SCOPES[scope]]
    found = greedy.sparsities(Calibration(model, ids[:1]), linears, sparsity)
    assert set(found) == {x.name for x in linears} and all(0 <= s < 1 for s in found.values())
    for layer in range(2):
        sizes = {x.name: x.shape[0] * x.shape[1] for x in linears if x.layer == layer}
        share = sum(found[name] * size for name, size in sizes.items()) / sum(sizes.values())
        assert sparsity - 1e-12 <= share <= sparsity + 1e-9


def test_sparsities_after_so_many_steps_by_hand(build):
    """gate, up and down of one size: a step of 1/12 of the block is a quarter of one of them."""
    block = decoder_linears(build())[4:7]
    gate, up, down = (x.name for x in block)
    steps = ["down", "down", "up", "down"]
    assert greedy.after(steps, block, 0.3) == pytest.approx({gate: 0, up: 0.25, down: 0.65}, abs=1e-11)
    assert greedy.after(steps, block, 0.2) == pytest.approx({gate: 0, up: 0.1, down: 0.5}, abs=1e-11)
    assert greedy.after(steps, block, 0.0) == {gate: 0, up: 0, down: 0}
    # no step is left: two fifths of what is still read go, in every linear
    found = greedy.after(["down"] * 3, block, 0.55)
    assert found == pytest.approx({gate: 0.4, up: 0.4, down: 0.85}, abs=1e-11)


def test_one_search_serves_every_smaller_sparsity(build, ids, monkeypatch):
    model, searched = build(), []
    search = greedy.search
    monkeypatch.setattr(greedy, "search", lambda *args: searched.append(args[2]) or search(*args))
    linears, calibration = decoder_linears(model), Calibration(model, ids[:1])
    fresh = {s: greedy.after(search(calibration, linears, s)["0"], linears[:7], s) for s in (0.2, 0.3)}
    for sparsity in (0.3, 0.2, 0.3):
        found = greedy.sparsities(calibration, linears, sparsity)
        assert {x.name: found[x.name] for x in linears[:7]} == fresh[sparsity]
    assert searched == [0.3]
    greedy.sparsities(calibration, linears, 0.35)
    twin, other = build(), build(seed=1)
    greedy.sparsities(Calibration(twin, ids[:1]), decoder_linears(twin), 0.35)  # the same model and tokens
    assert searched == [0.3, 0.35]
    greedy.sparsities(Calibration(model, ids[1:2]), linears, 0.3)
    greedy.sparsities(Calibration(other, ids[:1]), decoder_linears(other), 0.3)
    greedy.sparsities(calibration, [x for x in linears if x.kind in SCOPES["mlp"]], 0.3)
    assert searched == [0.3, 0.35, 0.3, 0.3, 0.3]
    kept = [json.loads(path.read_text()) for path in (cache_folder() / "greedy").glob("*.json")]
    assert sorted(x["sparsity"] for x in kept) == [0.3, 0.3, 0.3, 0.35]


def test_it_looks_at_whole_samples_up_to_a_number_of_tokens(build, ids, monkeypatch):
    model, seen = build(), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    for tokens in (16384, 100, 1):
        monkeypatch.setattr(greedy, "TOKENS", tokens)
        greedy.search(Calibration(model, ids), decoder_linears(model), 0.025)
    assert seen == [(4, 40), (2, 40), (1, 40)]


def test_the_model_is_as_it_was(build, ids, logits):
    model = build()
    before, modules = logits(model, ids), list(model.modules())
    greedy.search(Calibration(model, ids[:1]), decoder_linears(model), 0.1)
    calls = iter(range(100))

    def strike(*_):
        if next(calls) == 3:
            raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(strike)
    for attempt in (
        lambda: greedy.search(Calibration(model, ids[:1]), decoder_linears(model), 0.2),
        lambda: rsparse.sparsify(model, "teal-greedy", 0.3, calibration=ids[:1]),
    ):
        calls = iter(range(100))
        with pytest.raises(KeyboardInterrupt):
            attempt()
    handle.remove()
    assert logits(model, ids).equal(before) and report_of(model) is None
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_sparse_model_is_refused(build, ids):
    model = build()
    calibration, linears = Calibration(model, ids), decoder_linears(model)
    rsparse.sparsify(model, "teal", 0.5, threshold="per-token")
    with pytest.raises(ValueError, match="the model is sparse; expected a dense one"):
        greedy.search(calibration, linears, 0.5)


def test_activations_that_are_not_finite_are_refused(build, ids):
    model = build()
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[0, 5]] = math.nan
    with pytest.raises(ValueError, match="calibration activations hold NaN or inf"):
        rsparse.sparsify(model, "teal-greedy", 0.3, calibration=ids)
    assert report_of(model) is None
