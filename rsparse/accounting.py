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


@dataclass(frozen=True)
class Reach:
    """What a method can leave unread of a decoder, as shares of its dense bytes, exact.

    share: sum over the linears it touches of their share of the bytes times `part`, their sparsity in units of the
    method's own. largest: the largest such `part`. overhead: extra bytes that every token reads (rotations).
    """

    share: Fraction
    largest: Fraction = Fraction(1)
    overhead: Fraction = Fraction(0)

    @property
    def ceiling(self) -> Fraction:
        """The model-level sparsity that it stays under."""
        return self.share / self.largest - self.overhead

    def own_sparsity(self, sparsity: float, who: str) -> float:
        """The method's own sparsity p that makes a model-level `sparsity`, rounded up to 12 decimals; 0 for 0.

        Model-level sparsity is p share - overhead. Raises ValueError when a p below 1 / largest cannot reach it,
        naming `who` and the ceiling.
        """
        if check_sparsity(sparsity) == 0:
            return 0.0
        own = math.ceil((exact(sparsity) + self.overhead) / self.share * 10**12)
        if own * self.largest >= 10**12:
            raise ValueError(
                f"sparsity {sparsity} cannot be reached {who}; expected less than {float(self.ceiling):.4f}"
            )
        return own / 10**12


def times(part: Fraction, sparsity: float) -> float:
    """part x sparsity, rounded up to 12 decimals and at most 1 - 1e-12: never less sparse than asked."""
    return min(math.ceil(part * exact(sparsity) * 10**12), 10**12 - 1) / 10**12


def square_split(m: int, n: int, sparsity: float, rho: float) -> tuple[float, float]:
    """(sparsity, rho) that give a linear of shape (m, n) the channels and the rank of a square one of n x n.

    The R-Sparse authors' code budgets k and v so under grouped-query attention, where m < n: a rank unit then costs
    (m + n) / (2 m) of its intended share. Raises ValueError where that reads more than the dense weight.
    """
    budget, rho = 1 - exact(check_sparsity(sparsity)), exact(check_rho(rho))
    low_rank = (1 - rho) * Fraction(m + n, 2 * m)
    read = budget * (rho + low_rank)
    if read > 1:
        raise ValueError(f"sparsity {sparsity}, rho {float(rho)}: budgeted as square, a linear of shape ({m}, {n}) "
                         f"reads {float(read):.2f} times its dense bytes; expected at most 1")
    sparsity = max(_down(1 - read), 1e-12)  # 0 would be the dense linear, not one that reads as much in two paths
    return sparsity, _down(rho / (rho + low_rank))


def _down(value: Fraction) -> float:
    """Rounded down to 12 decimals: what a smaller sparsity and rho buy is never a channel or a rank short."""
    return math.floor(value * 10**12) / 10**12
