"""Figure 7: GRIFFIN on the MLP against GRIFFIN on all blocks, at the same model-level sparsity.

R-Sparse (arXiv 2504.19449), appendix, Figure 7. Attention holds a part of the bytes, so a budget that spares it must
take more of the MLP; which is better is what the figure asks. How attention is pruned is our choice, stated in
rsparse.methods.griffin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from rsparse import intervals
from rsparse.exhibits import paired
from rsparse.study import DENSE, Setting, Study, describe

SCOPES = ("mlp", "all")
AGAINST = "scope=all"


@dataclass(frozen=True)
class Plan:
    """What the exhibit compares. ValueError, before anything is measured, for a value that is not allowed.

    sparsities: model-level budgets of either scope. seeds: GRIFFIN calibrates nothing, the first alone counts.
    """

    sparsities: Sequence[float]
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        if not self.seeds or any(type(seed) is not int for seed in self.seeds):
            raise ValueError(f"seeds are {self.seeds!r}; expected some, whole numbers")
        if not self.sparsities or 0 in self.sparsities:
            raise ValueError(f"sparsities are {self.sparsities!r}; expected some, none of 0: dense is measured anyway")
        self.grid()

    def setting(self, scope: str, sparsity: float) -> Setting:
        return Setting("griffin", sparsity, scope=scope)

    def grid(self) -> list[tuple[Setting, Setting]]:
        """(MLP alone, all blocks) at every budget; whether the MLP alone can reach it is not asked here."""
        return [tuple(self.setting(scope, sparsity) for scope in SCOPES) for sparsity in self.sparsities]


def measure(study: Study, plan: Plan) -> list[Setting]:
    """Tasks, held-out loss and summaries of dense and, at every budget that both scopes reach, of both scopes.

    Adds their paired differences, MLP alone minus all blocks. Returns the settings that are out of reach.
    """
    left_out = [setting for pair in plan.grid() for setting in pair if not study.reaches(setting)]
    pairs = [pair for pair in plan.grid() if not set(pair) & set(left_out)]
    seed = plan.seeds[0]
    for setting in tqdm([DENSE, *(setting for pair in pairs for setting in pair)], desc="settings"):
        paired.of(study, setting).measure(plan.seeds)
        study.rouge(setting, seed)
    for pair in pairs:
        mlp, both = (paired.of(study, setting) for setting in pair)
        paired.add_differences(mlp, both, plan.seeds, AGAINST)
        _add_summary_difference(study, *pair, seed)
    return left_out


def _add_summary_difference(study: Study, mlp: Setting, both: Setting, seed: int) -> None:
    """The row of the paired difference of ROUGE-L, in points, over the same articles."""
    key = {"what": "paired summaries", "settings": [vars(mlp), vars(both)], "seed": seed, "study": study.identity}
    if study.table.find(key) is None:
        found = intervals.paired(study.rouge(mlp, seed), study.rouge(both, seed))
        names = {"tokens": "decode", "task": "summaries", "metric": "diff_rouge_l", "against": AGAINST}
        study.table.add(key, [describe(mlp, study.sources) | {"seed": str(seed)} | names | found.row()])
