"""Table 4: what is searched and compared on a small model, and what the rows say in words."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import small_checkpoint

from rsparse import claims, estimate, paper, predicates
from rsparse.exhibits import adaptive, adaptive_reading, search_cost_reading
from rsparse.files import write_json
from rsparse.paths import Checkout
from rsparse.predicates import Context
from rsparse.results import Table
from rsparse.study import Sources, Study

LEAST = dict(
    sparsities=[0.5, 0.7], seeds=[0, 1], searchers=["evolution", "random"], rho=0.95, step=0.5, groups=2, population=4,
    generations=1, mutation=0.5, crossover=0.5, initial="scattered", form="steps", samples=2, length=32,
    sensitivity=[1], sources=[], transfer=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sparsities": []}, "sparsities are"),
        ({"sparsities": [0]}, "sparsity is 0"),
        ({"seeds": ["0"]}, "whole numbers"),
        ({"searchers": ["random", "evolution"]}, "evolution first"),
        ({"searchers": ["evolution", "luck"]}, "then of"),
        ({"samples": 1}, "samples is 1"),
        ({"sensitivity": [0]}, "sensitivity is"),
        ({"sources": ["nowhere"]}, "nowhere"),
        ({"population": 3}, "population is 3"),
        ({"step": 0.3}, "step is 0.3"),
        ({"groups": 0}, "groups is 0"),
        ({"rho": 2.0}, "rho"),
    ],
)
def test_a_plan_that_is_not_allowed_is_refused_whole(change, said):
    with pytest.raises(ValueError, match=said):
        adaptive.Plan(**LEAST | change)


# On a small model


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(study, plan, rows)."""
    folder = small_checkpoint.save(tmp_path_factory.mktemp("checkpoint"))
    sources = Sources(str(folder), "made-up", **small_checkpoint.SMALL_SOURCES)
    made = Study(sources, Table("table-4", "preset", tmp_path_factory.mktemp("table-4")))
    plan = adaptive.Plan(**LEAST)
    adaptive.measure(made, plan)
    adaptive.vary(made, plan)
    return made, plan, made.table.finish(0, {})


def test_every_search_is_compared_with_both_uniform_recipes_and_with_chance(measured):
    _, _, rows = measured
    found = adaptive_reading.differences(rows)
    pairs = found[["sparsity", "searcher", "against"]].drop_duplicates().to_numpy().tolist()
    wanted = [("evolution", "best uniform"), ("evolution", "uniform 0.95"), ("random", "best uniform"),
              ("random", "uniform 0.95"), ("evolution", "random")]  # fmt: skip
    assert pairs == [[s, *pair] for s in (0.5, 0.7) for pair in wanted]
    assert set(found["measure"]) == set(adaptive_reading.MEASURES) and set(found["seeds"]) == {2}
    assert (found["least"] <= found["value"] + 1e-12).all() and (found["value"] <= found["most"] + 1e-12).all()


def test_the_difference_is_that_of_the_perplexities_in_the_table(measured):
    _, _, rows = measured
    searches = adaptive_reading.own_searches(rows)
    own = searches[(searches["sparsity"] == 0.7) & (searches["seed"] == 1)].set_index("searcher")["recipe"]
    heldout = rows[(rows["task"] == "heldout") & (rows["metric"] == "perplexity") & (rows["sparsity"] == 0.7)]
    heldout = heldout[heldout["seed"] == 1].set_index("recipe")["value"]
    between = rows[(rows["against"] == "random") & (rows["task"] == "heldout") & (rows["sparsity"] == 0.7)]
    (value,) = between.loc[between["seed"] == "1", "value"]
    assert value == pytest.approx(math.log(heldout[own["evolution"]] / heldout[own["random"]]))


def test_the_table_has_every_recipe_at_every_budget(measured):
    _, _, rows = measured
    table = adaptive_reading.summary(rows)
    assert table["sparsity"].tolist() == ["0%"] + ["50%"] * 5 + ["70%"] * 5
    assert table["recipe"].str.split(" \\(").str[0].tolist() == [
        "dense", *["best uniform", "uniform, rho 0.95", "uniform, rho 1", "evolution", "random"] * 2
    ]  # fmt: skip
    assert (table["perplexity, held-out"] != "").all() and (table["accuracy of eight (%)"] != "").all()
    assert table["seeds"].tolist() == [1] + [2] * 10


def test_recipes_that_saw_other_texts_have_other_names(measured):
    _, _, rows = measured
    heldout = rows[(rows["task"] == "heldout") & (rows["metric"] == "perplexity")]
    assert not heldout.duplicated(["recipe", "rho", "method", "sparsity", "seed"]).any()


def test_text_and_budget_vary(measured):
    _, _, rows = measured
    texts, budgets = adaptive_reading.sensitivity(rows), adaptive_reading.transfer(rows)
    assert adaptive_reading.variation_labels(texts) == ["1 sample of tiny", "2 samples of tiny"]
    labels = adaptive_reading.variation_labels(budgets)
    assert sorted(labels) == ["found at 50%, used at 70%", "found at 70%, used at 50%"]
    assert adaptive_reading.variation_table(texts).shape == adaptive_reading.variation_table(budgets).shape == (2, 3)
    assert "of 2 (" in adaptive_reading.variation_reading(texts, "m")


def test_traces_and_recipes_are_those_of_the_searches(measured):
    made, plan, rows = measured
    traces, recipes = adaptive.traces(made, plan), adaptive.recipes(made, plan)
    searches = adaptive_reading.own_searches(rows)
    searches = searches[searches["searcher"] != "uniform"].set_index(["sparsity", "searcher", "seed"])
    counts = traces.groupby(["sparsity", "searcher", "seed"]).size()
    assert counts.to_dict() == searches["evaluations"].to_dict() and len(counts) == 8
    assert set(traces["group"]) == {0, 1}
    assert (recipes.groupby(["sparsity", "searcher", "seed"]).size() == 14).all()
    assert set(recipes["layer"]) == {0, 1} and set(recipes["rho"]) <= {0.0, 0.5, 1.0}
    assert adaptive_reading.linears_per_group(recipes, plan.groups) == 7
    assert not list(made.table.folder.glob("search-*")), "the evaluations of finished searches are kept in the table"


def test_a_finished_search_is_read_back_without_the_weights(measured, monkeypatch):
    made, plan, rows = measured
    again = Study(made.sources, Table("table-4", "preset", made.table.folder))

    def load(*_):
        raise AssertionError("loads the model")

    monkeypatch.setattr("rsparse.models.load_model", load)
    adaptive.measure(again, plan)
    adaptive.vary(again, plan)
    assert again.table.frame.shape == rows.shape
    assert len(adaptive.recipes(again, plan)) == 8 * 14


def test_the_authors_list_where_it_fits(measured, tmp_path):
    made, _, _ = measured
    path = tmp_path / "list.npy"
    path.write_text(" ".join("1.0 0.5 0.25 0.5".split() * 7))
    found = adaptive.released(made, str(path))
    assert found["rho"].tolist() == [1.0, 0.25] * 7 and found["linear"].tolist()[:3] == ["q", "k", "v"]
    assert adaptive_reading.maps(found.assign(sparsity=0.5, searcher="random"), found)["panel"].unique().tolist() == [
        "the authors' list"
    ]
    quoted = paper.reported(exhibit="table-4")
    quoted = quoted[quoted["where"] == "released recipe"]
    assert "7 of 14 rho are exactly 1" in adaptive_reading.released_reading(found, str(path), quoted, "m")
    path.write_text("1.0 0.5")
    none = adaptive.released(made, str(path))
    assert none.empty and "does not fit `m`" in adaptive_reading.released_reading(none, str(path), quoted, "m")
    assert "no clone" in adaptive_reading.released_reading(adaptive.released(made, ""), "", quoted, "m")


def test_the_claims_find_their_rows(measured):
    _, _, rows = measured
    known = claims.load()
    context = Context("table-4", {"table-4": rows}, lambda _: 0.0, known.prefer)
    found = adaptive_reading.differences(rows)
    for name, against in (("search-beats-best-uniform", "best uniform"), ("search-beats-chance", "random")):
        claim = next(x for x in known.claims if x.id == name)
        part = found[(found["against"] == against) & (found["searcher"] == "evolution")]
        gain = part.loc[part["measure"] == "held-out loss", "value"].mean()
        assert predicates.estimate(claim.ours, context).value == pytest.approx(-gain)
        assert predicates.decide(claim.predicate, context).state != predicates.MISSING
    claim = next(x for x in known.claims if x.id == "adaptive-beats-uniform")
    part = claim.predicate["all"][0]["left"]
    four = found[(found["against"] == "uniform 0.95") & (found["searcher"] == "evolution") & (found["sparsity"] == 0.5)]
    gain = four.loc[four["measure"] == "accuracy of four", ["value", "low", "high"]].to_numpy()[0] / 100
    estimate = predicates.estimate(part, context)
    assert [estimate.value, *estimate.bounds()] == pytest.approx(gain), "of the mean over seeds, not of single ones"


# In words


def made_up(value: float, searched: float, seeds: tuple[float, ...] = ()) -> pd.DataFrame:
    """Rows of one budget: losses saved by evolution, `value` on held-out text and `searched` on its own."""
    search = {"method": "r-sparse", "sparsity": 0.5, "task": "search", "metric": "perplexity", "seed": "0",
              "search_samples": 4, "search_text": "t"}  # fmt: skip
    rows = [search | {"searcher": "uniform", "recipe": "uniform-0.9", "value": 2.0},
            search | {"searcher": "evolution", "recipe": "e", "value": 2 * math.exp(-searched)}]  # fmt: skip
    base = {"method": "r-sparse", "sparsity": 0.5, "against": "best uniform", "searcher": "evolution",
            "task": "heldout", "metric": "diff_perplexity_log"}  # fmt: skip
    wide = {"low": -value - 0.01, "high": -value + 0.01}
    rows += [base | wide | {"value": -x, "seed": str(i)} for i, x in enumerate(seeds or (value,))]
    return pd.DataFrame(rows + ([base | wide | {"value": -value, "seed": "0/1"}] if seeds else []))


@pytest.mark.parametrize(
    ("value", "searched", "seeds", "said"),
    [
        (0.05, 0.06, (), "the gain carries over"),
        (0.05, 0.06, (0.11, -0.01), "not every seed's recipe"),
        (-0.05, 0.06, (), "which is overfitting"),
        (-0.001, 0.06, (), "nothing of it is seen elsewhere; likely"),
        (0.005, 0.06, (), "less than half of it"),
        (0.005, 0.006, (), "at least half of it"),
        (0.0, 0.0, (), "the search found nothing"),
    ],
)
def test_whether_a_gain_carries_over(value, searched, seeds, said):
    found = adaptive_reading.carried(made_up(value, searched, seeds))
    assert found["searched"].tolist() == pytest.approx([searched])
    words = adaptive_reading.carried_reading(found, "m")
    assert f"at 50%, {searched:+.4f} on the text it searched" in words and said in words
    assert ("over 2 seeds -0.0100 to +0.1100" in words) == bool(seeds)


def test_without_searches_there_is_nothing_to_say():
    rows = made_up(0.1, 0.1).iloc[:0]
    assert "nothing was searched" in adaptive_reading.carried_reading(adaptive_reading.carried(rows), "m")
    assert "no search" in adaptive_reading.conclusion(rows, "m")


def test_the_conclusion_names_what_evolution_is_compared_with():
    said = adaptive_reading.conclusion(made_up(0.05, 0.06), "m")
    assert said.endswith("- against the best uniform rho of the same grid, by held-out loss, better at 50%.")


def test_convergence_adds_the_groups_up_and_counts_no_candidate_twice():
    trace = pd.DataFrame({
        "sparsity": 0.5, "searcher": "evolution", "seed": 0, "group": [0, 0, 0, 1, 1],
        "cost": [1.0, 1.0, 0.0, 0.5, 0.5], "loss": [2.0, 1.5, 2.5, 7.0, 6.9],
    })  # fmt: skip
    other = trace.assign(searcher="random", loss=[2.0, 1.9, 1.9, 7.0, 7.0])
    lines = adaptive_reading.convergence(pd.concat([trace, other], ignore_index=True))
    own = lines[lines["searcher"] == "evolution"]
    assert own["gain"].tolist() == pytest.approx([0.0, 0.5, 0.5, 0.5, 0.6])
    assert own["evaluations"].tolist() == [1, 2, 2, 3, 4] and own["passes"].tolist() == [1, 2, 2, 2.5, 3]
    said = adaptive_reading.convergence_reading(lines, "m")
    assert "evolution gains 0.6000 nats per token with 4 evaluations (3 full passes)" in said
    assert said.endswith("Evolution ends ahead of random search in 1 of 1 searches.")


def test_recipes_of_several_seeds_in_words():
    linears = pd.DataFrame({"layer": [0, 0], "linear": ["q", "k"]})
    found = pd.concat([linears.assign(rho=rhos, seed=seed) for seed, rhos in ((0, [1.0, 0.5]), (1, [1.0, 0.9]))])
    said = adaptive_reading.recipe_reading(found.assign(sparsity=0.5, searcher="evolution"), "m", 0.1)
    assert said.endswith(
        "at 50%, 50% of the linears get rho 1, and the mean is 0.850; 2 seeds agree within one grid step on 50% of the "
        "linears."
    )


def planted_rows(shares: dict[int, float], false: float = 0.0) -> pd.DataFrame:
    cells = [(size, *x) for size, share in shares.items() for x in (("recovered_share", share), ("false_share", false))]
    rows = pd.DataFrame(cells, columns=["group_size", "metric", "value"])
    low, high = (rows["value"] - 0.1).clip(lower=0), (rows["value"] + 0.1).clip(upper=1)
    rows = rows.assign(task="planted-search", searcher="evolution", low=low, high=high, n=40)
    return adaptive_reading.recovery(rows)


def test_the_planted_control_in_words():
    found = planted_rows({28: 0.4, 1: 1.0, 2: 0.95, 14: 0.92, 4: 0.5})
    assert adaptive_reading.recovery_reading(found) == (
        "Of the planted rho, evolution finds at least 90% in groups of up to 2, and 40% in groups of 28. Where nothing "
        "was planted, no search gave a rho other than 1."
    )
    assert "of every size tried. Where nothing was planted, at most 20%" in adaptive_reading.recovery_reading(
        planted_rows({1: 1.0, 2: 1.0}, 0.2)
    )
    assert "in groups of no size tried" in adaptive_reading.recovery_reading(planted_rows({1: 0.1}))
    table = adaptive_reading.recovery_table(found)
    assert table.loc[0].tolist() == ["evolution", 28, 40, "40 [30, 50]", "0 [0, 10]"]


@pytest.mark.parametrize(
    ("linears", "said"),
    [(14, "would have seen it"), (20, "a coarse recipe"), (2, "would have seen it"), (40, "a coarse recipe")],
)
def test_what_groups_as_large_as_the_models_resolve(linears, said):
    found = planted_rows({2: 0.95, 14: 0.92, 28: 0.4})
    assert said in adaptive_reading.resolved(found, linears)
    assert "says nothing of larger ones" in adaptive_reading.resolved(planted_rows({2: 1.0}), linears + 1)


def test_what_the_journal_keeps_is_json(measured):
    made, _, _ = measured
    lines = (made.table.folder / "table-4.jsonl").read_text().splitlines()
    searches = [x for x in map(json.loads, lines[1:]) if x["rows"][0]["task"] == "search"]
    assert len(searches) == 2 * 2 * 3 + 2 * 2, "three searches for every budget and seed, two for another text"
    for search in searches:
        assert len(search["items"]["rho"]) == len(search["items"]["linear"]) == 14
        assert np.isfinite(search["items"]["loss"]).all()
        assert {"what", "seconds", "tokens", "sparsity"} <= set(search["costs"][-1])


# What a search costs


def test_what_a_search_costs_in_words(tmp_path):
    costs = estimate.search_costs()
    assert {x["shape"] for x in costs} == {"llama-2-7b", "llama-3-8b"}
    for cost in costs:
        assert cost["mean_share"] <= cost["bound"] + 0.05 and cost["groups"] >= 8
        assert cost["mean_share"] == pytest.approx(np.mean(cost["candidate_s"]) / cost["full_pass_s"])
    table = search_cost_reading.table(costs)
    assert len(table) == 4 and (table["A6000, projected (h)"] > 6 * table["measured (h)"]).all()
    assert table["paper (h)"].notna().tolist() == [True, True, False, False], "said of Llama-2-7B alone"
    assert search_cost_reading.reading(costs[1:]).endswith("per group.")
    assert "no A6000 was used" in search_cost_reading.caption(costs)
    cost = costs[0] | {"device": "NVIDIA H200", "hours_per_group": 0.1, "hours_in_total": 0.01}
    assert search_cost_reading.reading([cost]).endswith("its 1 h is more than either.")
    assert search_cost_reading.reading([cost | {"hours_per_group": 0.3}]).endswith("its 1 h lies between the two.")
    longer = cost | {"hours_in_total": 0.3, "hours_per_group": 0.4}
    assert search_cost_reading.reading([longer]).endswith("its 1 h is less than either.")
    assert estimate.search_costs(Checkout(tmp_path)) == []


@pytest.mark.parametrize(("device", "hours", "hour", "elsewhere"), [
    ("NVIDIA H100 80GB HBM3", (0.1, 0.4), "not measured", "control passed"),
    ("NVIDIA H100 80GB HBM3", (0.4, 2.0), "not measured", "undecided"),
    ("NVIDIA H100 80GB HBM3", (1.2, 6.0), "not measured", "control failed"),
    ("NVIDIA H200", (0.1, 0.4), "not measured", "control passed"),
    ("Tesla T4", (1.2, 6.0), "not measured", "not measured"),
    ("NVIDIA RTX A6000", (0.1, 0.9), "analogue holds", "not measured"),
    ("NVIDIA RTX A6000", (0.4, 2.5), "undecided", "not measured"),
    ("NVIDIA RTX A6000", (1.6, 9.0), "analogue does not hold", "not measured"),
])  # fmt: skip
def test_an_hour_on_an_a6000_is_judged_on_an_a6000_alone(tmp_path, device, hours, hour, elsewhere):
    low, high = hours
    cost = estimate.search_costs()[0] | {"device": device, "hours_in_total": low, "hours_per_group": high}
    write_json(tmp_path / estimate.SEARCH_COSTS / "cost.json", cost)
    found = {(x.claim.id, x.preset): x for x in claims.evaluate(tmp_path)}
    assert {preset for _, preset in found} == {"h200"}
    assert found["search-one-hour", "h200"].verdict == hour
    other = found["search-hour-on-faster-gpus", "h200"]
    assert other.verdict == elsewhere and other.devices == (() if elsewhere == "not measured" else (device,))
    assert "95%" not in other.reason + found["search-one-hour", "h200"].reason, "a range is no interval"


def test_an_hour_elsewhere_is_judged_device_by_device(tmp_path):
    for device, high in (("NVIDIA H200", 0.4), ("NVIDIA H100 80GB HBM3", 1.1), ("Tesla T4", 9.0)):
        cost = estimate.search_costs()[0] | {"device": device, "hours_in_total": 0.1, "hours_per_group": high}
        write_json(tmp_path / estimate.SEARCH_COSTS / f"{high}.json", cost)
    (found,) = [x for x in claims.evaluate(tmp_path) if x.claim.id == "search-hour-on-faster-gpus"]
    assert (found.verdict, found.reason) == ("undecided", "holds for 1 of 2"), "a mean over both would pass"
    assert found.ours.value == 1.1 and found.shown_on == ("NVIDIA H100 80GB HBM3",)
    assert found.devices == ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
