"""lm-eval's tasks on a sparsified model: every row knows where its prompt ends.

lm-eval's own Hugging Face model passes no context length to the model call, and the token protocols need it.
`SparseLM` scores the rows itself, announcing each batch's to the protocol; requests, metrics and everything else
are lm-eval's. Text that a task has the model write follows the rule "decode", as everywhere: prompt dense, what is
generated sparse.
"""

from __future__ import annotations

import ast
import json
import logging
import math
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import zip_longest
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
from torch import Tensor, nn
from tqdm import tqdm

from rsparse.apply import protocol_of, tokens_as
from rsparse.evaluate import token_log_probabilities
from rsparse.paths import ROOT

TASKS = ("winogrande", "piqa", "sciq", "obqa", "hellaswag", "boolq", "arc_easy", "arc_challenge")
"""The paper's eight tasks, in its order."""
TEAL = {"mmlu": 5, "arc_challenge": 25, "hellaswag": 10, "gsm8k": 5, "piqa": 0, "winogrande": 5}
"""TEAL's six tasks (arXiv 2408.14690, Table 2), and the solved examples that come before each question."""
TINY_TEAL = ("arc_challenge", "hellaswag", "piqa", "winogrande")
"""Those of TEAL's tasks that the embedded default has; it has no split to take examples from, so none come before."""
_EMBEDDED = {"tiny": TASKS, "tiny-teal": TINY_TEAL}
SUITES = ("official", "tiny", "teal", "tiny-teal")
"""Whose tasks: lm-eval's or the embedded default's, the paper's eight zero-shot; and the same for TEAL's."""
FEWSHOT_SEED = 1234
"""lm-eval's own default: which examples come before a question."""
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

    def _encode_pair(self, context: str, continuation: str) -> tuple[Sequence[int], Sequence[int]]:
        """Token ids of both; a grid of settings scores the same items again and again."""
        key = context, continuation
        if key not in self._pairs:
            ids = super()._encode_pair(context, continuation)
            self._pairs[key] = tuple(array("i", x) for x in ids)  # 4 bytes a token: few-shot contexts are long
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

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What the model writes after every request, greedily, until one of the task's stop strings.

        A rule by name stands for "decode": the prompt is dense. One that counts positions applies to the prompt.
        lm-eval cuts a prompt on the left where it and the longest answer would outgrow the model's positions.
        """
        started = time.monotonic()
        rule = getattr(protocol_of(self.model), "tokens", "decode")
        with tokens_as(self.model, "decode" if isinstance(rule, str) else rule):
            found = super().generate_until(requests, disable_tqdm)
        self.seconds += time.monotonic() - started
        return found

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options) -> Tensor:
        """lm-eval's, counted: after a dense prompt, the first token of an answer is as the dense model's."""
        output, protocol = super()._model_generate(context, max_length, stop, **options), protocol_of(self.model)
        written = int((output[:, context.shape[1] :] != self.tokenizer.pad_token_id).sum(1).clamp_min(1).sum())
        prompts = options["attention_mask"].sum(1).tolist()
        self.fed += sum(prompts) + written
        self.scored += written
        if protocol:
            self.influenced += written - sum(protocol.first_sparse(n, n) >= n for n in prompts)
        return output

    def _score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
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
                self.influenced += length - max(protocol.first_sparse(length, context), context - 1)


def row_shape(context: int, continuation: int, max_length: int) -> tuple[int, int]:
    """(inputs fed, prompt length) of a row; the last continuation token is not fed, and the left is cut."""
    length = min(context + continuation - 1, max_length)
    return length, length - continuation + 1


@cache
def load_tasks(suite: str) -> dict[str, ConfigurableTask]:
    """The tasks of a suite by name, in its order; of a task in parts every part, such as "mmlu/mmlu_anatomy".

    The official ones need the network once. ValueError for a suite that is not in `SUITES`.
    """
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if suite not in SUITES:
        raise ValueError(f"suite is {suite!r}; expected one of {', '.join(SUITES)}")
    if suite in _EMBEDDED:
        return {task: _tiny(_TINY / f"tiny_{task}.yaml") for task in _EMBEDDED[suite]}
    return _official(dict.fromkeys(TASKS, 0) if suite == "official" else TEAL)


def _official(shots: Mapping[str, int]) -> dict[str, ConfigurableTask]:
    names = {task: _OFFICIAL.get(task, task) for task in shots}
    loaded = TaskManager().load(list(names.values()))
    found: dict[str, ConfigurableTask] = {}
    for task, name in names.items():
        group = loaded["groups"].get(name) if "groups" in loaded else None
        parts = {f"{task}/{x.task_name}": x for x in group.get_all_tasks()} if group else {task: loaded["tasks"][name]}
        for part in parts.values():
            part.set_config(key="num_fewshot", value=shots[task])
        found |= parts
    return found


@cache
def _tiny(path: Path) -> ConfigurableTask:
    return TaskManager(include_defaults=False).load([_tiny_config(path)])["tasks"][path.stem]


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

    margin: log-probability of the gold option among the options, in nats, which moves where accuracy is blind; NaN
    for a task whose answers are written, where acc says whether the answer is exactly the right one.
    """

    items: pd.DataFrame
    influenced: float
    fed: int
    seconds: float


def score_tasks(
    model: nn.Module,
    tokenizer,
    suite: str,
    items: int | None = None,
    batch_size: int = 16,
    bos: bool = True,
    only: Sequence[str] = (),
) -> Scored:
    """Score the tasks of a suite, or those of them in `only`, under the model's token protocol.

    items: the first so many of each task, None for all; of a task in parts about so many, equally many of every part.
    Such a task is one, its items side by side, which is lm-eval's own weighting of its parts. ValueError for a task in
    `only` that the suite does not have.
    """
    tasks = _chosen(suite, only)
    lm = SparseLM(model, tokenizer, batch_size, bos)
    found: dict[str, list] = {}
    for limit, group in _by_limit(tasks, items).items():
        for task in group.values():
            task.set_fewshot_seed(FEWSHOT_SEED)  # else the next setting would be asked after other examples
        found |= lm_eval.evaluate(lm, group, limit=limit, log_samples=True, bootstrap_iters=0)["samples"]
    frame = pd.concat([_item_rows(name, task, found[name]) for name, task in tasks.items()], ignore_index=True)
    frame["item"] = frame.groupby("task").cumcount()
    return Scored(frame, lm.influenced / max(lm.scored, 1), lm.fed, lm.seconds)


def _chosen(suite: str, only: Sequence[str]) -> dict[str, ConfigurableTask]:
    """`load_tasks`, or those of it in `only`; of an embedded suite nothing else is loaded, which takes its time."""
    known = dict.fromkeys(_EMBEDDED.get(suite) or map(_whole, load_tasks(suite)))
    if unknown := set(only) - set(known):
        raise ValueError(f"task is {min(unknown)!r}; expected one of {', '.join(known)}")
    if only and suite in _EMBEDDED:
        return {task: _tiny(_TINY / f"tiny_{task}.yaml") for task in known if task in only}
    return {name: task for name, task in load_tasks(suite).items() if not only or _whole(name) in only}


def row_texts(suite: str, items: int | None = None) -> Iterator[str]:
    """The scored rows of a suite's tasks as text, question and one answer each, tasks in turn.

    items: the first so many of each task, None for all.
    """
    rows = []
    for task in load_tasks(suite).values():
        task.build_all_requests(limit=items)
        rows.append(["".join(request.arguments[:2]) for request in task.instances])
    for turn in zip_longest(*rows):
        yield from filter(None, turn)


def _whole(name: str) -> str:
    """The task that a part such as "mmlu/mmlu_anatomy" belongs to."""
    return name.partition("/")[0]


def _by_limit(tasks: Mapping[str, ConfigurableTask], items: int | None) -> dict[int | None, dict]:
    """The tasks by how many items of each are asked."""
    parts = Counter(map(_whole, tasks))
    found: dict[int | None, dict] = {}
    for name, task in tasks.items():
        limit = None if items is None else max(1, round(items / parts[_whole(name)]))
        found.setdefault(limit, {})[name] = task
    return found


def _item_rows(name: str, task: ConfigurableTask, samples: list[dict]) -> pd.DataFrame:
    """Of a task with several ways to find the answer in what was written, the first: lm-eval's strict one."""
    rows = []
    chosen = [x for x in samples if x["filter"] == samples[0]["filter"]]
    for sample in sorted(chosen, key=lambda s: s["doc_id"]):
        written = task.OUTPUT_TYPE == "generate_until"
        rows.append({
            "task": _whole(name), "item": sample["doc_id"], "acc": sample["exact_match" if written else "acc"],
            "acc_norm": sample.get("acc_norm", math.nan), "margin": math.nan if written else _margin(task, sample),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _margin(task: ConfigurableTask, sample: dict) -> float:
    likelihoods = torch.tensor([float(r[0]) for r in sample["filtered_resps"]], dtype=torch.float64)
    return float(likelihoods.log_softmax(0)[_gold(task, sample["doc"])])


def _gold(task: ConfigurableTask, doc: dict) -> int:
    """Index of the gold option; where the options are contexts (winogrande), doc_to_text gives it."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return gold if isinstance(gold, int) else task.doc_to_choice(doc).index(gold)
