"""The bridge from phases to a low rank: the bias matrix of section 3.3, and the residuals that R-Sparse approximates.

R-Sparse (arXiv 2504.19449), section 3.3, quotes a stable rank of about 400 for the biases of 2000 tokens, and concludes
that a low rank can stand for what is dropped. What its method approximates are other vectors, W (x - s(x)), through the
singular vectors of W. Here both are measured, and the residuals' error at every rank with three sets of factors:
"svd", of W, which are deployed; "whitened", made for the residuals of calibration tokens (rsparse.whitening), which
cost the same; and "hindsight", the best for the very tokens that judge. All are judged on held-out text. The paper's
matrix has a row for every phase of a token; a linear adds them up. To compare like with like, these sums are measured
as well, beside the values that they stand for: of the same tokens, dropped by the same thresholds, a row for each token
on both sides. Everything comes from streamed second moments; of activations, no more than one sample's is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rsparse import models, phases
from rsparse.accounting import check_rho, check_sparsity, exact, split_budget
from rsparse.calibrate import MAGNITUDE, Calibration, hooks, run_decoder
from rsparse.decompose import Factors, FactorStore
from rsparse.models import DecoderLinear, decoder_linears
from rsparse.study import Study
from rsparse.whitening import output_basis, relative_errors, residual_moments, second_moment

FACTORS = ("svd", "whitened", "hindsight")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5)
"""Ranks, as shares of the smaller side of the weight, at which errors become rows."""
POINTS = 40
"""Ranks at which curves are drawn, evenly spaced by their logarithm."""


@dataclass(frozen=True)
class Plan:
    """What is asked. ValueError, before anything is measured, for a value that is not allowed.

    layers: depths. sparsity, rho: of the deployed method, whose kept channels decide the residual. share, count: of the
    bias matrix, the share of the inputs that take a level, and the number of phases; tokens: that it is made of.
    """

    layers: Sequence[int]
    sparsity: float
    rho: float
    share: float
    count: int
    tokens: int

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity), check_sparsity(self.share), check_rho(self.rho)
        if not self.layers or 0 in (self.sparsity, self.rho, self.share) or min(self.count, self.tokens) < 1:
            raise ValueError(f"{self}; expected some layers, shares above 0, and at least 1 phase and token")
        if self.rho == 1:
            raise ValueError("rho is 1; expected less, which leaves bytes to a low-rank path")


Moments = dict[tuple[str, str, str], tuple[Tensor, int]]
"""(task, site, side) -> second moment (n, n) of vectors, and how many they are."""
Curves = dict[tuple[int, str], dict[str, np.ndarray]]
"""(layer, linear) -> "ranks" of the curves, the error of each of `FACTORS` there, the "spectrum", and "deployed", the
rank that the budget buys."""


def measure(study: Study, plan: Plan) -> Curves:
    """Rows of every linear of the plan's layers, and the curves for display. ValueError, before anything is measured,
    for a layer that is absent and for a calibration text of fewer tokens than the bias matrix is made of."""
    depth, s = models.depth(study.sources.checkpoint), study.sources
    if not all(0 <= layer < depth for layer in plan.layers):
        raise ValueError(f"layers are {list(plan.layers)}; expected some of 0..{depth - 1}")
    if plan.tokens > s.samples * s.length:
        raise ValueError(f"tokens is {plan.tokens}; expected at most those of the calibration text, "
                         f"{s.samples} samples of {s.length}")  # fmt: skip
    found: Curves = {}
    for layer in tqdm(plan.layers, desc="layers"):
        for kind, curves in _measure_layer(study, plan, layer).items():
            found[layer, kind] = {name: np.array(values, float) for name, values in curves.items()}
    return found


def _measure_layer(study: Study, plan: Plan, layer: int) -> dict[str, dict[str, list]]:
    key = {"what": "residuals", "plan": vars(plan) | {"layers": layer}, "study": study.identity}
    if (kept := study.table.find(key)) is None:
        calibration, model = study.calibration(study.seed), study.dense()
        inside = [x for x in decoder_linears(model) if x.layer in plan.layers]
        linears = [x for x in inside if x.layer == layer]
        with study.costing("residuals", calibration.ids.numel() + study.heldout.numel()) as costs:
            calibration.gather([(x, MAGNITUDE) for x in inside])
            left = _residuals(study, plan, calibration, linears)
            biases = bias_moments(model, calibration.ids, linears, plan)
        rows, curves = [], {}
        with study.costing("maps") as more:
            for x in linears:
                own, curves[x.kind] = of_linear(x, plan, left[x.name], study.store)
                rows += [*own, *bias_rows(x, biases, plan, study.store)]
        s = study.sources
        about = {"model": s.name, "layer": layer, "seed": study.seed, "dtype": s.dtype, "threshold": "static-dense"}
        about |= {"calibration": f"{s.calibration} {s.samples}x{s.length}", "tokens": "all"}
        kept = study.table.add(key, [row | about for row in rows], curves, [*costs, *more])
    return kept["items"]


@dataclass(frozen=True)
class Left:
    """What a linear leaves to its low-rank path: second moments over calibration and held-out tokens, (n, n); and the
    energy E |W x|^2 of the linear's whole output on held-out tokens, a sum over them."""

    calibration: Tensor
    heldout: Tensor
    output: float


def _residuals(
    study: Study, plan: Plan, calibration: Calibration, linears: Sequence[DecoderLinear]
) -> dict[str, Left]:
    asked = []
    for x in linears:
        kept = split_budget(*x.shape, plan.sparsity, plan.rho, x.weight_bytes, x.factor_bytes).kept
        asked.append((x, None, calibration.statistics(x, MAGNITUDE).quantile(1 - kept / x.channels)))
    texts = calibration.ids, study.heldout
    found = [{name: C for names, C in residual_moments(study.model, ids, asked) for name in names} for ids in texts]
    energies = output_energies(study.model, study.heldout, linears)
    return {x.name: Left(found[0][x.name], found[1][x.name], energies[x.name]) for x in linears}


@torch.no_grad()
def output_energies(model: nn.Module, ids: Tensor, linears: Sequence[DecoderLinear]) -> dict[str, float]:
    """Linear -> sum over tokens of |W x|^2, in one pass over `ids` (samples, length)."""
    found = dict.fromkeys((x.name for x in linears), 0.0)

    def add(name: str, y: Tensor) -> None:
        found[name] = found[name] + y.to(torch.promote_types(y.dtype, torch.float32)).square().sum(dtype=torch.float64)

    handles = [x.hung.register_forward_hook(lambda m, a, y, name=x.name: add(name, y)) for x in linears]
    try:
        run_decoder(model, ids, "outputs")
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(value) for name, value in found.items()}


@torch.no_grad()
def of_linear(x: DecoderLinear, plan: Plan, left: Left, store: FactorStore) -> tuple[list[dict], dict[str, list]]:
    """Rows and curves of the residuals of one linear."""
    W, full = x.module.weight.detach(), min(x.shape)
    split = split_budget(*x.shape, plan.sparsity, plan.rho, x.weight_bytes, x.factor_bytes)
    errors, values = error_curves(W, left, store)
    base = {"task": "residual", "linear": x.kind, "sparsity": plan.sparsity, "rho": plan.rho, "kept": split.kept}
    stable, share = float(values.sum() / values[0]), float(values.sum() / left.output)
    rows = [base | {"metric": "stable_rank", "value": stable}]
    rows += [base | {"metric": "stable_rank_share", "value": stable / full}]
    rows += [base | {"metric": "residual_share", "value": share}]
    ranks = {"deployed": split.rank} | {f"{at:.0%}": max(1, int(exact(at) * full)) for at in SHARES}
    for factors, curve in errors.items():
        for at, rank in ranks.items():
            own = {"metric": "relative_error", "factors": factors, "at": at, "rank": rank, "value": float(curve[rank])}
            rows.append(base | own)
    drawn = np.unique(np.geomspace(1, full, POINTS).round().astype(int))
    curves = {"ranks": drawn.tolist(), "deployed": [split.rank]}
    curves |= {factors: [float(f"{v:.5g}") for v in curve[drawn].tolist()] for factors, curve in errors.items()}
    spectrum = (values / values[0]).sqrt().cpu()[drawn - 1]
    return rows, curves | {"spectrum": [float(f"{v:.5g}") for v in spectrum.tolist()]}


def error_curves(W: Tensor, left: Left, store: FactorStore) -> tuple[dict[str, Tensor], Tensor]:
    """Held-out relative errors (min(m, n) + 1,) of each of `FACTORS`, squared, by rank from 0; and the eigenvalues of
    the held-out residuals' second moment W C W^T, largest first."""
    plain = store.compute(W, min(W.shape))
    with store.timed(W):
        U = output_basis(W, left.calibration)[1]
    with store.timed(W):
        values, V = output_basis(W, left.heldout)
    made = {"svd": plain, "whitened": Factors(U, W.double().T @ U), "hindsight": Factors(V, W.double().T @ V)}
    return {name: relative_errors(W, left.heldout, factors) for name, factors in made.items()}, values


@torch.no_grad()
def bias_moments(model: nn.Module, ids: Tensor, linears: Sequence[DecoderLinear], plan: Plan) -> Moments:
    """Of the first `plan.tokens` tokens: "bias-matrix", the phase parts, one row per phase, the phase's level in its
    channels and zero elsewhere; "bias-sums", a token's parts added up; "dropped-values", what these stand for."""
    rows = -(-plan.tokens // ids.shape[1])
    firsts = {x.site: x for x in reversed(linears)}
    statistics = phases.collect(model, ids, linears)
    levels = {
        (site, side): statistics[x.layer, site].levels(plan.share, plan.count, side)
        for site, x in firsts.items()
        for side in phases.SIDES
    }
    found: Moments = {}

    def add(x: DecoderLinear, value: Tensor) -> None:
        for side in phases.SIDES:
            _, seen = found.get(("dropped-values", x.site, side), (0, 0))
            own, tokens = levels[x.site, side], value.flatten(0, -2)[: plan.tokens - seen]
            parts, dropped = own.parts(tokens), tokens * ~own.stays(tokens)
            vectors = {"bias-matrix": parts, "bias-sums": parts.sum(-2), "dropped-values": dropped}
            for task, v in vectors.items():
                moment, count = found.get((task, x.site, side), (0, 0))
                found[task, x.site, side] = moment + second_moment(v), count + v[..., 0].numel()

    with hooks(list(firsts.values()), add):
        run_decoder(model, ids[:rows], "biases")
    return found


def bias_rows(x: DecoderLinear, moments: Moments, plan: Plan, store: FactorStore) -> Iterator[dict[str, Any]]:
    """Rows of stable ranks of one linear: of W times each of the `moments` of its input, and of W itself."""
    W, full = x.module.weight.detach(), min(x.shape)
    eye = torch.eye(x.channels, dtype=torch.float64, device=W.device)
    matrices = {("weight", x.site, ""): (eye, None)} | {at: own for at, own in moments.items() if at[1] == x.site}
    for (task, _, side), (moment, count) in matrices.items():
        with store.timed(W):
            values = output_basis(W, moment)[0]
        stable = float(values.sum() / values[0])
        base = {"task": task, "linear": x.kind, "score": side}
        base |= {"sparsity": plan.share, "n": count} if side else {}
        base |= {"phases": plan.count} if task.startswith("bias") else {}
        yield base | {"metric": "stable_rank", "value": stable}
        yield base | {"metric": "stable_rank_share", "value": stable / full}
