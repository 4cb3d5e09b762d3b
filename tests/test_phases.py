"""Multi-phase ReLU against sorted values in float64: threshold, edges, levels, and what a linear puts out."""

import numpy as np
import pytest
import torch

from reference import recorded
from rsparse.apply import masks_of, protocol_of
from rsparse.calibrate import ROUNDS, Calibration, run_decoder
from rsparse.evaluate import token_losses
from rsparse.models import decoder_linears
from rsparse.phases import SIDES, PhaseLinear, ValueStatistics, collect, multi_phase
from rsparse.protocol import TokenProtocol

BIN = 2.0**-9  # relative width of a bin


def by_hand(x: np.ndarray, share: float, phases: int, side: str) -> tuple[float, list[np.ndarray]]:
    """T_0, and the dropped values sorted into phases of equal number."""
    size = x if side == "signed" else np.abs(x)
    order = np.argsort(size, kind="stable")[: round(share * len(x))]
    return float(size[order[-1]]), np.array_split(np.sort(x[order]), phases)


@pytest.fixture
def values() -> torch.Tensor:
    """(60, 50) skewed values around zero, of no simple distribution."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(60, 50, generator=generator) ** 3 + 0.3 * torch.randn(60, 50, generator=generator)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("phases", [1, 2, 3, 5])
def test_levels_are_means_of_equal_shares(values, side, phases):
    statistics = ValueStatistics()
    for part in values.split(17):
        statistics.add(part)
    found = statistics.levels(0.8, phases, side)
    threshold, parts = by_hand(values.double().flatten().numpy(), 0.8, phases, side)
    assert found.threshold == pytest.approx(threshold, rel=2 * BIN)
    assert found.values.tolist() == pytest.approx([p.mean() for p in parts], rel=4 * BIN, abs=1e-3)
    edges = [(a[-1] + b[0]) / 2 for a, b in zip(parts, parts[1:], strict=False)]
    assert found.edges.tolist() == pytest.approx(edges, rel=4 * BIN, abs=2e-2)


@pytest.mark.parametrize("side", SIDES)
def test_parts_sum_to_what_is_put_in_place(values, side):
    statistics = ValueStatistics()
    statistics.add(values)
    found = statistics.levels(0.7, 3, side)
    parts, stays = found.parts(values), found.stays(values)
    assert parts.shape == (60, 3, 50)
    assert ((parts != 0).sum(1) == ~stays).all(), "a dropped value is in one phase, a kept one in none"
    torch.testing.assert_close(parts.sum(1)[~stays], found.level(values)[~stays])
    size = values if side == "signed" else values.abs()
    assert size[stays].min() > size[~stays].max() and float(stays.float().mean()) == pytest.approx(0.3, abs=0.01)


def test_more_phases_come_nearer_and_one_is_the_mean(values):
    statistics = ValueStatistics()
    statistics.add(values)
    errors = []
    for phases in (1, 2, 4, 8, 64):
        found = statistics.levels(0.9, phases, "magnitude")
        dropped = values[~found.stays(values)]
        errors.append(float((dropped - found.level(dropped)).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]
    one = statistics.levels(0.9, 1, "magnitude")
    mean = float(values[~one.stays(values)].mean())
    assert float(one.values) == pytest.approx(mean, abs=3e-3)  # a few lie in the bin of the threshold


@pytest.mark.parametrize("bad", [(0, 2, "signed"), (1.0, 2, "signed"), (0.5, 0, "signed"), (0.5, 2, "upper")])
def test_what_is_not_allowed_is_named(values, bad):
    statistics = ValueStatistics()
    statistics.add(values)
    with pytest.raises(ValueError, match="expected a share"):
        statistics.levels(*bad)
    with pytest.raises(ValueError, match="finite"):
        statistics.add(torch.tensor([float("nan")]))


@pytest.mark.parametrize("side", SIDES)
def test_a_linear_adds_one_bias_per_phase(values, side):
    """W sigma(x) is W s(x) and, for each phase, its level times the sum of the columns in it."""
    statistics = ValueStatistics()
    statistics.add(values)
    x = values.double()[None]
    layer = torch.nn.Linear(50, 20, bias=False, dtype=torch.float64)
    module = PhaseLinear(layer, 0.7, TokenProtocol("all"))
    module.levels = statistics.levels(0.7, 3, side)
    W, y = layer.weight.detach(), torch.empty(60, 20, dtype=torch.float64)
    edges, levels = module.levels.edges.double().tolist(), module.levels.values.double().tolist()
    for t in range(60):
        size = x[0, t] if side == "signed" else x[0, t].abs()
        y[t] = W @ (x[0, t] * (size > module.levels.threshold))
        for j in range(50):
            if size[j] <= module.levels.threshold:
                y[t] += levels[sum(float(x[0, t, j]) > e for e in edges)] * W[:, j]
    torch.testing.assert_close(module(x)[0].detach(), y)


def test_histograms_are_of_the_inputs(build, ids):
    model = build()
    linears, inputs = decoder_linears(model), recorded(model, ids)[0]
    found = collect(model, ids, linears)
    assert len(found) == 8
    for x in linears:
        seen = inputs[x.name].flatten()
        levels = found[x.layer, x.site].levels(0.6, 2, "magnitude")
        assert levels.threshold == pytest.approx(float(seen.abs().quantile(0.6)), rel=4 * BIN)


def test_on_a_model_and_off_again(build, ids, logits):
    model = build()
    before = logits(model, ids)
    calibration = Calibration(model, ids)
    dense = collect(model, ids, decoder_linears(model))
    with multi_phase(calibration, 0.75, 2, "magnitude", dense) as tallies:
        token_losses(model, ids)
        stays = [tally.mean / x.channels for x, tally in zip(decoder_linears(model), tallies.values(), strict=False)]
        assert np.mean(stays) == pytest.approx(0.25, abs=0.02)
        assert protocol_of(model).tokens == "all"
        changed = logits(model, ids)
    assert (changed - before).abs().max() > 1e-2
    assert torch.equal(logits(model, ids), before), "dense again, bit for bit"


@pytest.mark.parametrize("side", SIDES)
def test_levels_are_read_again_on_the_model_that_has_them(build, ids, side):
    """As often as static thresholds are; here by hooks that put them in the inputs of a dense model's linears."""
    model = build()
    linears = decoder_linears(model)
    dense = collect(model, ids, linears)
    with multi_phase(Calibration(model, ids), 0.75, 2, side, dense):
        found = {name: module.levels for name, (_, module) in masks_of(model).items()}
    passes = [{x.name: dense[x.layer, x.site].levels(0.75, 2, side) for x in linears}]
    for _ in range(ROUNDS):
        seen = {x.name: ValueStatistics() for x in linears}

        def replaced(name: str, x: torch.Tensor, levels=passes[-1], seen=seen) -> torch.Tensor:
            seen[name].add(x)
            return torch.where(levels[name].stays(x), x, levels[name].level(x))

        handles = [x.module.register_forward_pre_hook(lambda _, a, n=x.name: (replaced(n, a[0]),)) for x in linears]
        run_decoder(model, ids)
        for handle in handles:
            handle.remove()
        passes.append({name: statistics.levels(0.75, 2, side) for name, statistics in seen.items()})
    for x in linears:
        wanted = passes[-1][x.name]
        assert found[x.name].threshold == pytest.approx(wanted.threshold, rel=BIN)
        torch.testing.assert_close(found[x.name].values, wanted.values)
        torch.testing.assert_close(found[x.name].edges, wanted.edges)
    last = linears[-1].name
    assert len({float(levels[last].values[0]) for levels in passes}) == ROUNDS + 1, "every pass has levels of its own"


def test_many_phases_are_the_dense_model(build, ids, logits):
    model = build()
    before = logits(model, ids)
    dense = collect(model, ids, decoder_linears(model))
    with multi_phase(Calibration(model, ids), 0.9, 64, "magnitude", dense):
        near = logits(model, ids)
    with multi_phase(Calibration(model, ids), 0.9, 1, "magnitude", dense):
        far = logits(model, ids)
    assert (near - before).norm() < 0.05 * (far - before).norm()
