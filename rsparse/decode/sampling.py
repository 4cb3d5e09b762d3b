"""From logits to the next token: the largest, or a draw."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the largest logit. top_k: only so many of the most likely tokens. top_p: of these, the
    fewest most likely ones that hold the share top_p together. The order is Hugging Face's.

    ValueError for a value that is not allowed, and for top_k or top_p where nothing is drawn.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, Real) or not (
            0 <= self.temperature < float("inf")
        ):  # fmt: skip
            raise ValueError(f"temperature is {self.temperature!r}; expected a number of at least 0")
        if self.top_k is not None and (isinstance(self.top_k, bool) or not isinstance(self.top_k, int)
                                       or self.top_k < 1):  # fmt: skip
            raise ValueError(f"top_k is {self.top_k!r}; expected a whole number of at least 1, or None")
        if self.top_p is not None and (not isinstance(self.top_p, Real) or not 0 < self.top_p <= 1):
            raise ValueError(f"top_p is {self.top_p!r}; expected a number in (0, 1], or None")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and (value := getattr(self, name)) is not None:
                raise ValueError(f"{name} is {value!r} where temperature is 0, which draws nothing; expected a "
                                 "temperature above 0")  # fmt: skip

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from, (batch, vocabulary), float32 at least. Temperature above 0."""
        x = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.top_k is not None:
            least = x.topk(min(self.top_k, x.shape[-1])).values[:, -1:]
            x = x.masked_fill(x < least, -torch.inf)
        p = x.softmax(-1)
        if self.top_p is not None:
            p = _nucleus(p, self.top_p)
        return p

    def __call__(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The next tokens (batch,) after logits (batch, vocabulary); of equal logits the first."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator)[:, 0]


GREEDY = Sampling()


def _nucleus(p: Tensor, share: float) -> Tensor:
    """p with zeros outside the fewest most likely tokens that hold `share` together, not scaled up again."""
    ordered, at = p.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return p * torch.zeros_like(p, dtype=torch.bool).scatter(-1, at, before < share)
