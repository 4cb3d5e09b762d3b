"""R-Sparse's Algorithm 1 on one group of linears, and its controls, over any objective.

R-Sparse (arXiv 2504.19449, section 3.5 and Algorithm 1): one rho per linear, by an evolutionary search with a
population of 32, five generations, mutation and crossover probability 0.5, group by group, for the lowest perplexity on
16 calibration samples. The paper is silent about the rest; what we chose is a field of `Evolution`, by its name. The
authors have published neither the search nor its groups. A public reimplementation (aiha-choij/R-Sparse) takes groups
of 28 linears and the mutation that is called "difference" here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rsparse.candidates import Candidate, Gene, Space

Evaluate = Callable[[Sequence[Candidate]], list[float]]
"""Fitness of each candidate: the lower the better."""
INITIAL, FORMS = ("scattered", "uniform"), ("steps", "difference")


@dataclass(frozen=True)
class Evolution:
    """Algorithm 1 on one group of linears.

    population, generations: a group costs at most their product in evaluations; the initial population is the first
    generation. mutation, crossover: see `initial` and `form`.

    Where the paper is silent. initial: the first candidate is what the group had before; of the others, "scattered"
    draws each gene anew with probability `mutation`, "uniform" draws all. form: "steps" crosses two parents of the
    better half gene by gene (from the second with probability `crossover`), then moves one gene by up to `REACH` grid
    steps, another with probability `mutation`, and so on; "difference" is x1 + mutation (x2 - x3) of three random
    members, each gene of which enters with probability `crossover`. Selection: the best of parents and children.

    ValueError for a value that is not allowed.
    """

    population: int = 32
    generations: int = 5
    mutation: float = 0.5
    crossover: float = 0.5
    initial: str = "scattered"
    form: str = "steps"

    def __post_init__(self) -> None:
        for name, least in (("population", 4), ("generations", 1)):
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}")
        for name in ("mutation", "crossover"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is {value!r}; expected a probability in [0, 1]")
        for name, allowed in (("initial", INITIAL), ("form", FORMS)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")

    @property
    def evaluations(self) -> int:
        return self.population * self.generations

    def run(self, space: Space, start: Candidate, evaluate: Evaluate, rng: random.Random) -> Candidate:
        """The best candidate found; `start` where nothing is better."""
        best = self._select([], self._first(space, start, rng), evaluate)
        for _ in range(self.generations - 1):
            members = [candidate for _, candidate in best]
            children = [self._child(space, members, i, rng) for i in range(self.population)]
            best = self._select(best, children, evaluate)
        return best[0][1]

    def _first(self, space: Space, start: Candidate, rng: random.Random) -> list[Candidate]:
        share = 1.0 if self.initial == "uniform" else self.mutation
        return [start, *(space.draw(start, share, rng) for _ in range(self.population - 1))]

    def _child(self, space: Space, members: Sequence[Candidate], i: int, rng: random.Random) -> Candidate:
        if self.form == "difference":
            x, y, z = (members[j] for j in _three(len(members), rng))
            target, donor = members[i % len(members)], space.difference(x, y, z, self.mutation)
            surely = rng.randrange(len(target))
            return space.balanced(self._cross(target, donor, rng, surely), rng)
        better = members[: max(len(members) // 2, 1)]
        crossed = self._cross(rng.choice(better), rng.choice(better), rng)
        return space.stepped(crossed, self.mutation, rng)

    def _cross(self, a: Sequence[Gene], b: Sequence[Gene], rng: random.Random, surely: int = -1) -> list[Gene]:
        """Each gene of `a`, or with probability `crossover`, and surely at one place, that of `b`."""
        pairs = enumerate(zip(a, b, strict=True))
        return [y if rng.random() < self.crossover or i == surely else x for i, (x, y) in pairs]

    def _select(
        self, scored: list[tuple[float, Candidate]], new: Sequence[Candidate], evaluate: Evaluate
    ) -> list[tuple[float, Candidate]]:
        """The best of `scored` and `new`, best first; of equal ones the earlier."""
        known = {candidate for _, candidate in scored}
        fresh = [x for x in dict.fromkeys(new) if x not in known]
        return sorted(scored + list(zip(evaluate(fresh), fresh, strict=True)), key=lambda x: x[0])[: self.population]


@dataclass(frozen=True)
class RandomSearch:
    """The control: as many candidates as `Evolution` may evaluate, all drawn as its initial population is."""

    like: Evolution = field(default_factory=Evolution)

    def run(self, space: Space, start: Candidate, evaluate: Evaluate, rng: random.Random) -> Candidate:
        """The best candidate found; `start` where nothing is better."""
        share = 1.0 if self.like.initial == "uniform" else self.like.mutation
        drawn = [start, *(space.draw(start, share, rng) for _ in range(self.like.evaluations - 1))]
        drawn = list(dict.fromkeys(drawn))
        return min(zip(evaluate(drawn), drawn, strict=True), key=lambda x: x[0])[1]


@dataclass(frozen=True)
class Coordinate:
    """The thorough one: every linear of the group in turn takes the rho of the grid that is best, the others held."""

    def run(self, space: Space, start: Candidate, evaluate: Evaluate, rng: random.Random) -> Candidate:
        """The best candidate found; `start` where nothing is better. Budgets stay."""
        best = start
        for i in range(len(start)):
            tried = [(*best[:i], (rho, best[i][1]), *best[i + 1 :]) for rho in range(len(space.rhos))]
            tried.sort(key=lambda x: x != best)  # of equal ones what was there
            best = min(zip(evaluate(tried), tried, strict=True), key=lambda x: x[0])[1]
        return best


Searcher = Evolution | RandomSearch | Coordinate


def _three(members: int, rng: random.Random) -> list[int]:
    return rng.sample(range(members), 3) if members >= 3 else rng.choices(range(members), k=3)


def searched_as(searcher: Searcher) -> dict[str, Any]:
    """What a recipe says of the searcher that found it."""
    return {"searcher": type(searcher).__name__.lower()} | asdict(searcher)
