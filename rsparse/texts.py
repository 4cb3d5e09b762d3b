"""Calibration and evaluation text as token ids: the embedded default, C4, WikiText-2, XSum.

A text is named ``tiny``, ``c4``, ``wikitext2`` or ``xsum``. Each real corpus also loads from a local folder,
``c4:FOLDER`` and so on, holding the files of the hub repository (parquet, json or json.gz), for machines
without network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from rsparse.paths import ROOT

TINY_TEXT = ROOT / "data" / "tiny" / "text"
CORPORA = {
    "c4": ("allenai/c4", {"calibration": "en/c4-train.00000-of-01024.json.gz",
                          "heldout": "en/c4-validation.00000-of-00008.json.gz"}),
    "wikitext2": ("Salesforce/wikitext", {"calibration": "train", "heldout": "validation"}),
    "xsum": ("EdinburghNLP/xsum", {"calibration": "train", "heldout": "test"}),
}  # fmt: skip
WIKITEXT = "wikitext-2-raw-v1"
ROLES = ("calibration", "heldout")


@dataclass(frozen=True)
class Summary:
    """One article and its one-sentence reference summary."""

    article: str
    summary: str

    @property
    def prompt(self) -> str:
        return f"Article: {self.article}\nSummary:"


def token_ids(
    name: str, role: str, tokenizer, samples: int = 16, length: int = 4096, seed: int = 0
) -> Tensor:
    """LongTensor (samples, length) of token ids from the text called `name`.

    role: "calibration" or "heldout"; the two come from disjoint splits. Documents, each between BOS and EOS,
    are joined and cut into consecutive windows, each begun with BOS; `seed` picks the windows. The paper's
    calibration is 16 samples of 4096 tokens of C4, its perplexity text the validation split of WikiText-2
    raw.

    Raises ValueError for an unknown name or role, sizes below 1, or a text shorter than samples x length.
    """
    check_text(name, role)
    seed += role == "heldout"
    return windows(_documents(name, role), tokenizer, samples, length, seed, f"text {name!r} ({role})")


def windows(
    documents: Iterator[str], tokenizer, samples: int, length: int, seed: int = 0, what: str = "the text"
) -> Tensor:
    """LongTensor (samples, length) of windows of `documents`, joined and cut as `token_ids` says.

    what: names them in the ValueError for too short a text.
    """
    if samples < 1 or length < 2:
        raise ValueError(f"samples, length are {samples}, {length}; expected at least 1 and 2")
    generator = torch.Generator().manual_seed(seed)
    bos = tokenizer.bos_token_id
    body = length - (bos is not None)
    stream = _stream(documents, tokenizer, 4 * samples * body)
    found = stream[: len(stream) // body * body].view(-1, body)
    if len(found) < samples:
        raise ValueError(f"{what} has {len(found)} windows of {length} tokens; expected {samples}")
    chosen = found[torch.randperm(len(found), generator=generator)[:samples].sort().values]
    return chosen if bos is None else torch.cat([torch.full((samples, 1), bos), chosen], 1)


def summaries(name: str, items: int) -> list[Summary]:
    """The first `items` articles of ``tiny`` or ``xsum`` (test split) with their reference summaries."""
    check_summaries(name)
    if name == "tiny":
        pairs = map(json.loads, (TINY_TEXT / "summaries.jsonl").read_text(encoding="utf-8").splitlines())
        found = [Summary(x["article"], x["summary"]) for x in islice(pairs, items)]
    else:
        rows = _rows(name, "heldout")
        found = [Summary(" ".join(x["document"].split()), x["summary"]) for x in islice(rows, items)]
    if len(found) < items:
        raise ValueError(f"text {name!r} has {len(found)} summaries; expected at least {items}")
    return found


def check_text(name: str, role: str) -> None:
    """ValueError unless `name` and `role` name a text that can be loaded; opens no file and no connection."""
    corpus, local, folder = name.partition(":")
    if role not in ROLES:
        raise ValueError(f"role is {role!r}; expected 'calibration' or 'heldout'")
    if corpus not in CORPORA and name != "tiny":
        raise ValueError(
            f"text is {name!r}; expected tiny, {', '.join(CORPORA)}, or one of these as NAME:FOLDER"
        )
    if local and not (folder and Path(folder).is_dir()):
        raise ValueError(f"text {name!r} names no existing folder; expected {corpus}:FOLDER")


def check_summaries(name: str) -> None:
    """ValueError unless `name` is a text with summaries; opens no file and no connection."""
    check_text(name, "heldout")
    if name.partition(":")[0] not in ("tiny", "xsum"):
        raise ValueError(f"text {name!r} has no summaries; expected 'tiny', 'xsum' or 'xsum:FOLDER'")


def _documents(name: str, role: str) -> Iterator[str]:
    if name == "tiny":
        yield from (TINY_TEXT / f"{role}.txt").read_text(encoding="utf-8").split("\n\n\n")
    elif name.partition(":")[0] == "wikitext2":  # its rows are lines of one text
        yield "\n\n".join(row["text"] for row in _rows(name, role))
    elif name.partition(":")[0] == "xsum":
        yield from (row["document"] for row in _rows(name, role))
    else:
        yield from (row["text"] for row in _rows(name, role))


def _rows(name: str, role: str) -> Iterator[dict]:
    """Rows of a real corpus, streamed: C4 is never downloaded whole."""
    from datasets import load_dataset

    corpus, _, folder = name.partition(":")
    repository, splits = CORPORA[corpus]
    if folder:
        yield from load_dataset(**_local_files(Path(folder), splits[role]), split="train", streaming=True)
    elif corpus == "c4":
        yield from load_dataset(repository, data_files=splits[role], split="train", streaming=True)
    else:
        config = WIKITEXT if corpus == "wikitext2" else None
        yield from load_dataset(repository, config, split=splits[role])


def _local_files(folder: Path, split: str) -> dict:
    """load_dataset arguments for the files of `folder` whose name holds the split's as a word."""
    wanted = Path(split).name.split(".")[0].removeprefix("c4-")
    named = re.compile(rf"(?<![a-z]){wanted}(?![a-z]).*\.(parquet|json|jsonl|json\.gz|jsonl\.gz)$")
    if (folder / WIKITEXT).is_dir():  # a copy of the whole repository, whose other folders are other corpora
        folder = folder / WIKITEXT
    files = sorted(p for p in folder.rglob("*") if named.search(p.name))
    if not files:
        raise ValueError(f"folder {str(folder)!r} has no parquet or json file of the split {wanted!r}")
    loader = "parquet" if files[0].suffix == ".parquet" else "json"
    return {"path": loader, "data_files": [str(p) for p in files]}


def _stream(documents: Iterator[str], tokenizer, enough: int) -> Tensor:
    """Token ids of the documents in order, each between BOS and EOS, until there are `enough`."""
    found: list[int] = []
    before, after = ([] if x is None else [x] for x in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    for document in documents:
        if document.strip():
            ids = tokenizer.encode(document.strip(), add_special_tokens=False, verbose=False)
            found += before + ids + after
        if len(found) >= enough:
            break
    return torch.tensor(found, dtype=torch.long)
