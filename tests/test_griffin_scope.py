"""Figure 7: GRIFFIN in both scopes at the same budgets, its paired differences, and what is said of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import small_checkpoint
from scipy import stats

from rsparse import claims, predicates
from rsparse.exhibits import gains, griffin_reading, griffin_scope
from rsparse.exhibits.griffin_scope import Plan
from rsparse.predicates import Context
from rsparse.results import Table
from rsparse.study import DENSE, Setting, Sources, Study


@pytest.mark.parametrize(
    ("sparsities", "seeds", "said"),
    [
        ([], [0], "sparsities are"),
        ([0.5, 0.0], [0], "none of 0"),
        ([1.0], [0], "sparsity is 1.0"),
        (["half"], [0], "sparsity is 'half'"),
        ([0.5], [], "seeds are"),
        ([0.5], ["0"], "whole numbers"),
    ],
)
def test_a_plan_that_is_not_allowed_is_refused_whole(sparsities, seeds, said):
    with pytest.raises(ValueError, match=said):
        Plan(sparsities, seeds)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(study, what was left out, rows); windows are longer than what stays dense in them."""
    folder = small_checkpoint.save(tmp_path_factory.mktemp("checkpoint"))
    sources = Sources(str(folder), "made-up", **small_checkpoint.SMALL_SOURCES | {"window": 96, "summary_tokens": 8})
    made = Study(sources, Table("figure-7", "preset", tmp_path_factory.mktemp("figure-7")))
    left_out = griffin_scope.measure(made, Plan([0.3, 0.5, 0.8], [0, 1]))
    return made, left_out, made.table.finish(0, {})


def test_both_scopes_at_the_budgets_that_both_reach(measured):
    _, left_out, rows = measured
    assert left_out == [Setting("griffin", 0.8, scope="mlp")]
    own = rows[rows["against"].isna() & (rows["metric"] == "perplexity")]
    cells = own[["method", "scope", "sparsity"]].to_numpy().tolist()
    assert cells == [["dense", "all", 0.0], *(["griffin", x, s] for s in (0.3, 0.5) for x in ("mlp", "all"))]
    assert set(own["seed"]) == {0}, "it calibrates nothing"
    assert rows.loc[rows["task"] == "summaries", "tokens"].eq("decode").all()
    said = griffin_reading.left_out([x.sparsity for x in left_out], "m")
    assert said == "Out of reach on the MLP alone of `m`, and left out: 80%."


def test_held_out_windows_are_dense_for_their_first_64_positions(measured):
    made, _, rows = measured
    share = rows[(rows["method"] == "griffin") & (rows["metric"] == "perplexity")]["influenced"]
    assert share.to_numpy() == pytest.approx((96 - 64 - 1) / 95), "the last position scores nothing"
    dense, sparse = (made.losses(x) for x in (DENSE, Setting("griffin", 0.5)))
    assert not np.allclose(dense, sparse)


def test_differences_are_paired_over_the_same_items_and_articles(measured):
    made, _, rows = measured
    settings = [Setting("griffin", 0.5, scope=place) for place in ("mlp", "all")]
    found = rows[(rows["against"] == "scope=all") & (rows["sparsity"] == 0.5)].set_index(["task", "metric"])
    losses = [np.array(made.losses(x)) for x in settings]
    wanted = stats.ttest_rel(*losses).confidence_interval()
    row = found.loc[("heldout", "diff_perplexity_log")]
    assert (row["low"], row["high"]) == pytest.approx((wanted.low, wanted.high)) and row["n"] == 3
    rouge = found.loc[("summaries", "diff_rouge_l")]
    assert rouge["value"] == pytest.approx(np.subtract(*(made.rouge(x) for x in settings)).mean())
    assert (rouge["scope"], rouge["tokens"], rouge["n"]) == ("mlp", "decode", 2)
    means = [made.tasks(x).groupby("task")["margin"].mean().mean() for x in settings]
    assert found.loc[("average", "diff_margin"), "value"] == pytest.approx(means[0] - means[1])


def test_the_claim_finds_its_rows(measured):
    _, _, rows = measured
    known = claims.load()
    claim = next(x for x in known.claims if x.id == "griffin-mlp-only")
    found = predicates.estimate(claim.ours, Context("figure-7", {"figure-7": rows}, lambda _: 0.0, known.prefer))
    part = rows[(rows["against"] == "scope=all") & (rows["metric"] == "diff_acc") & (rows["task"] == "average")]
    assert len(part) == 2 and found.value == pytest.approx(part["value"].mean())


def test_tables_and_curves_have_every_cell(measured):
    _, _, rows = measured
    table = griffin_reading.summary(rows)
    assert table[["sparsity", "GRIFFIN on"]].to_numpy().tolist() == [
        ["0%", ""], ["30%", "MLP alone"], ["30%", "all blocks"], ["50%", "MLP alone"], ["50%", "all blocks"]
    ]  # fmt: skip
    assert not (table.drop(columns="GRIFFIN on") == "").any().any()
    curves = griffin_reading.curves(rows)
    assert list(dict.fromkeys(curves["line"])) == ["dense", "MLP alone", "all blocks"]
    found = griffin_reading.differences(rows)
    means = griffin_reading.averages(rows)
    assert griffin_reading.table(found).shape == (2, 5) and griffin_reading.table(found, means).shape == (3, 5)
    assert griffin_reading.table(found[found["sparsity"] == 0.3], means).shape == (1, 5), "the mean of one is itself"
    assert griffin_reading.panels(found)["label"].tolist() == ["sparsity 30%"] * 4 + ["sparsity 50%"] * 4


def test_the_averages_are_what_the_scorecard_decides_by(measured):
    _, _, rows = measured
    known = claims.load()
    found = griffin_reading.averages(rows).set_index("measure")
    ids = {"accuracy": "griffin-mlp-only", "margin": "griffin-mlp-only-margin",
           "held-out loss": "griffin-mlp-only-perplexity", "ROUGE-L": "griffin-mlp-only-summaries"}  # fmt: skip
    for measure, name in ids.items():
        claim = next(x for x in known.claims if x.id == name)
        ours = predicates.estimate(claim.ours, Context("figure-7", {"figure-7": rows}, lambda _: 0.0, known.prefer))
        factor = gains.MEASURES[measure].factor
        assert found.loc[measure, "value"] == pytest.approx(factor * ours.value)
        assert found.loc[measure, ["low", "high"]].tolist() == pytest.approx(sorted(factor * x for x in ours.bounds()))
    said = griffin_reading.conclusion(rows, "m")
    assert said.startswith("Averaged over 30% and 50%, GRIFFIN on the MLP alone of `m` is ")
    assert "no budget" in griffin_reading.conclusion(rows.iloc[:0], "m")


@pytest.mark.parametrize(("value", "said"), [(100.0, "word for word"), (40.0, "reaches 40.00% ROUGE-L.")])
def test_what_rouge_starts_from(value, said):
    row = {"method": "dense", "metric": "rouge_l", "against": None, "value": value}
    assert said in griffin_reading.dense_summaries(pd.DataFrame([row]), "m")
    assert "No summaries" in griffin_reading.dense_summaries(pd.DataFrame([row]).iloc[:0], "m")


def test_the_verdict_in_words():
    lines = [
        ("average", "diff_acc", 0.3, 0.01, 0.02), ("average", "diff_acc", 0.5, -0.01, 0.02),
        ("heldout", "diff_perplexity_log", 0.3, 0.1, 0.2), ("summaries", "diff_rouge_l", 0.3, 1.0, 2.0),
    ]  # fmt: skip
    rows = pd.DataFrame(lines, columns=["task", "metric", "sparsity", "low", "high"])
    rows = rows.assign(method="griffin", scope="mlp", against="scope=all", value=rows[["low", "high"]].mean(axis=1))
    assert griffin_reading.reading(griffin_reading.differences(rows), "m") == (
        "GRIFFIN on the MLP alone of `m`, against all blocks at the same budget, is: by accuracy, better at 30%, not "
        "told apart at 50%; by held-out loss, worse at 30%; by ROUGE-L, better at 30%."
    )
    assert "at no budget" in griffin_reading.reading(griffin_reading.differences(rows.iloc[:0]), "m")
