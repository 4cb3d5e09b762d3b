"""The shape of a symmetric distribution from quantiles of |x|: nearer to a Gaussian or to a Laplacian?

TEAL (arXiv 2408.14690) names the two: inputs of blocks look Gaussian, those inside of blocks Laplacian. A shape has no
scale, so each is scaled to fit best; that also leaves outliers beyond the largest quantile without a say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

LEVELS = tuple(step / 20 for step in range(1, 20))
"""Shares at which quantiles are compared, 0.05 to 0.95."""
QUANTILES: dict[str, Callable[[NDArray], NDArray]] = {
    "gaussian": lambda share: special.ndtri((1 + share) / 2),
    "laplacian": lambda share: -np.log1p(-share),
}
"""Shape -> quantile of |x| by share, of the standard normal and of the Laplacian with E|x| = 1."""
DENSITIES: dict[str, Callable[[NDArray], NDArray]] = {
    "gaussian": lambda x: 2 / math.pi * np.exp(-(x**2) / math.pi),
    "laplacian": lambda x: np.exp(-x),
}
"""Shape -> density of |x| with E|x| = 1, at x >= 0."""


def misfits(levels: Sequence[float], quantiles: ArrayLike) -> dict[str, float]:
    """Shape -> how far `quantiles` of |x| at the shares `levels` are from it: root mean square of the logarithm of
    their ratio, at the best scale. 0 for the shape itself; quantiles of 0, which have no logarithm, are left out.

    Raises ValueError where fewer than two are left.
    """
    share, value = np.asarray(levels, float), np.asarray(quantiles, float)
    kept = value > 0
    if kept.sum() < 2:
        raise ValueError(f"{int(kept.sum())} of the quantiles are above 0; expected at least two")
    ratios = {name: np.log(value[kept] / at(share[kept])) for name, at in QUANTILES.items()}
    return {name: float(ratio.std()) for name, ratio in ratios.items()}
