"""R-Sparse and its siblings in one place: rank-aware activation sparsity for Llama and Mistral checkpoints."""

from importlib import import_module
from typing import Any

_HOMES = {
    "METHODS": "rsparse.methods",
    "Calibration": "rsparse.calibrate",
    "Recipe": "rsparse.recipe",
    "Report": "rsparse.report",
    "measure": "rsparse.apply",
    "perplexity": "rsparse.evaluate",
    "restore": "rsparse.apply",
    "sparsify": "rsparse.apply",
}
_MODULES = ("decode",)  # whose names are used through them: rsparse.decode.generate
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the batch runner and the book need no torch, and start at once."""
    if name in _MODULES:
        return import_module(f"rsparse.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'rsparse' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
