"""Inputs to measure with: Gaussian ones, heavy-tailed ones, and ones drawn from quantiles of real activations."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import torch
from torch import Tensor

KINDS = ("gaussian", "heavy", "published")
QUANTILES = Path(__file__).parents[1] / "data" / "paper" / "teal_activation_quantiles.csv.gz"
"""|x| of real models, by TEAL's authors; see data/paper."""
MODELS = {"llama-2-7b": "Llama-2-7B", "llama-2-13b": "Llama-2-13B", "llama-3-8b": "Llama-3-8B",
          "mistral-7b": "Mistral-7B", "llama-3-70b": "Llama-3-70B"}  # fmt: skip
PLACES = {"qkv": "attn_in", "o": "attn_out", "gate+up": "mlp_in", "down": "mlp_hidden"}


def draw(kind: str, size: tuple[int, ...], generator: torch.Generator, shape: str = "", linear: str = "") -> Tensor:
    """x of `size`, float32: "gaussian"; "heavy", Student's t with three degrees of freedom; or "published", |x| by the
    quantiles of `linear`'s input in the middle block of the model `shape`, signs at random.

    ValueError for another kind, or a model whose quantiles are not published.
    """
    if kind not in KINDS:
        raise ValueError(f"inputs are {kind!r}; expected one of {', '.join(KINDS)}")
    values = torch.randn(size, generator=generator)
    if kind == "heavy":
        squares = torch.randn(3, *size, generator=generator).square().sum(0)
        return values / (squares / 3).sqrt()
    if kind == "gaussian":
        return values
    return values.sign() * _inverse(torch.rand(size, generator=generator), shape, linear)


def _inverse(levels: Tensor, shape: str, linear: str) -> Tensor:
    """|x| at `levels`, linear between the published quantiles; the last percent goes on as steeply as before."""
    with gzip.open(QUANTILES, "rt", encoding="utf-8") as file:
        rows = [x for x in csv.DictReader(file) if x["model"] == MODELS.get(shape) and x["input"] == PLACES[linear]]
    if not rows:
        raise ValueError(f"no activation quantiles are published for {shape!r}; take other inputs")
    middle = max(int(x["layer"]) for x in rows) // 2
    points = sorted((float(x["quantile"]), float(x["abs_value"])) for x in rows if int(x["layer"]) == middle)
    slope = (points[-1][1] - points[-2][1]) / (points[-1][0] - points[-2][0])
    points = [(0.0, 0.0), *points, (1.0, points[-1][1] + slope * (1 - points[-1][0]))]
    at, value = (torch.tensor(column) for column in zip(*points, strict=True))
    right = torch.searchsorted(at, levels).clamp(1, len(at) - 1)
    share = (levels - at[right - 1]) / (at[right] - at[right - 1])
    return value[right - 1] + share * (value[right] - value[right - 1])
