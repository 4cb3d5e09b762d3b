"""Means, paired differences and their confidence intervals.

The unit of resampling is the item: one question of a task, one window of held-out text, one document to
summarise. Items of one task are taken as independent draws; positions or tokens inside an item are not.
Seeds, layers and linears are not items: they are shown as spread, never counted as n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided confidence interval, the standard error of the mean, and the items behind it.

    With one item stderr, low and high are NaN: one item says nothing about its own spread.
    """

    mean: float
    low: float
    high: float
    stderr: float
    n: int

    def row(self) -> dict[str, float | int]:
        """The columns of a result row: value, stderr, low, high, n."""
        return {"value": self.mean, "stderr": self.stderr, "low": self.low, "high": self.high, "n": self.n}


def mean(values: ArrayLike, confidence: float = 0.95, counted: bool = False) -> Interval:
    """Mean of one value per item, shape (n,), with Student's t interval of n - 1 degrees of freedom.

    counted: the values are 0 or 1, or differences of such. Items that are then all equal show no spread, but not
    for want of any: their standard error is that of one item being otherwise, 1 / n, and their interval reaches as
    far as the share of other items could be without one being seen (Clopper and Pearson). Measured values that are
    all equal have none.

    Raises ValueError for no values, more than one axis, NaN or infinity, or a confidence outside (0, 1).
    """
    sample = _sample("values", values)
    _check(confidence)
    centre, n = float(sample.mean()), sample.size
    if n == 1:
        return Interval(centre, math.nan, math.nan, math.nan, 1)
    if np.ptp(sample) == 0:
        return _unanimous(centre, n, confidence) if counted else Interval(centre, centre, centre, 0.0, n)
    stderr = float(sample.std(ddof=1) / math.sqrt(n))
    reach = stderr * float(special.stdtrit(n - 1, 0.5 + confidence / 2))
    return Interval(centre, centre - reach, centre + reach, stderr, n)


def _unanimous(value: float, n: int, confidence: float) -> Interval:
    unseen = 1 - ((1 - confidence) / 2) ** (1 / n)
    return Interval(value, max(value - unseen, -1.0), min(value + unseen, 1.0), 1 / n, n)


def paired(a: ArrayLike, b: ArrayLike, confidence: float = 0.95, counted: bool = False) -> Interval:
    """Mean of a - b over the same items in the same order, both of shape (n,), with its interval.

    What the two runs share (how hard each item is) cancels, so the interval is that of the difference, not of
    two separate means. Options and errors as `mean`; also ValueError where the lengths differ.
    """
    first, second = _sample("a", a), _sample("b", b)
    if first.size != second.size:
        raise ValueError(f"paired values need the same items: a has {first.size}, b has {second.size}.")
    return mean(first - second, confidence, counted)


def share(found: int, n: int, confidence: float = 0.95) -> Interval:
    """The share of `found` among `n` draws, with its exact interval (Clopper and Pearson)."""
    from scipy.stats import binomtest  # half a second to load, which means and differences need not wait for

    exact = binomtest(found, n).proportion_ci(confidence)
    value = found / n
    return Interval(value, float(exact.low), float(exact.high), math.sqrt(value * (1 - value) / n), n)


def macro(intervals: Sequence[Interval], confidence: float = 0.95) -> Interval:
    """Unweighted mean over tasks of independent per-task means (or per-task paired differences).

    The standard error is sqrt(sum of squares) / tasks; the interval is Student's t with the
    Welch-Satterthwaite degrees of freedom; n is the number of items of all tasks together. Raises ValueError
    for no intervals or a confidence outside (0, 1).
    """
    if not intervals:
        raise ValueError("macro needs at least one interval, got none.")
    _check(confidence)
    centre = math.fsum(part.mean for part in intervals) / len(intervals)
    variances = [(part.stderr / len(intervals)) ** 2 for part in intervals]
    total, n = math.fsum(variances), sum(part.n for part in intervals)
    if not total > 0:
        return Interval(centre, centre + total, centre + total, total, n)  # zero, or NaN from a single item
    freedom = total**2 / math.fsum(v**2 / (part.n - 1) for v, part in zip(variances, intervals, strict=True) if v > 0)
    reach = math.sqrt(total) * float(special.stdtrit(freedom, 0.5 + confidence / 2))
    return Interval(centre, centre - reach, centre + reach, math.sqrt(total), n)


def _sample(name: str, values: ArrayLike) -> NDArray[np.float64]:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or sample.size == 0:
        raise ValueError(f"{name} must be one number per item, shape (n,), n >= 1; got shape {sample.shape}.")
    if not np.isfinite(sample).all():
        raise ValueError(f"{name} must be finite; got {sample[~np.isfinite(sample)][0]}.")
    return sample


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}.")
