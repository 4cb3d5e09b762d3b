"""Whether timings on a CPU are the kernels', or of a machine that others used meanwhile. Needs no torch."""

from __future__ import annotations

OWN = 0.9
"""Of its processors' time, what a process has that shares them with nobody; measured, 0.98 and more."""


def shared(share: float) -> str:
    """A sentence where a process had only so much of its processors' time; "" where they were its own, or for NaN."""
    if not share < OWN:
        return ""
    return (f"Others used the processors meanwhile: of their time this process had {share:.0%} at the least, so that "
            "these times are not the kernels'.")  # fmt: skip
