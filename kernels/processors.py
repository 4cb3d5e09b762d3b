"""Whether timings on a CPU are the kernels', or of threads that did not run all the time. Needs no torch.

torch's threads wait for each other by spinning, so that a process which has its processors to itself runs on every one
of them all the time. Less says that something is amiss: others ran, a quota held it back, there are more threads than
processors, or threads slept. More does not say that all is well: a neighbour may have had memory's bandwidth.
"""

from __future__ import annotations

OWN = 0.9
"""Of its threads' time, what a process runs that nothing holds back."""


def shared(share: float) -> str:
    """A sentence where a process ran for only so much of its threads' time; "" where for nearly all, or for NaN."""
    if not share < OWN:
        return ""
    return (f"This process ran for only {share:.0%} of its threads' time at the least, as where others use the "
            "processors or a quota limits them, so that these times are not the kernels'.")  # fmt: skip
