"""Where weights are laid out for the kernels, once: W^T row by row, so that a channel that is dropped is never read.

A table is (n + r, m): W^T, and A^T's r rows below it; m is padded to whole blocks of columns, so that no load on a GPU
needs a mask along its row and all are 16 bytes wide (INT4 in blocks of 128 columns: 8). INT4 tables hold eight outputs
of one channel in an int32.

A table serves the plain product as well (operations.dense), so that the linear it was made from can be freed: a model
is held once. Several linears that read the same x (q, k and v; gate and up) are packed side by side as `segments` of
one table, each with its own threshold, norms and rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.quantized import GROUP, ZERO, Quantized

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALIGNED = 8
"""Ranks are padded to a multiple, so that 16-bit rows of B^T begin at 16 bytes."""
COLUMNS = 128
"""Columns of a segment are padded to a multiple: blocks of so many columns or fewer are whole. INT4 has blocks of
so many, which hold column 16 k + c of a block in bits 4 k of word c."""


@dataclass(frozen=True)
class Segment:
    """What one linear asks of the kernel.

    weight: (m, n). A (m, r), B (n, r): low-rank factors, or None for rank 0. threshold: channels with a score above it
    are read; -inf reads all, +inf none. norms: (n,) weights of the score |x_j| norms_j, or None. bias: (m,) or None.
    """

    weight: Tensor | Quantized
    threshold: float
    A: Tensor | None = None
    B: Tensor | None = None
    norms: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.A is None else self.A.shape[1]


@dataclass(frozen=True)
class Packed:
    """Segments side by side; what `operations.Gemv` takes.

    table: (n + r, sum of `padded`), or (n, sum of `padded` / 8) int32 for INT4.
    A: (r, sum of `padded`), the last rows of the table, or memory of its own for INT4.
    B: (segments, r, n). r is the largest rank, padded; ranks (segments,) int32 says how many of a segment are used.
    thresholds (segments,) float32. norms (segments, n) float32, bias (m,) float32, or None. scales: (n / 128, sum of
    `padded`) for INT4, or None. widths: columns of each segment.
    """

    table: Tensor
    A: Tensor
    B: Tensor
    ranks: Tensor
    thresholds: Tensor
    widths: tuple[int, ...]
    channels: int
    norms: Tensor | None = None
    bias: Tensor | None = None
    scales: Tensor | None = None

    @property
    def rows(self) -> int:
        """Outputs m, of all segments."""
        return sum(self.widths)

    @property
    def padded(self) -> tuple[int, ...]:
        """Columns of each segment in the table."""
        return padded(self.widths)

    @property
    def dtype(self) -> torch.dtype:
        """Of x and of y."""
        return self.B.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [self.table, self.B, self.ranks, self.thresholds, self.norms, self.bias, self.scales]
        return sum(x.nbytes for x in held + [self.A] * (self.scales is not None) if x is not None)

    def with_thresholds(self, thresholds: Sequence[float]) -> Packed:
        """The same weights, read from other thresholds on. ValueError unless they are a number per segment."""
        if len(thresholds) != len(self.widths) or any(x != x for x in thresholds):
            raise ValueError(f"thresholds are {list(thresholds)}; expected {len(self.widths)} numbers, by segment")
        return replace(self, thresholds=_thresholds(thresholds, self.thresholds.device))


def padded(widths: Sequence[int]) -> tuple[int, ...]:
    """Columns of segments of so many outputs in a table."""
    return tuple(_up(width, COLUMNS) for width in widths)


def pack(segments: Sequence[Segment]) -> Packed:
    """Lay `segments` out on the device of their weights; nothing of them is changed.

    ValueError for segments that cannot share an input: other channels, dtype or device; a dtype that no kernel reads;
    factors or norms of another shape.
    """
    _check(segments)
    first = segments[0].weight
    int4 = isinstance(first, Quantized)
    channels, device, dtype = first.shape[1], first.device, first.dtype
    r = _up(max(x.rank for x in segments), ALIGNED)
    widths = tuple(len(x.weight) for x in segments)
    columns = padded(widths)
    rows = r if int4 else channels + r
    table = torch.zeros(rows, sum(columns), dtype=dtype, device=device)
    B = torch.zeros(len(segments), r, channels, dtype=dtype, device=device)
    for index, (segment, own) in enumerate(zip(segments, table.split(list(columns), dim=1), strict=True)):
        if not int4:
            own[:channels, : widths[index]].copy_(segment.weight.detach().T)
        if segment.rank:
            own[rows - r : rows - r + segment.rank, : widths[index]].copy_(segment.A.T)
            B[index, : segment.rank].copy_(segment.B.T)
    found = Packed(
        table, table[rows - r :], B, torch.tensor([x.rank for x in segments], dtype=torch.int32, device=device),
        _thresholds([x.threshold for x in segments], device), widths, channels,
        _side_by_side([x.norms for x in segments], 1.0, [channels] * len(segments), device, stack=True),
        _side_by_side([x.bias for x in segments], 0.0, widths, device, stack=False),
    )  # fmt: skip
    if int4:
        weights = [x.weight for x in segments]
        return replace(found, table=_words(weights, columns), scales=_scales(weights, columns))
    return found


def weights(packed: Packed, segment: int) -> Tensor:
    """W^T (n, m) of one segment; a view, but for INT4, which is dequantised."""
    begin, width = sum(packed.padded[:segment]), packed.widths[segment]
    if packed.scales is None:
        return packed.table[: packed.channels, begin : begin + width]
    words = packed.table[:, begin // 8 : (begin + packed.padded[segment]) // 8]
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    codes = (words.reshape(len(words), -1, 1, COLUMNS // 8) >> shifts[:, None]) & 15
    scales = packed.scales[:, begin : begin + width].repeat_interleave(GROUP, dim=0)
    return (codes.reshape(len(words), -1)[:, :width] - ZERO).to(scales.dtype) * scales


def _words(weights: Sequence[Quantized], columns: Sequence[int]) -> Tensor:
    parts = []
    for weight, width in zip(weights, columns, strict=True):
        codes = pad(weight.codes.T, (0, width - len(weight)), value=ZERO).int()
        codes = codes.view(len(codes), -1, 8, COLUMNS // 8)
        parts.append(sum(codes[:, :, k] << 4 * k for k in range(8)).view(len(codes), -1))
    return torch.cat(parts, dim=1)


def _scales(weights: Sequence[Quantized], columns: Sequence[int]) -> Tensor:
    pairs = zip(weights, columns, strict=True)
    return torch.cat([pad(weight.scales.T, (0, width - len(weight))) for weight, width in pairs], dim=1)


def _up(value: int, multiple: int) -> int:
    return value + -value % multiple


def _thresholds(values: Sequence[float], device: torch.device) -> Tensor:
    """Finite at most: an inf of x is above every threshold, and so is read and surfaces."""
    return torch.tensor(values, dtype=torch.float32, device=device).clamp(max=torch.finfo(torch.float32).max)


def _side_by_side(parts, missing: float, widths, device, stack: bool) -> Tensor | None:
    if all(part is None for part in parts):
        return None
    filled = [
        torch.full((width,), missing, device=device) if part is None else part.detach().to(device).float()
        for part, width in zip(parts, widths, strict=True)
    ]
    return torch.stack(filled) if stack else torch.cat(filled)


def _check(segments: Sequence[Segment]) -> None:
    if not segments:
        raise ValueError("no segments; expected at least one linear")
    first = segments[0].weight
    if first.dtype not in DTYPES:
        raise ValueError(f"weights are {first.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    for i, x in enumerate(segments):
        if len(x.weight.shape) != 2:
            raise ValueError(f"segment {i} has a weight {tuple(x.weight.shape)}; expected (m, n)")
        m, n = x.weight.shape
        if type(x.weight) is not type(first) and Quantized in (type(x.weight), type(first)):
            raise ValueError(f"segment {i} is {type(x.weight).__name__}; expected {type(first).__name__}, as the first")
        if n != first.shape[1] or x.weight.dtype != first.dtype or x.weight.device != first.device:
            raise ValueError(
                f"segment {i} is {tuple(x.weight.shape)}, {x.weight.dtype} on {x.weight.device}; expected "
                f"{first.shape[1]} channels, {first.dtype} on {first.device}, as the first"
            )
        if (x.A is None) != (x.B is None):
            raise ValueError(f"segment {i} has one factor; expected A and B, or neither")
        if x.A is not None and (x.A.ndim != 2 or x.A.shape[0] != m or x.B.shape != (n, x.A.shape[1])):
            raise ValueError(
                f"segment {i} has factors {tuple(x.A.shape)} and {tuple(x.B.shape)}; expected ({m}, r) and ({n}, r)"
            )
        if x.norms is not None and x.norms.shape != (n,):
            raise ValueError(f"segment {i} has norms {tuple(x.norms.shape)}; expected ({n},)")
        if x.bias is not None and x.bias.shape != (m,):
            raise ValueError(f"segment {i} has a bias {tuple(x.bias.shape)}; expected ({m},)")
        if x.threshold != x.threshold:
            raise ValueError(f"segment {i} has the threshold {x.threshold}; expected a number")
