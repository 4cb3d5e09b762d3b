"""lm-eval's tasks under the token protocols, row by row against loops in float64."""

import json
import math

import lm_eval
import pandas as pd
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import rsparse
from reference import llama_logits, masked, weights_of
from rsparse import harness
from rsparse.harness import TASKS, SparseLM, load_tasks, row_shape, score_tasks
from rsparse.models import TINY, random_model, shape_config
from rsparse.protocol import first_sparse

WORDS = ["<s>", "</s>"] + [f"w{i}" for i in range(95)]
ROWS = [  # (context, continuation): lengths mixed; one-token answers; one text cut at two places; no context
    ("w1 w2 w3 w4 w5", "w6"), ("w1 w2 w3 w4 w5", "w7"), ("w9", "w10 w11 w12"), ("w20 w21 w22", "w23 w24"),
    ("w20 w21", "w22 w23 w24"), ("w30 w31 w32 w33 w34 w35 w36 w37 w38", "w39 w40"), ("", "w50 w51"),
    ("w60 w61", "w61"),
]  # fmt: skip
RULES = ["all", "decode", "scored", 0.9, -0.5, 3, -1]


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def ask(lm: SparseLM, rows=ROWS) -> list[tuple[float, bool]]:
    instances = [
        Instance("loglikelihood", doc={}, arguments=(context, f" {answer}" if context else answer), idx=i)
        for i, (context, answer) in enumerate(rows)
    ]
    return lm.loglikelihood(instances, disable_tqdm=True)


def encoded(row: tuple[str, str], bos: bool) -> tuple[list[int], list[int]]:
    """Token ids of context and continuation; a row without context has BOS for one."""
    context, answer = ([WORDS.index(w) for w in text.split()] for text in row)
    return ([0] if bos or not context else []) + context, answer


def likelihood(config, weights, row, bos, max_length, tokens=None, plan=None) -> tuple[float, bool, int, int]:
    """Log-likelihood and greediness of one row by loops, and how many logits were scored and influenced."""
    context, answer = encoded(row, bos)
    text = (context + answer)[-(max_length + 1) :]
    fed, prompt = text[:-1], len(text) - len(answer)
    first = len(fed) if tokens is None else first_sparse(tokens, len(fed), prompt)

    def linear(name, W, x, position):
        return W @ x if position < first else masked(*plan[name])(name, W, x, position)

    logits = llama_logits(config, weights, fed, linear)[prompt - 1 :]
    targets = torch.tensor(answer)
    total = float(logits.log_softmax(-1)[range(len(answer)), targets].sum())
    influenced = sum(position >= first for position in range(prompt - 1, len(fed)))
    return total, bool((logits.argmax(-1) == targets).all()), len(answer), influenced


@pytest.mark.parametrize("tokens", [None, *RULES])
@pytest.mark.parametrize(("bos", "max_length"), [(True, 64), (False, 64), (True, 5)])
def test_likelihoods_by_brute_force(build, tokenizer, tokens, bos, max_length):
    model = build()
    weights, plan = weights_of(model), None
    if tokens is not None:
        report = rsparse.sparsify(model, sparsity=0.5, rho=0.8, threshold="per-token", tokens=tokens)
        plan = {x.name: (x.kept, x.rank) for x in report.linears}
    lm = SparseLM(model, tokenizer, batch_size=3, bos=bos, max_length=max_length)
    expected = [likelihood(model.config, weights, row, bos, max_length, tokens, plan) for row in ROWS]
    for (found, greedy), (total, is_greedy, *_) in zip(ask(lm), expected, strict=True):
        assert found == pytest.approx(total, abs=1e-8) and greedy == is_greedy
    assert (lm.scored, lm.influenced) == (sum(e[2] for e in expected), sum(e[3] for e in expected))


@pytest.mark.parametrize("tokens", [None, *RULES])
@pytest.mark.parametrize("threshold", ["per-token", "static"])
def test_the_batch_size_does_not_matter(build, ids, tokenizer, tokens, threshold):
    model = build()
    if tokens is not None:
        rsparse.sparsify(model, sparsity=0.5, threshold=threshold, tokens=tokens, calibration=ids)
    one, eight = (ask(SparseLM(model, tokenizer, batch_size=size)) for size in (1, 8))
    for (a, _), (b, _) in zip(one, eight, strict=True):
        assert a == pytest.approx(b, abs=1e-12)


def test_one_token_answers_are_dense_under_decode_only(build, tokenizer):
    model = build()
    rows = [ROWS[0], ROWS[1]]
    dense = ask(SparseLM(model, tokenizer), rows)
    rsparse.sparsify(model, sparsity=0.5, threshold="per-token", tokens="decode")
    lm = SparseLM(model, tokenizer)
    assert ask(lm, rows) == dense and (lm.scored, lm.influenced) == (2, 0)
    rsparse.sparsify(model, sparsity=0.5, threshold="per-token", tokens="scored")
    lm = SparseLM(model, tokenizer)
    assert abs(ask(lm, rows)[0][0] - dense[0][0]) > 1e-3 and (lm.scored, lm.influenced) == (2, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_log_probabilities_of_16_bit_models_are_not_rounded(build, tokenizer, dtype):
    """Sums in bfloat16 would come in steps of 1/32 and more."""
    lm = SparseLM(build(dtype), tokenizer)
    found = [x for x, _ in ask(lm)]
    assert any(x != float(torch.tensor(x).to(getattr(torch, dtype))) for x in found)
    widened = ask(SparseLM(build(dtype).float(), tokenizer))
    assert found == pytest.approx([x for x, _ in widened], abs=0.3)


@pytest.mark.parametrize(
    ("context", "continuation", "limit", "shape"),
    [
        (5, 1, 64, (5, 5)),
        (5, 3, 64, (7, 5)),
        (1, 1, 64, (1, 1)),
        (5, 3, 7, (7, 5)),
        (5, 3, 6, (6, 4)),
        (9, 4, 4, (4, 1)),
    ],
)
def test_row_shape(context, continuation, limit, shape):
    assert row_shape(context, continuation, limit) == shape


def toy_task(name: str, labels: list[int], options: int = 3) -> dict:
    rows = [
        {"question": f"w{i} w{i + 1}", "options": [f"w{10 * j + i} w{j}" for j in range(options)], "label": n}
        for i, n in enumerate(labels)
    ]
    return {"config": {
        "task": name, "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": f"{name}.jsonl"}},
        "output_type": "multiple_choice", "validation_split": "validation", "doc_to_text": "{{question}}",
        "doc_to_target": "label", "doc_to_choice": "{{options}}", "metadata": {"version": 1.0},
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
        ],
    }, "rows": rows}  # fmt: skip


@pytest.fixture
def toy_suite(tmp_path, monkeypatch):
    """The eight tasks of a suite in another folder; every task has items of its own, returned by task."""
    items = {}
    for number, task in enumerate(TASKS):
        toy = toy_task(f"tiny_{task}", [(i + number) % 3 for i in range(number + 3)])
        for i, row in enumerate(toy["rows"]):
            row["question"] = f"w{number} {row['question']} w{i}"
        items[task] = toy["rows"]
        (tmp_path / f"tiny_{task}.yaml").write_text(yaml.safe_dump(toy["config"]))
        (tmp_path / f"tiny_{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy["rows"]))
    monkeypatch.setattr(harness, "_TINY", tmp_path)
    load_tasks.cache_clear()
    yield items
    load_tasks.cache_clear()


@pytest.mark.parametrize("tokens", [None, "scored"])
def test_every_item_of_every_task(build, tokenizer, toy_suite, tokens):
    """Accuracy and margin from likelihoods by hand; each row under its own task's name."""
    model = build()
    weights, plan = weights_of(model), None
    if tokens is not None:
        report = rsparse.sparsify(model, sparsity=0.5, threshold="per-token", tokens=tokens)
        plan = {x.name: (x.kept, x.rank) for x in report.linears}
    frame, influenced, fed, seconds = score_tasks(model, tokenizer, "tiny", items=4, batch_size=5)
    expected, scored, reached = [], 0, 0
    for task, items in toy_suite.items():
        for item, row in enumerate(items[:4]):
            answers = [
                likelihood(model.config, weights, (row["question"], option), True, 256, tokens, plan)
                for option in row["options"]
            ]
            values = torch.tensor([a[0] for a in answers], dtype=torch.float64)
            lengths = torch.tensor([len(option) for option in row["options"]])
            gold, scored, reached = (
                row["label"],
                scored + sum(a[2] for a in answers),
                reached + sum(a[3] for a in answers),
            )
            expected.append({
                "task": task, "item": item, "acc": float(values.argmax() == gold),
                "acc_norm": float((values / lengths).argmax() == gold),
                "margin": float(values.log_softmax(0)[gold]),
            })  # fmt: skip
    pd.testing.assert_frame_equal(frame, pd.DataFrame(expected), check_dtype=False, atol=1e-8)
    assert influenced == pytest.approx(reached / scored) and (influenced == 0) == (tokens is None)
    assert len(frame) == 3 + 4 * 7 and frame.acc.nunique() == 2
    assert fed > scored and seconds > 0


def test_scoring_twice_gives_the_same(build, tokenizer, toy_suite):
    model = build()
    once, twice = (score_tasks(model, tokenizer, "tiny").items for _ in range(2))
    pd.testing.assert_frame_equal(once, twice)
    assert once.groupby("task", sort=False).size().to_dict() == {task: 3 + i for i, task in enumerate(TASKS)}


def test_lm_eval_itself_takes_the_model(build, tokenizer, toy_suite):
    """The same accuracy through lm-eval's front door."""
    model = build()
    tasks = load_tasks("tiny")
    found = lm_eval.evaluate(SparseLM(model, tokenizer), {"piqa": tasks["piqa"]}, bootstrap_iters=0)
    frame = score_tasks(model, tokenizer, "tiny").items
    assert found["results"]["piqa"]["acc,none"] == pytest.approx(frame[frame.task == "piqa"].acc.mean())


def test_unknown_suite():
    with pytest.raises(ValueError, match="suite is 'big'; expected one of official, tiny, teal, tiny-teal"):
        load_tasks("big")


@pytest.fixture(scope="module")
def tiny_frame():
    """The embedded tasks, scored by random weights at their tokenizer's size."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    config = shape_config(
        "llama-2-7b", vocab_size=len(tokenizer), max_position_embeddings=512, num_key_value_heads=2, **sizes
    )
    return score_tasks(random_model(config), tokenizer, "tiny", items=6).items


class TestTiny:
    def test_rows(self, tiny_frame):
        assert list(tiny_frame.task.unique()) == list(TASKS) and len(tiny_frame) == 48
        assert (
            tiny_frame.acc.isin([0, 1]).all()
            and (tiny_frame.margin < 0).all()
            and tiny_frame.margin.map(math.isfinite).all()
        )

    def test_acc_norm_where_lm_eval_has_it(self, tiny_frame):
        """As in the official tasks: none for winogrande and boolq."""
        missing = tiny_frame.groupby("task").acc_norm.apply(lambda column: column.isna().all())
        assert set(missing[missing].index) == {"winogrande", "boolq"}

    def test_margins_of_an_untrained_model_are_those_of_guessing_where_options_have_one_length(
        self, tiny_frame
    ):
        for task in ("winogrande", "boolq"):
            assert (tiny_frame[tiny_frame.task == task].margin - math.log(0.5)).abs().max() < 1.5
