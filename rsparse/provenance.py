"""Where a result comes from: hashes of code and data, versions, device, time, memory."""

from __future__ import annotations

import hashlib
import platform
import resource
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from rsparse.paths import ROOT

CODE = ("rsparse", "kernels")
DATA = ("data/tiny", "data/paper")
PRESENTING = ("__main__", "batch", "book", "claims", "estimate", "execution", "figures", "gains", "pages", "paper",
              "predicates", "presets", "search_command", "search_cost")  # fmt: skip
READING = "_reading"
"""Modules whose names end so read finished rows."""
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
PACKAGES = ("torch", "triton", "transformers", "lm-eval", "numpy", "datasets", "accelerate")


def content_hash(root: Path, parts: Iterable[str], suffix: str = "") -> str:
    """sha256 over names and bytes of the files below `root`/part whose name ends in `suffix`."""
    digest = hashlib.sha256()
    for path in sorted(p for part in parts for p in (root / part).rglob(f"*{suffix}") if p.is_file()):
        if "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def code_hash() -> str:
    """Hash of the library and the kernels of this checkout."""
    return content_hash(ROOT, CODE, ".py")[:16]


@cache
def measuring_hash() -> str:
    """Hash of the code that a measured row can depend on: all but what runs batches and makes pages and figures."""
    digest = hashlib.sha256()
    for path in sorted(p for part in CODE for p in (ROOT / part).rglob("*.py") if p.stem not in PRESENTING):
        if path.stem.endswith(READING):
            continue
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def data_hash() -> str:
    """Hash of the embedded default and the papers' data of this checkout, without the claims, which read results."""
    digest = hashlib.sha256()
    for path in sorted(p for part in DATA for p in (ROOT / part).rglob("*") if p.is_file()):
        if not path.name.startswith("claims."):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def device_name(device: str) -> str:
    """What computes, for a reader: the GPU's name, or the processor and torch's thread count."""
    import torch  # the batch runner hashes code with this module and needs no torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def gpu_peak_memory(device: str) -> int:
    """Most bytes that torch has held at once in this process, over all GPUs; 0 on a CPU."""
    import torch

    gpus = range(torch.cuda.device_count()) if device.startswith("cuda") else ()
    return sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)


def reset_peak_memory(device: str) -> None:
    """Begin `gpu_peak_memory` anew from what is held now."""
    import torch

    for gpu in range(torch.cuda.device_count()) if device.startswith("cuda") else ():
        torch.cuda.reset_peak_memory_stats(gpu)


def process_peak_memory() -> int:
    """Most bytes of main memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


class Clock:
    """Wall time and peak memory from its creation on."""

    def __init__(self, device: str):
        self.device, self._start = device, time.monotonic()

    def provenance(self, seed: int, parameters: dict[str, Any]) -> dict[str, Any]:
        """Everything that stands beside a table: times in seconds, memory in bytes."""
        return {
            "code": code_hash(),
            "data": data_hash(),
            "versions": versions(),
            "device": device_name(self.device),
            "seed": seed,
            "seconds": round(time.monotonic() - self._start, 1),
            "peak_memory": process_peak_memory(),
            "gpu_peak_memory": gpu_peak_memory(self.device),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "parameters": parameters,
        }
