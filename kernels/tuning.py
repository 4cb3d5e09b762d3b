"""Which configuration a launch takes: measured once per device, shape and sparsity, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch

from kernels import timing
from kernels.folders import cache_folder, cache_folders
from kernels.operations import Gemv
from kernels.packing import Packed

KINDS = {
    "16 bit": ((64, 32, 1, False), (64, 32, 1, True), (128, 32, 1, True)),
    "32 bit": ((32, 32, 1, False), (64, 16, 1, True), (64, 32, 1, True)),
    "int4": ((128, 16, 1, True), (128, 32, 1, True), (256, 16, 1, True), (128, 32, 1, False)),
}
"""Storage -> columns, rows, warps and whether listed. Rows of 64 to 256 bytes, as many in flight as registers hold."""
SPLITS = (6, 8, 12, 16, 24, 32, 56, 112)
PROGRAMS = (512, 8192)
"""Of a launch: fewer leave processors idle, more have too little to do for what their sums cost. For several tokens, of
larger programs, there is no least."""
SEVERAL = {
    "16 bit": ((128, 32, 2, True), (256, 32, 4, True)),
    "32 bit": ((64, 32, 2, True), (64, 32, 4, True)),
}
"""`KINDS` for several tokens, whose tiles wait in shared memory and whose lists take a program longer."""
SEVERAL_SPLITS = (3, 4, 6, 8, 10, 12, 16, 24)
FILE = "kernels.json"
"""In a cache folder: a configuration under each key."""
_UNSAVED: dict[str, dict] = {}
"""Choices of this process that could not be kept on disk."""


def storage(packed: Packed) -> str:
    """A key of `KINDS`."""
    return "int4" if packed.scales is not None else f"{8 * packed.dtype.itemsize} bit"


def candidates(packed: Packed, tokens: int = 1) -> list:
    """Configurations worth trying, each grid once: INT4's stretches are whole groups, so that some splits are one.
    ValueError for several tokens of INT4."""
    from kernels.triton_gemv import Configuration, grid_of

    if tokens > 1 and storage(packed) not in SEVERAL:
        raise ValueError(f"{tokens} tokens; expected 1 for {storage(packed)}")
    kinds, splits, least = (KINDS, SPLITS, PROGRAMS[0]) if tokens == 1 else (SEVERAL, SEVERAL_SPLITS, 0)
    kinds = [x for x in kinds[storage(packed)] if not any(columns % x[0] for columns in packed.padded)]
    found = [
        Configuration(columns, rows, split, warps, listed)
        for (columns, rows, warps, listed), split in product(kinds, splits)
        if least <= sum(packed.padded) // columns * split <= PROGRAMS[1] and split <= packed.channels // 64
    ]
    found = found or [Configuration(*kind[:2], splits[0], *kind[2:]) for kind in kinds]
    return list(dict.fromkeys(replace(x, splits=grid_of(packed, x, tokens).splits) for x in found))


def cache_path() -> Path:
    """Where choices are written, see `cache_folder`."""
    return cache_folder() / FILE


def tune(weights: Sequence[Packed], gated: bool, x: torch.Tensor, sparsity: float,
         norm: tuple[torch.Tensor, float] | None = None):  # fmt: skip
    """The fastest of `candidates` on `weights`, copies of one shape, for x (tokens, n) of the given sparsity, behind a
    norm or not; from the cache where it was measured before. What cannot be kept on disk holds for this process, with
    one warning."""
    from kernels.triton_gemv import Configuration

    key, known = _key(weights[0], gated, len(x), sparsity, norm is not None), _read()
    if key not in known:
        seconds = {}
        for candidate in candidates(weights[0], len(x)):
            operations = [Gemv(packed, gated, norm, candidate, len(x)) for packed in weights]
            seconds[candidate] = timing.measure([lambda o=o: o(x) for o in operations], "cuda", 5).p50
        known = _keep(key, asdict(min(seconds, key=seconds.__getitem__)))
    return Configuration(**known[key])


def configuration_for(packed: Packed, gated: bool, shares: Sequence[float],
                      norm: tuple[torch.Tensor, float] | None = None, tokens: int = 1):  # fmt: skip
    """What `tune` finds for so many tokens on weights of the shape of `packed` of which segment i reads `shares[i]` of
    its channels for each: measured on `packed` and random copies. norm: that x passes first, which shifts what is
    fastest."""
    from kernels.triton_gemv import Configuration

    sparsity = 1 - sum(s * m for s, m in zip(shares, packed.widths, strict=True)) / packed.rows
    if (known := _read().get(_key(packed, gated, tokens, sparsity, norm is not None))) is not None:
        return Configuration(**known)
    normal = torch.distributions.Normal(0.0, 1.0)
    thresholds = normal.icdf(1 - torch.tensor(shares).clamp(0, 1) / 2).tolist()  # of |x|, x normal
    x = torch.randn(tokens, packed.channels, device=packed.table.device).to(packed.dtype)
    copies = [_random(packed, thresholds) for _ in range(timing.copies(packed.table.nbytes, "cuda") - 1)]
    return tune([replace(packed.with_thresholds(thresholds), norms=None), *copies], gated, x, sparsity, norm)


def _random(packed: Packed, thresholds: Sequence[float]) -> Packed:
    """Other weights of the shape of `packed`."""
    if packed.scales is not None:
        table = torch.randint_like(packed.table, torch.iinfo(torch.int32).max)
        return replace(packed.with_thresholds(thresholds), table=table, norms=None)
    table = torch.randn_like(packed.table) / packed.channels**0.5
    return replace(packed.with_thresholds(thresholds), table=table, A=table[packed.channels :], norms=None)


def _key(packed: Packed, gated: bool, tokens: int, sparsity: float, normed: bool) -> str:
    from triton import __version__ as triton

    device = torch.cuda.get_device_name(packed.table.device)
    shape = f"{'+'.join(map(str, packed.widths))}x{packed.channels} r{packed.B.shape[1]}"
    shape += " gated" * gated + " normed" * normed
    kind = f"{storage(packed)} {packed.dtype}"
    compiled = f"{device} | CUDA {torch.version.cuda} | Triton {triton}"
    return f"{_kernels()} | {compiled} | {kind} | {shape} | {tokens} | {sparsity:.2f}"


@cache
def _kernels() -> str:
    """A choice holds for the kernels that it was measured with, and among the candidates that this file offered."""
    digest = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.glob("triton_*.py")), Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _read() -> dict[str, dict]:
    """All that is known, the preferred folder before others; a file that holds no choices counts as empty."""
    known: dict[str, dict] = {}
    for folder in reversed(cache_folders()):
        with suppress(OSError, ValueError):  # no JSON, no UTF-8
            found = json.loads((folder / FILE).read_text(encoding="utf-8"))
            known |= found if isinstance(found, dict) else {}
    return known | _UNSAVED


def _keep(key: str, choice: dict) -> dict[str, dict]:
    """All that is known, with `choice` under `key`: on disk, or for this process where that cannot be."""
    known = _read() | {key: choice}
    try:
        write_json(cache_path(), known)
    except OSError as error:
        if not _UNSAVED:
            warnings.warn(f"{cache_path()} cannot be written ({error.strerror}): launches are measured again by every "
                          "process; set RSPARSE_CACHE to a folder that can", stacklevel=3)  # fmt: skip
        _UNSAVED[key] = choice
    return known


def write_json(path: Path, content: dict) -> None:
    """`content` as JSON at `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8")
    try:
        with file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    except BaseException:  # interrupted, too
        os.unlink(file.name)
        raise
