"""Figures 1 and 3: where the score S_ij = E|sigma_i x_j V_ji| of a linear is large, and against what.

R-Sparse (arXiv 2504.19449), sections 3.1 and 3.2. S factorises: S_ij = sigma_i |V_ji| E|x_j|. Its rows carry
the spectrum of W, its columns the mean activation, and only |V_ji| ties the two together. The paper sorts
rows and columns independently by their sums, which moves the mass of any matrix into a corner; the controls
say how much of the corner is sorting, how much is the spectrum, and how much is the activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from rsparse import models
from rsparse.calibrate import MAGNITUDE, Calibration
from rsparse.decompose import FactorStore, score_map, stable_rank
from rsparse.models import KINDS, DecoderLinear, decoder_linears
from rsparse.study import Study

CONTROLS = ("real", "gaussian-w", "permuted-x")
"""real: the model's W and x. gaussian-w: Gaussian W of equal norm, x as it is. permuted-x: W as it is, the
channels of x shuffled."""


@dataclass(frozen=True)
class ScoreMap:
    """S of one linear, shape (components, channels), and what it was made of; sigma: (components,)."""

    linear: DecoderLinear
    control: str
    S: Tensor
    sigma: Tensor

    def sorted(self) -> Tensor:
        """Rows and columns in descending order of their sums, as the paper draws it."""
        rows = self.S.sum(1).argsort(descending=True, stable=True)
        columns = self.S.sum(0).argsort(descending=True, stable=True)
        return self.S[rows][:, columns]

    def shares(self, p: float, q: float) -> dict[str, float]:
        """Shares of the summed S^2 that the top p of channels and the top q of components hold, in (0, 1].

        "both": the corner where they meet. "either": what the sparse and the low-rank path of R-Sparse could
        carry together. "channels", "components": each alone. Top by their share of S^2.
        """
        energy = self.S.double().square()
        channels = energy.sum(0).topk(max(1, round(p * energy.shape[1]))).indices
        components = energy.sum(1).topk(max(1, round(q * energy.shape[0]))).indices
        alone, other = energy[:, channels].sum(), energy[components].sum()
        corner = energy[components][:, channels].sum()
        parts = {"both": corner, "either": alone + other - corner, "channels": alone, "components": other}
        return {name: float(value / energy.sum()) for name, value in parts.items()}

    def unsorted_share(self, p: float, q: float) -> float:
        """Share of the summed S^2 in the first p of channels and q of components as they stand, unsorted."""
        energy = self.S.double().square()
        rows, columns = max(1, round(q * energy.shape[0])), max(1, round(p * energy.shape[1]))
        return float(energy[:rows, :columns].sum() / energy.sum())


def score_maps(calibration: Calibration, layer: int, store: FactorStore, seed: int = 0) -> Iterator[ScoreMap]:
    """The map of every linear of `layer` under every control, one at a time; E|x| as `calibration` has gathered it."""
    for linear in (x for x in decoder_linears(calibration.model) if x.layer == layer):
        generator = torch.Generator().manual_seed(1000 * seed + len(KINDS) * layer + KINDS.index(linear.kind))
        W, x = linear.module.weight.detach(), calibration.statistics(linear, MAGNITUDE).mean_abs
        gaussian = torch.randn(W.shape, generator=generator).to(W.device)
        gaussian *= W.double().norm().float() / gaussian.norm()
        shuffled = x[torch.randperm(len(x), generator=generator)]
        full, noise = (store.compute(weight, min(weight.shape)) for weight in (W, gaussian))
        for control, factors, activation in zip(CONTROLS, (full, noise, full), (x, x, shuffled), strict=True):
            yield ScoreMap(linear, control, score_map(factors, activation).cpu(), factors.sigma.cpu())


def measure(
    study: Study, layers: Sequence[int], cuts: Sequence[float]
) -> dict[tuple[str, int, str, str], np.ndarray]:
    """Rows of every linear of `layers` into the study's table, and its maps for display.

    cuts: shares p = q of channels and of components, in (0, 1]. Returns (linear kind, layer, control,
    "sorted" or "unsorted") -> array of at most 64 x 64. Raises ValueError, before anything is measured, for a cut
    outside (0, 1], for no layer, or for one that the model does not have.
    """
    depth = models.depth(study.sources.checkpoint)
    if bad := [cut for cut in cuts if not 0 < cut <= 1]:
        raise ValueError(f"cut is {bad[0]}; expected a share in (0, 1]")
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise ValueError(f"layers are {list(layers)}; expected some of 0..{depth - 1}")
    found = {}
    for layer in tqdm(layers, desc="layers"):
        for label, values in _measure_layer(study, layer, layers, cuts).items():
            kind, control, order = label.split()
            found[kind, layer, control, order] = np.array(values)
    return found


def _measure_layer(study: Study, layer: int, layers: Sequence[int], cuts: Sequence[float]) -> dict[str, list]:
    """Maps of one layer by "kind control order", from the table or measured; one pass calibrates all `layers`."""
    key = {"what": "score-map", "layer": layer, "cuts": list(cuts), "study": study.identity}
    if (kept := study.table.find(key)) is None:
        rows, maps, about = [], {}, {"seed": study.seed, "dtype": study.sources.dtype}
        calibration = study.calibration(study.seed)
        with study.costing("maps") as costs:
            linears = [x for x in decoder_linears(study.model) if x.layer in layers]
            calibration.gather([(x, MAGNITUDE) for x in linears])
            found = score_maps(calibration, layer, study.store, study.seed)
            for score in tqdm(found, total=len(CONTROLS) * len(KINDS), desc=f"maps of layer {layer}", leave=False):
                rows += share_rows(score, cuts, study.sources.name)
                label = f"{score.linear.kind} {score.control}"
                maps[f"{label} sorted"] = _digits(shrink(score.sorted()))
                maps[f"{label} unsorted"] = _digits(shrink(score.S))
                if score.control == "real":
                    rows.append(stable_rank_row(score, study.sources.name))
        kept = study.table.add(key, [row | about for row in rows], maps, costs)
    return kept["items"]


def share_rows(score: ScoreMap, cuts: Sequence[float], name: str) -> list[dict]:
    """Result rows: the shares at p = q = each cut; "both" at 10% is share_top10, the number that claims
    use."""
    base = {"model": name, "task": "score-map", "layer": score.linear.layer, "linear": score.linear.kind}
    rows = []
    for cut in cuts:
        metric = f"share_top{100 * cut:g}"
        for part, value in score.shares(cut, cut).items():
            suffix = "" if part == "both" else f"_{part}"
            rows.append(base | {"metric": metric + suffix, "value": value, "control": score.control})
        if score.control == "real":
            rows.append(
                base | {"metric": metric, "value": score.unsorted_share(cut, cut), "control": "unsorted"}
            )
    return rows


def stable_rank_row(score: ScoreMap, name: str) -> dict:
    """Result row: ||W||_F^2 / ||W||_2^2."""
    where = {"layer": score.linear.layer, "linear": score.linear.kind, "control": score.control}
    return {"model": name, "task": "score-map", "metric": "stable_rank", "value": stable_rank(score.sigma), **where}


def mean_shares(frame: pd.DataFrame, metric: str) -> pd.Series:
    """Mean over linears and layers of one share, by control."""
    part = frame[frame["metric"] == metric]
    return part.groupby("control")["value"].mean().reindex([*CONTROLS, "unsorted"])


def share_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean over linears and layers of the model's shares, in percent: one row per cut.

    Columns: top share (%), channels, components, corner, either.
    """
    part = frame[(frame["control"] == "real") & frame["metric"].str.startswith("share_top")]
    names = part["metric"].str.extract(r"^share_top(?P<cut>[0-9.]+)_?(?P<part>.*)$")
    wide = part.assign(
        cut=names["cut"].astype(float), part=names["part"].replace("", "corner"), percent=100 * part["value"]
    )
    wide = wide.pivot_table(index="cut", columns="part", values="percent")[
        ["channels", "components", "corner", "either"]
    ]
    return wide.rename_axis(None, axis=1).reset_index().rename(columns={"cut": "top share (%)"})


def rank_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Stable rank by layer (rows) and linear (columns)."""
    part = frame[frame["metric"] == "stable_rank"]
    wide = part.pivot_table(index="layer", columns="linear", values="value")[list(KINDS)]
    return wide.rename_axis(None, axis=1).reset_index()


def _digits(S: Tensor) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in S.tolist()]


def shrink(S: Tensor, size: int = 64) -> Tensor:
    """S averaged over blocks to at most (size, size), for display."""
    target = (min(size, S.shape[0]), min(size, S.shape[1]))
    return torch.nn.functional.adaptive_avg_pool2d(S[None, None], target)[0, 0]
