"""ReLUfication, training-free: the MLP's SiLU is swapped for ReLU, and what ReLU makes zero is skipped.

ReLU Strikes Back (arXiv 2310.04564), stage one, without the retraining that the paper does: R-Sparse's Table 1 runs it
so, as the baseline that collapses. Gate is read densely, because it decides; row j of up and column j of down are
skipped where ReLU(gate)_j is zero. There is no knob: it reports the sparsity that it has, and needs calibration tokens
only for that. Attention stays dense; no extra bytes are read. Dense positions keep SiLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from torch import nn

from rsparse.methods.base import Method, Request
from rsparse.models import ACTIVATION, DecoderLinear
from rsparse.recipe import DENSE, Ask

PARTS = dict.fromkeys(("up", "down"), Fraction(1))


def plan(linears: Sequence[DecoderLinear], request: Request) -> dict[str, Ask]:
    """Nothing that could be counted beforehand: ReLU decides."""
    return {x.name: DENSE for x in linears}


METHOD = Method(
    "relufication", "arXiv 2310.04564", plan, takes=frozenset(),
    fixed={"rho": 1.0, "score": "ReLU(gate)", "threshold": "", "sparsity": None},
    parts=PARTS, scope="mlp", follows=dict.fromkeys(PARTS, ACTIVATION), function=nn.ReLU,
)  # fmt: skip
