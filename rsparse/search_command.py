"""`python -m rsparse search`: a recipe for a preset's model, searched with the settings of its Table 4."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kernels.destination import check_destination
from rsparse import models, presets, search, texts
from rsparse.calibrate import Calibration
from rsparse.evolution import Coordinate, Evolution, RandomSearch
from rsparse.paths import HERE, Checkout
from rsparse.recipe import Recipe

EXHIBIT = "table-4"
SEARCHERS = ("evolution", "random", "coordinate", "moving", "uniform", "greedy")
EVOLUTION = ("population", "generations", "mutation", "crossover", "initial", "form")
OPTIONS = ("seed", "groups", "step", "start", "score", "samples", "length", *EVOLUTION)
"""What a call may say in place of the preset."""


def run(
    preset: str, sparsity: float, out: Path, searcher: str, options: Mapping[str, Any], fresh: bool = False,
    checkout: Checkout = HERE,
) -> Iterator[str]:  # fmt: skip
    """Search and save the recipe at `out`; yields what there is to say.

    Evaluations are kept in ``<out>.journal`` until the recipe is saved: the same call resumes after an interruption,
    with `fresh` it starts anew. ValueError, before a model is loaded, for anything that is not allowed.
    """
    if searcher not in SEARCHERS:
        raise ValueError(f"searcher is {searcher!r}; expected one of {', '.join(SEARCHERS)}")
    values = _values(preset, checkout) | options
    plan = _plan(sparsity, searcher, values)
    check_destination(out)
    journal = out.with_name(out.name + ".journal")
    check_destination(journal)
    if fresh:
        journal.unlink(missing_ok=True)
    model = models.load_model(values["checkpoint"], values["dtype"], values["device"], values["device_map"] or None)
    tokenizer = models.load_tokenizer(values["checkpoint"])
    source = values["calibration"], "calibration"
    ids = texts.token_ids(*source, tokenizer, values["samples"], values["length"], plan.seed)
    started, calibration = time.monotonic(), Calibration(model, ids)
    if searcher == "greedy":
        recipe = search.greedily(calibration, sparsity)
    else:
        find = search.uniform if searcher == "uniform" else search.search
        recipe = find(calibration, plan, journal=journal).recipe
    recipe.save(out)
    journal.unlink(missing_ok=True)
    yield from _summary(recipe, out, time.monotonic() - started)


def _values(preset: str, checkout: Checkout) -> dict[str, Any]:
    """What the preset says of its model and of the search; the notebook's defaults where it says nothing."""
    found = presets.load(preset, checkout)
    defaults = presets.parameters_of(presets.exhibits_in(checkout.notebooks)[EXHIBIT])
    if EXHIBIT not in found.parameters:
        raise ValueError(f"preset {preset} does not name {EXHIBIT}; expected one that says how to search")
    values = defaults | found.parameters[EXHIBIT]
    return values | {"samples": values["search_samples"], "length": values["search_length"]}


def _plan(sparsity: float, searcher: str, values: Mapping[str, Any]) -> search.Plan:
    evolution = Evolution(**{name: values[name] for name in EVOLUTION})
    kinds = {"random": RandomSearch(evolution), "coordinate": Coordinate()}
    names = {x.name for x in dataclasses.fields(search.Plan)} & values.keys()
    return search.Plan(
        sparsity, kinds.get(searcher, evolution), moves=searcher == "moving",
        **{name: values[name] for name in names - {"sparsity", "searcher", "moves"}},
    )  # fmt: skip


def _summary(recipe: Recipe, out: Path, seconds: float) -> Iterator[str]:
    rhos = [ask.rho for ask in recipe.linears.values()]
    ones = sum(rho == 1 for rho in rhos)
    yield f"{recipe.name}: rho 1 in {ones} of {len(rhos)} linears, {sum(rhos) / len(rhos):.3f} on average"
    if (perplexity := recipe.origin.get("perplexity", math.nan)) == perplexity:
        passes = recipe.origin["full passes"]
        yield (f"perplexity {perplexity:.4f} on the text that it saw, after {recipe.origin['evaluations']} candidates "
               f"that cost as much as {passes:.0f} passes of the whole model")  # fmt: skip
    yield f"saved as {out} after {seconds / 60:.1f} min"
