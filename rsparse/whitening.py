"""Low-rank factors made for what the sparse path leaves: the residual e = x - s(x), and not for W on its own.

Of all matrices M of rank r, the one that keeps W e best over many tokens, E |(W - M) e|^2 least, is M = U_r U_r^T W,
where U_r are the leading eigenvectors of W C W^T and C = E e e^T is the residual's second moment: the singular vectors
of W weighted by the residual ("whitened", as SVD-LLM, arXiv 2403.07378, does with the whole input). It is stored as
A = U_r and B = W^T U_r, so that a token reads as many bytes as with the singular vectors of W. No inverse is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rsparse.calibrate import Calibration, Score, check_dense, hooks, run_decoder
from rsparse.decompose import Factors, FactorStore, weight_key
from rsparse.models import DecoderLinear
from rsparse.thresholds import channel_score, keep_above

AT_ONCE = 4 * 2**30
"""Bytes of second moments that one pass over the text gathers: all layers of a small model, some of a 7B model."""


def second_moment(values: Tensor) -> Tensor:
    """Sum over tokens of v v^T (n, n) for values (..., n), float32 at least."""
    values = values.reshape(-1, values.shape[-1])
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.T @ values


def residual(x: Tensor, norms: Tensor | None, threshold: float) -> Tensor:
    """x - s(x) for x (..., n): what a static threshold on the score drops; +inf drops everything."""
    return x * ~keep_above(channel_score(x, norms), threshold)


@torch.no_grad()
def residual_moments(
    model: nn.Module, ids: Tensor, linears: Sequence[tuple[DecoderLinear, Tensor | None, float]]
) -> Iterator[tuple[list[str], Tensor]]:
    """Second moments of the residuals of `linears` (each with its score's norms and threshold), over `ids`.

    Yields names of linears that share one, and it, (n, n), float32 at least. A pass over the text gathers as many as
    `AT_ONCE` allows; activations are never kept.
    """
    groups: dict[tuple, list[tuple[DecoderLinear, Tensor | None, float]]] = {}
    for x, norms, threshold in linears:
        groups.setdefault((x.layer, x.site if norms is None else x.kind, threshold), []).append((x, norms, threshold))
    for part in _parts(list(groups.values())):
        found: dict[str, Tensor] = {}
        firsts = {group[0][0].name: group[0] for group in part}

        def add(x: DecoderLinear, value: Tensor, firsts=firsts, found=found) -> None:
            _, norms, threshold = firsts[x.name]
            product = second_moment(residual(value, norms, threshold))
            found[x.name] = found[x.name].add_(product) if x.name in found else product

        with hooks([group[0][0] for group in part], add):
            run_decoder(model, ids, "residuals")
        for group in part:
            yield [x.name for x, _, _ in group], found.pop(group[0][0].name)


def _parts(groups: list[list]) -> Iterable[list[list]]:
    """The groups in pieces whose moments fit; at least one in each."""
    part, size = [], 0
    for group in groups:
        own = 4 * group[0][0].channels ** 2
        if part and size + own > AT_ONCE:
            yield part
            part, size = [], 0
        part.append(group)
        size += own
    if part:
        yield part


@torch.no_grad()
def output_basis(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (s,) of W C W^T, largest first, and its leading eigenvectors (m, s) as columns; s = min(m, n).

    weight W: (m, n); moment C: (n, n), positive semidefinite. Float64; on the smaller side of W: for m > n through
    C = L L^T and the eigenvectors Q of (W L)^T (W L), whose images W L Q span the same directions in the same order.
    """
    W, C = weight.detach().double(), moment.double()
    m, n = W.shape
    if m <= n:
        values, vectors = torch.linalg.eigh(W @ C @ W.T)
        return values.flip(0).clamp(min=0), vectors.flip(1)
    scale, V = torch.linalg.eigh(C)
    WL = W @ (V * scale.clamp(min=0).sqrt())
    values, Q = torch.linalg.eigh(WL.T @ WL)
    return values.flip(0).clamp(min=0), torch.linalg.qr(WL @ Q.flip(1)).Q


def whitened_factors(weight: Tensor, moment: Tensor, rank: int) -> Factors:
    """A = U_r (m, r) and B = W^T U_r (n, r), float64, for the residual's second moment C (n, n).

    ValueError for a rank outside 0..min(m, n).
    """
    m, n = weight.shape
    if not 0 <= rank <= min(m, n):
        raise ValueError(f"rank is {rank}; expected 0..{min(m, n)} for a weight of shape ({m}, {n})")
    U = output_basis(weight, moment)[1][:, :rank].contiguous()
    return Factors(U, weight.detach().double().T @ U)


@torch.no_grad()
def relative_errors(weight: Tensor, moment: Tensor, factors: Factors) -> Tensor:
    """Of A_r B_r^T for every r from 0 to the factors' rank: E |(W - A_r B_r^T) e|^2 / E |W e|^2, (rank + 1,), float64.

    moment: C = E e e^T up to a factor, (n, n). The columns of A must be orthogonal and A B^T a projection of W, which
    both the singular vectors of W and `whitened_factors` are: then every component takes away its own u^T W C W^T u.
    """
    Z = factors.B.double() * factors.A.double().norm(dim=0)  # W^T u for every unit column u of A
    C, W = moment.double(), weight.detach().double()
    total = (W @ C * W).sum()
    taken = (Z * (C @ Z)).sum(0).cumsum(0)
    return torch.cat([torch.ones_like(total)[None], 1 - taken / total]).clamp(min=0).cpu()


def whitened(
    calibration: Calibration, asked: Mapping[str, tuple[DecoderLinear, Tensor | None, int, int]], store: FactorStore
) -> dict[str, Factors]:
    """Factors by name, in each weight's dtype and place, for `asked`: name -> (linear, norms, kept channels, rank).

    The residual is what the dense model's static threshold for so many kept channels leaves of the calibration tokens,
    whatever the threshold that the linear will run with. Kept in `store` by weight, tokens, score and kept channels; a
    stored rank serves smaller ones. ValueError unless the model is dense.
    """
    check_dense(calibration.model)
    found: dict[str, Factors] = {}
    missing = []
    for name, (x, norms, kept, rank) in asked.items():
        stored = store.find(_key(calibration, x, norms, kept), rank, x.module.weight.dtype, x.device)
        if stored is None:
            missing.append((x, norms, kept))
        else:
            found[name] = stored
    calibration.gather([(x, Score(norms)) for x, norms, _ in missing])
    open_ = [(x, norms, _threshold(calibration, x, norms, kept)) for x, norms, kept in missing]
    for names, moment in residual_moments(calibration.model, calibration.ids, open_):
        for name in names:
            x, norms, kept, rank = asked[name]
            weight, key = x.module.weight, _key(calibration, x, norms, kept)
            found[name] = store.keep(key, weight, lambda w=weight, c=moment, r=rank: whitened_factors(w, c, r))
    return found


def _threshold(calibration: Calibration, x: DecoderLinear, norms: Tensor | None, kept: int) -> float:
    return calibration.statistics(x, Score(norms)).quantile(1 - kept / x.channels)


def _key(calibration: Calibration, x: DecoderLinear, norms: Tensor | None, kept: int) -> str:
    score = "magnitude" if norms is None else "column-norm"
    return f"{weight_key(x.module.weight)}-whitened-{calibration.key}-{score}-{kept}"
