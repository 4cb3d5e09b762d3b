"""A Llama or Mistral decoder over a static cache: a whole prompt at once, then one token at a time.

Weights and norms are those of the Hugging Face model, referenced; the arithmetic is Hugging Face's too, so that tokens
can be compared with it one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsparse.decode.architecture import Architecture
from rsparse.decode.attention import Seen, angles, prompt_attention, rotary, rotate, step_attention
from rsparse.decode.cache import Cache, write_prompt, write_step
from rsparse.decode.projections import Builder, Projections


@dataclass(frozen=True)
class Block:
    """One decoder layer: its products for the prompt, and for a single token."""

    prompt: Projections
    step: Projections


class Decoder:
    """Hugging Face's `model`, causal LM and all, as blocks that `builder` made.

    Holds its tensors and modules but not the model itself. compiled: what `torch.compile` fuses of a single token's
    block, "block", "attention" or "" for nothing; one compilation serves all blocks.
    """

    def __init__(self, model: nn.Module, builder: Builder, compiled: str = ""):
        self.architecture = Architecture.of(model.config)
        self.embedding = model.model.embed_tokens.weight.detach()
        self.norm, self.lm_head = model.model.norm, model.lm_head
        self.blocks = [self._block(layer, builder) for layer in model.model.layers]
        self._rotary = rotary(model)
        self.cos = self.sin = self.embedding.new_empty(0, self.architecture.head_dim)
        self.compiled = compiled
        self._step = torch.compile(block_step) if compiled == "block" else block_step
        self.attend = torch.compile(attend) if compiled == "attention" else attend

    def _block(self, layer: nn.Module, builder: Builder) -> Block:
        found = Block(*builder(layer))
        if self.embedding.is_cuda:
            torch.cuda.empty_cache()  # what fusing freed, in pieces too small for the next layer's product
        return found

    def new_cache(self, batch: int, length: int, chunk: int) -> Cache:
        """An empty cache of `length` positions, in chunks, for `batch` rows; the table of angles grows with it."""
        length_of_table = min(length, self.architecture.positions)
        if len(self.cos) < length_of_table:
            self.cos, self.sin = angles(self._rotary, self.embedding, length_of_table)
        return Cache(self.architecture, batch, length, chunk, self.embedding.dtype, self.embedding.device)

    def prompt(self, ids: Tensor, cache: Cache) -> Tensor:
        """Fill the empty `cache` with `ids` (batch, length); logits (batch, vocabulary) of the last position."""
        a, (batch, length) = self.architecture, ids.shape
        x = F.embedding(ids, self.embedding)
        cos, sin = self.cos[:length], self.sin[:length]
        for index, block in enumerate(self.blocks):
            heads = block.prompt.qkv(x).view(batch, length, -1, a.head_dim).transpose(1, 2)
            turned, v = heads.split([a.heads + a.kv_heads, a.kv_heads], dim=1)
            q, k = rotate(turned, cos, sin).split([a.heads, a.kv_heads], dim=1)
            for stored, new in zip(cache.layer(index), (k, v), strict=True):
                write_prompt(stored, new)
            heads = prompt_attention(q, k, v, a.window).transpose(1, 2).reshape(batch, length, -1)
            x = block.prompt.out(heads, x)
            x = block.prompt.down(block.prompt.gated(x), x)
        cache.filled = length
        return self._logits(x[:, -1])

    def step(self, tokens: Tensor, position: Tensor, cache: Cache, seen: Seen) -> Tensor:
        """Logits (batch, vocabulary) after `tokens` (batch,), all at `position` (1,), of which the cache keeps keys
        and values. Nothing here waits for the device."""
        x = F.embedding(tokens[:, None], self.embedding)
        cos, sin = self.cos.index_select(0, position), self.sin.index_select(0, position)
        slot = position // cache.chunk, position % cache.chunk
        for index, block in enumerate(self.blocks):
            x = self._step(self, block, x, cos, sin, slot, *cache.layer(index), seen)
        return self._logits(x[:, 0])

    def _logits(self, x: Tensor) -> Tensor:
        return self.lm_head(self.norm(x))


def block_step(
    decoder: Decoder, block: Block, x: Tensor, cos: Tensor, sin: Tensor, slot: tuple[Tensor, Tensor], keys: Tensor,
    values: Tensor, seen: Seen,
) -> Tensor:  # fmt: skip
    """x (batch, 1, hidden) through one block; its key and value go to `slot` of keys and values, in place."""
    step = block.step
    heads = decoder.attend(decoder, step.qkv(x), cos, sin, slot, keys, values, seen)
    x = step.out(heads, x)
    return step.down(step.gated(x), x)


def attend(
    decoder: Decoder, qkv: Tensor, cos: Tensor, sin: Tensor, slot: tuple[Tensor, Tensor], keys: Tensor, values: Tensor,
    seen: Seen,
) -> Tensor:  # fmt: skip
    """qkv (batch, 1, q and k and v side by side) -> heads (batch, 1, heads times head_dim); key and value go to `slot`
    of keys and values, in place."""
    a, batch = decoder.architecture, len(qkv)
    turned, v = qkv.view(batch, -1, a.head_dim).split([a.heads + a.kv_heads, a.kv_heads], dim=1)
    q, k = rotate(turned, cos, sin).split([a.heads, a.kv_heads], dim=1)
    write_step(keys, k, slot)
    write_step(values, v, slot)
    return step_attention(q, keys, values, seen).reshape(batch, 1, -1)
