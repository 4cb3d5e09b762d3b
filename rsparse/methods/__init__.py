"""The published methods, one file each, by name."""

from rsparse.methods import (
    cats,
    chess,
    dense,
    griffin,
    larosa,
    low_rank,
    r_sparse,
    relufication,
    teal,
    teal_greedy,
    wina,
)
from rsparse.methods.base import Method, Request

_FILES = (dense, relufication, cats, griffin, chess, teal, teal_greedy, wina, larosa, low_rank, r_sparse)
_ALL = [method for file in _FILES for method in (file.METHOD, *([file.ROTATED] if file is wina else []))]
METHODS: dict[str, Method] = {method.name: method for method in _ALL}

__all__ = ["METHODS", "Method", "Request"]
