"""Bytes that one decode step has to read."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import nn

from rsparse.planning import dense_linears
from rsparse.replay import Tape
from rsparse.report import Report


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step. decoder: of the decoder linears, low-rank factors included; dense: of the same ones whole.
    head: of lm_head, always whole. rest: norms and the tokens' embeddings. cache: keys and values, at the mean length.
    """

    decoder: float
    dense: float
    head: float
    rest: float
    cache: float

    @property
    def weights(self) -> float:
        return self.decoder + self.head + self.rest

    @property
    def total(self) -> float:
        return self.weights + self.cache


def traffic(model: nn.Module, batch: int, cache: float, read: dict[str, float] | None = None) -> Traffic:
    """Of `batch` rows that share every weight that is read. read: linear -> share of its dense bytes, None for all.
    cache: bytes of keys and values."""
    sizes = {x.name: float(x.shape[0] * x.shape[1] * x.weight_bytes) for x in dense_linears(model)}
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    norms = [model.model.norm.weight, *(w for x in model.model.layers for w in _norms(x))]
    return Traffic(
        sum(size * (1.0 if read is None else read[name]) for name, size in sizes.items()), sum(sizes.values()),
        head.numel() * head.element_size(),
        sum(x.numel() * x.element_size() for x in norms) + batch * embedding[0].numel() * embedding.element_size(),
        cache,
    )  # fmt: skip


def read_shares(report: Report, tape: Tape) -> dict[str, float]:
    """Linear -> share of its dense bytes that a step reads: the union of the rows' masks of `tape`, mean over its
    passes, and what is read whatever the mask is."""

    def mean_union(masks: list[torch.Tensor]) -> float:
        return statistics.mean(float(mask.any(0).double().mean()) for mask in masks)

    union = {name: mean_union(masks) for name, masks in tape.items()}
    return {
        x.name: union[x.follows or x.name] + x.overhead if (x.follows or x.name) in union else 1.0
        for x in report.linears
    }


def _norms(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.input_layernorm.weight, layer.post_attention_layernorm.weight
