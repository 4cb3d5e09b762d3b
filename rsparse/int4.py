"""INT4 weights in place of a model's decoder linears, evaluated as the numbers they stand for.

The codes and scales stay beside the dequantised weight, so that a kernel can take them (`Int4Linear.quantized`), and
the linear says what it stores, so that budgets count INT4's bytes. Low-rank factors are those of the dequantised
weight, which is what a deployed model has; the precision they are stored in is a parameter and counts as well.

Sources: GPTQ, Frantar et al. (arXiv 2210.17323); R-Sparse (arXiv 2504.19449), Table 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels.quantized import GROUP, Quantized, from_gptq, round_to_nearest, to_gptq
from rsparse.calibrate import check_dense
from rsparse.decompose import Factors
from rsparse.models import DTYPES, DecoderLinear, decoder_linears

WEIGHTS = ("int4-rtn", "int4-gptq")
"""How codes are found: the nearest of every weight, which is the control; or GPTQ's, which make up for one another."""
STORED = "int4-g128"
"""The key of `accounting.BYTES` for the weight: 4 bits, and a float16 scale for 128 inputs of an output."""
FACTORS = ("float32", "float16", "bfloat16", STORED)
"""Precisions of low-rank factors. INT4 ones are rounded to nearest, in groups of 128 along the weight's own sides."""


class Int4Linear(nn.Linear):
    """A linear y = W x + b with W (m, n) dequantised in `dtype`; holds codes and scales as a GPTQ checkpoint does.

    quantized: codes and scales. factor_dtype: one of FACTORS, of the factors that a method adds, which are held in
    `dtype` as the weight is: 16 bits are bfloat16's in a bfloat16 model. ValueError where INT4 factors do not fit, and
    for factors wider than `dtype`, which would be counted and not held.
    """

    stored = STORED

    def __init__(
        self, quantized: Quantized, dtype: torch.dtype, bias: Tensor | None = None, factor_dtype: str = "float16"
    ):
        m, n = quantized.shape
        super().__init__(n, m, bias=False, device="meta")
        self.factor_dtype = check_factors(factor_dtype)
        check_held(factor_dtype, dtype)
        if factor_dtype == STORED and self.out_features % GROUP:
            raise ValueError(f"the weight has {self.out_features} outputs; INT4 factors need a multiple of {GROUP}")
        packed, device = to_gptq(quantized), quantized.device
        self.register_buffer("qweight", packed["qweight"].to(device))
        self.register_buffer("scales", packed["scales"].to(device))
        wide = self.quantized().dequantized(torch.promote_types(dtype, torch.float32))
        self.weight = nn.Parameter(wide.to(dtype), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def quantized(self, dtype: torch.dtype | None = None) -> Quantized:
        """What the INT4 kernel takes: codes, and scales in the dtype of the activations (float16 by default)."""
        found = from_gptq(self.qweight, self.scales)
        return found if dtype is None else Quantized(found.codes, found.scales.to(dtype))

    def rounded(self, factors: Factors) -> Factors:
        """The same factors, rounded to what `factor_dtype` can store."""
        if self.factor_dtype == STORED:
            return Factors(*(_rounded_columns(x) for x in (factors.A, factors.B)))
        return factors.to(DTYPES[self.factor_dtype]).to(self.weight.dtype)


def check_factors(name: str) -> str:
    """Return `name` if it is one of FACTORS; ValueError otherwise."""
    if name not in FACTORS:
        raise ValueError(f"factor_dtype is {name!r}; expected one of {', '.join(FACTORS)}")
    return name


def check_held(name: str, dtype: torch.dtype) -> None:
    """ValueError for factors that a model of `dtype`, which holds them as its weights, would round."""
    if name != STORED and DTYPES[name].itemsize > dtype.itemsize:
        raise ValueError(f"factor_dtype is {name!r}; expected no more bits than the model's {dtype}")


def _rounded_columns(factor: Tensor) -> Tensor:
    """A factor (size, r), every column rounded in groups along its size."""
    return nearest(factor.T.contiguous()).dequantized(factor.dtype).T.contiguous()


def nearest(weight: Tensor) -> Quantized:
    """`round_to_nearest` with scales that float16 holds, which is what the bytes are counted for."""
    found = round_to_nearest(weight.detach().float())
    return Quantized(found.codes, found.scales.to(torch.float16))


def check_shapes(model: nn.Module) -> list[DecoderLinear]:
    """The decoder linears of `model`; ValueError names one whose inputs or outputs do not fit INT4's layout."""
    linears = decoder_linears(model)
    for x in linears:
        m, n = x.shape
        if n % GROUP or m % 8:
            raise ValueError(
                f"{x.name!r} has shape {(m, n)}; INT4 needs a multiple of {GROUP} inputs, which share a scale, and "
                "a multiple of 8 outputs"
            )
    return linears


@torch.no_grad()
def hang(model: nn.Module, codes: Callable[[DecoderLinear], Quantized], factor_dtype: str = "float16") -> None:
    """Put INT4 weights in place of every decoder linear of the dense `model`: ``codes(linear)``, one at a time.

    The linears that they replace wait on the CPU until `restore`. ValueError, with the model as it was, for a model
    that is sparse or in INT4 already, and for shapes that do not fit.
    """
    check_dense(model)
    check_factors(factor_dtype)
    if is_int4(model):
        raise ValueError("the model's weights are INT4 already; expected its own, see rsparse.int4.restore")
    done: list[tuple[DecoderLinear, torch.device]] = []
    try:
        for x in check_shapes(model):
            device, dtype = x.device, x.module.weight.dtype
            made = Int4Linear(codes(x), dtype, x.module.bias, factor_dtype).to(device)
            x.exchange(made)
            x.module.to("cpu")
            done.append((x, device))
    except BaseException:
        _give_back(done)
        raise
    model._rsparse_int4 = done


def restore(model: nn.Module) -> None:
    """Hang the model's own linears back, bit for bit. Harmless where they hang; ValueError for a sparse model."""
    check_dense(model)
    _give_back(model.__dict__.pop("_rsparse_int4", []))


def is_int4(model: nn.Module) -> bool:
    """Whether INT4 weights are in place."""
    return "_rsparse_int4" in model.__dict__


def _give_back(done: list[tuple[DecoderLinear, torch.device]]) -> None:
    for x, device in done:
        x.exchange(x.module.to(device))
