"""The first half of an MLP, neuron by neuron, from gate and up as stored (m, n): for CATS and GRIFFIN.

CATS computes every gate and reads up's row only of a neuron whose activation is above the threshold; GRIFFIN computes
fixed neurons. A dropped neuron's output is 0, which a sparse down projection does not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import triton_tiles as tiles
from kernels.triton_gemv import chained, gdc_launch_dependents, gdc_wait

ROWS = 4
"""Neurons of a program."""
WIDTH = 512
"""Channels that it reads at once."""
WARPS = 2


@triton.jit
def _dots(x, weight, front, scale, neurons, wanted, n, ROWS: tl.constexpr, WIDTH: tl.constexpr, FRONT: tl.constexpr):
    """weight[neurons] x, where `wanted`: (ROWS,)."""
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    rows = weight + neurons.to(tl.int64)[:, None] * n
    for begin in range(0, n, WIDTH):
        channels = begin + tl.arange(0, WIDTH)
        inside = channels < n
        read = tl.load(rows + channels[None, :], mask=wanted[:, None] & inside[None, :], other=0.0)
        sums += read.to(tl.float32) * tiles.read(x, front, scale, channels, inside, FRONT)[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def _neurons(x, gate, up, list_, front, y, threshold, eps, n, count, CHOSEN: tl.constexpr, FRONT: tl.constexpr,
             ROWS: tl.constexpr, WIDTH: tl.constexpr, NORM_WIDTH: tl.constexpr, CHAINED: tl.constexpr):  # fmt: skip
    if CHAINED:
        gdc_wait()
    scale = tiles.inverse_rms(x, n, eps, NORM_WIDTH) if FRONT else 1.0
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = number < count
    neurons = tl.load(list_ + number, mask=inside, other=0) if CHOSEN else number
    act = _dots(x, gate, front, scale, neurons, inside, n, ROWS, WIDTH, FRONT)
    act = act * tl.sigmoid(act)
    keep = inside if CHOSEN else inside & tiles.kept(act, 1.0, threshold)
    found = act * _dots(x, up, front, scale, neurons, keep, n, ROWS, WIDTH, FRONT)
    if CHAINED:
        gdc_launch_dependents()
    tl.store(y + neurons, tl.where(keep, found, 0.0), mask=inside)


def neurons(x: Tensor, gate: Tensor, up: Tensor, threshold: float, chosen: Tensor | None = None,
            front: Tensor | None = None, eps: float = 0.0) -> Tensor:  # fmt: skip
    """x (n,), gate and up (m, n) -> (m,): reference.cats, or reference.chosen where `chosen` (k,) int32 is given.

    front: (n,) weight of an RMS norm that x passes first, with `eps`.
    """
    m, n = gate.shape
    count = m if chosen is None else len(chosen)
    y = torch.empty(m, dtype=x.dtype, device=x.device) if chosen is None else x.new_zeros(m)
    linked = chained(x.device)
    _neurons[(triton.cdiv(count, ROWS),)](
        x, gate, up, chosen, front, y, min(threshold, torch.finfo(torch.float32).max), eps, n, count,
        CHOSEN=chosen is not None, FRONT=front is not None, ROWS=ROWS, WIDTH=WIDTH, NORM_WIDTH=4096 // x.dtype.itemsize,
        CHAINED=linked, num_warps=WARPS, launch_pdl=linked,
    )  # fmt: skip
    return y


