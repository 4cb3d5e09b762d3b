"""One token's attention as an operation: what a decoder calls for every layer, where there is a Triton kernel for it.

`rsparse_kernels::attend` is registered with torch.library, as the products of kernels.operations are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.operations import has_triton
from kernels.packing import DTYPES


@dataclass(frozen=True)
class Attention:
    """At one position, for every layer: rotation, cache and softmax.

    position: (1,) on the device. cos, sin: angles of every position, (positions, head_dim). heads: of the queries.
    span: positions of the cache that are looked at; `position` lies in it. window: how many of the last positions are
    seen, itself among them; None for all. work: of `workspace`, whose launches share one stream.
    """

    position: Tensor
    cos: Tensor
    sin: Tensor
    heads: int
    span: int
    window: int | None
    work: tuple[Tensor, ...]

    def __call__(self, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """qkv (rows, 1, q and k and v side by side) -> (rows, 1, heads times head_dim); the token's key and value go
        into keys and values (chunks, rows, kv_heads, chunk, head_dim). ValueError where they do not fit."""
        wanted = (keys.shape[1], 1, (self.heads + 2 * keys.shape[2]) * keys.shape[4])
        if qkv.shape != wanted or qkv.dtype != keys.dtype or values.shape != keys.shape:
            expected = f"{wanted}, {keys.dtype}, as keys {tuple(keys.shape)} and values {tuple(values.shape)}"
            raise ValueError(f"q/k/v are {tuple(qkv.shape)}, {qkv.dtype}; expected {expected}")
        rows = qkv.reshape(len(qkv), -1).contiguous()
        y = torch.ops.rsparse_kernels.attend(
            rows, self.cos, self.sin, self.position, keys, values, self.heads, self.span, self.window, list(self.work)
        )
        return y[:, None]


def workspace(keys: Tensor, heads: int) -> tuple[Tensor, ...] | None:
    """Memory for launches over a cache like `keys` (chunks, rows, kv_heads, chunk, head_dim); None where no kernel
    takes it: elsewhere than on a GPU, for other dtypes, heads whose width is no power of two, chunks that tiles cross.
    """
    chunks, rows, _, chunk, dim = keys.shape
    if not keys.is_cuda or not has_triton() or keys.dtype not in DTYPES:
        return None
    from kernels.triton_attention import LARGEST, SMALLEST

    if dim < 16 or dim & (dim - 1) or chunk % LARGEST:
        return None
    left = rows * heads * chunks * chunk // SMALLEST
    return (
        torch.empty(left, dim, device=keys.device), torch.empty(left, 2, device=keys.device),
        torch.zeros(rows * heads, dtype=torch.int32, device=keys.device),
    )  # fmt: skip


@torch.library.custom_op("rsparse_kernels::attend", mutates_args=("keys", "values", "work"))
def _attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, keys: Tensor, values: Tensor, heads: int, span: int,
    window: int | None, work: list[Tensor],
) -> Tensor:  # fmt: skip
    from kernels.triton_attention import attend

    return attend(qkv, cos, sin, position, keys, values, heads, span, window, *work)


@_attend.register_fake
def _(qkv, cos, sin, position, keys, values, heads, span, window, work):
    return qkv.new_empty(len(qkv), heads * keys.shape[4])
