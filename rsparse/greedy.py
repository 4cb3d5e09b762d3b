"""TEAL's block-wise greedy search: how a block's sparsity is divided between its linears.

TEAL (arXiv 2408.14690), Algorithm 1: begin with every linear dense; in each step give one of them the sparsity that
saves one step of the block's bytes, the one whose masking leaves the block's output closest to the dense one; until the
block is as sparse as asked. The inputs of a block are those of the dense model. As in the authors' code the error is
taken over the last quarter of the positions, per channel over positions and then averaged over channels and samples,
and masks come from quantiles of the dense inputs. Their step is 0.05 of q's bytes, 0.4% of a block; ours is a quarter
of the block's smallest linear, so that all can be chosen: 2.1% of a Llama-2-7B block, 0.5% of a Llama-3-8B block.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rsparse.accounting import Split
from rsparse.calibrate import Calibration, check_dense, hooks
from rsparse.files import write_json
from rsparse.linears import SparseLinear
from rsparse.models import DecoderLinear
from rsparse.paths import cache_folder
from rsparse.protocol import TokenProtocol
from rsparse.thresholds import ScoreStatistics

LEVELS = 4
"""Steps in which the smallest linear of a block would be read no longer."""
TOKENS = 4096
"""Calibration tokens that the search looks at, whole samples: at least one."""
LAST = 0.25
"""Share of the positions, from the end, over which the error is taken."""
VERSION = 2  # of what is kept on disk: count up when the search changes


def sparsities(calibration: Calibration, linears: Sequence[DecoderLinear], sparsity: float) -> dict[str, float]:
    """Sparsity of every linear, by name, such that every block's `linears` together have `sparsity` in [0, 1).

    The steps are kept in the cache folder by model, calibration tokens and linears; one search serves every smaller
    sparsity, and a larger one goes on from there. ValueError unless the model is dense.
    """
    kinds = "-".join(dict.fromkeys(x.kind for x in linears))
    path = cache_folder() / "greedy" / f"{calibration.key}-{kinds}-{LEVELS}-{TOKENS}-v{VERSION}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if kept.get("sparsity", -1.0) < sparsity:
        kept = {"sparsity": sparsity, "steps": search(calibration, linears, sparsity, kept.get("steps", {}))}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, kept)
    blocks = _blocks(linears)
    found: dict[str, float] = {}
    for layer, block in blocks.items():
        found |= after(kept["steps"][str(layer)], block, sparsity)
    return found


def after(steps: Sequence[str], block: Sequence[DecoderLinear], sparsity: float) -> dict[str, float]:
    """Sparsities of a block's linears, by name, after as many `steps` (kinds) as `sparsity` needs; of the last one, a
    part. Where no linear had room for another step, the rest is spread over what they still read."""
    by_kind, share, whole = {x.kind: x for x in block}, _shares(block), step_of(block)
    found, saved = {x.kind: 0.0 for x in block}, 0.0
    for kind in steps:
        step = min(whole, sparsity - saved)
        if step <= 0:
            break
        found[kind] += step / share[kind]
        saved += step
    if (rest := sparsity - saved) > 1e-12:  # no linear had room for a whole step
        found = {kind: value + (1 - value) * rest / (1 - saved) for kind, value in found.items()}
    return {by_kind[kind].name: min(math.ceil(value * 10**12) / 10**12, 1 - 1e-12) for kind, value in found.items()}


def step_of(block: Sequence[DecoderLinear]) -> float:
    """Share of the block's bytes that a step saves."""
    return min(_shares(block).values()) / LEVELS


def search(
    calibration: Calibration,
    linears: Sequence[DecoderLinear],
    sparsity: float,
    begun: Mapping[str, list[str]] | None = None,
) -> dict[str, list[str]]:
    """Layer -> kinds of linears in the order of the steps, up to `sparsity` of every block; the first are `begun`.

    One pass of the dense model over the calibration tokens, all at once; the search of a block takes place when its
    inputs come by, so that the activations of one block are held at a time.
    """
    check_dense(calibration.model)
    model, blocks = calibration.model, _blocks(linears)
    ids, started = calibration.ids[: max(1, TOKENS // calibration.ids.shape[1])], time.monotonic()
    found: dict[str, list[str]] = {}
    bar = tqdm(total=len(blocks), desc="greedy", leave=False)

    def watch(layer: int) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found[str(layer)] = _search_block(
                module, args, kwargs, blocks[layer], sparsity, list((begun or {}).get(str(layer), ()))
            )
            bar.update()

        return hook

    layers = model.model.layers
    handles = [layers[i].register_forward_pre_hook(watch(i), with_kwargs=True) for i in blocks]
    try:
        with torch.no_grad(), bar:
            model.model(input_ids=ids.to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    calibration.searched.append((ids.numel(), time.monotonic() - started))
    return found


def _search_block(
    layer: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    block: Sequence[DecoderLinear],
    sparsity: float,
    steps: list[str],
) -> list[str]:
    """`steps`, and as many more as `sparsity` needs."""

    def output() -> Tensor:
        found = layer.forward(*args, **kwargs)
        return found[0] if isinstance(found, tuple) else found

    share, step, done = _shares(block), step_of(block), {x.kind: 0.0 for x in block}
    statistics = {x.site: ScoreStatistics(x.channels, None, x.device) for x in block}
    firsts = {x.site: x for x in reversed(block)}
    with hooks(list(firsts.values()), lambda x, value: statistics[x.site].add(value)):
        target = output()
    modules = {x.kind: SparseLinear(x.module, Split(x.channels, 0, 1), TokenProtocol("all")) for x in block}
    sites, start = {x.kind: x.site for x in block}, int(target.shape[1] * (1 - LAST))

    def error(kind: str) -> float:
        """Of the block's output with one step more for `kind`."""
        before = modules[kind].threshold
        modules[kind].threshold = statistics[sites[kind]].quantile(done[kind] + step / share[kind])
        gap = (target - output())[:, start:].float()
        modules[kind].threshold, tried[kind] = before, modules[kind].threshold
        return float(torch.linalg.vector_norm(gap, dim=1).mean())

    for kind in steps:
        done[kind] += step / share[kind]
    for kind, module in modules.items():
        module.threshold = statistics[sites[kind]].quantile(done[kind])
    try:
        for x in block:
            x.exchange(modules[x.kind])
        while len(steps) * step < sparsity - 1e-12:
            tried: dict[str, float] = {}
            open_ = [kind for kind in done if done[kind] + step / share[kind] < 1 - 1e-9]
            if not open_:
                break
            best = min(open_, key=error)
            modules[best].threshold, done[best] = tried[best], done[best] + step / share[best]
            steps.append(best)
    finally:
        for x in block:
            x.exchange(x.module)
    return steps


def _blocks(linears: Sequence[DecoderLinear]) -> dict[int, list[DecoderLinear]]:
    blocks: dict[int, list[DecoderLinear]] = {}
    for x in linears:
        blocks.setdefault(x.layer, []).append(x)
    return blocks


def _shares(block: Sequence[DecoderLinear]) -> dict[str, float]:
    sizes = {x.kind: x.shape[0] * x.shape[1] for x in block}
    return {kind: size / sum(sizes.values()) for kind, size in sizes.items()}
