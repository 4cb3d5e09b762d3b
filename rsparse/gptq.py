"""GPTQ by Intel's Neural Compressor, an optional extra: calibrated INT4 codes of a model's decoder linears.

Why this library (November 2026): it installs beside our pins as pure Python, runs on a CPU, takes Llama models and
symmetric groups of 128 without reordering, and is maintained by Intel. gptqmodel 7.7 asks for newer torch and numpy
than ours, and 7.6 has to be compiled; llm-compressor asks for an older transformers; torchao's GPTQ is a prototype that
runs on CUDA alone, with zeros of its own.

GPTQ: Frantar et al., ICLR 2023 (arXiv 2210.17323): column by column, the error of a rounded weight is made up for by
those still to round, with the inverse of the inputs' second moments. Its grid is max|w| / 7.5 a step.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from kernels.quantized import GROUP, Quantized, from_gptq
from rsparse import gptq_checkpoint
from rsparse.calibrate import Calibration, check_dense
from rsparse.int4 import check_shapes, is_int4
from rsparse.models import decoder_linears
from rsparse.paths import cache_folder

LIBRARY = "neural-compressor-pt"
DAMPING = 0.01
"""Share of the mean second moment that is added to every input's."""


def check_library() -> None:
    """ValueError where the library is not installed, saying how it is."""
    if importlib.util.find_spec("neural_compressor") is None:
        raise ValueError(
            f"GPTQ needs {LIBRARY}, which is not installed here; expected pip install -e '.[int4]', or the folder of a "
            "GPTQ checkpoint"
        )


def kept_codes(model: nn.Module, ids: Tensor) -> Path:
    """The folder of GPTQ codes of the dense `model` calibrated on `ids` (samples, length): made once, then kept.

    Lies in the cache folder, see rsparse.paths. ValueError where they have to be made and the library is missing.
    """
    made = f"{Calibration(model, ids).key}-{_version()}-{DAMPING}-{GROUP}"
    folder = cache_folder() / "gptq" / made
    if not gptq_checkpoint.is_saved(folder):
        write(folder, model, ids)
    return folder


def write(folder: Path, model: nn.Module, ids: Tensor, text: str = "") -> None:
    """Quantise the dense `model` and write its codes to `folder`. text: where the ids come from, for the record."""
    about = {"samples": len(ids), "length": ids.shape[1], "text": text, "damp_percent": DAMPING}
    codes = quantize(model, ids)
    made = {"quantizer": f"{LIBRARY}:{_version()}"}
    gptq_checkpoint.save(folder, model, codes, made | about)


@torch.no_grad()
def quantize(model: nn.Module, ids: Tensor) -> dict[str, Quantized]:
    """GPTQ codes by the name of the decoder linear, on the CPU, scales float16. `model` stays as it is.

    ids: calibration tokens, LongTensor (samples, length). Blocks are quantised in order, each on the inputs that the
    quantised ones before it leave. Memory beside the model's: one block, its linears' second moments (float32), and a
    block's inputs of all samples (samples x length x width). ValueError for a model that is sparse, in INT4 already or
    spread over several devices, for shapes that do not fit, and where the library is not installed.
    """
    check_library()
    check_dense(model)
    if is_int4(model):
        raise ValueError("the model's weights are INT4 already; expected its own, see rsparse.int4.restore")
    linears = check_shapes(model)
    if len(devices := {x.device for x in linears}) > 1:
        raise ValueError(f"the model lies on {', '.join(sorted(map(str, devices)))}; expected one device")
    ids = Calibration(model, ids).ids
    with _computing_on(linears[0].device):
        GPTQConfig, prepare, convert = _library()
        config = GPTQConfig(
            bits=4, use_sym=True, group_size=GROUP, act_order=False, percdamp=DAMPING, block_size=GROUP,
            model_path=os.curdir,  # without one, it fetches the model's files from the hub, and reads none of them
        )  # fmt: skip
        twin = prepare(_twin(model), config)
        device = twin.get_input_embeddings().weight.device
        for sample in tqdm(ids.split(1), desc="GPTQ, inputs", leave=False):
            twin(sample.to(device))
        with _showing(twin.model.layers):
            twin = convert(twin)
    return {x.name: from_gptq(x.module.qweight.cpu(), x.module.scales.cpu()) for x in decoder_linears(twin)}


def _version() -> str:
    """Of the library; "none" where it is not installed, which has made no codes."""
    try:
        return metadata.version(LIBRARY)
    except metadata.PackageNotFoundError:
        return "none"


def _library() -> tuple:
    """GPTQConfig, prepare and convert; the library's log, which it opens when imported, tells errors alone."""
    from neural_compressor.torch.quantization import GPTQConfig, convert, prepare

    logging.getLogger("neural_compressor").setLevel(logging.ERROR)
    return GPTQConfig, prepare, convert


def _twin(model: nn.Module) -> nn.Module:
    """A model of the same weights, not copied: the library exchanges modules, and a tensor only for another."""
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(model.config, dtype=next(model.parameters()).dtype)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(model.device)
    return twin.eval()


@contextmanager
def _showing(blocks: nn.ModuleList) -> Iterator[None]:
    """Inside, a bar shows which of the blocks is run: the library takes minutes for a 7B model, and says nothing."""
    with tqdm(total=len(blocks), desc="GPTQ, blocks", leave=False) as bar:

        def at(index: int) -> None:
            bar.update(index - bar.n)

        handles = [x.register_forward_pre_hook(lambda *_, i=i: at(i)) for i, x in enumerate(blocks)]
        try:
            yield
            at(len(blocks))
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _computing_on(device: torch.device) -> Iterator[None]:
    """Inside, the library computes on `device`, not where it likes best."""
    before = os.environ.get("INC_TARGET_DEVICE")
    os.environ["INC_TARGET_DEVICE"] = device.type
    try:
        yield
    finally:
        os.environ.pop("INC_TARGET_DEVICE")
        if before is not None:
            os.environ["INC_TARGET_DEVICE"] = before
