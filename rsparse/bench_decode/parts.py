"""What a decode step spends its time on: every part alone, over all blocks, as a step launches it.

The sum of the parts is not the step: on a GPU a launch overlaps with the end of the one before it, and what is compiled
crosses the borders of the parts. What is left over, of either sign, is reported too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kernels import timing
from rsparse.decode.decoder import Decoder
from rsparse.decode.steps import Steps

PRODUCTS = ("qkv", "out", "gated", "down")


@torch.no_grad()
def step_parts(steps: Steps, position: int, repeats: int = 5) -> dict[str, float]:
    """Seconds (medians) by part of one of `steps` at `position`; the cache's content there is lost.

    qkv, out, gated, down: the four products with their norm or sum. attention: rotation, cache and attention. head:
    last norm and lm_head. step: the whole. left: what the parts do not explain.
    """
    device = steps.position.device.type
    steps.position.fill_(position)
    calls = _calls(steps, position) | {"step": lambda: steps.launch(position)}
    found = {name: timing.measure([call], device, repeats, 1).p50 for name, call in calls.items()}
    return found | {"left": 2 * found["step"] - sum(found.values())}


def _calls(steps: Steps, position: int) -> dict[str, Callable[[], object]]:
    decoder, given = steps.decoder, _inputs(steps)

    def product(slot: str) -> Callable[[], None]:
        run = torch.compile(_call) if decoder.compiled else _call

        def over_blocks() -> None:
            for block, x in zip(decoder.blocks, given[slot], strict=True):
                run(getattr(block.step, slot), *x)

        return over_blocks

    attention = _attention(steps, [block.step.qkv(*x) for block, x in _blocks(decoder, given["qkv"])], position)
    products = {slot: product(slot) for slot in PRODUCTS}
    hidden = given["qkv"][0][0]
    return products | {"attention": attention, "head": lambda: decoder.lm_head(decoder.norm(hidden))}


def _inputs(steps: Steps) -> dict[str, list[tuple[Tensor, ...]]]:
    """Slot -> what every block's product is given: noise, and the neurons of noise."""
    decoder, a = steps.decoder, steps.decoder.architecture
    like, batch = decoder.embedding, steps.cache.batch
    hidden, heads = (torch.randn(batch, 1, width, device=like.device).to(like.dtype)
                     for width in (like.shape[1], a.heads * a.head_dim))  # fmt: skip
    same = [(hidden,)] * len(decoder.blocks)
    neurons = [(block.step.gated(*x), hidden) for block, x in _blocks(decoder, same)]
    return {"qkv": same, "out": [(heads, hidden)] * len(same), "gated": same, "down": neurons}


def _blocks(decoder: Decoder, given: list) -> Iterable[tuple]:
    return zip(decoder.blocks, given, strict=True)


def _attention(steps: Steps, qkv: list[Tensor], position: int) -> Callable[[], None]:
    decoder, cache = steps.decoder, steps.cache
    run = torch.compile(_call) if decoder.compiled else _call

    def over_blocks() -> None:
        attention = decoder.attention(steps.position, cache, steps.span(position), steps.exact(position))
        for index, x in enumerate(qkv):
            run(attention, x, *cache.layer(index))

    return over_blocks


def _call(product: Callable[..., Tensor], *x: Tensor) -> Tensor:
    return product(*x)
