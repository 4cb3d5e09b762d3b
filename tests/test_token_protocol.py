"""Which tokens are sparse, and other choices: every rule measured as named, and each choice one change away."""

from __future__ import annotations

import pytest
import small_checkpoint

import rsparse
from rsparse import models
from rsparse.exhibits import token_protocol, token_reading
from rsparse.exhibits.token_protocol import RULES, Plan
from rsparse.recipe import Recipe
from rsparse.results import Table
from rsparse.study import Sources, Study

PLAN = dict(
    methods=["r-sparse", "teal"], sparsity=0.5, rho=0.9, rules=["all", "R-Sparse's code"], choices=True, seeds=[0]
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(study, plan, rows) of the whole exhibit on a two-layer model."""
    folder = small_checkpoint.save(tmp_path_factory.mktemp("checkpoint"))
    sources = Sources(str(folder), "made-up", **small_checkpoint.SMALL_SOURCES)
    study, plan = Study(sources, Table("token-protocol", "preset", tmp_path_factory.mktemp("results"))), Plan(**PLAN)
    token_protocol.compare_rules(study, plan)
    token_protocol.compare_choices(study, plan)
    return study, plan, study.table.finish(0, vars(sources) | vars(plan))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rules": ["some"]}, "rule is 'some'"),
        ({"methods": []}, "expected some of each"),
        ({"methods": ["magic"]}, "method is 'magic'"),
        ({"sparsity": 0}, "sparsity is 0"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"seeds": [0.5]}, "whole numbers"),
    ],
)
def test_a_plan_that_is_not_allowed_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Plan(**PLAN | change)


def test_the_rules_are_the_published_codes():
    assert (RULES["R-Sparse's code"], RULES["TEAL's code"], RULES["WINA's code"]) == (0.9, -0.5, -0.99)
    assert RULES["GRIFFIN's code, classification"] == -1 and RULES["LaRoSA's and CATS' code"] == "all"


def test_a_rule_decides_how_much_is_scored_sparse(measured):
    study, plan, rows = measured
    found = token_reading.rules(rows).set_index(["method", "rule"])
    assert list(found.index) == [(m, r) for m in PLAN["methods"] for r in ("scored", "all", "R-Sparse's code")]
    influenced = found.loc["teal", "influenced, tasks (%)"]
    assert influenced["scored"] == influenced["all"] == 100 and 0 < influenced["R-Sparse's code"] < 100
    assert found.loc[("teal", "R-Sparse's code"), "tokens"] == "0.9"
    scored = 100 * study.tasks(plan.setting("teal"), 0, 0.9).groupby("task")["acc"].mean().mean()
    assert found.loc[("teal", "R-Sparse's code"), "accuracy (%)"] == pytest.approx(scored)
    text = study.losses(plan.setting("teal"), 0, 0.9)
    assert found.loc[("teal", "R-Sparse's code"), "influenced, text (%)"] < 15 and len(text) == 3


def test_differences_from_dense_and_from_the_headline_name_their_rule(measured):
    rows = measured[2]
    part = rows[rows["rule"].notna() & (rows["metric"] == "diff_margin") & (rows["task"] == "average")]
    assert set(zip(part["method"], part["rule"], part["against"], strict=True)) == {
        (method, rule, against)
        for method in PLAN["methods"]
        for rule, against in [("scored", "dense"), ("all", "dense"), ("R-Sparse's code", "dense"),
                              ("all", "tokens=scored"), ("R-Sparse's code", "tokens=scored")]
    }  # fmt: skip
    shown = token_reading.rule_differences(rows, "diff_acc", "teal")
    assert shown["label"].tolist() == ["scored", "all", "R-Sparse's code"]
    assert token_reading.rules_reading(rows, "m").startswith("The same sparse model, r-sparse on `m`, would be")


def test_every_choice_is_one_change_from_the_headline(measured):
    study, plan, rows = measured
    arms = token_protocol.choices(study, plan)
    part = rows[rows["choice"].notna() & (rows["metric"] == "diff_perplexity_log")].set_index("choice")
    assert list(part.index) == list(arms) and set(part["against"]) == {"headline"}
    assert part.loc["score with column norms", "score"] == "column-norm"
    assert part.loc["exact top channels per token", "threshold"] == "per-token"
    assert part.loc["calibrated on 1 x 512 tokens", "calibration"] == "tiny 1x512"
    assert part.loc["k and v budgeted as square", "recipe"] == "square-kv-0.9"
    assert part.loc["all of the authors' code, its tokens", "tokens"] == "0.9"
    ours, theirs = study.losses(plan.setting()), arms["exact top channels per token"].losses([0])
    assert part.loc["exact top channels per token", "value"] == pytest.approx(
        sum(a - b for a, b in zip(theirs, ours, strict=True)) / 3
    )
    assert token_reading.choice_table(rows)["choice"].tolist() == list(arms)
    assert token_reading.choices_reading(rows, "m").startswith("Of the choices, on `m`: ")


def test_a_rerun_measures_nothing_and_loads_no_model(measured, monkeypatch):
    study, plan, rows = measured
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("loaded"))
    again = Study(study.sources, Table("token-protocol", "preset", study.table.folder))
    token_protocol.compare_rules(again, plan)
    token_protocol.compare_choices(again, plan)
    assert len(again.table.frame) == len(rows)


def test_k_and_v_as_square_get_the_channels_and_ranks_of_a_square_linear(build, ids):
    model = build()  # k and v are 16 x 64
    recipe = Recipe.square_kv(model, 0.5, 0.75)
    lines = {x.kind: x for x in rsparse.sparsify(model, recipe=recipe, calibration=ids).linears[:7]}
    assert lines["q"].rank == lines["k"].rank == lines["v"].rank == 4  # floor(0.25 x 0.5 x 64 / 2)
    assert lines["k"].kept == 24, "rho C n channels"
    assert lines["k"].read > 0.5 >= lines["q"].read
    same = Recipe.square_kv(build(num_key_value_heads=8), 0.5, 0.75)
    assert {ask.sparsity for ask in same.linears.values()} == {0.5}, "square already"



