"""The dense model: nothing is skipped. The baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence

from rsparse.methods.base import Method, Request
from rsparse.models import DecoderLinear
from rsparse.recipe import DENSE, Ask


def plan(linears: Sequence[DecoderLinear], request: Request) -> dict[str, Ask]:
    """Every linear dense, whatever sparsity was asked for."""
    return {linear.name: DENSE for linear in linears}


METHOD = Method("dense", "the checkpoint as published", plan, takes=frozenset(), fixed={}, parts={})
