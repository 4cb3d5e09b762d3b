"""TEAL's own exhibits: perplexity and tasks under its protocol, its greedy choices, and the shape of what it cuts.

TEAL (arXiv 2408.14690), Figure 2, Section 4, Tables 1 and 2. In the authors' code the last half of a text is sparse,
and perplexity scores the last fifth of a window (512 tokens after 2048), all of it inside the sparse half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from rsparse import greedy, models, shapes
from rsparse.calibrate import MAGNITUDE
from rsparse.exhibits import paired
from rsparse.models import KINDS, DecoderLinear, decoder_linears
from rsparse.protocol import Tokens, check_tokens
from rsparse.study import DENSE, Setting, Study, check_some, describe
from rsparse.thresholds import ScoreStatistics

SUITES = ("teal", "tiny-teal")
SHARES = (0.25, 0.4, 0.5, 0.65)
"""Quantiles that are compared with the published ones: the thresholds of TEAL's sparsities."""
WIDEST, BINS = 4.0, 80
"""Histograms reach from 0 to so many times E|x|, in so many bins."""


@dataclass(frozen=True)
class Plan:
    """What the exhibit measures. ValueError, before anything is measured, for a value that is not allowed.

    sparsities: of every block, so of the model. tokens: which positions are sparse, TEAL's rule is -0.5. layers: whose
    histograms are drawn. seeds: each picks its own calibration windows, which the search sees too. suite: of SUITES.
    """

    sparsities: Sequence[float]
    tokens: Tokens
    threshold: str
    layers: Sequence[int]
    seeds: Sequence[int]
    suite: str

    def __post_init__(self) -> None:
        check_some("sparsities", self.sparsities, self.seeds)
        if 0 in self.sparsities:
            raise ValueError(f"sparsities are {self.sparsities}; expected none of 0, dense is measured anyway")
        if self.suite not in SUITES:
            raise ValueError(f"suite is {self.suite!r}; expected {' or '.join(map(repr, SUITES))}, TEAL's tasks")
        check_tokens(self.tokens)
        for sparsity in self.sparsities:
            self.settings(sparsity)

    def settings(self, sparsity: float) -> tuple[Setting, Setting]:
        """Uniform and greedy at one sparsity."""
        uniform, searched = (Setting(x, sparsity, threshold=self.threshold) for x in ("teal", "teal-greedy"))
        return uniform, searched

    @property
    def descending(self) -> list[float]:
        """The sparsities, the largest first: its search holds the steps of the smaller ones."""
        return sorted(self.sparsities, reverse=True)


def measure(study: Study, plan: Plan, published: pd.DataFrame) -> dict[tuple[int, str], np.ndarray]:
    """All rows of the exhibit into the study's table. Returns its histograms, as `activations`.

    published: as `paper.activation_quantiles`. ValueError, before anything is measured, for a layer that the model
    does not have, and for windows that outgrow its positions.
    """
    config = models.skeleton(study.sources.checkpoint).config
    if not plan.layers or not all(0 <= layer < config.num_hidden_layers for layer in plan.layers):
        raise ValueError(f"layers are {list(plan.layers)}; expected some of 0..{config.num_hidden_layers - 1}")
    if study.sources.window > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise ValueError(f"window is {study.sources.window}; expected at most {limit}, the model's positions")
    found = activations(study, plan, published)
    choose(study, plan)
    compare(study, plan)
    return found


def compare(study: Study, plan: Plan) -> None:
    """Perplexity and tasks of dense, uniform and greedy; each minus dense, and greedy minus uniform."""
    dense = paired.of(study, DENSE)
    dense.measure(plan.seeds)
    for sparsity in tqdm(plan.descending, desc="sparsities"):
        uniform, searched = (paired.of(study, x, plan.tokens, plan.tokens) for x in plan.settings(sparsity))
        for arm in (uniform, searched):
            arm.measure(plan.seeds)
            paired.add_differences(arm, dense, plan.seeds)
        paired.add_differences(searched, uniform, plan.seeds)


def choose(study: Study, plan: Plan) -> None:
    """Rows of what the search gives every linear, and of the mean over layers by kind, at every sparsity and seed."""
    for seed in plan.seeds:
        key = {"what": "greedy", "plan": [asdict(plan.settings(s)[1]) for s in plan.descending], "seed": seed}
        key |= {"study": study.identity}
        if study.table.find(key) is None:
            linears, calibration = decoder_linears(study.dense()), study.calibration(seed)
            found = {s: greedy.sparsities(calibration, linears, s) for s in plan.descending}
            costs = [{"what": "greedy", "seconds": x, "tokens": n} for n, x in calibration.searched]
            calibration.searched.clear()
            rows = []
            for sparsity, chosen in found.items():
                base = describe(plan.settings(sparsity)[1], study.sources) | {"seed": seed}
                rows += [base | row for row in _allocation(linears, chosen)]
            study.table.add(key, rows, costs=costs)


def _allocation(linears: Sequence[DecoderLinear], chosen: dict[str, float]) -> list[dict[str, Any]]:
    rows = [
        {"task": "allocation", "metric": "linear_sparsity", "layer": x.layer, "linear": x.kind, "value": chosen[x.name]}
        for x in linears
    ]
    for kind in KINDS:
        values = [chosen[x.name] for x in linears if x.kind == kind]
        rows.append({"task": kind, "metric": "sparsity_mean", "value": float(np.mean(values))})
    return rows


def activations(study: Study, plan: Plan, published: pd.DataFrame) -> dict[tuple[int, str], np.ndarray]:
    """Rows of quantiles and shape of |x| at every site of the dense model, over the first seed's calibration tokens.

    Metrics: abs_quantile at `SHARES`; misfit_gaussian and misfit_laplacian, see rsparse.shapes, and laplacian_lead, the
    first minus the second; where `published` has the model, quantile_gap, |ours / published - 1|. Returns
    (layer, site) -> histogram of the layers asked for, array (2, BINS): |x| / E|x| and its density.
    """
    seed, s = plan.seeds[0], study.sources
    key = {"what": "activations", "layers": list(plan.layers), "seed": seed, "study": study.identity}
    if (kept := study.table.find(key)) is None:
        model, calibration = study.dense(), study.calibration(seed)
        places = [x for x in decoder_linears(model) if x.kind in ("q", "o", "gate", "down")]  # one for each site
        with study.costing("calibrate", calibration.ids.numel()) as costs:
            calibration.gather([(x, MAGNITUDE) for x in places])
        theirs = published[published["model"] == s.name].set_index(["layer", "input", "quantile"])["abs_value"]
        about = describe(DENSE, s) | {"calibration": f"{s.calibration} {s.samples}x{s.length}", "seed": seed}
        rows, drawn = [], {}
        for x in places:
            statistics = calibration.statistics(x, MAGNITUDE)
            base = about | {"task": "activations", "layer": x.layer, "site": x.site}
            rows += [base | row for row in _shape(statistics)]
            rows += [base | row for row in _quantiles(statistics, theirs, (x.layer, x.site))]
            if x.layer in plan.layers:
                drawn[f"{x.layer} {x.site}"] = _histogram(statistics)
        kept = study.table.add(key, rows, drawn, costs)
    labels = ((label.split(), values) for label, values in kept["items"].items())
    return {(int(layer), site): np.array(values) for (layer, site), values in labels}


def _shape(statistics: ScoreStatistics) -> list[dict[str, Any]]:
    found = shapes.misfits(shapes.LEVELS, [statistics.quantile(share) for share in shapes.LEVELS])
    rows = [{"metric": f"misfit_{name}", "value": value} for name, value in found.items()]
    return [*rows, {"metric": "laplacian_lead", "value": found["gaussian"] - found["laplacian"]}]


def _quantiles(statistics: ScoreStatistics, theirs: pd.Series, place: tuple[int, str]) -> list[dict[str, Any]]:
    rows = []
    for share in SHARES:
        value = statistics.quantile(share)
        rows.append({"metric": "abs_quantile", "quantile": share, "value": value})
        if (*place, share) in theirs.index:
            gap = abs(value / theirs.loc[(*place, share)] - 1)
            rows.append({"metric": "quantile_gap", "quantile": share, "value": float(gap)})
    return rows


def _histogram(statistics: ScoreStatistics) -> list[list[float]]:
    scale = float(statistics.mean_abs.mean())
    edges = torch.linspace(0, WIDEST, BINS + 1, dtype=torch.float64)
    shares = statistics.below((scale * edges).float())
    density, centres = shares.diff() / edges.diff(), (edges[1:] + edges[:-1]) / 2
    return [[float(f"{value:.4g}") for value in row.tolist()] for row in (centres, density)]
