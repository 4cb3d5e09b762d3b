"""Table 4 and Algorithm 1: does a rho of its own for every linear earn the search?

R-Sparse (arXiv 2504.19449), section 3.5 and Table 4: rho found by evolution beats the uniform 0.95. Here the uniform
rho is searched as well, over the same grid and on the same text, and random candidates get as many evaluations.
Everything is judged on text that no search has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from rsparse import intervals, search, texts
from rsparse.calibrate import Calibration
from rsparse.evolution import Coordinate, Evolution, RandomSearch, Searcher
from rsparse.exhibits import paired
from rsparse.recipe import Ask, Recipe
from rsparse.results import key_digest
from rsparse.study import DENSE, Setting, Study, check_some, describe, paired_rows

SEARCHERS = ("evolution", "random", "coordinate", "moving")
"""evolution: Algorithm 1. random: its control. coordinate: linear by linear over the whole grid. moving: evolution that
also moves bytes between the linears of a group."""


@dataclass(frozen=True)
class Plan:
    """What the exhibit searches and compares. ValueError, before anything is measured, for a value that is not allowed.

    sparsities: budgets of Table 4. seeds: each draws its own candidates and its own calibration windows. searchers: of
    `SEARCHERS`, evolution first. rho: the paper's uniform one. step, groups, population, generations, mutation,
    crossover, initial, form: see rsparse.search and rsparse.evolution. samples, length: of the text that a search sees.
    sensitivity, sources: other numbers of samples, and other texts, that the first budget is searched with. transfer:
    whether recipes are tried at the other budgets.
    """

    sparsities: Sequence[float]
    seeds: Sequence[int]
    searchers: Sequence[str]
    rho: float
    step: float
    groups: int
    population: int
    generations: int
    mutation: float
    crossover: float
    initial: str
    form: str
    samples: int
    length: int
    sensitivity: Sequence[int]
    sources: Sequence[str]
    transfer: bool

    def __post_init__(self) -> None:
        check_some("sparsities", self.sparsities, self.seeds)
        if tuple(self.searchers[:1]) != ("evolution",) or set(self.searchers) - set(SEARCHERS):
            raise ValueError(f"searchers are {self.searchers!r}; expected evolution first, then of {SEARCHERS[1:]}")
        for name in ("samples", "length"):
            if type(value := getattr(self, name)) is not int or value < 2:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 2")
        if any(type(count) is not int or count < 1 for count in self.sensitivity):
            raise ValueError(f"sensitivity is {self.sensitivity!r}; expected whole numbers of at least 1")
        for source in self.sources:
            texts.check_text(source, "calibration")
        for sparsity in self.sparsities:
            self.asked(sparsity, 0, "evolution")
            Setting("r-sparse", sparsity, self.rho)

    def asked(self, sparsity: float, seed: int, searcher: str, start: float | None = None) -> search.Plan:
        """The search of one budget and seed."""
        evolution = Evolution(
            self.population, self.generations, self.mutation, self.crossover, self.initial, self.form
        )
        kinds: dict[str, Searcher] = {"random": RandomSearch(evolution), "coordinate": Coordinate()}
        chosen = kinds.get(searcher, evolution)
        return search.Plan(sparsity, chosen, seed, self.groups, self.step, start, moves=searcher == "moving")


@dataclass(frozen=True)
class Text:
    """What a search sees: `samples` x `length` tokens of the calibration split of `source`."""

    source: str
    samples: int
    length: int


def _own(study: Study, plan: Plan) -> Text:
    """What the searches of `measure` see."""
    return Text(study.sources.calibration, plan.samples, plan.length)


def measure(study: Study, plan: Plan) -> None:
    """Searches, and what their recipes do on held-out text and tasks, against the uniform rho's."""
    text = _own(study, plan)
    for sparsity in tqdm(plan.sparsities, desc="budgets"):
        for setting in (DENSE, *_references(plan, sparsity)):
            paired.of(study, setting).measure(plan.seeds)
        uniform = {seed: _uniform(study, plan, sparsity, seed, text) for seed in plan.seeds}
        for searcher in plan.searchers:
            found = {seed: _adaptive(study, plan, sparsity, seed, searcher, text) for seed in plan.seeds}
            _compare(study, found, uniform, {"against": "best uniform", "searcher": searcher})
            paper = dict.fromkeys(plan.seeds, Setting("r-sparse", sparsity, plan.rho))
            _compare(study, found, paper, {"against": f"uniform {plan.rho:g}", "searcher": searcher})
            if searcher != "evolution":
                evolved = {seed: _adaptive(study, plan, sparsity, seed, "evolution", text) for seed in plan.seeds}
                _compare(study, evolved, found, {"against": searcher, "searcher": "evolution"})
    if plan.transfer:
        _transfer(study, plan, text)


def vary(study: Study, plan: Plan) -> None:
    """The first budget searched on more or fewer samples, and on other texts: held-out loss against best uniform."""
    sparsity = plan.sparsities[0]
    for text in tqdm(_variations(study, plan), desc="search text"):
        found = {seed: _adaptive(study, plan, sparsity, seed, "evolution", text) for seed in plan.seeds}
        if text != _own(study, plan):
            found = {seed: _named(setting, text) for seed, setting in found.items()}
        uniform = {seed: _uniform(study, plan, sparsity, seed, text) for seed in plan.seeds}
        columns = {"against": "best uniform", "searcher": "evolution", "search_samples": text.samples}
        _compare(study, found, uniform, columns | {"search_text": text.source}, tasks=False)


def _variations(study: Study, plan: Plan) -> Iterator[Text]:
    own = study.sources.calibration
    if plan.sensitivity:
        for samples in sorted({*plan.sensitivity, plan.samples}):
            yield Text(own, samples, plan.length)
    for source in plan.sources:
        if source != own:
            yield Text(source, plan.samples, plan.length)


def _named(setting: Setting, text: Text) -> Setting:
    """The setting under a name of its text: else rows of recipes that saw different texts could not be told apart."""
    return replace(setting, recipe=replace(setting.recipe, name=f"{setting.recipe.name}-{text.source}-{text.samples}"))


def _references(plan: Plan, sparsity: float) -> list[Setting]:
    """The paper's uniform recipe, and no low-rank path at all."""
    return [Setting("r-sparse", sparsity, plan.rho), Setting("r-sparse", sparsity, 1.0)]


def _uniform(study: Study, plan: Plan, sparsity: float, seed: int, text: Text) -> Setting:
    """The best uniform rho of the grid on the text that the search of this seed sees."""
    recipe = find(study, plan.asked(sparsity, seed, "evolution"), text, uniform=True)
    return Setting("r-sparse", sparsity, next(iter(recipe.linears.values())).rho)


def _adaptive(study: Study, plan: Plan, sparsity: float, seed: int, searcher: str, text: Text) -> Setting:
    start = _uniform(study, plan, sparsity, seed, text).rho
    recipe = find(study, plan.asked(sparsity, seed, searcher, start), text)
    return Setting("r-sparse", sparsity, recipe=recipe)


def find(study: Study, asked: search.Plan, text: Text, uniform: bool = False) -> Recipe:
    """The recipe that a search finds on the study's model, from the table or else by searching."""
    items = _kept(study, asked, text, uniform)
    asks = [Ask(s, rho, asked.score) for s, rho in zip(items["sparsity"], items["rho"], strict=True)]
    linears = dict(zip(items["linear"], asks, strict=True))
    return Recipe(items["name"][0], items["model"][0], linears, items["origin"][0])


def _kept(study: Study, asked: search.Plan, text: Text, uniform: bool = False) -> dict[str, list]:
    """A search's recipe, linear by linear, and its trace, candidate by candidate, from the table or by searching.

    Adds a row with the perplexity on the text that the search saw. Evaluations are kept beside the table while a search
    runs, so that a killed one resumes. A finished one is read back without the model's weights.
    """
    key = {"what": "search", "plan": asked.about, "text": asdict(text), "uniform": uniform, "study": study.identity}
    if (kept := study.table.find(key)) is None:
        with study.costing("search") as costs:
            found = _search(study, asked, text, uniform, key)
        recipe = found.recipe
        asks = {name: [getattr(x, name) for x in recipe.linears.values()] for name in ("rho", "sparsity")}
        trace = {name: [x[name] for x in found.trace] for name in ("group", "cost", "loss")}
        row = describe(Setting("r-sparse", asked.sparsity, recipe=recipe), study.sources) | {
            "seed": asked.seed, "task": "search", "metric": "perplexity", "value": recipe.origin["perplexity"],
            "n": text.samples, "calibration": f"{text.source} {text.samples}x{text.length}",
            "evaluations": len(found.trace), "full_passes": recipe.origin["full passes"],
            "searcher": "uniform" if uniform else _name(asked), "search_samples": text.samples,
            "search_text": text.source,
        }  # fmt: skip
        costs[-1] |= {"tokens": recipe.origin["full passes"] * text.samples * text.length, "sparsity": asked.sparsity}
        whose = {"linear": list(recipe.linears), "model": [recipe.model], "name": [recipe.name]}
        kept = study.table.add(key, [row], asks | trace | whose | {"origin": [recipe.origin]}, costs)
    return kept["items"]


def traces(study: Study, plan: Plan) -> pd.DataFrame:
    """Every candidate of the searches of `measure`, in order: sparsity, searcher, seed, group, cost, loss."""
    return _searches(study, plan, lambda items: {name: items[name] for name in ("group", "cost", "loss")})


def recipes(study: Study, plan: Plan) -> pd.DataFrame:
    """What the searches of `measure` gave every linear: sparsity (of the model), searcher, seed, layer, linear, rho."""
    return _searches(study, plan, lambda items: _by_linear(items["linear"], items["rho"]))


def released(study: Study, path: str) -> pd.DataFrame:
    """The authors' recipe, from the file `path` of the reader's clone: columns layer, linear, rho.

    Empty without a path, and, with attrs["why"], where the file does not fit the study's model.
    """
    if not path:
        return pd.DataFrame(_by_linear([], []))
    try:
        recipe = Recipe.from_rsparse_list(Path(path), study.model)
    except ValueError as error:
        found = pd.DataFrame(_by_linear([], []))
        found.attrs["why"] = str(error)
        return found
    return pd.DataFrame(_by_linear(recipe.linears, [x.rho for x in recipe.linears.values()]))


def _searches(study: Study, plan: Plan, read: Callable[[dict[str, list]], dict[str, list]]) -> pd.DataFrame:
    """What `read` takes from the items of every search of `measure`, below one another."""
    text, found = _own(study, plan), []
    for sparsity in plan.sparsities:
        for searcher in plan.searchers:
            for seed in plan.seeds:
                start = _uniform(study, plan, sparsity, seed, text).rho
                items = _kept(study, plan.asked(sparsity, seed, searcher, start), text)
                part = pd.DataFrame(read(items))
                part.insert(0, "sparsity", sparsity)
                found.append(part.assign(searcher=searcher, seed=seed))
    return pd.concat(found, ignore_index=True)


def _by_linear(names: Iterable[str], rhos: Sequence[float]) -> dict[str, list]:
    """Columns layer, linear (its kind) and rho; names such as model.layers.3.self_attn.q_proj."""
    parts = [name.split(".") for name in names]
    layers = [int(part[part.index("layers") + 1]) for part in parts]
    return {"layer": layers, "linear": [part[-1].removesuffix("_proj") for part in parts], "rho": list(rhos)}


def _search(study: Study, asked: search.Plan, text: Text, uniform: bool, key: dict[str, Any]) -> search.Found:
    model = study.dense()
    ids = texts.token_ids(text.source, "calibration", study.tokenizer, text.samples, text.length, asked.seed)
    journal = study.table.folder / f"search-{key_digest(key)}.jsonl"
    run = search.uniform if uniform else search.search
    found = run(Calibration(model, ids), asked, study.store, journal)
    journal.unlink()
    return found


def _name(asked: search.Plan) -> str:
    kind = {RandomSearch: "random", Coordinate: "coordinate"}.get(type(asked.searcher), "evolution")
    return "moving" if asked.moves else kind


def _transfer(study: Study, plan: Plan, text: Text) -> None:
    """Recipes of every budget at every other: the same rho, another sparsity."""
    for found_at in plan.sparsities:
        for sparsity in plan.sparsities:
            if sparsity == found_at:
                continue
            arms, uniform = {}, {}
            for seed in plan.seeds:
                recipe = _adaptive(study, plan, found_at, seed, "evolution", text).recipe
                arms[seed] = Setting("r-sparse", sparsity, recipe=_at(recipe, sparsity))
                uniform[seed] = _uniform(study, plan, sparsity, seed, text)
            columns = {"against": "best uniform", "searcher": "evolution", "found_at": found_at}
            _compare(study, arms, uniform, columns, tasks=False)


def _at(recipe: Recipe, sparsity: float) -> Recipe:
    linears = {name: replace(ask, sparsity=sparsity) for name, ask in recipe.linears.items()}
    return replace(recipe, name=f"{recipe.name}-at-{sparsity:g}", linears=linears)


def _compare(
    study: Study, found: dict[int, Setting], other: dict[int, Setting], columns: dict[str, Any], tasks: bool = True
) -> None:
    """Rows of paired differences found minus other: of every seed, and of the mean over seeds.

    The recipes of two seeds differ, so their spread is that of the search, of its text, and of the thresholds' text.
    """
    losses, items = [], []
    for seed, setting in found.items():
        arms = paired.of(study, setting), paired.of(study, other[seed])
        for arm in arms:
            arm.measure([seed], tasks)
        losses.append([arm.losses([seed]) for arm in arms])
        items.append([arm.items([seed]) for arm in arms] if tasks else None)
        _add(study, setting, str(seed), columns, losses[-1:], items[-1:], [seed])
    if len(found) > 1:
        seeds = list(found)
        _add(study, found[seeds[0]], "/".join(map(str, seeds)), columns, losses, items, seeds)


def _add(
    study: Study, setting: Setting, seed: str, columns: dict[str, Any], losses: list, items: list, seeds: list[int]
) -> None:
    base = describe(setting, study.sources) | {"recipe": columns["searcher"], **columns, "seed": seed}
    key = {"what": "search differences", "row": base, "seeds": seeds, "study": study.identity}
    key |= {"losses": losses}
    if study.table.find(key) is not None:
        return
    mean = [[sum(x) / len(x) for x in zip(*side, strict=True)] for side in zip(*losses, strict=True)]
    heldout = {"tokens": "all", "task": "heldout", "metric": "diff_perplexity_log"}
    rows = [base | heldout | intervals.paired(*mean).row()]
    if items[0] is not None:
        ours, theirs = ([side.set_index(["task", "item"]) for side in x] for x in zip(*items, strict=True))
        ours, theirs = ((sum(x[1:], x[0]) / len(x)).reset_index() for x in (ours, theirs))
        rows += paired_rows(ours, theirs, paired.METRICS, base | {"tokens": "scored"})
    study.table.add(key, rows)
