"""Seconds of a call, measured so that weights come from memory: calls rotate over copies that outgrow every cache."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels import processors

CACHES = {"cuda": 128e6, "cpu": 1e9}
"""Bytes that no cache holds; the last cache of a large server has half a gigabyte."""
HELD = 3e9
"""Bytes of weights at most, if little of each is read: at 80% unread and beyond, a large CPU's cache may hold that."""
CALLS = 40
"""Of one CUDA graph."""


@dataclass(frozen=True)
class Times:
    """Quantiles of the seconds of one call. processors: of the time that threads wanted a processor, the share that
    they had one, see kernels.processors; NaN on a GPU, and where it is not known."""

    p20: float
    p50: float
    p80: float
    processors: float = math.nan


def copies(bytes_: float, device: str, unread: float = 0.0) -> int:
    """How many weights of `bytes_`, of which a call leaves a share `unread`, to rotate over."""
    wanted = math.ceil(CACHES[device] / max((1 - unread) * bytes_, 1)) + 1
    return max(2, min(wanted, int(HELD // max(bytes_, 1))))


def measure(calls: Sequence[Callable[[], object]], device: str, repeats: int = 20, in_graph: int = CALLS) -> Times:
    """Times of `calls`, which do the same on weights of their own; the first round is dropped.

    in_graph: calls of one CUDA graph, or as many as there are of `calls`.
    """
    if device == "cuda":
        found, had = _graph(calls, repeats, max(in_graph, len(calls))), math.nan
    else:
        found, had = _clock(calls, repeats)
    p20, *_, p80 = statistics.quantiles(found, n=5) if len(found) > 1 else found * 2
    return Times(p20, statistics.median(found), p80, had)


def _clock(calls: Sequence[Callable[[], object]], repeats: int) -> tuple[list[float], float]:
    for call in calls:
        call()
    found, before = [], processors.scheduled()
    for i in range(repeats):
        started = time.perf_counter()
        calls[i % len(calls)]()
        found.append(time.perf_counter() - started)
    return found, processors.share_of(before, processors.scheduled())


def _graph(calls: Sequence[Callable[[], object]], repeats: int, in_graph: int) -> list[float]:
    """One launch of a host costs more than a small kernel: a graph of many is replayed and its time divided."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(in_graph):
            calls[i % len(calls)]()
    found = []
    for i in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            found.append(begin.elapsed_time(end) / 1e3 / in_graph)
    return found


def bandwidth(device: str, bytes_: int = 1 << 30) -> float:
    """Bytes per second that a plain reading of memory reaches here."""
    data = torch.ones(bytes_ // 4, device=device)
    if device == "cuda":
        parts = data.chunk(4)
        return bytes_ / 4 / measure([part.sum for part in parts], device).p20
    return bytes_ / measure([data.sum], device, 5).p20
