"""INT4 weights as GPTQ writes them: symmetric, groups of 128 along the inputs.

W[i, j] = (codes[i, j] - 8) * scales[i, j // 128]; GPTQ: Frantar et al., ICLR 2023. Its checkpoints pack eight inputs of
one output into an int32; the kernel wants eight outputs of one input, see packing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128
"""Inputs that share a scale."""
ZERO = 8
"""The code of weight zero."""


@dataclass(frozen=True)
class Quantized:
    """codes: (m, n) uint8, 0 to 15. scales: (m, n / 128), in the dtype of the activations.

    ValueError for another shape or dtype, and for codes above 15 on a CPU: a GPU would have to be waited for.
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.codes.shape)
        if len(shape) != 2 or shape[1] % GROUP or self.scales.shape != (shape[0], shape[1] // GROUP):
            raise ValueError(
                f"codes are {shape} and scales {tuple(self.scales.shape)}; expected a multiple of {GROUP} inputs "
                "and one scale per output and group"
            )
        if self.codes.dtype != torch.uint8:
            raise ValueError(f"codes are {self.codes.dtype}; expected torch.uint8")
        if self.device.type == "cpu" and self.codes.numel() and (most := int(self.codes.max())) > 15:
            raise ValueError(f"codes go up to {most}; expected 0 to 15")

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def __len__(self) -> int:
        return len(self.codes)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (m, n)."""
        scales = self.scales.to(dtype or self.dtype)
        return (self.codes.to(scales.dtype) - ZERO) * scales.repeat_interleave(GROUP, dim=1)


def round_to_nearest(weight: Tensor) -> Quantized:
    """The nearest codes of `weight` (m, n), with a group's largest magnitude / 7.5 for its step, as GPTQ takes it of
    the weights that it has made up: its control, which makes up for no error.

    ValueError where n is no multiple of 128.
    """
    m, n = weight.shape
    if n % GROUP:
        raise ValueError(f"the weight has {n} inputs; expected a multiple of {GROUP}")
    groups = weight.detach().float().view(m, -1, GROUP)
    scales = (groups.abs().amax(2) / 7.5).clamp_min(torch.finfo(torch.float16).tiny).to(weight.dtype)
    codes = (groups / scales.float()[:, :, None]).round().clamp(-ZERO, 7) + ZERO
    return Quantized(codes.view(m, n).to(torch.uint8), scales)


def from_gptq(qweight: Tensor, scales: Tensor, g_idx: Tensor | None = None) -> Quantized:
    """What a GPTQ checkpoint holds of one symmetric linear: qweight (n / 8, m) int32, scales (n / 128, m), g_idx (n,).

    ValueError for groups that are not runs of 128 inputs (act-order reorders them: quantise without it).
    """
    n = 8 * len(qweight)
    if g_idx is not None and not torch.equal(g_idx.cpu().long(), torch.arange(n) // GROUP):
        raise ValueError(f"g_idx reorders inputs; expected runs of {GROUP} (quantise with desc_act=False)")
    shifts = torch.arange(0, 32, 4, device=qweight.device, dtype=torch.int32)
    codes = (qweight[:, None, :] >> shifts[:, None]) & 15  # (n / 8, 8, m)
    return Quantized(codes.reshape(n, -1).T.contiguous().to(torch.uint8), scales.T.contiguous())


def to_gptq(quantized: Quantized) -> dict[str, Tensor]:
    """What a GPTQ checkpoint holds of one linear, as `from_gptq` reads it: qweight (n / 8, m) and qzeros (n / 128,
    m / 8) int32, scales (n / 128, m) float16, g_idx (n,) int32. Zeros are stored less one, as the format has it.

    ValueError where m is no multiple of 8, which the zeros' packing needs.
    """
    m, n = quantized.shape
    if m % 8:
        raise ValueError(f"the weight has {m} outputs; expected a multiple of 8")
    nibbles = quantized.codes.T.reshape(n // 8, 8, m).to(torch.int64)
    shifts = torch.arange(0, 32, 4, device=nibbles.device)[None, :, None]
    words = (nibbles << shifts).sum(1)
    words = torch.where(words >= 2**31, words - 2**32, words)  # as a signed word of the same bits
    return {
        "qweight": words.to(torch.int32).contiguous(),
        "qzeros": torch.full((n // GROUP, m // 8), int(f"{ZERO - 1:x}" * 8, 16), dtype=torch.int32),
        "scales": quantized.scales.T.to(torch.float16).contiguous(),
        "g_idx": torch.arange(n, dtype=torch.int32) // GROUP,
    }
