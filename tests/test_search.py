"""The search on a model: what a candidate costs, what is kept, and that a killed search ends the same."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest

import rsparse
from rsparse import search, search_cost
from rsparse.__main__ import main
from rsparse.accounting import split_budget
from rsparse.calibrate import Calibration
from rsparse.decompose import FactorStore, svd_factors
from rsparse.evaluate import token_losses
from rsparse.evolution import Coordinate, Evolution, RandomSearch
from rsparse.journal import Journal
from rsparse.linears import SparseLinear
from rsparse.models import decoder_linears, random_model, shape_config
from rsparse.protocol import TokenProtocol
from rsparse.recipe import Ask, Recipe
from rsparse.trials import Trials

SMALL = Evolution(population=4, generations=2)


@pytest.fixture
def store(tmp_path):
    return FactorStore(tmp_path / "factors")


def by_hand(model, ids, choices) -> float:
    """Mean loss with a `SparseLinear` of the same threshold and rank in every linear's place."""
    for x in decoder_linears(model):
        choice = choices[x.name]
        factors = svd_factors(x.module.weight, choice.rank) if choice.rank else None
        split = split_budget(*x.shape, 0.5, 1.0) if not choice.rank else split_budget(*x.shape, 0.5, 0.5)
        split = type(split)(split.kept, choice.rank, split.read)
        x.exchange(SparseLinear(x.module, split, TokenProtocol("all"), factors, threshold=choice.threshold))
    found = float(token_losses(model, ids).mean())
    for x in decoder_linears(model):
        x.exchange(x.module.dense)
    return found


@pytest.mark.parametrize("batch_tokens", [39, 100, 10**6])
def test_a_candidate_costs_what_its_sparse_model_loses(build, ids, store, batch_tokens):
    """From every boundary on, alone and side by side, against linears of its own; in float64."""
    model = build()
    linears = decoder_linears(model)
    asks = {x.name: Ask(0.5, 0.9) for x in linears}
    with Trials(Calibration(model, ids), asks, store, batch_tokens=batch_tokens) as trials:
        for layer in (0, 1):
            group = [x for x in linears if x.layer == layer]
            trials.open(group, {x.name: trials.split(x, Ask(0.3, 0.0)).rank for x in group})
            with pytest.raises(ValueError, match="a candidate asks rank .* expected at most"):
                trials.losses([{x.name: Ask(0.1, 0.0) for x in group}])
            tried = [{x.name: Ask(0.5, rho) for x in group} for rho in (0.0, 0.4, 1.0)]
            tried.append({x.name: Ask(0.3 + 0.1 * (i % 3), (0.2, 0.7, 1.0)[i % 3]) for i, x in enumerate(group)})
            alone = [trials.losses([x])[0] for x in tried]
            assert trials.losses(tried) == pytest.approx(alone, abs=1e-12)
            expected = []
            for one in tried:
                choices = {x.name: trials.choice(x, (trials.asks | one)[x.name]) for x in linears}
                for x in linears:
                    x.exchange(x.module)
                expected.append(by_hand(model, ids, choices))
                for x in linears:
                    x.exchange(trials._modules[x.name])
            assert alone == pytest.approx(expected, abs=1e-9) and len({round(x, 6) for x in alone}) == 4
    assert not any(isinstance(x.module, type(trials._modules[x.name])) for x in decoder_linears(model))


def test_thresholds_are_those_of_the_sparse_model(build, ids, store):
    """What `sparsify` settles on after as many passes."""
    model = build()
    linears = decoder_linears(model)
    asks = {x.name: Ask(0.5, 0.9) for x in linears}
    with Trials(Calibration(model, ids[:, :-1]), asks, store) as trials:
        first = {x.name: trials.choice(x, asks[x.name]) for x in linears if x.layer == 0}
    report = rsparse.sparsify(model, "r-sparse", 0.5, 0.9, calibration=ids[:, :-2], store=store)
    theirs = {x.name: (x.threshold, x.rank) for x in report.linears}
    for name in first:
        if name.endswith(("q_proj", "k_proj", "v_proj")):  # their inputs depend on no sparse linear before them
            assert (first[name].threshold, first[name].rank) == pytest.approx(theirs[name])


@pytest.mark.parametrize("searcher", [SMALL, RandomSearch(SMALL), Coordinate()], ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("moves", [False, True])
def test_a_search_by_its_recipe(build, ids, store, searcher, moves):
    model = build()
    plan = search.Plan(0.5, searcher, groups=2, step=0.25, moves=moves)
    found = search.search(Calibration(model, ids), plan, store)
    recipe, origin = found.recipe, found.recipe.origin
    assert origin["evaluations"] == len(found.trace) and origin["seed"] == 0 and origin["sparsity"] == 0.5
    assert origin["started from rho"] in plan.rhos and math.isfinite(origin["perplexity"])
    assert {x["group"] for x in found.trace} == {-1, 0, 1}
    assert {x["cost"] for x in found.trace} == {2.0, 1.0, 0.5} and not hasattr(model, "_rsparse")
    report = rsparse.sparsify(model, "r-sparse", recipe=recipe, calibration=ids, store=store)
    assert report.planned == pytest.approx(0.5, abs=0.02) and report.asked == pytest.approx(0.5, abs=1e-9)
    asked = {x.sparsity for x in recipe.linears.values()}
    assert asked == {0.5} if not moves or isinstance(searcher, Coordinate) else len(asked) > 1
    for index in (0, 1):
        losses = [x["loss"] for x in found.trace if x["group"] == index]
        assert min(losses) <= losses[0], "what the group had is its first candidate"


def test_every_candidate_of_a_moving_search_can_be_tried(build, ids, store):
    """Gate holds a quarter of this block's bytes: five steps more leave nothing of it unread, and so no rank."""
    plan = search.Plan(0.5, SMALL, groups=2, step=0.25, start=1.0, moves=True)
    run = search.Run(Calibration(build(intermediate_size=256, num_key_value_heads=8), ids), plan, store)
    with run.trials:
        for group in run.groups:
            run.open_group(group)
            for i, (least, most) in enumerate(run._space(group).room):
                assert least < 0 < most
                for steps in range(least, most + 1):
                    candidate = [(0, steps) if j == i else (4, 0) for j in range(len(group))]
                    assert math.isfinite(run.trials.losses([run._asks(group, candidate)])[0])
            gate = group[4].name
            assert gate.endswith("gate_proj") and run._asks(group, [(0, -5)] * 7)[gate].sparsity == 0


def test_the_recipe_is_the_best_of_its_group(build, ids, store):
    """With one group, thresholds are read once: the trace's lowest loss is that of the recipe's linears."""
    model = build()
    plan = search.Plan(0.5, SMALL, groups=1, step=0.25, start=1.0)
    found = search.search(Calibration(model, ids), plan, store)
    group = decoder_linears(model)
    with Trials(Calibration(model, ids), {x.name: Ask(0.5, 1.0) for x in group}, store) as trials:
        trials.open(group, {x.name: trials.split(x, Ask(0.5, 0.0)).rank for x in group})
        best = trials.losses([found.recipe.linears])[0]
    assert best == pytest.approx(min(x["loss"] for x in found.trace), abs=1e-12)


def test_the_best_uniform_rho_is_that_of_the_grid(build, ids, store):
    model = build()
    plan = search.Plan(0.5, SMALL, groups=1, step=0.25)
    found = search.uniform(Calibration(model, ids), plan, store)
    rhos = {x.rho for x in found.recipe.linears.values()}
    losses = dict(zip(reversed(plan.rhos), (x["loss"] for x in found.trace), strict=True))
    assert rhos == {min(losses, key=losses.get)} and len(found.trace) == 5
    greedy = search.greedily(Calibration(model, ids), 0.5)
    greedy.check(model)
    assert {x.rho for x in greedy.linears.values()} == {1.0} and len({x.sparsity for x in greedy.linears.values()}) > 2


def test_the_same_seed_finds_the_same_and_an_interrupted_search_ends_the_same(build, ids, store, tmp_path):
    model, plan = build(), search.Plan(0.5, SMALL, groups=2, step=0.25)
    whole = search.search(Calibration(model, ids), plan, store, tmp_path / "whole.jsonl", batch_tokens=400)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for cut in (0, 1, 5, len(lines) - 1):
        torn = "".join(lines[:cut]) + (lines[cut][:7] if cut < len(lines) else "")
        (tmp_path / "cut.jsonl").write_text(torn)
        again = search.search(Calibration(model, ids), plan, store, tmp_path / "cut.jsonl", batch_tokens=400)
        assert again == whole
        assert (tmp_path / "cut.jsonl").read_text() == "".join(lines), "the same batches"
    with pytest.raises(ValueError, match="is the journal of another search; expected one with the same arguments"):
        other = search.Plan(0.5, SMALL, seed=1, groups=2, step=0.25)
        search.search(Calibration(model, ids), other, store, tmp_path / "cut.jsonl", batch_tokens=400)


def test_a_journal_keeps_whole_batches(tmp_path):
    journal = Journal(tmp_path / "j", {"a": 1})
    journal.update({("0", "x"): 0.1, ("0", "y"): 1e-300})
    with open(tmp_path / "j", "a") as file:
        file.write('[[["0", "z"], 0.5], [["0"')
    again = Journal(tmp_path / "j", {"a": 1})
    assert len(again) == 2 and again["0", "y"] == 1e-300 and ("0", "z") not in again
    again.update({("0", "z"): 0.25})
    assert Journal(tmp_path / "j", {"a": 1})["0", "z"] == 0.25


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(sparsity=0.0), "sparsity is 0; expected more"), (dict(groups=0), "groups is 0"),
    (dict(step=0.3), "step is 0.3"), (dict(start=0.97), "start is 0.97; expected a rho of the grid"),
    (dict(score="norm"), "score is 'norm'"),
])  # fmt: skip
def test_plans_that_are_not_allowed(wrong, message):
    with pytest.raises(ValueError, match=message):
        search.Plan(**dict(sparsity=0.5) | wrong)


def test_models_that_cannot_be_searched(build, ids, store):
    model = build()
    with pytest.raises(ValueError, match="groups is 8 for a model of 2 blocks"):
        search.search(Calibration(model, ids), search.Plan(0.5, SMALL), store)
    calibration = Calibration(model, ids)
    rsparse.sparsify(model, "teal", 0.5, threshold="per-token")
    with pytest.raises(ValueError, match="the model is sparse"):
        search.search(calibration, search.Plan(0.5, SMALL, groups=1), store)


COMMAND = ["search", "--preset", "tiny", "--sparsity", "0.5", "--start", "1", "--step", "0.5", "--samples", "2",
           "--length", "64", "--population", "8", "--generations", "3"]  # fmt: skip


def command(out, cache, *more: str) -> subprocess.Popen:
    run = [sys.executable, "-m", "rsparse", *COMMAND, "--out", str(out), *more]
    env = {"PATH": "/usr/bin:/bin", "RSPARSE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HOME": str(cache)}
    return subprocess.Popen(run, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_at_any_moment_it_ends_with_the_identical_recipe(build, tmp_path, monkeypatch):
    """The command itself, killed with -9 when some batches are on disk, then called again."""
    monkeypatch.setenv("RSPARSE_CACHE", str(tmp_path))
    assert main([*COMMAND, "--out", str(tmp_path / "whole.json")]) == 0  # here: another process would import all anew
    journal = tmp_path / "killed.json.journal"
    for lines in (2, 7):
        process = command(tmp_path / "killed.json", tmp_path)
        while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (tmp_path / "killed.json").exists()
    said, _ = command(tmp_path / "killed.json", tmp_path).communicate()
    assert "saved as" in said
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes() and not journal.exists()
    recipe = Recipe.load(tmp_path / "killed.json")
    assert recipe.origin["seed"] == 0 and json.loads((tmp_path / "killed.json").read_text())["model"] == recipe.model
    with pytest.raises(ValueError, match="is for the model with fingerprint"):
        recipe.check(build())


@pytest.mark.parametrize(("more", "message"), [
    (["--searcher", "annealing"], "searcher is 'annealing'; expected one of evolution, random"),
    (["--population", "2"], "population is 2"), (["--step", "0.3"], "step is 0.3"),
    (["--preset", "nothing"], "'nothing'"), (["--sparsity", "1.5"], "sparsity is 1.5"),
    (["--out", "/"], "/ is a folder; expected a file to write"), (["--out", "."], ". is a folder; expected a file"),
    (["--out", f"{__file__}/x.json"], "test_search.py is no folder; expected one"),
])  # fmt: skip
def test_what_the_command_refuses_before_it_loads_a_model(tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.setattr("rsparse.models.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main([*COMMAND, "--out", str(tmp_path / "x.json"), *more]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_cost_that_cannot_be_written_is_not_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("rsparse.models.load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main(["search-cost", "--shape", "llama-2-7b", "--json", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder; expected a file to write" in capsys.readouterr().err


def test_what_a_search_costs(monkeypatch, tmp_path):
    """On a CPU at a small shape: four blocks in four groups, so that a candidate runs 2.5 of 4 on average."""
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
    small = shape_config("llama-3-8b", vocab_size=97, num_key_value_heads=2, **sizes)
    monkeypatch.setattr("rsparse.search_cost.models.load_model", lambda *_: random_model(small))
    monkeypatch.setenv("RSPARSE_CACHE", str(tmp_path))
    found = search_cost.measure("llama-3-8b", 0.5, 4, 2, 64, 2, "float32", "cpu")
    assert found["bound"] == 0.625 and found["groups"] == len(found["candidate_s"]) == len(found["open_s"]) == 4
    assert found["mean_share"] == pytest.approx(sum(found["candidate_s"]) / 4 / found["full_pass_s"])
    assert found["full_pass_s"] == found["candidate_s"][0] and found["evaluations"] == 160
    opened = sum(found["open_s"])
    assert found["hours_per_group"] * 3600 == pytest.approx(160 * sum(found["candidate_s"]) + opened)
    assert found["hours_in_total"] * 3600 == pytest.approx(40 * sum(found["candidate_s"]) + opened)
    search_cost.save(found, tmp_path / "cost.json")
    assert json.loads((tmp_path / "cost.json").read_text()) == found
