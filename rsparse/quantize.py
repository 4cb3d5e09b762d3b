"""Which INT4 weights a model is evaluated with, and putting them in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from rsparse import gptq, int4
from rsparse.gptq_checkpoint import TINY, GptqCheckpoint


@dataclass(frozen=True)
class Quantization:
    """INT4 weights in place of a checkpoint's own.

    weights: one of `int4.WEIGHTS`. factor_dtype: one of `int4.FACTORS`. Of "int4-gptq" alone: checkpoint, a folder with
    a GPTQ checkpoint, or "tiny" for the embedded model's, or "" to quantise here, once; and for "" the calibration
    windows, samples of length tokens.

    Raises ValueError, before anything is loaded, for a value that is not allowed, a folder that holds no such
    checkpoint, and where quantising needs a library that is not installed.
    """

    weights: str
    factor_dtype: str = "float16"
    checkpoint: str = ""
    samples: int = 128
    length: int = 2048

    def __post_init__(self) -> None:
        if self.weights not in int4.WEIGHTS:
            raise ValueError(f"weights are {self.weights!r}; expected one of {', '.join(int4.WEIGHTS)}")
        int4.check_factors(self.factor_dtype)
        for name in ("samples", "length"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")
        if self.weights != "int4-gptq":  # of what it does not use, the defaults: equal weights are equal
            for name in ("checkpoint", "samples", "length"):
                object.__setattr__(self, name, getattr(type(self), name))
        elif self.checkpoint:
            GptqCheckpoint(self.folder)
        else:
            gptq.check_library()

    @property
    def folder(self) -> Path:
        """Of the GPTQ checkpoint, where one is named."""
        return TINY if self.checkpoint == "tiny" else Path(self.checkpoint)

    @property
    def calibrates(self) -> bool:
        """Whether the codes are made here, from calibration tokens."""
        return self.weights == "int4-gptq" and not self.checkpoint


def put(model: nn.Module, quantization: Quantization, ids: Callable[[], Tensor]) -> None:
    """Hang the INT4 weights in the dense `model`; `int4.restore` takes them out.

    ids: gives GPTQ's calibration tokens (samples, length), asked for only where codes are made here. ValueError as
    `int4.hang`, and for a GPTQ checkpoint of another model.
    """
    int4.check_shapes(model)
    if quantization.weights == "int4-rtn":
        int4.hang(model, lambda linear: int4.nearest(linear.module.weight), quantization.factor_dtype)
        return
    folder = gptq.kept_codes(model, ids()) if quantization.calibrates else quantization.folder
    checkpoint = GptqCheckpoint(folder)
    checkpoint.check(model)
    int4.hang(model, checkpoint.read, quantization.factor_dtype)
