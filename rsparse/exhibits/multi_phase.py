"""Figure 2: small activations replaced by a few constant levels, beside the deployed method at the same sparsity.

R-Sparse (arXiv 2504.19449), section 3.2 and Figure 2: at 90% sparsity a second phase recovers most of what one phase
loses, on two question-answering tasks that no public text names. See rsparse.phases for the levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from rsparse import evaluate, harness, intervals, phases
from rsparse.apply import tokens_as
from rsparse.linears import KeptTally
from rsparse.models import decoder_linears
from rsparse.study import DENSE, Setting, Study, check_some, scoring_cost, task_rows

METHOD = "multi-phase-relu"
AVERAGE = "average-2"
"""The unweighted mean over the exhibit's tasks."""


@dataclass(frozen=True)
class Plan:
    """What the exhibit compares. ValueError, before anything is measured, for a value that is not allowed.

    sparsities: shares of the inputs that take a level, of every linear; of the deployed methods, of the bytes. phases:
    numbers of levels. sides: which values are dropped, see rsparse.phases. rho: of R-Sparse. tasks: scored alone.
    """

    sparsities: Sequence[float]
    phases: Sequence[int]
    sides: Sequence[str]
    rho: float
    threshold: str
    tasks: Sequence[str]
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        check_some("sparsities", self.sparsities, self.seeds)
        if not all(0 < s < 1 for s in self.sparsities) or not self.sides or not set(self.sides) <= set(phases.SIDES):
            sides = f"sides of {', '.join(phases.SIDES)}"
            raise ValueError(
                f"sparsities are {self.sparsities}, sides {self.sides}; expected some in (0, 1), and {sides}"
            )
        counts = self.phases and all(type(x) is int and x > 0 for x in self.phases)
        if not set(self.tasks) <= set(harness.TASKS) or not self.tasks or not counts:
            known = f"some of {', '.join(harness.TASKS)}, and some whole numbers of at least 1"
            raise ValueError(f"tasks are {self.tasks}, phases {self.phases}; expected {known}")
        for sparsity in self.sparsities:
            self.deployed(sparsity)

    def deployed(self, sparsity: float) -> dict[str, Setting]:
        """What is put beside the phases at one sparsity."""
        return {
            "teal": Setting("teal", sparsity, threshold=self.threshold),
            "r-sparse": Setting("r-sparse", sparsity, self.rho, threshold=self.threshold),
        }


Items = dict[str, list]
"""Per-item values of one measurement: "loss" of held-out windows (nats per token), and the columns of the tasks'."""


def measure(study: Study, plan: Plan) -> None:
    """Held-out loss and the plan's tasks of dense, the deployed methods and every number of phases; and differences."""
    dense, known = _deployed(study, plan, DENSE), {}
    for sparsity in tqdm(plan.sparsities, desc="sparsities"):
        beside = {name: _deployed(study, plan, setting) for name, setting in plan.deployed(sparsity).items()}
        for side in plan.sides:
            found: dict[int, list[Items]] = {}
            for count in sorted(plan.phases):
                columns = _columns(study, sparsity, count, side)
                found[count] = [_phases(study, plan, columns | {"seed": seed}, known) for seed in plan.seeds]
                columns |= {"seed": "/".join(map(str, plan.seeds))}
                _differences(study, plan, columns, found[count], beside | {"dense": dense})
                if 1 in found and count > 1:
                    _recovery(study, plan, columns, found[count], found[1], dense)


def _columns(study: Study, sparsity: float, count: int, side: str) -> dict[str, Any]:
    s = study.sources
    return {
        "model": s.name, "method": METHOD, "scope": "all", "recipe": "", "sparsity": sparsity, "rho": None,
        "score": side, "threshold": "static", "calibration": f"{s.calibration} {s.samples}x{s.length}",
        "dtype": s.dtype, "bos": s.bos, "phases": count,
    }  # fmt: skip


def _deployed(study: Study, plan: Plan, setting: Setting) -> list[Items]:
    """Per seed, the items of a setting that `sparsify` can make."""
    found = []
    for seed in setting.seeds(plan.seeds):
        losses = study.losses(setting, seed)
        found.append({"loss": losses, **study.tasks(setting, seed, only=plan.tasks).to_dict("list")})
    return found


def _phases(study: Study, plan: Plan, columns: dict[str, Any], known: dict[int, Any]) -> Items:
    """The items of one number of phases, from the table or measured. known: by seed, statistics of the dense model."""
    key = {"what": "multi-phase", "columns": columns, "tasks": list(plan.tasks), "study": study.identity}
    if (kept := study.table.find(key)) is None:
        s, calibration, model = study.sources, study.calibration(columns["seed"]), study.dense()
        with ExitStack() as stack:
            with study.costing("calibrate", calibration.ids.numel()) as costs:
                if columns["seed"] not in known:
                    known[columns["seed"]] = phases.collect(model, calibration.ids, decoder_linears(model))
                asked = columns["sparsity"], columns["phases"], columns["score"], known[columns["seed"]]
                tallies = stack.enter_context(phases.multi_phase(calibration, *asked))
            with study.costing("heldout", study.heldout.numel()) as more:
                losses = evaluate.token_losses(model, study.heldout, s.context, "held-out text").mean(1)
            columns = columns | {"realised": replaced(model, tallies)}
            with tokens_as(model, "scored"):
                sizes = s.suite, s.items, s.batch_size, s.bos
                scored = harness.score_tasks(model, study.tokenizer, *sizes, plan.tasks)
        rows = [_perplexity(columns, losses.tolist()), *task_rows(scored.items, columns | {"tokens": "scored"})]
        items = {"loss": losses.tolist(), **scored.items.to_dict("list")}
        kept = study.table.add(key, rows, items, [*costs, *more, scoring_cost(scored, plan.tasks)])
    return kept["items"]


def replaced(model, tallies: Mapping[str, KeptTally]) -> float:
    """Share of the inputs that took a level, in the tokens that were tallied, linears weighted by their weights."""
    sizes = {x.name: x.shape[0] * x.shape[1] for x in decoder_linears(model)}
    widths = {x.name: x.channels for x in decoder_linears(model)}
    stays = sum(sizes[name] * tally.mean / widths[name] for name, tally in tallies.items())
    return 1 - stays / sum(sizes.values())


def _perplexity(columns: dict[str, Any], losses: list[float]) -> dict[str, Any]:
    loss = intervals.mean(losses)
    value = math.exp(loss.mean)
    named = {"tokens": "all", "task": "heldout", "metric": "perplexity"}
    return columns | named | {"value": value, "stderr": value * loss.stderr, "n": loss.n}


def _differences(
    study: Study, plan: Plan, columns: dict[str, Any], runs: list[Items], others: Mapping[str, list[Items]]
) -> None:
    """Rows of paired differences from every other, positive where the row's own is higher."""
    for against, other in others.items():
        combined = _combined(plan, lambda own, theirs: own - theirs, runs, other)
        _add(study, plan, columns | {"against": against}, "diff", combined)


def _recovery(
    study: Study, plan: Plan, columns: dict[str, Any], runs: list[Items], one: list[Items], dense: list[Items]
) -> None:
    """Rows of what more phases win back of one phase's loss, minus what they still lose; above zero: most of it."""
    combined = _combined(plan, lambda own, first, whole: (own - first) - (whole - own), runs, one, dense)
    combined["perplexity_log"] = {task: -values for task, values in combined["perplexity_log"].items()}
    _add(study, plan, columns | {"against": "phases=1"}, "recovery", combined)


def _combined(plan: Plan, combine: Callable, *sides: list[Items]) -> dict[str, dict[str, np.ndarray]]:
    """Metric -> task -> ``combine`` of the sides' per-item values, means over seeds."""

    def values(runs: list[Items], task: str, metric: str) -> np.ndarray:
        if metric == "perplexity_log":
            return np.mean([run["loss"] for run in runs], axis=0)
        return np.mean([np.asarray(run[metric], float)[np.asarray(run["task"]) == task] for run in runs], axis=0)

    wanted = {"perplexity_log": ("heldout",), "acc": plan.tasks, "margin": plan.tasks}
    return {
        metric: {task: combine(*(values(runs, task, metric) for runs in sides)) for task in tasks}
        for metric, tasks in wanted.items()
    }


def _add(study: Study, plan: Plan, columns: dict[str, Any], name: str, combined: Mapping[str, Mapping]) -> None:
    """Rows of `combined` with 95% intervals, per task and, for tasks, on average."""
    key = {"what": name, "columns": columns, "seeds": list(plan.seeds), "tasks": list(plan.tasks)}
    key |= {"study": study.identity, "rho": plan.rho, "threshold": plan.threshold}
    if study.table.find(key) is not None:
        return
    rows = []
    for metric, tasks in combined.items():
        found = {task: intervals.mean(values, counted=metric == "acc") for task, values in tasks.items()}
        if metric != "perplexity_log":
            found[AVERAGE] = intervals.macro([found[task] for task in plan.tasks])
        tokens = "all" if metric == "perplexity_log" else "scored"
        about = columns | {"tokens": tokens, "metric": f"{name}_{metric}"}
        rows += [about | {"task": task} | x.row() for task, x in found.items()]
    study.table.add(key, rows)
