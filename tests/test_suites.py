"""TEAL's six tasks: lm-eval's own task files on made-up data, their examples, and answers that the model writes."""

from __future__ import annotations

import re

import lm_eval.api.task
import pandas as pd
import pytest
import small_checkpoint
import torch
from datasets import Dataset, DatasetDict
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import rsparse
from rsparse import estimate, harness
from rsparse.exhibits import teal_reading
from rsparse.harness import TEAL, TINY_TEAL, SparseLM, load_tasks, score_tasks
from rsparse.models import load_model, load_tokenizer
from rsparse.study import paired_rows, task_rows

NUMBERS = "one two three four five six seven eight nine ten".split()


def word(i: int) -> str:
    return f"{NUMBERS[i % 10]} {NUMBERS[i // 10 % 10]}"


def choice(i: int, count: int = 4) -> dict:
    """Options whose order and key follow from i."""
    texts = [f"the {word(i + j)}" for j in range(count)]
    return {"text": texts, "label": list("ABCD"[:count])}


def documents(path: str, i: int) -> dict:
    """Document i of a data set, with the columns that lm-eval's task files ask for."""
    return {
        "cais/mmlu": lambda: {"question": f"What is {word(i)}?", "choices": choice(i)["text"], "answer": i % 4},
        "allenai/ai2_arc": lambda: {"question": f"Is it {word(i)}?", "choices": choice(i), "answerKey": "ABCD"[i % 4]},
        "Rowan/hellaswag": lambda: {
            "activity_label": "Counting", "ctx_a": f"A man counts {word(i)}.", "ctx_b": "then he",
            "endings": [f"goes to {word(i + j)}." for j in range(4)], "label": str(i % 4),
        },
        "openai/gsm8k": lambda: {"question": f"How much is {word(i)}?", "answer": f"It is counted.\n#### {i + 10}"},
        "baber/piqa": lambda: {"goal": f"count to {word(i)}", "sol1": "stand up", "sol2": "sit down", "label": i % 2},
        "allenai/winogrande": lambda: {
            "sentence": f"The {word(i)} beat the rest because _ was first.", "option1": "one", "option2": "two",
            "answer": "12"[i % 2],
        },
    }[path]()  # fmt: skip


def made_up(path: str, name: str | None = None, **_) -> DatasetDict:
    """Test and validation hold other documents than the splits that examples are taken from."""
    rows = {"train": range(40, 80), "dev": range(40, 46), "validation": range(8), "test": range(8)}
    return DatasetDict({split: Dataset.from_list([documents(path, i) for i in ids]) for split, ids in rows.items()})


@pytest.fixture(scope="module")
def official():
    """The suite "teal" as lm-eval describes it, its data replaced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.api.task.datasets, "load_dataset", made_up)
        load_tasks.cache_clear()
        yield load_tasks("teal")
    load_tasks.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return small_checkpoint.save(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def model(checkpoint):
    return load_model(str(checkpoint), "float64")


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(str(checkpoint))


def test_the_tasks_are_teals_with_its_examples(official):
    assert {name.split("/")[0]: None for name in official} == dict.fromkeys(TEAL), "in its order"
    parts = [name for name in official if name.startswith("mmlu/")]
    assert len(parts) == 57 and len(official) == 57 + 5
    for name, task in official.items():
        assert task.get_config("num_fewshot") == TEAL[name.split("/")[0]]
        assert task.OUTPUT_TYPE == ("generate_until" if name == "gsm8k" else "multiple_choice")
    assert [x["name"] for x in official["gsm8k"].config.filter_list][0] == "strict-match"
    assert official["gsm8k"].get_config("generation_kwargs")["do_sample"] is False


def test_the_three_lists_of_teals_tasks_agree():
    assert list(TEAL.items()) == list(teal_reading.SHOTS.items()) and list(estimate.TEAL_ROWS) == list(TEAL)
    assert set(TINY_TEAL) < set(TEAL) and list(load_tasks("tiny-teal")) == list(TINY_TEAL)


@pytest.fixture(scope="module")
def scored(official, checkpoint, tokenizer):
    return score_tasks(load_model(str(checkpoint)), tokenizer, "teal", items=3, batch_size=8)


def test_every_task_has_its_items_and_mmlu_is_one_task(scored):
    items = scored.items
    assert items.groupby("task", sort=False).size().to_dict() == {task: 57 if task == "mmlu" else 3 for task in TEAL}
    assert not items.duplicated(["task", "item"]).any() and items["acc"].isin([0, 1]).all()
    norm = items.groupby("task")["acc_norm"].apply(lambda x: x.notna().all())
    assert set(norm[norm].index) == {"arc_challenge", "hellaswag", "piqa"}
    margin = items.groupby("task")["margin"].apply(lambda x: x.notna().all())
    assert set(margin[~margin].index) == {"gsm8k"}, "what is written has no options"
    assert scored.influenced == 0 and scored.fed > 0 and scored.seconds > 0


def test_prompts_hold_as_many_examples_as_said(official, scored):
    asked = {name.split("/")[0]: task.instances[0].args[0] for name, task in official.items()}
    for task, mark in {"mmlu": "Answer:", "arc_challenge": "Answer:", "gsm8k": "Answer:", "piqa": "Answer:"}.items():
        assert asked[task].count(mark) == TEAL[task] + 1, task
    assert asked["hellaswag"].count("Counting:") == 11
    assert asked["winogrande"].count("\n\n") == 5
    assert asked["mmlu"].startswith("The following are multiple choice questions (with answers) about")
    examples = re.findall(r"#### (\d+)", asked["gsm8k"])
    assert len(examples) == 5 and all(int(x) >= 50 for x in examples), "from another split"


def test_items_of_a_task_in_parts_are_spread_over_its_parts(official, scored):
    """About as many as asked: three would be none of most parts, so every part gives one."""
    assert all(len(official[name].instances) == 4 for name in official if name.startswith("mmlu/"))


def test_the_examples_are_the_same_at_every_call(official, scored, checkpoint, tokenizer):
    """lm-eval draws them at random; two settings compared item by item must be asked the same."""
    again = score_tasks(load_model(str(checkpoint)), tokenizer, "teal", items=3, batch_size=8)
    pd.testing.assert_frame_equal(again.items, scored.items)


def test_the_average_over_all_six_needs_all_six(scored):
    rows = pd.DataFrame(task_rows(scored.items, {})).set_index(["metric", "task"])["value"]
    parts = scored.items.assign(acc_or_norm=scored.items["acc_norm"].fillna(scored.items["acc"]))
    for metric in ("acc", "acc_or_norm"):
        wanted = parts.groupby("task")[metric].mean().mean()
        assert rows[metric, "average-6"] == pytest.approx(wanted)
    assert rows["acc_or_norm", "arc_challenge"] == pytest.approx(rows["acc_norm", "arc_challenge"])
    averages = {name for _, name in rows.index if name.startswith("average")}
    assert averages == {"average-6"} and ("margin", "average-6") not in rows, "gsm8k has no margin"
    differences = paired_rows(parts, parts.assign(acc_or_norm=0.0), ["acc_or_norm", "margin"], {})
    named = {(row["metric"], row["task"]): row["value"] for row in differences}
    assert named["diff_acc_or_norm", "average-6"] == pytest.approx(rows["acc_or_norm", "average-6"])
    assert ("diff_margin", "gsm8k") not in named and named["diff_margin", "piqa"] == 0


def test_the_embedded_four_have_an_average_of_their_own(checkpoint, tokenizer):
    items = score_tasks(load_model(str(checkpoint)), tokenizer, "tiny-teal", items=2).items
    rows = pd.DataFrame(task_rows(items, {}))
    assert set(rows["task"]) == {*TINY_TEAL, "average-4-teal"}
    value = rows.set_index(["metric", "task"])["value"]
    assert value["margin", "average-4-teal"] == pytest.approx(items.groupby("task")["margin"].mean().mean())


@pytest.mark.parametrize("written, right", [("So.\n#### 10", 1.0), ("So it is 10.", 0.0), ("#### 11", 0.0)])
def test_a_written_answer_counts_in_the_strict_form_alone(official, model, tokenizer, monkeypatch, written, right):
    monkeypatch.setattr(harness, "load_tasks", lambda _: {"gsm8k": official["gsm8k"]})
    monkeypatch.setattr(SparseLM, "generate_until", lambda self, requests, **_: [written for _ in requests])
    items = score_tasks(model, tokenizer, "teal", items=1).items  # its answer is 10
    assert items[["task", "item", "acc"]].to_numpy().tolist() == [["gsm8k", 0, right]]
    assert items[["acc_norm", "margin"]].isna().all(axis=None)


def long_rows(official) -> list[Instance]:
    return [x for name in ("arc_challenge", "winogrande") for x in official[name].instances]


@pytest.mark.parametrize("limit", [60, 200, 1024])
def test_long_prompts_are_cut_as_lm_eval_cuts_them(official, scored, model, tokenizer, limit):
    """25 examples do not fit everywhere: the same likelihoods as lm-eval's own model, dense."""
    rows = long_rows(official)
    longest = max(len(tokenizer.encode("".join(x.args))) for x in rows)
    assert 200 < longest < 1024
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=limit, add_bos_token=True)
    ours = SparseLM(model, tokenizer, 4, bos=True, max_length=limit)
    expected = theirs.loglikelihood(rows, disable_tqdm=True)
    for (a, greedy), (b, also) in zip(ours.loglikelihood(rows, disable_tqdm=True), expected, strict=True):
        assert a == pytest.approx(b, abs=1e-8) and greedy == also


PROMPTS = ["Question: How much is one two?\nAnswer:", "A man counts. Then", "one"]


def requests(tokens: int) -> list[Instance]:
    options = {"until": ["\n\n\n"], "max_gen_toks": tokens, "do_sample": False}
    return [Instance("generate_until", doc={}, arguments=(text, options), idx=i) for i, text in enumerate(PROMPTS)]


@torch.no_grad()
def by_hand(model, ids: list[int], count: int, stop: int) -> list[int]:
    """Greedy continuation: the prompt in one pass without a cache before it, then token by token."""
    written, inputs, cache = [], ids, None
    while len(written) < count:
        output = model(input_ids=torch.tensor([inputs]), past_key_values=cache, use_cache=True)
        inputs, cache = [int(output.logits[0, -1].argmax())], output.past_key_values
        written += inputs
        if inputs == [stop]:
            break
    return written


@pytest.mark.parametrize(("rule", "stands_for"), [("all", "decode"), ("scored", "decode"), (-0.5, -0.5)])
def test_what_is_written_is_sparse_and_of_the_prompt_what_a_count_says(model, tokenizer, rule, stands_for):
    dense = SparseLM(model, tokenizer, 2).generate_until(requests(12), disable_tqdm=True)
    rsparse.sparsify(model, "teal", 0.7, threshold="per-token", tokens=stands_for)
    wanted, tokens = [], 0
    for text in PROMPTS:
        ids = by_hand(model, tokenizer.encode(text), 12, tokenizer.eos_token_id)
        wanted.append(tokenizer.decode(ids, skip_special_tokens=True))
        tokens += len(ids)
    rsparse.sparsify(model, "teal", 0.7, threshold="per-token", tokens=rule)
    lm = SparseLM(model, tokenizer, 2)
    assert lm.generate_until(requests(12), disable_tqdm=True) == wanted != dense
    dense_first = len(PROMPTS) if stands_for == "decode" else 0  # the first token is then the dense model's
    assert (lm.scored, lm.influenced) == (tokens, tokens - dense_first)
    assert lm.fed == tokens + sum(len(tokenizer.encode(text)) for text in PROMPTS)
    assert model._rsparse.protocol.tokens == rule
