"""The fused linears of one block of real models, by name: what a decoder multiplies with at every token."""

from __future__ import annotations

from dataclasses import dataclass

SIZES = {  # name -> hidden, intermediate, columns of k and of v
    "llama-2-7b": (4096, 11008, 4096),
    "llama-3-8b": (4096, 14336, 1024),
    "mistral-7b": (4096, 14336, 1024),
    "llama-2-13b": (5120, 13824, 5120),
    "llama-3-70b": (8192, 28672, 1024),
}


@dataclass(frozen=True)
class Fused:
    """Linears that read one x: outputs of each (m), channels n, and whether they are gate and up."""

    name: str
    widths: tuple[int, ...]
    channels: int
    gated: bool = False

    @property
    def elements(self) -> int:
        return sum(self.widths) * self.channels


def fused(shape: str) -> tuple[Fused, ...]:
    """q/k/v, o, gate+up and down of a model. ValueError for a name that is not in `SIZES`."""
    if shape not in SIZES:
        raise ValueError(f"shape is {shape!r}; expected one of {', '.join(SIZES)}")
    hidden, intermediate, grouped = SIZES[shape]
    return (
        Fused("qkv", (hidden, grouped, grouped), hidden),
        Fused("o", (hidden,), hidden),
        Fused("gate+up", (intermediate, intermediate), hidden, gated=True),
        Fused("down", (hidden,), intermediate),
    )
