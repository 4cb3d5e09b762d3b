"""What rows say of R-Sparse's low-rank path: its ranks, and which linears the budget leaves without one.

Rows carry the ranks of the first block, "q 4 k 2 ...". Reads finished tables alone and needs no torch.
"""

from __future__ import annotations

import pandas as pd

from rsparse.exhibits.gains import listed


def of_linears(part: pd.DataFrame) -> dict[str, int]:
    """Linear of the first block -> rank, of the rows of one setting; empty where they do not say."""
    words = next(iter(part["ranks"].dropna()), "").split() if "ranks" in part else []
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def span(part: pd.DataFrame) -> str:
    """Lowest to highest rank over the first block's linears, "2 to 6"; "" where the rows do not say."""
    values = sorted(set(of_linears(part).values()))
    return " to ".join(str(x) for x in dict.fromkeys((*values[:1], *values[-1:])))


def without(part: pd.DataFrame) -> str:
    """Linears of the first block whose rank is 0, "k and v" or "every linear"; "" where all have a path."""
    ranks = of_linears(part)
    none = [kind for kind, rank in ranks.items() if rank == 0]
    if not none:
        return ""
    return "every linear" if len(none) == len(ranks) else listed(none)
