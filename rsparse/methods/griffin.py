"""GRIFFIN: the prompt chooses the MLP's neurons, and the whole continuation runs on these alone.

GRIFFIN (arXiv 2404.01365), section 4; how neurons are chosen stands in rsparse.prompted. Gate, up and down all shrink,
so a share p of the neurons off is p times the MLP's share of the bytes: half of them 33.4% of Llama-2-7B, 40.4% of
Llama-3-8B or Mistral-7B. There is no threshold, and no calibration; no extra bytes are read.

Scope "all" is R-Sparse's Figure 7, GRIFFIN on all blocks. The paper does not say how attention is pruned; here the
input channels of q, k, v and o are chosen in the same way, by the same share, from their own inputs.

The authors' code chooses from all tokens before the last in classification (`tokens=-1`), so that options of several
tokens are scored densely but for the last, and from the prompt in generation. Here the choice is made from whatever
positions the token protocol leaves dense; under "all", which leaves none, from the first 64, which are dense then.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from rsparse.methods.base import Method, Request
from rsparse.models import KINDS, DecoderLinear
from rsparse.recipe import Ask

PARTS = dict.fromkeys(KINDS, Fraction(1))


def plan(linears: Sequence[DecoderLinear], request: Request) -> dict[str, Ask]:
    """The same share of every linear's channels; exactly so many, so that nothing is calibrated."""
    return {x.name: Ask(request.sparsity, threshold="per-token") for x in linears}


METHOD = Method(
    "griffin", "arXiv 2404.01365", plan, takes=frozenset({"sparsity"}),
    fixed={"rho": 1.0, "score": "row-normalised, over the prompt", "threshold": "prompt"},
    parts=PARTS, scope="mlp", follows={"gate": "down", "up": "down"}, prompted=True,
)  # fmt: skip
