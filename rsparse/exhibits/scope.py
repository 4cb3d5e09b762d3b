"""Scope ablation: how much of R-Sparse's gain over CATS and GRIFFIN is scope, and how much is the method?

R-Sparse (arXiv 2504.19449), Table 1, sets a method of all linears against two of the MLP alone, at the same model-level
sparsity: whoever leaves attention dense has to leave more of the MLP unread. R-Sparse on the MLP alone stands between:

    R-Sparse(all) - rival  =  [R-Sparse(all) - R-Sparse(mlp)]  +  [R-Sparse(mlp) - rival]
             gain          =            scope part             +       method part

This holds item by item, so each part has a paired interval, and so has the difference of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from rsparse import intervals
from rsparse.exhibits import paired
from rsparse.exhibits.paired import Arm
from rsparse.models import SCOPES
from rsparse.study import DENSE, Setting, Study, describe, paired_rows

METHODS = ("r-sparse", "teal")
"""The methods that are put on every scope."""
RIVALS = ("cats", "griffin")
"""Methods of the MLP alone, in their own scope."""


@dataclass(frozen=True)
class Plan:
    """What the exhibit compares. ValueError, before anything is measured, for a value that is not allowed.

    methods: of `METHODS`, R-Sparse among them. sparsities: model-level budgets of scopes "all" and "mlp" and of the
    rivals; small_sparsities: of all three scopes, since attention's ceiling is near. rho: of R-Sparse. threshold: of
    every method that has one. seeds: each picks its own calibration windows.
    """

    methods: Sequence[str]
    sparsities: Sequence[float]
    small_sparsities: Sequence[float]
    rho: float
    threshold: str
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        if "r-sparse" not in self.methods or set(self.methods) - set(METHODS):
            raise ValueError(f"methods are {self.methods!r}; expected r-sparse, and at most {', '.join(METHODS)}")
        if not self.seeds or any(type(seed) is not int for seed in self.seeds):
            raise ValueError(f"seeds are {self.seeds!r}; expected some, whole numbers")
        if not self.sparsities or 0 in (*self.sparsities, *self.small_sparsities):
            asked = f"sparsities are {self.sparsities!r}, small_sparsities {self.small_sparsities!r}"
            raise ValueError(f"{asked}; expected some of the first, and none of 0: dense is measured anyway")
        if self.rho in (0, 1):
            raise ValueError(f"rho is {self.rho!r}; expected one between 0 and 1, which spends on both paths")
        for sparsity in (*self.sparsities, *self.small_sparsities):
            self.setting("r-sparse", sparsity)

    @property
    def budgets(self) -> list[float]:
        return sorted({*self.sparsities, *self.small_sparsities})

    def setting(self, method: str, sparsity: float, scope: str | None = None) -> Setting:
        return Setting(method, sparsity, self.rho, threshold=self.threshold, scope=scope)

    def grid(self) -> list[Setting]:
        """Everything but dense; whether a scope can reach a budget is not asked here.

        From the smallest sparsity up, the widest scope first: it takes the largest rank of a linear, which serves the
        others.
        """
        found = []
        for sparsity in self.budgets:
            scopes = SCOPES if sparsity in self.small_sparsities else ("all", "mlp")
            found += [self.setting(method, sparsity, scope) for method in self.methods for scope in scopes]
            found += [self.setting(rival, sparsity) for rival in RIVALS if sparsity in self.sparsities]
        return found

    def parts(self, method: str, sparsity: float, rival: str) -> list[Setting]:
        """The three settings between which a gain is split: whole, MLP alone, rival."""
        return [self.setting(method, sparsity), self.setting(method, sparsity, "mlp"), self.setting(rival, sparsity)]

    def pairs(self) -> Iterator[tuple[Setting, Setting, str]]:
        """(arm, what it is set against, label): whole against part, and either against the rivals."""
        for sparsity in self.budgets:
            for method in self.methods:
                whole, mlp, attention = (self.setting(method, sparsity, scope) for scope in ("all", "mlp", "attention"))
                yield whole, mlp, "scope=mlp"
                yield whole, attention, "scope=attention"
                for rival in RIVALS:
                    for arm in (whole, mlp):
                        yield arm, self.setting(rival, sparsity), rival


def measure(study: Study, plan: Plan) -> list[Setting]:
    """Tasks and held-out loss of dense and of every setting that is within reach on this checkpoint.

    Adds the paired differences that the question turns on. Returns the settings that are out of reach.
    """
    grid = plan.grid()
    left_out = [x for x in grid if not study.reaches(x)]
    found = [x for x in grid if x not in left_out]
    for setting in tqdm([DENSE, *found], desc="settings"):
        paired.of(study, setting).measure(plan.seeds)
    for arm, other, label in plan.pairs():
        if arm in found and other in found:
            paired.add_differences(paired.of(study, arm), paired.of(study, other), plan.seeds, label)
    for sparsity in plan.budgets:
        for method in plan.methods:
            for rival in RIVALS:
                parts = plan.parts(method, sparsity, rival)
                if all(x in found for x in parts):
                    _compare_parts(*(paired.of(study, x) for x in parts), plan.seeds)
    return left_out


def _compare_parts(whole: Arm, mlp: Arm, rival: Arm, seeds: Sequence[int]) -> None:
    """Rows of scope part minus method part of the gain over `rival`, paired like the parts themselves."""
    study, label = whole.study, f"method part over {rival.setting.method}"
    key = {"what": "parts", "arms": [arm.key() for arm in (whole, mlp, rival)], "seeds": list(seeds)}
    if study.table.find(key) is not None:
        return
    base = describe(whole.setting, study.sources) | {"seed": "/".join(map(str, whole.seeds(seeds))), "against": label}
    losses = [arm.losses(seeds) for arm in (whole, mlp, rival)]
    scope, method = ([a - b for a, b in zip(*pair, strict=True)] for pair in (losses[:2], losses[1:]))
    heldout = {"tokens": str(whole.loss_tokens), "task": "heldout", "metric": "diff_perplexity_log"}
    rows = [base | heldout | intervals.paired(scope, method).row()]
    items = [arm.items(seeds).set_index(["task", "item"]) for arm in (whole, mlp, rival)]
    scope, method = ((a - b).reset_index() for a, b in (items[:2], items[1:]))
    study.table.add(key, rows + paired_rows(scope, method, paired.METRICS, base | {"tokens": str(whole.tokens)}))
