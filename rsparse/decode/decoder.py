"""A Llama or Mistral decoder over a static cache: a whole prompt at once, then one token at a time.

Weights and norms are those of the Hugging Face model, referenced; the arithmetic is Hugging Face's too, so that tokens
can be compared with it one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.attention import Attention, workspace
from rsparse.decode.architecture import Architecture
from rsparse.decode.attention import Seen, StepAttention, angles, prompt_attention, rotary, rotate
from rsparse.decode.cache import Cache, write_prompt
from rsparse.decode.projections import Builder, Projections


@dataclass(frozen=True)
class Block:
    """One decoder layer: its products for the prompt, and for a single token."""

    prompt: Projections
    step: Projections


class Decoder:
    """Hugging Face's `model`, causal LM and all, as blocks that `builder` made.

    Holds its tensors and modules but not the model itself. compiled: whether `torch.compile` fuses what lies between
    the products of a single token's block; one compilation serves all blocks.
    """

    def __init__(self, model: nn.Module, builder: Builder, compiled: bool = False):
        self.architecture = Architecture.of(model.config)
        self.embedding = model.model.embed_tokens.weight.detach()
        self.norm, self.lm_head = model.model.norm, model.lm_head
        self.blocks = [self._block(layer, builder) for layer in model.model.layers]
        self._rotary = rotary(model)
        self.cos = self.sin = self.embedding.new_empty(0, self.architecture.head_dim)
        self.compiled = compiled
        self._step = torch.compile(block_step) if compiled else block_step

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
        cache = Cache(self.architecture, batch, length, chunk, self.embedding.dtype, self.embedding.device)
        cache.work = workspace(cache.keys[0], self.architecture.heads)
        return cache

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

    def step(self, tokens: Tensor, position: Tensor, cache: Cache, span: int, at: int | None = None) -> Tensor:
        """Logits (batch, vocabulary) after `tokens` (batch,), all at `position` (1,), of which the cache keeps keys
        and values. Nothing here waits for the device. span, at: see `attention`."""
        x = F.embedding(tokens[:, None], self.embedding)
        attention = self.attention(position, cache, span, at)
        for index, block in enumerate(self.blocks):
            x = self._step(block, x, attention, *cache.layer(index))
        return self._logits(x[:, 0])

    def attention(self, position: Tensor, cache: Cache, span: int, at: int | None = None) -> StepAttention | Attention:
        """That of one token at `position` (1,), for every layer. span: positions of the cache that are looked at. at:
        the position, where the host may know it: then exactly what the token sees is looked at."""
        a = self.architecture
        if cache.work is not None:
            return Attention(position, self.cos, self.sin, a.heads, span, a.window, cache.work)
        cos, sin = self.cos.index_select(0, position), self.sin.index_select(0, position)
        seen = Seen.within(position, span, a.window) if at is None else Seen.exactly(at, a.window)
        slot = position // cache.chunk, position % cache.chunk
        return StepAttention(a.heads, a.kv_heads, cos, sin, slot, seen)

    def _logits(self, x: Tensor) -> Tensor:
        return self.lm_head(self.norm(x))


def block_step(
    block: Block, x: Tensor, attention: StepAttention | Attention, keys: Tensor, values: Tensor
) -> Tensor:
    """x (batch, 1, hidden) through one block; its key and value go into keys and values, in place."""
    step = block.step
    x = step.out(attention(step.qkv(x), keys, values), x)
    return step.down(step.gated(x), x)
