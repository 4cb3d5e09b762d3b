"""Table 2: every way to store the weights with every method, its paired differences, and what is said of them."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import small_checkpoint
import torch
from scipy import stats

from rsparse import claims, gptq, gptq_checkpoint, int4, models, predicates, texts
from rsparse.exhibits import quantised, quantised_reading
from rsparse.exhibits.quantised import LOADED, Plan
from rsparse.predicates import Context
from rsparse.quantize import Quantization
from rsparse.results import Table
from rsparse.study import DENSE, Sources, Study

FINE = dict(
    weights=["int4-rtn"], methods=["teal", "r-sparse"], sparsities=[0.5], rho=0.9, factor_dtypes=["float16"],
    threshold="static", gptq="", gptq_samples=2, gptq_length=32, seeds=[0],
)  # fmt: skip


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"weights": []}, "weights are"),
        ({"methods": []}, "methods are"),
        ({"methods": ["wina"]}, "methods are .*expected some of teal, r-sparse"),
        ({"weights": ["int2"]}, "weights are 'int2'"),
        ({"weights": ["int4-gptq"], "gptq": "no/folder"}, "is no folder"),
        ({"factor_dtypes": []}, "factor_dtypes"),
        ({"factor_dtypes": ["float8"]}, "factor_dtype is 'float8'"),
        ({"sparsities": []}, "sparsities are"),
        ({"sparsities": [0.5, 0.0]}, "no sparsity of 0"),
        ({"sparsities": [1.0]}, "sparsity is 1.0"),
        ({"rho": 1}, "rho between 0 and 1"),
        ({"threshold": "none"}, "threshold is 'none'"),
        ({"seeds": ["0"]}, "seeds whole numbers"),
        ({"weights": ["int4-gptq"], "gptq": "tiny", "gptq_length": 0}, "length is 0"),
    ],
)
def test_a_plan_that_is_not_allowed_is_refused_whole(values, said):
    with pytest.raises(ValueError, match=said):
        Plan(**FINE | values)


def test_factors_that_the_model_cannot_hold_are_refused_before_the_rest(tmp_path):
    study = Study(Sources("tiny", "smoke", "bfloat16"), Table("table-2", "smoke", str(tmp_path), "cpu"))
    with pytest.raises(ValueError, match="factor_dtype is 'float32'.*bfloat16"):
        quantised.measure(study, Plan(**FINE | {"factor_dtypes": ["float16", "float32"]}))
    assert study.table.frame.empty


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(study, rows); as GPTQ stand codes of weights that were changed a little, so that they are not the nearest."""
    folder = small_checkpoint.save(tmp_path_factory.mktemp("checkpoint"), **small_checkpoint.WIDE)
    model = models.load_model(str(folder))
    codes = {x.name: int4.nearest(x.module.weight * 1.01) for x in models.decoder_linears(model)}
    gptq_checkpoint.save(folder / "gptq", model, codes, {})
    sources = Sources(str(folder), "made-up", **small_checkpoint.SMALL_SOURCES)
    made = Study(sources, Table("table-2", "preset", tmp_path_factory.mktemp("table-2")))
    plan = Plan(**FINE | dict(weights=list(int4.WEIGHTS), factor_dtypes=["float16", "int4-g128"],
                              gptq=str(folder / "gptq"), seeds=[0, 1], rho=0.8))  # fmt: skip
    quantised.measure(made, plan)
    return made, plan, made.table.finish(0, {})


def test_every_way_is_measured_with_every_method(measured):
    _, _, rows = measured
    own = quantised_reading.plain(rows[rows["against"].isna() & (rows["metric"] == "perplexity") & (rows["seed"] == 0)])
    found = [tuple(row) for row in own[["weights", "method", "factor_dtype"]].to_numpy()]
    ways = [("dense", ""), ("teal", ""), ("r-sparse", "float16"), ("r-sparse", "int4-g128")]
    wanted = [(name, *way) for name in int4.WEIGHTS for way in ways]
    assert found == [("", "dense", ""), ("", "teal", ""), ("", "r-sparse", ""), *wanted]
    assert len(set(own["value"].round(9))) == len(own), "each computes something of its own"


def test_planned_sparsity_counts_int4s_bytes(measured):
    _, _, rows = measured
    part = rows[(rows["method"] == "r-sparse") & (rows["metric"] == "perplexity") & rows["against"].isna()]
    assert ((part["planned"] >= 0.5) & (part["planned"] < 0.51)).all()
    ranks = {(w, d): int(r.split()[1]) for w, d, r in part[["weights", "factor_dtype", "ranks"]].to_numpy()}
    weight = Fraction(1, 2) + Fraction(2, 128)
    budget = Fraction(1, 5) * Fraction(1, 2) * 256 * 256 / 512
    assert ranks["int4-gptq", "int4-g128"] == budget // 1
    assert ranks["int4-gptq", "float16"] == budget * weight / 2 // 1


def test_differences_are_paired_over_the_same_windows(measured):
    made, plan, rows = measured
    there = made.sibling(quantization=Quantization("int4-gptq", "float16", plan.gptq, 2, 32))
    setting = plan.r_sparse(0.5)
    part = rows[(rows["weights"] == "int4-gptq") & (rows["method"] == "r-sparse") & (rows["factor_dtype"] == "float16")]
    part = part[part["metric"] == "diff_perplexity_log"].set_index("against")
    own = np.mean([there.losses(setting, seed) for seed in (0, 1)], axis=0)
    others = {
        "dense": there.losses(DENSE),
        "teal": np.mean([there.losses(plan.teal(0.5), seed) for seed in (0, 1)], axis=0),
        LOADED: np.mean([made.losses(setting, seed) for seed in (0, 1)], axis=0),
        "int4-rtn": np.mean([made.sibling(quantization=Quantization("int4-rtn")).losses(setting, seed)
                             for seed in (0, 1)], axis=0),
    }  # fmt: skip
    assert set(part.index) == set(others)
    for against, other in others.items():
        wanted = stats.ttest_rel(own, other).confidence_interval()
        assert part.loc[against, ["low", "high"]].tolist() == pytest.approx([wanted.low, wanted.high])


def test_studies_of_one_bench_put_their_own_weights_back(measured):
    made, plan, _ = measured
    linear = models.decoder_linears(made.dense())[0].module
    there = made.sibling(quantization=Quantization("int4-rtn"))
    assert isinstance(models.decoder_linears(there.dense())[0].module, int4.Int4Linear)
    there.apply(plan.teal(0.5), 0)
    assert models.decoder_linears(made.dense())[0].module is linear
    assert made.bench.applied is None


def test_gptq_is_calibrated_on_the_calibration_text(measured, tmp_path, monkeypatch):
    """With samples, length and seed of its own; the held-out text is an empty folder, of which reading fails."""
    made, _, _ = measured
    monkeypatch.setenv("RSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gptq, "check_library", lambda: None)
    monkeypatch.setattr(gptq, "metadata", SimpleNamespace(version=lambda _: "made up"))
    seen = []

    def quantize(model, ids):
        seen.append(ids)
        return {x.name: int4.nearest(x.module.weight) for x in models.decoder_linears(model)}

    monkeypatch.setattr(gptq, "quantize", quantize)
    (tmp_path / "empty").mkdir()
    own = Quantization("int4-gptq", samples=3, length=32)
    sources = replace(made.sources, heldout=f"c4:{tmp_path / 'empty'}", quantization=own)
    there = Study(sources, Table("table-2", "preset", tmp_path / "table"), seed=4, bench=made.bench)
    assert isinstance(models.decoder_linears(there.dense())[0].module, int4.Int4Linear)
    made.dense()
    (ids,) = seen
    assert torch.equal(ids, texts.token_ids("tiny", "calibration", made.tokenizer, 3, 32, 4))


def test_the_claims_find_their_rows(measured):
    _, _, rows = measured
    known = claims.load()
    context = Context("table-2", {"table-2": rows}, lambda _: 0.0, known.prefer)
    found = {x.id: x for x in known.claims if x.exhibit == "table-2"}
    assert {"int4-alone", "int4-compatible", "int4-compatible-perplexity", "gptq-beats-rounding"} <= found.keys()
    for name in found.keys() - {"int4-compatible-40"}:
        assert np.isfinite(predicates.estimate(found[name].ours, context).value), name
    check = predicates.estimate(known.dense_checks["average-4"]["ours"], context)
    own = rows[rows["weights"].isna() & (rows["method"] == "dense") & rows["against"].isna()]
    wanted = own[(own["task"] == "average-4") & (own["metric"] == "acc")]["value"]
    assert check.value == pytest.approx(wanted.iloc[0])


def test_the_table_and_the_figure_have_every_row(measured):
    _, _, rows = measured
    table = quantised_reading.summary(rows)
    assert len(table) == 3 + 2 * 4 and table["weights"].tolist()[0] == "as loaded"
    assert table["bits read"].tolist()[:2] == [32.0, 16.0]
    assert table.loc[table["weights"] == "INT4, GPTQ", "bits read"].tolist()[0] == 4.125
    assert set(table.loc[table["method"] == "R-Sparse", "factors"]) == {"32-bit", "16-bit", "INT4"}
    costs = quantised_reading.differences(rows, "dense")
    labels = list(dict.fromkeys(costs["label"]))
    assert labels[0] == "as loaded: TEAL 50%" and labels[-1] == "INT4, GPTQ: R-Sparse 50%, INT4 factors"
    assert len(quantised_reading.table(costs)) == len(labels) == 2 + 2 * 3
    assert list(dict.fromkeys(quantised_reading.panels(costs)["label"])) == labels


def test_what_is_said():
    lines = [
        ("int4-gptq", "dense", 0.0, "", LOADED, "average", "diff_acc", -0.02, -0.01),
        ("int4-gptq", "dense", 0.0, "", LOADED, "heldout", "diff_perplexity_log", -0.01, 0.02),
        ("int4-gptq", "r-sparse", 0.5, "float16", "dense", "heldout", "diff_perplexity_log", 0.02, 0.04),
        (None, "r-sparse", 0.5, None, "dense", "heldout", "diff_perplexity_log", 0.01, 0.03),
    ]
    columns = ["weights", "method", "sparsity", "factor_dtype", "against", "task", "metric", "low", "high"]
    rows = pd.DataFrame(lines, columns=columns).assign(value=lambda x: x[["low", "high"]].mean(axis=1))
    said = quantised_reading.reading(rows, "m")
    assert said.startswith("On `m`. INT4, GPTQ, dense, against the weights as loaded: worse in 1 of 2 comparisons")
    own = "R-Sparse on INT4, GPTQ, against dense on the same weights: with 16-bit factors worse in the one comparison"
    assert own in said
    assert quantised_reading.extra_cost(rows, "m") == (
        "By held-out loss of `m`, with 95% intervals: R-Sparse 50%, 16-bit factors costs +0.0300 [+0.0200, +0.0400] "
        "nats per token on INT4, GPTQ, and +0.0200 [+0.0100, +0.0300] on the weights as loaded."
    )
    own = dict(method="r-sparse", sparsity=0.5, weights="int4-gptq", factor_dtype="float16", ranks="q 1 k 0 v 0 o 2")
    unknown = own | dict(weights=None, factor_dtype=None, ranks=None)
    found = quantised_reading.extra_cost(pd.concat([rows, pd.DataFrame([own, unknown])], ignore_index=True), "m")
    assert found.endswith("no low-rank path, for k and v (INT4, GPTQ: R-Sparse 50%, 16-bit factors).")
    assert "no INT4 weights" in quantised_reading.reading(rows.iloc[-1:], "m")
    assert quantised_reading.extra_cost(rows.iloc[:2], "m") == ""


@pytest.mark.parametrize(("low", "high", "told"), [
    (-0.2, -0.1, "with 16-bit factors worse in the one comparison; with INT4 factors better in the one comparison."),
    (0.1, 0.2, "with 16-bit and with INT4 factors alike worse in the one comparison."),
])  # fmt: skip
def test_what_is_said_is_of_every_precision_of_the_factors(low, high, told):
    base = {"weights": "int4-rtn", "method": "r-sparse", "sparsity": 0.5, "against": "teal", "task": "heldout"}
    base |= {"metric": "diff_perplexity_log", "value": 0.0}
    rows = [base | {"factor_dtype": "float16", "low": 0.1, "high": 0.2}]
    rows += [base | {"factor_dtype": "int4-g128", "low": low, "high": high}]
    for own in (rows, rows[::-1]):
        said = quantised_reading.reading(pd.DataFrame(own), "m")
        assert said == f"On `m`. R-Sparse on INT4, nearest, against TEAL on the same weights and bytes: {told}"
