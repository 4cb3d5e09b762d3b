"""One checkpoint, measured setting by setting: tasks, perplexity and summaries as rows of a result table.

The model is loaded when the first setting has to be computed, and stays; a setting that the table holds
already is not computed again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd
from torch import Tensor

from rsparse import evaluate, harness, int4, intervals, models, paths, planning, texts
from rsparse.apply import counting, restore, sparsify, tokens_as
from rsparse.calibrate import Calibration
from rsparse.decompose import FactorStore, default_store
from rsparse.methods import METHODS
from rsparse.protocol import Tokens
from rsparse.quantize import Quantization, put
from rsparse.recipe import Ask, Recipe
from rsparse.report import Report
from rsparse.results import Table


@dataclass(frozen=True)
class Setting:
    """One way to sparsify a model; the arguments of `rsparse.sparsify` by their names. scope: None becomes the
    method's own.

    Raises ValueError for a value that is not allowed: a grid of settings is refused before any is measured.
    """

    method: str
    sparsity: float = 0.0
    rho: float = 0.95
    score: str = "magnitude"
    threshold: str = "static"
    scope: str | None = None
    recipe: Recipe | None = None
    factors: str = "svd"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if self.scope is None:
            object.__setattr__(self, "scope", METHODS[self.method].scope)
        if self.scope not in models.SCOPES:
            raise ValueError(f"scope is {self.scope!r}; expected one of {', '.join(models.SCOPES)}")
        Ask(self.sparsity, self.rho, self.score, self.threshold, self.factors)

    @property
    def has_mask(self) -> bool:
        """Whether the method chooses input channels or neurons by a score."""
        return METHODS[self.method].has_mask

    @property
    def calibrated(self) -> bool:
        """Whether calibration tokens have a say in it."""
        made = METHODS[self.method].calibrates or self.canonical.factors != "svd"
        return made or (self.canonical.has_mask and self.threshold != "per-token")

    @property
    def canonical(self) -> Setting:
        """The same sparse model under one name: r-sparse at rho 1 is teal, at rho 0 low-rank; of the fields that
        the method ignores, the defaults."""
        if self.recipe is not None:
            return self
        if self.method == "r-sparse" and self.rho == 1 and self.score == "magnitude":
            return replace(self, method="teal").canonical
        if self.method == "r-sparse" and self.rho == 0 and self.factors == "svd":
            return replace(self, method="low-rank").canonical
        method = METHODS[self.method]
        narrow = method.parts and method.touches(self.scope) == method.touches("mlp")
        kept = {name: getattr(self, name) for name in method.takes}
        return Setting(self.method, scope="mlp" if narrow else self.scope, **kept)

    def seeds(self, seeds: Sequence[int]) -> Sequence[int]:
        """The seeds that differ for this setting: one where nothing is calibrated."""
        return seeds if self.calibrated else seeds[:1]

    def columns(self) -> dict[str, Any]:
        """The columns of `results.COLUMNS` that name it; "" and None where a column means nothing."""
        method = METHODS[self.method]
        used = {name: getattr(self, name) for name in method.takes}
        own = {"rho": None, "score": "", "threshold": "", "factors": ""} if self.recipe else {}  # of every linear
        return {
            "method": self.method,
            "scope": self.scope,
            "recipe": (self.recipe.name if self.recipe else "uniform") if method.takes_recipe else "",
            "sparsity": self.sparsity,
            "rho": None,
            "score": "",
            "threshold": "",
        } | {**method.fixed, **used, **own}


DENSE = Setting("dense")
_TASKS, _SUMMARIES = ("suite", "items"), ("summaries", "articles", "summary_tokens")
UNUSED = {"tasks": _SUMMARIES, "losses": (*_TASKS, *_SUMMARIES, "batch_size", "bos"), "rouge": _TASKS}
"""Measurement -> the fields of `Sources` that it does not depend on. Exhibits that differ only there share it."""


@dataclass(frozen=True)
class Sources:
    """What a study measures on. Every field is a parameter of the notebooks that use it.

    checkpoint: as `models.load_model` names it. name: what tables call the model. samples, length:
    calibration windows. windows, window, context: held-out windows, their tokens, and how many of these are
    not scored. items: per task, None for all. suite: whose tasks. summary_tokens: most that a summary may
    have. quantization: INT4 weights in place of the checkpoint's, or None.

    Raises ValueError for a text, suite, dtype or device that does not exist, for sizes that are no whole numbers
    above 0, and for a context that leaves nothing to score.
    """

    checkpoint: str
    name: str
    dtype: str = "float32"
    device: str = "cpu"
    device_map: str | None = None
    suite: str = "tiny"
    items: int | None = None
    batch_size: int = 16
    bos: bool = True
    calibration: str = "tiny"
    samples: int = 16
    length: int = 512
    heldout: str = "tiny"
    windows: int = 16
    window: int = 512
    context: int = 0
    summaries: str = "tiny"
    articles: int = 25
    summary_tokens: int = 48
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        for text in (self.calibration, self.heldout):
            texts.check_text(text, "heldout")
        texts.check_summaries(self.summaries)
        models.check_device(self.device)
        for name, allowed in (("suite", harness.SUITES), ("dtype", tuple(models.DTYPES))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
        sizes = "items batch_size samples length windows window articles summary_tokens".split()
        for name in sizes:
            value = getattr(self, name)
            if not (name == "items" and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
        if type(self.bos) is not bool:
            raise ValueError(f"bos is {self.bos!r}; expected True or False")
        if type(self.context) is not int or not 0 <= self.context < self.window - 1:
            most = self.window - 2
            raise ValueError(f"context is {self.context!r}; expected 0..{most} for windows of {self.window} tokens")


class Bench:
    """A loaded model with its tokenizer and factors, and what was last put on it; studies of one checkpoint share it.

    applied: (study, setting, seed), or None where the model may be in any state. quantization: of the weights in place.
    """

    def __init__(self, sources: Sources):
        self.sources = sources
        self.applied: tuple[int, Setting, int] | None = None
        self.quantization: Quantization | None = None

    @cached_property
    def model(self):
        s = self.sources
        return models.load_model(s.checkpoint, s.dtype, s.device, s.device_map or None)

    @cached_property
    def tokenizer(self):
        return models.load_tokenizer(self.sources.checkpoint)

    def quantized(self, wanted: Quantization | None, ids: Callable[[], Tensor]):
        """The model with the weights of `wanted`, None for its own; dense where they had to be exchanged for it."""
        if wanted != self.quantization:
            self.applied, self.quantization = None, None
            restore(self.model)
            int4.restore(self.model)
            if wanted is not None:
                put(self.model, wanted, ids)
            self.quantization = wanted
        return self.model

    @cached_property
    def store(self) -> FactorStore:
        return default_store()


@dataclass
class Study:
    """Measures settings of one checkpoint into `table`."""

    sources: Sources
    table: Table
    seed: int = 0
    bench: Bench | None = None
    _calibration: dict[int, Calibration] = field(default_factory=dict)
    _columns: dict[str, Any] = field(default_factory=dict)
    _losses_all: Tensor | None = None
    _costs: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bench = self.bench or Bench(self.sources)

    def sibling(self, **changes: Any) -> Study:
        """A study of the same loaded model whose sources differ in `changes`, such as samples and length."""
        return Study(replace(self.sources, **changes), self.table, self.seed, self.bench)

    def reaches(self, setting: Setting) -> bool:
        """Whether the method can make this checkpoint as sparse as the setting asks; loads no weights."""
        model = models.skeleton(self.sources.checkpoint)
        return setting.sparsity < planning.ceiling(model, setting.method, setting.scope)

    @property
    def identity(self) -> dict[str, Any]:
        """What every key holds, so that nothing measured on other sources is taken for this study's."""
        return asdict(self.sources) | {"heldout seed": self.seed, "files": self._files}

    @cached_property
    def _files(self) -> dict[str, Any]:
        """What changes with the files behind the sources' names, while the names do not."""
        s = self.sources
        files = {name: paths.stamp(getattr(s, name)) for name in ("checkpoint", "calibration", "heldout", "summaries")}
        if s.quantization and s.quantization.checkpoint:
            files["gptq"] = paths.stamp(str(s.quantization.folder))
        return files | {"revision": models.revision(s.checkpoint)}

    @property
    def model(self):
        return self.bench.quantized(self.sources.quantization, self._gptq_ids)

    def _put_weights(self) -> None:
        """The model with this study's weights in place; what making INT4 codes took is a cost of its own."""
        wanted = self.sources.quantization
        made = wanted is not None and wanted.calibrates and self.bench.quantization != wanted
        _ = self.bench.model  # loading is no part of it
        with self.costing("gptq", wanted.samples * wanted.length if made else 0) as costs:
            _ = self.model
        self._costs += costs if made else []

    def _gptq_ids(self) -> Tensor:
        s, q = self.sources, self.sources.quantization
        return texts.token_ids(s.calibration, "calibration", self.tokenizer, q.samples, q.length, self.seed)

    def dense(self):
        """The model with nothing on it."""
        self.bench.applied = None
        restore(self.model)
        return self.model

    @property
    def tokenizer(self):
        return self.bench.tokenizer

    @property
    def store(self) -> FactorStore:
        return self.bench.store

    def calibration(self, seed: int) -> Calibration:
        """Calibration windows, (samples, length), which the seed picks; their statistics are gathered
        once."""
        s = self.sources
        if seed not in self._calibration:
            ids = texts.token_ids(s.calibration, "calibration", self.tokenizer, s.samples, s.length, seed)
            self._calibration[seed] = Calibration(self.model, ids)
        return self._calibration[seed]

    @cached_property
    def heldout(self) -> Tensor:
        """Held-out windows, (windows, window); the same for every setting and seed."""
        s = self.sources
        return texts.token_ids(s.heldout, "heldout", self.tokenizer, s.windows, s.window, self.seed)

    def apply(self, setting: Setting, seed: int) -> dict[str, Any]:
        """Put `setting` on the model, calibrated with `seed`; the columns that say how it was carried out.

        One pass over the held-out text gives the realised sparsity and, by the way, the losses under "all".
        """
        if self.bench.applied != (id(self), setting, seed):
            self.bench.applied = None
            self._sparsify(setting, self.calibration(seed))
            with counting(self.model) as realised:
                self._losses_all = self._heldout_losses()
                self._columns = describe(setting, self.sources, realised())
            self.bench.applied = (id(self), setting, seed)
        return self._columns | {"seed": seed}

    def tasks(
        self, setting: Setting, seed: int | None = None, tokens: Tokens = "scored", only: Sequence[str] = ()
    ) -> pd.DataFrame:
        """Score the tasks of the suite: one row per item (task, item, acc, acc_norm, margin in nats). Adds rows.

        only: some of its tasks; none means all.
        """

        def measure(columns: dict[str, Any]) -> tuple[list[dict], dict[str, list]]:
            s = self.sources
            found = harness.score_tasks(self.model, self.tokenizer, s.suite, s.items, s.batch_size, s.bos, only)
            self._costs.append(scoring_cost(found, only))
            return task_rows(found.items, columns | {"influenced": found.influenced}), found.items.to_dict("list")

        part = {"only": list(only)} if only else {}
        return pd.DataFrame(self._kept("tasks", setting, seed, tokens, measure, part)).astype({"acc_norm": float})

    def losses(self, setting: Setting, seed: int | None = None, tokens: Tokens = "all") -> list[float]:
        """Mean loss of every held-out window, in nats per token. Adds the perplexity to the table."""

        def measure(columns: dict[str, Any]) -> tuple[list[dict], dict[str, list]]:
            s = self.sources
            windows = self._losses_all if tokens == "all" else self._heldout_losses()
            loss = intervals.mean(windows)
            columns |= {"influenced": evaluate.influenced_share(self.model, s.window, s.context)}
            columns |= {"bos": self.tokenizer.bos_token_id is not None}  # `texts.token_ids` begins windows with it
            row = {"value": math.exp(loss.mean), "stderr": math.exp(loss.mean) * loss.stderr, "n": loss.n}
            names = {"task": "heldout", "metric": "perplexity"}
            return [columns | names | row], {"loss": windows.tolist()}

        return self._kept("losses", setting, seed, tokens, measure)["loss"]

    def rouge(self, setting: Setting, seed: int | None = None, tokens: Tokens = "decode") -> list[float]:
        """ROUGE-L of every article's summary, in percent. Adds the mean to the table."""

        def measure(columns: dict[str, Any]) -> tuple[list[dict], dict[str, list]]:
            s = self.sources
            articles = texts.summaries(s.summaries, s.articles)
            with self.costing("summaries", s.articles * s.summary_tokens) as costs:
                written, influenced = evaluate.summarise(
                    self.model, self.tokenizer, articles, s.summary_tokens, s.batch_size, s.bos
                )
            self._costs += costs
            scores = evaluate.rouge_l(articles, written)["rouge_l"].tolist()
            found = intervals.mean(scores)
            names = {"task": "summaries", "metric": "rouge_l", "influenced": influenced}
            row = {"value": found.mean, "stderr": found.stderr, "n": found.n}
            return [columns | names | row], {"rouge_l": scores}

        return self._kept("rouge", setting, seed, tokens, measure)["rouge_l"]

    def _kept(
        self, what: str, setting: Setting, seed: int | None, tokens: Tokens, measure: Callable,
        part: Mapping[str, Any] | None = None,
    ) -> dict[str, list]:  # fmt: skip
        """The per-item values of one measurement, from the table or, where it has none, from ``measure(columns)``.

        part: what else tells this measurement from others of its kind.
        """
        seed, same = self.seed if seed is None else seed, setting.canonical
        depends_on = {name: value for name, value in self.identity.items() if name not in UNUSED[what]}
        key = {"what": what, "tokens": repr(tokens), "seed": seed, "study": depends_on, **asdict(same)}
        key |= part or {}
        kept = self.table.find(key, setting.columns())
        if kept is None:
            self._put_weights()
            columns = self.apply(same, seed) | {"tokens": str(tokens)}
            with tokens_as(self.model, tokens), counting(self.model) as realised:
                rows, items = measure(columns)
            here = realised().realised  # NaN where everything had been measured before: the held-out text under "all"
            here = columns["realised"] if math.isnan(here) and tokens == "all" else here
            rows = [row | {"realised_here": here} for row in rows]
            kept = self.table.add(key, rows, items, self.spent(setting), setting.columns())
        return kept["items"]

    def spent(self, setting: Setting) -> list[dict[str, Any]]:
        """What was done for `setting` since rows were last kept, as costs of `Table.add`; forgotten here."""
        costs = [cost | {"sparsity": setting.sparsity} for cost in self._costs]
        self._costs.clear()
        return costs

    def _sparsify(self, setting: Setting, calibration: Calibration) -> None:
        with self.costing("calibrate", calibration.ids.numel() if setting.calibrated else 0) as costs:
            sparsify(self.model, calibration=calibration, tokens="all", store=self.store, **vars(setting))
        for tokens, seconds in calibration.searched:
            costs[-1]["seconds"] -= seconds
            costs.insert(0, {"what": "greedy", "seconds": seconds, "tokens": tokens})
        calibration.searched.clear()
        self._costs += costs

    def _heldout_losses(self) -> Tensor:
        """Mean loss of every held-out window, (windows,)."""
        with self.costing("heldout", self.heldout.numel()) as costs:
            losses = evaluate.token_losses(self.model, self.heldout, self.sources.context, "held-out text").mean(1)
        self._costs += costs
        return losses

    @contextmanager
    def costing(self, what: str, tokens: int = 0) -> Iterator[list[dict[str, Any]]]:
        """Time the work inside; afterwards the yielded list says what it took (costs of `Table.add`).

        Decompositions are told apart: they neither scale with tokens, nor with the speed that other work has.
        """
        costs: list[dict[str, Any]] = []
        started, known = time.monotonic(), len(self.store.computed)
        yield costs
        seconds = time.monotonic() - started
        for m, n, own in self.store.computed[known:]:
            costs.append({"what": f"factors of {what}", "seconds": own, "m": m, "n": n})
            seconds -= own
        costs.append({"what": what, "seconds": seconds, "tokens": tokens})


def scoring_cost(found: harness.Scored, only: Sequence[str] = ()) -> dict[str, Any]:
    """What scoring took, as a cost of `Table.add`; of some tasks with their names."""
    cost = {"what": "tasks", "seconds": found.seconds, "tokens": found.fed}
    return cost | ({"what": "some tasks", "only": " ".join(only)} if only else {})


FOUR = ("winogrande", "piqa", "sciq", "obqa")
"""The tasks of R-Sparse's Table 3, averaged as "average-4"."""
TEAL_AVERAGES = {"average-6": tuple(harness.TEAL), "average-4-teal": harness.TINY_TEAL}
"""The averages of TEAL's suites; other suites hold some of these tasks with other examples before them."""


def check_some(name: str, values: Sequence[Any], seeds: Sequence[int]) -> None:
    """ValueError unless a plan has some of `values`, called `name`, and some seeds, all of them whole numbers."""
    if not values or not seeds or any(type(seed) is not int for seed in seeds):
        raise ValueError(f"{name} are {values!r}, seeds {seeds!r}; expected some of each, seeds whole numbers")


def with_averages(found: dict[str, intervals.Interval]) -> dict[str, intervals.Interval]:
    """Intervals by task, and behind them those of unweighted averages: over all eight, over `FOUR`, over TEAL's."""
    averages = {"average": harness.TASKS, "average-4": FOUR}
    known = {name: tasks for name, tasks in averages.items() if set(tasks) <= set(found)}
    known |= {name: tasks for name, tasks in TEAL_AVERAGES.items() if set(tasks) == set(found)}
    return found | {name: intervals.macro([found[task] for task in tasks]) for name, tasks in known.items()}


def or_norm(items: pd.DataFrame) -> pd.DataFrame:
    """`items` with the column acc_or_norm: acc_norm where lm-eval defines it, else acc. Several papers print that."""
    return items.assign(acc_or_norm=items["acc_norm"].fillna(items["acc"]))


def task_rows(frame: pd.DataFrame, columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of every task and metric, and of their averages over tasks, from per-item values."""
    rows, frame = [], or_norm(frame)
    for metric in ("acc", "acc_norm", "acc_or_norm", "margin"):
        parts = {task: items[metric].dropna() for task, items in frame.groupby("task", sort=False)}
        counted = metric != "margin"
        found = {task: intervals.mean(values, counted=counted) for task, values in parts.items() if len(values)}
        found = with_averages(found)
        rows += [
            columns | {"task": task, "metric": metric, "value": x.mean, "stderr": x.stderr, "n": x.n}
            for task, x in found.items()
        ]
    return rows


def paired_rows(
    a: pd.DataFrame, b: pd.DataFrame, metrics: Sequence[str], columns: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of the differences a - b over the same items, per task and on average, with 95% intervals.

    A task whose items lack a metric, all of them, has no row for it.
    """
    rows = []
    for metric in metrics:
        found = {}
        for task, items in a.groupby("task", sort=False):
            if items[metric].isna().all():
                continue
            other = b[b["task"] == task].set_index("item").loc[items["item"], metric]
            pair = items[metric].to_numpy(float), other.to_numpy(float)
            found[task] = intervals.paired(*pair, counted=metric != "margin")
        for task, x in with_averages(found).items():
            rows.append(columns | {"task": task, "metric": f"diff_{metric}"} | x.row())
    return rows


def describe(setting: Setting, sources: Sources, report: Report | None = None) -> dict[str, Any]:
    """The columns that name a setting and, with its report, those that say how it was carried out."""
    calibrated = setting.calibrated
    columns = setting.columns() | {
        "model": sources.name,
        "calibration": f"{sources.calibration} {sources.samples}x{sources.length}" if calibrated else "",
        "dtype": sources.dtype,
        "bos": sources.bos,
    } | _stored(setting, sources.quantization)
    if report is None:
        return columns
    ranks = " ".join(f"{x.kind} {x.rank}" for x in report.linears[: len(models.KINDS)])
    found = {"planned": report.planned, "realised": report.realised, "ranks": ranks}
    return columns | found | ({} if math.isnan(report.nominal) else {"nominal": report.nominal})


def _stored(setting: Setting, quantization: Quantization | None) -> dict[str, str]:
    """The columns that say how INT4 weights were found, and in what precision the method's factors are stored."""
    if quantization is None:
        return {}
    has_factors = setting.recipe is not None or setting.method == "low-rank" or setting.canonical.method == "r-sparse"
    return {"weights": quantization.weights, "factor_dtype": quantization.factor_dtype if has_factors else ""}
