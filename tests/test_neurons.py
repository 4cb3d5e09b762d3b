"""Neurons switched off (ReLUfication, CATS, CHESS) against loops in float64, and counts by hand."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import rsparse
from reference import (
    kept_of,
    kind_of,
    llama_logits,
    masked,
    own_sparsity,
    recorded,
    relu,
    shapes_of,
    silu,
    switched,
    weights_of,
)
from rsparse.accounting import Split
from rsparse.calibrate import Calibration
from rsparse.linears import KeptTally
from rsparse.models import decoder_linears
from rsparse.neurons import SparseActivation
from rsparse.protocol import TokenProtocol, first_sparse

MLP, ALL = ("up", "down"), ("q", "o", "up", "down")
SCOPES = {"cats": {"mlp": MLP, "all": MLP}, "chess": {"mlp": MLP, "all": ALL, "attention": ("q", "o")}}
SETTINGS = [(name, scope) for name, scopes in SCOPES.items() for scope in scopes]
every_setting = pytest.mark.parametrize(("name", "scope"), SETTINGS)


def planned(weights, name: str, scope: str, sparsity: str) -> tuple[int, int]:
    """Kept input channels of q and o, and kept neurons."""
    kinds, shapes = SCOPES[name][scope], shapes_of(weights)
    p, n, neurons = own_sparsity(weights, sparsity, dict.fromkeys(kinds, "1")), shapes["q"][1], shapes["down"][1]
    return (kept_of(n, p) if "q" in kinds else n), (kept_of(neurons, p) if "up" in kinds else neurons)


def mean_ups(model, ids) -> list[torch.Tensor]:
    """E|up_j| by layer, of the dense model."""
    return [y.abs().mean(0) for name, y in recorded(model, ids)[1].items() if kind_of(name) == "up"]


def by_hand(name: str, channels: int, neurons: int, weights, thresholds=None, sparse=lambda position: True) -> dict:
    """The two functions of the reference. thresholds: by name of the linear."""

    def linear(place, W, x, position):
        if kind_of(place) not in "qo" or name == "cats":
            return W @ x
        return masked(channels, 0, threshold=thresholds and thresholds[place], sparse=sparse)(place, W, x, position)

    lines = thresholds and [t for place, t in thresholds.items() if kind_of(place) == "up"]
    return dict(linear=linear, activation=switched(neurons, lines, weights, sparse))


@pytest.mark.parametrize("tokens", ["all", 0.5])
@every_setting
def test_per_token(build, ids, logits, name, scope, tokens):
    model, row = build(), ids[0, :12]
    weights, ups = weights_of(model), mean_ups(model, ids) if name == "chess" else None
    asked = "0.06" if scope == "attention" else "0.3"
    kept, neurons = planned(weights, name, scope, asked)
    rsparse.sparsify(
        model, name, float(asked), threshold="per-token", tokens=tokens, scope=scope,
        calibration=ids if name == "chess" else None,
    )  # fmt: skip
    first = first_sparse(tokens, 12)
    functions = by_hand(name, kept, neurons, ups, sparse=lambda position: position >= first)
    expected = llama_logits(model.config, weights, row.tolist(), **functions)
    torch.testing.assert_close(logits(model, row[None])[0], expected, rtol=0, atol=1e-9)


@every_setting
def test_static(build, ids, logits, name, scope):
    model, row = build(), ids[0, :12]
    weights, ups = weights_of(model), mean_ups(model, ids) if name == "chess" else None
    asked = 0.06 if scope == "attention" else 0.3
    report = rsparse.sparsify(model, name, asked, scope=scope, calibration=ids)
    functions = by_hand(name, 0, 0, ups, {x.name: x.threshold for x in report.linears})
    expected = llama_logits(model.config, weights, row.tolist(), **functions)
    torch.testing.assert_close(logits(model, row[None])[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("threshold", ["static-dense", "static-sequential"])
@every_setting
def test_thresholds_are_quantiles(build, ids, name, scope, threshold):
    """Of what the masks score on the dense model, or on the one that is sparse up to there, which a later mask does
    not change any more."""
    model = build()
    weights, ups = weights_of(model), mean_ups(model, ids)
    kept, neurons = planned(weights, name, scope, "0.06" if scope == "attention" else "0.3")
    dense = recorded(model, ids)
    report = rsparse.sparsify(
        model, name, 0.06 if scope == "attention" else 0.3, scope=scope, threshold=threshold, calibration=ids
    )
    inputs, outputs = dense if threshold == "static-dense" else recorded(model, ids)
    for x in report.linears:
        if x.read == 1:
            continue
        if x.kind in MLP:
            score = silu(0, outputs[x.name.replace(x.kind, "gate")], 0).abs()
            score, share = score * (ups[x.layer] if name == "chess" else 1), Fraction(neurons, x.channels)
        else:
            score, share = inputs[x.name].abs(), Fraction(kept, x.n)
        low, high = (score.flatten().quantile(float(1 - share), interpolation=i) for i in ("lower", "higher"))
        assert float(low) * (1 - 2**-9) <= x.threshold <= float(high) * (1 + 2**-9), x.name


@every_setting
def test_counted_by_hand(build, ids, name, scope):
    """Realised sparsity and its spread, from masks made of what was recorded on the sparse model."""
    model = build()
    ups = mean_ups(model, ids)
    report = rsparse.sparsify(
        model, name, 0.06 if scope == "attention" else 0.3, scope=scope, tokens=-10, calibration=ids
    )
    found = rsparse.measure(model, ids)
    with rsparse.apply.tokens_as(model, "all"):
        inputs, outputs = recorded(model, ids)
    saved = 0.0
    for x in found.linears:
        if x.kind not in SCOPES[name][scope]:
            assert (x.realised, x.spread, x.follows) == (0, 0, "")
            continue
        if x.kind in MLP:
            score = silu(0, outputs[x.name.replace(x.kind, "gate")], 0).abs()
            score = score * (ups[x.layer] if name == "chess" else 1)
        else:
            score = inputs[x.name].abs()
        off = (score <= x.threshold).double().mean(1)
        assert x.realised == pytest.approx(float(off.mean()))
        assert x.spread == pytest.approx(float(off.std(correction=0)))
        saved += x.m * x.n * float(off.mean())
    assert found.realised == pytest.approx(saved / sum(x.m * x.n for x in found.linears))
    assert found.linears == report.linears  # sparsify measured the same ids


@pytest.mark.parametrize("name", SCOPES)
def test_what_the_report_says_of_followers(build, ids, name):
    report = rsparse.sparsify(build(), name, 0.3, calibration=ids)
    for x in report.linears:
        follows = f"model.layers.{x.layer}.mlp.act_fn" if x.kind in MLP else ""
        assert (x.follows, x.channels) == (follows, 176 if follows else x.n)
        assert x.read == x.kept / x.channels and x.rank == x.overhead == 0
    pairs = [[x for x in report.linears if x.kind in MLP and x.layer == layer] for layer in range(2)]
    assert all(up.threshold == down.threshold and up.realised == down.realised for up, down in pairs)
    assert math.isnan(report.nominal) and "realised" in str(report)


def shares_off(model, ids) -> list[float]:
    """Share of neurons that ReLU makes zero, by layer, of the model as it is."""
    outputs = recorded(model, ids)[1]
    return [float((y <= 0).double().mean()) for name, y in outputs.items() if kind_of(name) == "gate"]


class TestRelufication:
    @pytest.mark.parametrize("tokens", ["all", 0.5, -3])
    @pytest.mark.parametrize("scope", [None, "all"])
    def test_logits(self, build, ids, logits, tokens, scope):
        model, row = build(), ids[0, :12]
        weights, first = weights_of(model), first_sparse(tokens, 12)
        rsparse.sparsify(model, "relufication", tokens=tokens, scope=scope)
        expected = llama_logits(model.config, weights, row.tolist(), activation=relu(lambda p: p >= first))
        torch.testing.assert_close(logits(model, row[None])[0], expected, rtol=0, atol=1e-9)

    def test_it_reports_what_it_has(self, build, ids):
        model = build()
        bare = rsparse.sparsify(model, "relufication", 0.5)
        report = rsparse.sparsify(model, "relufication", 0.5, calibration=ids)
        off = shares_off(model, ids)
        for found in (bare, report):
            assert math.isnan(found.asked) and math.isnan(found.planned) and found.threshold == ""
        assert math.isnan(bare.realised) and "nan" not in f"{bare} {report}"
        for x in report.linears:
            assert x.realised == pytest.approx(off[x.layer] if x.kind in MLP else 0.0)
            assert math.isnan(x.read) == (x.kind in MLP)
        up, down, block = 176 * 64, 64 * 176, sum(x.m * x.n for x in report.linears[:7])
        assert report.realised == pytest.approx(sum(off) / 2 * (up + down) / block)
        assert f"realised {report.realised:.4f}" in str(report) and 0.1 < report.realised < 0.4
        assert rsparse.measure(model, ids).linears == report.linears

    def test_it_has_no_knob(self, build, ids, logits):
        model = build()
        found = []
        for asked in (dict(sparsity=0.0), dict(sparsity=0.9, threshold="per-token", rho=0.1)):
            rsparse.sparsify(model, "relufication", **asked)
            found.append(logits(model, ids))
        assert found[0].equal(found[1])


def make(kept=20, threshold=None, norms=False, function=None, tokens="all"):
    """A SparseActivation of 48 neurons whose protocol stands at a forward pass of 2 x 10 positions."""
    protocol = TokenProtocol(tokens)
    protocol.begin(input_ids=torch.zeros(2, 10, dtype=torch.long))
    weights = torch.rand(48, generator=torch.Generator().manual_seed(2)) + 0.1 if norms else None
    return SparseActivation(nn.SiLU(), Split(kept, 0, Fraction(0)), protocol, weights, threshold, function)


def outputs_of_gate():
    return torch.randn(2, 10, 48, generator=torch.Generator().manual_seed(1))


CONFIGURATIONS = {
    "per token": dict(),
    "static": dict(threshold=0.2),
    "weighted": dict(norms=True),
    "weighted, static": dict(norms=True, threshold=0.1),
    "nothing": dict(kept=0),
    "ReLU": dict(kept=48, threshold=0.0, function=nn.ReLU()),
}
every_configuration = pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)


@every_configuration
def test_dense_positions_have_the_models_own_activation(configuration):
    g = outputs_of_gate()
    found = make(**configuration, tokens=0.5)(g)
    assert found[:, :5].equal(nn.SiLU()(g)[:, :5])
    assert found[:, 5:].equal(make(**configuration)(g)[:, 5:])
    assert not found[:, 5:].equal(nn.SiLU()(g)[:, 5:])
    assert make(**configuration, tokens="decode")(g).equal(nn.SiLU()(g))


@every_configuration
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", ["all", 0.5])
def test_what_is_not_finite_surfaces(configuration, bad, tokens):
    """Except that ReLU makes zero of -inf."""
    activation = make(**configuration, tokens=tokens)
    for position in (2, 7):
        g = outputs_of_gate()
        g[1, position, 5] = bad
        lost = ~torch.isfinite(activation(g))
        swallowed = bad == -math.inf and activation.function is not activation.dense
        expected = not swallowed or (tokens == 0.5 and position == 2)
        assert bool(lost[1, position, 5]) == expected and lost.sum() == expected


@every_configuration
def test_the_tally_counts_neurons_of_sparse_positions(configuration):
    activation, g = make(**configuration, tokens=0.5), outputs_of_gate()
    activation.tally = KeptTally()
    kept = (activation(g)[:, 5:] != 0).sum(-1).double().flatten()
    assert activation.tally.tokens == 10 and activation.tally.mean == pytest.approx(float(kept.mean()))
    assert activation.tally.spread == pytest.approx(float(kept.std(correction=0)))


def test_the_score_is_weighted():
    """Of two neurons with one activation the one that contributes more is kept."""
    g = torch.ones(2, 10, 48)
    g[..., 40:] = 2.0
    weights = torch.full((48,), 0.1)
    weights[:4] = 10.0
    activation = make(kept=6)
    activation.norms = weights
    kept = activation(g)[0, 0].nonzero().flatten().tolist()
    assert kept == [0, 1, 2, 3, 40, 41]


def test_nothing_else_of_the_model_changes(build, ids):
    model = build()
    before = {x.name: x.module for x in decoder_linears(model)}
    rsparse.sparsify(model, "cats", 0.3, calibration=ids)
    assert all(x.hung is before[x.name] for x in decoder_linears(model))
    assert isinstance(model.model.layers[1].mlp.act_fn, SparseActivation)


def test_mean_outputs_take_one_pass_for_all_that_are_new(build, ids):
    model, passes = build(), []
    means = {name: y.abs().mean(0) for name, y in recorded(model, ids)[1].items()}
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    calibration, linears = Calibration(model, ids), decoder_linears(model)
    for some, expected in ((linears[5::7], 4), (linears[5::7], 4), (linears, 8)):
        found = calibration.mean_outputs(some)
        assert set(found) == {x.name for x in some} and len(passes) == expected
        for name, mean in found.items():
            torch.testing.assert_close(mean, means[name])
    assert not any(m._forward_hooks for m in model.modules())
    rsparse.sparsify(model, "teal", 0.5, threshold="per-token")
    with pytest.raises(ValueError, match="the model is sparse"):
        calibration.mean_outputs(linears)
