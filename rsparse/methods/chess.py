"""CHESS: CATS with a threshold per neuron, and two of attention's four linears sparse as well.

CHESS (arXiv 2409.01366). Channel-wise thresholding: neuron j is switched off where |SiLU(gate)_j| <= T / E|up_j|, with
the mean over calibration tokens of the dense model; that is one threshold T on |SiLU(gate)_j| E|up_j|, an estimate of
what the neuron contributes. Selective sparsification: the inputs of q and o are thresholded by magnitude, those of k
and v are left alone. The share p of skipped channels is the same in all of them, so the model-level sparsity is p times
the share of q, o, up and down: the ceiling is 61.1% of Llama-2-7B and 69.2% of Llama-3-8B. Scope "mlp" is the paper's
"CHESS w/o". No extra bytes are read: E|up_j| is one number per neuron.

The authors' notebooks, which hold the statistics, read them on the dense model; here the thresholds are read again on
the sparse one, as for every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor

from rsparse.methods.base import Method, Request, uniform
from rsparse.models import ACTIVATION, DecoderLinear

PARTS = dict.fromkeys(("q", "o", "up", "down"), Fraction(1))


def weights(linears: Sequence[DecoderLinear], request: Request) -> dict[int, Tensor]:
    """Layer -> E|up_j| of every neuron on the dense model (neurons,)."""
    ups = [x for x in linears if x.kind == "up"]
    means = request.calibration.mean_outputs(ups)
    return {x.layer: means[x.name] for x in ups}


METHOD = Method(
    "chess", "arXiv 2409.01366", uniform(PARTS), fixed={"rho": 1.0, "score": "|SiLU(gate)| E|up|, magnitude in q, o"},
    parts=PARTS, calibrates=True, follows=dict.fromkeys(("up", "down"), ACTIVATION), weights=weights,
)  # fmt: skip
