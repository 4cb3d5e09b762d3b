"""The planted control: linears whose best rho is known, to show that the machinery would see an effect.

A planted linear has k heavy input channels with unrelated weight columns, and light channels whose columns
span only r dimensions. At one rho of the grid the budget buys exactly these k channels and r components, and
the output is nearly exact; at any other it lacks one or the other. In a null linear, weight and input are
Gaussian: there is no structure for the low-rank path to use, and the best rho is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rsparse.accounting import Split, split_budget
from rsparse.decompose import svd_factors
from rsparse.linears import SparseLinear
from rsparse.protocol import TokenProtocol
from rsparse.thresholds import ScoreStatistics

LIGHT = 0.5  # light channels lie in [-LIGHT, LIGHT], heavy ones in +-[1, 2]


@dataclass(frozen=True)
class Planted:
    """A weight (m, n) with its calibration and test inputs (tokens, n), float32. best_rho: None in a null
    linear."""

    weight: Tensor
    calibration: Tensor
    test: Tensor
    best_rho: float | None


def check_plan(m: int, n: int, sparsity: float, rho: float) -> Split:
    """What the budget buys at `rho`; ValueError where it is no channel or no component: nothing to plant."""
    split = split_budget(m, n, sparsity, rho)
    if split.kept == 0 or split.rank == 0:
        raise ValueError(
            f"rho {rho} at sparsity {sparsity} buys {split.kept} channels and rank {split.rank} of a linear "
            f"of shape ({m}, {n}); expected at least one of each"
        )
    return split


def plant(
    m: int, n: int, sparsity: float, rho: float, seed: int, noise: float = 0.02, tokens: int = 512
) -> Planted:
    """A linear of shape (m, n) whose best rho at this sparsity is `rho`.

    noise: Gaussian weight noise over the weight's own root mean square; it blurs what was planted.

    Raises ValueError as `check_plan` does.
    """
    split = check_plan(m, n, sparsity, rho)
    generator = torch.Generator().manual_seed(seed)
    k, r = split.kept, split.rank
    U = torch.linalg.qr(torch.randn(m, r, generator=generator)).Q
    Z = torch.linalg.qr(torch.randn(n - k, r, generator=generator)).Q
    heavy = torch.randn(m, k, generator=generator)
    heavy -= U @ (U.T @ heavy)  # so that the leading components are the light channels' own
    x = _inputs(k, n - k, 2 * tokens, generator)
    balance = (heavy @ x[:, :k].T).square().sum() / (Z.T @ x[:, k:].T).square().sum()
    weight = torch.cat([heavy, U @ Z.T * balance.sqrt()], 1)  # both paths carry the same output energy
    weight += noise * weight.square().mean().sqrt() * torch.randn(m, n, generator=generator)
    order = torch.randperm(n, generator=generator)
    return Planted(weight[:, order], x[:tokens, order], x[tokens:, order], rho)


def null(m: int, n: int, seed: int, tokens: int = 512) -> Planted:
    """A Gaussian linear with Gaussian inputs: nothing is planted."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * tokens, n, generator=generator)
    return Planted(torch.randn(m, n, generator=generator), x[:tokens], x[tokens:], None)


@torch.no_grad()
def errors(linear: Planted, sparsity: float, rhos: Sequence[float]) -> list[float]:
    """Relative output error on the test inputs at every rho, with the deployed linear and static
    threshold."""
    m, n = linear.weight.shape
    dense = nn.Linear(n, m, bias=False)
    dense.weight.copy_(linear.weight)
    statistics = ScoreStatistics(n)
    statistics.add(linear.calibration)
    splits = [split_budget(m, n, sparsity, rho) for rho in rhos]
    factors = svd_factors(linear.weight, max(split.rank for split in splits))
    wanted = linear.test.double() @ linear.weight.double().T
    found = []
    for split in splits:
        own = factors.leading(split.rank).to(torch.float32) if split.rank else None
        threshold = statistics.quantile(1 - split.kept / n)
        y = SparseLinear(dense, split, TokenProtocol("all"), own, threshold=threshold)(linear.test).double()
        found.append(float((y - wanted).norm() / wanted.norm()))
    return found


def best_rho(linear: Planted, sparsity: float, rhos: Sequence[float]) -> float:
    """The rho of the grid with the smallest error; of equal ones the largest, which spends least on rank."""
    return min(zip(errors(linear, sparsity, rhos), rhos, strict=True), key=lambda x: (x[0], -x[1]))[1]


def _inputs(heavy: int, light: int, tokens: int, generator: torch.Generator) -> Tensor:
    """(tokens, heavy + light) inputs: the heavy channels first."""
    signs = torch.randint(0, 2, (tokens, heavy), generator=generator) * 2.0 - 1
    big = signs * (1 + torch.rand(tokens, heavy, generator=generator))
    small = LIGHT * (2 * torch.rand(tokens, light, generator=generator) - 1)
    return torch.cat([big, small], 1)
