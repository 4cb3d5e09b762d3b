"""Low-rank only: every linear is replaced by its truncated SVD at the same read budget.

The "low-rank only" row of R-Sparse's Table 3 (arXiv 2504.19449). Nothing depends on the input, so threshold
and score have no say.
"""

from __future__ import annotations

from collections.abc import Sequence

from rsparse.methods.base import Method, Request
from rsparse.models import DecoderLinear
from rsparse.recipe import Ask


def plan(linears: Sequence[DecoderLinear], request: Request) -> dict[str, Ask]:
    """rho = 0 for every linear."""
    return {x.name: Ask(request.sparsity, 0.0, "magnitude", request.threshold) for x in linears}


METHOD = Method("low-rank", "arXiv 2504.19449, Table 3", plan, takes=frozenset({"sparsity"}), fixed={"rho": 0.0})
