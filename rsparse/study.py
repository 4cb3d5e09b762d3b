"""One checkpoint, measured setting by setting: tasks, perplexity and summaries as rows of a result table.

The model is loaded when the first setting has to be computed, and stays; a setting that the table holds
already is not computed again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
from torch import Tensor

from rsparse import evaluate, harness, intervals, models, texts
from rsparse.apply import Report, counting, sparsify, tokens_as
from rsparse.calibrate import Calibration
from rsparse.methods import METHODS
from rsparse.protocol import Tokens
from rsparse.recipe import Ask
from rsparse.results import Table


@dataclass(frozen=True)
class Setting:
    """One way to sparsify a model; the arguments of `rsparse.sparsify` by their names.

    Raises ValueError for a value that is not allowed: a grid of settings is refused before any is measured.
    """

    method: str
    sparsity: float = 0.0
    rho: float = 0.95
    score: str = "magnitude"
    threshold: str = "static"
    scope: str = "all"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if self.scope not in models.SCOPES:
            raise ValueError(f"scope is {self.scope!r}; expected one of {', '.join(models.SCOPES)}")
        Ask(self.sparsity, self.rho, self.score, self.threshold)

    @property
    def has_mask(self) -> bool:
        """Whether the method chooses input channels by a score."""
        return self.method not in ("dense", "low-rank")

    def seeds(self, seeds: Sequence[int]) -> Sequence[int]:
        """The seeds that differ for this setting: one where nothing is calibrated."""
        return seeds if self.has_mask and self.threshold != "per-token" else seeds[:1]

    def columns(self) -> dict[str, Any]:
        """The columns of `results.COLUMNS` that name it; "" and None where a column means nothing."""
        own = self.method == "r-sparse"
        return {
            "method": self.method,
            "scope": self.scope,
            "recipe": "uniform" if own else "",
            "sparsity": self.sparsity,
            "rho": {"dense": None, "teal": 1.0, "low-rank": 0.0}.get(self.method, self.rho),
            "score": ("magnitude", self.score)[own] if self.has_mask else "",
            "threshold": self.threshold if self.has_mask else "",
        }


DENSE = Setting("dense")


@dataclass(frozen=True)
class Sources:
    """What a study measures on. Every field is a parameter of the notebooks that use it.

    checkpoint: as `models.load_model` names it. name: what tables call the model. samples, length:
    calibration windows. windows, window, context: held-out windows, their tokens, and how many of these are
    not scored. items: per task, None for all. suite: whose tasks. summary_tokens: most that a summary may
    have.

    Raises ValueError for a text, suite or dtype that does not exist, and for sizes below 1.
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

    def __post_init__(self) -> None:
        for text in (self.calibration, self.heldout, self.summaries):
            texts.check_text(text, "heldout")
        for name, allowed in (("suite", harness.SUITES), ("dtype", tuple(models.DTYPES))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
        sizes = "items batch_size samples length windows window articles summary_tokens".split()
        for name in sizes:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")


@dataclass
class Study:
    """Measures settings of one checkpoint into `table`."""

    sources: Sources
    table: Table
    seed: int = 0
    _calibration: dict[int, Calibration] = field(default_factory=dict)
    _applied: tuple[Setting, int] | None = None
    _columns: dict[str, Any] = field(default_factory=dict)
    _losses_all: Tensor | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What every key holds, so that nothing measured on other sources is taken for this study's."""
        return asdict(self.sources) | {"heldout seed": self.seed}

    @cached_property
    def model(self):
        return models.load_model(
            self.sources.checkpoint, self.sources.dtype, self.sources.device, self.sources.device_map or None
        )

    @cached_property
    def tokenizer(self):
        return models.load_tokenizer(self.sources.checkpoint)

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
        """Put `setting` on the model, calibrated with `seed`; the columns that describe it.

        One pass over the held-out text gives the realised sparsity and, by the way, the losses under "all".
        """
        if self._applied != (setting, seed):
            self._applied = None
            sparsify(self.model, calibration=self.calibration(seed), tokens="all", **asdict(setting))
            with counting(self.model) as realised:
                losses = evaluate.token_losses(self.model, self.heldout, self.sources.context, "held-out text")
                self._columns = describe(setting, self.sources, realised())
            self._losses_all = losses.mean(1)
            self._applied = (setting, seed)
        return self._columns | {"seed": seed}

    def tasks(self, setting: Setting, seed: int | None = None, tokens: Tokens = "scored") -> pd.DataFrame:
        """Score the eight tasks: one row per item (task, item, acc, acc_norm, margin in nats). Adds rows."""
        seed = self.seed if seed is None else seed
        key = self._key("tasks", setting, seed, tokens)
        if (kept := self.table.find(key)) is None:
            columns = self.apply(setting, seed) | {"tokens": str(tokens)}
            s, started = self.sources, time.monotonic()
            with tokens_as(self.model, tokens):
                frame, influenced = harness.score_tasks(
                    self.model, self.tokenizer, s.suite, s.items, s.batch_size, s.bos
                )
            rows = task_rows(frame, columns | {"influenced": influenced})
            kept = self.table.add(key, rows, frame.to_dict("list"), time.monotonic() - started)
        return pd.DataFrame(kept["items"]).astype({"acc_norm": float})

    def losses(self, setting: Setting, seed: int | None = None, tokens: Tokens = "all") -> list[float]:
        """Mean loss of every held-out window, in nats per token. Adds the perplexity to the table."""
        seed = self.seed if seed is None else seed
        key = self._key("losses", setting, seed, tokens)
        if (kept := self.table.find(key)) is None:
            columns = self.apply(setting, seed) | {
                "tokens": str(tokens),
                "task": "heldout",
                "metric": "perplexity",
            }
            s, started = self.sources, time.monotonic()
            with tokens_as(self.model, tokens):
                windows = self._losses_all
                if tokens != "all":
                    windows = evaluate.token_losses(self.model, self.heldout, s.context, "held-out text").mean(1)
                columns["influenced"] = evaluate.influenced_share(self.model, s.window, s.context)
            loss = intervals.mean(windows)
            row = {"value": math.exp(loss.mean), "stderr": math.exp(loss.mean) * loss.stderr, "n": loss.n}
            items = {"loss": windows.tolist()}
            kept = self.table.add(key, [columns | row], items, time.monotonic() - started)
        return kept["items"]["loss"]

    def rouge(self, setting: Setting, seed: int | None = None, tokens: Tokens = "decode") -> list[float]:
        """ROUGE-L of every article's summary, in percent. Adds the mean to the table."""
        seed = self.seed if seed is None else seed
        key = self._key("rouge", setting, seed, tokens)
        if (kept := self.table.find(key)) is None:
            columns = self.apply(setting, seed) | {
                "tokens": str(tokens),
                "task": "summaries",
                "metric": "rouge_l",
            }
            s, started = self.sources, time.monotonic()
            articles = texts.summaries(s.summaries, s.articles)
            with tokens_as(self.model, tokens):
                columns["influenced"] = float(setting.method != "dense")
                written = evaluate.summarise(
                    self.model, self.tokenizer, articles, s.summary_tokens, s.batch_size
                )
            scores = evaluate.rouge_l(articles, written)["rouge_l"].tolist()
            found = intervals.mean(scores)
            row = {"value": found.mean, "stderr": found.stderr, "n": found.n}
            kept = self.table.add(key, [columns | row], {"rouge_l": scores}, time.monotonic() - started)
        return kept["items"]["rouge_l"]

    def _key(self, what: str, setting: Setting, seed: int, tokens: Tokens) -> dict[str, Any]:
        return {"what": what, "tokens": repr(tokens), "seed": seed, "study": self.identity, **asdict(setting)}


FOUR = ("winogrande", "piqa", "sciq", "obqa")
"""The tasks of R-Sparse's Table 3, averaged as "average-4"."""


def with_averages(found: dict[str, intervals.Interval]) -> dict[str, intervals.Interval]:
    """Intervals by task, and behind them those of the unweighted averages over all eight and over `FOUR`."""
    averages = {"average": harness.TASKS, "average-4": FOUR}
    known = {name: tasks for name, tasks in averages.items() if set(tasks) <= set(found)}
    return found | {name: intervals.macro([found[task] for task in tasks]) for name, tasks in known.items()}


def task_rows(frame: pd.DataFrame, columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of every task and metric, and of their averages over tasks, from per-item values."""
    rows = []
    for metric in ("acc", "acc_norm", "margin"):
        parts = {task: items[metric].dropna() for task, items in frame.groupby("task", sort=False)}
        found = with_averages({task: intervals.mean(values) for task, values in parts.items() if len(values)})
        rows += [
            columns | {"task": task, "metric": metric, "value": x.mean, "stderr": x.stderr, "n": x.n}
            for task, x in found.items()
        ]
    return rows


def paired_rows(
    a: pd.DataFrame, b: pd.DataFrame, metrics: Sequence[str], columns: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of the differences a - b over the same items, per task and on average, with 95% intervals."""
    rows = []
    for metric in metrics:
        found = {}
        for task, items in a.groupby("task", sort=False):
            other = b[b["task"] == task].set_index("item").loc[items["item"], metric]
            found[task] = intervals.paired(items[metric].to_numpy(float), other.to_numpy(float))
        for task, x in with_averages(found).items():
            rows.append(columns | {"task": task, "metric": f"diff_{metric}"} | x.row())
    return rows


def describe(setting: Setting, sources: Sources, report: Report | None = None) -> dict[str, Any]:
    """The columns that name a setting and, with its report, those that say how it was carried out."""
    calibrated = setting.has_mask and setting.threshold != "per-token"
    columns = setting.columns() | {
        "model": sources.name,
        "calibration": f"{sources.calibration} {sources.samples}x{sources.length}" if calibrated else "",
        "dtype": sources.dtype,
        "bos": sources.bos,
    }
    if report is None:
        return columns
    ranks = " ".join(f"{x.kind} {x.rank}" for x in report.linears[: len(models.KINDS)])
    return columns | {"planned": report.planned, "realised": report.realised, "ranks": ranks}
