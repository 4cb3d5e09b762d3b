"""A Llama in float64, one position at a time: what the library's results are compared with.

It shares no code with the library: plain loops, a sort for the mask, an SVD for factors and rotations. Hugging Face
takes norms and angles in float32 whatever the model's dtype, and so does this, to be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

Linear = Callable[[str, Tensor, Tensor, int], Tensor]  # name, weight (m, n), input (n,), position -> (m,)
Activation = Callable[[int, Tensor, int], Tensor]  # layer, output of gate (neurons,), position -> the same shape


def weights_of(model) -> dict[str, Tensor]:
    """The dense model's parameters by name, as float64; to be taken before `sparsify`."""
    return {name: p.detach().double() for name, p in model.named_parameters()}


@torch.no_grad()
def recorded(model, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of every decoder linear of a dense model, by name, (tokens, channels), kept whole."""
    found: tuple[dict, dict] = {}, {}
    linears = {name: x for name, x in model.named_modules() if name.endswith("_proj")}

    def keep(name: str, *seen: Tensor) -> None:
        for values, x in zip(found, seen, strict=True):
            values.setdefault(name, []).append(x[0].double())

    handles = [x.register_forward_hook(lambda m, a, y, n=name: keep(n, a[0], y)) for name, x in linears.items()]
    for row in ids:
        model(row[None])
    for handle in handles:
        handle.remove()
    return tuple({name: torch.cat(parts) for name, parts in values.items()} for values in found)


def kind_of(name: str) -> str:
    return name.rsplit(".", 1)[1].removesuffix("_proj")


def shapes_of(weights: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Kind -> (out, in) of the first block's linears."""
    names = [x.removesuffix(".weight") for x in weights if x.startswith("model.layers.0.") and "_proj.weight" in x]
    return {kind_of(name): tuple(weights[f"{name}.weight"].shape) for name in names}


def own_sparsity(weights: dict[str, Tensor], sparsity: str, parts: dict[str, str], extra: int = 0) -> Fraction:
    """The p of which every kind has its part so that a block leaves `sparsity` of its weights unread, though it reads
    `extra` numbers more."""
    sizes = {kind: m * n for kind, (m, n) in shapes_of(weights).items()}
    saved = sum(Fraction(part) * sizes[kind] for kind, part in parts.items())
    return (Fraction(sparsity) * sum(sizes.values()) + extra) / saved


def kept_of(channels: int, sparsity: Fraction) -> int:
    return math.floor((1 - sparsity) * channels)


def always(position: int) -> bool:
    return True


def dense(name: str, W: Tensor, x: Tensor, position: int) -> Tensor:
    return W @ x


def silu(layer: int, g: Tensor, position: int) -> Tensor:
    return g * g.sigmoid()


def chosen(score: list[float], kept: int, threshold: float | None) -> list[int]:
    """Indices of the `kept` largest scores, or of those above a threshold."""
    if threshold is None:
        return sorted(range(len(score)), key=lambda j: -score[j])[:kept]
    return [j for j in range(len(score)) if score[j] > threshold]


def only(x: Tensor, keep: list[int]) -> Tensor:
    out = torch.zeros_like(x)
    out[keep] = x[keep]
    return out


def masked(kept: int, rank: int, norms: bool = False, threshold: float | None = None, sparse=always) -> Linear:
    """R-Sparse's linear with the given kept channels and rank; top-k per token, or a threshold."""

    def linear(name: str, W: Tensor, x: Tensor, position: int) -> Tensor:
        if not sparse(position):
            return W @ x
        score = [
            abs(float(v)) * (float(W[:, j].square().sum().sqrt()) if norms else 1.0) for j, v in enumerate(x)
        ]
        large = only(x, chosen(score, kept, threshold))
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return W @ large + U[:, :rank] @ (S[:rank] * (Vh[:rank] @ (x - large)))

    return linear


def rotated(V: Tensor, kept: int, norms: bool = False, threshold: float | None = None, sparse=always) -> Linear:
    """A linear that reads some of the channels of V^T x, by their size, or that times the column norm of W V."""

    def linear(name: str, W: Tensor, x: Tensor, position: int) -> Tensor:
        if not sparse(position):
            return W @ x
        z, turned = V.T @ x, W @ V
        score = [abs(float(v)) * (float(turned[:, j].norm()) if norms else 1.0) for j, v in enumerate(z)]
        keep = chosen(score, kept, threshold)
        return turned[:, keep] @ z[keep]

    return linear


def prompted(kept: dict[str, int], first: int) -> Linear:
    """GRIFFIN, for one row: before `first` dense, then the channels that were largest there. kept: by kind.

    gate and up are left whole: what they put out for a neuron that is off, down does not read.
    """
    prompt: dict[str, list[Tensor]] = {}

    def linear(name: str, W: Tensor, x: Tensor, position: int) -> Tensor:
        if kind_of(name) not in kept:
            return W @ x
        if position < first:
            prompt.setdefault(name, []).append(x / x.norm())
            return W @ x
        score = [sum(float(z[j]) ** 2 for z in prompt[name]) for j in range(len(x))]
        return W @ only(x, chosen(score, kept[kind_of(name)], None))

    return linear


def switched(
    kept: int = 0, thresholds: list[float] | None = None, weights: list[Tensor] | None = None, sparse=always
) -> Activation:
    """CATS' activation, SiLU with zeros in all neurons but some; CHESS' with weights of the score. Both by layer."""

    def activation(layer: int, g: Tensor, position: int) -> Tensor:
        a = silu(layer, g, position)
        if not sparse(position):
            return a
        score = [abs(float(v)) * (float(weights[layer][j]) if weights else 1.0) for j, v in enumerate(a)]
        return only(a, chosen(score, kept, thresholds and thresholds[layer]))

    return activation


def relu(sparse=always) -> Activation:
    return lambda layer, g, position: g.clamp_min(0) if sparse(position) else silu(layer, g, position)


def llama_logits(
    config, weights: dict[str, Tensor], ids: list[int], linear: Linear = dense, activation: Activation = silu
) -> Tensor:
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
            h = h + apply("mlp.down", activation(layer, gate, position) * apply("mlp.up", x))
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        out.append(head @ norm(h, "model.norm.weight"))
    return torch.stack(out)
