"""The scope ablation: what is measured within reach, that the parts add up, and what is said of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import small_checkpoint
from scipy import stats

from rsparse import claims, predicates
from rsparse.exhibits import scope, scope_reading
from rsparse.exhibits.scope import Plan
from rsparse.predicates import Context
from rsparse.results import Table
from rsparse.study import Setting, Sources, Study

PLAN = dict(
    methods=["r-sparse", "teal"], sparsities=[0.4], small_sparsities=[0.15], rho=0.8, threshold="static", seeds=[0, 1]
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": ["teal"]}, "expected r-sparse"),
        ({"methods": ["r-sparse", "cats"]}, "at most r-sparse, teal"),
        ({"sparsities": []}, "expected some of the first"),
        ({"sparsities": [0.4, 0.0]}, "none of 0"),
        ({"sparsities": ["half", 0.4]}, "sparsity is 'half'"),
        ({"small_sparsities": [1.0]}, "sparsity is 1.0"),
        ({"rho": 1.0}, "rho is 1.0"),
        ({"rho": 1.5}, "rho is 1.5"),
        ({"threshold": "fixed"}, "threshold is 'fixed'"),
        ({"seeds": []}, "seeds are"),
        ({"seeds": [0.5]}, "whole numbers"),
    ],
)
def test_a_plan_that_is_not_allowed_is_refused_whole(change, said):
    with pytest.raises(ValueError, match=said):
        Plan(**PLAN | change)


def test_every_scope_at_small_budgets_and_rivals_at_the_others():
    found = [(x.method, x.scope, x.sparsity) for x in Plan(**PLAN).grid()]
    scopes = ("all", "attention", "mlp")
    assert found == [
        *(("r-sparse", x, 0.15) for x in scopes), *(("teal", x, 0.15) for x in scopes),
        ("r-sparse", "all", 0.4), ("r-sparse", "mlp", 0.4), ("teal", "all", 0.4), ("teal", "mlp", 0.4),
        ("cats", "mlp", 0.4), ("griffin", "mlp", 0.4),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = small_checkpoint.save(tmp_path_factory.mktemp("checkpoint"))
    return Sources(str(folder), "made-up", **small_checkpoint.SMALL_SOURCES)


@pytest.fixture(scope="module")
def measured(sources, tmp_path_factory):
    """(study, what was left out, rows) of a small ablation whose largest budget only all linears reach."""
    made = Study(sources, Table("scope", "preset", tmp_path_factory.mktemp("scope")))
    plan = Plan(**PLAN | {"methods": ["r-sparse"], "sparsities": [0.4, 0.8], "small_sparsities": [0.15, 0.3]})
    left_out = scope.measure(made, plan)
    return made, left_out, made.table.finish(0, vars(plan))


def test_what_is_out_of_reach_is_left_out_and_returned(measured):
    _, left_out, rows = measured
    # two layers of 64 channels with two key/value heads of eight: attention holds 23.3% of the weights
    assert [(x.method, x.scope, x.sparsity) for x in left_out] == [
        ("r-sparse", "attention", 0.3), ("r-sparse", "mlp", 0.8), ("cats", "mlp", 0.8), ("griffin", "mlp", 0.8)
    ]  # fmt: skip
    own = rows[rows["against"].isna() & (rows["metric"] == "perplexity")]
    assert set(own.loc[own["sparsity"] == 0.8, "scope"]) == {"all"}
    assert set(own.loc[own["sparsity"] == 0.15, "scope"]) == {"all", "mlp", "attention"}
    against = rows[rows["metric"] == "diff_margin"].groupby("sparsity")["against"].agg(set).to_dict()
    assert against == {
        0.15: {"scope=mlp", "scope=attention"}, 0.3: {"scope=mlp"},
        0.4: {"scope=mlp", "cats", "griffin", "method part over cats", "method part over griffin"},
    }  # fmt: skip
    said = scope_reading.left_out(left_out, "m")
    assert said.startswith("Out of reach on `m`, and left out: R-Sparse on attention at 30%; R-Sparse on the MLP at")


@pytest.mark.parametrize("rival", ["cats", "griffin"])
def test_scope_and_method_add_up_to_the_gain(measured, rival):
    _, _, rows = measured
    found = rows[rows["sparsity"] == 0.4].set_index(["scope", "against", "task", "metric"])["value"].sort_index()
    for task, metric in (("average", "diff_acc"), ("sciq", "diff_margin"), ("heldout", "diff_perplexity_log")):
        rows_of = ("all", rival), ("all", "scope=mlp"), ("mlp", rival), ("all", f"method part over {rival}")
        gain, wider, method, parts = (found[place, label, task, metric].item() for place, label in rows_of)
        assert gain == pytest.approx(wider + method, abs=1e-9)
        assert parts == pytest.approx(wider - method, abs=1e-9)
    table = scope_reading.parts(rows, rival)
    assert set(table["measure"]) == {"accuracy", "margin", "held-out loss"} and (table["sparsity"] == 0.4).all()
    loss = table[table["measure"] == "held-out loss"].set_index("part")["value"]
    assert loss["gain"] == pytest.approx(-found["all", rival, "heldout", "diff_perplexity_log"].item())


def test_the_difference_of_the_parts_is_paired_window_by_window(measured):
    made, _, rows = measured

    def losses(method: str, place: str) -> np.ndarray:
        setting = Setting(method, 0.4, 0.8, scope=place)
        return np.mean([made.losses(setting, seed) for seed in (0, 1)], axis=0)

    whole, mlp, rival = losses("r-sparse", "all"), losses("r-sparse", "mlp"), losses("cats", "mlp")
    wanted = stats.ttest_1samp(whole - 2 * mlp + rival, 0).confidence_interval()
    row = rows[(rows["against"] == "method part over cats") & (rows["task"] == "heldout")].iloc[0]
    assert (row["low"], row["high"]) == pytest.approx((wanted.low, wanted.high))
    assert row["n"] == 3 and row["seed"] == "0/1"


@pytest.mark.parametrize(
    ("name", "signs"),
    [
        ("attention-too-helps", {("r-sparse", "all"): 1, ("r-sparse", "mlp"): -1}),
        ("ahead-of-cats-on-the-mlp", {("r-sparse", "mlp"): 1, ("cats", "mlp"): -1}),
        ("more-method-than-scope", {("r-sparse", "all"): 1, ("r-sparse", "mlp"): -2, ("cats", "mlp"): 1}),
    ],
)
def test_the_claims_find_their_rows(measured, name, signs):
    made, _, rows = measured
    known = claims.load()
    claim = next(x for x in known.claims if x.id == name)
    found = predicates.estimate(claim.ours, Context("scope", {"scope": rows}, lambda _: 0.0, known.prefer))
    wanted = 0.0
    for (method, place), sign in signs.items():
        runs = pd.concat(made.tasks(Setting(method, 0.4, 0.8, scope=place), seed) for seed in (0, 1))
        wanted += sign * runs.groupby("task")["acc"].mean().mean()
    assert found.value == pytest.approx(wanted)


def test_the_summary_names_scopes_and_counts_seeds(measured):
    _, _, rows = measured
    found = scope_reading.summary(rows)
    assert found.iloc[0][["sparsity", "method", "scope"]].tolist() == ["0%", "dense", ""]
    part = found[found["sparsity"] == "40%"].set_index(["method", "scope"])
    assert list(part.index) == [
        ("R-Sparse", "all linears"), ("R-Sparse", "the MLP"), ("CATS", "the MLP"), ("GRIFFIN", "the MLP")
    ]  # fmt: skip
    assert part["seeds"].tolist() == [2, 2, 2, 1], "GRIFFIN calibrates nothing"
    assert (part["planned (%)"] >= 40).all() and (part["planned (%)"] < 42).all()
    text = part["influenced, text (%)"]
    assert text[("CATS", "the MLP")] == 100 and text[("GRIFFIN", "the MLP")] == 0, "windows are shorter than its prefix"
    said = scope_reading.ranking(rows, "m")
    assert said.startswith("At 40%, ") and said.count(" on ") == 2, "80% has one setting, which ranks nothing"
    assert "more than one setting" in scope_reading.ranking(rows[rows["sparsity"].isin([0, 0.8])], "m")


def part_rows(*found: tuple[str, str, float, float, float]) -> pd.DataFrame:
    """Rows of R-Sparse at 40%: (scope, against, value, low, high), as margins and, ten times smaller, as losses."""
    same = {"method": "r-sparse", "sparsity": 0.4}
    lines = [
        same | {"scope": place, "against": against, "task": task, "metric": metric}
        | {"value": factor * value, "low": min(factor * low, factor * high), "high": max(factor * low, factor * high)}
        for place, against, value, low, high in found
        for task, metric, factor in (("average", "diff_margin", 1), ("heldout", "diff_perplexity_log", -0.1))
    ]  # fmt: skip
    return pd.DataFrame(lines)


GAIN = ("all", "cats", 0.3, 0.2, 0.4)
SCOPE, METHOD = ("all", "scope=mlp", 0.4, 0.3, 0.5), ("mlp", "cats", -0.1, -0.2, 0.1)
BOTH = ("all", "method part over cats", 0.5, 0.3, 0.7)


def test_the_parts_in_a_table_and_in_words():
    found = scope_reading.parts(part_rows(GAIN, SCOPE, METHOD, BOTH), "cats")
    table = scope_reading.parts_table(found)
    assert table.iloc[0].tolist() == [
        "40%", "margin (nats)", "+0.300 [+0.200, +0.400] *", "+0.400 [+0.300, +0.500] *", "-0.100 [-0.200, +0.100]",
        "+0.500 [+0.300, +0.700] *", "scope",
    ]  # fmt: skip
    assert table.iloc[1]["gain"] == "+0.0300 [+0.0200, +0.0400] *", "a loss that is saved"
    assert scope_reading.parts_reading(found, "cats", "m") == (
        "R-Sparse against CATS on `m`: ahead in all 2 comparisons. Wherever it is ahead, more of the lead is owed to "
        "the scope than to the method."
    )
    assert scope_reading.parts_panels(found)["label"].tolist() == [
        "40%: gain", "40%: gain", "40%: scope part", "40%: scope part", "40%: method part", "40%: method part"
    ]  # fmt: skip


@pytest.mark.parametrize(("low", "high", "said"), [(-0.7, -0.3, "method"), (-0.1, 0.7, "not told apart")])
def test_the_larger_part_is_judged_by_its_interval(low, high, said):
    both = (*BOTH[:2], (low + high) / 2, low, high)
    found = scope_reading.parts(part_rows(GAIN, SCOPE, METHOD, both), "cats")
    assert set(scope_reading.parts_table(found)["larger"]) == {said}
    words = {"method": "owed to the method than to the scope.", "not told apart": "is the larger is not told."}
    assert scope_reading.parts_reading(found, "cats", "m").endswith(words[said])


def test_a_lead_that_is_owed_to_both_and_none_at_all_in_words():
    rows = part_rows(GAIN, SCOPE, METHOD, BOTH)
    loss = (rows["metric"] == "diff_perplexity_log") & (rows["against"] == BOTH[1])
    rows.loc[loss, ["value", "low", "high"]] = [0.05, 0.03, 0.07]  # a loss: the method part is the larger here
    assert scope_reading.parts_reading(scope_reading.parts(rows, "cats"), "cats", "m").endswith(
        "Where it is ahead: the scope part is the larger in 1 of 2 comparisons (margin at 40%), the method part is the "
        "larger in 1 (held-out loss at 40%)."
    )
    rows = part_rows((*GAIN[:2], 0.0, -0.1, 0.1), SCOPE, METHOD, BOTH)
    assert scope_reading.parts_reading(scope_reading.parts(rows, "cats"), "cats", "m") == (
        "R-Sparse against CATS on `m`: not told apart in any of 2 comparisons. There is no lead to split."
    )


def test_budgets_without_every_part_are_not_split():
    rows = part_rows(GAIN, SCOPE)
    assert scope_reading.parts(rows, "cats").empty
    said = scope_reading.parts_reading(scope_reading.parts(rows, "cats"), "cats", "m", "teal")
    assert said == "TEAL against CATS on `m`: at no budget were all parts measured."


def test_the_wider_scope_in_words():
    found = scope_reading.scopes(part_rows(GAIN, SCOPE), "mlp")
    assert scope_reading.scopes_reading(found, "mlp", "m") == (
        "On all linears of `m` instead of the MLP alone, at the same budget: R-Sparse is better in all 2 comparisons."
    )
    assert scope_reading.scopes_panels(found)["label"].tolist() == ["40%: R-Sparse"] * 2
    nothing = scope_reading.scopes(part_rows(GAIN), "attention")
    assert "no budget was measured" in scope_reading.scopes_reading(nothing, "attention", "m")
