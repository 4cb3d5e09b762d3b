"""Table 2: does activation sparsity go with INT4 weights?

R-Sparse (arXiv 2504.19449), Table 2, quantises Llama-2-7B by GPTQ and adds R-Sparse at 40 and 50%. Here the weights as
loaded, rounded to nearest, and by GPTQ, each dense, with TEAL and with R-Sparse, the last with its low-rank factors in
several precisions. Budgets are of the bytes that the weights at hand take: half of INT4 is an eighth of 16 bits.
Differences are paired: the same items, the same held-out windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from rsparse.exhibits import paired
from rsparse.exhibits.paired import Arm
from rsparse.int4 import check_held
from rsparse.models import DTYPES
from rsparse.quantize import Quantization
from rsparse.study import DENSE, Setting, Study, check_some

METHODS = ("teal", "r-sparse")
LOADED = "as loaded"
"""Column `against` of differences from the checkpoint's own weights, under the same setting."""


@dataclass(frozen=True)
class Plan:
    """What the exhibit compares. ValueError, before anything is loaded, for a value that is not allowed.

    weights: of `int4.WEIGHTS`, beside the checkpoint's own. methods: of METHODS, beside dense. sparsities: budgets.
    rho: of R-Sparse. factor_dtypes: precisions of R-Sparse's factors on INT4 weights; on the checkpoint's own they
    have the weights'. gptq: folder of a GPTQ checkpoint, "tiny", or "" to quantise, on gptq_samples windows of
    gptq_length tokens. seeds: each picks the windows that thresholds are read from.
    """

    weights: Sequence[str]
    methods: Sequence[str]
    sparsities: Sequence[float]
    rho: float
    factor_dtypes: Sequence[str]
    threshold: str
    gptq: str
    gptq_samples: int
    gptq_length: int
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        check_some("sparsities", self.sparsities, self.seeds)
        if not self.weights or not self.factor_dtypes:
            raise ValueError(
                f"weights are {self.weights!r}, factor_dtypes {self.factor_dtypes!r}; expected some of each"
            )
        if not self.methods or set(self.methods) - set(METHODS):
            raise ValueError(f"methods are {self.methods!r}; expected some of {', '.join(METHODS)}")
        if 0 in self.sparsities or self.rho in (0, 1):
            raise ValueError(
                f"sparsities are {self.sparsities}, rho is {self.rho}; expected no sparsity of 0, dense is measured "
                "anyway, and a rho between 0 and 1, which spends on both paths"
            )
        for sparsity in self.sparsities:
            self.teal(sparsity), self.r_sparse(sparsity)
        for weights in self.weights:
            for dtype in self.factor_dtypes:
                self.quantization(weights, dtype)

    def quantization(self, weights: str, factor_dtype: str) -> Quantization:
        return Quantization(weights, factor_dtype, self.gptq, self.gptq_samples, self.gptq_length)

    def teal(self, sparsity: float) -> Setting:
        return Setting("teal", sparsity, threshold=self.threshold)

    def r_sparse(self, sparsity: float) -> Setting:
        return Setting("r-sparse", sparsity, self.rho, threshold=self.threshold)


def measure(study: Study, plan: Plan) -> None:
    """Tasks and held-out loss of every way to store the weights, dense and sparse; then the paired differences.

    study: of the checkpoint's own weights. One way after the other, so that each is put in place once or, with several
    precisions of factors, once for each. ValueError, before anything is measured, for factors wider than the model.
    """
    for dtype in plan.factor_dtypes:
        check_held(dtype, DTYPES[study.sources.dtype])
    own = _arms(study, plan, None)
    ways = {weights: _arms(study, plan, weights) for weights in plan.weights}
    for arms in (own, *ways.values()):
        for arm in tqdm(arms.values(), desc="settings"):
            arm.measure(plan.seeds)
    _within(own, plan)
    for weights, arms in ways.items():
        _within(arms, plan)
        for key, arm in arms.items():
            paired.add_differences(arm, own[key[:2] + (_first(plan, key),)], plan.seeds, LOADED)
            if weights != "int4-rtn" and "int4-rtn" in ways:
                paired.add_differences(arm, ways["int4-rtn"][key], plan.seeds, "int4-rtn")


Key = tuple[str, float, str]
"""Method, sparsity, and the precision of R-Sparse's factors ("" for the others)."""


def _arms(study: Study, plan: Plan, weights: str | None) -> dict[Key, Arm]:
    """Every setting on one way to store the weights, settings that share the factors' precision side by side."""
    arms: dict[Key, Arm] = {}
    for dtype in plan.factor_dtypes if weights else plan.factor_dtypes[:1]:
        there = study.sibling(quantization=plan.quantization(weights, dtype)) if weights else study
        if dtype == plan.factor_dtypes[0]:
            arms["dense", 0.0, ""] = paired.of(there, DENSE)
            if "teal" in plan.methods:
                arms |= {("teal", s, ""): paired.of(there, plan.teal(s)) for s in plan.sparsities}
        if "r-sparse" in plan.methods:
            arms |= {("r-sparse", s, dtype): paired.of(there, plan.r_sparse(s)) for s in plan.sparsities}
    return arms


def _first(plan: Plan, key: Key) -> str:
    """The checkpoint's own weights have one precision of factors, which stands under the plan's first."""
    return plan.factor_dtypes[0] if key[2] else ""


def _within(arms: dict[Key, Arm], plan: Plan) -> None:
    """What sparsity costs on these weights, and what R-Sparse gains over TEAL on them."""
    for (method, sparsity, _), arm in arms.items():
        if method != "dense":
            paired.add_differences(arm, arms["dense", 0.0, ""], plan.seeds)
        if method == "r-sparse" and "teal" in plan.methods:
            paired.add_differences(arm, arms["teal", sparsity, ""], plan.seeds)
