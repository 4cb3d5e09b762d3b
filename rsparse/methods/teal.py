"""TEAL with uniform sparsity: inputs of small magnitude are skipped, the rest of W is read.

TEAL (arXiv 2408.14690), section 4; the "sparse only" row of R-Sparse's Table 3. Every linear has the same
sparsity, so the model-level sparsity equals it; no extra bytes are read. The authors' code sparsifies the last
half of a sequence (`tokens=-0.5`) and thresholds by the symmetric inverse CDF of x, we by the quantile of |x|.
"""

from __future__ import annotations

from fractions import Fraction

from rsparse.methods.base import Method, uniform
from rsparse.models import KINDS

METHOD = Method("teal", "arXiv 2408.14690", uniform(dict.fromkeys(KINDS, Fraction(1))))
