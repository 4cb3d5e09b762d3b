"""Table 1: the grid that a plan asks for, the differences that it leaves behind, and the words that read them."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import small_checkpoint

from rsparse import models, paper
from rsparse.exhibits import comparison, comparison_reading, paired
from rsparse.exhibits.comparison import Plan
from rsparse.methods import METHODS
from rsparse.results import Table
from rsparse.study import DENSE, Setting, Sources, Study

PLAN = dict(
    methods=["relufication", "cats", "griffin", "teal", "r-sparse"], sparsities=[0.25, 0.6],
    operating_points=["cats 0.22", "r-sparse 0.4"], rho=0.9, threshold="static", seeds=[0, 1],
)  # fmt: skip


@pytest.fixture(scope="module")
def table_1(tmp_path_factory):
    """(study, plan, settings out of reach, rows) of a small Table 1 with two seeds."""
    folder = small_checkpoint.save(tmp_path_factory.mktemp("checkpoint"))
    sources = Sources(str(folder), "made-up", **small_checkpoint.SMALL_SOURCES)
    study, plan = Study(sources, Table("table-1", "preset", tmp_path_factory.mktemp("table-1"))), Plan(**PLAN)
    missing = comparison.measure(study, plan)
    return study, plan, missing, study.table.finish(0, vars(sources) | vars(plan))


def test_the_grid_is_what_the_plan_names():
    plan = Plan(**PLAN)
    assert [(x.method, x.sparsity, x.score) for x in plan.matched()][:5] == [
        ("cats", 0.25, "magnitude"), ("griffin", 0.25, "magnitude"), ("teal", 0.25, "magnitude"),
        ("r-sparse", 0.25, "magnitude"), ("r-sparse", 0.25, "column-norm"),
    ]  # fmt: skip
    assert [(x.method, x.sparsity) for x in plan.operating()] == [
        ("cats", 0.22), ("r-sparse", 0.4), ("relufication", 0.0)
    ]  # fmt: skip
    assert {x.scope for x in plan.matched() if x.method in ("cats", "griffin")} == {"mlp"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": ["teal"]}, "expected r-sparse"),
        ({"methods": []}, "expected some of each"),
        ({"methods": ["r-sparse", "magic"]}, "method is 'magic'"),
        ({"sparsities": [0.0]}, "dense is measured anyway"),
        ({"sparsities": [1.5]}, "sparsity is 1.5"),
        ({"operating_points": ["cats"]}, "operating point is 'cats'"),
        ({"operating_points": ["dogs 0.5"]}, "method is 'dogs'"),
        ({"seeds": ["0"]}, "whole numbers"),
        ({"threshold": "top"}, "threshold is 'top'"),
    ],
)
def test_a_plan_that_is_not_allowed_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Plan(**PLAN | change)


def test_what_is_out_of_reach_is_named_and_has_no_row(table_1):
    _, _, missing, rows = table_1
    assert [(x.method, x.sparsity) for x in missing] == [("cats", 0.6)]
    assert not ((rows["method"] == "cats") & (rows["sparsity"] == 0.6)).any()
    assert comparison_reading.unreached(missing, "m") == "On `m`, CATS cannot reach 60%: there it has no row."
    assert "reaches every budget" in comparison_reading.unreached([], "m")


def test_differences_are_paired_and_averaged_over_seeds(table_1):
    study, plan, _, rows = table_1
    row = rows[(rows["method"] == "cats") & (rows["against"] == "r-sparse 0.4")
               & (rows["metric"] == "diff_perplexity_log")].iloc[0]  # fmt: skip
    pair = plan.setting("cats", 0.22), plan.setting("r-sparse", 0.4)
    runs = [[study.losses(x, seed) for seed in (0, 1)] for x in pair]
    mean = [[sum(pair) / 2 for pair in zip(*both, strict=True)] for both in runs]
    assert row["value"] == pytest.approx(sum(a - b for a, b in zip(*mean, strict=True)) / 3)
    assert row["low"] < row["value"] < row["high"] and row["seed"] == "0/1" and row["n"] == 3


def test_every_setting_is_set_against_dense_and_those_at_its_budget_against_r_sparse(table_1):
    rows = table_1[3]
    found = rows[rows["metric"] == "diff_margin"].groupby("against")[["method", "sparsity"]].agg(list)
    against = {name: set(zip(*cells, strict=True)) for name, *cells in found.itertuples()}
    assert against["dense"] == {
        ("cats", 0.22), ("cats", 0.25), ("griffin", 0.25), ("griffin", 0.6), ("teal", 0.25), ("teal", 0.6),
        ("r-sparse", 0.25), ("r-sparse", 0.4), ("r-sparse", 0.6),
    } | {x for x in against["dense"] if x[0] == "relufication"}  # fmt: skip
    assert against["r-sparse"] >= {("cats", 0.25), ("griffin", 0.6), ("teal", 0.6), ("r-sparse", 0.6)}
    assert against["r-sparse 0.4"] == {("cats", 0.22)}
    column_norm = rows[(rows["against"] == "r-sparse") & (rows["method"] == "r-sparse")]
    assert set(column_norm["score"]) == {"column-norm"}


def test_the_tables_are_complete(table_1):
    rows = table_1[3]
    found = comparison_reading.summary(rows)
    assert found["method"].tolist()[:2] == ["dense", "ReLUfication"] and found["asked"].tolist()[:2] == ["0%", ""]
    assert found[found["asked"] == "25%"]["method"].tolist() == [
        "CATS", "GRIFFIN", "uniform TEAL", "R-Sparse", "column-norm R-Sparse"
    ]  # fmt: skip
    assert "nominal (%)" not in found, "no method here has an accounting of its own"
    planned = found[found["asked"] == "25%"]["planned (%)"]
    assert ((planned >= 25) & (planned < 28)).all()
    assert math.isnan(found["planned (%)"][1]) and 0 < found["realised (%)"][1] < 60
    tasks = comparison_reading.by_task(rows, 0.25)
    assert tasks.columns.tolist() == ["method", *comparison_reading.TASKS, "average"]
    assert tasks["average"].tolist() == pytest.approx(tasks[list(comparison_reading.TASKS)].mean(axis=1).tolist())
    assert comparison_reading.budgets(rows) == [0.25, 0.4, 0.6]


def test_influenced_has_a_column_where_methods_differ_in_it(table_1):
    rows = table_1[3]
    tasks = rows["task"] == "average"
    assert not any("influenced" in name for name in comparison_reading.summary(rows.assign(influenced=1.0)))
    some = rows.assign(influenced=rows["influenced"].where((rows["method"] != "griffin") | tasks, 0.5))
    found = comparison_reading.summary(some).set_index("method")
    assert [name for name in found if "influenced" in name] == ["influenced, text (%)"]
    assert found.loc["GRIFFIN", "influenced, text (%)"].tolist() == [50.0, 50.0]


def test_the_papers_operating_points_and_pairs(table_1):
    rows = table_1[3]
    points = comparison_reading.points(rows)
    assert points[["method", "asked"]].to_numpy().tolist() == [
        ["dense", "0%"], ["ReLUfication", ""], ["CATS", "22%"], ["R-Sparse", "40%"]
    ]  # fmt: skip
    pairs = comparison_reading.pairs(rows)
    (title,) = pairs.columns[1:]
    assert title == "R-Sparse 40% − CATS 22%" and len(pairs) == len(comparison_reading.TASKS) + 3
    row = rows[(rows["against"] == "r-sparse 0.4") & (rows["metric"] == "diff_perplexity_log")].iloc[0]
    turned = f"{-row['value']:+.4f} [{-row['high']:+.4f}, {-row['low']:+.4f}]"
    assert pairs[title].iloc[-1].removesuffix(" *") == turned, "turned round"
    assert comparison_reading.pairs(rows[rows["against"] != "r-sparse 0.4"]).empty


def test_what_a_method_adds_stands_at_its_sparsity(table_1):
    rows = table_1[3]
    found = comparison_reading.added(rows)
    free = found[found["method"] == "relufication"]["sparsity"].unique()
    realised = rows.loc[(rows["method"] == "relufication") & rows["against"].isna(), "realised"].unique()
    assert len(free) == 1 and free == pytest.approx(realised)
    assert {"r-sparse", "r-sparse (column-norm)"} <= set(found["method"]) and found["panel"].nunique() == 2


def test_names_and_sparse_linears_are_those_of_the_methods():
    assert set(comparison_reading.NAMES) == {*METHODS, "r-sparse (column-norm)"}
    for name, method in METHODS.items():
        kinds = method.touches(method.scope)
        said = "all linears" if len(kinds) == len(models.KINDS) else ", ".join(x for x in models.KINDS if x in kinds)
        assert comparison_reading.SPARSE[name] == said, name


def test_the_papers_headline_in_words():
    rows = pd.DataFrame(
        [("r-sparse", 0.5, "dense", -0.004), ("griffin", 0.5, "dense", -0.2), ("griffin", 0.5, "r-sparse", -0.19),
         ("cats", 0.4, "r-sparse", 0.001)],
        columns=["method", "sparsity", "against", "value"],
    )  # fmt: skip
    rows = rows.assign(task="average", metric="diff_acc", score="magnitude", low=rows["value"] - 0.01)
    rows = rows.assign(high=rows["value"] + 0.01)
    assert comparison_reading.headline(rows, "m") == (
        "Average accuracy on `m`, minus that of dense, in points with 95% intervals: R-Sparse at 50% -0.40 [-1.40, "
        "+0.60]; GRIFFIN at 50% -20.00 [-21.00, -19.00]. At the same bytes R-Sparse is ahead of GRIFFIN at 50% (+19.00 "
        "[+18.00, +20.00]), and not told apart from CATS at 40% (-0.10 [-1.10, +0.90])."
    )
    assert "None of" in comparison_reading.headline(rows.iloc[:0], "m")


def test_a_method_is_set_against_its_own_papers_baseline(tmp_path):
    folder = small_checkpoint.save(tmp_path / "checkpoint")
    sources = Sources(str(folder), "made-up", **small_checkpoint.SMALL_SOURCES)
    study = Study(sources, Table("table-1", "preset", tmp_path / "table-1"))
    asked = dict(methods=["teal", "wina", "r-sparse"], sparsities=[0.5], operating_points=[], threshold="per-token")
    comparison.measure(study, Plan(**PLAN | asked | {"seeds": [0]}))
    frame = study.table.frame
    assert set(frame.loc[frame["method"] == "wina", "against"].dropna()) == {"dense", "r-sparse", "teal"}
    found = comparison_reading.baselines(frame)
    assert found[["asked", "method", "minus"]].to_numpy().tolist() == [["50%", "WINA", "uniform TEAL"]]
    assert comparison_reading.baselines(frame[frame["method"] != "wina"]).empty


def test_settings_know_their_methods_scope_and_whether_they_are_calibrated():
    assert Setting("griffin", 0.3).scope == "mlp" and Setting("griffin", 0.3, scope="all").scope == "all"
    assert Setting("cats", 0.3, scope="all").canonical == Setting("cats", 0.3).canonical
    assert Setting("griffin", 0.3, scope="all").canonical != Setting("griffin", 0.3).canonical
    assert Setting("larosa", 0.3, threshold="per-token").calibrated and not Setting("griffin", 0.3).calibrated
    assert Setting("griffin", 0.3).seeds([3, 4]) == [3] and Setting("chess", 0.3).seeds([3, 4]) == [3, 4]
    assert Setting("relufication").columns()["sparsity"] is None and DENSE.columns()["sparsity"] == 0.0


def test_reach_needs_no_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("loaded"))
    study = Study(Sources("random:llama-3-8b", "shape"), Table("table-1", "preset", tmp_path))
    assert study.reaches(Setting("cats", 0.53)) and not study.reaches(Setting("cats", 0.54))
    assert study.reaches(Setting("griffin", 0.8)) and not study.reaches(Setting("griffin", 0.81))
    assert study.reaches(Setting("teal", 0.99)) and not study.reaches(Setting("teal", 0.2, scope="attention"))


def test_a_sibling_shares_the_model_and_measures_with_its_own_calibration(table_1):
    study, plan, _, _ = table_1
    few = study.sibling(samples=1)
    setting = plan.setting("teal", 0.6)
    before = study.losses(setting)
    study.bench.applied = None
    assert few.model is study.model and few.table is study.table
    other = few.losses(setting)
    assert other != before, "another calibration, other thresholds"
    assert study.apply(setting.canonical, 0) and study._losses_all.tolist() == before


def difference_rows(cells) -> pd.DataFrame:
    return pd.DataFrame([
        {"method": method, "score": "magnitude", "sparsity": 0.4, "against": "r-sparse", "task": "heldout",
         "metric": "diff_perplexity_log", "value": (low + high) / 2, "low": low, "high": high}
        for method, low, high in cells
    ])  # fmt: skip


def test_the_reading_tells_better_from_worse_and_from_neither():
    rows = difference_rows([("cats", 0.1, 0.2), ("wina", -0.2, -0.1), ("teal", -0.1, 0.1)])
    assert comparison_reading.reading(rows, "m", "loss") == (
        "By held-out loss, at the same bytes on `m`: WINA is better than R-Sparse at some budget and worse at none; "
        "CATS is worse than R-Sparse at some budget and better at none; uniform TEAL is never told apart from R-Sparse."
    )
    margins = rows.assign(task="average", metric="diff_margin")
    assert "CATS is better than R-Sparse at some" in comparison_reading.reading(margins, "m", "margin")
    turned = rows[:1].assign(sparsity=0.5, value=-0.15, low=-0.2, high=-0.1)
    both = pd.concat([rows[:1], turned])
    assert "CATS is better at some budget and worse at another." in comparison_reading.reading(both, "m", "loss")
    assert "No method" in comparison_reading.reading(rows.iloc[:0], "m")
    shown = comparison_reading.differences(rows, "r-sparse")
    assert shown["loss (nats/token)"].tolist() == [
        "+0.1500 [+0.1000, +0.2000] *", "+0.0000 [-0.1000, +0.1000]", "-0.1500 [-0.2000, -0.1000] *"
    ]  # fmt: skip


def test_the_evidence_stands_side_by_side_and_by_metric():
    found = comparison_reading.evidence(paper.reported(exhibit="table-1"))
    row = found[(found["model"] == "Llama-2-7B") & (found["method"] == "R-Sparse") & (found["sparsity"] == "40%")]
    assert row[["r-sparse, acc", "wina, acc or acc_norm"]].iloc[0].tolist() == [65.00, 68.34]
    cats = found[(found["cats, acc"].notna()) & (found["sparsity"] != "0%")]
    assert (cats["of"] != "model").all(), "CATS' paper counts neurons"


def test_the_papers_own_cells_are_quoted_with_ranges_and_daggers():
    found = comparison_reading.quoted(paper.reported(exhibit="table-1")).set_index(["model", "method", "sparsity"])
    assert found.loc[("Llama-2-7B", "R-Sparse", "50%"), ["boolq", "piqa", "average"]].tolist() == [
        "72.84", "77.31 †", "64.06"
    ]  # fmt: skip
    assert found.loc[("several", "ReLUfication (no retraining)", ""), "average"] == "32 to 35"
    assert found.loc[("Llama-2-7B", "CATS", "22%"), "boolq"] == ""


def test_an_arm_of_the_dense_model_is_measured_under_one_rule(table_1):
    study = table_1[0]
    assert paired.of(study, DENSE, -0.5, -0.5) == paired.of(study, DENSE)
    assert paired.of(study, Setting("teal", 0.5), -0.5).tokens == -0.5
