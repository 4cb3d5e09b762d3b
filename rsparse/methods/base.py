"""What every method has in common: a name, a source, and a plan that asks something of every linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

    plan: (linears inside the scope, request) -> what is asked of each, by name. A method that fixes rho or
    score ignores the request's. takes_recipe: whether a recipe may take the place of the plan.
    """

    name: str
    source: str
    plan: Callable[[Sequence[DecoderLinear], Request], dict[str, Ask]]
    takes_recipe: bool = False
