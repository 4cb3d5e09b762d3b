"""Budget arithmetic: how many input channels and singular components a byte budget buys.

All arithmetic is exact. Sparsity and rho are the decimals they print as, so that 0.7 means 7/10 and no
floor falls on the wrong side of a binary rounding.

Source: R-Sparse (arXiv 2504.19449), section 3.3, made exact and extended to factors whose precision differs
from the weight's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

BYTES = {
    "float64": Fraction(8),
    "float32": Fraction(4),
    "bfloat16": Fraction(2),
    "float16": Fraction(2),
    "int4-g128": Fraction(1, 2) + Fraction(2, 128),  # GPTQ, one fp16 scale per 128 inputs, symmetric
}
"""Bytes read per stored element."""


def exact(value: float | int | Fraction) -> Fraction:
    """The decimal that `value` prints as, as an exact fraction: ``exact(0.1) == Fraction(1, 10)``."""
    return value if isinstance(value, Fraction) else Fraction(str(value))


def check_sparsity(value: float) -> float:
    """Return `value` if it is a sparsity in [0, 1); ValueError names it otherwise (NaN included)."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < 1:
        raise ValueError(f"sparsity is {value!r}; expected a number in [0, 1), the share of bytes not read")
    return value


def check_rho(value: float) -> float:
    """Return `value` if it is a rho in [0, 1]; ValueError names it otherwise (NaN included)."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"rho is {value!r}; expected a number in [0, 1], the sparse path's share of the budget")
    return value


@dataclass(frozen=True)
class Split:
    """What the budget C = 1 - sparsity of one (m, n) linear buys.

    kept: input channels whose weight column is read, 0..n. rank: singular components of the low-rank path.
    read: bytes read per token over the dense linear's bytes, exact, at most 1 - sparsity.
    """

    kept: int
    rank: int
    read: Fraction

    @property
    def sparsity(self) -> Fraction:
        """Planned sparsity, at least the one asked for."""
        return 1 - self.read


def split_budget(
    m: int,
    n: int,
    sparsity: float,
    rho: float,
    weight_bytes: Fraction = BYTES["float32"],
    factor_bytes: Fraction | None = None,
) -> Split:
    """Split the budget of a linear y = W x with W of shape (m, n) = (out, in).

    r = floor((1 - rho) C m n b_W / ((m + n) b_factor)); the kept channels take the rest of the budget when
    rho > 0 and are 0 when rho = 0. C = 1 is the dense linear for every rho. The rank never exceeds min(m, n)
    (it can only when the factors are much cheaper than the weight).

    Raises ValueError for a sparsity outside [0, 1), a rho outside [0, 1], or sizes below 1.
    """
    if m < 1 or n < 1:
        raise ValueError(f"a linear of shape ({m}, {n}) has no weights; expected sizes of at least 1")
    budget, rho = 1 - exact(check_sparsity(sparsity)), exact(check_rho(rho))
    if budget == 1:
        return Split(n, 0, Fraction(1))
    factor_bytes = weight_bytes if factor_bytes is None else factor_bytes
    dense, per_rank, per_channel = m * n * weight_bytes, (m + n) * factor_bytes, m * weight_bytes
    rank = min(math.floor((1 - rho) * budget * dense / per_rank), m, n)
    kept = math.floor((budget * dense - rank * per_rank) / per_channel) if rho > 0 else 0
    read = (kept * per_channel + rank * per_rank) / dense
    assert read <= budget, (m, n, sparsity, rho)
    return Split(kept, rank, read)


def model_sparsity(dense_bytes: list[float], read_fractions: list[float]) -> float:
    """Model-level sparsity: 1 - (bytes read by all decoder linears) / (their dense bytes)."""
    total = sum(dense_bytes)
    return float(1 - sum(b * f for b, f in zip(dense_bytes, read_fractions, strict=True)) / total)


def scoped_sparsity(sparsity: float, share: Fraction, scope: str) -> float:
    """Per-linear sparsity that a scope needs to reach a model-level `sparsity`, rounded up to 12 decimals.

    share: the scope's share of the decoder's dense bytes, in (0, 1]. Raises ValueError when the scope cannot
    reach it, naming the model-level sparsity that it must stay under.
    """
    inside = math.ceil(exact(check_sparsity(sparsity)) / share * 10**12)
    if inside >= 10**12:
        raise ValueError(
            f"sparsity {sparsity} cannot be reached within scope {scope!r}, which holds "
            f"{float(share):.1%} of the decoder's bytes; expected less than {float(share):.4f}"
        )
    return inside / 10**12
