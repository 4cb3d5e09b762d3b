"""`sparsify` and `restore`: put a method's modules in place of a model's, and back; and say what was done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rsparse import calibrate, planning
from rsparse.calibrate import Calibration
from rsparse.decompose import Factors, FactorStore, default_store
from rsparse.linears import KeptTally, Masked, SparseLinear
from rsparse.methods import Request
from rsparse.models import DecoderActivation, DecoderLinear, Place
from rsparse.neurons import SparseActivation
from rsparse.planning import Mask, Planned
from rsparse.prompted import PREFIX, PromptedLinear
from rsparse.protocol import TokenProtocol, Tokens, check_tokens
from rsparse.recipe import Ask, Recipe
from rsparse.report import LinearReport, Report
from rsparse.rotations import RotatedLinear
from rsparse.thresholds import THRESHOLDS
from rsparse.whitening import whitened

REALISED_TOKENS = 1024
"""`sparsify` measures the realised sparsity on as many calibration tokens, or on the first sample if
longer."""


@dataclass
class _State:
    """What hangs on a sparsified model, so that `restore` can undo it. masks: by the name of their place."""

    protocol: TokenProtocol
    handle: torch.utils.hooks.RemovableHandle
    masks: dict[str, tuple[Place, Masked]]
    report: Report | None


def sparsify(
    model: nn.Module,
    method: str = "r-sparse",
    sparsity: float = 0.5,
    rho: float = 0.95,
    score: str = "magnitude",
    threshold: str = "static",
    tokens: Tokens = "all",
    scope: str | None = None,
    calibration: Tensor | Calibration | None = None,
    recipe: Recipe | None = None,
    store: FactorStore | None = None,
    factors: str = "svd",
) -> Report:
    """Put `method` on `model`, a Hugging Face Llama or Mistral causal LM, in place.

    method: a name in METHODS. sparsity: model-level, in [0, 1). rho, score: of r-sparse; other methods fix
    their own. threshold: one of THRESHOLDS, see rsparse.calibrate. tokens: which positions are sparse, see
    rsparse.protocol. scope: "all", "mlp" or "attention"; None is the method's own, "all" but for those that were made
    for the MLP. calibration: token ids, LongTensor (samples, length), or a `Calibration` that several calls share;
    needed for static thresholds, whitened factors, and by some methods. recipe: overrides sparsity, rho, score,
    threshold and factors linear by linear (r-sparse only). store: where low-rank factors and rotations are kept between
    runs. factors: of r-sparse, one of `rsparse.decompose.FACTORS`.

    A model that is sparse already is restored first. Raises ValueError, with the model as it was, for a value
    that is not allowed, a sparsity that the method cannot reach (naming the largest that it can), and where the
    weights are not in memory.
    """
    chosen, scope = planning.check(model, method, scope, Ask(sparsity, rho, score, threshold, factors), recipe)
    check_tokens(tokens)
    with _from_dense(model):
        if calibration is not None or (chosen.calibrates and sparsity > 0):
            calibration = _check_calibration(model, calibration, f"{method} needs")
        store = store or default_store()
        request = Request(sparsity, rho, score, threshold, calibration, store, factors)
        planned = planning.plan(model, chosen, scope, request, recipe)
        calibrated = [x for x in planned.masks.values() if x.needs_threshold]
        calibration = _check_calibration(model, calibration, "static thresholds need") if calibrated else calibration
        made = _whitened(model, planned, calibration, store)
        protocol = TokenProtocol("all", PREFIX if chosen.prompted else 0)
        bar = tqdm(planned.masks.items(), desc="factors", leave=False, delay=2)  # nothing to see where they are stored
        masks = {name: (mask.place, _build(mask, planned, protocol, store, made)) for name, mask in bar}
        report = _report(planned, tokens, recipe, threshold, masks)
        _set_thresholds(model, calibration, calibrated, masks, lambda: _install(model, protocol, masks, report))
        report = _report(planned, tokens, recipe, threshold, masks)
        model._rsparse.report = report
        if calibrated or (math.isnan(report.planned) and calibration is not None):
            rows = max(1, REALISED_TOKENS // calibration.ids.shape[1])
            model._rsparse.report = report = measure(model, calibration.ids[:rows])
    protocol.tokens = tokens
    return report


def restore(model: nn.Module) -> None:
    """Hang the dense modules back: the same as before `sparsify`, bit for bit. Harmless on a dense model."""
    state = getattr(model, "_rsparse", None)
    if state is not None:
        _detach(model, state)


def report_of(model: nn.Module) -> Report | None:
    """The report of the method that is in place, or None for a dense model."""
    state = getattr(model, "_rsparse", None)
    return state and state.report


def protocol_of(model: nn.Module) -> TokenProtocol | None:
    """The token protocol of a sparsified model, or None where every linear is dense."""
    state = getattr(model, "_rsparse", None)
    return state.protocol if state and state.masks else None


def masks_of(model: nn.Module) -> dict[str, tuple[Place, Masked]]:
    """By name, every place where a mask hangs, and what hangs there; none for a dense model."""
    state = getattr(model, "_rsparse", None)
    return state.masks if state else {}


@contextmanager
def tokens_as(model: nn.Module, tokens: Tokens) -> Iterator[None]:
    """Inside, the sparsified `model` follows another token rule; without effect on a dense model."""
    protocol = protocol_of(model)
    before = protocol and protocol.tokens
    if protocol:
        protocol.tokens = check_tokens(tokens)
    try:
        yield
    finally:
        if protocol:
            protocol.tokens = before


@contextmanager
def counting(model: nn.Module) -> Iterator[Callable[[], Report]]:
    """Count kept channels in the forward passes inside; the yielded function gives the report with them.

    ValueError for a dense model.
    """
    with tallied(model, KeptTally) as tallies:
        report = report_of(model)
        lines = report.linears
        yield lambda: replace(report, linears=tuple(_with_tally(x, tallies.get(x.follows or x.name)) for x in lines))


Tally = TypeVar("Tally")


@contextmanager
def tallied(model: nn.Module, make: Callable[[], Tally]) -> Iterator[dict[str, Tally]]:
    """Inside, every mask of the sparsified `model` adds what it keeps to a ``make()`` of its own; by places' names.

    A tally has ``add(keep, counted)``, as `rsparse.linears.KeptTally`. ValueError for a dense model.
    """
    state = getattr(model, "_rsparse", None)
    if state is None:
        raise ValueError("the model is dense; expected one that sparsify was called on")
    tallies = {name: make() for name in state.masks}
    for name, (_, module) in state.masks.items():
        module.tally = tallies[name]
    try:
        yield tallies
    finally:
        for _, module in state.masks.values():
            module.tally = None


@contextmanager
def hung(model: nn.Module, masks: Mapping[str, tuple[Place, Masked]], protocol: TokenProtocol) -> Iterator[None]:
    """Inside, modules that no method puts there hang on the dense `model` and follow `protocol`; dense again after.

    masks: by the name of their place, each with where it hangs. There is no report of them.
    """
    calibrate.check_dense(model)
    _install(model, protocol, dict(masks), None)
    try:
        yield
    finally:
        restore(model)


def measure(model: nn.Module, ids: Tensor) -> Report:
    """The report with realised sparsity (mean, spread) of every linear over every position of `ids`.

    ids: LongTensor (samples, length). ValueError for a dense model or ids that are not token ids.
    """
    with counting(model) as realised, tokens_as(model, "all"):
        calibrate.run_decoder(model, calibrate.check_ids(ids, model, "ids"))
        return realised()


def _check_calibration(model: nn.Module, calibration: Tensor | Calibration | None, why: str) -> Calibration:
    if calibration is None:
        raise ValueError(f"calibration is None; {why} token ids, a LongTensor (samples, length)")
    if not isinstance(calibration, Calibration):
        calibration = Calibration(model, calibration)
    if calibration.model is not model:
        raise ValueError("calibration was gathered from another model object; expected one made for this model")
    return calibration


def _whitened(
    model: nn.Module, planned: Planned, calibration: Calibration | None, store: FactorStore
) -> dict[str, Factors]:
    """Factors by name of the places that have whitened ones."""
    masks = {name: mask for name, mask in planned.masks.items() if mask.whitened}
    if not masks:
        return {}
    calibration = _check_calibration(model, calibration, "whitened factors need")
    asked = {name: (x.place, x.norms, x.split.kept, x.split.rank) for name, x in masks.items()}
    return whitened(calibration, asked, store)


def _build(
    mask: Mask, planned: Planned, protocol: TokenProtocol, store: FactorStore, made: Mapping[str, Factors]
) -> Masked:
    """The module for a place, its threshold still open where one has to be calibrated."""
    dense, split = mask.place.module, mask.split
    if isinstance(mask.place, DecoderActivation):
        if planned.method.function:  # what it makes zero is off
            return SparseActivation(dense, split, protocol, threshold=0.0, function=planned.method.function())
        return SparseActivation(dense, split, protocol, mask.norms)
    if mask.rotation is not None:
        return RotatedLinear(dense, split, protocol, mask.rotation, mask.norms)
    if planned.method.prompted:
        return PromptedLinear(dense, split, protocol)
    factors = made.get(mask.place.name) or (store.get(dense.weight, split.rank) if split.rank else None)
    if factors is not None and hasattr(dense, "rounded"):  # INT4: factors in the precision that was counted
        factors = dense.rounded(factors)
    return SparseLinear(dense, split, protocol, factors, mask.norms)


def _set_thresholds(
    model: nn.Module, calibration: Calibration | None, open_: list[Mask], masks: dict, install: Callable[[], None]
) -> None:
    """Calibrate the thresholds of `open_`; ``install()`` puts the modules in place between the dense and the sparse
    passes."""
    groups = {name: [masks[x.place.name] for x in open_ if x.ask.threshold == name] for name in THRESHOLDS}
    calibrate.set_at_once(calibration, groups["static"] + groups["static-dense"])
    install()
    calibrate.settle(model, calibration, groups["static"])
    calibrate.set_in_order(model, calibration, groups["static-sequential"])


def _report(planned: Planned, tokens: Tokens, recipe: Recipe | None, threshold: str, masks: dict) -> Report:
    named = threshold if "threshold" in planned.method.takes else planned.method.fixed.get("threshold", "")
    lines = tuple(_line(x, planned, masks) for x in planned.linears)
    return Report(planned.method.name, planned.scope, recipe.name if recipe else "", tokens,
                  "recipe" if recipe else named, planned.asked, lines, planned.nominal)  # fmt: skip


def _line(linear: DecoderLinear, planned: Planned, masks: dict[str, tuple[Place, Masked]]) -> LinearReport:
    (m, n), ask = linear.shape, planned.asks[linear.name]
    base = LinearReport(
        linear.name, linear.layer, linear.kind, m, n, float(m * n * linear.weight_bytes), ask.sparsity, ask.rho,
        ask.score, kept=n, channels=n, rank=0, threshold=-math.inf, read=1.0, realised=0.0, spread=0.0,
    )  # fmt: skip
    follows = planned.follows.get(linear.name, "")
    mask = planned.masks.get(follows or linear.name)
    if mask is None:
        return base
    split, channels, module = mask.split, mask.place.channels, masks[mask.place.name][1]
    rank_read = split.read - Fraction(split.kept, channels)
    overhead = 0.0 if follows else float(mask.overhead + rank_read)
    read = split.kept / channels + overhead
    known = not mask.needs_threshold
    if planned.method.function:
        read, known = math.nan, False
    return replace(
        base, kept=split.kept, channels=channels, rank=0 if follows else split.rank,
        threshold=_threshold(module), read=read, overhead=overhead, follows=follows,
        realised=1 - read if known else math.nan, spread=0.0 if known else math.nan,
        factors=ask.factors if split.rank and not follows else "",
    )  # fmt: skip


def _threshold(module: Masked) -> float:
    if module.split.kept == 0:
        return math.inf
    return math.nan if module.threshold is None else module.threshold


def _with_tally(line: LinearReport, tally: KeptTally | None) -> LinearReport:
    if tally is None:
        return replace(line, realised=1 - line.read, spread=0.0)
    realised = 1 - line.overhead - tally.mean / line.channels
    return replace(line, realised=realised, spread=tally.spread / line.channels)


@contextmanager
def _from_dense(model: nn.Module) -> Iterator[None]:
    """The model dense inside; on an error, as it was before."""
    state = getattr(model, "_rsparse", None)
    restore(model)
    try:
        yield
    except BaseException:
        restore(model)
        if state is not None:
            _install(model, state.protocol, state.masks, state.report)
        raise


def _install(model: nn.Module, protocol: TokenProtocol, masks: dict, report: Report | None) -> None:
    for place, module in masks.values():
        place.exchange(module)
    model._rsparse = _State(protocol, protocol.attach(model.model), masks, report)


def _detach(model: nn.Module, state: _State) -> None:
    state.handle.remove()
    for place, _ in state.masks.values():
        place.exchange(place.module)
    del model._rsparse
