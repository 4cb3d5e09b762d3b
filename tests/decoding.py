"""What the tests of the decode engine share: small models in published styles, and Hugging Face's answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

LLAMA_3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5,
               original_max_position_embeddings=64)  # fmt: skip
STYLES = {
    "llama-2": dict(num_key_value_heads=8),
    "llama-3": dict(shape="llama-3-8b", rope_parameters=LLAMA_3),
    "mistral": dict(shape="mistral-7b", sliding_window=24, num_key_value_heads=4),
}
"""Sizes of small random models; the window is shorter than every text here."""
every_style = pytest.mark.parametrize("sizes", STYLES.values(), ids=STYLES)


def theirs(model, ids: Tensor, new: int, **options) -> Tensor:
    """Hugging Face's greedy continuation; never stopped unless asked to."""
    model.generation_config.eos_token_id = options.pop("stop", None)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options)


@torch.no_grad()
def their_logits(model, ids: Tensor, context: int) -> Tensor:
    """Hugging Face's logits where the prompt is the first `context` tokens, and the others are fed one by one."""
    out = model(ids[:, :context], use_cache=True)
    found = [out.logits[:, -1]]
    for at in range(context, ids.shape[1]):
        out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits[:, -1])
    return torch.stack(found, 1)


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, in units of that of the expected values."""
    return float((found.double() - expected.double()).square().mean().sqrt() / expected.double().square().mean().sqrt())


def share_equal(found: Tensor, expected: Tensor, context: int) -> float:
    """Share of the new tokens up to which the continuations are the same."""
    same = (found == expected)[:, context:].long().cumprod(1)
    return float(same.double().mean())
