"""What every method has in common: a name, a source, and a plan that asks something of every linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from rsparse.accounting import times
from rsparse.calibrate import Calibration
from rsparse.decompose import FactorStore
from rsparse.models import KINDS, SCOPES, DecoderLinear
from rsparse.recipe import Ask
from rsparse.rotations import Rotation


@dataclass(frozen=True)
class Request:
    """What the caller asked for, after checks.

    sparsity: the method's own, of a linear whose part is 1 (see `Method.parts`). calibration: of the dense model,
    for the methods that calibrate. store: where what is computed once is kept.
    """

    sparsity: float
    rho: float = 0.95
    score: str = "magnitude"
    threshold: str = "static"
    calibration: Calibration | None = None
    store: FactorStore | None = None
    factors: str = "svd"


Plan = Callable[[Sequence[DecoderLinear], Request], dict[str, Ask]]


@dataclass(frozen=True)
class Method:
    """A published method.

    plan: (linears inside the scope that have a part, request) -> what is asked of each, by name.
    takes: the fields of the request that have a say; it ignores the others. fixed: what tables say in place of
    those that it ignores. takes_recipe: whether a recipe may take the place of the plan.

    parts: kind of linear -> its sparsity in units of the method's own; others stay dense. scope: its own, which holds
    where the caller names none. calibrates: whether it needs calibration tokens whatever the threshold is.

    What a linear reads is decided by a mask of its input channels, but for: follows, kind -> kind whose mask decides
    ("act": of the MLP's neurons, by their activation). function: of sparse positions, in the activation's place.
    weights: (linears of the MLPs, request) -> layer -> weights of the neurons' score. rotate: (linears of one or more
    sites, request) -> linear -> rotation of its input; rotated: the sites. prompted: whether masks are chosen once
    per row, from its dense positions (rsparse.prompted).
    """

    name: str
    source: str
    plan: Plan
    takes: frozenset[str] = frozenset({"sparsity", "threshold"})
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"rho": 1.0, "score": "magnitude"})
    takes_recipe: bool = False
    parts: Mapping[str, Fraction] = field(default_factory=lambda: dict.fromkeys(KINDS, Fraction(1)))
    scope: str = "all"
    calibrates: bool = False
    follows: Mapping[str, str] = field(default_factory=dict)
    function: Callable[[], nn.Module] | None = None
    weights: Callable[[Sequence[DecoderLinear], Request], dict[int, Tensor]] | None = None
    rotate: Callable[[Sequence[DecoderLinear], Request], dict[str, Rotation]] | None = None
    rotated: tuple[str, ...] = ()
    prompted: bool = False

    @property
    def has_mask(self) -> bool:
        """Whether input channels or neurons are chosen by a score."""
        return "threshold" in self.takes

    def touches(self, scope: str) -> tuple[str, ...]:
        """The kinds of linears inside `scope` that the method makes sparse."""
        return tuple(kind for kind in SCOPES[scope] if kind in self.parts)


def uniform(parts: Mapping[str, Fraction], score: str = "magnitude") -> Plan:
    """A plan without a low-rank path: every linear has its part of the sparsity, and one score."""

    def plan(linears: Sequence[DecoderLinear], request: Request) -> dict[str, Ask]:
        return {
            x.name: Ask(times(parts[x.kind], request.sparsity), 1.0, score, request.threshold) for x in linears
        }

    return plan
