"""One checkpoint, setting by setting: complete rows, right against direct calls, and never computed twice."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pandas as pd
import pytest
import small_checkpoint
import torch
from scipy import stats

import rsparse
from rsparse import evaluate, harness, models, results, study, texts
from rsparse.decompose import FactorStore
from rsparse.results import COLUMNS, Table
from rsparse.study import DENSE, FOUR, Setting, Sources, Study, paired_rows, task_rows

TEAL = Setting("teal", 0.5)
R_SPARSE = Setting("r-sparse", 0.5, 0.75, "column-norm")
EMPTY_FOR_DENSE = {"recipe", "rho", "score", "threshold", "calibration"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = small_checkpoint.save(tmp_path_factory.mktemp("checkpoint"))
    return Sources(str(folder), "made-up", **small_checkpoint.SMALL_SOURCES)


@pytest.fixture(scope="module")
def measured(sources, tmp_path_factory):
    """Everything of three settings, and of one with a second seed: (study, its folder)."""
    folder = tmp_path_factory.mktemp("results")
    made = Study(sources, Table("exhibit", "preset", folder))
    made.bench.store = FactorStore(tmp_path_factory.mktemp("factors"))
    for setting in (DENSE, TEAL, R_SPARSE):
        everything(made, setting)
    made.losses(TEAL, seed=1)
    return made, folder


def everything(made: Study, setting: Setting) -> tuple:
    return made.tasks(setting), made.losses(setting), made.rouge(setting)


def rows_of(made: Study, setting: Setting, seed: int = 0) -> pd.DataFrame:
    frame = made.table.frame
    return frame[(frame["method"] == setting.method) & (frame["seed"] == seed)]


def test_every_measurement_says_what_it_realised_itself(measured):
    """Over the sparse positions that it fed: none of the prompt's where it wrote summaries, scored ones on tasks."""
    made, _ = measured
    rows = rows_of(made, TEAL)
    text = rows[(rows["metric"] == "perplexity")]
    assert text["realised_here"].item() == text["realised"].item() and set(rows_of(made, DENSE)["realised_here"]) == {0}
    here = {task: part["realised_here"].unique() for task, part in rows[rows["task"] != "heldout"].groupby("task")}
    assert {len(values) for values in here.values()} == {1}
    made.apply(TEAL, 0)
    with rsparse.apply.counting(made.model) as counted, rsparse.apply.tokens_as(made.model, "scored"):
        s = made.sources
        harness.score_tasks(made.model, made.tokenizer, s.suite, s.items, s.batch_size, s.bos)
    assert here["piqa"].item() == here["average"].item() == counted().realised != text["realised"].item()
    assert here["summaries"].item() not in (here["piqa"].item(), text["realised"].item())


def test_the_rows_of_a_setting_are_complete(measured):
    made, _ = measured
    for setting in (DENSE, TEAL, R_SPARSE):
        rows = rows_of(made, setting)
        wanted = {
            (task, metric)
            for task in (*harness.TASKS, "average", "average-4")
            for metric in ("acc", "margin")
        }
        wanted |= {("heldout", "perplexity"), ("summaries", "rouge_l")}
        assert wanted <= set(zip(rows["task"], rows["metric"], strict=True))
        assert not rows.duplicated(["task", "metric"]).any()
        assert rows["bos"].isin([True]).all()
        empty = {name for name in COLUMNS if rows[name].isna().any() or (rows[name] == "").any()}
        assert empty - {"stderr"} == (
            EMPTY_FOR_DENSE if setting == DENSE else {"recipe"} if setting == TEAL else set()
        )
        heldout = rows[rows["metric"] == "perplexity"].iloc[0]
        assert (heldout["tokens"], heldout["n"]) == ("all", 3)
        assert set(rows.loc[rows["metric"] == "acc", "tokens"]) == {"scored"}


def test_columns_say_what_was_done(measured):
    made, _ = measured
    row = rows_of(made, R_SPARSE).iloc[0]
    assert (row["rho"], row["score"], row["threshold"], row["recipe"]) == (
        0.75,
        "column-norm",
        "static",
        "uniform",
    )
    assert (row["calibration"], row["bos"], row["dtype"], row["model"]) == (
        "tiny 2x48",
        True,
        "float32",
        "made-up",
    )
    assert row["sparsity"] == 0.5 <= row["planned"]
    assert rows_of(made, TEAL).iloc[0][["rho", "score"]].tolist() == [1.0, "magnitude"]
    dense = rows_of(made, DENSE).iloc[0]
    assert (dense["sparsity"], dense["planned"], dense["realised"], dense["influenced"]) == (0, 0, 0, 0)


def test_numbers_are_those_of_direct_calls(measured, sources):
    made, _ = measured
    model, tokenizer = models.load_model(sources.checkpoint), models.load_tokenizer(sources.checkpoint)
    calibration = texts.token_ids("tiny", "calibration", tokenizer, 2, 48, 0)
    heldout = texts.token_ids("tiny", "heldout", tokenizer, 3, 40, 0)
    rsparse.sparsify(model, "r-sparse", 0.5, 0.75, "column-norm", tokens="all", calibration=calibration)
    rows = rows_of(made, R_SPARSE).set_index(["task", "metric"])

    found = rows.loc[("heldout", "perplexity")]
    losses = evaluate.token_losses(model, heldout).mean(1)
    assert made.losses(R_SPARSE) == losses.tolist()
    assert found["value"] == pytest.approx(rsparse.perplexity(model, heldout), rel=1e-12)
    assert found["stderr"] == pytest.approx(found["value"] * losses.std().item() / math.sqrt(3), rel=1e-9)
    assert found["realised"] == pytest.approx(rsparse.measure(model, heldout[:, :-1]).realised, abs=1e-12)
    assert found["influenced"] == 1

    report = model._rsparse.report
    rsparse.restore(model)
    again = rsparse.sparsify(
        model, "r-sparse", 0.5, 0.75, "column-norm", tokens="scored", calibration=calibration
    )
    assert again.planned == report.planned == found["planned"]
    items, influenced, _, _ = harness.score_tasks(model, tokenizer, "tiny", 2, 8, True)
    pd.testing.assert_frame_equal(made.tasks(R_SPARSE), items, check_dtype=False)
    boolq = items[items["task"] == "boolq"]
    assert rows.loc[("boolq", "margin"), "value"] == pytest.approx(boolq["margin"].mean())
    assert rows.loc[("boolq", "margin"), "influenced"] == influenced
    assert rows.loc[("boolq", "acc"), "n"] == 2


def test_a_seed_picks_the_calibration_and_not_the_held_out_text(measured):
    made, _ = measured
    assert made.losses(TEAL, seed=1) != made.losses(TEAL)
    assert not torch.equal(made.calibration(0).ids, made.calibration(1).ids)
    assert made.losses(TEAL, seed=0) == made.losses(TEAL)
    assert Setting("teal", 0.5).seeds([3, 4]) == [3, 4]
    for single in (DENSE, Setting("low-rank", 0.5), Setting("r-sparse", 0.5, threshold="per-token")):
        assert single.seeds([3, 4]) == [3]


def test_what_is_kept_is_not_computed_again_nor_the_model_loaded(measured, sources, monkeypatch):
    made, folder = measured
    shutil.copytree(folder, other := folder.parent / "copy")
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(models, "load_tokenizer", lambda *_: pytest.fail("the tokenizer was loaded"))
    again = Study(sources, Table("exhibit", "preset", other))
    for setting in (DENSE, TEAL, R_SPARSE):
        tasks, losses, rouge = everything(again, setting)
        pd.testing.assert_frame_equal(tasks, made.tasks(setting))
        assert losses == made.losses(setting) and rouge == made.rouge(setting)
    kept = made.table.frame[lambda x: x["seed"] == 0].reset_index(drop=True)
    pd.testing.assert_frame_equal(again.table.frame, kept)


@pytest.mark.parametrize(
    "change", [{"windows": 2}, {"window": 41}, {"context": 3}, {"checkpoint": "tiny"}, {"samples": 3}]
)
def test_other_sources_are_measured_anew(measured, sources, change, monkeypatch):
    _, folder = measured
    monkeypatch.setattr(study.models, "load_model", lambda *_: (_ for _ in ()).throw(LookupError))
    with pytest.raises(LookupError):
        other = Sources(**vars(sources) | change)
        Study(other, Table("exhibit", "preset", folder)).losses(TEAL)
    with pytest.raises(LookupError):
        Study(sources, Table("exhibit", "preset", folder), seed=5).losses(TEAL, seed=0)


def test_a_checkpoint_that_changed_under_its_name_is_measured_anew(sources, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(sources.checkpoint, folder)
    same = Sources(**vars(sources) | {"checkpoint": str(folder)})
    first = Study(same, Table("exhibit", "preset", tmp_path / "run")).losses(DENSE)
    model = models.load_model(str(folder))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    model.save_pretrained(folder)
    assert Study(same, Table("exhibit", "preset", tmp_path / "run")).losses(DENSE) != first


def test_one_sparse_model_is_measured_once_under_all_its_names(measured, monkeypatch):
    made, _ = measured
    monkeypatch.setattr(study, "sparsify", lambda *_, **__: pytest.fail("measured again"))
    twin = Setting("r-sparse", 0.5, 1.0)
    assert made.losses(twin) == made.losses(TEAL)
    names = made.table.frame.query("metric == 'perplexity' and sparsity == 0.5")[["method", "rho"]]
    assert names.to_numpy().tolist().count(["r-sparse", 1.0]) == 1
    assert Setting("r-sparse", 0.5, 0.0, threshold="per-token").canonical == Setting("low-rank", 0.5)
    assert Setting("dense", 0.5, 0.3, "column-norm").canonical == DENSE
    for own in (R_SPARSE, Setting("r-sparse", 0.5, 1.0, "column-norm"), Setting("teal", 0.5, threshold="per-token")):
        assert own.canonical == own


def test_exhibits_share_what_does_not_depend_on_summaries(measured, sources, monkeypatch):
    made, folder = measured
    shutil.copytree(folder, folder.parent / "run" / "exhibit")
    other = Sources(**vars(sources) | {"articles": 1})
    again = Study(other, Table("another", "preset", folder.parent / "run" / "another"))
    monkeypatch.setattr(study, "sparsify", lambda *_, **__: pytest.fail("measured again"))
    assert again.losses(TEAL) == made.losses(TEAL)
    with pytest.raises(pytest.fail.Exception):
        again.rouge(TEAL)


def test_costs_say_what_every_measurement_fed(measured):
    made, folder = measured
    groups = results.read_journal(folder / "exhibit.jsonl").values()
    costs = pd.DataFrame([cost for group in groups for cost in group["costs"]])
    assert costs.groupby("what").size().to_dict() == {
        "calibrate": 4, "factors of calibrate": 14, "heldout": 4, "summaries": 3, "tasks": 3,
    }  # fmt: skip
    assert (costs["seconds"] > 0).all()
    tokens = costs.groupby("what")["tokens"].max()
    assert (tokens["calibrate"], tokens["heldout"], tokens["summaries"]) == (2 * 48, 3 * 40, 2 * 4)
    assert costs.query("what == 'calibrate'")["tokens"].tolist() == [0, 96, 96, 96], "nothing to calibrate in dense"
    assert costs.query("what == 'factors of calibrate'")["m"].isin([64, 16, 176]).all()


def items(values: dict[str, list[float]], metric: str = "acc") -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"task": task, "item": i, metric: value}
            for task, found in values.items()
            for i, value in enumerate(found)
        ]
    )


def test_averages_weigh_the_tasks_equally():
    random = np.random.default_rng(0)
    values = {task: random.random(3 + i).tolist() for i, task in enumerate(harness.TASKS)}
    frame = items(values).assign(acc_norm=math.nan, margin=0.0)
    rows = pd.DataFrame(task_rows(frame, {"seed": 0})).query("metric == 'acc'").set_index("task")
    for name, tasks in (("average", harness.TASKS), ("average-4", FOUR)):
        means = [np.mean(values[task]) for task in tasks]
        errors = [stats.sem(values[task]) for task in tasks]
        assert rows.loc[name, "value"] == pytest.approx(np.mean(means))
        assert rows.loc[name, "stderr"] == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / len(tasks))
        assert rows.loc[name, "n"] == sum(len(values[task]) for task in tasks)
    some = task_rows(frame[frame["task"].isin(FOUR)], {})
    assert "average" not in {row["task"] for row in some} and "average-4" in {row["task"] for row in some}
    assert "acc_norm" not in {row["metric"] for row in some}


def test_paired_rows_equal_the_textbook():
    a = {"winogrande": [1.0, 0.0, 1.0, 1.0], "piqa": [0.5, 0.25, 0.75]}
    b = {"winogrande": [0.0, 0.0, 1.0, 0.0], "piqa": [0.5, 0.5, 0.25]}
    shuffled = items(b).sample(frac=1, random_state=1)
    rows = {row["task"]: row for row in paired_rows(items(a), shuffled, ["acc"], {"against": "teal"})}
    assert set(rows) == set(a), "an average needs all of its tasks"
    for task in a:
        test = stats.ttest_rel(a[task], b[task]).confidence_interval(0.95)
        assert rows[task]["value"] == pytest.approx(np.mean(a[task]) - np.mean(b[task]))
        assert (rows[task]["low"], rows[task]["high"]) == pytest.approx((test.low, test.high))
        assert (rows[task]["n"], rows[task]["metric"], rows[task]["against"]) == (
            len(a[task]),
            "diff_acc",
            "teal",
        )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "tael"}, "method is 'tael'"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": math.nan}, "sparsity is nan"),
        ({"rho": 1.5}, "rho is 1.5"),
        ({"score": "size"}, "score is 'size'"),
        ({"threshold": "fixed"}, "threshold is 'fixed'"),
        ({"scope": "heads"}, "scope is 'heads'"),
    ],
)
def test_a_setting_that_is_not_allowed_is_refused_before_any_work(change, said):
    with pytest.raises(ValueError, match=said):
        Setting(**{"method": "r-sparse", "sparsity": 0.5} | change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"suite": "offical"}, "suite is 'offical'"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"heldout": "wikitext"}, "text is 'wikitext'"),
        ({"summaries": "c4x"}, "text is 'c4x'"),
        ({"items": 0}, "items is 0"),
        ({"windows": 0}, "windows is 0"),
        ({"items": "abc"}, "items is 'abc'; expected a whole number"),
        ({"samples": 2.0}, "samples is 2.0"),
        ({"bos": 1}, "bos is 1; expected True or False"),
        ({"summaries": "c4"}, "text 'c4' has no summaries"),
        ({"device": "cudaa"}, "device is 'cudaa'"),
        ({"context": 600}, "context is 600; expected 0..510"),
        ({"context": -1}, "context is -1"),
    ],
)
def test_sources_that_do_not_exist_are_refused_before_any_work(change, said):
    with pytest.raises(ValueError, match=said):
        Sources("tiny", "tiny", **change)
