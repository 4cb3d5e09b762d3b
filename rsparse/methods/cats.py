"""CATS: neurons with a small |SiLU(gate)| are switched off, so that their rows of up and columns of down go unread.

CATS (arXiv 2404.08763), section 3. Gate is read densely, because it decides, and attention stays dense: with a share p
of the neurons off, the model-level sparsity is p times the share of up and down. Half of the neurons is 22.3% of
Llama-2-7B and 26.9% of Llama-3-8B or Mistral-7B; all of them, the ceiling, 44.6 and 53.8%. No extra bytes are read.

The authors' code takes the threshold from 100 sequences of RefinedWeb (the paper says 500), in a histogram from -2 to 2
whose last bins count pre-activations; ours is a quantile over the calibration tokens, read again on the sparse model.
Their "no fine-tuning" rows follow one optimiser step of LoRA; ours follow none. Every token is sparse there
(`tokens="all"`).
"""

from __future__ import annotations

from fractions import Fraction

from rsparse.methods.base import Method, uniform
from rsparse.models import ACTIVATION

PARTS = dict.fromkeys(("up", "down"), Fraction(1))
METHOD = Method(
    "cats", "arXiv 2404.08763", uniform(PARTS), fixed={"rho": 1.0, "score": "|SiLU(gate)|"},
    parts=PARTS, scope="mlp", follows=dict.fromkeys(PARTS, ACTIVATION),
)  # fmt: skip
