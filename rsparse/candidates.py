"""What a search can change: one gene per linear of a group, and how genes are drawn, moved and combined."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

Gene = tuple[int, int]
"""Of one linear: index into the grid of rho, and how many steps of bytes it leaves unread beyond the uniform budget."""
Candidate = tuple[Gene, ...]
REACH = 3
"""Most grid steps that the mutation "steps" moves a gene at once."""


@dataclass(frozen=True)
class Space:
    """What a candidate of one group can be.

    rhos: the grid, ascending. room: per linear, the least and the most steps of bytes; (0, 0) where budgets stay. The
    steps of a candidate add up to 0: what one linear reads less, others of its group read more.
    """

    rhos: tuple[float, ...]
    room: tuple[tuple[int, int], ...]

    def draw(self, start: Candidate, share: float, rng: random.Random) -> Candidate:
        """`start` with each gene drawn anew, uniformly, with probability `share`."""
        genes = [self._any(i, rng) if rng.random() < share else gene for i, gene in enumerate(start)]
        return self.balanced(genes, rng)

    def stepped(self, genes: Sequence[Gene], more: float, rng: random.Random) -> Candidate:
        """One gene moved by at most `REACH` steps; another one with probability `more`, and so on."""
        genes = list(genes)
        while True:
            i = rng.randrange(len(genes))
            rho, steps = genes[i]
            if self.moves and rng.random() < 0.5:
                genes[i] = rho, self._steps(i, steps + _jump(rng))
            else:
                genes[i] = self._rho(rho + _jump(rng)), steps
            if rng.random() >= more:
                return self.balanced(genes, rng)

    def difference(self, x: Candidate, y: Candidate, z: Candidate, scale: float) -> list[Gene]:
        """x + scale (y - z), gene by gene, on the grid; its steps need not add up to 0."""
        return [
            (self._rho(round(a[0] + scale * (b[0] - c[0]))), self._steps(i, round(a[1] + scale * (b[1] - c[1]))))
            for i, (a, b, c) in enumerate(zip(x, y, z, strict=True))
        ]

    def balanced(self, genes: Sequence[Gene], rng: random.Random) -> Candidate:
        """The steps of `genes` made to add up to 0, by one step at a time on linears that have room."""
        genes, excess = list(genes), sum(steps for _, steps in genes)
        while excess:
            one = -1 if excess > 0 else 1
            open_ = [i for i, (_, steps) in enumerate(genes) if self._steps(i, steps + one) != steps]
            i = rng.choice(open_)
            genes[i] = genes[i][0], genes[i][1] + one
            excess += one
        return tuple(genes)

    @property
    def moves(self) -> bool:
        """Whether bytes can move between the linears."""
        return any(low < high for low, high in self.room)

    def _any(self, i: int, rng: random.Random) -> Gene:
        low, high = self.room[i]
        return rng.randrange(len(self.rhos)), rng.randint(low, high) if low < high else 0

    def _rho(self, index: int) -> int:
        return min(max(index, 0), len(self.rhos) - 1)

    def _steps(self, i: int, steps: int) -> int:
        low, high = self.room[i]
        return min(max(steps, low), high)


def _jump(rng: random.Random) -> int:
    return rng.choice((-1, 1)) * rng.randint(1, REACH)
