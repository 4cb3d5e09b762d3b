"""Activation statistics of the decoder linears' inputs, streamed over calibration tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rsparse.linears import SparseLinear
from rsparse.models import SITES, DecoderLinear
from rsparse.thresholds import ScoreStatistics


def check_ids(ids: Tensor, model: nn.Module, what: str) -> Tensor:
    """Return `ids` if it is a LongTensor (samples, length) of token ids of `model`; ValueError otherwise."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2:
        found = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{what} is a {found}; expected token ids, a LongTensor (samples, length)")
    if ids.numel() == 0:
        raise ValueError(f"{what} has shape {tuple(ids.shape)}; expected at least one token")
    if ids.shape[1] > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise ValueError(f"{what} has rows of {ids.shape[1]} tokens; expected at most {limit}, the model's positions")
    low, high, vocabulary = int(ids.min()), int(ids.max()), model.config.vocab_size
    if low < 0 or high >= vocabulary:
        raise ValueError(f"{what} holds token id {low if low < 0 else high}; expected 0..{vocabulary - 1}")
    return ids


@contextmanager
def hooks(linears: Sequence[DecoderLinear], see: Callable[[DecoderLinear, Tensor], None]) -> Iterator[None]:
    """Call ``see(linear, input)`` before every forward pass of the modules that hang at `linears`."""

    def hook(linear: DecoderLinear) -> Callable[[nn.Module, tuple], None]:
        return lambda module, args: see(linear, args[0])

    handles = [getattr(x.parent, x.attribute).register_forward_pre_hook(hook(x)) for x in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_decoder(model: nn.Module, ids: Tensor, label: str | None = None) -> None:
    """Forward passes of the decoder stack (no lm_head, no cache), one sample at a time."""
    device = model.get_input_embeddings().weight.device
    for sample in tqdm(ids.split(1), desc=label, leave=False, disable=label is None):
        model.model(input_ids=sample.to(device), use_cache=False)


def statistics_key(linear: DecoderLinear, norms: Tensor | None) -> tuple:
    """Linears that read one activation under one score share their statistics."""
    return (linear.layer, SITES[linear.kind]) if norms is None else (linear.layer, linear.kind)


def collect(
    model: nn.Module, ids: Tensor, linears: Sequence[DecoderLinear], norms: dict[str, Tensor | None]
) -> dict[tuple, ScoreStatistics]:
    """Statistics by `statistics_key` for the inputs of `linears`, in one pass over `ids` (samples, length).

    norms: by linear name, the weights of its score, None for magnitude. Memory: one histogram (1 MiB) for each
    key and one sample's forward pass, whatever the number of tokens.
    """
    firsts = {statistics_key(x, norms[x.name]): x for x in reversed(linears)}
    found = {
        key: ScoreStatistics(x.shape[1], norms[x.name], x.module.weight.device) for key, x in firsts.items()
    }
    with hooks(list(firsts.values()), lambda x, value: found[statistics_key(x, norms[x.name])].add(value)):
        run_decoder(model, ids, "calibrating")
    return found


class Calibration:
    """Calibration tokens of one model, and the statistics of its dense activations gathered so far.

    `sparsify` takes it in place of token ids; a grid of settings then runs the dense model once per score.
    ids: LongTensor (samples, length). ValueError for ids that are not token ids of `model`.
    """

    def __init__(self, model: nn.Module, ids: Tensor):
        self.model, self.ids = model, check_ids(ids, model, "calibration")
        self._found: dict[tuple, ScoreStatistics] = {}

    def statistics(self, linear: DecoderLinear, norms: Tensor | None) -> ScoreStatistics:
        """Statistics of a linear's input; KeyError where `gather` was not asked for them."""
        return self._found[statistics_key(linear, norms)]

    def gather(self, linears: Sequence[DecoderLinear], norms: dict[str, Tensor | None]) -> None:
        """Collect what is missing for `linears` in one pass; ValueError unless the model is dense."""
        if hasattr(self.model, "_rsparse"):
            raise ValueError("the model is sparse; expected a dense one, see rsparse.restore")
        missing = [x for x in linears if statistics_key(x, norms[x.name]) not in self._found]
        if missing:
            self._found |= collect(self.model, self.ids, missing, norms)


def set_at_once(
    calibration: Calibration,
    linears: Sequence[DecoderLinear],
    norms: dict[str, Tensor | None],
    modules: dict[str, SparseLinear],
) -> None:
    """Threshold "static-dense": quantiles of the dense model's scores, one pass that all settings of a score share.

    What published codes do, and where "static" begins.
    """
    if linears:
        calibration.gather(linears, norms)
    for x in linears:
        statistics = calibration.statistics(x, norms[x.name])
        modules[x.name].threshold = statistics.quantile(1 - modules[x.name].split.kept / x.shape[1])


ROUNDS = 3
"""Passes of `settle`. After two, a model at 70% sparsity was still a point off its plan; after three it was not."""


def settle(
    model: nn.Module, calibration: Calibration, linears: Sequence[DecoderLinear], norms: dict[str, Tensor | None]
) -> None:
    """Threshold "static": read the quantiles again on the sparse model, `ROUNDS` times.

    Activations of a sparse model are smaller than the dense model's, so thresholds read there skip too much.
    Streams like `collect`: a round costs one pass over the calibration tokens, and memory does not grow with them.
    """
    for _ in range(ROUNDS if linears else 0):
        found = collect(model, calibration.ids, linears, norms)
        for x in linears:
            module = getattr(x.parent, x.attribute)
            share = 1 - module.split.kept / x.shape[1]
            module.threshold = found[statistics_key(x, norms[x.name])].quantile(share)


@torch.no_grad()
def set_in_order(model: nn.Module, calibration: Calibration, linears: Sequence[SparseLinear]) -> None:
    """Threshold "static-sequential": linear by linear, each on the inputs that the sparse linears before it leave.

    One forward pass of all calibration tokens at once: every linear sets its threshold from the batch that reaches
    it, then goes on sparse. Holds one layer's activations of all tokens, so it is for small models; the model's
    token protocol must be "all".
    """

    def set_threshold(module: SparseLinear, args: tuple[Tensor]) -> None:
        statistics = ScoreStatistics(module.in_features, module.norms, args[0].device)
        for sample in args[0]:
            statistics.add(sample)
        module.threshold = statistics.quantile(1 - module.split.kept / module.in_features)

    if not linears:
        return
    handles = [linear.register_forward_pre_hook(set_threshold) for linear in linears]
    try:
        model.model(input_ids=calibration.ids.to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
