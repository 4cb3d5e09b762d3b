"""What each exhibit computes and says: known answers, and the right words for every outcome."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import small_checkpoint
import torch
from scipy import stats

from rsparse.calibrate import MAGNITUDE, Calibration
from rsparse.decompose import FactorStore
from rsparse.exhibits import quality, rank_awareness, rank_reading, score_map
from rsparse.exhibits.rank_awareness import Plan
from rsparse.exhibits.score_map import CONTROLS, ScoreMap
from rsparse.models import KINDS, decoder_linears
from rsparse.results import Table
from rsparse.study import Setting, Sources, Study

PLAN = dict(
    sparsities=[0.4, 0.5], score_sparsities=[0.5], rho=0.9, rhos=[0.0, 0.5], threshold="static", seeds=[0, 1]
)


# Figures 1 and 3


def of_map(S: torch.Tensor) -> ScoreMap:
    return ScoreMap(None, "real", S, torch.ones(len(S)))


def test_shares_of_a_rank_one_matrix_lie_in_its_component():
    S = torch.zeros(10, 20)
    S[3] = torch.arange(20.0)
    shares = of_map(S).shares(0.1, 0.1)
    top = (19**2 + 18**2) / sum(j**2 for j in range(20))
    assert shares == pytest.approx({"components": 1.0, "either": 1.0, "channels": top, "both": top})


def test_shares_of_the_identity_are_counted_one_by_one():
    shares = of_map(torch.eye(20)).shares(0.1, 0.2)
    assert shares["channels"] == pytest.approx(0.1) and shares["components"] == pytest.approx(0.2)
    assert shares["either"] == pytest.approx(0.3 - shares["both"])


def test_a_flat_map_holds_what_the_area_says_sorted_or_not():
    flat = of_map(torch.ones(20, 40))
    assert flat.shares(0.1, 0.1)["both"] == pytest.approx(0.01) == flat.unsorted_share(0.1, 0.1)
    assert flat.shares(0.5, 0.1)["either"] == pytest.approx(0.5 + 0.1 - 0.05)
    assert flat.shares(1.0, 1.0) == pytest.approx(
        dict.fromkeys(("both", "either", "channels", "components"), 1)
    )


def test_sorting_moves_mass_to_the_corner_and_loses_nothing():
    S = torch.rand(12, 30, generator=torch.Generator().manual_seed(0)) ** 4
    made = of_map(S)
    ordered = made.sorted()
    assert torch.equal(ordered.flatten().sort().values, S.flatten().sort().values)
    assert (ordered.sum(0).diff() <= 1e-6).all() and (ordered.sum(1).diff() <= 1e-6).all()
    assert of_map(ordered).unsorted_share(0.2, 0.2) > made.unsorted_share(0.2, 0.2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = small_checkpoint.save(tmp_path_factory.mktemp("checkpoint"))
    return Sources(str(folder), "made-up", **small_checkpoint.SMALL_SOURCES)


def test_controls_keep_what_they_should(build, ids):
    model = build("float32")
    calibration, store = Calibration(model, ids), FactorStore("nowhere")
    calibration.gather([(x, MAGNITUDE) for x in decoder_linears(model)])
    found = {(x.linear.name, x.control): x for x in score_map.score_maps(calibration, 1, store, seed=3)}
    assert len(store.computed) == 2 * len(KINDS), "the shuffled control shares the model's decomposition"
    assert len(found) == len(KINDS) * len(CONTROLS)
    for linear in decoder_linears(model)[7:]:
        W, x = linear.module.weight.detach().double(), calibration.statistics(linear, MAGNITUDE).mean_abs.double()
        _, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        real, gaussian, permuted = (found[linear.name, control].S.double() for control in CONTROLS)
        torch.testing.assert_close(real, sigma[:, None] * Vh.abs() * x, rtol=1e-3, atol=1e-5)
        # over E|x_j|, the squares of a row add up to sigma_i^2: all of them to the norm of W
        for S in (real, gaussian):
            assert (S / x).square().sum().item() == pytest.approx(W.square().sum().item(), rel=1e-3)
        assert not torch.allclose(gaussian, real, rtol=0.1)
        shuffled = (permuted / (sigma[:, None] * Vh.abs())).median(0).values
        torch.testing.assert_close(shuffled.sort().values, x.sort().values, rtol=1e-2, atol=1e-5)
        assert not torch.allclose(shuffled, x, rtol=0.1)


def test_score_map_rows_maps_and_rerun(sources, tmp_path, monkeypatch):
    made = Study(sources, Table("figure-1-3", "preset", tmp_path), seed=2)
    maps = score_map.measure(made, [0, 1], [0.1, 0.5])
    frame = made.table.frame
    assert set(maps) == {
        (k, n, c, o) for k in KINDS for n in (0, 1) for c in CONTROLS for o in ("sorted", "unsorted")
    }
    assert max(map(max, (array.shape for array in maps.values()))) == 64, "down has 176 channels"
    assert maps["k", 0, "real", "sorted"].shape == (16, 64), "k has 16 outputs"
    assert len(frame[frame["metric"] == "stable_rank"]) == 14
    assert set(frame["seed"]) == {2} and frame["value"].between(0, 64).all()
    shares = frame[frame["metric"].str.startswith("share")]
    assert shares["value"].between(0, 1 + 1e-6).all()
    corner = score_map.mean_shares(frame, "share_top10")
    real = frame[(frame["metric"] == "share_top10") & (frame["control"] == "real")]["value"]
    assert corner["real"] == pytest.approx(real.mean()) and corner.index.tolist() == [*CONTROLS, "unsorted"]
    table = score_map.share_table(frame)
    assert table["top share (%)"].tolist() == [10, 50]
    assert table["corner"][0] == pytest.approx(100 * real.mean())
    assert table["either"].tolist() == pytest.approx(
        (table["channels"] + table["components"] - table["corner"]).tolist()
    )
    ranks = score_map.rank_table(frame)
    assert ranks.columns.tolist() == ["layer", *KINDS] and ranks["layer"].tolist() == [0, 1]

    monkeypatch.setattr(score_map, "score_maps", lambda *_: pytest.fail("computed again"))
    again = Study(sources, Table("figure-1-3", "preset", tmp_path), seed=2)
    kept = score_map.measure(again, [0, 1], [0.1, 0.5])
    assert all((kept[key] == maps[key]).all() for key in maps)
    with pytest.raises(pytest.fail.Exception):
        other = Sources(**vars(sources) | {"samples": 1})
        score_map.measure(Study(other, Table("figure-1-3", "preset", tmp_path), seed=2), [0, 1], [0.1, 0.5])


@pytest.mark.parametrize(
    ("layers", "cuts", "said"),
    [([], [0.1], "layers are"), ([2], [0.1], "expected some of 0..1"), ([0], [0], "cut is 0")],
)
def test_layers_and_cuts_that_do_not_exist_are_refused(sources, tmp_path, layers, cuts, said):
    with pytest.raises(ValueError, match=said):
        score_map.measure(Study(sources, Table("figure-1-3", "preset", tmp_path)), layers, cuts)


# Figure 5


def quality_rows(sparsities=(0.3, 0.6), methods=("r-sparse",)) -> pd.DataFrame:
    cells = [("dense", 0.0), *((method, s) for method in methods for s in sparsities)]
    values = {("average", "acc"): 0.8, ("heldout", "perplexity"): 10.0, ("summaries", "rouge_l"): 50.0}
    return pd.DataFrame(
        [
            {"method": method, "sparsity": s, "task": task, "metric": metric, "value": value * (1 - s),
             "stderr": 0.02,
             "planned": s, "realised": s + 0.01, "seed": seed}
            for method, s in cells
            for (task, metric), value in values.items()
            for seed in (0, 1)
        ]
    )  # fmt: skip


def test_the_reading_of_figure_5_takes_the_nearest_sparsity_and_skips_what_is_absent():
    rows = quality_rows()
    assert quality.reading(rows, "m") == (
        "At 60% model-level sparsity, with R-Sparse on `m`: accuracy (%) goes from 80.00 to 32.00; "
        "perplexity goes from 10.00 to 4.00; ROUGE-L (%) goes from 50.00 to 20.00."
    )
    assert "ROUGE" not in quality.reading(rows[rows["task"] != "summaries"], "m")
    assert quality.reading(quality_rows(methods=("teal",)), "m") == "R-Sparse was not measured on `m`."


def test_the_summary_of_figure_5_has_one_row_per_method_and_sparsity():
    found = quality.summary(quality_rows(methods=("teal", "r-sparse")))
    assert found[["method", "sparsity"]].values.tolist() == [
        ["dense", "0%"], ["teal", "30%"], ["teal", "60%"], ["r-sparse", "30%"], ["r-sparse", "60%"]
    ]  # fmt: skip
    last = found.iloc[-1]
    assert last["accuracy (%)"] == "32.00 ± 2.00"
    assert last["planned (%)"] == pytest.approx(60) and last["realised (%)"] == pytest.approx(61)


def test_settings_of_figure_5_leave_out_sparsity_zero():
    found = quality.settings(["teal", "r-sparse"], [0.0, 0.5], 0.9, "per-token")
    assert found[1:] == [
        Setting("teal", 0.5, 0.9, threshold="per-token"),
        Setting("r-sparse", 0.5, 0.9, threshold="per-token"),
    ]
    with pytest.raises(ValueError, match="sparsity is 1.2"):
        quality.settings(["teal"], [0.5, 1.2], 0.9, "static")


# Table 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sparsities": [0.5, 1.0]}, "sparsity is 1.0"),
        ({"sparsities": []}, "expected some of each"),
        ({"sparsities": [0.0]}, "expected no sparsity of 0"),
        ({"score_sparsities": [-0.1]}, "sparsity is -0.1"),
        ({"rho": 1.0}, "rho is 1.0"),
        ({"rhos": [0.5, 2.0]}, "rho is 2.0"),
        ({"threshold": "fixed"}, "threshold is 'fixed'"),
        ({"seeds": []}, "seeds"),
        ({"seeds": ["0"]}, "whole numbers"),
        ({"sparsities": ["half"]}, "sparsity is 'half'"),
    ],
)
def test_a_plan_that_is_not_allowed_is_refused_whole(change, said):
    with pytest.raises(ValueError, match=said):
        Plan(**PLAN | change)


@pytest.fixture(scope="module")
def table_3(sources, tmp_path_factory):
    """(study, plan, points of the sweep, rows) of a whole small Table 3 with two seeds."""
    made = Study(sources, Table("table-3", "preset", tmp_path_factory.mktemp("table-3")))
    plan = Plan(**PLAN)
    points = rank_awareness.sweep(made, plan)
    rank_awareness.compare(made, plan)
    rank_awareness.compare_scores(made, plan)
    return made, plan, points, made.table.finish(0, vars(sources) | vars(plan))


def test_table_3_is_in_reading_order_and_complete(table_3):
    _, _, _, rows = table_3
    found = rank_reading.summary(rows)
    names = list(rank_reading.LABELS.values())
    assert found[["sparsity", "method"]].values.tolist() == [
        ["0%", names[0]], *([s, name] for s in ("40%", "50%") for name in names[1:])
    ]  # fmt: skip
    assert found["seeds"].tolist() == [1, 2, 1, 2, 2, 1, 2]
    assert (found["n"] == 16).all() and not found.isna().any().any()
    planned = found["planned (%)"].tolist()
    assert (
        planned[0] == 0 and all(40 <= x < 42 for x in planned[1:4]) and all(50 <= x < 52 for x in planned[4:])
    )


def test_differences_are_means_over_seeds_item_by_item(table_3):
    made, plan, _, rows = table_3
    settings = plan.methods(0.5)
    both = [[made.losses(settings[name], seed) for seed in (0, 1)] for name in ("r-sparse", "teal")]
    mean = [[sum(pair) / 2 for pair in zip(*runs, strict=True)] for runs in both]
    expected = sum(a - b for a, b in zip(*mean, strict=True)) / 3
    row = (
        rank_reading.differences(rows, "diff_perplexity_log", "heldout")
        .set_index("label")
        .loc["sparsity 50%"]
    )
    assert row["value"] == pytest.approx(expected) and row["n"] == 3 and row["seed"] == "0/1"
    assert row["low"] < row["value"] < row["high"]
    against = rows[rows["metric"] == "diff_margin"].groupby("against")["method"].agg(set)
    assert against["dense"] == {"teal", "low-rank", "r-sparse"}
    assert against["teal"] == {"low-rank", "r-sparse"} and against["rho=1"] == {"r-sparse"}


def test_no_setting_of_table_3_is_calibrated_twice(table_3):
    made, _, _, _ = table_3
    journal = made.table.folder / "table-3.jsonl"
    entries = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()[1:]]
    names = "method", "sparsity", "rho", "score", "threshold", "factors", "seed"
    paid = [
        tuple(entry["rows"][0].get(name) for name in names)
        for entry in entries
        if any(cost["what"] == "calibrate" and cost["tokens"] for cost in entry.get("costs") or [])
    ]
    assert paid and len(set(paid)) == len(paid)


def test_the_sweep_leaves_rows_for_the_claims(table_3):
    made, plan, points, rows = table_3
    part = rows[rows["against"].astype(str).str.startswith("sweep") & (rows["sparsity"] == 0.5)]
    assert part[["against", "rho"]].to_numpy().tolist() == [
        ["sweep: rho 1", 0.0], ["sweep: rho 1", 0.5], ["sweep: next lower", 0.5], ["sweep: next lower", 1.0],
    ]  # fmt: skip
    losses = {rho: np.array(made.losses(setting)) for rho, setting in plan.sweep(0.5).items()}
    step = part.iloc[2]
    assert step["value"] == pytest.approx((losses[0.5] - losses[0.0]).mean())
    at_0 = points[(points["sparsity"] == 0.5) & (points["rho"] == 0)].iloc[0]
    wanted = stats.ttest_rel(losses[0.0], losses[1.0]).confidence_interval(1 - 0.05 / 2)
    assert (at_0["low"], at_0["high"]) == pytest.approx((wanted.low, wanted.high)), "two points hold together"
    assert part.iloc[0]["low"] == pytest.approx(at_0["low"])


def test_teal_is_r_sparse_at_rho_one(table_3):
    made, plan, points, rows = table_3
    assert made.losses(plan.sweep(0.5)[1.0]) == made.losses(plan.methods(0.5)["teal"])
    at_one = points[points["rho"] == 1.0]
    assert (at_one[["diff_loss", "low", "high"]] == 0).all().all()
    shown = rank_reading.sweep_table(points, rows)
    assert shown["rho"].tolist() == [0.0, 0.5, 1.0] * 2
    assert "q 0 " in shown["ranks"].iloc[2] and "q 0 " not in shown["ranks"].iloc[0]


def test_the_two_by_two_has_four_cells_and_three_differences(table_3):
    _, _, _, rows = table_3
    cells = rank_reading.score_table(rows, 0.9)
    assert sorted(cells[["score", "low-rank path"]].values.tolist()) == [
        ["column-norm", "none (rho 1)"], ["column-norm", "rho 0.9"],
        ["magnitude", "none (rho 1)"], ["magnitude", "rho 0.9"],
    ]  # fmt: skip
    labels = rank_reading.score_differences(rows)["label"].tolist()
    assert labels == ["50%: path, magnitude", "50%: path, column-norm", "50%: column-norm score, no path"]


def test_a_seedless_setting_is_measured_once(table_3):
    _, _, _, rows = table_3
    measured = rows[rows["against"].isna()]
    assert set(measured.loc[measured["method"].isin(["dense", "low-rank"]), "seed"]) == {0}
    assert set(measured.loc[measured["method"] == "teal", "seed"]) == {0, 1}


def difference_rows(intervals: dict[str, list[tuple[float, float, float]]]) -> pd.DataFrame:
    """Metric -> (sparsity, low, high) of R-Sparse minus TEAL."""
    return pd.DataFrame(
        [
            {"method": "r-sparse", "against": "teal", "score": "magnitude", "rho": 0.95, "sparsity": sparsity,
             "metric": metric, "task": "heldout" if "perplexity" in metric else "average", "low": low,
             "high": high}
            for metric, found in intervals.items()
            for sparsity, low, high in found
        ]
    )  # fmt: skip


def test_the_verdict_of_table_3_in_words():
    rows = difference_rows(
        {
            "diff_margin": [(0.4, 0.1, 0.2), (0.5, -0.2, -0.1), (0.6, -0.1, 0.1), (0.7, math.nan, math.nan)],
            "diff_perplexity_log": [(0.4, 0.1, 0.2), (0.5, -0.2, -0.1)],
        }
    )
    assert rank_reading.reading(rows, "m") == (
        "On `m`, against TEAL at the same read budget: by the margin, R-Sparse is better at 40% and worse "
        "at 50% and not told apart at 60%, 70%; by accuracy, R-Sparse is not measured; by held-out loss, "
        "R-Sparse is better at 50% and worse at 40%."
    )


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([(0.5, 11.0, 0.1, 0.05, 0.15), (1.0, 10.0, 0, 0, 0)],
         "at 50% it is rho 1: no byte spent on rank paid."),
        ([(0.5, 9.0, -0.1, -0.2, -0.05), (1.0, 10.0, 0, 0, 0)],
         "at 50% it is rho 0.5, 0.1000 nats per token better than rho 1 (the interval excludes zero)."),
        ([(0.5, 9.0, -0.1, -0.2, 0.05), (1.0, 10.0, 0, 0, 0)], "(the interval does not exclude zero)."),
        ([(0.5, 9.0, -0.1, math.nan, math.nan), (1.0, 10.0, 0, 0, 0)],
         "(the interval does not exclude zero)."),
    ],
)  # fmt: skip
def test_the_reading_of_the_sweep(points, said):
    columns = ["rho", "perplexity", "diff_loss", "low", "high"]
    frame = pd.DataFrame(points, columns=columns).assign(sparsity=0.5)
    assert rank_reading.sweep_reading(frame, "m").endswith(said)


def test_settings_are_what_the_table_names():
    plan = Plan(**PLAN)
    assert [x.method for x in plan.methods(0.5).values()] == ["teal", "low-rank", "r-sparse"]
    assert {(x.score, x.rho) for x in plan.two_by_two(0.5).values()} == set(plan.two_by_two(0.5))
    assert list(plan.sweep(0.5)) == [0.0, 0.5, 1.0]
