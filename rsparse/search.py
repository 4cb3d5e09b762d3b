"""Search for a recipe of a model, group by group of blocks in their order, earlier groups frozen as found.

R-Sparse (arXiv 2504.19449, section 3.5, Algorithm 1; see rsparse.evolution for what it says and what it does not): one
rho per linear, the lowest perplexity on calibration text, groups because a candidate should change few linears. `moves`
goes past the paper, which keeps one sparsity everywhere: bytes move between the linears of a group, and the model reads
as much as before.

The budget `evaluations` of a searcher is per group.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rsparse import greedy
from rsparse.accounting import check_sparsity
from rsparse.calibrate import Calibration
from rsparse.candidates import Candidate, Space
from rsparse.decompose import FactorStore, default_store
from rsparse.evolution import Evolution, Searcher, searched_as
from rsparse.journal import Journal
from rsparse.models import DecoderLinear, decoder_linears, fingerprint
from rsparse.provenance import measuring_hash
from rsparse.recipe import Ask, Recipe
from rsparse.trials import BATCH_TOKENS, Trials

BYTES_STEP = 0.025
"""Share of a block's bytes that a step of budget moves."""
MOST_SPARSE = 0.95
"""No linear is asked for more when budgets move."""


@dataclass(frozen=True)
class Plan:
    """What to search: the arguments of `search` that decide its result.

    sparsity: model-level, of every linear unless `moves`. step: of the grid of rho, from 0 to 1. groups: consecutive
    blocks share a group. start: the uniform rho to begin with; None for the best one of the grid.

    ValueError for a value that is not allowed.
    """

    sparsity: float
    searcher: Searcher = field(default_factory=Evolution)
    seed: int = 0
    groups: int = 8
    step: float = 0.05
    start: float | None = None
    score: str = "magnitude"
    moves: bool = False

    def __post_init__(self) -> None:
        if check_sparsity(self.sparsity) == 0:
            raise ValueError("sparsity is 0; expected more: a dense model has nothing to search")
        if type(self.groups) is not int or self.groups < 1:
            raise ValueError(f"groups is {self.groups!r}; expected a whole number of at least 1")
        if not 0 < self.step <= 1 or abs(1 / self.step - round(1 / self.step)) > 1e-6:
            raise ValueError(f"step is {self.step!r}; expected 1 over a whole number")
        Ask(self.sparsity, 1.0 if self.start is None else self.start, self.score)
        if self.start is not None and self.start not in self.rhos:
            raise ValueError(f"start is {self.start!r}; expected a rho of the grid in steps of {self.step:g}")

    @property
    def rhos(self) -> tuple[float, ...]:
        """The grid, ascending."""
        return tuple(round(i * self.step, 10) for i in range(round(1 / self.step) + 1))

    def ask(self, rho: float, sparsity: float | None = None) -> Ask:
        return Ask(self.sparsity if sparsity is None else sparsity, rho, self.score)

    @property
    def about(self) -> dict[str, Any]:
        """The plan as a recipe's origin tells it."""
        names = ("sparsity", "seed", "groups", "step", "start", "score", "moves")
        return searched_as(self.searcher) | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Found:
    """A recipe, and how the search went: one entry per candidate in the order of evaluation, {"group": index,
    "cost": share of a full pass, "loss": nats per token}. The uniform grid is group -1."""

    recipe: Recipe
    trace: list[dict[str, Any]]


def uniform(
    calibration: Calibration, plan: Plan, store: FactorStore | None = None, journal: Path | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Found:  # fmt: skip
    """The best uniform rho of the grid, every one with thresholds read on its own sparse model."""
    run = Run(calibration, plan, store, journal, batch_tokens, {"searcher": "uniform"})
    with run.trials:
        rho = run.best_uniform()
    return run.found(f"uniform-{rho:g}", {"searcher": "uniform"})


def search(
    calibration: Calibration, plan: Plan, store: FactorStore | None = None, journal: Path | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Found:  # fmt: skip
    """The recipe that `plan` finds, by losses on the calibration tokens.

    journal: where evaluations are kept, to resume from; nothing is kept without it. A search that was interrupted at
    any moment ends with the same recipe, on the same machine. store, batch_tokens: as for `Trials`. ValueError for a
    plan that the model is too shallow for, a sparse model, and another search's journal.
    """
    run = Run(calibration, plan, store, journal, batch_tokens)
    with run.trials:
        if plan.start is None:
            run.best_uniform()
        for index, group in enumerate(run.groups):
            run.search_group(index, group)
        run.finish()
    kind = type(plan.searcher).__name__.lower() + ("-moving" if plan.moves else "")
    return run.found(f"{kind}-{plan.sparsity:g}-seed{plan.seed}", {})


def greedily(calibration: Calibration, sparsity: float) -> Recipe:
    """TEAL's greedy search as a recipe: one sparsity per linear, rho 1, see rsparse.greedy."""
    linears = decoder_linears(calibration.model)
    found = greedy.sparsities(calibration, linears, sparsity)
    asks = {name: Ask(value, 1.0) for name, value in found.items()}
    origin = {"searcher": "greedy", "sparsity": sparsity, "levels": greedy.LEVELS}
    return Recipe(f"greedy-{sparsity:g}", fingerprint(calibration.model), asks, origin)


class Run:
    """A search in progress."""

    def __init__(
        self, calibration: Calibration, plan: Plan, store: FactorStore | None = None, journal: Path | None = None,
        batch_tokens: int = BATCH_TOKENS, about: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self.plan, self.linears = plan, decoder_linears(calibration.model)
        self.groups = _groups(self.linears, plan.groups)
        self.sizes = {x.name: x.shape[0] * x.shape[1] * x.weight_bytes for x in self.linears}
        rho = plan.rhos[-1] if plan.start is None else plan.start
        asks = {x.name: plan.ask(rho) for x in self.linears}
        self.trials = Trials(calibration, asks, store or default_store(), plan.score, batch_tokens)
        self.calibration, self.start = calibration, plan.rhos.index(rho)
        self.trace: list[dict[str, Any]] = []
        self.best = math.inf
        model = calibration.model  # in another precision, on another device or by other code losses differ
        made = {"dtype": str(model.dtype), "device": model.device.type, "code": measuring_hash()}
        made |= {"batch": self.trials.abreast, "calibration": calibration.key}
        identity = plan.about | made | dict(about or {})
        self.journal: Journal | dict = Journal(journal, identity) if journal else {}
        self.bar = tqdm(desc="search", unit="candidate", leave=False)

    def best_uniform(self) -> float:
        """The rho of the grid with the lowest loss; of equal ones the largest, which spends least on rank."""
        for x in self.linears:  # the largest rank first: one decomposition serves the whole grid
            self.trials.store.get(x.module.weight.detach(), self._largest_rank(x, (0, 0)))
        losses = {}
        for rho in reversed(self.plan.rhos):
            asks = {x.name: self.plan.ask(rho) for x in self.linears}

            def measure(asks: dict[str, Ask] = asks) -> list[float]:
                self.trials.settle(asks)
                return self.trials.losses([asks])

            losses[rho] = self._kept([("uniform", f"{rho:g}")], measure)[0]
            self._note(-1, 2.0, losses[rho])  # one pass reads the thresholds
        best = min(losses, key=losses.__getitem__)
        self.trials.settle({x.name: self.plan.ask(best) for x in self.linears})
        self.start, self.best = self.plan.rhos.index(best), losses[best]
        return best

    def open_group(self, group: Sequence[DecoderLinear]) -> None:
        """Begin a group, with room for every candidate that it may have."""
        rooms = self._space(group).room
        ranks = {x.name: self._largest_rank(x, room) for x, room in zip(group, rooms, strict=True)}
        self.trials.open(group, ranks)

    def random_asks(self, group: Sequence[DecoderLinear], rng: random.Random) -> dict[str, Ask]:
        """What a random candidate of the group asks."""
        start = ((self.start, 0),) * len(group)
        return self._asks(group, self._space(group).draw(start, self.plan.searcher.mutation, rng))

    def search_group(self, index: int, group: Sequence[DecoderLinear]) -> None:
        """Let the searcher change the linears of one group, and ask the best candidate of the model."""
        space, start = self._space(group), ((self.start, 0),) * len(group)
        self.open_group(group)
        cost = 1 - self.trials.first / (1 + self.linears[-1].layer)
        seen: set[Candidate] = set()

        def evaluate(candidates: Sequence[Candidate]) -> list[float]:
            found: list[float] = []
            for i in range(0, len(candidates), self.trials.abreast):
                batch = candidates[i : i + self.trials.abreast]
                asks = [self._asks(group, candidate) for candidate in batch]
                keys = [(str(index), repr(candidate)) for candidate in batch]
                found += self._kept(keys, lambda asks=asks: self.trials.losses(asks))
                for candidate, loss in zip(batch, found[-len(batch) :], strict=True):
                    if candidate not in seen:  # coordinate search asks again for the best so far, which costs nothing
                        self._note(index, cost, loss)
                    seen.add(candidate)
            return found

        self.best = math.inf  # under thresholds read anew, losses of the last group do not compare
        best = self.plan.searcher.run(space, start, evaluate, random.Random(f"{self.plan.seed} {index}"))
        self.trials.put(self._asks(group, best))

    def finish(self) -> None:
        """The loss of what was found, thresholds read once more."""
        self.trials.read_thresholds()
        self.trials.put({x.name: self.trials.asks[x.name] for x in self.linears if x.layer >= self.trials.first})
        self.best = self.trials.losses([{}])[0]

    def found(self, name: str, about: Mapping[str, Any]) -> Found:
        """The recipe as the model stands."""
        self.bar.close()
        samples, length = self.calibration.ids.shape
        origin = self.plan.about | {
            "started from rho": self.plan.rhos[self.start], "evaluations": len(self.trace),
            "full passes": round(sum(x["cost"] for x in self.trace), 3), "perplexity": math.exp(self.best),
            "calibration": f"{samples}x{length} {self.calibration.key}",
        }  # fmt: skip
        recipe = Recipe(name, fingerprint(self.calibration.model), dict(self.trials.asks), origin | dict(about))
        return Found(recipe, self.trace)

    def _kept(self, keys: list[tuple[str, str]], measure: Callable[[], list[float]]) -> list[float]:
        """The losses under `keys`, from the journal, or else measured, all of them at once."""
        if not all(key in self.journal for key in keys):
            batch = dict(zip(keys, measure(), strict=True))
            self.journal.update(batch)
        return [self.journal[key] for key in keys]

    def _note(self, group: int, cost: float, loss: float) -> None:
        self.trace.append({"group": group, "cost": cost, "loss": loss})
        self.best = min(self.best, loss)
        self.bar.update()
        self.bar.set_postfix(group=group, best=f"{math.exp(self.best):.4f}", refresh=False)

    def _asks(self, group: Sequence[DecoderLinear], candidate: Candidate) -> dict[str, Ask]:
        return {
            x.name: self.plan.ask(self.plan.rhos[rho], self._sparsity(x, steps))
            for x, (rho, steps) in zip(group, candidate, strict=True)
        }

    def _sparsity(self, linear: DecoderLinear, steps: int) -> float:
        """Of a linear that leaves `steps` more unread than its share; rounded up, so that no byte too many is read."""
        if not steps:
            return self.plan.sparsity
        value = Fraction(str(self.plan.sparsity)) + steps * self._step(linear)
        return max(math.ceil(value * 10**12) / 10**12, 0.0)

    def _step(self, linear: DecoderLinear) -> Fraction:
        block = sum(self.sizes[x.name] for x in self.linears if x.layer == linear.layer)
        return Fraction(str(BYTES_STEP)) * block / self.sizes[linear.name]

    def _space(self, group: Sequence[DecoderLinear]) -> Space:
        room = [(0, 0)] * len(group)
        if self.plan.moves:
            asked, most = (Fraction(str(x)) for x in (self.plan.sparsity, MOST_SPARSE))
            room = [(-int(asked / self._step(x)), max(int((most - asked) / self._step(x)), 0)) for x in group]
        return Space(self.plan.rhos, tuple(room))

    def _largest_rank(self, linear: DecoderLinear, room: tuple[int, int]) -> int:
        """Over all steps, as a linear that may read everything has no rank."""
        asks = [self.plan.ask(self.plan.rhos[0], self._sparsity(linear, i)) for i in range(room[0], room[1] + 1)]
        return max(self.trials.split(linear, ask).rank for ask in asks)


def _groups(linears: Sequence[DecoderLinear], groups: int) -> list[list[DecoderLinear]]:
    """The linears of consecutive blocks, in `groups` parts as equal as they can be."""
    depth = 1 + linears[-1].layer
    if groups > depth:
        raise ValueError(f"groups is {groups} for a model of {depth} blocks; expected at most one per block")
    return [[x for x in linears if x.layer * groups // depth == index] for index in range(groups)]
