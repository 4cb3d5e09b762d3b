"""Figure 2's exhibit: phases and recoveries item by item, the bias matrix and the residuals written out, the words."""

import math

import numpy as np
import pandas as pd
import pytest
import small_checkpoint
import torch

from reference import recorded
from rsparse import evaluate, harness
from rsparse.accounting import split_budget
from rsparse.apply import protocol_of
from rsparse.calibrate import MAGNITUDE
from rsparse.evaluate import token_losses
from rsparse.exhibits import multi_phase, phase_reading, rank_reading, residual_reading, residuals
from rsparse.linears import KeptTally
from rsparse.models import decoder_linears
from rsparse.phases import collect
from rsparse.phases import multi_phase as hang
from rsparse.results import Table
from rsparse.study import Sources, Study

PHASES = dict(
    sparsities=[0.5], phases=[1, 2], sides=["magnitude"], rho=0.8, threshold="static", tasks=["piqa", "obqa"], seeds=[0]
)
BRIDGE = dict(layers=[1], sparsity=0.5, rho=0.7, share=0.8, count=2, tokens=70)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bridge")
    sizes = {name: small_checkpoint.SMALL_SOURCES[name] for name in ("items", "samples", "length", "windows", "window")}
    checkpoint = small_checkpoint.save(folder / "checkpoint")
    return Study(Sources(str(checkpoint), "smoke", **sizes), Table("figure-2", "smoke", str(folder / "results"), "cpu"))


@pytest.fixture(scope="module")
def phased(study):
    multi_phase.measure(study, multi_phase.Plan(**PHASES))
    return study.table.frame


@pytest.fixture(scope="module")
def bridged(study):
    curves = residuals.measure(study, residuals.Plan(**BRIDGE))
    return curves, study.table.frame


def test_a_number_of_phases_is_measured_as_by_hand(study, phased):
    calibration, model = study.calibration(0), study.dense()
    with hang(calibration, 0.5, 2, "magnitude", collect(model, calibration.ids, decoder_linears(model))):
        losses = token_losses(model, study.heldout).mean(1)
    own = phased[(phased["method"] == "multi-phase-relu") & (phased["phases"] == 2)]
    value = float(own.loc[own["metric"] == "perplexity", "value"].iloc[0])
    assert value == pytest.approx(math.exp(float(losses.mean())), rel=1e-6)
    assert set(own.loc[own["metric"] == "acc", "task"]) == {"piqa", "obqa"}
    assert own["realised"].dropna().between(0.4, 0.6).all() and own["planned"].isna().all()


def test_every_method_is_sparse_at_the_same_tokens(study, tmp_path, monkeypatch):
    """What the protocol says where tasks are scored, and where losses are; a dense model has none."""
    seen = {"score_tasks": [], "token_losses": []}

    def spied(module, name: str):
        real = getattr(module, name)

        def spy(model, *args):
            protocol = protocol_of(model)
            seen[name].append(protocol and protocol.tokens)
            return real(model, *args)

        monkeypatch.setattr(module, name, spy)

    spied(harness, "score_tasks")
    spied(evaluate, "token_losses")
    anew = Study(study.sources, Table("figure-2", "smoke", str(tmp_path), "cpu"), bench=study.bench)
    multi_phase.measure(anew, multi_phase.Plan(**PHASES))
    assert seen == {"score_tasks": [None, *["scored"] * 4], "token_losses": [None, *["all"] * 4]}
    rows = anew.table.frame
    assert set(rows["method"]) == {"dense", "teal", "r-sparse", "multi-phase-relu"}
    assert set(rows.loc[rows["task"] == "heldout", "tokens"]) == {"all"}
    assert set(rows.loc[rows["task"] != "heldout", "tokens"]) == {"scored"}


def test_the_realised_share_weighs_linears_by_their_weights(build):
    """Kind by kind another share stays, counted over two tokens."""
    model = build()
    shares = dict(q=0.1, k=0.9, v=0.8, o=0.2, gate=0.3, up=0.4, down=0.7)
    tallies, read, sizes = {}, 0.0, 0
    for x in decoder_linears(model):
        stays = round(shares[x.kind] * x.channels)
        tallies[x.name] = KeptTally()
        tallies[x.name].add(torch.arange(x.channels) < torch.tensor([[stays - 2], [stays + 2]]))
        read += x.module.weight.numel() * stays / x.channels
        sizes += x.module.weight.numel()
    assert multi_phase.replaced(model, tallies) == pytest.approx(1 - read / sizes, abs=1e-12)


def test_recoveries_are_what_is_won_back_minus_what_is_missing(study, phased):
    """From the losses of three runs, window by window."""
    plan = multi_phase.Plan(**PHASES)
    columns = {n: multi_phase._columns(study, 0.5, n, "magnitude") | {"seed": 0} for n in (1, 2)}
    one, two = (np.array(multi_phase._phases(study, plan, columns[n], {})["loss"]) for n in (1, 2))
    dense = np.array(study.losses(multi_phase.DENSE, 0))
    row = phased[phased["metric"] == "recovery_perplexity_log"].iloc[0]
    assert row["value"] == pytest.approx(float(((one - two) - (two - dense)).mean()), abs=1e-12)
    for against, other in (("dense", dense), ("teal", np.array(study.losses(plan.deployed(0.5)["teal"], 0)))):
        part = phased[(phased["metric"] == "diff_perplexity_log") & (phased["against"] == against)]
        assert float(part.loc[part["phases"] == 2, "value"].iloc[0]) == pytest.approx(float((two - other).mean()))
    accuracy = phased[(phased["metric"] == "recovery_acc") & (phased["task"] == "average-2")]
    assert len(accuracy) == 1 and accuracy["n"].iloc[0] == 4


def test_the_bias_matrix_is_the_stacked_one(study, bridged):
    """Every token's two biases, written out for the first 70 tokens."""
    _, rows = bridged
    model, ids = study.dense(), study.calibration(0).ids
    inputs = recorded(model, ids)[0]
    linears = [x for x in decoder_linears(model) if x.layer == 1]
    statistics = collect(model, ids, linears)
    for x in linears:
        levels = statistics[1, x.site].levels(0.8, 2, "magnitude")
        edge, W = float(levels.edges), x.module.weight.detach().double()
        biases = []
        for token in inputs[x.name][:70]:
            dropped = token.abs() <= levels.threshold
            for phase, inside in enumerate((token <= edge, token > edge)):
                biases.append(float(levels.values[phase]) * W[:, dropped & inside].sum(1))
        S = torch.linalg.svdvals(torch.stack(biases))
        chosen = (rows["task"] == "bias-matrix") & (rows["score"] == "magnitude") & (rows["linear"] == x.kind)
        own = rows[chosen].set_index("metric")["value"]
        assert own["stable_rank"] == pytest.approx(float((S**2).sum() / S[0] ** 2), rel=1e-3)
        assert own["stable_rank_share"] == pytest.approx(own["stable_rank"] / min(x.shape))
        assert rows.loc[chosen, "n"].eq(140).all()
        first = inputs[x.name][:70]
        dropped = first.abs() <= levels.threshold
        level = torch.where(first <= edge, levels.values[0].double(), levels.values[1].double())
        for task, vectors in (("dropped-values", first * dropped), ("bias-sums", level * dropped)):
            S = torch.linalg.svdvals(vectors.double() @ W.T)
            chosen = (rows["task"] == task) & (rows["score"] == "magnitude") & (rows["linear"] == x.kind)
            own = rows[chosen & (rows["metric"] == "stable_rank")].iloc[0]
            assert own["value"] == pytest.approx(float((S**2).sum() / S[0] ** 2), rel=1e-3), task
            assert own["n"] == 70 and own["sparsity"] == 0.8


def test_the_signed_bias_matrix_has_levels_of_its_own(study, bridged):
    _, rows = bridged
    model, ids = study.dense(), study.calibration(0).ids
    x = next(x for x in decoder_linears(model) if x.layer == 1 and x.kind == "down")
    levels = collect(model, ids, [x])[1, x.site].levels(0.8, 2, "signed")
    inputs = recorded(model, ids)[0][x.name][:70]
    S = torch.linalg.svdvals(levels.parts(inputs).flatten(0, 1).double() @ x.module.weight.detach().double().T)
    own = rows[(rows["task"] == "bias-matrix") & (rows["score"] == "signed") & (rows["linear"] == "down")]
    found = own.set_index("metric")["value"]["stable_rank"]
    assert found == pytest.approx(float((S**2).sum() / S[0] ** 2), rel=1e-3)


def test_the_weight_and_the_curves_are_written_out(study, bridged):
    """W's own stable rank, errors at shares of the rank, and the spectrum that is drawn."""
    curves, rows = bridged
    inputs = recorded(study.dense(), study.heldout)[0]
    calibration = study.calibration(0)
    for x in [x for x in decoder_linears(study.dense()) if x.layer == 1]:
        W, full = x.module.weight.detach().double(), min(x.shape)
        S = torch.linalg.svdvals(W)
        own = rows[(rows["task"] == "weight") & (rows["linear"] == x.kind)].set_index("metric")["value"]
        assert own["stable_rank"] == pytest.approx(float((S**2).sum() / S[0] ** 2), rel=1e-5)
        split = split_budget(*x.shape, 0.5, 0.7)
        threshold = calibration.statistics(x, MAGNITUDE).quantile(1 - split.kept / x.channels)
        E = inputs[x.name] * (inputs[x.name].abs() <= threshold)
        R, U = E @ W.T, torch.linalg.svd(W).U
        part = rows[(rows["task"] == "residual") & (rows["linear"] == x.kind) & (rows["factors"] == "svd")]
        for share in (0.1, 0.25, 0.5):
            rank = max(1, int(share * full))
            left = R - R @ U[:, :rank] @ U[:, :rank].T
            one = part[part["at"] == f"{share:.0%}"].iloc[0]
            assert one["rank"] == rank
            assert one["value"] == pytest.approx(float(left.square().sum() / R.square().sum()), abs=2e-3)
        S = torch.linalg.svdvals(R)
        drawn = curves[1, x.kind]
        at = torch.tensor([int(r) for r in drawn["ranks"] if r <= len(S)]) - 1
        np.testing.assert_allclose(drawn["spectrum"][: len(at)], S[at] / S[0], atol=2e-3)


def test_the_residuals_are_those_of_the_mask(study, bridged):
    """Their energy, stable rank and errors from the residuals themselves, kept whole."""
    curves, rows = bridged
    model, calibration = study.dense(), study.calibration(0)
    inputs, outputs = recorded(model, study.heldout)
    calibrated = recorded(model, calibration.ids)[0]
    for x in [x for x in decoder_linears(model) if x.layer == 1]:
        W, split = x.module.weight.detach().double(), split_budget(*x.shape, 0.5, 0.7)
        threshold = calibration.statistics(x, MAGNITUDE).quantile(1 - split.kept / x.channels)
        E, C = (seen[x.name] * (seen[x.name].abs() <= threshold) for seen in (inputs, calibrated))
        R = E @ W.T
        S = torch.linalg.svdvals(R)
        part = rows[(rows["task"] == "residual") & (rows["linear"] == x.kind)]
        one = part.drop_duplicates("metric").set_index("metric")["value"]
        share = float(R.square().sum() / outputs[x.name].square().sum())
        assert one["residual_share"] == pytest.approx(share, rel=1e-3)
        assert one["stable_rank"] == pytest.approx(float((S**2).sum() / S[0] ** 2), rel=1e-3)
        bases = {
            "svd": torch.linalg.svd(W).U, "whitened": torch.linalg.svd(C @ W.T).Vh.T,
            "hindsight": torch.linalg.svd(R).Vh.T,
        }  # fmt: skip
        for factors, U in bases.items():
            own = part[(part["factors"] == factors) & (part["at"] == "deployed")].iloc[0]
            left = R - R @ U[:, : split.rank] @ U[:, : split.rank].T
            assert own["rank"] == split.rank
            assert own["value"] == pytest.approx(float(left.square().sum() / R.square().sum()), abs=2e-3)
        drawn = curves[1, x.kind]
        assert drawn["ranks"][-1] == min(x.shape) and drawn["hindsight"][-1] < 1e-3
        assert (drawn["hindsight"] <= drawn["svd"] + 1e-3).all()
        assert (drawn["hindsight"] <= drawn["whitened"] + 1e-3).all()


def test_a_second_run_measures_nothing(study, phased, bridged, monkeypatch):
    monkeypatch.setattr(residuals, "residual_moments", None)
    monkeypatch.setattr(multi_phase.phases, "multi_phase", None)
    multi_phase.measure(study, multi_phase.Plan(**PHASES))
    again = residuals.measure(study, residuals.Plan(**BRIDGE))
    assert again.keys() == bridged[0].keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [(dict(sparsities=[1.0]), "sparsities are"), (dict(sides=["both"]), "sides"), (dict(tasks=["mmlu"]), "tasks are"),
     (dict(phases=[1.5]), "phases"), (dict(phases=[0]), "phases"), (dict(phases=[]), "phases"),
     (dict(sides=[]), "sides")],
)  # fmt: skip
def test_phases_that_cannot_be_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        multi_phase.Plan(**PHASES | change)


@pytest.mark.parametrize("change", [dict(layers=[]), dict(share=0.0), dict(count=0), dict(sparsity=1.0), dict(rho=0.0),
                                    dict(rho=1.0)])  # fmt: skip
def test_a_bridge_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError):
        residuals.Plan(**BRIDGE | change)


def test_a_layer_that_is_not_there_is_refused(study):
    with pytest.raises(ValueError, match=r"expected some of 0..1"):
        residuals.measure(study, residuals.Plan(**BRIDGE | {"layers": [2]}))


def test_a_text_too_short_for_the_biases_is_refused(study):
    with pytest.raises(ValueError, match="tokens is 100000; expected at most"):
        residuals.measure(study, residuals.Plan(**BRIDGE | {"tokens": 100_000}))


def loss_row(phases: float, value: float, against: str = "dense", low: float = 0.01, high: float = 0.02) -> dict:
    return {"method": "multi-phase-relu", "score": "magnitude", "sparsity": 0.9, "phases": phases, "value": value,
            "metric": "diff_perplexity_log", "against": against, "low": low, "high": high,
            "task": "heldout"}  # fmt: skip


@pytest.mark.parametrize(("second", "said"), [(0.5, "wins back 75% of it"), (2.5, "wins back nothing")])
def test_the_reading_of_a_second_level(second, said):
    rows = pd.DataFrame([loss_row(1, 2.0), loss_row(2, second)])
    assert said in phase_reading.reading(rows, "m") and "+2.000 with 1 level" in phase_reading.reading(rows, "m")


@pytest.mark.parametrize(("low", "high", "word"), [(0.1, 0.3, "yes"), (-0.3, -0.1, "no"), (-0.1, 0.2, "open")])
def test_the_reading_of_recoveries(low, high, word):
    row = loss_row(2, (low + high) / 2, "phases=1", low, high) | {"metric": "recovery_perplexity_log"}
    assert f"by held-out loss {word} (" in phase_reading.recovery_reading(pd.DataFrame([row]), "m")


def test_the_reading_beside_the_deployed_methods():
    rows = pd.DataFrame([
        loss_row(1, 0.1, "teal"), loss_row(2, -0.1, "teal", -0.2, -0.1), loss_row(2, 0.0, "r-sparse", -0.1, 0.1),
    ])  # fmt: skip
    said = phase_reading.beside(rows, "m")
    assert "lower with 2 levels and higher with 1 level" in said and "(R-Sparse) at 90% not told apart" in said


def deployed_row(sparsity: float, ranks: str, method: str = "r-sparse") -> dict:
    return {"method": method, "sparsity": sparsity, "task": "heldout", "metric": "perplexity", "value": 3.0,
            "against": None, "realised": sparsity, "ranks": ranks, "phases": math.nan}  # fmt: skip


DEPLOYED = [
    deployed_row(0.5, "q 4 k 2 up 6"), deployed_row(0.9, "q 1 k 0 up 1"), deployed_row(0.95, "q 0 k 0 up 0"),
    deployed_row(0.5, "q 0 k 0 up 0", "teal"),
]  # fmt: skip


def test_the_reading_beside_the_deployed_methods_says_where_there_is_no_low_rank_path():
    rows = [loss_row(2, -0.1, "r-sparse", -0.2, -0.1), loss_row(2, -0.1, "teal", -0.2, -0.1)]
    said = phase_reading.beside(pd.DataFrame([*rows, *DEPLOYED]), "m")
    assert "low rank (R-Sparse) has rank 0, and so no low-rank path, in k at 90%; in every linear at 95%." in said
    assert "zero stands in the place of what it drops, as with TEAL" in said and "at 50%" not in said
    for others in (DEPLOYED[:1], DEPLOYED[-1:], []):
        assert "rank 0" not in phase_reading.beside(pd.DataFrame([*rows, *others]), "m"), "TEAL was not to have one"


def test_the_table_of_phases_has_the_ranks_of_r_sparse_alone():
    rows = pd.DataFrame([*DEPLOYED, loss_row(2, 4.0, None) | {"metric": "perplexity"}])
    found = phase_reading.summary(rows, [])
    own = loss_row(2, 0.1, None) | {"task": "piqa", "score": "signed", "n": 25, "realised": 0.9, "stderr": 0.1}
    asked = phase_reading.summary(pd.DataFrame([own | {"metric": name} for name in ("acc", "margin")]), ["piqa"])
    assert asked[["questions a task", "dropped by"]].to_numpy().tolist() == [["25", "sign"]]
    own = found["in their place"] == "low rank (R-Sparse)"
    assert dict(found.loc[own, ["sparsity", "ranks"]].to_numpy()) == {"50%": "2 to 6", "90%": "0 to 1", "95%": "0"}
    assert set(found.loc[~own, "ranks"]) == {""} and len(found[~own]) == 2


@pytest.mark.parametrize(("value", "word"), [(10.0, "more than"), (2.0, "about as much as"), (0.5, "less than")])
def test_the_reading_of_stable_ranks(value, word):
    base = {"metric": "stable_rank", "linear": "q", "layer": 2}
    rows = pd.DataFrame([
        base | {"task": "bias-matrix", "score": "magnitude", "value": 1.0},
        base | {"task": "bias-matrix", "score": "signed", "value": 3.0},
        base | {"task": "bias-sums", "score": "magnitude", "value": 2.0},
        base | {"task": "bias-sums", "score": "signed", "value": 4.0},
        base | {"task": "dropped-values", "score": "magnitude", "value": value},
        base | {"task": "dropped-values", "score": "signed", "value": 5.0},
        base | {"task": "residual", "score": None, "value": 7.0},
        base | {"task": "weight", "score": "", "value": 40.0},
    ])  # fmt: skip
    said = residual_reading.rank_reading(rows, "m")
    assert f"{word} the biases" in said and said.startswith("Medians over the linears of 1 layer of `m`: ")


def test_the_reading_of_errors():
    base = {"task": "residual", "metric": "relative_error", "at": "deployed", "rank": 4.0, "layer": 0}
    errors = {
        "q": {"svd": 0.8, "whitened": 0.7, "hindsight": 0.6},
        "k": {"svd": 0.9, "whitened": 0.92, "hindsight": 0.7},
    }
    rows = [base | {"linear": kind, "factors": name, "value": value}
            for kind, own in errors.items() for name, value in own.items()]  # fmt: skip
    rows.append({"task": "residual", "metric": "residual_share", "value": 0.05})
    said = residual_reading.error_reading(pd.DataFrame(rows), "m")
    for part in ("leave 85%", "factors 81%", "hindsight 65%", "in 1 of 2 linears", "closes 20%", "hold 5.0% of"):
        assert part in said


@pytest.mark.parametrize(("at_half", "said"), [
    ((0.31, 0.32, 0.25), "Of the ranks in the table, in the median over linears, it is not nearer at 50%"),
    ((0.29, 0.28, 0.35), "Of the ranks in the table, in the median over linears, it is nearer at all of them"),
])  # fmt: skip
def test_the_reading_of_errors_names_ranks_at_which_whitened_is_not_nearer(at_half, said):
    """By the median of three linears, not the mean, and by no other rank's."""
    base = {"task": "residual", "metric": "relative_error", "calibration": "tiny 16x512", "rank": 4.0, "layer": 0}
    found = {"deployed": (0.7, 0.7, 0.9), "50%": at_half}
    rows = [
        base | {"at": at, "linear": kind, "factors": name, "value": value}
        for at, values in found.items() for kind, whitened in zip("qkv", values, strict=True)
        for name, value in {"svd": 0.8 if at == "deployed" else 0.3, "whitened": whitened, "hindsight": 0.2}.items()
    ]  # fmt: skip
    rows = pd.DataFrame([*rows, {"metric": "residual_share", "value": 0.05}])
    known = residual_reading.error_reading(rows, "m")
    assert f"{said}; its second moment is from 16 calibration samples of 512 tokens. The" in known
    untold = residual_reading.error_reading(rows.drop(columns="calibration"), "m")
    assert f"{said}. The residuals themselves" in untold


# Whitened rows of Table 3


def factor_row(rho: float, against: str | None, value: float, low: float, high: float, **more) -> dict:
    return {"method": "r-sparse", "factors": "whitened", "sparsity": 0.5, "rho": rho, "against": against,
            "ranks": "q 4", "task": "heldout", "metric": "diff_perplexity_log", "value": value, "low": low,
            "high": high} | more  # fmt: skip


FACTOR_ROWS = pd.DataFrame([
    factor_row(0.7, None, 2.0, math.nan, math.nan, metric="perplexity"),
    factor_row(0.7, "svd", -0.2, -0.3, -0.1), factor_row(0.7, "rho=1", 0.2, 0.1, 0.3),
    factor_row(0.95, None, 1.9, math.nan, math.nan, metric="perplexity"),
    factor_row(0.95, "svd", 0.0, -0.1, 0.1), factor_row(0.95, "rho=1", 0.0, -0.1, 0.1),
])  # fmt: skip


def test_whitened_rows_are_read_apart_from_the_others():
    said = rank_reading.factor_reading(FACTOR_ROWS, "m")
    assert "singular vectors of W, lower at 50% and rho 0.7 and not told apart at 50% and rho 0.95" in said
    assert "TEAL, which has no path, higher at 50% and rho 0.7 and not told apart" in said
    shown = rank_reading.factor_table(FACTOR_ROWS)
    assert shown["perplexity"].tolist() == [2.0, 1.9]
    assert shown["minus W's own"].str.endswith("*").tolist() == [True, False]
    plain = FACTOR_ROWS.assign(factors="svd")
    assert rank_reading.factor_table(plain).empty and "measured no whitened" in rank_reading.factor_reading(plain, "m")
    old = FACTOR_ROWS.drop(columns="factors")
    assert rank_reading.factor_table(old).empty, "a table of before"
    both = pd.concat([FACTOR_ROWS, plain.assign(against="teal", score="magnitude")])
    assert set(rank_reading.differences(both, "diff_perplexity_log", "heldout")["factors"]) == {"svd"}
