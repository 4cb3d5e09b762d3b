"""A two-layer checkpoint with random weights and the embedded default's tokenizer, in a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from rsparse.models import load_tokenizer, random_model, shape_config

SIZES = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=8)
WIDE = dict(hidden_size=256, intermediate_size=256, num_attention_heads=2)
"""Sizes in place of those where inputs and outputs have to be multiples of 128, as INT4 weights have them."""
SMALL_SOURCES = dict(
    items=2, batch_size=8, samples=2, length=48, windows=3, window=40, articles=2, summary_tokens=4
)
"""Sizes of everything that is measured on it, by the names that notebooks and `Sources` share."""


def save(folder: Path, **sizes: int) -> Path:
    """Sizes are `SIZES`, but for `sizes`. Weights are scaled up from the library's 0.02, so that what a method changes
    shows in the logits."""
    tokenizer = load_tokenizer("random:llama-2-7b")
    config = shape_config(
        "llama-2-7b", **SIZES | sizes, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=1024
    )
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model = random_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight") or "embed" in name:
                parameter.mul_(6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
