"""Which tokens are sparse.

Published codes sparsify different positions of the text they score, and the choice decides the scores. Here it
is a rule, `tokens`, resolved once per forward pass into a mask over (row, position) that every sparse linear
of the model reads.

    "all"       every position
    "decode"    the inputs a decoder feeds one by one: those after the prompt
    "scored"    "decode" and the last prompt position, so that one-token answers are not dense by construction
    int n >= 0  the first n positions dense          int -n      only the last n positions sparse
    float f     the first floor(f N) dense           float -f    only the last floor(f N) sparse

N is the row's unpadded length; floors are taken in exact decimals; 1 and 1.0 differ. Inputs that continue a
key-value cache are always sparse. Without `rows`, a call of several tokens is a prompt; so is every step of
`generate(use_cache=False)`, which feeds the whole text again.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rsparse.accounting import exact

Tokens = str | int | float
NAMED = ("all", "decode", "scored")

PUBLISHED: dict[str, Tokens] = {
    "r-sparse": 0.9,  # evaluation.py: prefill_ratio 0.1
    "teal": -0.5,  # utils/utils.py: last half of the sequence
    "wina": -0.99,
    "larosa": "all",
    "cats": "all",
    "griffin": -1,  # classification mode: the final token
}
"""The defaults of the published codes, by method (protocol of likelihood scoring)."""


def check_tokens(tokens: Tokens) -> Tokens:
    """Return `tokens` if it is a rule of this module, ValueError otherwise."""
    named = isinstance(tokens, str) and tokens in NAMED
    number = isinstance(tokens, int) and not isinstance(tokens, bool)
    share = isinstance(tokens, float) and -1 <= tokens <= 1
    if not (named or number or share):
        raise ValueError(
            f"tokens is {tokens!r}; expected one of {', '.join(map(repr, NAMED))}, a number of positions (int), "
            "or a share of them (float in [-1, 1])"
        )
    return tokens


def first_sparse(tokens: Tokens, length: int, context: int | None = None) -> int:
    """Index of the first sparse position in a row of `length` unpadded positions; all later ones are sparse.

    context: length of the row's prompt, 1..length; None means that the whole row is a prompt.
    """
    context = length if context is None else context
    if tokens == "all":
        return 0
    if tokens == "decode":
        return context
    if tokens == "scored":
        return context - 1
    if isinstance(tokens, float):
        positions = math.floor(abs(exact(tokens)) * length)
        return positions if math.copysign(1, tokens) > 0 else length - positions
    return min(tokens, length) if tokens >= 0 else max(length + tokens, 0)


def sparse_mask(first: Sequence[int], real: Tensor) -> Tensor:
    """Boolean mask (rows, width), True where a position is sparse.

    first: of every row, the index of its first sparse position. real: boolean (rows, width), False at padding, which
    is never sparse and never counts.
    """
    return real & (real.cumsum(1) > torch.tensor(first)[:, None])


class TokenProtocol:
    """The rule of one sparsified model and the mask of its forward pass in progress.

    `positions` is None while every position is sparse, else a boolean mask (rows, width) on the CPU. Attached
    to the decoder stack (`model.model`), whose inputs say how long the rows are and whether a cache continues.

    prefix: of a method that chooses from dense positions. Where it is not 0, the first position of a row is always
    dense, and under "all" the first `prefix` are. continues: whether the pass in progress continues a cache.
    """

    def __init__(self, tokens: Tokens, prefix: int = 0):
        self.tokens, self.prefix = check_tokens(tokens), prefix
        self.positions: Tensor | None = None
        self.any_sparse = True
        self.continues = False
        self._dense: Tensor | None = None
        self._rows: tuple[list[int], list[int]] | None = None
        self._placed: dict[torch.device, Tensor] = {}
        self._at: dict[torch.device, Tensor] = {}

    def attach(self, decoder: nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Resolve the rule before every forward pass of `decoder`; returns the handle that detaches it."""
        return decoder.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        """The hook; a method and no closure, so that a deep copy of the model gets a protocol of its own."""
        self.begin(**inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments)

    def first_sparse(self, length: int, context: int | None = None) -> int:
        """`first_sparse` of the rule and the prefix: index of a row's first sparse position, `length` for none."""
        least = self.prefix if self.tokens == "all" else min(self.prefix, 1)
        return min(max(first_sparse(self.tokens, length, context), least), length)

    @contextmanager
    def rows(self, lengths: Sequence[int], contexts: Sequence[int]) -> Iterator[None]:
        """For forward passes inside: unpadded length and prompt length of every (right-padded) row."""
        if bad := [(n, c) for n, c in zip(lengths, contexts, strict=True) if not 1 <= c <= n]:
            raise ValueError(f"row (length, context) is {bad[0]}; expected 1 <= context <= length")
        before, self._rows = self._rows, (list(lengths), list(contexts))
        try:
            yield
        finally:
            self._rows = before

    def begin(self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, **_) -> None:
        """Resolve the rule for one forward pass; arguments as Hugging Face decoders take them."""
        self._placed.clear()
        self._at.clear()
        self.positions = self._resolve(input_ids, attention_mask, past_key_values, inputs_embeds)
        self.any_sparse = self.positions is None or bool(self.positions.any())

    def _resolve(self, input_ids, attention_mask, past_key_values, inputs_embeds) -> Tensor | None:
        rows, width = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
        self.continues = past_key_values is not None and int(past_key_values.get_seq_length()) > 0
        if self.continues or (self.tokens == "all" and not self.prefix):
            return None
        if self._rows is not None:
            lengths, contexts = self._rows
            if len(lengths) != rows or max(lengths) > width:
                announced = f"{len(lengths)} rows of up to {max(lengths)} tokens"
                raise ValueError(f"{announced} were announced; got {rows} x {width}")
            real = torch.arange(width) < torch.tensor(lengths)[:, None]
        else:
            real, contexts = real_positions(attention_mask, rows, width), [None] * rows
        first = [self.first_sparse(n, c) for n, c in zip(real.sum(1).tolist(), contexts, strict=True)]
        sparse = sparse_mask(first, real)
        self._dense = real & ~sparse
        return sparse

    def prompt(self, device: torch.device) -> Tensor:
        """Boolean (rows, width): the positions that are dense and no padding, from which a method may choose."""
        return self._dense.to(device, non_blocking=True)

    def on(self, device: torch.device) -> Tensor | None:
        """`positions` on `device`, copied once per forward pass."""
        if self.positions is None:
            return None
        if device not in self._placed:
            self._placed[device] = self.positions.to(device, non_blocking=True)
        return self._placed[device]

    def at(self, x: Tensor) -> Tensor:
        """Indices (sparse positions,) into the rows of x (rows, width, ...) laid end to end, where not all are sparse.

        ValueError for an x of other rows than the forward pass in progress.
        """
        if x.shape[:2] != self.positions.shape:
            expected = " x ".join(map(str, self.positions.shape))
            raise ValueError(f"activations are of {' x '.join(map(str, x.shape[:2]))} positions; expected {expected}")
        if x.device not in self._at:  # found on the CPU: a GPU would have to wait for their number
            self._at[x.device] = self.positions.flatten().nonzero()[:, 0].to(x.device, non_blocking=True)
        return self._at[x.device]


def real_positions(attention_mask: Tensor | None, rows: int, width: int) -> Tensor:
    """Boolean mask (rows, width) on the CPU, False at padding on either side.

    attention_mask: (rows, width or more); or (rows, 1, queries, keys), as `generate` makes it for a static cache,
    boolean or additive: there a padding position does not attend even to itself.
    """
    if attention_mask is None:
        return torch.ones(rows, width, dtype=torch.bool)
    if attention_mask.dim() == 2:
        return attention_mask[:, -width:].bool().cpu()
    itself = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)[:, :width]
    return (itself if itself.dtype == torch.bool else itself == 0).expand(rows, width).cpu()
