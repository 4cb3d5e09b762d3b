"""The exhibit of single tokens and errors: rows from arrays whose answers are known, and the words for them."""

import json

import numpy as np
import pandas as pd
import pytest
import small_checkpoint
import torch

from rsparse import texts
from rsparse.exhibits import inside, inside_reading
from rsparse.models import KINDS
from rsparse.propagation import block_errors
from rsparse.report import LinearReport
from rsparse.results import Table
from rsparse.study import Setting, Sources, Study
from rsparse.token_sparsity import per_token, together

PLAN = dict(
    methods=["teal", "r-sparse (whitened)", "cats"], sparsities=[0.5, 0.9], rho=0.7, threshold="static", seeds=[0]
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inside")
    sizes = {name: small_checkpoint.SMALL_SOURCES[name] for name in ("samples", "length", "windows", "window")}
    checkpoint = small_checkpoint.save(folder / "checkpoint")
    study = Study(Sources(str(checkpoint), "smoke", **sizes), Table("inside", "smoke", str(folder / "results"), "cpu"))
    histograms = inside.measure(study, inside.Plan(**PLAN))
    return study, histograms, study.table.frame


def line(name: str, layer: int, bytes_: float) -> LinearReport:
    return LinearReport(name, layer, name, 4, 4, bytes_, 0.5, 1.0, "magnitude", 2, 4, 0, 0.1, read=0.5)


def test_rows_are_moments_over_tokens():
    values = {line("q", 0, 1.0): [0.2, 0.4, 0.6, 0.8], line("down", 1, 3.0): [0.5, 0.5, 0.5, 0.1]}
    rows = pd.DataFrame(inside.realised_rows({k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}, 2))
    whole = rows[rows["linear"] == "decoder"].set_index("metric")["value"]
    tokens = np.array([0.25 * a + 0.75 * b for a, b in zip(*values.values(), strict=True)])
    assert whole["realised_mean"] == pytest.approx(tokens.mean()) and whole["planned"] == 0.5
    assert whole["realised_spread"] == pytest.approx(tokens.std()) and whole["realised_worst"] == pytest.approx(0.275)
    assert whole["realised_first"] == pytest.approx((tokens[0] + tokens[2]) / 2)
    assert whole["realised_low"] == pytest.approx(np.quantile(tokens, 0.01))
    block = rows[(rows["linear"] == "block") & (rows["layer"] == 0)].set_index("metric")["value"]
    assert block["realised_mean"] == pytest.approx(0.5) and block["realised_worst"] == 0.2


def test_rows_are_those_of_the_model(measured):
    study, histograms, rows = measured
    setting = Setting("teal", 0.5, 0.7)
    study.apply(setting, 0)
    rows = rows[(rows["line"] == "teal") & (rows["sparsity"] == 0.5)]
    for text, samples, length in (("calibration", 2, 48), ("heldout", 3, 40)):
        ids = texts.token_ids("tiny", text, study.tokenizer, samples, length, 0)
        tokens = together(per_token(study.model, ids)).numpy()
        own = rows[(rows["linear"] == "decoder") & (rows["text"] == text)].set_index("metric")
        assert set(own["n"].dropna()) == {samples * length}
        firsts = tokens[::length]
        wanted = {"mean": tokens.mean(), "spread": tokens.std(), "worst": tokens.min(), "first": firsts.mean()}
        assert {name: own["value"][f"realised_{name}"] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    shares = histograms["teal", 0.5]  # of the held-out text
    np.testing.assert_allclose(shares, np.histogram(tokens, 400, (0, 1))[0] / len(tokens))
    errors = rows[rows["metric"] == "relative_error"].sort_values("layer")["value"]
    np.testing.assert_allclose(errors, block_errors(study.model, study.heldout).mean(0), rtol=1e-5)


def test_differences_are_over_the_same_samples(measured):
    """Block by block, from the two models' own errors; every pair of a sparsity."""
    study, _, rows = measured
    errors = []
    for setting in (Setting("r-sparse", 0.5, 0.7, factors="whitened"), Setting("teal", 0.5, 0.7)):
        study.apply(setting, 0)
        errors.append(block_errors(study.model, study.heldout).numpy())
    gap = errors[0] - errors[1]
    own = rows[(rows["metric"] == "diff_relative_error") & (rows["sparsity"] == 0.5)]
    assert set(zip(own["line"], own["against"], strict=True)) == {
        ("r-sparse (whitened)", "teal"), ("teal", "cats"), ("r-sparse (whitened)", "cats")
    }  # fmt: skip
    own = own[(own["line"] == "r-sparse (whitened)") & (own["against"] == "teal")].sort_values("layer")
    whole, own = own[own["linear"] == "all blocks"], own[own["linear"] != "all blocks"]
    np.testing.assert_allclose(own["value"], gap.mean(0), atol=1e-6)
    np.testing.assert_allclose(own["stderr"], gap.std(0, ddof=1) / len(gap) ** 0.5, atol=1e-6)
    np.testing.assert_allclose(whole["stderr"], gap.mean(1).std(ddof=1) / len(gap) ** 0.5, atol=1e-6)


def test_differences_do_not_ask_for_an_order_and_are_means_over_seeds(measured, tmp_path):
    """A method with factors alone has one run, beside two calibrated ones."""
    study, _, _ = measured
    study = Study(study.sources, Table("inside", "smoke", str(tmp_path), "cpu"))
    inside.measure(study, inside.Plan(["low-rank", "teal"], [0.5], 0.7, "static", [0, 1]))
    rows, errors = study.table.frame, {}
    for name, seeds in (("teal", (0, 1)), ("low-rank", (0,))):
        runs = []
        for seed in seeds:
            study.apply(Setting(name, 0.5, 0.7), seed)
            runs.append(block_errors(study.model, study.heldout).numpy())
        errors[name] = np.mean(runs, axis=0)
    own = rows[(rows["metric"] == "diff_relative_error") & (rows["linear"] != "all blocks")].sort_values("layer")
    assert set(zip(own["line"], own["against"], strict=True)) == {("low-rank", "teal")}
    assert set(own["seed"]) == {"0/1"}
    np.testing.assert_allclose(own["value"], (errors["low-rank"] - errors["teal"]).mean(0), atol=1e-6)


def test_what_a_setting_took_is_told(measured):
    """Calibration too, by which a larger run is projected."""
    study, _, _ = measured
    groups = [json.loads(line) for line in (study.table.folder / "inside.jsonl").read_text("utf-8").splitlines()[1:]]
    costs = [{cost["what"] for cost in group["costs"]} for group in groups if group["items"]]
    assert len(costs) == 5 and all({"calibrate", "inside", "propagation"} <= own for own in costs)


def test_what_cannot_be_reached_is_left_out(measured):
    _, histograms, rows = measured
    assert {line for line, sparsity in histograms if sparsity == 0.5} == {"teal", "r-sparse (whitened)", "cats"}
    assert {line for line, sparsity in histograms if sparsity == 0.9} == {"teal", "r-sparse (whitened)"}
    assert set(rows.loc[rows["line"] == "r-sparse (whitened)", "factors"]) == {"whitened"}
    kinds = inside_reading.kinds_table(rows, "teal", 0.5)
    assert list(kinds["linear"]) == list(KINDS)


@pytest.mark.parametrize("change", [dict(methods=[]), dict(methods=["teal (whitened)"]), dict(methods=["nothing"]),
                                    dict(methods=["r-sparse (better)"]), dict(methods=["griffin"]),
                                    dict(methods=["dense"]), dict(sparsities=[])])  # fmt: skip
def test_what_is_not_allowed_is_refused(change):
    with pytest.raises(ValueError):
        inside.Plan(**PLAN | change)


def stream(line: str, *values: float) -> list[dict]:
    return [{"task": "residual-stream", "metric": "relative_error", "line": line, "sparsity": 0.5, "layer": layer,
             "value": value, "low": value, "high": value} for layer, value in enumerate(values)]  # fmt: skip


@pytest.mark.parametrize(("other", "said"), [
    ((0.1, 0.2, 0.5), "nearest behind the last block is teal, as behind every block"),
    ((0.01, 0.2, 0.5), "nearest behind the last block is teal, though not behind 1 of 3"),
])  # fmt: skip
def test_the_reading_of_errors(other, said):
    rows = stream("teal", 0.05, 0.1, 0.4) + stream("r-sparse", *other)
    gap = rows[-1] | {"line": "r-sparse", "against": "teal", "metric": "diff_relative_error", "low": -0.1, "high": 0.3}
    assert "told apart" not in inside_reading.error_reading(pd.DataFrame(rows), "m"), "no difference was measured"
    both = inside_reading.error_reading(pd.DataFrame([*rows, gap]), "m")
    assert "is teal (not told apart: r-sparse)" in both
    rows = pd.DataFrame([*rows, gap | {"low": 0.05}])
    assert said in inside_reading.error_reading(rows, "m")
    first = gap | {"layer": 0, "low": -0.1}
    open_ = inside_reading.error_reading(pd.concat([rows, pd.DataFrame([first])]), "m")
    told = other[0] < 0.05  # the first block's nearest is another, which its interval does not tell apart
    assert ("nor told apart from what is nearest behind 1" in open_) == told and "not behind" not in open_
    assert "8.0 (teal, 50%)" in inside_reading.growth_reading(rows, "m")
    assert "would give 1.7" in inside_reading.growth_reading(rows, "m")


def realised(**values: float) -> pd.DataFrame:
    base = {"task": "realised", "linear": "decoder", "text": "heldout", "line": "teal", "sparsity": 0.5}
    return pd.DataFrame([base | {"metric": f"realised_{name}", "value": value} for name, value in values.items()])


def test_the_reading_of_tokens():
    rows = realised(mean=0.5, spread=0.05, worst=0.4, first=0.6)
    said = inside_reading.realised_reading(rows, "m")
    assert "50.0% ± 5.0%" in said and "worst token 40.0%, 20% more bytes" in said
    assert "+2.0 with teal" in inside_reading.first_reading(rows, "m")
    even = realised(mean=0.5, spread=0.0, worst=0.5, first=0.5)
    assert "worst token" not in inside_reading.realised_reading(even, "m")
    assert "every token reads the same" in inside_reading.first_reading(even, "m")


@pytest.mark.parametrize(("measured", "shown"), [
    (["teal", "wina", "r-sparse", "r-sparse (whitened)"], ["teal", "r-sparse"]), (["r-sparse", "cats"], ["r-sparse"]),
    (["wina", "r-sparse (whitened)"], ["r-sparse (whitened)"]), ([], []),
])  # fmt: skip
def test_the_linears_of_teal_and_r_sparse_are_shown_where_they_were_measured(measured, shown):
    rows = pd.concat([realised(mean=0.5).assign(line=name) for name in measured] or [realised(mean=0.5).iloc[:0]])
    other = realised(mean=0.5).assign(line="teal", sparsity=0.7)
    assert inside_reading.shown(pd.concat([rows, other], ignore_index=True), 0.5) == shown


def test_the_table_by_layer_is_of_the_layers_tokens(measured):
    """Mean, spread and worst over tokens of all linears of a layer together, from the model's own tokens."""
    study, _, rows = measured
    study.apply(Setting("teal", 0.5, 0.7), 0)
    tokens = per_token(study.model, texts.token_ids("tiny", "heldout", study.tokenizer, 3, 40, 0))
    found = inside_reading.layers_table(rows, "teal", 0.5).set_index("layer")
    for layer in (0, 1):
        values = 100 * together({x: v for x, v in tokens.items() if x.layer == layer}).numpy()
        want = {"mean": values.mean(), "spread over tokens": values.std(), "worst token": values.min()}
        own = found.loc[layer]
        assert {name: own[name] for name in want} == pytest.approx(want, abs=1e-4)
        assert own["planned"] == pytest.approx(50, abs=1)
    assert list(found.index) == [0, 1]
