"""Appendix: how much the importance maps depend on how many texts, and on which, they were measured.

R-Sparse (arXiv 2504.19449), appendix, calls the maps of other sample counts and other data remarkably similar; no
public text quotes a number. The number here is Spearman's rank correlation of the entries of
S_ij = sigma_i |V_ji| E|x_j| with those of a reference, 16 samples in the paper. Most of S is the weight's, and the same
in both, so the map with the channels of x shuffled says how similar two maps are that share nothing but W; and E|x_j|,
the only part that a text can change, is correlated by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rsparse import harness, models, texts
from rsparse.calibrate import MAGNITUDE, collect
from rsparse.decompose import score_map
from rsparse.models import KINDS, DecoderLinear, decoder_linears
from rsparse.study import Study

SOURCES = ("calibration", "heldout", "tasks", "random tokens")
"""Texts: two of the study's `Sources`, the rows of its tasks (question and answer), and tokens drawn at random."""
CONTROLS = ("real", "permuted-x", "other-layer")
"""What is held against the reference: the map; the map with the channels of x shuffled; the map of another layer, the
one before it in the plan."""
COMPONENTS = 64
"""Rows of a map whose entries are correlated, evenly spaced among its components."""
TOP = 0.1


@dataclass(frozen=True)
class Plan:
    """What is compared. ValueError, before anything is measured, for a value that is not allowed.

    layers: depths. counts: numbers of samples of the calibration text, none of them the reference's. sources: others
    than the calibration text, with as many samples as the reference has (the study's `samples`).
    """

    layers: Sequence[int]
    counts: Sequence[int]
    sources: Sequence[str]

    def __post_init__(self) -> None:
        bad = [x for x in self.sources if x not in SOURCES[1:]]
        if not self.layers or not self.counts or min(self.counts) < 1 or bad:
            raise ValueError(f"{self}; expected some layers, counts of at least 1, and sources of {SOURCES[1:]}")


def measure(study: Study, plan: Plan) -> None:
    """Rows of every linear of the plan's layers. ValueError for a layer that the model does not have."""
    depth = models.depth(study.sources.checkpoint)
    if not all(0 <= layer < depth for layer in plan.layers):
        raise ValueError(f"layers are {list(plan.layers)}; expected some of 0..{depth - 1}")
    key = {"what": "importance", "plan": vars(plan), "study": study.identity}
    if study.table.find(key) is None:
        linears = [x for x in decoder_linears(study.dense()) if x.layer in plan.layers]
        pieces = list(_pieces(study, plan))
        with study.costing("importance", sum(ids.numel() for _, _, ids, _ in pieces)) as costs:
            means = activations(study.model, linears, pieces)
        with study.costing("maps") as more:
            rows = list(tqdm(_rows(study, linears, means), desc="maps", leave=False))
        s = study.sources
        about = {"model": s.name, "seed": study.seed, "dtype": s.dtype}
        study.table.add(key, [row | about for row in rows], costs=[*costs, *more])


Piece = tuple[str, int, Tensor, bool]
"""(source, samples so far, token ids of what is new, whether it goes on from the piece before)."""
REFERENCE = ("reference", 0)


def _pieces(study: Study, plan: Plan) -> Iterator[Piece]:
    """The reference's samples, then the calibration text in growing numbers, then the other sources."""
    s, counts = study.sources, sorted(plan.counts)
    shuffle = torch.Generator().manual_seed(study.seed)
    pool = texts.token_ids(
        s.calibration, "calibration", study.tokenizer, s.samples + counts[-1], s.length, study.seed
    )
    pool = pool[torch.randperm(len(pool), generator=shuffle)]
    yield *REFERENCE, pool[: s.samples], False
    for before, count in zip([0, *counts], counts, strict=False):
        yield "calibration", count, pool[s.samples + before : s.samples + count], before > 0
    for source in plan.sources:
        yield source, s.samples, source_ids(study, source), False


def source_ids(study: Study, source: str) -> Tensor:
    """LongTensor (samples, length) of one of `SOURCES`, as many samples as the study calibrates with."""
    s = study.sources
    if source == "random tokens":
        generator = torch.Generator().manual_seed(study.seed)
        ids = torch.randint(study.model.config.vocab_size, (s.samples, s.length), generator=generator)
        if study.tokenizer.bos_token_id is not None:
            ids[:, 0] = study.tokenizer.bos_token_id
        return ids
    if source == "tasks":
        return texts.windows(harness.row_texts(s.suite, s.items), study.tokenizer, s.samples, s.length, study.seed)
    name = s.heldout if source == "heldout" else s.calibration
    return texts.token_ids(name, source, study.tokenizer, s.samples, s.length, study.seed)


def activations(
    model, linears: Sequence[DecoderLinear], pieces: Sequence[Piece]
) -> dict[tuple[str, int], dict[tuple[int, str], Tensor]]:
    """(source, samples) -> (layer, site) -> E|x_j| (n,), float64; pieces that go on add to what came before them."""
    found: dict[tuple[str, int], dict[tuple[int, str], Tensor]] = {}
    sums: dict[tuple[int, str], Tensor] = {}
    tokens = 0
    for source, count, ids, goes_on in pieces:
        statistics = collect(model, ids, [(x, MAGNITUDE) for x in linears])
        new = {(layer, site): x.sum_abs for (layer, site, _), x in statistics.items()}
        sums = {at: new[at] + (sums[at] if goes_on else 0) for at in new}
        tokens = ids.numel() + (tokens if goes_on else 0)
        found[source, count] = {at: total / tokens for at, total in sums.items()}
    return found


def _rows(study: Study, linears: Sequence[DecoderLinear], means: Mapping) -> Iterator[dict[str, Any]]:
    """Rows of every linear: its maps against the reference's, under every control."""
    reference = means[REFERENCE]
    before: dict[str, Tensor] = {}
    for x in linears:
        weight = _weight_part(x, study)
        own = reference[x.layer, x.site].to(weight)
        generator = torch.Generator().manual_seed(1000 * study.seed + len(KINDS) * x.layer + KINDS.index(x.kind))
        shuffle = torch.randperm(x.channels, generator=generator).to(weight.device)
        base = {"task": "importance", "layer": x.layer, "linear": x.kind}
        ranked = ranks(weight * own)
        for (source, samples), sites in means.items():
            if (source, samples) != REFERENCE:
                mean, about = sites[x.layer, x.site].to(weight), base | {"source": source, "samples": samples}
                yield about | _of("similarity", "real", correlation(ranks(weight * mean), ranked))
                yield about | _of("similarity", "permuted-x", correlation(ranks(weight * mean[shuffle]), ranked))
                yield about | _of("similarity_activation", "real", spearman(mean, own))
                yield about | _of("overlap_top10", "real", overlap(mean, own))
        if x.kind in before:
            yield base | {"source": "", "samples": study.sources.samples} | _of(
                "similarity", "other-layer", correlation(before[x.kind], ranked)
            )
        before[x.kind] = ranked


def _of(metric: str, control: str, value: float) -> dict[str, Any]:
    return {"metric": metric, "control": control, "value": value}


def _weight_part(x: DecoderLinear, study: Study) -> Tensor:
    """sigma_i |V_ji| of `COMPONENTS` components, (components, n), float32."""
    W = x.module.weight.detach()
    factors = study.store.compute(W, min(x.shape))
    chosen = torch.linspace(0, factors.rank - 1, min(COMPONENTS, factors.rank)).round().long()
    return score_map(factors, torch.ones(x.channels))[chosen.to(W.device)]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of the entries of two tensors of one shape; entries that tie stand in order of their index."""
    return correlation(ranks(a), ranks(b))


def ranks(x: Tensor) -> Tensor:
    """Place of every entry among all, (entries,), float64; entries that tie stand in order of their index."""
    places = torch.arange(x.numel(), dtype=torch.float64, device=x.device)
    return torch.empty_like(places).scatter_(0, x.flatten().argsort(stable=True), places)


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two vectors of one length, Pearson's."""
    first, second = a - a.mean(), b - b.mean()
    return float((first @ second) / (first.norm() * second.norm()))


def overlap(a: Tensor, b: Tensor, share: float = TOP) -> float:
    """Share of the `share` largest entries of a (n,) that are among those of b; `share` by chance."""
    count = max(1, round(share * len(a)))
    tops = (set(x.topk(count).indices.tolist()) for x in (a, b))
    return len(set.intersection(*tops)) / count
