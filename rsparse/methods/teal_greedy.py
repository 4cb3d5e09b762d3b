"""TEAL with its block-wise greedy sparsities: within a block, linears that hurt its output less are made sparser.

TEAL (arXiv 2408.14690), section 4.2 and Algorithm 1; the search is rsparse.greedy. Every block has the same sparsity,
which is the model-level one; no extra bytes are read. The authors' code weighs k and v as an eighth of q for Llama-2
and Mistral (in truth 1 and 1/4) when it adds up a block's sparsity; here every linear counts by its bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from rsparse import greedy
from rsparse.methods.base import Method, Request
from rsparse.models import DecoderLinear
from rsparse.recipe import Ask


def plan(linears: Sequence[DecoderLinear], request: Request) -> dict[str, Ask]:
    """The greedy sparsity of every linear, rho = 1 and |x| as the score."""
    found = greedy.sparsities(request.calibration, linears, request.sparsity)
    return {name: Ask(sparsity, 1.0, "magnitude", request.threshold) for name, sparsity in found.items()}


METHOD = Method("teal-greedy", "arXiv 2408.14690", plan, calibrates=True)
