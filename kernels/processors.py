"""Whether timings on a CPU are the kernels', or of threads that waited for a processor. Needs no torch.

Only what the system's scheduler counts is seen: not a neighbour that has memory's bandwidth, and no quota.
"""

from __future__ import annotations

from pathlib import Path

OWN = 0.9
"""Of the time that its threads wanted a processor, what a process gets that has them to itself. One that shares two
processors with a single other process gets two thirds."""


def scheduled() -> tuple[float, float] | None:
    """Seconds that this process's threads have run, and have waited for a processor while they could have; None where
    the system does not tell (it is Linux that does)."""
    try:
        lines = [path.read_text() for path in Path("/proc/self/task").glob("*/schedstat")]
    except OSError:  # a thread has just ended, or there is no such folder
        return None
    counts = [[int(x) for x in line.split()[:2]] for line in lines]
    return (sum(x[0] for x in counts) / 1e9, sum(x[1] for x in counts) / 1e9) if counts else None


def share_of(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float:
    """Of the time that threads wanted a processor between two of `scheduled`, the share that they had one; NaN where
    that is not known."""
    if before is None or after is None:
        return float("nan")
    ran, waited = (y - x for x, y in zip(before, after, strict=True))
    return ran / (ran + waited) if ran > 0 else float("nan")


def shared(share: float) -> str:
    """A sentence where threads had a processor for only so much of the time that they wanted one; "" where for nearly
    all of it, or for NaN."""
    if not share < OWN:
        return ""
    return (f"Others used the processors meanwhile: this process had one for only {share:.0%} of the time that its "
            "threads wanted it, so that these times are not the kernels'.")  # fmt: skip
