"""Hugging Face's own generation, as a practitioner would call it: eager, or with a static cache and torch.compile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer

from rsparse.bench_decode.arrivals import Arrivals

BASELINES = ("hf-eager", "hf-static-compiled")
"""`generate` as it comes: a growing cache, one kernel after another. And with cache_implementation="static", whose
steps Hugging Face compiles ("reduce-overhead": CUDA graphs)."""


class _Stopwatch(BaseStreamer):
    """Notes when `generate` hands a token over; the first hand-over is the prompt."""

    def __init__(self) -> None:
        self.started, self.seconds, self._prompt = time.perf_counter(), [], True

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            self.seconds.append(time.perf_counter() - self.started)
        self._prompt = False

    def end(self) -> None:
        pass


def run(model: nn.Module, name: str, ids: Tensor, new: int) -> Arrivals:
    """One greedy generation of `new` tokens by the dense `model` after `ids` (batch, length) on its device."""
    options = {}
    if name == "hf-static-compiled":
        compiling = CompileConfig()
        compiling._compile_all_devices = True  # on a CPU too: it would be skipped without a word
        options = dict(cache_implementation="static", compile_config=compiling)
    with _endless(model):
        watch = _Stopwatch()
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                               streamer=watch, **options)  # fmt: skip
    if len(watch.seconds) != new:
        raise RuntimeError(f"{name} handed {new} tokens over in {len(watch.seconds)} parts; expected one by one")
    return Arrivals(tuple(watch.seconds), found[:, ids.shape[1] :].cpu())


def forget_compiled() -> None:
    """Drop what was compiled, and the memory that its graphs hold."""
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _endless(model: nn.Module) -> Iterator[None]:
    """Inside, no token ends a generation."""
    config, ends = model.generation_config, model.generation_config.eos_token_id
    config.eos_token_id = None
    try:
        yield
    finally:
        config.eos_token_id = ends
