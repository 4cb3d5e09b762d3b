"""Activation statistics of what masks choose from, streamed over calibration tokens, and the thresholds they give."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rsparse.linears import Masked
from rsparse.models import DecoderLinear, Place, fingerprint
from rsparse.thresholds import ScoreStatistics


@dataclass(frozen=True)
class Score:
    """A mask's score without the mask, where only statistics of an input are wanted. norms: its weights (n,)."""

    norms: Tensor | None = None

    @staticmethod
    def scored(x: Tensor) -> Tensor:
        return x


MAGNITUDE = Score()
Masks = Sequence[tuple[Place, Masked | Score]]
"""Modules and where they hang, or are going to."""


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
def hooks(places: Sequence[Place], see: Callable[[Place, Tensor], None]) -> Iterator[None]:
    """Call ``see(place, input)`` before every forward pass of the modules that hang at `places`."""

    def hook(place: Place) -> Callable[[nn.Module, tuple], None]:
        return lambda module, args: see(place, args[0])

    handles = [x.hung.register_forward_pre_hook(hook(x)) for x in places]
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


def statistics_key(place: Place, module: Masked | Score) -> tuple:
    """Masks that choose by one score of one activation share their statistics."""
    basis = getattr(getattr(module, "rotation", None), "name", "")
    return place.layer, place.site if module.norms is None else place.kind, basis


def collect(model: nn.Module, ids: Tensor, masks: Masks) -> dict[tuple, ScoreStatistics]:
    """Statistics by `statistics_key` of what `masks` score, in one pass over `ids` (samples, length).

    Memory: one histogram (1 MiB) for each key and one sample's forward pass, whatever the number of tokens.
    """
    firsts = {statistics_key(place, module): (place, module) for place, module in reversed(masks)}
    found = {key: ScoreStatistics(x.channels, module.norms, x.device) for key, (x, module) in firsts.items()}
    keys = {x.name: key for key, (x, _) in firsts.items()}

    def add(place: Place, x: Tensor) -> None:
        key = keys[place.name]
        found[key].add(firsts[key][1].scored(x))

    with hooks([place for place, _ in firsts.values()], add):
        run_decoder(model, ids, "calibrating")
    return found


class Calibration:
    """Calibration tokens of one model, and the statistics of its dense activations gathered so far.

    `sparsify` takes it in place of token ids; a grid of settings then runs the dense model once per score.
    ids: LongTensor (samples, length). ValueError for ids that are not token ids of `model`.

    searched: (tokens, seconds) of every search that a method made with them, see rsparse.greedy.
    """

    def __init__(self, model: nn.Module, ids: Tensor):
        self.model, self.ids = model, check_ids(ids, model, "calibration")
        self.searched: list[tuple[int, float]] = []
        self._found: dict[tuple, ScoreStatistics] = {}
        self._outputs: dict[str, Tensor] = {}

    @cached_property
    def key(self) -> str:
        """Identity of model and tokens, for what is derived from both and kept on disk."""
        ids = self.ids.cpu().contiguous()
        digest = hashlib.sha256(f"{fingerprint(self.model)} {tuple(ids.shape)} {ids.dtype}".encode())
        digest.update(ids.numpy().tobytes())
        return digest.hexdigest()[:24]

    def statistics(self, place: Place, module: Masked | Score) -> ScoreStatistics:
        """Statistics of what `module` scores there; KeyError where `gather` was not asked for them."""
        return self._found[statistics_key(place, module)]

    def gather(self, masks: Masks) -> None:
        """Collect what is missing for `masks` in one pass; ValueError unless the model is dense."""
        check_dense(self.model)
        missing = [(place, x) for place, x in masks if statistics_key(place, x) not in self._found]
        if missing:
            self._found |= collect(self.model, self.ids, missing)

    def mean_outputs(self, linears: Sequence[DecoderLinear]) -> dict[str, Tensor]:
        """Linear -> E|y_i| of its outputs on the dense model (m,), float32 at least; one pass for all that are new."""
        check_dense(self.model)
        missing = {x.name: 0.0 for x in linears if x.name not in self._outputs}
        handles = [x.hung.register_forward_hook(_adder(missing, x.name)) for x in linears if x.name in missing]
        try:
            if missing:
                run_decoder(self.model, self.ids, "outputs")
        finally:
            for handle in handles:
                handle.remove()
        self._outputs |= {name: total / self.ids.numel() for name, total in missing.items()}
        return {x.name: self._outputs[x.name] for x in linears}


def _adder(sums: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
    def hook(module: nn.Module, args: tuple, y: Tensor) -> None:
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        sums[name] = sums[name] + wide.abs().flatten(0, -2).sum(0)

    return hook


def check_dense(model: nn.Module) -> None:
    """ValueError for a model that `sparsify` was called on."""
    if hasattr(model, "_rsparse"):
        raise ValueError("the model is sparse; expected a dense one, see rsparse.restore")


def _quantile(statistics: ScoreStatistics, place: Place, module: Masked) -> float:
    return statistics.quantile(1 - module.split.kept / place.channels)


def set_at_once(calibration: Calibration, masks: Masks) -> None:
    """Threshold "static-dense": quantiles of the dense model's scores, one pass that all settings of a score share.

    What published codes do, and where "static" begins.
    """
    if masks:
        calibration.gather(masks)
    for place, module in masks:
        module.threshold = _quantile(calibration.statistics(place, module), place, module)


ROUNDS = 3
"""Passes of `settle`. After two, a model at 70% sparsity was still a point off its plan; after three it was not."""


def settle(model: nn.Module, calibration: Calibration, masks: Masks) -> None:
    """Threshold "static": read the quantiles again on the sparse model, `ROUNDS` times.

    Activations of a sparse model are smaller than the dense model's, so thresholds read there skip too much.
    Streams like `collect`: a round costs one pass over the calibration tokens, and memory does not grow with them.
    """
    for _ in range(ROUNDS if masks else 0):
        found = collect(model, calibration.ids, masks)
        for place, module in masks:
            module.threshold = _quantile(found[statistics_key(place, module)], place, module)


@torch.no_grad()
def set_in_order(model: nn.Module, calibration: Calibration, masks: Masks) -> None:
    """Threshold "static-sequential": mask by mask, each on the inputs that the sparse ones before it leave.

    One forward pass of all calibration tokens at once: every mask sets its threshold from the batch that reaches
    it, then goes on sparse. Holds one layer's activations of all tokens, so it is for small models; the model's
    token protocol must be "all".
    """

    def set_threshold(place: Place, x: Tensor) -> None:
        module = modules[place.name]
        statistics = ScoreStatistics(place.channels, module.norms, x.device)
        for sample in module.scored(x):
            statistics.add(sample)
        module.threshold = _quantile(statistics, place, module)

    modules = {place.name: module for place, module in masks}
    if masks:
        with hooks([place for place, _ in masks], set_threshold):
            model.model(input_ids=calibration.ids.to(model.get_input_embeddings().weight.device), use_cache=False)
