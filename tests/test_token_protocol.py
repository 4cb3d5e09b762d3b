"""Which tokens are sparse, and other choices: every rule measured as named, and each choice one change away."""

from __future__ import annotations

import pandas as pd
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
    assert list(found.index) == [(m, r) for m in ("R-Sparse", "TEAL") for r in ("scored", "all", "R-Sparse's code")]
    influenced = found.loc["TEAL", "influenced, tasks (%)"]
    assert influenced["scored"] == influenced["all"] == 100 and 0 < influenced["R-Sparse's code"] < 100
    mine = found.loc[("TEAL", "R-Sparse's code")]
    assert (mine["tokens"], mine["seeds"]) == ("0.9", 1)
    for name in ("planned", "realised"):
        measured_ones = rows[(rows["method"] == "teal") & rows["against"].isna()][name]
        assert mine[f"{name} (%)"] == pytest.approx(100 * measured_ones.mean()), "the same under every rule"
    scored = 100 * study.tasks(plan.setting("teal"), 0, 0.9).groupby("task")["acc"].mean().mean()
    assert mine["accuracy (%)"] == pytest.approx(scored)
    text = study.losses(plan.setting("teal"), 0, 0.9)
    assert mine["influenced, text (%)"] < 15 and len(text) == 3


def test_differences_from_dense_and_from_the_headline_name_their_rule(measured):
    rows = measured[2]
    part = rows[rows["rule"].notna() & (rows["metric"] == "diff_margin") & (rows["task"] == "average")]
    assert set(zip(part["method"], part["rule"], part["against"], strict=True)) == {
        (method, rule, against)
        for method in PLAN["methods"]
        for rule, against in [("scored", "dense"), ("all", "dense"), ("R-Sparse's code", "dense"),
                              ("all", "tokens=scored"), ("R-Sparse's code", "tokens=scored")]
    }  # fmt: skip
    table = token_reading.effects_table(rows)
    assert table[["method", "rule"]].to_numpy().tolist() == [
        [method, rule] for method in ("R-Sparse", "TEAL") for rule in ("all", "R-Sparse's code")
    ]  # fmt: skip
    part = part[(part["method"] == "teal") & (part["rule"] == "all")].set_index("against")
    shown = token_reading.effects(rows, "teal")
    value = shown[(shown["label"] == "all") & (shown["measure"] == "margin")]["value"].item()
    assert value == part.loc["tokens=scored", "value"] != part.loc["dense", "value"]


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
    table = token_reading.choices_table(rows).set_index("choice")
    assert list(table.index) == [token_reading.BASE, *arms] and table.iloc[0, -1] == ""
    apart = token_reading.bytes_reading(rows)
    for name, changed in arms.items():
        one = rows[rows["against"].isna() & (rows["task"] == "heldout") & (rows["metric"] == "perplexity")]
        one = one[one["tokens"] == str(changed.loss_tokens)]
        told = f"*{name}* ({table.loc[name, 'realised (%)']:.1f}%)" in apart
        assert told == (abs(table.loc[name, "realised (%)"] - table["realised (%)"].iloc[0]) > token_reading.APART)
        assert (one["realised"] * 100 - table.loc[name, "realised (%)"]).abs().min() < 1e-9
    assert token_reading.choices_reading(rows, "m").startswith("Of 8 choices made as others make them, these are told")


# In words


def rule_rows(*found: tuple[str, str, str, str, float, float]) -> pd.DataFrame:
    """Differences of R-Sparse: (rule, tokens, against, metric, low, high)."""
    frame = pd.DataFrame(found, columns=["rule", "tokens", "against", "metric", "low", "high"])
    tasks = {"diff_perplexity_log": "heldout"}
    return frame.assign(method="r-sparse", sparsity=0.5, value=frame[["low", "high"]].mean(axis=1),
                        task=[tasks.get(metric, "average") for metric in frame["metric"]])  # fmt: skip


CODE = ("R-Sparse's code", "0.9", "tokens=scored")
ROWS = rule_rows(
    ("all", "all", "tokens=scored", "diff_acc", -0.03, -0.01), (*CODE, "diff_acc", 0.01, 0.03),
    ("LaRoSA's and CATS' code", "all", "tokens=scored", "diff_acc", -0.03, -0.01),
    ("all", "all", "tokens=scored", "diff_perplexity_log", 0, 0), (*CODE, "diff_perplexity_log", -0.02, -0.01),
    ("scored", "scored", "dense", "diff_acc", -0.02, 0.01), ("all", "all", "dense", "diff_acc", -0.05, -0.02),
)  # fmt: skip


def test_a_rule_under_two_names_is_one_rule():
    found = token_reading.effects(ROWS, "r-sparse")
    assert found[found["measure"] == "accuracy"]["label"].tolist() == ["all = LaRoSA's and CATS' code", CODE[0]]
    assert token_reading.effects_table(ROWS)["accuracy (points)"].tolist() == [
        "-2.00 [-3.00, -1.00] *", "+2.00 [+1.00, +3.00] *"
    ]  # fmt: skip


def test_what_the_rule_adds_in_words():
    assert token_reading.rules_reading(ROWS, "m") == (
        "The token rule alone changes what is reported of R-Sparse on `m`. Of 2 rules set against `scored`, by "
        "accuracy, 1 scores better and 1 worse; by held-out loss, 1 scores better. *R-Sparse's code* minus `scored`: "
        "accuracy +2.00 points [+1.00, +3.00], held-out loss +0.0150 nats per token saved [+0.0100, +0.0200]. The same "
        "model minus dense, by accuracy: -3.50 points [-5.00, -2.00] under *all* and -0.50 points [-2.00, +1.00] (not "
        "told from zero) under *scored*."
    )
    still = rule_rows((*CODE, "diff_acc", -0.01, 0.03), (*CODE, "diff_margin", -1, 1))
    assert token_reading.rules_reading(still, "m").startswith(
        "The token rule alone is not seen to change R-Sparse on `m`. Of 1 rule set against `scored`, by accuracy and "
        "margin, none is told apart."
    )
    assert "not measured under several rules" in token_reading.rules_reading(still, "m", "teal")


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.1, 0.3, "worse for"), (-0.3, -0.1, "better for"), (-0.1, 0.3, "no other for")]
)
def test_a_dense_first_position_in_words(low, high, said):
    rows = rule_rows(("decode", "decode", "tokens=scored", "diff_perplexity_log", low, high),
                     ("decode", "decode", "tokens=scored", "diff_acc", 0.1, 0.2))  # fmt: skip
    text = token_reading.dense_start_reading(rows, "m")
    assert said in text and text.endswith("was not tested.") == (said == "worse for")
    assert "did not measure `decode`" in token_reading.dense_start_reading(ROWS, "m")


def test_which_choices_change_anything_in_words():
    rows = rule_rows(("", "scored", "headline", "diff_acc", -0.01, 0.01), ("", "all", "headline", "diff_margin", -1, 1),
                     ("", "all", "headline", "diff_perplexity_log", 0.1, 0.3))  # fmt: skip
    assert token_reading.choices_reading(rows.assign(choice="A choice"), "m") == (
        "Of 1 choices made as others make them, these are told apart from R-Sparse as this book runs it, on `m`: by "
        "accuracy and margin, none; by held-out loss, *A choice* (-0.2000 nats per token saved [-0.3000, -0.1000])."
    )
    assert "changed no choice" in token_reading.choices_reading(rows, "m") and token_reading.choices_table(rows).empty


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



