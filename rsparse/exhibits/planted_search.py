"""Would the search find a rho that matters? Planted linears, searched in groups of several sizes.

The linears, and their errors at every rho of the grid, are those of rsparse.planted. A candidate's fitness is the mean
error of its group, so what one linear gains can hide behind another's loss, as in a model. Every group has the same
number of evaluations, whatever its size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from rsparse import intervals, planted
from rsparse.candidates import Candidate, Space
from rsparse.evolution import Coordinate, Evolution, RandomSearch, Searcher, searched_as
from rsparse.exhibits.planted_control import grid, within
from rsparse.results import Table


def measure(
    table: Table, shapes: Sequence[tuple[int, int]], sparsity: float, step: float, count: int, sizes: Sequence[int],
    evolution: Evolution, seed: int,
) -> None:  # fmt: skip
    """Rows per searcher and group size: the share of `count` planted linears whose best rho is found within one grid
    step, and the share of as many null linears that are given another rho than 1.

    shapes (m, n) are taken in turn. ValueError for sizes or a count below 1.
    """
    if count < 1 or not sizes or min(sizes) < 1:
        raise ValueError(f"count is {count}, sizes are {sizes!r}; expected at least 1 each")
    rhos = grid(step)
    key = {"what": "planted search", "shapes": shapes, "sparsity": sparsity, "step": step, "count": count,
           "sizes": list(sizes), "evolution": searched_as(evolution), "seed": seed}  # fmt: skip
    if table.find(key) is not None:
        return
    wanted, errors = _linears(shapes, sparsity, rhos, count, seed, True)
    _, nothing = _linears(shapes, sparsity, rhos, count, seed, False)
    searchers = {"evolution": evolution, "random": RandomSearch(evolution), "coordinate": Coordinate()}
    rows = []
    for name, searcher in searchers.items():
        for size in sizes:
            base = {"model": "planted", "method": "r-sparse", "sparsity": sparsity, "task": "planted-search",
                    "seed": seed, "searcher": name, "group_size": size}  # fmt: skip
            hits = within(recover(errors, rhos, size, searcher, seed), wanted, step)
            false = [rho != 1 for rho in recover(nothing, rhos, size, searcher, seed)]
            for metric, found in (("recovered_share", hits), ("false_share", false)):
                rows.append(base | {"metric": metric} | intervals.share(sum(found), len(found)).row())
    table.add(key, rows)


def recover(errors: np.ndarray, rhos: Sequence[float], size: int, searcher: Searcher, seed: int) -> list[float]:
    """The rho that a searcher gives each linear, `size` of them at a time.

    errors: (linears, rhos), of each linear at each rho. The search begins with the best uniform rho.
    """
    total = errors.sum(0)
    start = max(i for i in range(len(rhos)) if total[i] == total.min())
    found: list[float] = []
    for first in range(0, len(errors), size):
        group = errors[first : first + size]

        def evaluate(candidates: Sequence[Candidate], group: np.ndarray = group) -> list[float]:
            return [float(np.mean([x[rho] for x, (rho, _) in zip(group, c, strict=True)])) for c in candidates]

        space, begin = Space(tuple(rhos), ((0, 0),) * len(group)), ((start, 0),) * len(group)
        best = searcher.run(space, begin, evaluate, random.Random(f"{seed} {first}"))
        found += [rhos[rho] for rho, _ in best]
    return found


def _linears(
    shapes: Sequence[tuple[int, int]], sparsity: float, rhos: Sequence[float], count: int, seed: int, plant: bool
) -> tuple[list[float], np.ndarray]:
    """The planted rho of every linear (1 where nothing is), and its error at every rho."""
    wanted, errors = [], []
    for i in tqdm(range(count), desc="planted" if plant else "null", leave=False):
        shape, own = shapes[i % len(shapes)], 1_000_003 * seed + i
        rho = random.Random(own).choice(rhos[1:-1])
        linear = planted.plant(*shape, sparsity, rho, own) if plant else planted.null(*shape, own)
        wanted.append(rho if plant else 1.0)
        errors.append(planted.errors(linear, sparsity, rhos))
    return wanted, np.array(errors)
