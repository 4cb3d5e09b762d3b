"""Checkpoints of the Llama and Mistral families: load them, list their decoder linears, exchange linears.

A model is named by ``tiny`` (the embedded default), a local folder, a hub id, or ``random:SHAPE`` (random
weights at the shape of a published model: for rehearsals and speed, never for quality).
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import cached_file

from rsparse.accounting import BYTES
from rsparse.paths import ROOT

TINY = ROOT / "data" / "tiny" / "model"
FAMILIES = ("llama", "mistral")
KINDS = ("q", "k", "v", "o", "gate", "up", "down")
SITES = {"q": "attn_in", "k": "attn_in", "v": "attn_in", "o": "attn_out"} | {
    "gate": "mlp_in",
    "up": "mlp_in",
    "down": "mlp_hidden",
}
"""Which activation a linear reads; linears of one block and site share it. Names as in TEAL's histograms."""
EXPECTED = "tiny, a folder, a hub id (owner/name) or random:SHAPE"
"""What names a model."""
NO_MODEL = "is not a valid model identifier", "Repo id must"
"""How transformers and the hub say that a name is wrong; else the model is out of reach, or torn."""
ACTIVATION = "act"
"""The kind of a `DecoderActivation`, beside those of the linears in KINDS."""
SCOPES = {"all": KINDS, "attention": KINDS[:4], "mlp": KINDS[4:]}
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_LLAMA = dict(hidden_size=4096, num_attention_heads=32, num_hidden_layers=32, max_position_embeddings=4096)
_GROUPED = dict(num_key_value_heads=8, intermediate_size=14336)
SHAPES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-2-7b": (LlamaConfig, _LLAMA | dict(intermediate_size=11008, vocab_size=32000)),
    "llama-2-13b": (
        LlamaConfig,
        dict(hidden_size=5120, num_attention_heads=40, num_hidden_layers=40, intermediate_size=13824)
        | dict(vocab_size=32000, max_position_embeddings=4096),
    ),
    "llama-3-8b": (
        LlamaConfig,
        _LLAMA | _GROUPED | dict(vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0),
    ),
    "llama-3-70b": (
        LlamaConfig,
        dict(hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80)
        | dict(intermediate_size=28672, vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0),
    ),
    "mistral-7b": (
        MistralConfig,
        _LLAMA | _GROUPED | dict(vocab_size=32000, max_position_embeddings=32768, sliding_window=4096),
    ),
}
"""Configuration class and sizes of the published models, by shape name (from their public config.json)."""


@dataclass(frozen=True)
class DecoderLinear:
    """One linear of a decoder block: where it hangs, and what it is."""

    name: str  # "model.layers.3.self_attn.k_proj"
    layer: int
    kind: str  # one of KINDS
    parent: nn.Module
    attribute: str
    module: nn.Module

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out, in), from the weight itself: under grouped-query attention k and v are not
        square."""
        return self.module.out_features, self.module.in_features

    @property
    def weight_bytes(self) -> Fraction:
        """Bytes per stored weight element; ValueError for a dtype that nothing here computes in."""
        if stored := getattr(self.module, "stored", ""):  # INT4, evaluated as what it stands for: see rsparse.int4
            return BYTES[stored]
        dtype = str(self.module.weight.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"the weight of {self.name!r} is {dtype}; expected one of {', '.join(DTYPES)}")
        return BYTES[dtype]

    @property
    def factor_bytes(self) -> Fraction:
        """Bytes per stored element of its low-rank factors: the weight's, unless the linear says otherwise."""
        own = getattr(self.module, "factor_dtype", "")
        return BYTES[own] if own else self.weight_bytes

    @property
    def channels(self) -> int:
        """What a mask of this linear chooses from: its input channels, n."""
        return self.shape[1]

    @property
    def site(self) -> str:
        return SITES[self.kind]

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    @property
    def hung(self) -> nn.Module:
        """What hangs in this linear's place at the moment."""
        return getattr(self.parent, self.attribute)

    def exchange(self, module: nn.Module) -> None:
        """Hang `module` where this linear hangs."""
        setattr(self.parent, self.attribute, module)


@dataclass(frozen=True)
class DecoderActivation:
    """The activation function between gate and down of a block's MLP: where neurons can be switched off."""

    name: str  # "model.layers.3.mlp.act_fn"
    layer: int
    parent: nn.Module
    module: nn.Module
    kind: str = ACTIVATION
    attribute: str = "act_fn"

    @property
    def channels(self) -> int:
        """Neurons of the MLP."""
        return self.parent.gate_proj.out_features

    @property
    def site(self) -> str:
        return "mlp_act"

    @property
    def device(self) -> torch.device:
        return self.parent.gate_proj.weight.device

    @property
    def hung(self) -> nn.Module:
        return getattr(self.parent, self.attribute)

    def exchange(self, module: nn.Module) -> None:
        setattr(self.parent, self.attribute, module)


Place = DecoderLinear | DecoderActivation
"""Where a mask can hang."""


def check_model(model: nn.Module) -> None:
    """ValueError unless `model` is a Hugging Face causal LM of a supported family with its weights loaded."""
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in FAMILIES or not hasattr(getattr(model, "model", None), "layers"):
        raise ValueError(
            f"model is of type {family!r}; expected a causal LM of the family {' or '.join(FAMILIES)}"
        )


def decoder_linears(model: PreTrainedModel) -> list[DecoderLinear]:
    """The seven linears of every decoder block, in the order q, k, v, o, gate, up, down by layer."""
    check_model(model)
    linears = []
    for layer, block in enumerate(model.model.layers):
        for kind in KINDS:
            part, attribute = ("self_attn" if kind in SCOPES["attention"] else "mlp"), f"{kind}_proj"
            parent = getattr(block, part)
            name = f"model.layers.{layer}.{part}.{attribute}"
            linears.append(DecoderLinear(name, layer, kind, parent, attribute, getattr(parent, attribute)))
    return linears


def decoder_activations(model: PreTrainedModel) -> list[DecoderActivation]:
    """The activation of every decoder block's MLP, by layer."""
    check_model(model)
    blocks = enumerate(model.model.layers)
    return [DecoderActivation(f"model.layers.{i}.mlp.act_fn", i, x.mlp, x.mlp.act_fn) for i, x in blocks]


def scope_share(linears: list[DecoderLinear], scope: str) -> Fraction:
    """Share of the decoder linears' dense bytes that `scope` holds; ValueError for an unknown scope."""
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; expected one of {', '.join(map(repr, SCOPES))}")
    sizes = {x.name: x.shape[0] * x.shape[1] * x.weight_bytes for x in linears}
    return sum(sizes[x.name] for x in linears if x.kind in SCOPES[scope]) / sum(sizes.values())


def fingerprint(model: PreTrainedModel) -> str:
    """Identity of a checkpoint, cheap and the same in every dtype it may be loaded in.

    Hashes names and shapes of the decoder linears and a sample of their weights, rounded to bfloat16, with what
    float16 has no normal number for as 0. (A checkpoint stored in float32 has another one in float16, which
    rounds it twice.)
    """
    digest = hashlib.sha256()
    for linear in decoder_linears(model):
        sample = linear.module.weight.detach()[:2, :64].to(torch.bfloat16).float().cpu()
        sample[sample.abs() < torch.finfo(torch.float16).tiny] = 0
        digest.update(f"{linear.name} {linear.shape}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def load_model(
    name: str, dtype: str = "float32", device: str = "cpu", device_map: str | None = None, seed: int = 0
) -> PreTrainedModel:
    """Load the causal LM called `name` (see the module's docstring) for evaluation.

    dtype: float64, float32, bfloat16 or float16. device: where the whole model goes; or device_map="auto" to
    spread a model that outgrows one GPU over all of them. seed: for random weights.

    Raises ValueError, before anything is downloaded or read, for an unknown shape, dtype, a folder without
    weights, a name close to one that is known here, or an architecture that is not supported; and for a hub id whose
    files the hub does not give.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    check_device(device)
    cap_gpu_memory(device)
    if name.startswith("random:"):
        return random_model(shape_config(name.removeprefix("random:")), dtype, device, seed)
    name = check_checkpoint(name)
    place = {"device_map": device_map} if device_map else {}
    with _readable(name):
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, **place
        )
    return (model if device_map else model.to(device)).eval()


def skeleton(name: str) -> PreTrainedModel:
    """The model called `name` without weights: shapes alone, from its config.json."""
    shape = name.removeprefix("random:")
    config = shape_config(shape) if shape != name else AutoConfig.from_pretrained(check_checkpoint(name))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def depth(name: str) -> int:
    """Number of decoder blocks of the model called `name`, without loading its weights."""
    if name.startswith("random:"):
        return shape_config(name.removeprefix("random:")).num_hidden_layers
    return PretrainedConfig.get_config_dict(check_checkpoint(name))[0]["num_hidden_layers"]


def check_device(device: str) -> None:
    """ValueError unless torch can compute on `device` here."""
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; expected a torch device such as 'cpu' or 'cuda'") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch {torch.__version__} sees no GPU here; expected 'cpu'")


def revision(name: str) -> str:
    """The hub's commit behind the hub id `name`, as it lies in the local cache; "" for anything else."""
    if name.startswith("random:") or Path(check_checkpoint(name)).is_dir():
        return ""
    return Path(cached_file(name, "config.json")).parent.name  # .../snapshots/COMMIT/config.json


def cap_gpu_memory(device: str) -> None:
    """Allow this process no more GPU memory than ``$RSPARSE_GPU_GIB``, where set, as a smaller card would.

    Raises ValueError for a value that is not a positive number.
    """
    limit = os.environ.get("RSPARSE_GPU_GIB")
    if not limit or not device.startswith("cuda"):
        return
    if not re.fullmatch(r"\d+(\.\d+)?", limit) or float(limit) == 0:
        raise ValueError(f"RSPARSE_GPU_GIB is {limit!r}; expected a positive number of GiB")
    for gpu in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(gpu).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, float(limit) * 2**30 / total), gpu)


def load_tokenizer(name: str):
    """The tokenizer of the model called `name`; random weights, which know no text, borrow the tiny
    model's."""
    folder = str(TINY) if name.startswith("random:") else check_checkpoint(name)
    with _readable(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def shape_config(shape: str, **changes: Any):
    """Configuration of the published model shape called `shape`, e.g. "llama-2-7b"; `changes` override
    sizes."""
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; expected one of {', '.join(SHAPES)}")
    family, sizes = SHAPES[shape]
    return family(**(sizes | dict(tie_word_embeddings=False) | changes))


def check_checkpoint(name: str) -> str:
    """The folder or hub id behind `name`; ValueError unless it can be a supported checkpoint.

    Reads at most its config.json. Relative folders are looked for here, then in the checkout.
    """
    folder = TINY if name == "tiny" else Path(name)
    if not folder.is_dir() and (ROOT / name).is_dir():
        folder = ROOT / name
    if folder.is_dir():
        if not (folder / "config.json").exists() or not any(folder.glob("*.safetensors")):
            raise ValueError(
                f"folder {name!r} holds no checkpoint; expected config.json and *.safetensors in it"
            )
        name = str(folder)
    elif name.count("/") > 1 or name.startswith((".", "~", "/")) or not name:
        raise ValueError(f"model {name!r} is neither an existing folder, nor a hub id, nor random:SHAPE")
    else:
        _check_spelling(name)
    with _readable(name):
        family = PretrainedConfig.get_config_dict(name)[0].get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"checkpoint {name!r} is of type {family!r}; expected {' or '.join(FAMILIES)}")
    return name


def _check_spelling(name: str) -> None:
    """ValueError for a hub id without owner that is close to a name known here: the hub is asked for half a minute."""
    known = {"tiny": "tiny"} | {x: f"random:{x}" for x in SHAPES} | {f"random:{x}": f"random:{x}" for x in SHAPES}
    close = [] if "/" in name else difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.8)
    if close:
        raise ValueError(f"model is {name!r}; did you mean {known[close[0]]!r}? Expected {EXPECTED}")


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """ValueError for what transformers and the hub raise inside where `name` cannot be loaded, with all that they say:
    where to ask for access, or what the server answered. What the system raises, such as for a full disk or a cache
    that cannot be written, is raised as it is, out of the error that transformers makes of it, too.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from None
        reason = " ".join(str(error).split())
        expected = f"; expected {EXPECTED}" if any(x in reason for x in NO_MODEL) else ""
        raise ValueError(f"model {name!r} cannot be read: {reason}{expected}") from error


@torch.no_grad()
def random_model(config, dtype: str = "float32", device: str = "cpu", seed: int = 0) -> PreTrainedModel:
    """A model of `config` with normal weights (standard deviation 0.02, norms 1), drawn on `device`.

    Built without a second copy in another precision: a 7B model in bfloat16 takes 13 GiB and seconds on a
    GPU.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02, generator=generator)
    model.tie_weights()
    _restore_buffers(model, device)
    return model.eval()


def _restore_buffers(model: PreTrainedModel, device: str) -> None:
    """Buffers are not parameters: `to_empty` left the rotary frequencies undefined, so build them anew."""
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config=model.config).to(device)
