"""The embedded default: its text, tasks, tokenizer, checkpoint, scores and model card."""

import hashlib
import json
import math
import re
import sys
from itertools import chain

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rsparse.paths import ROOT

TINY = ROOT / "data" / "tiny"
sys.path.append(str(TINY))  # its scripts import each other by name

import audit  # noqa: E402
import card  # noqa: E402
import corpus  # noqa: E402
import families  # noqa: E402
import generate  # noqa: E402
import score  # noqa: E402
import split  # noqa: E402
import tasks  # noqa: E402
import tokenizer as tokenizer_script  # noqa: E402
import world  # noqa: E402

MODEL = TINY / "model"
LEAK_SHARDS = (0, 1, corpus.SHARDS - 1)
FRESH_SEEDS = ("audit-0", "audit-1")
RESCORED = 24  # items per task
CONTROL_ERRORS = 3.5


@pytest.fixture(scope="module")
def record():
    return json.loads((TINY / "training.json").read_text())


@pytest.fixture(scope="module")
def items():
    return audit.published_items()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def training():
    return audit.training_frequencies()


@pytest.fixture(scope="module")
def published(items, training):
    return audit.blind(items, training)


class TestText:
    def test_text_and_tasks_are_what_the_generator_writes(self):
        different = [n for n, text in generate.files() if (TINY / n).read_bytes() != text.encode()]
        assert not different

    def test_checksums(self):
        lines = [line.split("  ") for line in (TINY / "SHA256SUMS").read_text().splitlines()]
        listed = {name: digest for digest, name in lines}
        shards = {name for name in listed if name.startswith("corpus/")}
        kept = {path.relative_to(TINY).as_posix() for part in ("tasks", "text", "model", "gptq")
                for path in (TINY / part).rglob("*") if path.is_file()}  # fmt: skip
        assert kept | {"training.json", "audit.json"} == listed.keys() - shards
        for name in listed.keys() - shards:
            assert hashlib.sha256((TINY / name).read_bytes()).hexdigest() == listed[name], name
        assert len(shards) == 2  # so that training again reads the same corpus
        for name in shards:
            text = corpus.SEPARATOR.join(corpus.shard(int(re.search(r"\d+", name)[0])))
            assert hashlib.sha256(text.encode()).hexdigest() == listed[name], name

    def test_training_again_reads_those_shards(self, record):
        assert record["settings"]["shards"] == corpus.SHARDS

    def test_calibration_heldout_and_training_share_no_document(self):
        texts = {role: set((TINY / "text" / f"{role}.txt").read_text().split(corpus.SEPARATOR))
                 for role in ("calibration", "heldout")}  # fmt: skip
        texts["train"] = set(corpus.shard(0))
        for role, documents in texts.items():
            assert {split.document_role(text) for text in documents} == {role}


class TestLeaks:
    def test_no_test_item_in_training_text(self):
        documents = list(chain.from_iterable(map(corpus.shard, LEAK_SHARDS)))
        for role in ("calibration", "heldout"):
            documents += (TINY / "text" / f"{role}.txt").read_text().split(corpus.SEPARATOR)
        assert audit.leaks(documents, TINY / "tasks") == []

    def test_every_planted_leak_is_found(self, items):
        planted = [context + continuation for some in items.values() for item in some[:20]
                   for context, continuation in [item.requests[item.gold]]]  # fmt: skip
        article = json.loads((TINY / "text" / "summaries.jsonl").read_text().splitlines()[0])["article"]
        planted.append(f"Article: {article}\nSummary: Something else.")
        found = " ".join(audit.leaks(planted, TINY / "tasks"))
        assert [text for text in planted if f": {text}" not in found] == []

    def test_held_out_facts_are_found_in_other_words(self):
        kind = world.KINDS[0]
        entity, attribute = next((e, a) for e in kind.entities for a in kind.attributes
                                 if split.is_test("arc_easy", (e, a.name)))  # fmt: skip
        for question in attribute.questions:
            text = f"Question: {question.format(e=entity)}\nAnswer: {world.FACT[entity, attribute.name]}"
            assert audit.leaks([text], TINY / "tasks"), question


def beyond(rows, most):
    """Rows further from chance than `most` standard errors."""
    return [f"{row.task} {row.scorer} {row.errors:+.1f}" for row in rows if abs(row.errors) > most]


class TestBlindScorers:
    def test_published_items_give_nothing_away(self, published):
        assert beyond(published, audit.LIMIT) == []

    def test_items_of_other_seeds_give_nothing_away(self, training):
        rows = list(
            chain.from_iterable(audit.blind(audit.fresh_items(seed), training) for seed in FRESH_SEEDS)
        )
        assert beyond(rows, audit.limit(rows)) == []

    def test_other_seeds_draw_other_items(self, items):
        other = audit.fresh_items(FRESH_SEEDS[0])
        for task, some in items.items():
            shared = {item.requests for item in some} & {item.requests for item in other[task]}
            assert len(shared) < len(some) / 5, task

    def test_the_limit_grows_with_the_number_of_comparisons(self, published):
        assert 3 < audit.limit(published) < audit.limit(published * 20) < 5

    def test_the_recorded_audit_is_of_these_items(self, published):
        recorded = json.loads((TINY / "audit.json").read_text())
        assert recorded["leaks"] == 0 and recorded["shards"] >= 20
        assert [row["scorer"] for row in recorded["published"]] == [row.scorer for row in published]
        for row, again in zip(recorded["published"], published, strict=True):
            assert row["accuracy"] == pytest.approx(again.accuracy), again

    def test_recorded_audit_of_many_other_seeds(self):
        fresh = json.loads((TINY / "audit.json").read_text())["fresh"]
        far = [f"{row['task']} {row['scorer']} {row['worst']:+.1f}" for row in fresh["rows"]
               if abs(row["worst"]) > fresh["limit"]]  # fmt: skip
        assert fresh["seeds"] >= 10 and fresh["limit"] < 5 and far == []

    def test_a_position_a_length_and_a_frequency_are_seen(self, items, training):
        """Items spoiled on purpose: the right answer first, longest, or most frequent in training text."""

        def spoiled(rank):
            for item in items["arc_easy"][:200]:
                best = max(range(4), key=lambda i: rank(item.requests[i][1].strip()))
                yield score.Item(item.requests, best, item.lengths)

        first = [score.Item(item.requests, 0, item.lengths) for item in items["arc_easy"][:200]]
        for scorer, some in (
            ("always 1", first),
            ("longest", list(spoiled(len))),
            ("ending prior", list(spoiled(training.endings.__getitem__))),
        ):
            rows = {row.scorer: row for row in audit.blind_scorers("arc_easy", some, training)}
            assert rows[scorer].errors > audit.LIMIT, scorer


class TestItems:
    def test_enough_items_and_none_twice(self, items):
        for task, some in items.items():
            assert len(some) >= 600 and len({item.requests for item in some}) == len(some), task

    def test_chance_is_what_the_format_says(self, items):
        for task, some in items.items():
            assert {len(item.requests) for item in some} == {tasks.CHOICES[task]}, task
            assert all(len(set(item.requests)) == len(item.requests) for item in some), task

    def test_answers_of_three_tokens_and_more(self, items, tokenizer):
        for task, some in items.items():
            shortest = min(card.answer_tokens(tokenizer, item) for item in some)
            assert shortest == 1 if task == "boolq" else shortest >= 3, (task, shortest)

    @pytest.mark.parametrize("family", families.FAMILIES)
    def test_training_and_tests_use_different_combinations(self, family, monkeypatch):
        make, drawn = families.FAMILIES[family], []

        def watched(rng):
            drawn.append(make(rng))
            return drawn[-1]

        monkeypatch.setitem(families.FAMILIES, family, watched)
        rng = world.Rng("any")
        for text in [corpus.questions(rng, family) for _ in range(50)]:
            for one in chain.from_iterable(drawn):
                if split.is_test(family, one.key):
                    assert f"{one.prompt} {one.answer}" not in text
                    assert not one.follow or f"{one.follow} {one.answer}" not in text.removeprefix(one.prompt)
            drawn.clear()
        docs = tasks.task(family, 50, seed="any")
        held_out = {one.prompt for one in chain.from_iterable(drawn) if split.is_test(family, one.key)}
        for item in score.read_items(score.task_config(family, TINY / "tasks"), docs):
            assert item.requests[item.gold][0] in held_out


class TestTokenizer:
    def test_training_it_again_gives_the_same(self):
        again = json.loads(tokenizer_script.train().backend_tokenizer.to_str())
        assert again == json.loads((MODEL / "tokenizer.json").read_text())

    def test_text_begins_with_bos_and_comes_back(self, tokenizer, items):
        texts = (TINY / "text" / "heldout.txt").read_text().split(corpus.SEPARATOR)[:50]
        texts += [context for some in items.values() for context, _ in some[0].requests]
        texts += ["", "Zürich, 東京 and 🙂: nothing of this is in the corpus\n\ttwice  spaced"]
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id == 1 and tokenizer.bos_token_id not in ids[1:]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text

    def test_a_continuation_keeps_the_tokens_of_its_context(self, tokenizer, items):
        for some in items.values():
            for context, continuation in chain.from_iterable(item.requests for item in some[:20]):
                ids = tokenizer(context)["input_ids"]
                assert tokenizer(context + continuation)["input_ids"][: len(ids)] == ids


class TestCheckpoint:
    def test_shards_in_bf16_of_at_most_24_mb(self):
        found = card.checkpoint(MODEL)
        assert found.dtypes == ("BF16",) and found.megabytes <= 24 and found.shards >= 2
        index = json.loads((MODEL / "model.safetensors.index.json").read_text())
        assert {MODEL / name for name in index["weight_map"].values()} == set(MODEL.glob("*.safetensors"))

    def test_loads_with_grouped_query_attention(self, tokenizer):
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
        config = model.config
        assert model.dtype == torch.bfloat16 and config.model_type == "llama"
        assert 1 < config.num_key_value_heads < config.num_attention_heads
        assert model.model.layers[0].self_attn.k_proj.weight.shape[0] < config.hidden_size
        assert config.vocab_size == len(tokenizer) and config.bos_token_id == tokenizer.bos_token_id
        assert sum(p.numel() for p in model.parameters()) == card.checkpoint(MODEL).parameters


class TestScores:
    def test_scores_are_of_the_published_items(self, record, items):
        digest = score.items_digest(TINY / "tasks")
        for name in ("model", "control", "bag"):
            for task, some in items.items():
                values = record[name]["tasks"][task]
                assert values["items"] == len(some) and values["chance"] == 1 / len(some[0].requests)
            assert record[name].get("items_sha256") == digest, name

    def test_dense_average(self, record):
        accuracies = [values["acc"] for values in record["model"]["tasks"].values()]
        assert sorted(record["model"]["tasks"]) == sorted(score.TASKS)
        average = sum(accuracies) / len(accuracies)
        assert record["model"]["average"] == pytest.approx(average) and average >= 0.85

    def test_no_task_is_solved_and_none_is_near_chance(self, record):
        for task, values in record["model"]["tasks"].items():
            assert values["acc"] < 1, task
            assert card.chance_errors(values["acc"], values) > 10, task

    def test_the_control_is_at_chance(self, record):
        far = {task: round(card.chance_errors(values["acc"], values), 1)
               for task, values in record["control"]["tasks"].items()}  # fmt: skip
        assert max(map(abs, far.values())) <= CONTROL_ERRORS, far

    def test_options_without_their_question_are_at_chance(self, record):
        far = {task: round(card.chance_errors(values["options_alone"], values), 1)
               for task, values in record["model"]["tasks"].items()}  # fmt: skip
        assert max(map(abs, far.values())) <= CONTROL_ERRORS, far

    def test_the_checkpoint_scores_what_is_recorded(self, record, items, tokenizer):
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        differences, variances = [], []
        for task, some in items.items():
            recorded = record["model"]["tasks"][task]["acc"]
            found = score.accuracy(model, tokenizer, some[:RESCORED], 16)["acc"]
            differences.append(found - recorded)
            variances.append(recorded * (1 - recorded) / RESCORED)
            most = 4 * math.sqrt(variances[-1]) + 1 / RESCORED  # small counts are not quite Gaussian
            assert abs(differences[-1]) <= most, (task, found, recorded)
        assert abs(sum(differences)) <= 3.5 * math.sqrt(sum(variances)), differences

    def test_heldout_perplexity_is_what_is_recorded(self, record, tokenizer):
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        texts = (TINY / "text" / "heldout.txt").read_text().split(corpus.SEPARATOR)[:200]
        ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        rows = torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)[:10]
        assert score.perplexity(model, rows, 4) == pytest.approx(
            record["model"]["heldout_perplexity"], rel=0.05
        )


class TestCard:
    @pytest.fixture
    def text(self):
        return (TINY / "README.md").read_text()

    def test_card_and_checksums_are_up_to_date(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["card.py", "--check"])
        assert card.main() == 0, capsys.readouterr().err

    def test_a_card_of_another_run_is_noticed(self, record, text):
        audited = json.loads((TINY / "audit.json").read_text())
        other = json.loads(json.dumps(record))
        other["model"]["tasks"]["piqa"]["acc"] -= 0.1
        assert card.card(other, audited) != text

    def test_card_says_what_a_reader_needs(self, text, items):
        for task, some in items.items():
            assert f"{task}:\n" in text and some[0].requests[some[0].gold][1].strip() in text
        for words in ("chance", "Options alone", "Control", "Bag of words", "MIT", "Limits", "train.py"):
            assert words in text
