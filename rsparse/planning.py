"""From a request to what is asked of every place of a decoder, before anything is put in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from torch import Tensor, nn

from rsparse import accounting, rotations
from rsparse.accounting import Reach, Split
from rsparse.linears import Masked
from rsparse.methods import METHODS, Method, Request
from rsparse.models import (
    SCOPES,
    DecoderActivation,
    DecoderLinear,
    Place,
    check_model,
    decoder_activations,
    decoder_linears,
    scope_share,
)
from rsparse.recipe import DENSE, Ask, Recipe
from rsparse.rotations import Rotation
from rsparse.thresholds import column_norms


@dataclass(frozen=True)
class Mask:
    """A place whose channels are chosen, and how. read: of a linear's dense bytes, rotation included."""

    place: Place
    ask: Ask
    split: Split
    overhead: Fraction = Fraction(0)
    norms: Tensor | None = None
    rotation: Rotation | None = None

    @property
    def needs_threshold(self) -> bool:
        return self.ask.threshold != "per-token" and 0 < self.split.kept < self.place.channels

    @property
    def whitened(self) -> bool:
        """Whether its low-rank factors are made for what calibration tokens leave to them."""
        return self.ask.factors == "whitened" and self.split.rank > 0


@dataclass(frozen=True)
class Planned:
    """What a method asks of a model. masks: by the name of their place. follows: linear -> the mask that decides in its
    place. asks: of every linear, dense ones included."""

    method: Method
    scope: str
    asked: float
    nominal: float
    linears: tuple[DecoderLinear, ...]
    asks: dict[str, Ask]
    masks: dict[str, Mask]
    follows: dict[str, str]


def check(model: nn.Module, method: str, scope: str | None, ask: Ask, recipe: Recipe | None) -> tuple[Method, str]:
    """The method and the scope that a request names; ValueError for one that is not allowed for `model`."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    check_model(model)
    chosen = METHODS[method]
    scope = chosen.scope if scope is None else scope
    linears = dense_linears(model)
    scope_share(linears, scope)
    if meta := [x.name for x in linears if x.module.weight.device.type == "meta"]:
        raise ValueError(
            f"the weight of {meta[0]!r} is not in memory; expected a model loaded without offloading"
        )
    if recipe is None:
        if "sparsity" in chosen.takes:
            _own_sparsity(chosen, scope, ask.sparsity, linears)
        elif chosen.parts and not chosen.touches(scope):
            raise _untouched(chosen, scope)
        return chosen, scope
    if not chosen.takes_recipe:
        raise ValueError(f"method {method!r} takes no recipe; expected r-sparse")
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe is {recipe!r}; expected a Recipe, see Recipe.load")
    recipe.check(model)
    return chosen, scope


def plan(model: nn.Module, method: Method, scope: str, request: Request, recipe: Recipe | None) -> Planned:
    """What `method` asks of the dense `model`. request.sparsity: model-level. ValueError as `check`."""
    linears = dense_linears(model)
    nominal = float("nan")
    if recipe is not None:
        asks = recipe.within(SCOPES[scope]).linears
        asked = _model_sparsity(linears, asks)
    else:
        own = 0.0
        if "sparsity" in method.takes:
            own = _own_sparsity(method, scope, request.sparsity, linears)
            nominal = own if method.rotated or len(set(method.parts.values())) > 1 else nominal
        inside = [x for x in linears if x.kind in method.touches(scope)]
        asks = {x.name: DENSE for x in linears}
        if own > 0 or not method.takes & {"sparsity"}:
            asks |= method.plan(inside, replace(request, sparsity=own))
        asked = request.sparsity if "sparsity" in method.takes else float("nan" if method.parts else 0)
    sparse = [x for x in linears if asks[x.name].sparsity > 0 or (method.function and x.kind in method.parts)]
    return Planned(method, scope, asked, nominal, tuple(linears), asks, *_masks(model, method, sparse, asks, request))


def ceiling(model: nn.Module, method: str, scope: str | None = None) -> float:
    """The model-level sparsity that `method` stays under on `model`, whose weights may be absent; 0 without a knob."""
    chosen, linears = METHODS[method], dense_linears(model)
    scope = chosen.scope if scope is None else scope
    if "sparsity" not in chosen.takes or not chosen.touches(scope):
        return 0.0
    return float(_reach(chosen, scope, linears).ceiling)


def dense_linears(model: nn.Module) -> list[DecoderLinear]:
    """The decoder linears as they were before any method, without touching the model."""
    linears = decoder_linears(model)
    return [replace(x, module=x.module.dense) if isinstance(x.module, Masked) else x for x in linears]


def _own_sparsity(method: Method, scope: str, sparsity: float, linears: Sequence[DecoderLinear]) -> float:
    if not method.touches(scope):
        raise _untouched(method, scope)
    return _reach(method, scope, linears).own_sparsity(sparsity, f"within scope {scope!r} by {method.name}")


def _reach(method: Method, scope: str, linears: Sequence[DecoderLinear]) -> Reach:
    total = sum(x.weight_bytes * x.shape[0] * x.shape[1] for x in linears)
    inside = [x for x in linears if x.kind in method.touches(scope)]
    parts = [method.parts[x.kind] for x in inside]
    share = sum(p * x.weight_bytes * x.shape[0] * x.shape[1] for p, x in zip(parts, inside, strict=True)) / total
    extra = sum(rotations.overhead(inside, method.rotated).values(), Fraction(0)) / total
    return Reach(share, max(parts), extra)


def _untouched(method: Method, scope: str) -> ValueError:
    kinds = ", ".join(method.parts)
    return ValueError(f"scope is {scope!r}; expected one with linears that {method.name} makes sparse: {kinds}")


def _model_sparsity(linears: Sequence[DecoderLinear], asks: dict[str, Ask]) -> float:
    sizes = [float(x.shape[0] * x.shape[1] * x.weight_bytes) for x in linears]
    return accounting.model_sparsity(sizes, [1 - asks[x.name].sparsity for x in linears])


def _masks(
    model: nn.Module, method: Method, sparse: Sequence[DecoderLinear], asks: dict[str, Ask], request: Request
) -> tuple[dict[str, Mask], dict[str, str]]:
    """Masks by place, and the linears that follow one that is not their own."""
    leaders = {(x.layer, x.kind): x for x in (*sparse, *_activations(model))}
    follows = {x.name: leaders[x.layer, method.follows[x.kind]].name for x in sparse if x.kind in method.follows}
    own = [x for x in sparse if x.name not in follows]
    turned = [x for x in own if x.site in method.rotated]
    turns = method.rotate(turned, request) if method.rotate and turned else {}
    extra = rotations.overhead(turned, method.rotated)
    masks = {}
    for x in own:
        split, ask = _split(x, asks[x.name]), asks[x.name]
        share = extra.get(x.name, Fraction(0)) / (x.weight_bytes * x.shape[0] * x.shape[1])
        masks[x.name] = Mask(x, ask, split, share, _norms(x, ask, turns.get(x.name)), turns.get(x.name))
    weights = method.weights(sparse, request) if method.weights and sparse else {}
    for x in sparse:
        leader = leaders.get((x.layer, method.follows.get(x.kind, "")))
        if isinstance(leader, DecoderActivation) and leader.name not in masks:
            ask = asks[x.name]
            split = accounting.split_budget(1, leader.channels, ask.sparsity, 1.0)
            masks[leader.name] = Mask(leader, ask, split, norms=weights.get(x.layer))
    return masks, follows


def _activations(model: nn.Module) -> list[DecoderActivation]:
    return [
        replace(x, module=x.module.dense) if isinstance(x.module, Masked) else x for x in decoder_activations(model)
    ]


def _split(linear: DecoderLinear, ask: Ask) -> Split:
    return accounting.split_budget(*linear.shape, ask.sparsity, ask.rho, linear.weight_bytes, linear.factor_bytes)


def _norms(linear: DecoderLinear, ask: Ask, rotation: Rotation | None) -> Tensor | None:
    """Column norms of the weight, in the basis that the mask chooses in."""
    if ask.score != "column-norm":
        return None
    weight = linear.module.weight.detach()
    return column_norms(weight if rotation is None else weight @ rotation.V)
