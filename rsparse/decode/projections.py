"""The four products of a decoder block, which are what a sparse model or a kernel exchanges.

    qkv    x -> q, k, v of norm(x), side by side
    out    heads, x -> x + out heads
    gated  x -> act(gate norm(x)) * up norm(x)
    down   neurons, x -> x + down neurons

x is the residual stream; norms and sums are part of the products, so that a kernel can take them along. Any callable
will do; all tensors are (batch, positions, channels). A builder makes two sets of a block, for the prompt and for
single tokens; where both are the same object, weights are held once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsparse.linears import Masked


@dataclass(frozen=True)
class Projections:
    """The products of one block."""

    qkv: Callable[[Tensor], Tensor]
    out: Callable[[Tensor, Tensor], Tensor]
    gated: Callable[[Tensor], Tensor]
    down: Callable[[Tensor, Tensor], Tensor]


Builder = Callable[[nn.Module], tuple[Projections, Projections]]
"""A Hugging Face decoder layer -> its products for the prompt, and for one token."""


class Normed(nn.Module):
    """A product of norm(x). Hugging Face's own norm is taken in float32 whatever the dtype."""

    def __init__(self, norm: nn.Module, product: nn.Module):
        super().__init__()
        self.norm, self.product = norm, product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.norm(x))


class Added(nn.Module):
    """A product, added to the residual stream."""

    def __init__(self, product: nn.Module):
        super().__init__()
        self.product = product

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return x + self.product(y)


class Fused(nn.Module):
    """Linears that read one x as one product.

    The weight is held once: the linears' own parameters become views of its rows, so that the Hugging Face model
    computes what it did, bit for bit, and writing to either writes to both. While it is made, the parts of this one
    product are in memory twice.
    """

    def __init__(self, linears: Sequence[nn.Linear]):
        super().__init__()
        self.weight = _side_by_side([x.weight for x in linears])
        biases = [x.bias for x in linears if x.bias is not None]
        if biases and len(biases) < len(linears):
            raise ValueError(f"{len(biases)} of {len(linears)} linears that share an input have a bias; expected all")
        self.bias = _side_by_side(biases) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., sum of m)."""
        return F.linear(x, self.weight, self.bias)


class FusedGate(Fused):
    """act(gate x) * up x from one product."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, act: nn.Module):
        super().__init__([gate, up])
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n) -> (..., neurons)."""
        gate, up = super().forward(x).chunk(2, dim=-1)
        return self.act(gate) * up


class Separate(nn.Module):
    """Modules that read one x, each by itself, side by side."""

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


class SeparateGate(nn.Module):
    """act(gate x) * up x from the modules as they hang."""

    def __init__(self, gate: nn.Module, up: nn.Module, act: nn.Module):
        super().__init__()
        self.gate, self.up, self.act = gate, up, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.gate(x)) * self.up(x)


def dense(layer: nn.Module) -> tuple[Projections, Projections]:
    """Of a dense decoder layer: two fused products and two plain ones, for every token.

    ValueError for a layer that `sparsify` changed.
    """
    attention, mlp = layer.self_attn, layer.mlp
    for name, module in (*attention.named_children(), *mlp.named_children()):
        if isinstance(module, Masked):
            raise ValueError(f"{name} is a {type(module).__name__}; expected a dense model, see rsparse.restore")
    return _around(layer, Fused([attention.q_proj, attention.k_proj, attention.v_proj]),
                   FusedGate(mlp.gate_proj, mlp.up_proj, mlp.act_fn))  # fmt: skip


def reference(layer: nn.Module) -> tuple[Projections, Projections]:
    """Of a decoder layer as `sparsify` left it: the evaluation's own modules, whose token protocol says what is sparse.

    Every method runs so, and every one reads all weights: it is what kernels are compared with, and no faster.
    """
    attention, mlp = layer.self_attn, layer.mlp
    return _around(layer, Separate([attention.q_proj, attention.k_proj, attention.v_proj]),
                   SeparateGate(mlp.gate_proj, mlp.up_proj, mlp.act_fn))  # fmt: skip


def _around(layer: nn.Module, qkv: nn.Module, gated: nn.Module) -> tuple[Projections, Projections]:
    """Both sets, with the layer's norms, and its o and down as they hang."""
    found = Projections(
        Normed(layer.input_layernorm, qkv), Added(layer.self_attn.o_proj),
        Normed(layer.post_attention_layernorm, gated), Added(layer.mlp.down_proj),
    )  # fmt: skip
    return found, found


@torch.no_grad()
def _side_by_side(parameters: Sequence[nn.Parameter]) -> Tensor:
    """(sum of m, ...), of whose rows `parameters` are views afterwards. Those that are already are left alone."""
    first, rows = parameters[0], sum(len(x) for x in parameters)
    if _adjacent(parameters):
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
    joined = torch.cat([x.detach() for x in parameters])
    for parameter, part in zip(parameters, joined.split([len(x) for x in parameters]), strict=True):
        parameter.data = part
    return joined


def _adjacent(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether they follow each other in one storage."""
    storage, at = parameters[0].untyped_storage().data_ptr(), parameters[0].storage_offset()
    for x in parameters:
        if x.untyped_storage().data_ptr() != storage or x.storage_offset() != at or not x.is_contiguous():
            return False
        at += x.numel()
    return True
