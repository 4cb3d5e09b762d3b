"""Algorithm 1 without a model: candidates stay allowed; what is planted is found, and nothing where nothing is."""

import random

import numpy as np
import pytest

from rsparse.candidates import Space
from rsparse.evolution import Coordinate, Evolution, RandomSearch
from rsparse.exhibits import planted_search
from rsparse.exhibits.planted_control import within
from rsparse.results import Table

RHOS = tuple(round(i * 0.05, 10) for i in range(21))
STAY, MOVE = ((0, 0),) * 6, ((-2, 3), (0, 0), (-5, 5), (-1, 1), (0, 4), (-3, 0))
SHAPES = [(128, 128), (64, 128), (352, 128), (128, 352)]


@pytest.mark.parametrize("room", [STAY, MOVE])
@pytest.mark.parametrize("form", ["steps", "difference"])
@pytest.mark.parametrize("initial", ["scattered", "uniform"])
def test_every_candidate_is_on_the_grid_and_moves_no_byte_in_or_out(room, form, initial):
    space, seen = Space(RHOS, room), []

    def fitness(candidate):
        return float(sum(abs(rho - 7) + abs(steps - 1) for rho, steps in candidate))

    def evaluate(candidates):
        seen.extend(candidates)
        return [fitness(c) for c in candidates]

    searcher = Evolution(population=12, generations=4, initial=initial, form=form)
    best = searcher.run(space, ((20, 0),) * 6, evaluate, random.Random(0))
    assert len(seen) == len(set(seen)) <= searcher.evaluations and seen[0] == ((20, 0),) * 6
    assert best == min(seen, key=fitness)
    for candidate in set(seen):
        assert sum(steps for _, steps in candidate) == 0
        for (rho, steps), (low, high) in zip(candidate, room, strict=True):
            assert 0 <= rho < len(RHOS) and low <= steps <= high
    moved = {steps for candidate in seen for _, steps in candidate}
    assert moved == {0} if room is STAY else len(moved) > 3


def test_the_same_seed_gives_the_same_and_another_one_another():
    def run(seed: int):
        seen = []
        evaluate = lambda candidates: seen.extend(candidates) or [sum(r for r, _ in c) % 7 + 0.5 for c in candidates]  # noqa: E731
        return Evolution(8, 3).run(Space(RHOS, STAY), ((20, 0),) * 6, evaluate, random.Random(seed)), seen

    assert run(1) == run(1) and run(1)[1] != run(2)[1]


@pytest.mark.parametrize("searcher", [Evolution(), RandomSearch(), Coordinate()], ids=lambda x: type(x).__name__)
def test_of_equal_candidates_the_group_keeps_what_it_had(searcher):
    start = ((20, 0), (3, 0))
    assert searcher.run(Space(RHOS, STAY[:2]), start, lambda c: [1.0] * len(c), random.Random(0)) == start


def test_random_search_may_look_as_often_as_evolution():
    seen = []
    evolution = Evolution(8, 5)
    evaluate = lambda candidates: seen.extend(candidates) or [0.0] * len(candidates)  # noqa: E731
    RandomSearch(evolution).run(Space(RHOS, STAY), ((20, 0),) * 6, evaluate, random.Random(0))
    assert 0.9 * evolution.evaluations <= len(seen) <= evolution.evaluations


@pytest.fixture(scope="module")
def linears():
    """Planted linears and null ones, with their errors at every rho of the grid."""
    wanted, errors = planted_search._linears(SHAPES, 0.5, RHOS, 40, 0, True)
    return wanted, errors, planted_search._linears(SHAPES, 0.5, RHOS, 40, 0, False)[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("searcher", "size"), [(Evolution(), 2), (Coordinate(), 40)])
def test_what_was_planted_is_found_and_nothing_where_nothing_was(linears, searcher, size, seed):
    wanted, errors, nothing = linears
    assert np.mean(within(planted_search.recover(errors, RHOS, size, searcher, seed), wanted, 0.05)) >= 0.9
    assert set(planted_search.recover(nothing, RHOS, size, searcher, seed)) == {1.0}


def test_the_papers_budget_does_not_resolve_twenty_eight_linears_at_once(linears):
    wanted, errors, _ = linears
    found = planted_search.recover(errors[:28], RHOS, 28, Evolution(), 0)
    assert np.mean(within(found, wanted[:28], 0.05)) < 0.7


def test_rows_and_refusals(tmp_path):
    table = Table("table-4", "test", tmp_path)
    planted_search.measure(table, SHAPES, 0.5, 0.25, 8, [2], Evolution(4, 2), 0)
    rows = table.finish(0, {})
    assert set(rows["searcher"]) == {"evolution", "random", "coordinate"} and set(rows["n"]) == {8}
    thorough = rows[(rows["searcher"] == "coordinate") & (rows["metric"] == "recovered_share")]
    assert thorough["value"].item() == 1
    with pytest.raises(ValueError, match=r"sizes are \[0\]"):
        planted_search.measure(table, SHAPES, 0.5, 0.25, 8, [0], Evolution(4, 2), 0)


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(population=3), "population is 3"), (dict(generations=0), "generations is 0"),
    (dict(mutation=1.5), "mutation is 1.5"), (dict(crossover=-0.1), "crossover is -0.1"),
    (dict(initial="random"), "initial is 'random'; expected one of scattered, uniform"),
    (dict(form="swap"), "form is 'swap'; expected one of steps, difference"),
])  # fmt: skip
def test_values_that_are_not_allowed(wrong, message):
    with pytest.raises(ValueError, match=message):
        Evolution(**wrong)
