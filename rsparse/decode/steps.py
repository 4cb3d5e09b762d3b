"""One decode step after another over one cache: launched as it stands, or replayed as a CUDA graph.

A step of a 7B model is some four hundred launches of a few microseconds each, more than a host can keep up with; a
graph is one launch. It is captured once for each number of the cache's chunks that attention reads, so that a short
text does not pay for a long cache, and kept as long as the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rsparse.decode.cache import Cache
from rsparse.decode.decoder import Decoder

CHUNK = 512
"""Positions by which the part of the cache that a graph reads grows."""
WARM_UPS = 3
"""Steps on a side stream before a capture: libraries allocate, and kernels compile."""


class Steps:
    """decoder, cache: whose steps. graphs: capture and replay, on a GPU; else every kernel is launched. tokens (batch,)
    and position (1,) are what a step reads, on the device."""

    def __init__(self, decoder: Decoder, cache: Cache, graphs: bool):
        self.decoder, self.cache, self.graphs = decoder, cache, graphs
        device = decoder.embedding.device
        self.tokens = torch.zeros(cache.batch, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, tokens: Tensor, position: int) -> Tensor:
        """Logits (batch, vocabulary) after `tokens` (batch,) at `position`; valid until the next call."""
        self.tokens.copy_(tokens)
        self.position.fill_(position)
        logits = self._replay(self.span(position)) if self.graphs else self.launch(position)
        self.cache.filled = position + 1
        return logits

    def prepare(self, first: int, last: int) -> None:
        """Capture every graph that the positions first..last - 1 need. The cache's content there is lost."""
        for position in {*range(first, last, self.cache.chunk), last - 1} if self.graphs else ():
            self(self.tokens, position)
        self.cache.filled = 0

    def forget(self) -> None:
        """Capture anew whatever is asked for next: launches are about to be cut up otherwise."""
        self._captured.clear()

    def span(self, position: int) -> int:
        """Positions of the chunks up to that of `position`."""
        return (position // self.cache.chunk + 1) * self.cache.chunk

    def exact(self, position: int) -> int | None:
        """`position`, where what is launched may depend on it: for a cache in one piece, and not in a graph."""
        return position if self.cache.chunk == self.cache.length and not self.graphs else None

    def launch(self, position: int) -> Tensor:
        """A step of `self.tokens` at `self.position`, which is `position` or, in a graph, of the same span."""
        return self.decoder.step(self.tokens, self.position, self.cache, self.span(position), self.exact(position))

    def _replay(self, span: int) -> Tensor:
        if span not in self._captured:
            self._captured[span] = self._capture(span)
        graph, logits = self._captured[span]
        graph.replay()
        return logits

    def _capture(self, span: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Steps can be repeated: each writes the same key and value to the same position."""

        def step() -> Tensor:
            return self.launch(span - 1)

        with torch.cuda.device(self.tokens.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            shared = next(iter(self._captured.values()))[0].pool() if self._captured else None
            with torch.cuda.graph(graph, pool=shared):
                logits = step()
        return graph, logits
