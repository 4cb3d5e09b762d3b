"""Perplexity and summaries under a token protocol; the likelihood tasks are in rsparse.harness."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from rsparse.apply import protocol_of
from rsparse.calibrate import check_ids
from rsparse.texts import Summary

LOGIT_ROWS = 512  # positions whose logits are held at once: 256 MiB in float32 at a vocabulary of 128,256
BATCH_TOKENS = 16384  # prompt tokens of one batch of articles: 8 GiB of key-value cache for Llama-2-7B in 16 bits


@torch.no_grad()
def token_losses(model: nn.Module, ids: Tensor, context: int = 0, label: str | None = None) -> Tensor:
    """Negative log-likelihood in nats of every scored token, float64 on the CPU.

    ids: LongTensor (samples, length). Each row's prompt is its first max(context, 1) tokens; the others are
    scored, so the result is (samples, length - max(context, 1)). The model is fed all tokens but the last.

    Raises ValueError for ids that are not token ids of the model, or a context that leaves nothing to score.
    """
    ids = check_ids(ids, model, "ids").long()
    prompt = max(context, 1)
    if context < 0 or prompt >= ids.shape[1]:
        raise ValueError(
            f"context is {context} for rows of {ids.shape[1]} tokens; expected at least 0, and a token after "
            "the prompt of max(context, 1)"
        )
    protocol, fed = protocol_of(model), ids.shape[1] - 1
    device = model.get_input_embeddings().weight.device
    losses = []
    for row in tqdm(ids.split(1), desc=label, leave=False, disable=label is None):
        with protocol.rows([fed], [prompt]) if protocol else nullcontext():
            hidden = model.model(input_ids=row[:, :-1].to(device), use_cache=False)[0]
        losses.append(-token_log_probabilities(model.lm_head, hidden[0, prompt - 1 :], row[0, prompt:])[0])
    return torch.stack(losses)


def token_log_probabilities(lm_head: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability in nats, float64, of every target token, and whether it is the likeliest; on the CPU.

    hidden: (positions, width) final states; targets: (positions,). The softmax is taken in float32 at least,
    a few positions' logits at a time.
    """
    logp, greedy = [], []
    for states, wanted in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logits = lm_head(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wanted = wanted.to(logits.device)
        logp.append(-F.cross_entropy(logits, wanted, reduction="none").double())
        greedy.append(logits.argmax(-1) == wanted)
    return torch.cat(logp).cpu(), torch.cat(greedy).cpu()


def perplexity(model: nn.Module, ids: Tensor, context: int = 0) -> float:
    """exp of the mean loss over all scored tokens of `ids`, LongTensor (samples, length).

    The first `context` positions of each row are not scored (TEAL: 2048 of 2560); see `token_losses`.
    """
    return math.exp(float(token_losses(model, ids, context).mean()))


def influenced_share(model: nn.Module, length: int, context: int = 0) -> float:
    """Share of the scored positions of a row of `length` tokens that a sparse position influenced."""
    protocol = protocol_of(model)
    if protocol is None:
        return 0.0
    prompt = max(context, 1)
    first = protocol.first_sparse(length - 1, prompt)
    return (length - 1 - max(first, prompt - 1)) / (length - prompt)


@torch.no_grad()
def summarise(
    model: nn.Module,
    tokenizer,
    items: Sequence[Summary],
    max_new_tokens: int = 64,
    batch_size: int = 8,
    bos: bool = True,
) -> tuple[list[str], float]:
    """Greedy one-line summaries of the articles, in order, under the model's token protocol.

    The prompt ends in "Summary:"; a summary ends at a line break or at end of sequence. An article is cut where
    prompt and summary would outgrow the model's positions. bos: whether prompts begin with the tokenizer's special
    tokens. Also returns the share of the generated tokens whose logits a sparse position influenced.
    """
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    device, protocol = model.get_input_embeddings().weight.device, protocol_of(model)
    room = model.config.max_position_embeddings - max_new_tokens
    prompts = [_prompt_ids(tokenizer, item, room, bos) for item in items]
    found, generated, influenced = [""] * len(items), 0, 0
    with tqdm(total=len(items), desc="summaries", leave=False) as bar:
        for batch in _batches([len(ids) for ids in prompts], batch_size, BATCH_TOKENS):
            inputs = {"input_ids": [prompts[i] for i in batch]}
            inputs = tokenizer.pad(inputs, padding_side="left", return_tensors="pt").to(device)
            output = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                stop_strings=["\n"], tokenizer=tokenizer,
            )  # fmt: skip
            for i, ids in zip(batch, output[:, inputs["input_ids"].shape[1] :], strict=True):
                found[i] = tokenizer.decode(ids, skip_special_tokens=True).strip().split("\n")[0]
                count = max(1, int((ids != tokenizer.pad_token_id).sum()))
                prompt_is_dense = protocol and protocol.first_sparse(len(prompts[i])) == len(prompts[i])
                generated, influenced = generated + count, influenced + count - bool(prompt_is_dense)
            bar.update(len(batch))
    return found, influenced / generated if protocol else 0.0


def _prompt_ids(tokenizer, item: Summary, room: int, bos: bool) -> list[int]:
    """Token ids of the item's prompt, its article cut on the right until they are at most `room`."""
    ids = tokenizer.encode(item.prompt, add_special_tokens=bos)
    article = tokenizer.encode(item.article, add_special_tokens=False)
    while len(ids) > room and article:
        article = article[: len(article) - (len(ids) - room)]
        ids = tokenizer.encode(replace(item, article=tokenizer.decode(article)).prompt, add_special_tokens=bos)
    if len(ids) > room:
        raise ValueError(f"prompts have {room} positions; expected at least {len(ids)}, those around an article")
    return ids


def _batches(lengths: Sequence[int], rows: int, tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length: at most `rows` of them, and of `tokens` with padding unless alone."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == rows or (len(batch) + 1) * lengths[i] > tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def rouge_l(references: Sequence[Summary], generated: Sequence[str]) -> pd.DataFrame:
    """ROUGE-L F-measure of each summary, in percent (rouge-score, stemmed), one row per item."""
    from rouge_score.rouge_scorer import RougeScorer  # brings NLTK and SciPy: two seconds that few notebooks need

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [
        100 * scorer.score(reference.summary, text)["rougeL"].fmeasure
        for reference, text in zip(references, generated, strict=True)
    ]
    return pd.DataFrame({"task": "summaries", "item": range(len(scores)), "rouge_l": scores})
