"""Rotary embedding and grouped-query attention over the static cache, for a prompt and for one token, in torch.

On a GPU kernels.attention takes the place of `StepAttention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rsparse.decode.cache import write_step


def rotary(model: nn.Module) -> nn.Module:
    """The rotary embedding that the configuration of a Hugging Face `model` asks for, on its device: their own module,
    built anew, so that neither casts of the model nor longer texts before have a say."""
    return type(model.model.rotary_emb)(config=model.config).to(model.model.embed_tokens.weight.device)


@torch.no_grad()
def angles(rotary: nn.Module, like: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head_dim) of the positions 0.., dtype and device of `like`."""
    cos, sin = rotary(like, torch.arange(length, device=like.device)[None])
    return cos[0], sin[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., positions, head_dim) turned by the angles of cos and sin, (positions, head_dim)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention of a whole prompt, (batch, heads, positions, head_dim); k and v have kv_heads.

    window: how many of the last positions are seen, or None.
    """
    groups, positions = q.shape[1] // k.shape[1], q.shape[2]
    if groups > 1:  # few of the kernels take groups; the others would hold all scores
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if window is None or window >= positions:
        return scaled_dot_product_attention(q, k, v, is_causal=True)
    at = torch.arange(positions, device=q.device)
    seen = (at <= at[:, None]) & (at > at[:, None] - window)
    return scaled_dot_product_attention(q, k, v, attn_mask=seen)


@dataclass(frozen=True)
class Seen:
    """The cache's positions that one token attends to: first..last - 1, of those where `mask` (1, last - first)
    is True, or all of them."""

    first: int
    last: int
    mask: Tensor | None = None

    @classmethod
    def exactly(cls, position: int, window: int | None) -> Seen:
        """What the token at `position` sees, and nothing else."""
        return cls(0 if window is None else max(0, position + 1 - window), position + 1)

    @classmethod
    def within(cls, position: Tensor, span: int, window: int | None) -> Seen:
        """The first `span` positions, masked by where `position` (1,) lies on the device: a shape that many
        positions share."""
        at = torch.arange(span, device=position.device)[None]
        mask = at <= position
        return cls(0, span, mask if window is None else mask & (at > position - window))


@dataclass(frozen=True)
class StepAttention:
    """One token's attention at one position, for every layer.

    heads, kv_heads: of the queries, and of keys and values. cos, sin: (1, head_dim). slot: chunk (1,) and position in
    it (1,), on the device. seen: what the token attends to, itself among it.
    """

    heads: int
    kv_heads: int
    cos: Tensor
    sin: Tensor
    slot: tuple[Tensor, Tensor]
    seen: Seen

    def __call__(self, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """qkv (batch, 1, q and k and v side by side) -> (batch, 1, heads times head_dim); the token's key and value go
        into keys and values (chunks, batch, kv_heads, chunk, head_dim)."""
        batch, turning = len(qkv), self.heads + self.kv_heads
        turned, v = qkv.view(batch, turning + self.kv_heads, -1).split([turning, self.kv_heads], dim=1)
        q, k = rotate(turned, self.cos, self.sin).split([self.heads, self.kv_heads], dim=1)
        write_step(keys, k, self.slot)
        write_step(values, v, self.slot)
        return step_attention(q, keys, values, self.seen).reshape(batch, 1, -1)


def step_attention(q: Tensor, keys: Tensor, values: Tensor, seen: Seen) -> Tensor:
    """Attention of one token over the cache: q (batch, heads, head_dim), keys and values (chunks, batch, kv_heads,
    chunk, head_dim) -> (batch, heads, head_dim).

    The heads of a group are laid where a prompt has its positions: no key is repeated, and any kernel will do.
    """
    chunk = keys.shape[3]
    grouped = q.unflatten(1, (keys.shape[2], -1))
    if seen.last <= chunk:
        k, v = (x[0, :, :, seen.first : seen.last] for x in (keys, values))
        found = scaled_dot_product_attention(grouped, k, v, attn_mask=seen.mask)
    else:
        found = _chunked_attention(grouped, keys[: seen.last // chunk], values[: seen.last // chunk], seen.mask)
    return found.flatten(1, 2)


def _chunked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same for q (batch, kv_heads, groups, head_dim) over whole chunks, of which every one is a product of its own:
    kernels that give a head to one processor leave most of a GPU idle where there is one query.

    Softmax in float32, as Hugging Face's eager attention; partial sums are added in float32.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (chunks, batch, kv_heads, groups, chunk)
    scores = scores.float().movedim(0, -2).flatten(-2)  # (batch, kv_heads, groups, positions)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype)
    weights = weights.unflatten(-1, (len(k), -1)).movedim(-2, 0)
    return (weights @ v).sum(0, dtype=torch.promote_types(v.dtype, torch.float32)).to(v.dtype)
