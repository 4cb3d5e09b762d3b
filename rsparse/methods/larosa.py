"""LaRoSA: the inputs of q, k, v and of gate, up are rotated to their principal directions, and the largest are kept.

LaRoSA (arXiv 2507.01299). The rotations are the eigenvectors of the inputs' second moments over calibration tokens of
the dense model, one for attention's input and one for the MLP's in every block; o and down choose among their inputs as
they are. It keeps the exact top channels of every token, so that every token reads the same bytes; that is part of the
method (and a static threshold would be points off on other text than the rotations were fitted to). The authors' code
makes every position sparse (`tokens="all"`), and gives q, k, v, gate and up 0.8 of a nominal sparsity, o and down 1.2
of it. Weighted by size that is 0.922 of it for Llama-2-7B and 0.938 for Llama-3-8B, before the rotations, which the
paper takes as absorbed: its code multiplies by them (and back) at every token, and a residual stream kept rotated would
need a matrix of the same size to go from one block's basis to the next one's. Here they count, 16.6% and 15.4% of the
bytes. `sparsity` is model-level with all of that, `nominal` the paper's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from rsparse.methods.base import Method, Request, uniform
from rsparse.models import KINDS, DecoderLinear
from rsparse.recipe import Ask
from rsparse.rotations import Rotation, second_moments

SITES = ("attn_in", "mlp_in")
PARTS = dict.fromkeys(KINDS, Fraction(8, 10)) | dict.fromkeys(("o", "down"), Fraction(12, 10))


def plan(linears: Sequence[DecoderLinear], request: Request) -> dict[str, Ask]:
    """Its part of the sparsity for every linear, chosen per token whatever threshold was asked for."""
    return uniform(PARTS)(linears, replace(request, threshold="per-token"))


def rotate(linears: Sequence[DecoderLinear], request: Request) -> dict[str, Rotation]:
    """The principal directions of every site's input, largest first; kept on disk by model and calibration tokens."""
    calibration, moments = request.calibration, {}

    def gram(x: DecoderLinear):
        if not moments:  # one pass for all that is missing
            moments.update(second_moments(calibration.model, calibration.ids, linears))
        return moments.pop((x.layer, x.site))

    def rotation(x: DecoderLinear) -> Rotation:
        key, weight = f"{calibration.key}-{x.layer}-{x.site}", x.module.weight
        return Rotation(request.store.basis(key, lambda: gram(x), weight.dtype, weight.device), "principal")

    found: dict[tuple[int, str], Rotation] = {}
    for x in linears:
        if (x.layer, x.site) not in found:
            found[x.layer, x.site] = rotation(x)
    return {x.name: found[x.layer, x.site] for x in linears}


METHOD = Method(
    "larosa", "arXiv 2507.01299", plan, takes=frozenset({"sparsity"}),
    fixed={"rho": 1.0, "score": "magnitude", "threshold": "per-token"},
    parts=PARTS, calibrates=True, rotate=rotate, rotated=SITES,
)  # fmt: skip
