"""The published methods, one file each, by name."""

from rsparse.methods import dense, low_rank, r_sparse, teal, wina
from rsparse.methods.base import Method, Request

METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in (dense, teal, low_rank, wina, r_sparse)}

__all__ = ["METHODS", "Method", "Request"]
