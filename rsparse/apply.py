"""`sparsify` and `restore`: put a method's linears in place of a model's, and back; and say what was done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rsparse import accounting, calibrate
from rsparse.accounting import Split
from rsparse.calibrate import Calibration
from rsparse.decompose import FactorStore, default_store
from rsparse.linears import KeptTally, SparseLinear
from rsparse.methods import METHODS, Request
from rsparse.models import SCOPES, DecoderLinear, check_model, decoder_linears, scope_share
from rsparse.protocol import TokenProtocol, Tokens, check_tokens
from rsparse.recipe import DENSE, Ask, Recipe
from rsparse.thresholds import THRESHOLDS, column_norms

REALISED_TOKENS = 1024
"""`sparsify` measures the realised sparsity on as many calibration tokens, or on the first sample if
longer."""


@dataclass(frozen=True)
class LinearReport:
    """What one linear was asked for and got. realised, spread: sparsity over tokens (mean, std), NaN if
    unmeasured."""

    name: str
    layer: int
    kind: str
    m: int
    n: int
    dense_bytes: float
    sparsity: float
    rho: float
    score: str
    kept: int
    rank: int
    threshold: float  # -inf: dense; +inf: no sparse path; NaN: per token
    read: float
    realised: float = math.nan
    spread: float = math.nan


@dataclass(frozen=True)
class Report:
    """What `sparsify` did. Sparsities are model-level: 1 - bytes read by decoder linears / their dense
    bytes."""

    method: str
    scope: str
    recipe: str
    tokens: Tokens
    threshold: str
    asked: float
    linears: tuple[LinearReport, ...]

    @property
    def planned(self) -> float:
        """By the kept channels and ranks; at least the asked one for methods that take a budget."""
        return accounting.model_sparsity(
            [x.dense_bytes for x in self.linears], [x.read for x in self.linears]
        )

    @property
    def realised(self) -> float:
        """Mean over the tokens it was measured on; NaN where nothing was."""
        return accounting.model_sparsity(
            [x.dense_bytes for x in self.linears], [1 - x.realised for x in self.linears]
        )

    @property
    def spread(self) -> float:
        """Largest standard deviation over tokens among the linears."""
        return max(x.spread for x in self.linears)

    @property
    def worst(self) -> LinearReport:
        """The linear whose realised sparsity is furthest from its planned one."""
        return max(self.linears, key=lambda x: abs(x.realised - (1 - x.read)))

    def table(self) -> pd.DataFrame:
        """One row per linear."""
        return pd.DataFrame([vars(x) for x in self.linears])

    def __str__(self) -> str:
        text = (
            f"{self.method}, scope {self.scope}: sparsity asked {self.asked:.4f}, planned {self.planned:.4f}"
        )
        if not math.isnan(self.realised):
            worst = self.worst
            text += f", realised {self.realised:.4f} (worst linear {worst.name}: {worst.realised:.4f})"
        return text


@dataclass
class _State:
    """What hangs on a sparsified model, so that `restore` can undo it."""

    protocol: TokenProtocol
    handle: torch.utils.hooks.RemovableHandle
    replaced: list[tuple[DecoderLinear, SparseLinear]]
    report: Report


def sparsify(
    model: nn.Module,
    method: str = "r-sparse",
    sparsity: float = 0.5,
    rho: float = 0.95,
    score: str = "magnitude",
    threshold: str = "static",
    tokens: Tokens = "all",
    scope: str = "all",
    calibration: Tensor | Calibration | None = None,
    recipe: Recipe | None = None,
    store: FactorStore | None = None,
) -> Report:
    """Replace the decoder linears of `model`, a Hugging Face Llama or Mistral causal LM, in place.

    method: a name in METHODS. sparsity: model-level, in [0, 1). rho, score: of r-sparse; other methods fix
    their own. threshold: one of THRESHOLDS, see rsparse.calibrate. tokens: which positions are sparse, see
    rsparse.protocol. scope: "all", "mlp" or "attention". calibration: token ids, LongTensor (samples, length),
    or a `Calibration` that several calls share; needed for static thresholds. recipe: overrides sparsity, rho,
    score and threshold linear by linear (r-sparse only). store: where low-rank factors are kept between runs.

    A model that is sparse already is restored first. Raises ValueError, with the model as it was, for a value
    that is not allowed; ValueError too where the weights are not in memory.
    """
    asks, linears = _plan(model, method, sparsity, rho, score, threshold, scope, recipe)
    check_tokens(tokens)
    splits = {x.name: _split(x, asks[x.name]) for x in linears}
    calibrated = [x for x in linears if _needs_calibration(asks[x.name], splits[x.name])]
    calibration = _check_calibration(model, calibration) if calibrated else None
    norms = {x.name: _norms(x, asks[x.name]) for x in linears}
    with _from_dense(model):
        protocol, store = TokenProtocol("all"), store or default_store()
        sparse = [x for x in linears if asks[x.name].sparsity > 0]
        bar = tqdm(sparse, desc="factors", leave=False, delay=2)  # nothing to see where they are stored
        modules = {x.name: _build(x, splits[x.name], norms[x.name], protocol, store) for x in bar}
        by_threshold = {name: [x for x in calibrated if asks[x.name].threshold == name] for name in THRESHOLDS}
        at_once = by_threshold["static"] + by_threshold["static-dense"]
        calibrate.set_at_once(calibration, at_once, norms, modules)
        report = Report(method, scope, recipe.name if recipe else "", tokens,
                        "recipe" if recipe else threshold, _asked(linears, asks), ())  # fmt: skip
        _install(model, protocol, [(x, modules[x.name]) for x in sparse], report)
        calibrate.settle(model, calibration, by_threshold["static"], norms)
        calibrate.set_in_order(model, calibration, [modules[x.name] for x in by_threshold["static-sequential"]])
        lines = (_line(x, asks[x.name], splits[x.name], modules.get(x.name)) for x in linears)
        model._rsparse.report = report = replace(report, linears=tuple(lines))
        if calibrated:
            rows = max(1, REALISED_TOKENS // calibration.ids.shape[1])
            model._rsparse.report = report = measure(model, calibration.ids[:rows])
    protocol.tokens = tokens
    return report


def restore(model: nn.Module) -> None:
    """Hang the dense linears back: the same modules as before `sparsify`, bit for bit. Harmless on a dense
    model."""
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
    return state.protocol if state and state.replaced else None


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
    state = getattr(model, "_rsparse", None)
    if state is None:
        raise ValueError("the model is dense; expected one that sparsify was called on")
    tallies = {linear.name: KeptTally() for linear, _ in state.replaced}
    for linear, module in state.replaced:
        module.tally = tallies[linear.name]
    lines = state.report.linears
    try:
        yield lambda: replace(state.report, linears=tuple(_with_tally(x, tallies.get(x.name)) for x in lines))
    finally:
        for _, module in state.replaced:
            module.tally = None


def measure(model: nn.Module, ids: Tensor) -> Report:
    """The report with realised sparsity (mean, spread) of every linear over every position of `ids`.

    ids: LongTensor (samples, length). ValueError for a dense model or ids that are not token ids.
    """
    with counting(model) as realised, tokens_as(model, "all"):
        calibrate.run_decoder(model, calibrate.check_ids(ids, model, "ids"))
        return realised()


def _plan(
    model, method, sparsity, rho, score, threshold, scope, recipe
) -> tuple[dict[str, Ask], list[DecoderLinear]]:
    """Check the request; what is asked of every decoder linear, and the dense linears themselves."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    check_model(model)
    linears = _dense_linears(model)
    share = scope_share(linears, scope)
    if meta := [x.name for x in linears if x.module.weight.device.type == "meta"]:
        raise ValueError(
            f"the weight of {meta[0]!r} is not in memory; expected a model loaded without offloading"
        )
    Ask(sparsity, rho, score, threshold)
    inside = [x for x in linears if x.kind in SCOPES[scope]]
    if recipe is not None:
        if not METHODS[method].takes_recipe:
            raise ValueError(f"method {method!r} takes no recipe; expected r-sparse")
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipe is {recipe!r}; expected a Recipe, see Recipe.load")
        recipe.check(model)
        return recipe.within(SCOPES[scope]).linears, linears
    local = accounting.scoped_sparsity(sparsity, share, scope)
    request = Request(local, rho, score, threshold)
    return {x.name: DENSE for x in linears} | METHODS[method].plan(inside, request), linears


def _dense_linears(model: nn.Module) -> list[DecoderLinear]:
    """The decoder linears as they were before any method, without touching the model."""
    linears = decoder_linears(model)
    return [replace(x, module=x.module.dense) if isinstance(x.module, SparseLinear) else x for x in linears]


def _split(linear: DecoderLinear, ask: Ask) -> Split:
    return accounting.split_budget(*linear.shape, ask.sparsity, ask.rho, linear.weight_bytes)


def _needs_calibration(ask: Ask, split: Split) -> bool:
    return ask.sparsity > 0 and ask.threshold != "per-token" and split.kept > 0


def _norms(linear: DecoderLinear, ask: Ask) -> Tensor | None:
    return column_norms(linear.module.weight) if ask.score == "column-norm" and ask.sparsity > 0 else None


def _check_calibration(model: nn.Module, calibration: Tensor | Calibration | None) -> Calibration:
    if calibration is None:
        raise ValueError("calibration is None; static thresholds need token ids, a LongTensor (samples, length)")
    if not isinstance(calibration, Calibration):
        calibration = Calibration(model, calibration)
    if calibration.model is not model:
        raise ValueError("calibration was gathered from another model object; expected one made for this model")
    return calibration


def _build(
    linear: DecoderLinear, split: Split, norms: Tensor | None, protocol: TokenProtocol, store: FactorStore
) -> SparseLinear:
    factors = store.get(linear.module.weight, split.rank) if split.rank else None
    return SparseLinear(linear.module, split, protocol, factors, norms)


def _threshold(module: SparseLinear | None, split: Split) -> float:
    if module is None:
        return -math.inf
    if split.kept == 0:
        return math.inf
    return math.nan if module.threshold is None else module.threshold


def _asked(linears: Sequence[DecoderLinear], asks: dict[str, Ask]) -> float:
    sizes = [float(x.shape[0] * x.shape[1] * x.weight_bytes) for x in linears]
    return accounting.model_sparsity(sizes, [1 - asks[x.name].sparsity for x in linears])


def _line(linear: DecoderLinear, ask: Ask, split: Split, module: SparseLinear | None) -> LinearReport:
    m, n = linear.shape
    measured_later = _needs_calibration(ask, split)
    return LinearReport(
        linear.name, linear.layer, linear.kind, m, n,
        dense_bytes=float(m * n * linear.weight_bytes),
        sparsity=ask.sparsity,
        rho=ask.rho,
        score=ask.score,
        kept=split.kept,
        rank=split.rank,
        threshold=_threshold(module, split),
        read=float(split.read),
        realised=math.nan if measured_later else float(split.sparsity),
        spread=math.nan if measured_later else 0.0,
    )  # fmt: skip


def _with_tally(line: LinearReport, tally: KeptTally | None) -> LinearReport:
    if tally is None:
        return replace(line, realised=1 - line.read, spread=0.0)
    rank_read = line.read - line.kept / line.n
    return replace(line, realised=1 - rank_read - tally.mean / line.n, spread=tally.spread / line.n)


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
            _install(model, state.protocol, state.replaced, state.report)
        raise


def _install(model: nn.Module, protocol: TokenProtocol, replaced: list, report: Report) -> None:
    for linear, module in replaced:
        linear.exchange(module)
    model._rsparse = _State(protocol, protocol.attach(model.model), replaced, report)


def _detach(model: nn.Module, state: _State) -> None:
    state.handle.remove()
    for linear, _ in state.replaced:
        linear.exchange(linear.module)
    del model._rsparse
