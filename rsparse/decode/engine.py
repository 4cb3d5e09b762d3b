"""The engine: a model, its caches, and the loop that a token goes round.

The prompt runs dense and every later token sparse, whatever token rule the model was sparsified with: "decode", see
rsparse.protocol. Prompts of a batch have one length: padding would be attended to, or would need a mask in every
kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from rsparse.apply import masks_of, protocol_of
from rsparse.calibrate import check_ids
from rsparse.decode import projections
from rsparse.decode.architecture import Architecture, check_weights, pad_id, stop_ids
from rsparse.decode.decoder import Decoder
from rsparse.decode.gathering import MOST_ROWS, Gathering, has_words, unsupported
from rsparse.decode.projections import Builder
from rsparse.decode.sampling import GREEDY, Sampling
from rsparse.decode.steps import CHUNK, Steps
from rsparse.prompted import PromptedLinear
from rsparse.protocol import real_positions


class Engine:
    """Decodes with the weights of `model`, a Hugging Face causal LM of the Llama or Mistral family, dense or sparse.

    cache_length: positions of the cache; None lets it grow with what is asked. builder: what computes the products of
    a block, see rsparse.decode.projections; None takes fused dense products for a dense model, the kernels for a sparse
    one and, on a GPU, for INT4 weights, and the evaluation's modules for what the kernels do not compute: `linears`
    says which, and why. graphs: replay steps as CUDA graphs; None does where there is a GPU. compiled: fuse what lies
    between dense products with torch.compile. chunk: positions of a chunk of the cache, see Cache; None takes CHUNK
    with graphs, and one for all without.

    A dense model's q, k, v and gate, up are laid side by side in memory, see projections.Fused; a sparse one's linears
    channel by channel, see rsparse.decode.gathering: the model goes on as before, but `save_pretrained` no longer takes
    the sparse one. An engine belongs to the weights and the method that it was made with, see `fits`. One text at a
    time: a second one ends the first. Raises ValueError for a model that it cannot compute, before anything is
    allocated.
    """

    def __init__(
        self,
        model: nn.Module,
        cache_length: int | None = None,
        builder: Builder | None = None,
        graphs: bool | None = None,
        compiled: bool = False,
        chunk: int | None = None,
    ):
        check_weights(model)
        self.device = model.model.embed_tokens.weight.device
        if graphs and self.device.type != "cuda":
            raise ValueError(f"graphs is {graphs!r} on {self.device}; expected a GPU, or None")
        self.config, self.generation_config = model.config, getattr(model, "generation_config", None)
        self.architecture = Architecture.of(model.config)
        self.cache_length = self._check_cache(cache_length)
        self.protocol, self._method = protocol_of(model), getattr(model, "_rsparse", None)
        builder, self.linears = _builder(model, self.protocol is not None) if builder is None else (builder, "given")
        self._gathering = builder if isinstance(builder, Gathering) else None
        self.gathers = self._gathering is not None
        # kernels take norms and sums along, and nothing is left to fuse
        self.decoder = Decoder(model, builder, compiled and not self.gathers)
        self._prompted = any(isinstance(x, PromptedLinear) for x in model.modules())
        graphs = self.device.type == "cuda" if graphs is None else graphs
        self.graphs = graphs and (self.gathers or not self._prompted)
        self.chunk = chunk or (CHUNK if self.graphs else None)
        self._masked = [module for _, module in masks_of(model).values()]
        self._steps: Steps | None = None
        self._text: object = None
        self._places, self._int4 = _places(model), model.__dict__.get("_rsparse_int4")

    def fits(self, model: nn.Module) -> bool:
        """Whether this engine still does what `model` says: its method and its INT4 codes in place, weights and
        settings where they were."""
        settings = model.config is self.config and getattr(model, "generation_config", None) is self.generation_config
        hung = getattr(model, "_rsparse", None) is self._method and model.__dict__.get("_rsparse_int4") is self._int4
        return settings and hung and _places(model) == self._places

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        generator: torch.Generator | None = None,
        stop: Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        on_token: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """LongTensor (batch, length + new) on the device of `ids`, prompt included. on_token: called with every token
        that `stream` would yield; the other arguments and the errors are its."""
        new = []
        for tokens in self.stream(ids, max_new_tokens, sampling, generator, stop, attention_mask):
            new.append(tokens)
            if on_token is not None:
                on_token(tokens)
        return torch.cat([ids.long(), torch.stack(new, dim=1).to(ids.device)], dim=1)

    def stream(
        self,
        ids: Tensor,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        generator: torch.Generator | None = None,
        stop: Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """The new tokens one by one, LongTensor (batch,) on the CPU, until there are `max_new_tokens` or every row
        has met one of `stop` (None: the model's end-of-sequence tokens; (): go on). Finished rows are padded.

        ids: LongTensor (batch, length), batch 1..16. generator: of this engine's device, for draws. attention_mask: of
        a tokenizer, all ones; without one, padding shows where some rows begin or end with the padding token.

        ValueError, before anything is allocated, for prompts that are empty, padded or no token ids, a batch that is
        too large, a text longer than the cache or than the model's positions, and a generator of another device.
        """
        self._check(ids, max_new_tokens, generator, attention_mask, stop)
        configs = self.config, self.generation_config
        stop, pad = stop_ids(*configs, stop), pad_id(*configs)
        found = self._tokens(ids, max_new_tokens, sampling, generator)
        found = _ahead(found) if self.device.type == "cuda" else found
        return _until(found, stop, pad)

    @torch.no_grad()
    def logits(self, ids: Tensor, context: int) -> Tensor:
        """Logits (batch, length - context + 1, vocabulary) of the positions context - 1 .. length - 1 where the first
        `context` of `ids` (batch, length) are the prompt and the others are fed one by one. Errors as `stream`."""
        if not 1 <= context <= ids.shape[1]:
            raise ValueError(f"context is {context}; expected 1..{ids.shape[1]}, the length of the text")
        self._check(ids[:, :context], max(1, ids.shape[1] - context))
        ids = ids.to(self.device)
        found = [self._prompt(ids[:, :context], ids.shape[1]).clone()]
        found += [self._step(ids[:, at], at).clone() for at in range(context, ids.shape[1])]
        return torch.stack(found, dim=1)

    @torch.no_grad()
    def prepare(self, batch: int, prompt: int, max_new_tokens: int) -> Steps:
        """Allocate the cache and capture all that a generation of these sizes replays, so that none of it is timed."""
        self._check(torch.zeros(batch, prompt, dtype=torch.long), max_new_tokens)
        steps = self._ready(batch, prompt + max_new_tokens)
        if self.protocol is not None:
            self._announce(torch.zeros(batch, prompt, dtype=torch.long))
            steps.cache.filled = prompt
            self._announce(torch.zeros(batch, 1, dtype=torch.long))
        if max_new_tokens > 1:
            steps.prepare(prompt, prompt + max_new_tokens - 1)
        return steps

    def _tokens(
        self, ids: Tensor, count: int, sampling: Sampling, generator: torch.Generator | None
    ) -> Iterator[Tensor]:
        """Tokens (batch,) on the device. Whoever waits for one should ask for the next one first."""
        text = self._text = object()
        with torch.no_grad():
            logits = self._prompt(ids.long().to(self.device), ids.shape[1] + count)
            tokens = sampling(logits, generator)
        for position in range(ids.shape[1], ids.shape[1] + count):
            yield tokens
            if self._text is not text:
                raise RuntimeError("another text was begun with this engine; expected one at a time")
            if position + 1 < ids.shape[1] + count:
                with torch.no_grad():  # not around a yield, which would leave it to the caller
                    tokens = sampling(self._step(tokens, position), generator)

    def _prompt(self, ids: Tensor, length: int) -> Tensor:
        steps = self._ready(len(ids), length)
        steps.cache.filled = 0
        self._announce(ids)
        return self.decoder.prompt(ids, steps.cache)

    def _step(self, tokens: Tensor, position: int) -> Tensor:
        self._announce(tokens[:, None])
        return self._steps(tokens, position)

    def _announce(self, ids: Tensor) -> None:
        """Tell the sparse modules which of the positions to come are sparse: those behind the prompt."""
        if self.protocol is None:
            return
        rule, self.protocol.tokens = self.protocol.tokens, "decode"
        try:
            self.protocol.begin(input_ids=ids, past_key_values=self._steps.cache)
        finally:
            self.protocol.tokens = rule

    def _ready(self, batch: int, length: int) -> Steps:
        """Steps over a cache for so many rows and positions: those of the last text where they will do."""
        cache = self._steps and self._steps.cache
        if cache is None or cache.batch != batch or cache.length < length:
            if self._steps:
                self._steps.forget()  # whoever holds them still
            self._steps = cache = None  # free before a larger one is allocated
            if self._gathering:
                self._gathering.prepare(batch)
            room = self.cache_length or -(-length // CHUNK) * CHUNK
            self._steps = Steps(self.decoder, self.decoder.new_cache(batch, room, self.chunk or room), self.graphs)
        # what counts or replays masks is Python, which a graph leaves out, and a kernel too
        taped = any(x.tally or x.tape for x in self._masked)
        if taped and self.gathers:
            raise ValueError("masks are counted or replayed, which kernels do not do; expected an engine with "
                             "builder=rsparse.decode.reference")  # fmt: skip
        # channels of several rows are chosen anew with every prompt; a graph goes on with those of its capture
        self._steps.graphs = self.graphs and not taped and not (self._prompted and batch > 1)
        return self._steps

    def _check_cache(self, length: int | None) -> int | None:
        most = self.architecture.positions
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= most):
            raise ValueError(f"cache_length is {length!r}; expected 1..{most}, the model's positions, or None")
        return length

    def _check(
        self,
        ids: Tensor,
        new: int,
        generator: torch.Generator | None = None,
        attention_mask: Tensor | None = None,
        stop: Sequence[int] | None = None,
    ) -> None:
        check_request(self, ids, new, self.cache_length, attention_mask, stop)
        if generator is not None and generator.device.type != self.device.type:
            raise ValueError(f"the generator is on {generator.device}; expected one on {self.device}")


def check_request(
    model,
    ids: Tensor,
    new: int,
    cache_length: int | None = None,
    attention_mask: Tensor | None = None,
    stop: Sequence[int] | None = None,
) -> None:
    """ValueError unless a cache of `cache_length` positions (None: any) takes the prompts `ids` and `new` tokens of
    `model`, of which the configs alone are read; and for padding, a mask or stop tokens that `Engine.stream`
    refuses."""
    check_ids(ids, model, "the prompt")
    batch, length = ids.shape
    if batch > MOST_ROWS:
        raise ValueError(f"the batch has {batch} rows; expected at most {MOST_ROWS}")
    if isinstance(new, bool) or not isinstance(new, int) or new < 1:
        raise ValueError(f"max_new_tokens is {new!r}; expected a whole number of at least 1")
    limits = (model.config.max_position_embeddings, "the model's positions"), (cache_length, "the cache's")
    for most, what in limits:
        if most is not None and length + new > most:
            raise ValueError(f"a prompt of {length} tokens and {new} new ones need {length + new} positions; "
                             f"expected at most {most}, {what}")  # fmt: skip
    configs = model.config, getattr(model, "generation_config", None)
    ends = *stop_ids(*configs, stop), *stop_ids(*configs)
    if attention_mask is None:
        _check_edges(ids, pad_id(*configs), (*ends, model.config.bos_token_id))
    elif not real_positions(attention_mask, batch, length).all():
        raise ValueError("attention_mask holds zeros; expected prompts of one length, without padding")


def _check_edges(ids: Tensor, pad: int | None, others: Sequence[int | None]) -> None:
    """ValueError where `pad` stands at an end of some rows and not of all. It tells nothing where it is among `others`,
    which begin or end texts too."""
    if pad is None or pad in others or len(ids) == 1:
        return
    for edge, where in ((ids[:, 0], "begins"), (ids[:, -1], "ends")):
        rows = (edge == pad).nonzero().flatten().tolist()
        if 0 < len(rows) < len(ids):
            raise ValueError(f"row {rows[0]} of the prompts {where} with {pad}, the padding token; expected prompts of "
                             "one length, without padding; where it belongs to the text, pass an attention_mask of "
                             "ones")  # fmt: skip


def _ahead(tokens: Iterator[Tensor]) -> Iterator[Tensor]:
    """Each on the CPU, once the next one is queued on the GPU: waiting for one leaves no gap behind it."""
    waiting: tuple[Tensor, torch.cuda.Event] | None = None
    for x in tokens:
        arriving = x.to("cpu", non_blocking=True), torch.cuda.Event()
        arriving[1].record(torch.cuda.current_stream(x.device))
        if waiting:
            waiting[1].synchronize()
            yield waiting[0]
        waiting = arriving
    waiting[1].synchronize()
    yield waiting[0]


def _until(tokens: Iterator[Tensor], stop: Sequence[int], pad: int | None) -> Iterator[Tensor]:
    """Up to where every row has met one of `stop`; a row that has is filled with `pad`, or the first of `stop`."""
    if not stop:
        yield from tokens
        return
    ends, done = torch.tensor(stop), None
    for x in tokens:
        x = x if done is None else x.masked_fill(done, stop[0] if pad is None else pad)
        ended = torch.isin(x, ends)
        done = ended if done is None else done | ended
        yield x
        if done.all():
            return


def _builder(model: nn.Module, sparse: bool) -> tuple[Builder, str]:
    """What computes the products of `model`, and what to say of it."""
    if not sparse and not has_words(model):
        return projections.dense, "fused"
    if reason := unsupported(model):
        return projections.reference, f"reference: {reason}"
    where = "triton" if model.model.embed_tokens.weight.is_cuda else "cpu"
    return Gathering(model), f"kernels: {where}{', INT4 for one row' * has_words(model)}"


def _places(model: nn.Module) -> tuple:
    """Where the weights lie in memory, and as what."""
    return tuple((x.data_ptr(), x.dtype, x.device) for x in model.parameters())
