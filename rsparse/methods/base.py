"""What every method has in common: a name, a source, and a plan that asks something of every linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rsparse.models import DecoderLinear
from rsparse.recipe import Ask


@dataclass(frozen=True)
class Request:
    """What the caller asked for, after checks.

    sparsity: of each linear inside the scope (already divided by the scope's share of the bytes).
    """

    sparsity: float
    rho: float
    score: str
    threshold: str


@dataclass(frozen=True)
class Method:
    """A published method.

    plan: (linears inside the scope, request) -> what is asked of each, by name. takes: the fields of the request
    that have a say; it ignores the others. fixed: what tables say in place of those that it ignores.
    takes_recipe: whether a recipe may take the place of the plan.
    """

    name: str
    source: str
    plan: Callable[[Sequence[DecoderLinear], Request], dict[str, Ask]]
    takes: frozenset[str] = frozenset({"sparsity", "threshold"})
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"rho": 1.0, "score": "magnitude"})
    takes_recipe: bool = False

    @property
    def has_mask(self) -> bool:
        """Whether input channels are chosen by a score."""
        return "threshold" in self.takes
