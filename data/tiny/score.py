"""Scores a model on the eight tasks the way lm-eval does, without needing lm-eval.

The formats are read from the tasks' YAML files, so they cannot drift from what lm-eval reads.
"""
import ast
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import jinja2
import torch
import yaml

TASKS = ("winogrande", "piqa", "sciq", "obqa", "hellaswag", "boolq", "arc_easy", "arc_challenge")
_JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


@dataclass(frozen=True)
class Item:
    """One multiple-choice item: (context, continuation) per option, the right option, the options'
    lengths in characters (for acc_norm)."""

    requests: tuple[tuple[str, str], ...]
    gold: int
    lengths: tuple[int, ...]


def _value(template, doc: dict):
    """A YAML entry as lm-eval reads it: a field's name, a Jinja template or a plain value."""
    if not isinstance(template, str):
        return template
    return doc[template] if template in doc else _compiled(template).render(**doc)


@cache
def _compiled(template: str) -> jinja2.Template:
    return _JINJA.from_string(template)


def read_items(config: dict, docs: Iterable[dict]) -> Iterator[Item]:
    """The items that a task's YAML `config` makes of its lines `docs`."""
    for doc in docs:
        text, target = _value(config["doc_to_text"], doc), _value(config["doc_to_target"], doc)
        choices = _value(config["doc_to_choice"], doc)
        if isinstance(choices, str):
            choices = ast.literal_eval(choices)
        if text.isdigit():  # "multiple inputs": the options are contexts, the target is what follows
            requests = tuple((choice, f" {target}") for choice in choices)
            gold = int(text)
        else:
            requests = tuple((text, f" {choice}") for choice in choices)
            gold = int(target)
        yield Item(requests, gold, tuple(len(choice) for choice in choices))


def task_config(name: str, folder: Path) -> dict:
    """The task's YAML file, tiny_<name>.yaml in `folder`."""
    return yaml.safe_load((folder / f"tiny_{name}.yaml").read_text())


def _data_file(config: dict, folder: Path) -> Path:
    return folder / config["dataset_kwargs"]["data_files"][config["validation_split"]]


def task_items(name: str, folder: Path) -> Iterator[Item]:
    """The items of task `name`: its YAML file and the data file that it names, both in `folder`."""
    config = task_config(name, folder)
    return read_items(config, map(json.loads, _data_file(config, folder).read_text().splitlines()))


def items_digest(folder: Path) -> str:
    """sha256 over the task files in `folder`: says which items a recorded score is about."""
    digest = sha256()
    for name in TASKS:
        digest.update((folder / f"tiny_{name}.yaml").read_bytes())
        digest.update(_data_file(task_config(name, folder), folder).read_bytes())
    return digest.hexdigest()


def without_question(item: Item) -> Item:
    """The item with nothing but its options: what a model knows about them from their wording alone."""
    contexts = {context for context, _ in item.requests}
    if len(contexts) == 1:
        return Item(tuple(("", continuation) for _, continuation in item.requests), item.gold, item.lengths)
    kept = tuple(context for context, _ in item.requests)
    start = 0
    while len({context[:start + 1] for context in kept}) == 1:
        start += 1
    return Item(tuple((context[start:], continuation) for context, continuation in item.requests), item.gold,
                item.lengths)


def _encode(tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of both together (with <s>) and how many of them belong to the continuation."""
    both = tokenizer(context + continuation)["input_ids"]
    return both, len(both) - len(tokenizer(context)["input_ids"])


@torch.no_grad()
def log_likelihoods(model, tokenizer, requests: list[tuple[str, str]], batch: int) -> list[float]:
    """Summed log-probability of every continuation after its context; `batch` rows at a time."""
    encoded = [_encode(tokenizer, *request) for request in requests]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))
    result = [0.0] * len(encoded)
    device = model.device
    for first in range(0, len(order), batch):
        rows = order[first:first + batch]
        width = max(len(encoded[i][0]) for i in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        scored = torch.zeros(len(rows), width - 1, dtype=torch.bool)
        for row, i in enumerate(rows):
            tokens, count = encoded[i]
            ids[row, :len(tokens)] = torch.tensor(tokens)
            scored[row, len(tokens) - 1 - count:len(tokens) - 1] = True
        ids, scored = ids.to(device), scored.to(device)
        logits = model(input_ids=ids).logits[:, :-1].float()  # padding is on the right: causality hides it
        chosen = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        for i, total in zip(rows, (chosen * scored).sum(-1).tolist()):
            result[i] = total
    return result


def accuracy(model, tokenizer, items: list[Item], batch: int) -> dict[str, float]:
    """acc and acc_norm (log-likelihood per character of the option) over `items`."""
    flat = log_likelihoods(model, tokenizer, [request for item in items for request in item.requests], batch)
    hits = hits_norm = position = 0
    for item in items:
        scores = flat[position:position + len(item.requests)]
        position += len(item.requests)
        norm = [score / length for score, length in zip(scores, item.lengths)]
        hits += scores.index(max(scores)) == item.gold
        hits_norm += norm.index(max(norm)) == item.gold
    return {"acc": hits / len(items), "acc_norm": hits_norm / len(items)}


def score_tasks(model, tokenizer, folder: Path, batch: int, limit: int | None = None,
                alone: bool = True) -> dict[str, dict]:
    """Scores per task: acc, acc_norm, with `alone` the acc of the options without their question, chance and
    the number of items."""
    scores = {}
    for name in TASKS:
        items = list(task_items(name, folder))[:limit]
        scores[name] = accuracy(model, tokenizer, items, batch) | {
            "chance": 1 / len(items[0].requests), "items": len(items)}
        if alone:
            blind = accuracy(model, tokenizer, [without_question(item) for item in items], batch)
            scores[name]["options_alone"] = blind["acc"]
    return scores


@torch.no_grad()
def perplexity(model, rows: torch.Tensor, batch: int) -> float:
    """Perplexity of LongTensor `rows` (samples, length); the first token of a row is not scored."""
    total, count = 0.0, 0
    for ids in rows.split(batch):
        ids = ids.to(model.device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return float(torch.tensor(total / count).exp())


def rouge_l(reference: str, text: str) -> float:
    """F-measure of the longest common subsequence of words."""
    a, b = reference.lower().replace(".", "").split(), text.lower().replace(".", "").split()
    row = [0] * (len(b) + 1)
    for word in a:
        previous = row
        row = [0]
        for i, other in enumerate(b):
            row.append(previous[i] + 1 if word == other else max(row[-1], previous[i + 1]))
    return 2 * row[-1] / (len(a) + len(b)) if a and b else 0.0


@torch.no_grad()
def score_summaries(model, tokenizer, path: Path, limit: int) -> float:
    """Mean ROUGE-L of greedy summaries of the first `limit` articles."""
    docs = [json.loads(line) for line in path.read_text().splitlines()[:limit]]
    total = 0.0
    for doc in docs:
        ids = tokenizer(f"Article: {doc['article']}\nSummary:", return_tensors="pt").to(model.device)
        out = model.generate(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"],
                             max_new_tokens=48, do_sample=False)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
        total += rouge_l(doc["summary"], text.strip().split("\n")[0])
    return total / len(docs)
