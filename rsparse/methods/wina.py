"""WINA with uniform sparsity, without its transform: TEAL, with column norms in the score where its code has them.

WINA (arXiv 2505.19427), section 3: the score is |x_j| ||W[:, j]||_2. The authors' code multiplies by the norm for k
and gate alone (wina/self_attn.py, wina/mlp.py) and takes |x_j| for q, v, o, up and down; so do we. They keep the
exact top channels of every token (`threshold="per-token"`), sparsify the last 99% of a sequence (`tokens=-0.99`), and
divide the budget between linears by TEAL's greedy search for Llama-2; ours is uniform, so the model-level sparsity
equals that of every linear. No extra bytes are read: the norms are one number per channel.
"""

from __future__ import annotations

from collections.abc import Sequence

from rsparse.methods.base import Method, Request
from rsparse.models import DecoderLinear
from rsparse.recipe import Ask

WEIGHTED = ("k", "gate")
"""Kinds of linears whose column norms enter the score."""


def plan(linears: Sequence[DecoderLinear], request: Request) -> dict[str, Ask]:
    """rho = 1 for every linear; the score by its kind."""
    score = {x.name: "column-norm" if x.kind in WEIGHTED else "magnitude" for x in linears}
    return {name: Ask(request.sparsity, 1.0, score[name], request.threshold) for name in score}


METHOD = Method("wina", "arXiv 2505.19427", plan, fixed={"rho": 1.0, "score": "column-norm in k, gate"})
