"""R-Sparse: large inputs read their weight columns, the others go through a low-rank approximation of W.

arXiv 2504.19449, section 3.3. Uniform rho or a recipe with one rho per linear. The paper masks by |x|; the
authors' code does so only where rho is 1 and by |x| ||W[:, j]|| elsewhere, hence the `score` argument. Their
code budgets k and v as square matrices under grouped-query attention, we by their own shape. The approximation is that
of the singular vectors of W; factors "whitened", which neither has, are made for what the mask leaves and cost no byte
more (rsparse.whitening).
"""

from __future__ import annotations

from collections.abc import Sequence

from rsparse.methods.base import Method, Request
from rsparse.models import DecoderLinear
from rsparse.recipe import Ask


def plan(linears: Sequence[DecoderLinear], request: Request) -> dict[str, Ask]:
    """The requested rho, score and factors for every linear."""
    ask = Ask(request.sparsity, request.rho, request.score, request.threshold, request.factors)
    return {x.name: ask for x in linears}


ALL = frozenset({"sparsity", "rho", "score", "threshold", "factors"})
METHOD = Method("r-sparse", "arXiv 2504.19449", plan, takes=ALL, fixed={}, takes_recipe=True)
