"""What `sparsify` says it did, linear by linear and for the whole decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from rsparse import accounting
from rsparse.protocol import Tokens


@dataclass(frozen=True)
class LinearReport:
    """What one linear was asked for and got. realised, spread: sparsity over tokens (mean, std), NaN if
    unmeasured."""

    name: str
    layer: int
    kind: str
    m: int
    n: int
    dense_bytes: float
    sparsity: float  # of what the mask chooses from
    rho: float
    score: str
    kept: int  # of `channels`
    channels: int  # input channels, or the MLP's neurons where `follows` names their mask
    rank: int
    threshold: float  # -inf: dense; +inf: no sparse path; NaN: none, chosen per token or from the prompt
    read: float  # planned: bytes read over dense bytes; NaN where only running tells
    overhead: float = 0.0  # of which whatever the mask: low-rank path, rotation
    follows: str = ""  # the linear or activation whose mask decides, where not its own
    realised: float = math.nan
    spread: float = math.nan
    factors: str = ""  # of its low-rank path, where it has one

    @property
    def touched(self) -> bool:
        """Whether the method asks anything of it; outside its scope, and in a recipe, linears may stay dense."""
        return self.sparsity > 0 or bool(self.follows)


@dataclass(frozen=True)
class Report:
    """What `sparsify` did. Sparsities are model-level: 1 - bytes read by decoder linears / their dense
    bytes. nominal: the sparsity that the method's own accounting gives it, where that differs."""

    method: str
    scope: str
    recipe: str
    tokens: Tokens
    threshold: str
    asked: float  # NaN for a method without a knob
    linears: tuple[LinearReport, ...]
    nominal: float = math.nan

    @property
    def planned(self) -> float:
        """By the kept channels, ranks and rotations; at least the asked one for methods that take a budget."""
        return accounting.model_sparsity(
            [x.dense_bytes for x in self.linears], [x.read for x in self.linears]
        )

    @property
    def realised(self) -> float:
        """Mean over the tokens it was measured on; NaN where nothing was."""
        return accounting.model_sparsity(
            [x.dense_bytes for x in self.linears], [1 - x.realised for x in self.linears]
        )

    @property
    def spread(self) -> float:
        """Largest standard deviation over tokens among the linears."""
        return max(x.spread for x in self.linears)

    @property
    def worst(self) -> LinearReport:
        """The linear whose realised sparsity is farthest from its planned one, of those that the method touches."""
        touched = [x for x in self.linears if x.touched] or self.linears
        return max(touched, key=lambda x: abs(x.realised - (1 - x.read)))

    def table(self) -> pd.DataFrame:
        """One row per linear."""
        return pd.DataFrame([vars(x) for x in self.linears])

    def __str__(self) -> str:
        text = f"{self.method}, scope {self.scope}"
        if not math.isnan(self.planned):
            text += f": sparsity asked {self.asked:.4f}, planned {self.planned:.4f}"
        if math.isnan(self.realised):
            return text
        if math.isnan(self.planned):
            return f"{text}: sparsity realised {self.realised:.4f}"
        text, worst, planned = f"{text}, realised {self.realised:.4f}", self.worst, 1 - self.worst.read
        if abs(worst.realised - planned) < 5e-5:  # all as planned, as far as four digits show
            return text
        return f"{text} (farthest from its plan: {worst.name}, {worst.realised:.4f} instead of {planned:.4f})"
