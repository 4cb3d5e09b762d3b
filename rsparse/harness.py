"""lm-eval's likelihood tasks on a sparsified model: every row knows where its prompt ends.

lm-eval's own Hugging Face model passes no context length to the model call, and the token protocols need it.
`SparseLM` scores the rows itself, announcing each batch's to the protocol; requests, metrics and everything else
are lm-eval's.
"""

from __future__ import annotations

import ast
import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import lm_eval
import pandas as pd
import torch
import yaml
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import env as lm_eval_templates
from torch import nn
from tqdm import tqdm

from rsparse.apply import protocol_of
from rsparse.evaluate import token_log_probabilities
from rsparse.paths import ROOT
from rsparse.protocol import first_sparse

TASKS = ("winogrande", "piqa", "sciq", "obqa", "hellaswag", "boolq", "arc_easy", "arc_challenge")
"""The paper's eight tasks, in its order."""
SUITES = ("official", "tiny")
"""Whose tasks: lm-eval's, or the embedded default's."""
_OFFICIAL = {"obqa": "openbookqa"}
_TINY = ROOT / "data" / "tiny" / "tasks"
_ENCODED: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer -> BOS or not -> (context, continuation) -> ids


class SparseLM(HFLM):
    """lm-eval model around a loaded Hugging Face model, dense or sparsified.

    scored, influenced: logits scored so far, and those that a sparse position at or before them influenced.
    fed, seconds: tokens fed so far, and the time that took.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        batch_size: int = 16,
        bos: bool = True,
        max_length: int | None = None,
    ):
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=bos,
            max_length=max_length,
        )  # fmt: skip
        self.scored = self.influenced = self.fed = 0
        self.seconds = 0.0
        self._pairs = _ENCODED.setdefault(tokenizer, {}).setdefault(bos, {})

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both; a grid of settings scores the same items again and again."""
        key = context, continuation
        if key not in self._pairs:
            self._pairs[key] = super()._encode_pair(context, continuation)
        return self._pairs[key]

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        """(sum of log-probabilities, whether greedy) of every request (texts, context ids, continuation ids).

        Logits are computed for the scored positions alone, so a large vocabulary costs little memory.
        """
        started = time.monotonic()
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        answers: list = [None] * len(requests)
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm, leave=False) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                found = self._score([requests[i][1:] for i in batch])
                for i, answer in zip(batch, found, strict=True):
                    answers[i] = answer
                bar.update(len(batch))
        self.seconds += time.monotonic() - started
        return answers

    def _score(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """One batch of (context ids, continuation ids), padded on the right."""
        if (longest := max(len(continuation) for _, continuation in rows)) > self.max_length:
            limit = f"expected at most {self.max_length}, the model's positions"
            raise ValueError(f"an answer has {longest} tokens; {limit}")
        shapes = [row_shape(len(context), len(continuation), self.max_length) for context, continuation in rows]
        self._count(shapes)
        ids = torch.zeros(len(rows), max(length for length, _ in shapes), dtype=torch.long)
        for row, (context, continuation), (length, _) in zip(ids, rows, shapes, strict=True):
            row[:length] = torch.tensor((context + continuation)[-length - 1 : -1])
        protocol = protocol_of(self.model)
        with protocol.rows(*zip(*shapes, strict=True)) if protocol else nullcontext():
            hidden = self.model.model(input_ids=ids.to(self.device), use_cache=False)[0]
        scored = torch.zeros_like(ids, dtype=torch.bool)
        for mask, (length, context) in zip(scored, shapes, strict=True):
            mask[context - 1 : length] = True
        targets = torch.tensor([token for _, continuation in rows for token in continuation])
        logp, greedy = token_log_probabilities(self.model.lm_head, hidden[scored.to(hidden.device)], targets)
        counts = [len(continuation) for _, continuation in rows]
        return [(float(p.sum()), bool(g.all())) for p, g in zip(logp.split(counts), greedy.split(counts), strict=True)]

    def _count(self, shapes: Sequence[tuple[int, int]]) -> None:
        protocol = protocol_of(self.model)
        for length, context in shapes:
            self.fed += length
            self.scored += length - context + 1
            if protocol:
                self.influenced += length - max(first_sparse(protocol.tokens, length, context), context - 1)


def row_shape(context: int, continuation: int, max_length: int) -> tuple[int, int]:
    """(inputs fed, prompt length) of a row; the last continuation token is not fed, and the left is cut."""
    length = min(context + continuation - 1, max_length)
    return length, length - continuation + 1


@cache
def load_tasks(suite: str) -> dict:
    """The eight tasks of a suite, as in `TASKS`: "official" (needs network once) or "tiny" (the embedded
    ones)."""
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if suite == "official":
        names = {task: _OFFICIAL.get(task, task) for task in TASKS}
        found = TaskManager().load(list(names.values()))["tasks"]
    elif suite == "tiny":
        names = {task: f"tiny_{task}" for task in TASKS}
        configs = [_tiny_config(_TINY / f"{name}.yaml") for name in names.values()]
        found = TaskManager(include_defaults=False).load(configs)["tasks"]
    else:
        raise ValueError(f"suite is {suite!r}; expected 'official' or 'tiny'")
    return {task: found[name] for task, name in names.items()}  # by name: get_task_dict, for one, reorders


def _tiny_config(path: Path) -> dict:
    """A task of the embedded default, its items held in memory: no cache folder is written.

    lm-eval compiles a template at every use of every item, most of the time of a small model's evaluation.
    Here each is rendered once, with lm-eval's own environment, and the task is pointed at the outcome.
    """
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    files = config.pop("dataset_kwargs")["data_files"]
    config.pop("dataset_path")
    templates = {
        name: lm_eval_templates.from_string(config[name])
        for name in ("doc_to_text", "doc_to_target", "doc_to_choice")
        if isinstance(config[name], str) and "{{" in config[name]
    }

    def rows(file: str) -> list[dict]:
        docs = map(json.loads, (path.parent / file).read_text(encoding="utf-8").splitlines())
        return [doc | {f"rendered_{k}": _literal(t.render(**doc)) for k, t in templates.items()} for doc in docs]

    data = DatasetDict({split: Dataset.from_list(rows(file)) for split, file in files.items()})
    rendered = {name: f"rendered_{name}" for name in templates}
    return config | rendered | {"custom_dataset": lambda **_: data}


def _literal(text: str) -> str | int | list:
    """A rendered template as lm-eval reads it: digits and lists are literals."""
    return ast.literal_eval(text) if text.isdigit() or (text[:1] == "[" and text[-1:] == "]") else text


class Scored(NamedTuple):
    """items: one row per item (task, item, acc, acc_norm where lm-eval defines it, margin). influenced: share of
    the scored logits that a sparse position influenced. fed, seconds: tokens fed, and the time that took.

    margin: log-probability of the gold option among the options, in nats, which moves where accuracy is blind.
    """

    items: pd.DataFrame
    influenced: float
    fed: int
    seconds: float


def score_tasks(
    model: nn.Module, tokenizer, suite: str, items: int | None = None, batch_size: int = 16, bos: bool = True
) -> Scored:
    """Score the eight tasks zero-shot under the model's token protocol; `items`: the first so many of each task,
    None for all."""
    tasks = load_tasks(suite)
    lm = SparseLM(model, tokenizer, batch_size, bos)
    found = lm_eval.evaluate(lm, tasks, limit=items, log_samples=True, bootstrap_iters=0)["samples"]
    frames = [_item_rows(name, task, found[name]) for name, task in tasks.items()]
    influenced = lm.influenced / max(lm.scored, 1)
    return Scored(pd.concat(frames, ignore_index=True), influenced, lm.fed, lm.seconds)


def _item_rows(name: str, task: ConfigurableTask, samples: list[dict]) -> pd.DataFrame:
    rows = []
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        likelihoods = torch.tensor([float(r[0]) for r in sample["filtered_resps"]], dtype=torch.float64)
        margin = float(likelihoods.log_softmax(0)[_gold(task, sample["doc"])])
        norm = sample.get("acc_norm", math.nan)
        rows.append(
            {"task": name, "item": sample["doc_id"], "acc": sample["acc"], "acc_norm": norm, "margin": margin}
        )
    return pd.DataFrame(rows)


def _gold(task: ConfigurableTask, doc: dict) -> int:
    """Index of the gold option; where the options are contexts (winogrande), doc_to_text gives it."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return gold if isinstance(gold, int) else task.doc_to_choice(doc).index(gold)
