"""`python -m rsparse bench-decode`: its arithmetic by hand, one run on a small model, and what it refuses."""

import json
import math
import re

import pytest
import torch

import rsparse
from rsparse.__main__ import main
from rsparse.bench_decode import baselines, measure, traffic
from rsparse.bench_decode.arrivals import Arrivals, repeated, summary, timed
from rsparse.bench_decode.measure import Plan
from rsparse.bench_decode.settling import STEPS, Steps, realised, settle
from rsparse.bench_decode.sketches import Sketches
from rsparse.bench_decode.traffic import Traffic, read_shares
from rsparse.decode import generate
from rsparse.models import random_model, shape_config

SIZES = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=131, max_position_embeddings=256)  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Every published shape is small, without and with weights."""
    monkeypatch.setattr("rsparse.models.shape_config", lambda shape, **_: shape_config(shape, **SIZES))


def arrivals(*seconds: float) -> Arrivals:
    return Arrivals(seconds, torch.zeros(1, len(seconds)))


def test_rates_from_arrivals():
    run = arrivals(2.0, 2.5, 3.0, 5.0)
    assert run.prefill == 2.0 and run.step() == 1.0 and run.step(3) == 0.5 and run.with_prefill(4) == 0.8


def test_medians_over_repeats_and_every_length_of_one_run():
    runs = [arrivals(*(1 + k * i for i in range(300))) for k in (0.5, 0.1, 0.2)]
    found = summary(runs)
    assert found["step_s"] == pytest.approx(0.2) and found["prefill_s"] == 1
    assert found["tokens_per_s"] == pytest.approx({"128": 5.0, "256": 5.0, "300": 5.0})
    assert found["with_prefill"]["128"] == pytest.approx(128 / (1 + 0.2 * 127))
    assert found["arrivals_s"] == pytest.approx(list(runs[2].seconds), abs=1e-5)
    assert found["fastest_step_s"] == pytest.approx(0.1) and found["slowest_step_s"] == pytest.approx(0.5)


def test_the_first_run_is_dropped():
    counted = iter([arrivals(9.0, 99.0), arrivals(1.0, 2.0), arrivals(1.0, 3.0)])
    assert [x.step() for x in repeated(lambda: next(counted), 2)] == [1.0, 2.0]


def test_arrivals_are_those_of_the_tokens(monkeypatch):
    clock = iter([10.0, 11.0, 13.0])
    monkeypatch.setattr("rsparse.bench_decode.arrivals.time.perf_counter", lambda: next(clock))
    found = timed(lambda: [torch.tensor([3, 4]), torch.tensor([5, 6])])
    assert found.seconds == (1.0, 3.0) and found.tokens.tolist() == [[3, 5], [4, 6]]


def test_hugging_faces_tokens_are_timed_one_by_one(build, ids):
    model = build()
    model.generation_config.eos_token_id = 3
    found = baselines.run(model, "hf-eager", ids[:2, :10], 30)
    assert len(found.seconds) == 30 and list(found.seconds) == sorted(found.seconds)
    assert found.tokens.equal(generate(model, ids[:2, :10], 30, stop=())[:, 10:])
    assert model.generation_config.eos_token_id == 3


def test_bytes_of_a_step(build):
    model = build("float32", num_key_value_heads=2)
    block = 64 * 64 * 2 + 64 * 16 * 2 + 3 * 64 * 176
    found = traffic.traffic(model, 3, 100.0)
    assert found == Traffic(8.0 * block, 8.0 * block, 4 * 97 * 64, 4 * 5 * 64 + 3 * 4 * 64, 100.0)
    assert found.total == found.weights + 100 == found.decoder + found.head + found.rest + 100
    half = {f"model.layers.{i}.{part}_proj": 0.5 for i in (0, 1) for part in
            ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}  # fmt: skip
    assert traffic.traffic(model, 3, 100.0, half).decoder == found.decoder / 2


def test_a_batch_reads_the_union_of_its_masks(build, ids):
    model = build()
    report = rsparse.sparsify(model, "r-sparse", 0.5, rho=0.8, threshold="per-token", calibration=ids)
    one, many = (read_shares(*realised(model, Steps(x, (6,)))) for x in (ids[:1, :12], ids[:, :12]))
    for x in report.linears:
        assert one[x.name] == pytest.approx(x.read)
        assert x.read < many[x.name] <= 1 + x.overhead
    rsparse.sparsify(model, "cats", 0.2, calibration=ids)
    shares = read_shares(*realised(model, Steps(ids[:1, :12], (6,))))
    assert shares["model.layers.0.self_attn.q_proj"] == shares["model.layers.0.mlp.gate_proj"] == 1
    assert shares["model.layers.0.mlp.up_proj"] == shares["model.layers.0.mlp.down_proj"] < 1


@pytest.mark.parametrize("method, options", [("teal", {}), ("r-sparse", dict(rho=0.8, score="column-norm"))])
def test_thresholds_settle_on_the_inputs_of_decode_steps(method, options):
    """At a length at which heads put out a fraction of what calibration samples have there."""
    model = random_model(shape_config("llama-2-7b", **SIZES))
    ids = torch.randint(0, 131, (1, 216))
    rsparse.sparsify(model, method, 0.5, tokens="decode", calibration=ids[:, :16], store=Sketches(), **options)
    steps = Steps.over(ids, 184)
    assert steps.starts == (184, 192, 200) and STEPS == 16
    before, _ = realised(model, steps)
    settle(model, steps)
    after, _ = realised(model, steps)
    assert abs(before.worst.realised - (1 - before.worst.read)) > 0.1
    assert abs(after.worst.realised - (1 - after.worst.read)) < 0.02
    assert after.realised == pytest.approx(after.planned, abs=0.01)


def test_nothing_is_settled_where_no_quantile_was_asked_for(build, ids):
    model = build()
    rsparse.sparsify(model, "relufication", calibration=ids)
    settle(model, Steps(ids[:1], (10,)))
    assert all(x.threshold == 0 for _, x in model._rsparse.masks.values())


def test_sketches_are_projections():
    weight = torch.randn(30, 20)
    found = Sketches(1).get(weight, 20)
    torch.testing.assert_close(found.A @ found.B.T, weight)  # all directions
    few = Sketches(1).get(weight, 5)
    torch.testing.assert_close(few.A @ few.B.T, weight @ few.B @ few.B.T)
    assert (few.A @ few.B.T - weight).norm() < weight.norm() and few.rank == 5


def test_one_run(small, tmp_path, capsys):
    path = tmp_path / "out.json"
    arguments = ["bench-decode", "--shape", "llama-3-8b", "--device", "cpu", "--dtype", "float32", "--prompt", "20",
                 "--new", "40", "--batch", "2", "--repeats", "2", "--baselines", "hf-eager", "--no-compiled",
                 "--methods", "dense,teal,r-sparse@0.4,griffin@0.2", "--json", str(path)]  # fmt: skip
    assert main(arguments) == 0
    found = json.loads(path.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["hf-eager", "dense", "teal", "r-sparse", "griffin"]
    assert found["bandwidth"] > 0 and found["versions"]["torch"] and found["prompt"] == 20 and found["new"] == 40
    assert rows["dense"]["equal_to_hf_eager"] > 0.9
    for row in rows.values():
        assert len(row["arrivals_s"]) == 40 and row["arrivals_s"] == sorted(row["arrivals_s"])
        assert row["tokens_per_s"]["40"] == pytest.approx(1 / row["step_s"])
        assert row["share_of_limit"] == pytest.approx(1 / row["step_s"] / row["limit_tokens_per_s"])
        assert row["bytes"]["cache"] == 2 * 40 * 2 * 2 * 2 * 32 * 4  # rows, positions, layers, k and v, heads, width
        assert row["process_peak_memory"] > 0
    assert rows["teal"]["realised"] == pytest.approx(0.5, abs=0.02) and rows["teal"]["asked"] == 0.5
    assert rows["r-sparse"]["realised"] == pytest.approx(0.4, abs=0.02)
    assert rows["teal"]["linears"] == rows["griffin"]["linears"] == "kernels: cpu"
    assert rows["dense"]["linears"] == "fused"
    for name in ("dense", "teal", "griffin"):
        parts = rows[name]["step_parts_s"]
        assert list(parts) == ["qkv", "out", "gated", "down", "attention", "head", "step", "left"]
        assert parts["left"] == pytest.approx(parts["step"] - sum(list(parts.values())[:6]))
        assert max(list(parts.values())[:6]) > 0 < parts["step"]  # timed apart: on a busy machine either may be longer
    assert 0.6 < rows["teal"]["bytes"]["decoder"] / rows["dense"]["bytes"]["decoder"] < 0.85  # two rows: about 0.75
    assert rows["dense"]["byte_limit_over_dense"] == 1 < rows["teal"]["byte_limit_over_dense"]
    printed = capsys.readouterr().out
    assert re.search(r"teal \(ours, kernels: cpu\): [0-9.]+ tokens/s per text, ", printed), "a batch of two"
    assert "x hf-eager" in printed and "realised sparsity 0." in printed


REFUSED = {
    "method": (["--methods", "magic"], "method is 'magic'; expected one of dense"),
    "spaces": (["--methods", "dense teal"], "method is 'dense teal'; expected one of .*, and commas between several"),
    "its sparsity": (["--methods", "teal@2"], r"expected names, or name@sparsity with a sparsity in \[0, 1\)"),
    "no knob": (["--methods", "teal,dense@0.5"], "method is 'dense@0.5'; expected dense, which takes no sparsity"),
    "no knob either": (["--methods", "relufication@0.5"], "expected relufication, which takes no sparsity"),
    "nothing": (["--methods", "", "--baselines", ""], "methods and baselines are empty; expected at least one"),
    "twice": (["--methods", "teal,dense,teal@0.50"], "teal,dense,teal@0.50, with teal@0.5 twice; expected each once"),
    "baseline twice": (["--baselines", "hf-eager,hf-eager"], "with hf-eager twice; expected each once"),
    "baseline": (["--baselines", "vllm"], "baseline is 'vllm'; expected one of hf-eager, hf-static-compiled"),
    "reach": (["--methods", "cats@0.6"], "sparsity 0.6 cannot be reached by cats; expected less than 0."),
    "sparsity": (["--sparsity", "1"], "sparsity is 1.0; expected a number in"),
    "new": (["--new", "1"], "new is 1; expected at least 2"),
    "length": (["--new", "250"], "prompt 20 and new 250 take 270 positions; expected at most"),
    "batch": (["--batch", "17"], "the batch has 17 rows; expected at most 16"),
    "dtype": (["--dtype", "int8"], "dtype is 'int8'; expected one of float64, .*, int4"),
    "int4": (["--dtype", "int4"], "device 'cpu'; expected 1 and a GPU for int4"),
    "device": (["--device", "abacus"], "device is 'abacus'"),
    "both": (["--model", "tiny"], "give --shape for random weights, or --model for a checkpoint"),
    "rho": (["--rho", "1.5"], "rho is 1.5; expected a number in"),
    "score": (["--score", "luck"], "score is 'luck'; expected one of magnitude, column-norm"),
    "text": (["--text", "tiny"], "text is 'tiny' for random weights, which read none; expected a checkpoint"),
    "layers": (["--layers", "3"], "layers is 3; expected at most 2, all of random:llama-2-7b's"),
    "recipe": (["--recipe", "nowhere.json"], "recipe nowhere.json cannot be read: No such file"),
    "content": (["--recipe", __file__], "is not JSON"),
    "folder": (["--json", "/"], "/ is a folder; expected a file"),
    "a file": (["--json", f"{__file__}/out.json"], "test_bench_decode.py is no folder; expected one"),
}


@pytest.mark.parametrize("more, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_measured(small, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.setattr("rsparse.models.random_model", lambda *_: pytest.fail("weights were made"))
    base = ["bench-decode", "--shape", "llama-2-7b", "--device", "cpu", "--dtype", "float32", "--prompt", "20", "--new",
            "30", "--json", str(tmp_path / "out.json")]  # fmt: skip
    assert main(base + more) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("methods", [(), ("dense", "relufication"), ("teal@0.25", "teal@0.4", "teal", "cats@0.25")])
def test_every_other_choice_of_rows(methods):
    assert Plan("tiny", methods=methods).methods == methods


def test_layers_of_a_checkpoint():
    with pytest.raises(ValueError, match="layers is 1 for the checkpoint 'tiny'; expected random weights"):
        Plan("tiny", layers=1)


def test_texts_of_a_checkpoint_are_known_and_random_weights_read_none():
    with pytest.raises(ValueError, match="text is 'newspaper'; expected tiny"):
        Plan("tiny", text="newspaper")
    assert Plan("random:llama-2-7b", text="tiny").text == "tiny", "as a preset names one for all of its models"


def test_a_recipe_of_another_model_is_refused_before_anything_is_timed(small, build, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "repeated", lambda *_: pytest.fail("something was timed"))
    path = tmp_path / "recipe.json"
    rsparse.Recipe.uniform(build(), 0.5, 0.9).save(path)
    with pytest.raises(ValueError, match="is for the model with fingerprint"):
        measure.measure(Plan("random:llama-2-7b", "float32", "cpu", recipe=str(path), prompt=5, new=5))


def test_a_killed_run_leaves_the_rows_so_far(small, tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    monkeypatch.setattr(measure, "_sparsify", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    plan = Plan("random:llama-2-7b", "float32", "cpu", ("teal",), ("hf-eager",), prompt=5, new=5, repeats=1)
    with pytest.raises(KeyboardInterrupt):
        measure.measure(plan, path)
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["hf-eager"]
    assert not any(math.isnan(x) for x in json.loads(path.read_text())["rows"][0]["tokens_per_s"].values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no INT4 kernel")
def test_int4_on_a_gpu(small):
    """Baselines on 16-bit weights, ours on words, at INT4's bytes."""
    sizes = dict(prompt=20, new=20, repeats=1, baselines=("hf-eager",), methods=("dense", "r-sparse"))
    eager, dense, sparse = measure.measure(Plan("random:llama-3-8b", "int4", **sizes))["rows"]
    assert eager["dtype"] == "bfloat16" and "dtype" not in dense
    assert dense["linears"] == sparse["linears"] == "kernels: triton, INT4 for one row"
    assert 3.5 < eager["bytes"]["decoder"] / dense["bytes"]["decoder"] < 4
    assert sparse["bytes"]["decoder"] == pytest.approx(dense["bytes"]["decoder"] / 2, rel=0.05)
    assert "INT4" not in eager["linears"] and "Configuration" in sparse["configurations"]["qkv"]
