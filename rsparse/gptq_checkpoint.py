"""GPTQ checkpoints: INT4 decoder linears in safetensors files, as GPTQ's own code and published models lay them out.

A folder holds ``NAME.qweight``, ``.qzeros``, ``.scales`` and ``.g_idx`` of every linear, in one file or several, and
quantize_config.json. What `save` writes has these and no other weights: the rest of a model is that of its checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kernels.quantized import GROUP, Quantized, from_gptq, to_gptq
from rsparse.files import atomic_path, write_json
from rsparse.int4 import check_shapes
from rsparse.models import DecoderLinear, fingerprint
from rsparse.paths import DATA

TINY = DATA / "tiny" / "gptq"
CONFIG, WEIGHTS = "quantize_config.json", "model.safetensors"
EXPECTED = {"bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}


def save(folder: Path, model: nn.Module, codes: Mapping[str, Quantized], about: Mapping[str, Any]) -> None:
    """Write the codes of the decoder linears of `model`, by name, with its fingerprint and what `about` says of them.

    The weights come last and in one step: a folder that holds them is whole. ValueError where a linear has no codes.
    """
    if missing := [x.name for x in check_shapes(model) if x.name not in codes]:
        raise ValueError(f"there are no codes of {missing[0]!r}; expected all decoder linears")
    tensors = {f"{name}.{part}": x for name, one in codes.items() for part, x in to_gptq(one).items()}
    meta = {"fingerprint": fingerprint(model), **about}
    write_json(Path(folder) / CONFIG, EXPECTED | {"quant_method": "gptq", "checkpoint_format": "gptq", "meta": meta})
    with atomic_path(Path(folder) / WEIGHTS) as path:
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, path, metadata={"format": "pt"})


def is_saved(folder: Path) -> bool:
    """Whether `save` finished there."""
    return (Path(folder) / WEIGHTS).exists()


class GptqCheckpoint:
    """The INT4 linears of a folder, read one at a time. ValueError for a folder without, or with another layout."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{str(folder)!r} is no folder; expected one with a GPTQ checkpoint")
        self._files: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)
        if not any(name.endswith(".qweight") for name in self._files):
            raise ValueError(f"{str(folder)!r} holds no GPTQ checkpoint; expected *.qweight in *.safetensors")
        self.config = _config(self.folder)
        for name, value in EXPECTED.items():
            if name in self.config and self.config[name] != value:
                raise ValueError(f"{str(folder)!r} has {name} {self.config[name]!r}; expected {value!r}")

    def check(self, model: nn.Module) -> None:
        """ValueError unless there are codes for every decoder linear of `model`, and no sign of another model."""
        known = self.config.get("meta", {}).get("fingerprint")
        if known not in (None, fingerprint(model)):
            raise ValueError(
                f"{str(self.folder)!r} was made from a checkpoint with fingerprint {known}; expected "
                f"{fingerprint(model)}, this model's"
            )
        for x in check_shapes(model):
            m, n = x.shape
            for part, shape in (("qweight", [n // 8, m]), ("scales", [n // GROUP, m])):
                if (found := self._shape(f"{x.name}.{part}")) != shape:
                    raise ValueError(f"{x.name}.{part} in {str(self.folder)!r} has shape {found}; expected {shape}")

    def read(self, linear: DecoderLinear) -> Quantized:
        """Codes and scales of one linear, on its device. ValueError for zeros other than 8, or inputs reordered."""
        parts = {part: self._tensor(f"{linear.name}.{part}") for part in ("qweight", "scales", "g_idx", "qzeros")}
        zeros = parts.pop("qzeros")
        if zeros is not None:
            stored = set(((zeros.flatten()[:, None] >> torch.arange(0, 32, 4)) & 15).unique().tolist())
            if stored not in ({7}, {8}):  # less one in the first version of the format, as they are in the second
                raise ValueError(f"{linear.name}.qzeros holds {sorted(stored)}; expected symmetric codes, zero at 8")
        return from_gptq(**{name: x if x is None else x.to(linear.device) for name, x in parts.items()})

    def _shape(self, name: str) -> list[int] | None:
        if name not in self._files:
            return None
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_slice(name).get_shape()

    def _tensor(self, name: str) -> Tensor | None:
        if name not in self._files:
            return None
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


def _config(folder: Path) -> dict[str, Any]:
    """quantize_config.json, or the same inside config.json; {} where there is neither."""
    if (own := folder / CONFIG).exists():
        return json.loads(own.read_text(encoding="utf-8"))
    if (whole := folder / "config.json").exists():
        return json.loads(whole.read_text(encoding="utf-8")).get("quantization_config", {})
    return {}
