"""Table 1: every method on the eight tasks, at the paper's operating points and at matched budgets.

R-Sparse (arXiv 2504.19449), Table 1. The paper compares CATS at 22 and 40%, GRIFFIN at 33 and 50% and R-Sparse at 40
and 50%; here every method that can reach it stands at every budget too. Differences are paired, from dense and from
R-Sparse at the same budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from rsparse.exhibits import paired
from rsparse.methods import METHODS
from rsparse.study import DENSE, Setting, Study, check_some
from rsparse.thresholds import SCORES

NATIVE = {("cats", 0.22): 0.4, ("griffin", 0.33): 0.5}
"""The paper's claim sets a method at its own operating point against R-Sparse at a larger sparsity."""
BASELINE = {"chess": "cats", "teal-greedy": "teal", "wina": "teal", "wina-rotated": "teal", "larosa": "teal"}
"""The method that a method's own paper sets it against."""


@dataclass(frozen=True)
class Plan:
    """What the exhibit compares. ValueError, before anything is measured, for a value that is not allowed.

    methods: names in METHODS. sparsities: matched budgets, model-level. operating_points: "METHOD SPARSITY", the
    paper's. rho: of R-Sparse. threshold: of every method that has one. seeds: each picks its calibration windows.
    """

    methods: Sequence[str]
    sparsities: Sequence[float]
    operating_points: Sequence[str]
    rho: float
    threshold: str
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        check_some("methods", self.methods, self.seeds)
        if "r-sparse" not in self.methods:
            raise ValueError(f"methods are {self.methods!r}; expected r-sparse, which the others are set against")
        if bad := [s for s in self.sparsities if s == 0]:
            raise ValueError(f"sparsity is {bad[0]!r}; expected a budget above 0, dense is measured anyway")
        self.matched(), self.operating()

    def setting(self, method: str, sparsity: float, score: str = "magnitude") -> Setting:
        return Setting(method, sparsity, self.rho, score, self.threshold)

    def matched(self) -> list[Setting]:
        """Every method at every budget, R-Sparse with either score; whether a method can is not asked here."""
        scores = {name: SCORES if "score" in METHODS[name].takes else SCORES[:1] for name in self._known()}
        knobs = [name for name in self.methods if "sparsity" in METHODS[name].takes]
        return [self.setting(name, s, score) for s in self.sparsities for name in knobs for score in scores[name]]

    def operating(self) -> list[Setting]:
        """The paper's operating points, and the methods without a knob."""
        points = [_point(text) for text in self.operating_points]
        free = [name for name in self._known() if not METHODS[name].takes and METHODS[name].parts]
        return [self.setting(*point) for point in points] + [Setting(name) for name in free]

    def _known(self) -> Sequence[str]:
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"method is {unknown[0]!r}; expected one of {', '.join(METHODS)}")
        return self.methods


def _point(text: str) -> tuple[str, float]:
    name, _, sparsity = text.partition(" ")
    try:
        return name, float(sparsity)
    except ValueError:
        raise ValueError(f"operating point is {text!r}; expected a method and a sparsity, as in 'cats 0.22'") from None


def measure(study: Study, plan: Plan) -> list[Setting]:
    """Tasks and held-out loss of every setting that this checkpoint can reach, with its differences from dense and,
    at the same budget, from R-Sparse and from its own paper's baseline. Returns the settings that it cannot reach."""
    wanted = list(dict.fromkeys([*plan.operating(), *plan.matched()]))
    out_of_reach = [x for x in wanted if METHODS[x.method].takes and not study.reaches(x)]
    grid = [x for x in wanted if x not in out_of_reach]
    dense = paired.of(study, DENSE)
    dense.measure(plan.seeds)
    for setting in tqdm(grid, desc="methods"):
        arm = paired.of(study, setting)
        arm.measure(plan.seeds)
        paired.add_differences(arm, dense, plan.seeds)
    measured = {(x.method, x.sparsity) for x in grid}
    budgets = {x.sparsity for x in grid if x.method == "r-sparse"}
    for setting in tqdm(grid, desc="differences"):
        own = setting.method == "r-sparse" and setting.score == "magnitude"
        if setting.sparsity in budgets and not own:
            _against(study, plan, setting, plan.setting("r-sparse", setting.sparsity), "r-sparse")
        baseline = BASELINE.get(setting.method)
        if (baseline, setting.sparsity) in measured:
            _against(study, plan, setting, plan.setting(baseline, setting.sparsity), baseline)
        larger = NATIVE.get((setting.method, setting.sparsity))
        if larger in budgets:
            _against(study, plan, setting, plan.setting("r-sparse", larger), f"r-sparse {larger:g}")
    return out_of_reach


def _against(study: Study, plan: Plan, setting: Setting, other: Setting, label: str) -> None:
    paired.add_differences(paired.of(study, setting), paired.of(study, other), plan.seeds, label)
