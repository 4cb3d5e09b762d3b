"""A Llama in float64, one position at a time: what the library's results are compared with.

It shares no code with the library: plain loops, a sort for the mask, an SVD for the factors. Hugging Face
takes norms and angles in float32 whatever the model's dtype, and so does this, to be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Linear = Callable[[str, Tensor, Tensor, int], Tensor]  # name, weight (m, n), input (n,), position -> (m,)


def weights_of(model) -> dict[str, Tensor]:
    """The dense model's parameters by name, as float64; to be taken before `sparsify`."""
    return {name: p.detach().double() for name, p in model.named_parameters()}


def dense(name: str, W: Tensor, x: Tensor, position: int) -> Tensor:
    return W @ x


def masked(
    kept: int, rank: int, norms: bool = False, threshold: float | None = None, sparse=lambda position: True
):
    """R-Sparse's linear with the given kept channels and rank; top-k per token, or a threshold."""

    def linear(name: str, W: Tensor, x: Tensor, position: int) -> Tensor:
        if not sparse(position):
            return W @ x
        score = [
            abs(float(v)) * (float(W[:, j].square().sum().sqrt()) if norms else 1.0) for j, v in enumerate(x)
        ]
        if threshold is None:
            keep = sorted(range(len(x)), key=lambda j: -score[j])[:kept]
        else:
            keep = [j for j in range(len(x)) if score[j] > threshold]
        large, rest = torch.zeros_like(x), x.clone()
        large[keep], rest[keep] = x[keep], 0
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return W @ large + U[:, :rank] @ (S[:rank] * (Vh[:rank] @ rest))

    return linear


def llama_logits(config, weights: dict[str, Tensor], ids: list[int], linear: Linear = dense) -> Tensor:
    """Logits (positions, vocabulary) of one row, position by position, keys and values remembered."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    theta = config.rope_parameters["rope_theta"]
    window = getattr(config, "sliding_window", None) or len(ids)
    half = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequency = 1.0 / theta**half

    def norm(x: Tensor, name: str) -> Tensor:
        y = x.float()[None]
        return (
            weights[name]
            * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps))[0].double()
        )

    def rotate(x: Tensor, position: int) -> Tensor:  # (heads, width)
        angle = (position * frequency).repeat(2)
        turned = torch.cat([-x[:, width // 2 :], x[:, : width // 2]], 1)
        return x * angle.cos().double() + turned * angle.sin().double()

    past: list[tuple[list, list]] = [([], []) for _ in range(config.num_hidden_layers)]
    out = []
    for position, token in enumerate(ids):
        h = weights["model.embed_tokens.weight"][token]
        for layer in range(config.num_hidden_layers):

            def apply(
                part: str, x: Tensor, at: str = f"model.layers.{layer}", position: int = position
            ) -> Tensor:
                name = f"{at}.{part}_proj"
                return linear(name, weights[f"{name}.weight"], x, position) + weights.get(f"{name}.bias", 0)

            x = norm(h, f"model.layers.{layer}.input_layernorm.weight")
            q, k, v = (apply(f"self_attn.{part}", x).view(-1, width) for part in "qkv")
            keys, values = past[layer]
            keys.append(rotate(k, position))
            values.append(v)
            q = rotate(q, position)
            seen_k, seen_v = torch.stack(keys[-window:]), torch.stack(values[-window:])
            attended = []
            for head in range(heads):
                group = head // (heads // groups)
                share = (seen_k[:, group] @ q[head] / math.sqrt(width)).softmax(0)
                attended.append(share @ seen_v[:, group])
            h = h + apply("self_attn.o", torch.cat(attended))
            x = norm(h, f"model.layers.{layer}.post_attention_layernorm.weight")
            gate = apply("mlp.gate", x)
            h = h + apply("mlp.down", gate * gate.sigmoid() * apply("mlp.up", x))
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        out.append(head @ norm(h, "model.norm.weight"))
    return torch.stack(out)
