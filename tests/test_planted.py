"""The planted control: what is planted is found, what is not is not, and noise is what limits it."""

from __future__ import annotations

import math

import pytest
import torch

from rsparse.exhibits import planted_control
from rsparse.planted import best_rho, errors, null, plant
from rsparse.results import Table

SHAPES = [(96, 64), (64, 96), (32, 96)]
GRID = planted_control.grid(0.1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(one row per linear, the table's rows, its folder), 20 linears a level."""
    folder = tmp_path_factory.mktemp("planted")
    table = Table("planted-control", "made-up", folder)
    found = planted_control.measure(table, SHAPES, 0.5, (0.02, 2.0), 0.1, 20, seed=0)
    return found, table.finish(0, {}), folder


def share(rows, metric: str) -> float:
    return rows.loc[rows["metric"] == metric, "value"].item()


def test_a_planted_rho_is_found_and_none_where_nothing_is(measured):
    found, rows, _ = measured
    assert share(rows, "recovered_share") >= 0.9
    assert share(rows, "false_share") == 0
    bounds = rows.set_index("metric")[["low", "high"]]
    assert bounds.loc["false_share", "high"] == pytest.approx(1 - 0.025 ** (1 / 20)), "none of 20 is not none"
    assert share(rows, "recovered_share_noise_2") < share(rows, "recovered_share")
    quiet = found[found["noise"] == 0.02]
    assert quiet["planted"].nunique() >= 5, "the planted values hardly differ"
    assert share(rows, "recovered_share") == (abs(quiet["found"] - quiet["planted"]) < 0.1 + 1e-9).mean()
    assert (found.loc[found["planted"].isna(), "found"] == 1).all()


def test_a_rerun_reads_and_other_noises_are_other_groups(measured, monkeypatch):
    found, rows, folder = measured
    with monkeypatch.context() as patch:
        patch.setattr(planted_control, "_one", lambda *_: pytest.fail("computed again"))
        table = Table("planted-control", "made-up", folder)
        again = planted_control.measure(table, SHAPES, 0.5, (0.02, 2.0), 0.1, 20, seed=0)
        assert again["found"].tolist() == found["found"].tolist()
        assert table.frame["value"].tolist() == rows["value"].tolist()
    table = Table("planted-control", "made-up", folder)
    planted_control.measure(table, SHAPES, 0.5, (2.0,), 0.1, 20, seed=0)
    assert set(table.frame["metric"]) == {"recovered_share", "false_share"}, "2.0 is the quietest now"


@pytest.mark.parametrize("rho", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_at_the_planted_rho_is_the_noise_and_larger_elsewhere(shape, rho):
    linear = plant(*shape, 0.5, rho, seed=1, noise=0.0)
    found = errors(linear, 0.5, GRID)
    best = GRID.index(rho)
    assert found[best] < 1e-5
    assert min(found[:best] + found[best + 1 :]) > 0.02
    noisy = errors(plant(*shape, 0.5, rho, seed=1, noise=0.02), 0.5, [rho])[0]
    assert 0.1 * 0.02 < noisy < 3 * 0.02


def test_more_noise_more_error():
    found = [errors(plant(96, 64, 0.5, 0.5, 2, noise), 0.5, [0.5])[0] for noise in (0.0, 0.02, 0.1, 0.3, 0.6)]
    assert found == sorted(found) and found[-1] > 10 * found[1]


def test_what_is_planted_depends_on_the_seed_only():
    first, same, other = (plant(32, 48, 0.5, 0.5, seed) for seed in (3, 3, 4))
    assert torch.equal(first.weight, same.weight) and torch.equal(first.test, same.test)
    assert not torch.equal(first.weight, other.weight)
    assert not torch.equal(first.calibration, first.test)
    assert null(32, 48, 3).best_rho is None and best_rho(null(32, 48, 3), 0.5, GRID) == 1.0


@pytest.mark.parametrize("rho", [0.0, 1.0, 0.99])
def test_where_nothing_can_be_planted_it_is_refused(rho):
    with pytest.raises(ValueError, match=f"rho {rho} at sparsity 0.5 buys"):
        plant(64, 64, 0.5, rho, seed=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 0}, "count is 0"),
        ({"noises": ()}, "0 noises"),
        ({"step": 0.3}, "step is 0.3"),
        ({"step": 0}, "step"),
        ({"shapes": [*SHAPES, (8, 8)]}, r"of a linear of shape \(8, 8\)"),
    ],
)
def test_a_request_without_sense_is_refused(tmp_path, change, said):
    request = dict(shapes=SHAPES, sparsity=0.5, noises=(0.1,), step=0.1, count=1, seed=0) | change
    with pytest.raises(ValueError, match=said):
        planted_control.measure(Table("planted-control", "made-up", tmp_path), **request)


def test_found_is_within_one_step():
    assert planted_control.within([0.1, 0.3, 0.5, 1.0], [0.2, 0.3, 0.8, 1.0], 0.1) == [True, True, False, True]
    assert planted_control.grid(0.25) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert math.isclose(sum(GRID), 5.5) and GRID[3] == 0.3
