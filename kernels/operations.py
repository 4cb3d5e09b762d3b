"""The operations that a decoder calls: each picks what computes by device and number of tokens, and says which it took.

`rsparse_kernels::gemv` and `rsparse_kernels::neurons` are registered with torch.library, with fake implementations, for
torch.compile. Elsewhere `Gemv` calls what the operation calls: the dispatcher's Python costs a fraction of a
millisecond, which a CPU waits for.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from kernels import packing, reference
from kernels.gathering import UNION as UNION  # beside `Gemv`, for who builds one
from kernels.gathering import gathered_tokens as gathered_tokens
from kernels.packing import Packed

MOST_TOKENS = {"cuda": 1, "cpu": 3}
"""Tokens up to which rows are gathered, unless a module says more. A CPU gathers for one after another: at half of the
rows, more take longer than the plain product of s(x) from a table, which takes longer than one of the weight."""


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


class Gemv(nn.Module):
    """y = W s(x) + A B^T (x - s(x)) + b of `packed`, for x (..., n) -> (..., m), or (..., m / 2) where `gated`:
    SiLU of the first of two segments of one width, times the second.

    norm: (weight, eps) of an RMS norm that x passes first. after: the module whose y is x, always: what the norm needs
    is then left by its launch, where both are Triton's. configuration: of the Triton kernel. most_tokens: rows are
    gathered for so many at most (`gathered_tokens` knows how many pay), else MOST_TOKENS of the device. A module's
    launches share memory: it must not run on two streams at once. like: a module of the same shapes, configuration and
    number of tokens, whose memory it shares too; one stream for both.

    ValueError for x or a residual of another shape, dtype or device; for segments that cannot be gated, and `after`
    what no norm of this module reads.
    """

    def __init__(self, packed: Packed, gated: bool = False, norm: tuple[Tensor, float] | None = None,
                 configuration=None, most_tokens: int | None = None, like: Gemv | None = None,
                 after: Gemv | None = None):  # fmt: skip
        super().__init__()
        if gated and (len(packed.widths) != 2 or packed.widths[0] != packed.widths[1]):
            raise ValueError(f"segments are {packed.widths} wide; expected two of one width, to be gated")
        if norm is not None:
            _check_norm(norm[0], packed.channels, packed.dtype, packed.table.device)
        if after is not None and (norm is None or after.width != packed.channels):
            raise ValueError(
                f"after is {after.width} wide and norm {'None' if norm is None else 'given'}; expected "
                f"{packed.channels}, as x, and a norm that reads it"
            )
        self.packed, self.gated, self.norm = packed, gated, norm
        self.width = packed.rows // 2 if gated else packed.rows
        # not a submodule: a chain of modules would hold itself
        self._like, self._after = (like,), (after,)
        self.next = None
        self.prepare(most_tokens, configuration)
        if after is not None:
            after._leave(norm[0])

    def prepare(self, most_tokens: int | None = None, configuration=None) -> None:
        """Gather for so many tokens at most from now on, cut up by `configuration`; after the module that this one is
        `like`, whose memory it takes. Graphs that were captured before write to memory that is let go."""
        device, int4, like = self.packed.table.device.type, self.packed.scales is not None, self._like[0]
        most = MOST_TOKENS.get(device, 0) if most_tokens is None else most_tokens
        self.most_tokens = min(most, 1 if device == "cuda" else 0) if int4 else most
        self.configuration, self.left = None, ()
        if self.takes(1) != "triton":
            # inductor refuses an operation that mutates a list of nothing
            self.work = (torch.empty(0, device=self.packed.table.device),)
            return
        from kernels import triton_gemv

        self.configuration = configuration or triton_gemv.Configuration(packing.COLUMNS if int4 else 64)
        self.work = ()  # free before as much is allocated
        if like is None:
            made = triton_gemv.workspace(self.packed, self.configuration, max(1, self.most_tokens))
            self.work = (made.partial, made.z, made.flags, made.scratch, made.values)
        else:
            self.work = like.work
        if self.next is not None:
            self._leave(self.next)

    def takes(self, tokens: int) -> str:
        """What computes for so many tokens: "triton", "cpu" or "dense", the plain product of s(x)."""
        device = self.packed.table.device.type
        if tokens > self.most_tokens or (device == "cuda" and not has_triton()):
            return "dense"
        return "triton" if device == "cuda" else "cpu"

    def _leave(self, weight: Tensor) -> None:
        """From now on leave what an RMS norm of this weight needs of y."""
        if self.takes(1) != "triton":
            return
        from kernels import triton_gemv

        self.next = weight
        if self._like[0] is not None and self._like[0].left:
            self.left = self._like[0].left
        else:
            made = triton_gemv.left(self.packed, self.configuration, max(1, self.most_tokens))
            self.left = (made.weighted, made.squares)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual: added to y, of its shape."""
        packed = self.packed
        _check(x, packed.channels, packed.dtype, packed.table.device)
        rows = x.reshape(-1, packed.channels).contiguous()
        path = self.takes(len(rows))
        if residual is not None:
            _check_residual(residual, x, self.width)
            residual = residual.reshape(len(rows), -1).contiguous()
        front, eps = self.norm or (None, 0.0)
        after = self._after[0]
        before = after.left if after is not None and path == after.takes(len(rows)) == "triton" else ()
        dispatched = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
        compute = torch.ops.rsparse_kernels.gemv if dispatched else _compute
        y = compute(
            rows, packed.table, packed.A, packed.B, packed.ranks, packed.thresholds, packed.scales, packed.norms,
            packed.bias, front, eps, residual, list(before), self.next, list(packed.widths), self.gated, path,
            self.configuration.numbers() if self.configuration else [], [*self.work, *self.left],
        )  # fmt: skip
        return y.view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"{self.packed.channels} -> {self.packed.widths}, {self.takes(1)}, {self.configuration}"


class Neurons(nn.Module):
    """The first half of an MLP, of the neurons that a token needs: gate and up (m, n) as stored, x (..., n) -> (.., m).

    CATS: neurons whose |SiLU(gate x)| is above `threshold`. GRIFFIN: the `chosen` ones, int32 (k,), for every token.
    norm: (weight, eps) of an RMS norm that x passes first. ValueError where the two weights differ in shape, dtype or
    device, or are no rows one behind another; for a norm or x of another width, dtype or device; for `chosen` that are
    none, and a threshold that is no number.
    """

    def __init__(self, gate: Tensor, up: Tensor, threshold: float = float("-inf"), chosen: Tensor | None = None,
                 norm: tuple[Tensor, float] | None = None):  # fmt: skip
        super().__init__()
        if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
            raise ValueError(f"gate is {_said(gate)} and up {_said(up)}; expected the same")
        if gate.ndim != 2 or gate.dtype not in packing.DTYPES:
            expected = f"(m, n), one of {', '.join(map(str, packing.DTYPES))}"
            raise ValueError(f"gate and up are {_said(gate)}; expected {expected}")
        for name, weight in (("gate", gate), ("up", up)):
            if not weight.is_contiguous():
                raise ValueError(f"{name} has strides {weight.stride()}; expected rows one behind another")
        if norm is not None:
            _check_norm(norm[0], gate.shape[1], gate.dtype, gate.device)
        if math.isnan(threshold):
            raise ValueError(f"threshold is {threshold}; expected a number")
        if chosen is not None and (chosen.device != gate.device or not _within(chosen, len(gate))):
            raise ValueError(
                f"chosen neurons are {_said(chosen)}; expected a list of at least one, int32, 0 to {len(gate) - 1}, on "
                f"{gate.device}"
            )
        self.gate, self.up, self.threshold, self.chosen, self.norm = gate, up, threshold, chosen, norm

    def takes(self, tokens: int) -> str:
        """ "triton" or "dense", as for `Gemv`."""
        return "triton" if self.gate.device.type == "cuda" and has_triton() and tokens == 1 else "dense"

    def forward(self, x: Tensor) -> Tensor:
        _check(x, self.gate.shape[1], self.gate.dtype, self.gate.device)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        front, eps = self.norm or (None, 0.0)
        y = torch.ops.rsparse_kernels.neurons(
            rows, self.gate, self.up, self.threshold, self.chosen, front, eps, self.takes(len(rows))
        )
        return y.view(*x.shape[:-1], -1)


def _within(chosen: Tensor, neurons: int) -> bool:
    if chosen.dtype != torch.int32 or chosen.ndim != 1 or not len(chosen):
        return False
    return bool(0 <= chosen.min() <= chosen.max() < neurons)


# Of shapes and dtypes alone: a decode step runs these, captured or compiled.


def _said(x: Tensor) -> str:
    return f"{tuple(x.shape)}, {x.dtype} on {x.device}"


def _check_norm(weight: Tensor, channels: int, dtype: torch.dtype, device: torch.device) -> None:
    if weight.shape != (channels,) or weight.dtype != dtype or weight.device != device:
        raise ValueError(f"the norm's weight is {_said(weight)}; expected ({channels},), {dtype} on {device}")


def _check(x: Tensor, channels: int, dtype: torch.dtype, device: torch.device) -> None:
    if not x.ndim or not x.numel() or x.shape[-1] != channels or x.dtype != dtype or x.device != device:
        raise ValueError(f"x is {_said(x)}; expected (..., {channels}), at least one token, {dtype} on {device}")


def _check_residual(residual: Tensor, x: Tensor, width: int) -> None:
    wanted = (*x.shape[:-1], width)
    if residual.shape != wanted or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(f"residual is {_said(residual)}; expected {wanted}, {x.dtype} on {x.device}, as y")


def _compute(
    x: Tensor, table: Tensor, A: Tensor, B: Tensor, ranks: Tensor, thresholds: Tensor, scales: Tensor | None,
    norms: Tensor | None, bias: Tensor | None, front: Tensor | None, eps: float, residual: Tensor | None,
    before: list[Tensor], next: Tensor | None, widths: list[int], gated: bool, path: str, configuration: list[int],
    work: list[Tensor],
) -> Tensor:  # fmt: skip
    packed = Packed(table, A, B, ranks, thresholds, tuple(widths), x.shape[1], norms, bias, scales)
    if path == "triton":
        from kernels import triton_gemv

        chosen = triton_gemv.Configuration.of(configuration)
        left = [triton_gemv.Left(*pair) if pair else None for pair in (before, work[5:])]
        return triton_gemv.gemv(x, packed, gated, chosen, triton_gemv.Workspace(*work[:5]), front, eps, residual,
                                left[0], next, left[1])  # fmt: skip
    if front is not None:
        x = reference.rms_norm(x, front, eps)
    return finish(_cpu(x, packed) if path == "cpu" else dense(x, packed), packed, gated, residual)


def _cpu(x: Tensor, packed: Packed) -> Tensor:
    from kernels import cpu  # with its compiler, which no GPU needs

    return cpu.gemv(x, packed)


_gemv = torch.library.custom_op("rsparse_kernels::gemv", _compute, mutates_args=("work",))


@_gemv.register_fake
def _(x, table, A, B, ranks, thresholds, scales, norms, bias, front, eps, residual, before, next, widths, gated, path,
      configuration, work):  # fmt: skip
    return x.new_empty(len(x), sum(widths) // 2 if gated else sum(widths))


@torch.library.custom_op("rsparse_kernels::neurons", mutates_args=())
def _neurons(x: Tensor, gate: Tensor, up: Tensor, threshold: float, chosen: Tensor | None, front: Tensor | None,
             eps: float, path: str) -> Tensor:  # fmt: skip
    if path == "triton":
        from kernels.triton_neurons import neurons

        return neurons(x[0], gate, up, threshold, chosen, front, eps)[None]
    if front is not None:
        x = reference.rms_norm(x, front, eps)
    if chosen is None:
        return reference.cats(x, gate, up, threshold)
    return reference.chosen(x, gate, up, chosen.long())


@_neurons.register_fake
def _(x, gate, up, threshold, chosen, front, eps, path):
    return x.new_empty(len(x), len(gate))


def dense(x: Tensor, packed: Packed) -> Tensor:
    """The segments side by side, without their bias, from dense products of s(x) and x - s(x): (tokens, n) ->
    (tokens, m). Reads every weight once."""
    found, columns = [], 0
    for i, (m, wide) in enumerate(zip(packed.widths, packed.padded, strict=True)):
        keep = ~(reference.scores(x, None if packed.norms is None else packed.norms[i]) <= packed.thresholds[i])
        own, z = torch.where(keep, x, 0), torch.where(keep, 0, x) @ packed.B[i].T
        found.append(own @ packing.weights(packed, i) + z @ packed.A[:, columns : columns + m])
        columns += wide
    return torch.cat(found, dim=1)


def finish(y: Tensor, packed: Packed, gated: bool, residual: Tensor | None) -> Tensor:
    """Bias, activation product and residual, as one launch of the Triton kernel applies them."""
    if packed.bias is not None:
        y = y + packed.bias.to(y.dtype)
    if gated:
        gate, up = y.chunk(2, dim=1)
        y = silu(gate) * up
    return y if residual is None else y + residual
