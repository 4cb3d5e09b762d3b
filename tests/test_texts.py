"""Calibration and evaluation text: the embedded one, and local copies of the real corpora made on the fly."""

import gzip
import json

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rsparse.models import TINY
from rsparse.texts import CORPORA, check_text, summaries, token_ids


def word_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    words = ["<unk>", "</s>", "<s>"] + [
        f"{split}{i}" for split in ("train", "validation", "test") for i in range(2000)
    ]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(bos_token="<s>") if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", **special)


def documents(split: str, count: int = 40, words: int = 45) -> list[str]:
    """Documents in which every word says its split and place; some are empty, as WikiText's are."""
    full = [" ".join(f"{split}{i * words + j}" for j in range(words)) for i in range(count)]
    return [text for document in full for text in (document, "", "  \n")]


def write(folder, name: str, rows: list[dict]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())


FILES = {
    "c4": ("text", "en/c4-{}.00000-of-01024.json.gz", "train", "validation"),
    "wikitext2": ("text", "wikitext-2-raw-v1/{}-00000-of-00001.parquet", "train", "validation"),
    "xsum": ("document", "data/{}-00000-of-00001.parquet", "train", "test"),
    "jsonl": ("document", "{}.jsonl", "train", "test"),
}


@pytest.fixture(params=FILES)
def corpus(request, tmp_path):
    """A local copy: (name, the split of each role)."""
    column, pattern, train, heldout = FILES[request.param]
    for split in ("train", "validation", "test"):
        rows = [
            {column: text, "summary": f"{split}{i}", "id": str(i)} for i, text in enumerate(documents(split))
        ]
        write(tmp_path, pattern.format(split), rows)
    if request.param == "wikitext2":  # the repository holds four corpora
        write(tmp_path, "wikitext-103-raw-v1/train-00000-of-00002.parquet", [{column: "other " * 99}])
        write(tmp_path, "wikitext-2-v1/validation-00000-of-00001.parquet", [{column: "other " * 99}])
    (tmp_path / "README.md").write_text("train validation test")
    (tmp_path / "latest.json").write_text("no corpus, but its name holds 'test'")
    name = "xsum" if request.param == "jsonl" else request.param
    return f"{name}:{tmp_path}", {"calibration": train, "heldout": heldout}


def test_local_copies_of_the_real_corpora(corpus):
    name, splits = corpus
    tokenizer = word_tokenizer()
    seen = {}
    for role, split in splits.items():
        ids = token_ids(name, role, tokenizer, samples=5, length=33, seed=3)
        assert (
            ids.shape == (5, 33) and ids.dtype == torch.long and (ids[:, 0] == tokenizer.bos_token_id).all()
        )
        words = tokenizer.convert_ids_to_tokens(ids[:, 1:].flatten().tolist())
        assert {w.rstrip("0123456789") for w in words} <= {split, "<s>", "</s>"}
        seen[role] = set(words) - {"<s>", "</s>"}
    assert not seen["calibration"] & seen["heldout"]


def test_windows_are_consecutive_disjoint_and_picked_by_seed(corpus):
    name, splits = corpus
    tokenizer = word_tokenizer()

    def starts(seed: int, samples: int = 6) -> list[str]:
        ids = token_ids(name, "calibration", tokenizer, samples, 21, seed)
        for row in ids.tolist():
            places = [
                int(w.removeprefix("train"))
                for w in tokenizer.convert_ids_to_tokens(row[1:])
                if w not in ("<s>", "</s>")
            ]
            assert places == list(range(places[0], places[0] + len(places)))  # joined in order, EOS and BOS between
        flat = [w for w in ids[:, 1:].flatten().tolist() if w > 2]
        assert len(set(flat)) == len(flat)
        return ids.tolist()

    assert starts(0) == starts(0) != starts(1)


def test_a_tokenizer_without_bos(corpus):
    name, _ = corpus
    ids = token_ids(name, "heldout", word_tokenizer(bos=False), samples=4, length=32)
    assert ids.shape == (4, 32) and (ids[:, 0] != 2).all()


def test_too_short(corpus):
    name, _ = corpus
    with pytest.raises(ValueError, match=r"has \d+ windows of 512 tokens; expected 16"):
        token_ids(name, "heldout", word_tokenizer(), samples=16, length=512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="c5"), "text is 'c5'; expected tiny, c4, wikitext2, xsum"),
        (dict(name="tiny:/tmp"), "text is 'tiny:/tmp'"),
        (dict(name=""), "text is ''"),
        (dict(name="c4:/no/such"), "'c4:/no/such' names no existing folder"),
        (dict(name="c4:"), "'c4:' names no existing folder"),
        (dict(role="train"), "role is 'train'; expected 'calibration' or 'heldout'"),
        (dict(samples=0), "samples, length are 0, 64"),
        (dict(length=1), "samples, length are 16, 1"),
    ],
)
def test_errors_before_anything_is_read(arguments, message, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("a corpus was opened"))
    with pytest.raises(ValueError, match=message):
        token_ids(**dict(name="c4", role="heldout", tokenizer=None, samples=16, length=64) | arguments)


def test_a_folder_without_the_split(tmp_path):
    write(tmp_path, "train.parquet", [{"text": "a"}])
    with pytest.raises(ValueError, match="has no parquet or json file of the split 'validation'"):
        token_ids(f"wikitext2:{tmp_path}", "heldout", word_tokenizer())


def test_summaries_of_a_local_copy(corpus):
    name, _ = corpus
    if not name.startswith("xsum"):
        with pytest.raises(ValueError, match="has no summaries; expected 'tiny', 'xsum' or 'xsum:FOLDER'"):
            summaries(name, 3)
        return
    found = summaries(name, 4)
    assert [x.summary for x in found] == ["test0", "test1", "test2", "test3"]
    assert (
        found[0].article.startswith("test0 test1")
        and found[0].prompt == f"Article: {found[0].article}\nSummary:"
    )
    with pytest.raises(ValueError, match="has 120 summaries; expected at least 500"):
        summaries(name, 500)


def test_names_are_checked_without_opening_anything():
    for corpus in (*CORPORA, "tiny"):
        for role in ("calibration", "heldout"):
            assert check_text(corpus, role) is None


class TestTiny:
    @pytest.fixture
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(TINY)

    def test_windows(self, tokenizer):
        for role in ("calibration", "heldout"):
            ids = token_ids("tiny", role, tokenizer, samples=16, length=128)
            assert ids.shape == (16, 128) and (ids[:, 0] == tokenizer.bos_token_id).all()
            assert 0 <= int(ids.min()) and int(ids.max()) < len(tokenizer)
            assert ids.equal(token_ids("tiny", role, tokenizer, samples=16, length=128))
            assert not ids.equal(token_ids("tiny", role, tokenizer, samples=16, length=128, seed=1))

    def test_documents_are_told_apart(self, tokenizer):
        """Corpus files separate documents by lines "<|doc|>", which turn into EOS and never into text."""
        ids = token_ids("tiny", "heldout", tokenizer, samples=32, length=128)
        assert (ids == tokenizer.eos_token_id).sum() > 32
        assert "doc|>" not in tokenizer.decode(ids.flatten())

    def test_calibration_and_heldout_share_no_window(self, tokenizer):
        seen = [
            {
                tuple(row[i : i + 48].tolist())
                for row in token_ids("tiny", role, tokenizer, 64, 256)
                for i in range(1, 200)
            }
            for role in ("calibration", "heldout")
        ]
        assert not seen[0] & seen[1]

    def test_summaries(self):
        found = summaries("tiny", 100)
        assert len(found) == 100 and all(x.article and x.summary and "\n" not in x.summary for x in found)
