"""Decoding with a static cache: a small engine for Llama and Mistral checkpoints, dense or sparse.

    architecture   what a configuration asks for, and what is refused
    cache          keys and values, allocated once
    attention      rotary embedding, grouped-query attention
    projections    a block's four products: what a sparse model or a kernel exchanges
    gathering      the same by the sparse kernels
    decoder        the blocks, for a prompt and for one token
    steps          one token after another; CUDA graphs
    sampling       from logits to a token
    engine         the loop, checks, streaming

In the spirit of gpt-fast (https://github.com/pytorch-labs/gpt-fast), for the checkpoints and modules of this library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rsparse.decode.engine import Engine, check_request
from rsparse.decode.projections import dense, reference
from rsparse.decode.sampling import Sampling
from rsparse.models import check_model

__all__ = ["Engine", "Sampling", "dense", "engine_of", "generate", "reference", "stream"]

_ENGINES: WeakKeyDictionary[nn.Module, Engine] = WeakKeyDictionary()


def engine_of(model: nn.Module) -> Engine:
    """The engine that `generate` decodes `model` with: made on first use, and again where method or weights have
    changed. Raises ValueError as `Engine`."""
    engine = _ENGINES.get(model)
    if engine is None or not engine.fits(model):
        _ENGINES.pop(model, None)
        engine = None  # its cache goes before another one comes
        engine = _ENGINES[model] = Engine(model)
    return engine


def generate(
    model: nn.Module,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue `ids` with `model`, a Hugging Face causal LM of the Llama or Mistral family, dense or sparsified.

    ids: LongTensor (batch, length), 1 to 16 prompts of one length. Returns LongTensor (batch, length + new), prompt
    included: `max_new_tokens` new ones, fewer where every row met a token of `stop` (None: the model's
    end-of-sequence tokens; (): never); rows that end earlier are padded. temperature 0 is greedy; above, tokens are
    drawn with `generator` from the `top_k` most likely ones, of these the `top_p` share. on_token: called with the new
    tokens, LongTensor (batch,), as they come. A sparsified model's prompt is dense, its other tokens sparse.

    ValueError, before anything is allocated, for a value that is not allowed, a configuration that is not computed
    here, and a text that does not fit; it names the value and what was expected. See `Engine`.
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check(model, ids, max_new_tokens, attention_mask, stop)
    return engine_of(model).generate(ids, max_new_tokens, sampling, generator, stop, attention_mask, on_token)


def stream(
    model: nn.Module,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """The new tokens of `generate` one by one, LongTensor (batch,) on the CPU; checks before the first one is asked
    for."""
    sampling = Sampling(temperature, top_k, top_p)
    _check(model, ids, max_new_tokens, attention_mask, stop)
    return engine_of(model).stream(ids, max_new_tokens, sampling, generator, stop, attention_mask)


def _check(
    model: nn.Module, ids: Tensor, new: int, attention_mask: Tensor | None, stop: Sequence[int] | None
) -> None:
    """What can be refused before an engine is made, which moves weights."""
    check_model(model)
    check_request(model, ids, new, None, attention_mask, stop)
