"""What a reported score owes to choices that papers leave unsaid: which tokens are sparse, and how thresholds are set.

One method and budget under every token rule that a published code uses by default; then, at the headline rule, one
choice changed at a time; and all of the R-Sparse authors' choices at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from rsparse.exhibits import paired
from rsparse.exhibits.paired import Arm
from rsparse.protocol import PUBLISHED, Tokens, check_tokens
from rsparse.recipe import Recipe
from rsparse.study import DENSE, Setting, Study, check_some

HEADLINE = "scored"
RULES: dict[str, Tokens] = {
    "all": "all",
    "decode": "decode",
    "scored": "scored",
    "R-Sparse's code": PUBLISHED["r-sparse"],
    "TEAL's code": PUBLISHED["teal"],
    "WINA's code": PUBLISHED["wina"],
    "LaRoSA's and CATS' code": PUBLISHED["larosa"],
    "GRIFFIN's code, classification": PUBLISHED["griffin"],
}
"""Token rules by name. The last but one is "all" under another name."""
AUTHORS = {"samples": 1, "length": 512}
"""Calibration tokens of the R-Sparse authors' code: one sample of 512."""


@dataclass(frozen=True)
class Plan:
    """What the exhibit compares. ValueError, before anything is measured, for a value that is not allowed.

    methods: measured under every rule. sparsity: the budget. rho: of R-Sparse. rules: names in RULES; the headline
    rule is measured anyway. choices: whether to change one choice at a time too. seeds: calibration windows.
    """

    methods: Sequence[str]
    sparsity: float
    rho: float
    rules: Sequence[str]
    choices: bool
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        check_some("methods", self.methods, self.seeds)
        if self.sparsity == 0:
            raise ValueError("sparsity is 0; expected a budget above 0, where a rule could matter")
        for name in self.rules:
            if name not in RULES:
                raise ValueError(f"rule is {name!r}; expected one of {', '.join(RULES)}")
            check_tokens(RULES[name])
        for method in self.methods:
            self.setting(method)

    def setting(self, method: str = "r-sparse") -> Setting:
        return Setting(method, self.sparsity, self.rho)


def arm(study: Study, setting: Setting, rule: Tokens) -> Arm:
    """A setting under one rule for tasks and held-out text alike; held-out text has no prompt, so that the headline
    rule is "all" there."""
    return paired.of(study, setting, rule, "all" if rule == HEADLINE else rule)


def compare_rules(study: Study, plan: Plan) -> None:
    """Every method under every rule, with its differences from dense and from the headline rule."""
    dense = paired.of(study, DENSE)
    dense.measure(plan.seeds)
    rules = dict.fromkeys([HEADLINE, *plan.rules])
    cells = [(method, rule) for method in plan.methods for rule in rules]
    for method, rule in tqdm(cells, desc="rules"):
        one, headline = (arm(study, plan.setting(method), RULES[name]) for name in (rule, HEADLINE))
        one.measure(plan.seeds)
        paired.add_differences(one, dense, plan.seeds, rule=rule)
        if rule != HEADLINE:
            paired.add_differences(one, headline, plan.seeds, "tokens=scored", rule=rule)


def compare_choices(study: Study, plan: Plan) -> None:
    """R-Sparse at the headline rule with one choice changed at a time, minus R-Sparse as this book runs it."""
    headline = arm(study, plan.setting(), HEADLINE)
    headline.measure(plan.seeds)
    for name, changed in tqdm(choices(study, plan).items(), desc="choices"):
        changed.measure(plan.seeds)
        paired.add_differences(changed, headline, plan.seeds, "headline", choice=name)


def choices(study: Study, plan: Plan) -> dict[str, Arm]:
    """Name -> R-Sparse with that choice. The square budget of k and v changes nothing where these are square."""
    ours, few = plan.setting(), study.sibling(**AUTHORS)
    authors = Setting("r-sparse", plan.sparsity, plan.rho, recipe=_square(study, plan, "column-norm", "static-dense"))
    return {
        "threshold read on the dense model": arm(study, replace(ours, threshold="static-dense"), HEADLINE),
        "exact top channels per token": arm(study, replace(ours, threshold="per-token"), HEADLINE),
        "calibrated on 1 x 512 tokens": arm(few, ours, HEADLINE),
        "1 x 512 tokens, dense model": arm(few, replace(ours, threshold="static-dense"), HEADLINE),
        "score with column norms": arm(study, replace(ours, score="column-norm"), HEADLINE),
        "k and v budgeted as square": arm(study, replace(ours, recipe=_square(study, plan)), HEADLINE),
        "all of the authors' code, scored tokens": arm(few, authors, HEADLINE),
        "all of the authors' code, its tokens": arm(few, authors, RULES["R-Sparse's code"]),
    }


def _square(study: Study, plan: Plan, score: str = "magnitude", threshold: str = "static") -> Recipe:
    """The recipe, kept beside the table: a rerun that finds everything measured need not load the model."""
    name = f"square-kv-{plan.sparsity:g}-{plan.rho:g}-{score}-{threshold}.json"
    path = Path(study.table.folder) / "recipes" / name
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        Recipe.square_kv(study.model, plan.sparsity, plan.rho, score, threshold).save(path)
    return Recipe.load(path)
