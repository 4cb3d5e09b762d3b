"""What every operation computes, in plain torch; float64 in, float64 out. Tests and slow devices use it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from kernels.packing import Segment
from kernels.quantized import Quantized


def scores(x: Tensor, norms: Tensor | None = None) -> Tensor:
    """|x_j| norms_j in float32 or better; (..., n)."""
    score = x.abs().to(torch.promote_types(x.dtype, torch.float32))
    return score if norms is None else score * norms


def kept(x: Tensor, segment: Segment) -> Tensor:
    """Mask (..., n) of the channels that are read: score above the threshold, and what is not finite, to surface."""
    return ~(scores(x, segment.norms) <= min(segment.threshold, torch.finfo(torch.float32).max))


def linear(x: Tensor, segment: Segment, keep: Tensor | None = None) -> Tensor:
    """y = W s(x) + A B^T (x - s(x)) + b for x (..., n), R-Sparse's equation 5; in the dtype of x.

    keep: the mask, in place of the one that x gives (to compare precisions on the same mask).
    """
    keep = kept(x, segment) if keep is None else keep
    weight = segment.weight
    weight = weight.dequantized(x.dtype) if isinstance(weight, Quantized) else weight.to(x.dtype)
    y = torch.where(keep, x, 0) @ weight.T
    if segment.rank:
        y = y + (torch.where(keep, 0, x) @ segment.B.to(x.dtype)) @ segment.A.to(x.dtype).T
    return y if segment.bias is None else y + segment.bias.to(x.dtype)


def side_by_side(x: Tensor, segments: list[Segment]) -> Tensor:
    """The outputs of linears that read the same x, one behind another: (..., sum of m)."""
    return torch.cat([linear(x, segment) for segment in segments], dim=-1)


def gated(x: Tensor, gate: Segment, up: Segment) -> Tensor:
    """SiLU(gate(x)) * up(x), a Llama MLP's first half: (..., m)."""
    return silu(linear(x, gate)) * linear(x, up)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, rounded to the dtype of x before the product, as Llama does."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def cats(x: Tensor, gate: Tensor, up: Tensor, threshold: float) -> Tensor:
    """CATS' first half of an MLP: SiLU(gate x), and up x where its magnitude is above the threshold, else 0."""
    act = silu(x @ gate.T)
    return torch.where(~(act.abs() <= threshold), act * (x @ up.T), 0)


def chosen(x: Tensor, gate: Tensor, up: Tensor, neurons: Tensor) -> Tensor:
    """GRIFFIN's first half of an MLP, of fixed `neurons` (k,) alone; the others are 0."""
    y = x.new_zeros(*x.shape[:-1], len(gate))
    y[..., neurons] = silu(x @ gate[neurons].T) * (x @ up[neurons].T)
    return y
