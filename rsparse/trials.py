"""What a candidate recipe costs a model: the loss on calibration tokens, from one block's boundary on.

A search freezes the blocks before its group. What these hand on is computed once and kept (samples x positions x width,
in the model's precision), and a candidate runs the blocks behind. Candidates run side by side, as rows of one batch,
where `batch_tokens` has room for more than one. Low-rank factors come from one decomposition per weight; a candidate of
a smaller rank leaves components out.

Thresholds are quantiles of the calibration tokens' scores, as in `calibrate`, read on the model as it stands when its
group begins: frozen groups as found, the others as they were. Within a group they are not read again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rsparse.accounting import Split, split_budget
from rsparse.calibrate import Calibration, Score, check_dense, hooks, statistics_key
from rsparse.decompose import ALIGNED, FactorStore
from rsparse.linears import low_rank
from rsparse.models import DecoderLinear, decoder_linears
from rsparse.recipe import Ask
from rsparse.thresholds import ScoreStatistics, channel_score, column_norms, keep_above

BATCH_TOKENS = 16384
"""Positions of one forward pass, candidates times samples times length."""
LOGIT_ROWS = 2048
"""Positions whose logits are held at once: 1 GiB in float32 at a vocabulary of 128,256."""


@dataclass(frozen=True)
class Choice:
    """What one candidate does with one linear: a static threshold, and the rank of what is left out."""

    threshold: float
    rank: int


class TrialLinear(nn.Module):
    """y = W s(x) + A B^T (x - s(x)) for several candidates at once; see rsparse.linears for one.

    dense: the linear, weight (m, n). norms: weights of the score (n,), or None. choices: one for each candidate whose
    rows a batch holds, or a single one for all rows. A, B: factors of rank `held`, padded.
    """

    def __init__(self, dense: nn.Module, norms: Tensor | None = None):
        super().__init__()
        self.dense, self.norms = dense, norms
        self.A = self.B = None
        self.held = 0
        self.choices: tuple[Choice, ...] = (Choice(-math.inf, 0),)

    def give(self, store: FactorStore, rank: int) -> None:
        """Hold the weight's factors of `rank`, and no others."""
        if rank == self.held:
            return
        factors = store.get(self.dense.weight.detach(), rank) if rank else None
        if factors and hasattr(self.dense, "rounded"):  # INT4: factors in the precision that was counted
            factors = self.dense.rounded(factors)
        factors = factors and factors.padded()
        self.A, self.B = (factors.A, factors.B) if factors else (None, None)
        self.held = rank

    def check(self, name: str) -> None:
        """ValueError where a candidate asks for more rank than is held."""
        asked = max(choice.rank for choice in self.choices)
        if asked > self.held:
            raise ValueError(f"a candidate asks rank {asked} of {name!r}; expected at most {self.held}, as opened")

    def forward(self, x: Tensor) -> Tensor:
        """x (candidates x samples, positions, n) -> (candidates x samples, positions, m)."""
        if all(choice.threshold == -math.inf for choice in self.choices):
            return self.dense(x)
        rank = max(choice.rank for choice in self.choices)
        score = channel_score(x, self.norms)
        kept = x * keep_above(score, self._thresholds(score))
        if not rank:
            return self.dense(kept)
        return self.dense(kept) + self._low_rank(x - kept, rank)

    def _thresholds(self, score: Tensor) -> Tensor | float:
        if len({choice.threshold for choice in self.choices}) == 1:
            return self.choices[0].threshold
        return self._by_row([choice.threshold for choice in self.choices], score).to(score.dtype)

    def _low_rank(self, x: Tensor, rank: int) -> Tensor:
        width = rank + -rank % ALIGNED
        A, B = self.A[:, :width], self.B[:, :width]
        ranks = [choice.rank for choice in self.choices]
        if set(ranks) == {width}:
            return low_rank(x, A, B)
        used = torch.arange(width, device=x.device) < self._by_row(ranks, x)
        return nn.functional.linear(nn.functional.linear(x, B.T) * used, A)

    def _by_row(self, values: list[float], x: Tensor) -> Tensor:
        """(rows, 1, 1): each candidate's value for its rows."""
        found = torch.tensor(values, device=x.device).repeat_interleave(len(x) // len(values))
        return found[:, None, None]


class Trials:
    """A dense model on which recipes are tried; a context manager, behind which the model is dense again.

    calibration: of the dense model, LongTensor ids (samples, length), each scored from its second token on. score: of
    every linear. asks: what every linear is asked to begin with, by name. ValueError unless the model is dense.
    """

    def __init__(
        self, calibration: Calibration, asks: Mapping[str, Ask], store: FactorStore, score: str = "magnitude",
        batch_tokens: int = BATCH_TOKENS,
    ):  # fmt: skip
        check_dense(calibration.model)
        if calibration.ids.shape[1] < 2:
            raise ValueError(f"calibration has rows of {calibration.ids.shape[1]} token; expected at least 2")
        self.model, self.ids = calibration.model, calibration.ids.long()
        self.linears = decoder_linears(self.model)
        self.store, self.score, self.batch_tokens = store, score, batch_tokens
        self.asks = dict(asks)
        self.first = 0  # the block whose inputs are kept
        self._layers, self._norm = self.model.model.layers, self.model.model.norm
        self._statistics: dict[tuple, ScoreStatistics] = {}
        self._known: dict[tuple[str, int], float] = {}
        self._modules = {x.name: TrialLinear(x.module, self._norms(x)) for x in self.linears}

    def __enter__(self) -> Trials:
        for x in self.linears:
            x.exchange(self._modules[x.name])
        with torch.no_grad():
            self._states = self.model.get_input_embeddings()(self._on(self.ids[:, :-1]))
        self.read_thresholds()  # of the dense model, as every module still is
        self._dense = dict(self._statistics)
        self.settle(self.asks)
        return self

    def __exit__(self, *_) -> None:
        for x in self.linears:
            x.exchange(x.module)

    def settle(self, asks: Mapping[str, Ask]) -> None:
        """Ask `asks` of every linear, with thresholds read on the model that is sparse by the dense one's.

        What was asked before leaves no trace: a search that resumes skips what it has measured.
        """
        self._statistics = dict(self._dense)
        self._known.clear()
        self.put(asks)
        self.read_thresholds()
        self.put(asks)

    def put(self, asks: Mapping[str, Ask]) -> None:
        """Ask `asks` (of some linears, by name) of the model from now on."""
        self.asks |= asks
        for x in self.linears:
            if x.name in asks:
                choice = self.choice(x, asks[x.name])
                self._modules[x.name].choices = (choice,)
                self._modules[x.name].give(self.store, choice.rank)

    def open(self, linears: Sequence[DecoderLinear], rank: Mapping[str, int]) -> None:
        """Begin a group: keep what its first block takes in, read the thresholds there and behind, and hold factors up
        to `rank` (by name), which its candidates may use."""
        layer = min(x.layer for x in linears)
        while self.first < layer:
            self._states = torch.cat([self._run(x, self.first, self.first + 1) for x in self._pieces(1)])
            self.first += 1
        self.read_thresholds()
        self.put({x.name: self.asks[x.name] for x in self.linears if x.layer >= layer})
        for x in linears:
            self._modules[x.name].give(self.store, rank[x.name])

    def read_thresholds(self) -> None:
        """Read the statistics of every linear's scores again, from the boundary on; one pass."""
        open_ = [x for x in self.linears if x.layer >= self.first]
        firsts = {self._key(x): x for x in reversed(open_)}
        found = {k: ScoreStatistics(x.channels, self._modules[x.name].norms, x.device) for k, x in firsts.items()}
        with hooks(list(firsts.values()), lambda x, value: found[self._key(x)].add(value)):
            for piece in self._pieces(1):
                self._run(piece, self.first, len(self._layers))
        self._statistics |= found
        self._known.clear()

    @property
    def abreast(self) -> int:
        """Candidates that run side by side."""
        return max(1, self.batch_tokens // self.ids[:, 1:].numel())

    @torch.no_grad()
    def losses(self, candidates: Sequence[Mapping[str, Ask]]) -> list[float]:
        """Mean loss in nats per token with each candidate (asks of some open linears, by name) in place of what is
        asked of these now. ValueError for a rank above what `open` was told of."""
        with self._hung(candidates):
            total, at = [], 0
            for piece in self._pieces(len(candidates)):
                targets = self.ids[at : at + len(piece), 1:].flatten()
                hidden = self._run(piece.repeat(len(candidates), 1, 1), self.first, len(self._layers), last=True)
                total.append(torch.stack([self._loss(x.flatten(0, 1), targets) for x in hidden.split(len(piece))]))
                at += len(piece)
        return [x / len(self.ids[:, 1:].flatten()) for x in torch.stack(total).sum(0).tolist()]

    def _loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Sum of the losses of states (positions, width), float64, still where it was computed."""
        parts, targets = [], targets.to(states.device)
        for rows, wanted in zip(states.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            logits = self.model.lm_head(rows)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            parts.append(cross_entropy(logits, wanted.to(logits.device), reduction="none").double().sum())
        return torch.stack(parts).sum()

    def choice(self, linear: DecoderLinear, ask: Ask) -> Choice:
        """Rank and threshold of what is asked of a linear, by the statistics that were read last."""
        split = self.split(linear, ask)
        if split.kept == linear.channels:
            return Choice(-math.inf, 0)
        if (linear.name, split.kept) not in self._known:
            quantile = self._statistics[self._key(linear)].quantile(1 - split.kept / linear.channels)
            self._known[linear.name, split.kept] = quantile
        return Choice(self._known[linear.name, split.kept], split.rank)

    @staticmethod
    def split(linear: DecoderLinear, ask: Ask) -> Split:
        """What the budget of `ask` buys of a linear."""
        return split_budget(*linear.shape, ask.sparsity, ask.rho, linear.weight_bytes, linear.factor_bytes)

    @contextmanager
    def _hung(self, candidates: Sequence[Mapping[str, Ask]]) -> Iterator[None]:
        changed = [x for x in self.linears if x.name in candidates[0]]
        before = {x.name: self._modules[x.name].choices for x in changed}
        for x in changed:
            self._modules[x.name].choices = tuple(self.choice(x, candidate[x.name]) for candidate in candidates)
        try:
            for x in changed:
                self._modules[x.name].check(x.name)
            yield
        finally:
            for name, choices in before.items():
                self._modules[name].choices = choices

    @torch.no_grad()
    def _run(self, states: Tensor, first: int, end: int, last: bool = False) -> Tensor:
        """Blocks `first` to `end` on states (rows, positions, width); with the final norm where `last`."""
        decoder = self.model.model
        decoder.layers = nn.ModuleList(self._layers[first:end])
        if not last:
            decoder.norm = nn.Identity()
        try:
            return decoder(inputs_embeds=states, use_cache=False)[0]
        finally:
            decoder.layers, decoder.norm = self._layers, self._norm

    def _pieces(self, candidates: int) -> tuple[Tensor, ...]:
        """The kept states, as many samples at a time as `batch_tokens` allows for so many candidates."""
        rows = max(1, self.batch_tokens // (candidates * self._states.shape[1]))
        return self._states.split(rows)

    def _norms(self, linear: DecoderLinear) -> Tensor | None:
        return column_norms(linear.module.weight.detach()) if self.score == "column-norm" else None

    def _key(self, linear: DecoderLinear) -> tuple:
        return statistics_key(linear, Score(self._modules[linear.name].norms))

    def _on(self, ids: Tensor) -> Tensor:
        return ids.to(self.model.get_input_embeddings().weight.device)
