"""For how many tokens at once gathering rows pays. Needs no torch."""

from __future__ import annotations

UNION = 0.75
"""Share of the rows that the tokens of a batch may want together for gathering to pay. On an H200 the four linears of a
block of Llama-3-8B in bfloat16 were, by their geometric mean, faster than torch's dense products for two tokens of
sparsity 0.5, which want 75% of the rows, and slower for four, which want 94%
(data/results/kernels/h200/batch-llama-3-8b.json). What lies between the cells of that file is a guess of a few
percent."""
MOST = 4
"""Tokens: eight of sparsity 0.9 want 57% of the rows, and took longer there, for each of them is listed, and added up,
by itself."""


def gathered_tokens(sparsity: float, most: int = MOST, union: float = UNION) -> int:
    """Tokens, up to `most`, of independent masks that want at most `union` of the rows together; at least 1."""
    return max([1] + [tokens for tokens in range(2, most + 1) if 1 - sparsity**tokens <= union])
