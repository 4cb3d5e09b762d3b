"""Masks of one run, used again in another.

A channel whose score lies next to the threshold is kept or dropped by rounding, so that in 16 and 32 bits two right
programs part ways. With the masks of the one replayed in the other, what remains is rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from rsparse.apply import masks_of
from rsparse.linears import Masked

Tape = dict[str, list[Tensor]]
"""Place of a mask -> its masks (rows, positions, channels), one for each forward pass with sparse positions."""


@contextmanager
def recording(model: nn.Module) -> Iterator[Tape]:
    """Inside, the masks of the sparsified `model` are collected, pass by pass. ValueError for a dense model."""
    modules = _modules(model)
    tape: Tape = {name: [] for name in modules}

    def recorder(masks: list[Tensor]):
        def record(mask: Tensor) -> Tensor:
            masks.append(mask)
            return mask

        return record

    with _tapes({modules[name]: recorder(masks) for name, masks in tape.items()}):
        yield tape


@contextmanager
def replaying(model: nn.Module, tape: Tape) -> Iterator[None]:
    """Inside, the sparsified `model` uses the masks of `tape` in place of its own, pass by pass.

    ValueError for a dense model, other places, a pass that the tape does not hold or that has another shape, and where
    masks are left over.
    """
    modules = _modules(model)
    if set(modules) != set(tape):
        raise ValueError(f"the tape has {len(tape)} places, the model {len(modules)}; expected the same ones")
    used = dict.fromkeys(tape, 0)

    def player(name: str):
        def play(mask: Tensor) -> Tensor:
            at = used[name]
            if at == len(tape[name]) or tape[name][at].shape != mask.shape:
                found = "has ended" if at == len(tape[name]) else f"holds {tuple(tape[name][at].shape)}"
                raise ValueError(f"the tape of {name!r} {found} at pass {at}; expected {tuple(mask.shape)}")
            used[name] += 1
            return tape[name][at].to(mask.device)

        return play

    with _tapes({modules[name]: player(name) for name in tape}):
        yield
    if left := [name for name in tape if used[name] < len(tape[name])]:
        raise ValueError(f"the tape of {left[0]!r} has masks left over; expected as many passes as were recorded")


def _modules(model: nn.Module) -> dict[str, Masked]:
    found = {name: module for name, (_, module) in masks_of(model).items()}
    if not found:
        raise ValueError("the model is dense; expected one that sparsify was called on")
    return found


@contextmanager
def _tapes(by_module: dict) -> Iterator[None]:
    try:
        for module, tape in by_module.items():
            module.tape = tape
        yield
    finally:
        for module in by_module:
            module.tape = None
