"""What happens inside of a sparse model: what single tokens read, and how errors travel from block to block.

Beyond the paper, whose budgets are means over a text (R-Sparse, arXiv 2504.19449, section 3.4). A latency budget needs
the spread, and a kernel the worst case. Errors: the relative distance of the residual stream from the dense model's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rsparse import intervals
from rsparse.methods import METHODS
from rsparse.propagation import block_errors
from rsparse.report import LinearReport
from rsparse.study import Setting, Study, check_some, describe
from rsparse.token_sparsity import per_token, together

BINS = 400
"""Of the histogram of what single tokens realise, over sparsities from 0 to 1."""
TEXTS = ("calibration", "heldout")


@dataclass(frozen=True)
class Plan:
    """What is looked into. ValueError, before anything is measured, for a value that is not allowed.

    methods: of `rsparse.METHODS` but dense and those that a prompt steers, or "r-sparse (whitened)"; each at every one
    of `sparsities` that it can reach.
    """

    methods: Sequence[str]
    sparsities: Sequence[float]
    rho: float
    threshold: str
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        check_some("methods", self.methods, self.seeds), check_some("sparsities", self.sparsities, self.seeds)
        self.settings()

    def settings(self) -> list[Setting]:
        """Every method at every sparsity."""
        made = []
        for sparsity in self.sparsities:
            for name in self.methods:
                method, _, variant = name.partition(" ")
                if variant not in ("", "(whitened)") or (variant and method != "r-sparse"):
                    raise ValueError(f"method is {name!r}; expected a method, or 'r-sparse (whitened)'")
                if method in METHODS and (method == "dense" or METHODS[method].prompted):
                    raise ValueError(f"method is {name!r}; expected one whose tokens choose for themselves")
                factors = "whitened" if variant else "svd"
                made.append(Setting(method, sparsity, self.rho, threshold=self.threshold, factors=factors))
        return made


Histograms = dict[tuple[str, float], np.ndarray]
"""(method as the plan names it, sparsity) -> (BINS,) shares of the held-out tokens, first seed."""


def label(setting: Setting) -> str:
    """A setting's method as the plan names it."""
    return setting.method + (" (whitened)" if setting.factors == "whitened" else "")


def measure(study: Study, plan: Plan) -> Histograms:
    """Rows of what tokens realise, of the errors behind every block and of their differences between methods, and the
    histograms for display."""
    found: Histograms = {}
    errors: dict[Setting, np.ndarray] = {}
    reached = [x for x in plan.settings() if study.reaches(x)]
    for setting in tqdm(reached, desc="settings"):
        items = [_measure(study, setting, seed) for seed in setting.seeds(plan.seeds)]
        found[label(setting), setting.sparsity] = np.array(items[0]["histogram"], float)
        errors[setting] = np.mean([own["errors"] for own in items], axis=0)
    order = sorted(errors, key=lambda x: (list(METHODS).index(x.method), x.factors != "svd"))  # not the plan's
    for other, setting in itertools.combinations(order, 2):
        if other.sparsity == setting.sparsity:
            _compare(study, plan, (setting, errors[setting]), (other, errors[other]))
    return found


def _measure(study: Study, setting: Setting, seed: int) -> dict[str, list]:
    key = {"what": "inside", "setting": vars(setting) | {"recipe": None}, "seed": seed, "study": study.identity}
    if (kept := study.table.find(key)) is None:
        applied = study.apply(setting, seed)
        base = describe(setting, study.sources) | applied | {"tokens": "all", "line": label(setting)}
        texts = dict(zip(TEXTS, (study.calibration(seed).ids, study.heldout), strict=True))
        rows, histogram = [], []
        with study.costing("inside", sum(ids.numel() for ids in texts.values())) as costs:
            for text, ids in texts.items():
                tokens = per_token(study.model, ids)
                rows += [base | row | {"text": text} for row in realised_rows(tokens, ids.shape[1])]
                histogram = np.histogram(together(tokens), BINS, (0, 1))[0] / ids.numel()  # of the last text, held-out
        with study.costing("propagation", 2 * study.heldout.numel()) as more:
            errors = block_errors(study.model, study.heldout)
        rows += [base | row for row in error_rows(errors)]
        items = {"histogram": histogram.tolist(), "errors": errors.tolist()}
        kept = study.table.add(key, rows, items, [*study.spent(setting), *costs, *more])
    return kept["items"]


def _compare(study: Study, plan: Plan, own: tuple[Setting, np.ndarray], other: tuple[Setting, np.ndarray]) -> None:
    """Rows of one setting's errors minus another's, over the same samples, behind every block and over all of them;
    means over seeds."""
    (setting, errors), (against, theirs) = own, other
    key = {"what": "inside, differences", "seeds": list(plan.seeds), "study": study.identity}
    key |= {"settings": [vars(x) | {"recipe": None} for x in (setting, against)]}
    if study.table.find(key) is None:
        base = describe(setting, study.sources) | {"tokens": "all", "line": label(setting), "against": label(against)}
        base |= {"seed": "/".join(map(str, plan.seeds)), "metric": "diff_relative_error"}
        gap = errors - theirs
        whole = {"task": "residual-stream", "linear": "all blocks"} | intervals.mean(gap.mean(1)).row()
        study.table.add(key, [row | base for row in (*error_rows(torch.from_numpy(gap)), whole)])


def realised_rows(tokens: dict[LinearReport, Tensor], length: int) -> Iterator[dict[str, Any]]:
    """Sparsity over tokens of the whole decoder, of every block, and of every linear: mean, spread, 1% and 99%, worst.

    worst: of the token that reads most. first: mean over the first positions of the samples, of `length` tokens each.
    """
    layers = sorted({line.layer for line in tokens})
    parts = [({"linear": "decoder"}, tokens)]
    for layer in layers:
        inside = {line: values for line, values in tokens.items() if line.layer == layer}
        parts.append(({"linear": "block", "layer": layer}, inside))
        parts += [({"linear": line.kind, "layer": layer}, {line: values}) for line, values in inside.items()]
    for about, part in parts:
        values = together(part)
        base = {"task": "realised", "n": len(values)} | about
        numbers = {
            "mean": values.mean(), "spread": values.std(correction=0), "worst": values.min(),
            "low": values.quantile(0.01), "high": values.quantile(0.99), "first": values[::length].mean(),
        }  # fmt: skip
        planned = sum(line.dense_bytes * (1 - line.read) for line in part) / sum(line.dense_bytes for line in part)
        yield from (base | {"metric": f"realised_{name}", "value": float(x)} for name, x in numbers.items())
        yield base | {"metric": "planned", "value": planned}


def error_rows(errors: Tensor) -> Iterator[dict[str, Any]]:
    """Relative error after every block, mean over samples with its 95% interval. errors: (samples, blocks)."""
    for layer, values in enumerate(errors.T):
        yield {"task": "residual-stream", "metric": "relative_error", "layer": layer} | intervals.mean(values).row()
