"""A block's products by the sparse kernels: a single token reads the rows of its kept channels, and no others.

Weights move into the kernels' tables once, layer by layer. The model's own parameters, and the low-rank factors, become
views of the tables: the model is held once, and goes on computing what it did, up to the order in which a product of a
transposed weight adds up. Such parameters cannot be saved by `save_pretrained`, which wants rows one behind another:
save first. INT4 weights go into tables of words beside the numbers that they stand for, which compute the prompt; a CPU
has no kernel for words, and computes with those numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import packing
from kernels.operations import Gemv, Neurons, has_triton
from kernels.packing import Packed, Segment
from rsparse.apply import masks_of
from rsparse.decode import projections
from rsparse.decode.projections import Added, Fused, FusedGate, Normed, Projections
from rsparse.int4 import Int4Linear
from rsparse.linears import Masked, SparseLinear
from rsparse.neurons import SparseActivation
from rsparse.prompted import PromptedLinear

TUNED = 0.05
"""Shares of channels are rounded to a multiple when a configuration is looked up: layers of a recipe share a few."""

MOST_ROWS = 16
"""Rows of a batch: more are better served by an engine that fills and empties rows on the way. A GPU gathers for as
many: where they want nearly every channel together, that takes up to 1.9 times a dense product (H200, eight rows, 50%
each: data/results/kernels); the plain product of s(x) from a table takes a dozen launches."""


def unsupported(model: nn.Module) -> str | None:
    """Why the kernels cannot compute what hangs on the sparsified `model`; None where they can."""
    weight = model.model.embed_tokens.weight
    if weight.dtype not in packing.DTYPES:
        return f"weights are {weight.dtype}"
    if weight.device.type not in ("cpu", "cuda") or (weight.is_cuda and not has_triton()):
        return f"there is no kernel on {weight.device}"
    if (act := model.config.hidden_act) not in ("silu", "swish"):
        return f"the activation is {act}"
    int4 = has_words(model)
    reasons = (_unsupported(place.name, module, int4) for place, module in masks_of(model).values())
    return next((x for x in reasons if x), None)


def _unsupported(name: str, module: Masked, int4: bool) -> str | None:
    kind = type(module)
    if int4 and kind is not SparseLinear:
        return f"{name} is a {kind.__name__} of INT4 weights"
    if kind is PromptedLinear:
        return None if name.endswith("mlp.down_proj") else f"the prompt chooses channels of {name}"
    if kind is SparseActivation and (module.function is not module.dense or module.norms is not None):
        return f"{name} is switched off by another rule than |SiLU(gate)|"
    if kind not in (SparseLinear, SparseActivation):
        return f"{name} is a {kind.__name__}"
    if module.threshold is None and module.split.kept > 0:
        return f"{name} has a threshold for every token"
    return None


class Gathering:
    """The builder of one sparsified model, see rsparse.decode.projections.

    Linears of one shape share a configuration, tuned on a GPU where it was not before (kernels.tuning keeps it), and
    the memory of their partial sums: for one row at first, for more by `prepare`. Raises ValueError where `unsupported`
    says why.
    """

    def __init__(self, model: nn.Module):
        if reason := unsupported(model):
            raise ValueError(f"{reason}; expected what the kernels compute, or builder=rsparse.decode.reference")
        self._alike: dict[tuple, list[Gemv]] = {}
        self._rows = 1
        self._stream: Gemv | None = None  # what made the residual stream, where a kernel did

    def __call__(self, layer: nn.Module) -> tuple[Projections, Projections]:
        attention, mlp = layer.self_attn, layer.mlp
        as_hung, _ = projections.reference(layer)
        qkv = self._product([attention.q_proj, attention.k_proj, attention.v_proj], layer.input_layernorm, as_hung.qkv)
        out = self._product([attention.o_proj], None, as_hung.out)
        self._stream = _always(out[1])
        gated, down = self._mlp(mlp, layer.post_attention_layernorm, as_hung)
        self._stream = _always(down[1])
        slots = dict(qkv=qkv, out=out, gated=gated, down=down)
        return tuple(Projections(**{name: pair[i] for name, pair in slots.items()}) for i in (0, 1))

    def prepare(self, rows: int) -> None:
        """Cut the launches up anew for batches of so many rows, up to the next power of two: of many, most channels are
        wanted by some row, and every row has sums of its own. What was captured before is no longer valid."""
        rows = 1 << (rows - 1).bit_length()
        if rows == self._rows:
            return
        self._rows = 0  # until all is done: whoever is interrupted begins again
        for (*_, single, shares), alike in self._alike.items():
            first = alike[0]
            if first.takes(1) == "triton" and not single:
                chosen = _configuration(first.packed, first.gated, shares, first.norm, rows)
                for one in alike:
                    one.prepare(rows, chosen)
        self._rows = rows

    def _product(self, linears: Sequence[nn.Module], norm: nn.Module | None, as_hung: nn.Module) -> tuple:
        """Of linears that read one x, for the prompt and for a token; with a norm in front, or added to the residual
        stream. Dense linears alone stay one dense product, unless they are words."""
        if not any(isinstance(x, Masked) or _words(x) for x in linears):
            return _normed(norm, Fused(linears)) if norm is not None else (Added(linears[0]),) * 2
        return as_hung, self._gemv(linears, norm, as_hung)

    def _mlp(self, mlp: nn.Module, norm: nn.Module, as_hung: Projections) -> tuple[tuple, tuple]:
        """The MLP's two slots, each for the prompt and for a token."""
        gate, up, down, act = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn
        if isinstance(act, SparseActivation):  # CATS
            token = Neurons(as_rows(gate), as_rows(up), _threshold(act), norm=_front(norm))
            return (as_hung.gated, token), (as_hung.down, self._of_zeros(down))
        if isinstance(down, PromptedLinear):  # GRIFFIN
            chosen = torch.arange(down.split.kept, dtype=torch.int32, device=down.weight.device)
            token = Neurons(as_rows(gate), as_rows(up), chosen=chosen, norm=_front(norm))
            fewer = OneRow(token, as_hung.gated), OneRow(self._of_zeros(down, single=True), as_hung.down)
            return (as_hung.gated, fewer[0]), (Choosing(down, chosen), fewer[1])
        if not any(isinstance(x, Masked) or _words(x) for x in (gate, up)):
            return _normed(norm, FusedGate(gate, up, act)), self._product([down], None, as_hung.down)
        token = self._gemv([gate, up], norm, as_hung.gated, gated=True)
        return (as_hung.gated, token), self._product([down], None, as_hung.down)

    def _of_zeros(self, down: nn.Module, single: bool = False) -> Gemv:
        """Reads the columns of the neurons that are not 0."""
        segment = Segment(down.weight, 0.0, bias=down.bias)
        return self._packed([down], [segment], [down.weight.shape[1] / 2], None, False, single)

    def _gemv(self, linears: Sequence[nn.Module], norm: nn.Module | None, as_hung: nn.Module, gated: bool = False):
        """The kernel; of words, which it takes for one token alone, beside the modules as they hang."""
        kept = [x.split.kept if isinstance(x, Masked) else x.weight.shape[1] for x in linears]
        made = self._packed(linears, [_segment(x) for x in linears], kept, norm, gated)
        return made if made.packed.scales is None else OneRow(made, as_hung)

    def _packed(self, linears, segments: Sequence[Segment], kept: Sequence[float], norm, gated: bool,
                single: bool = False) -> Gemv:  # fmt: skip
        """kept: channels that each linear is expected to read. single: never asked for several rows."""
        packed = packing.pack(segments)
        view_of(packed, linears)
        shares = tuple(round(x / packed.channels / TUNED) * TUNED for x in kept)
        words = packed.scales is not None
        kind = packed.widths, packed.channels, packed.B.shape[1], packed.dtype, words, gated, norm is None
        key = *kind, single or words, shares
        alike = self._alike.setdefault(key, [])
        first = alike[0] if alike else None
        front, after = (norm and _front(norm)), (self._stream if norm is not None else None)
        configuration = first.configuration if first else _configuration(packed, gated, shares, front, self._rows)
        most = self._rows if packed.table.is_cuda else None
        alike.append(Gemv(packed, gated, front, configuration, most, like=first, after=after))
        return alike[-1]


def _normed(norm: nn.Module, product: nn.Module) -> tuple[Normed, Normed]:
    """A dense product behind a norm: of a prompt, and of a token."""
    return Normed(norm, product), Normed(Norm(*_front(norm)), product)


class Norm(nn.Module):
    """An RMS norm in one launch, in front of a token's products that stay dense: Hugging Face's takes six, which the
    dense engine has compiled away. In 16 bit it rounds once, where theirs rounds before the weight as well."""

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Choosing(nn.Module):
    """down of a prompt, which chooses the neurons that later tokens of a single row keep: GRIFFIN. `chosen` (k,) int32
    is written in place, where a CUDA graph reads it."""

    def __init__(self, down: PromptedLinear, chosen: Tensor):
        super().__init__()
        self.down, self.chosen = down, chosen

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        found = x + self.down(y)
        if len(y) == 1:
            self.chosen.copy_(self.down.chosen[0].nonzero()[:, 0])
        return found


class OneRow(nn.Module):
    """A kernel for a single row; the modules as they hang for several, each of which has chosen its own."""

    def __init__(self, kernel: nn.Module, as_hung: nn.Module):
        super().__init__()
        self.kernel, self.as_hung = kernel, as_hung

    @property
    def configuration(self):
        """Of the kernel, where it has one."""
        return getattr(self.kernel, "configuration", None)

    def forward(self, *x: Tensor) -> Tensor:
        return self.kernel(*x) if len(x[0]) == 1 else self.as_hung(*x)


def _always(token: nn.Module) -> Gemv | None:
    """The kernel behind `token`, if whatever comes next is a kernel for as many rows as it is."""
    kernel = token.kernel if isinstance(token, OneRow) else token
    words = isinstance(kernel, Gemv) and kernel.packed.scales is not None
    return kernel if isinstance(kernel, Gemv) and (words or kernel is token) else None


@torch.no_grad()
def view_of(packed: Packed, linears: Sequence[nn.Module]) -> None:
    """Let the weights, but for words, and factors of `linears` be views of the table that was packed from them."""
    for i, linear in enumerate(linears):
        begin, m = sum(packed.padded[:i]), packed.widths[i]
        if packed.scales is None:
            linear.weight.data = packing.weights(packed, i).T
        if getattr(linear, "A", None) is not None:
            rank = linear.A.shape[1]
            linear.A = packed.A[:rank, begin : begin + m].T
            linear.B = packed.B[i, :rank].T


@torch.no_grad()
def as_rows(linear: nn.Linear) -> Tensor:
    """The weight (m, n) of `linear`, row by row: laid so where it was the view of a table."""
    if not linear.weight.is_contiguous():
        linear.weight.data = linear.weight.contiguous()
    return linear.weight.detach()


def _configuration(packed: Packed, gated: bool, shares: Sequence[float], front: tuple[Tensor, float] | None,
                   rows: int):  # fmt: skip
    """Of the Triton kernel; None where another one computes."""
    if not packed.table.is_cuda:
        return None
    from kernels.tuning import configuration_for

    return configuration_for(packed, gated, shares, front, rows)


def _segment(linear: nn.Module) -> Segment:
    weight = _own(linear).quantized(linear.weight.dtype) if _words(linear) else linear.weight
    if not isinstance(linear, Masked):
        return Segment(weight, float("-inf"), bias=linear.bias)
    return Segment(weight, _threshold(linear), linear.A, linear.B, linear.norms, linear.bias)


def has_words(model: nn.Module) -> bool:
    """Whether the INT4 weights of `model` are where a kernel reads them as they are stored."""
    return any(_words(x) for x in model.modules() if isinstance(x, Int4Linear))


def _own(linear: nn.Module) -> nn.Module:
    """The linear behind its mask."""
    return linear.dense if isinstance(linear, Masked) else linear


def _words(linear: nn.Module) -> bool:
    """Whether a kernel reads its INT4 words."""
    return isinstance(_own(linear), Int4Linear) and linear.weight.is_cuda


def _threshold(module: Masked) -> float:
    return float("inf") if module.split.kept == 0 else float(module.threshold)


def _front(norm: nn.Module) -> tuple[Tensor, float]:
    """Weight and epsilon of a Llama's or Mistral's norm."""
    return norm.weight.detach(), norm.variance_epsilon
