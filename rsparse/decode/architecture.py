"""What decoding takes from a checkpoint's configuration, and which checkpoints it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rsparse.models import DTYPES, check_model
from rsparse.planning import dense_linears

ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
"""Rotary scalings whose angles do not depend on the length, up to `max_position_embeddings`: "dynamic" is the default
one there. ("longrope" changes with the length of the text, when keys are in the cache already.)"""
REFUSED = ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale",
           "attention_multiplier", "embedding_multiplier", "residual_multiplier", "layer_types",
           "quantization_config")  # fmt: skip
"""Settings of other families that change what is computed, and that nothing here reads."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder. positions: the most that its rotary embedding was made for. window: how many of the last
    positions a token attends to, itself among them; None for all."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    window: int | None

    @classmethod
    def of(cls, config) -> Architecture:
        """That of a Hugging Face configuration of the Llama or Mistral family.

        ValueError for settings that this engine does not compute: it names them.
        """
        _check_config(config)
        return cls(
            config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            config.vocab_size, config.max_position_embeddings, _window(config),
        )  # fmt: skip


def _window(config) -> int | None:
    """Mistral's; Llama has none, whatever stands in its configuration."""
    return config.sliding_window if config.model_type == "mistral" else None


def _check_config(config) -> None:
    rope = config.rope_parameters
    if rope.get("rope_type") not in ROPES:
        raise ValueError(f"rope_type is {rope.get('rope_type')!r}; expected one of {', '.join(map(repr, ROPES))}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']}; expected 1, whole heads turned")
    for name in REFUSED:
        if (value := getattr(config, name, None)) is not None:
            raise ValueError(f"{name} is {value!r}; expected a configuration without it")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"num_key_value_heads is {config.num_key_value_heads}; expected a divisor of "
                         f"num_attention_heads, {config.num_attention_heads}")  # fmt: skip
    if (window := _window(config)) is not None and window < 1:
        raise ValueError(f"sliding_window is {window}; expected at least 1, or None")


def check_weights(model: nn.Module) -> None:
    """ValueError unless `model` is of a supported family, with plain weights of one dtype on one device."""
    check_model(model)
    linears = [(x.name, x.module) for x in dense_linears(model)] + [("lm_head", model.lm_head)]
    for name, linear in linears:
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name!r} is a {type(linear).__name__}; expected a Linear")
    weights = {name: linear.weight for name, linear in linears} | {"embed_tokens": model.model.embed_tokens.weight}
    first = model.model.embed_tokens.weight
    for name, weight in weights.items():
        if weight.device.type == "meta":
            raise ValueError(f"the weight of {name!r} is not in memory; expected a model loaded without offloading")
        if weight.dtype not in DTYPES.values():
            raise ValueError(f"the weight of {name!r} is {weight.dtype}; expected one of {', '.join(DTYPES)}")
        if (weight.device, weight.dtype) != (first.device, first.dtype):
            raise ValueError(f"the weight of {name!r} is {weight.dtype} on {weight.device}; expected "
                             f"{first.dtype} on {first.device}, as the embedding")  # fmt: skip


def stop_ids(config, generation_config, stop: Sequence[int] | None = None) -> tuple[int, ...]:
    """The tokens that end a row: `stop`, or those of the generation config, else of the model's.

    ValueError for one that is no token id.
    """
    if stop is None:
        stop = getattr(generation_config, "eos_token_id", None)
        stop = config.eos_token_id if stop is None else stop
        stop = () if stop is None else [stop] if isinstance(stop, int) else stop
    for token in stop:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < config.vocab_size:
            raise ValueError(f"stop holds {token!r}; expected token ids, 0..{config.vocab_size - 1}")
    return tuple(stop)


def pad_id(config, generation_config) -> int | None:
    """What finished rows are filled with: of the generation config, else of the model's; None where neither says."""
    found = getattr(generation_config, "pad_token_id", None)
    return config.pad_token_id if found is None else found
