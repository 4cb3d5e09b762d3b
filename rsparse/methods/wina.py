"""WINA with uniform sparsity, with and without its transform: column norms enter TEAL's score where its code has them.

WINA (arXiv 2505.19427), section 3: the score is |x_j| ||W[:, j]||_2. The authors' code multiplies by the norm for k
and gate alone (wina/self_attn.py, wina/mlp.py) and takes |x_j| for q, v, o, up and down; so do we. They keep the
exact top channels of every token (`threshold="per-token"`), sparsify the last 99% of a sequence (`tokens=-0.99`), and
divide the budget between linears by TEAL's greedy search for Llama-2; ours is uniform.

"wina" leaves the weights alone: the model-level sparsity equals that of every linear, and no extra bytes are read (the
norms are one number per channel). "wina-rotated" has the paper's transform, which makes the columns of k and of gate
orthogonal: the inputs of q, k, v and of gate, up are rotated to the right singular vectors of k and of gate. The paper
does not count the rotation. Here it counts: two n x n matrices a block, 16.6% of Llama-2-7B's bytes and 15.4% of
Llama-3-8B's, so that at the same bytes fewer channels are read; `nominal` is the sparsity without them. Where k has
fewer outputs than inputs (grouped-query attention), its singular vectors leave a part of the basis open, in which q and
v choose too: the eigensolver decides there, and another device may decide otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from rsparse.decompose import weight_key
from rsparse.methods.base import Method, Request
from rsparse.models import KINDS, DecoderLinear
from rsparse.recipe import Ask
from rsparse.rotations import Rotation

WEIGHTED = ("k", "gate")
"""Kinds of linears whose column norms enter the score, and whose columns the transform makes orthogonal."""
PARTS = dict.fromkeys(KINDS, Fraction(1))


def plan(linears: Sequence[DecoderLinear], request: Request) -> dict[str, Ask]:
    """rho = 1 for every linear; the score by its kind."""
    score = {x.name: "column-norm" if x.kind in WEIGHTED else "magnitude" for x in linears}
    return {name: Ask(request.sparsity, 1.0, score[name], request.threshold) for name in score}


def rotate(linears: Sequence[DecoderLinear], request: Request) -> dict[str, Rotation]:
    """The right singular vectors of k for q, k, v, and of gate for gate, up."""

    def rotation(x: DecoderLinear) -> Rotation:
        weight = x.module.weight
        V = request.store.basis(weight_key(weight), lambda: _gram(weight), weight.dtype, weight.device)
        return Rotation(V, "right-singular")

    found = {(x.layer, x.site): rotation(x) for x in linears if x.kind in WEIGHTED}
    return {x.name: found[x.layer, x.site] for x in linears}


def _gram(weight: Tensor) -> Tensor:
    W = weight.detach().to(torch.float64)
    return W.T @ W


FIXED = {"rho": 1.0, "score": "column-norm in k, gate"}
METHOD = Method("wina", "arXiv 2505.19427", plan, fixed=FIXED)
ROTATED = Method(
    "wina-rotated", "arXiv 2505.19427", plan, fixed=FIXED, rotate=rotate, rotated=("attn_in", "mlp_in")
)
