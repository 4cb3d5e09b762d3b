"""For how many tokens at once gathering rows pays. Needs no torch."""

from __future__ import annotations

UNION = 0.5
"""Share of the rows that the tokens of a batch may want together for gathering to pay. On an H100 the four linears of a
block of Llama-3-8B took, of the time of torch's dense products: at sparsity 0.75 0.71 for two tokens, which want 44% of
the rows, and 1.01 for four (68%); at 0.5 1.01 for two (75%), 1.26 for four (94%) and 1.44 for eight. Sums over
data/results/kernels/h100/batch-llama-3-8b.json."""


def gathered_tokens(sparsity: float, most: int = 8, union: float = UNION) -> int:
    """Tokens, up to `most`, of independent masks that want at most `union` of the rows together; at least 1."""
    return max([1] + [tokens for tokens in range(2, most + 1) if 1 - sparsity**tokens <= union])
