"""Figure 6's exhibit: rows from bench-decode's documents, and readings of made-up ones whose answers are known."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from rsparse import claims, figures
from rsparse.exhibits import (
    decode_bounds_reading,
    decode_live_reading,
    decode_quality_reading,
    decode_reading,
    decode_rows,
    decode_speed,
)
from rsparse.results import Table

STEPS = {"hf-eager": 0.04, "hf-static-compiled": 0.03, "dense": 0.02}
"""Seconds of a step."""
H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"


def row(name: str, step: float | None = None, sparsity: float = 0.0, **changes) -> dict:
    """As `python -m rsparse bench-decode` writes it: a step of 10% attention and 10% head, 80% products."""
    step = step or STEPS[name]
    ours = not name.startswith("hf")
    parts = dict(qkv=0.2, out=0.1, gated=0.3, down=0.2, attention=0.1, head=0.1, step=1.0, left=0.0)
    kept = 1 - sparsity
    found = {
        "name": name, "engine": "ours" if ours else "hugging face", "prefill_s": 0.5, "step_s": step,
        "tokens_per_s": {"128": 1.1 / step, "512": 1 / step, "2048": 0.9 / step}, "with_prefill": {"2048": 1.0},
        "slowest_step_s": 1.1 * step, "fastest_step_s": 0.9 * step, "arrivals_s": [0.5, 0.6],
        "bytes": {"decoder": 100 * kept, "dense": 100.0, "head": 10, "rest": 0, "cache": 0, "total": 100 * kept + 10},
        "byte_limit_over_dense": 110 / (100 * kept + 10), "non_weight_s": 0.001, "gpu_peak_memory": 1000,
        "linears": "kernels: triton" if sparsity else "dense",
    }  # fmt: skip
    if ours:
        found["step_parts_s"] = {part: share * step for part, share in parts.items()}
    if name not in STEPS:
        found |= {"asked": sparsity, "planned": sparsity, "realised": sparsity + 0.01, "recipe": ""}
    return found | changes


def document(*rows: dict, **changes) -> dict:
    return {
        "model": "random:llama-2-7b", "dtype": "float32", "device": "cuda", "batch": 1, "prompt": 2048, "new": 2048,
        "repeats": 3, "rho": 0.95, "score": "magnitude", "compiled": True, "bandwidth": 1e12, "layers": None, "seed": 0,
        "device_name": H100, "versions": {"torch": "2"}, "date": "2026-01-01T00:00:00+00:00", "rows": list(rows),
    } | changes  # fmt: skip


def baselines() -> list[dict]:
    return [row(name) for name in STEPS]


def frame(*documents: dict) -> pd.DataFrame:
    return pd.DataFrame([x for one in documents for x in decode_rows.flat(one)])


WHOLE = document(*baselines(), row("teal", 0.0125, 0.5), row("r-sparse", 0.016, 0.25), row("r-sparse", 0.0125, 0.5))


# Rows


def test_a_flat_row_holds_its_run_and_nested_fields():
    flat = decode_rows.flat(WHOLE)[-1]
    assert (flat["model"], flat["weights"], flat["layers"], flat["device"]) == ("llama-2-7b", "random", 0, H100)
    assert flat["step_parts_s.qkv"] == pytest.approx(0.0025) and flat["bytes.total"] == 60 and flat["sparsity"] == 0.5
    assert "arrivals_s" not in flat and decode_rows.layers_s(flat) == pytest.approx(0.9 * 0.0125)


def test_ratios_are_to_every_baseline_of_the_document_and_come_back_as_numbers():
    rows = pd.DataFrame(decode_rows.table_rows(decode_rows.flat(WHOLE), 0))
    own = rows[(rows["method"] == "r-sparse") & (rows["sparsity"] == 0.5)]
    gains = own[(own["metric"] == "speed_gain") & (own["generation"] == 512)].set_index("baseline")["value"]
    assert gains.to_dict() == pytest.approx({"hf-eager": 2.2, "hf-static-compiled": 1.4, "dense": 0.6})
    (layers,) = own[own["metric"] == "layers_over_dense"].to_dict("records")
    assert layers["value"] == pytest.approx(1.6)
    assert layers["low"] == pytest.approx((0.018 - 0.002) / (0.01375 - 0.00125)), "the head is not what varies"
    once = decode_rows.table_rows(decode_rows.flat(WHOLE | {"repeats": 1}), 0)
    assert not any("low" in x for x in once), "a single repeat has no range"
    wide = decode_rows.wide(rows)
    assert list(wide["name"]) == [*STEPS, "teal", "r-sparse", "r-sparse"]
    pd.testing.assert_series_equal(wide["tokens_per_s.128"], frame(WHOLE)["tokens_per_s.128"])
    assert wide["step_parts_s.head"].isna().tolist() == [True, True, False, False, False, False]


def test_a_row_that_read_every_weight_has_no_ratio():
    made = document(row("dense"), row("wina", 0.05, 0.5, linears="reference: no kernel"))
    rows = pd.DataFrame(decode_rows.table_rows(decode_rows.flat(made), 0))
    assert set(rows["task"]) == {"decode"}
    known = frame(made)
    assert list(decode_reading.speeds(known)["name"]) == ["dense"]
    said = decode_reading.coverage_reading(known)
    assert "1 row was computed by the evaluation's modules, which read every weight (WINA 50%)" in said


def test_a_plan_is_measured_once_per_machine(monkeypatch, tmp_path):
    asked = []

    def measure(plan):
        asked.append(plan.dtype)
        return document(row("dense"), row("r-sparse", 0.0125, 0.5), dtype=plan.dtype, device="cpu", layers=plan.layers)

    monkeypatch.setattr(decode_speed.bench, "measure", measure)
    options = dict(device="cpu", methods=["dense", "r-sparse"], baselines=[], prompt=4, new=4)
    plans = decode_speed.plans("random:llama-2-7b", ["float32", "bfloat16"], 1, **options)
    for machine in ("one", "one", "another"):
        monkeypatch.setattr(decode_speed, "device_name", lambda _, name=machine: name)
        table = Table("figure-6", "smoke", tmp_path / "figure-6")
        for plan in plans:
            decode_speed.measure(table, plan)
    assert asked == ["float32", "bfloat16"] * 2
    own = decode_rows.wide(table.finish(0, {}))
    assert list(own["dtype"]) == ["float32"] * 2 + ["bfloat16"] * 2 and set(own["layers"]) == {1}
    assert decode_speed.plans("", ["float32"], 1, **options) == []
    assert decode_rows.wide(Table("figure-6", "smoke", tmp_path / "empty").frame).empty
    with pytest.raises(ValueError, match="magic"):
        decode_speed.plans("random:llama-2-7b", ["float32"], 1, **options | {"methods": ["magic"]})


# What is published


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "decode").mkdir()
    (tmp_path / "decode" / "a.json").write_text(json.dumps(WHOLE))
    later = document(row("r-sparse", 0.01, 0.5), date="2026-01-02T00:00:00+00:00")
    (tmp_path / "decode" / "0.json").write_text(json.dumps(later))
    return tmp_path / "decode"


def test_the_later_of_two_timings_counts(folder):
    known = decode_rows.published(folder)
    (last,) = decode_reading.at(known, name="r-sparse", sparsity=0.5)["step_s"]
    assert last == 0.01 and len(known) == 6
    (shown,) = decode_reading.coverage(known).to_dict("records")
    assert shown["layers"] == "all" and shown["measured"] == "2026-01-02" and "R-Sparse 25%" in shown["rows"]


def test_nothing_published_is_said_and_nothing_fails(tmp_path):
    known = decode_reading.speeds(decode_rows.published(tmp_path / "absent"))
    assert "Nothing is published yet" in decode_reading.coverage_reading(known)
    quality = decode_quality_reading.losses([])
    chosen = [decode_reading.lengths, decode_reading.teal, decode_reading.parts, decode_reading.sweep,
              decode_reading.batches, decode_reading.ratios, decode_live_reading.rows,
              decode_quality_reading.choice(quality)]  # fmt: skip
    one = known.reindex(range(1)).iloc[:0]
    for choose in chosen:
        assert list(decode_reading.devices(known, choose)) == [] and choose(one).empty
        assert decode_reading.absent(known, choose, "it") == "*No published file has it yet, so that nothing is " \
                                                             "shown here.*"  # fmt: skip
    assert "speeds" in decode_quality_reading.missing(known, quality)
    bounds = decode_bounds_reading.table(known, pd.DataFrame())
    assert set(bounds["met"]) == {"not measured"} and len(bounds) == len(decode_bounds_reading.BOUNDS) + 1
    assert decode_bounds_reading.reading(bounds) == "0 of 0 bounds that were measured are met. 9 were not measured."
    assert decode_bounds_reading.limits(known).empty


def test_only_baselines_is_no_comparison():
    known = frame(document(*baselines()))
    assert decode_reading.sweep(known).empty and decode_reading.teal(known).empty and decode_reading.ratios(known).empty
    assert "not measured" in decode_reading.gain_reading(decode_reading.lengths(known))


# Sections


def test_gains_over_length_stand_beside_the_papers():
    own = decode_reading.lengths(frame(WHOLE, document(row("dense", new=9), prompt=5)))
    assert set(own["prompt"]) == {2048} and 0.25 not in set(own["sparsity"])
    points = decode_reading.length_points(own)
    assert points[(points["series"] == "R-Sparse 50%") & (points["x"] == 128)]["value"].item() == pytest.approx(88)
    table = decode_reading.gain_table(own).set_index("gain")
    assert table.loc["over Hugging Face, eager", "512 tokens (%)"] == pytest.approx(220)
    assert table.loc["over our dense engine", "512 tokens (%)"] == pytest.approx(60)
    assert table["paper, A6000, up to (%)"].dropna().to_dict() == {"over Hugging Face, eager": 42}
    said = decode_reading.gain_reading(own)
    assert "60% over our dense engine" in said and "220% for llama-2-7b, where the paper has 42%" in said
    assert "0 of 3 gains shrink" in said
    points = decode_reading.gain_points(own)
    assert set(points.dropna(subset=["mark"])["series"]) == {"over Hugging Face, eager"}, "and beside no other line"
    figures.speed_lines(points, "x", "y", doubling=True, level=0, mark="paper")


def test_other_papers_numbers():
    assert decode_reading.paper_gain("llama-3-8b") == 40 and pd.isna(decode_reading.paper_gain("mistral-7b"))
    assert decode_reading.paper_teal("llama-2-7b", 0.5, "a6000") == "1.78"
    assert decode_reading.paper_teal("mistral-7b", 0.25, "a100") == "1.11 to 1.16 (its models)"
    assert decode_reading.paper_teal("mistral-7b", 0.0, "a100") == ""


def test_teal_stands_over_every_baseline():
    own = decode_reading.teal(frame(WHOLE))
    (found,) = decode_reading.teal_table(own).to_dict("records")
    assert found["over our dense engine"] == pytest.approx(1.6) and found["over HF eager"] == pytest.approx(3.2)
    assert found["TEAL's paper, A6000"] == "1.78" and "1.60 at 50%" in decode_reading.teal_reading(own)


def test_parts_of_a_step():
    own = decode_reading.parts(frame(WHOLE))
    assert [decode_reading.label(x) for _, x in own.iterrows()] == ["our dense engine", "uniform TEAL 50%",
                                                                    "R-Sparse 50%"]  # fmt: skip
    assert decode_reading.part_table(own)["gate+up"].tolist() == pytest.approx([6.0, 3.75, 3.75])
    assert "80% of our dense engine's" in decode_reading.part_reading(own)
    assert "attention takes 10%" in decode_reading.part_reading(own)


def test_sparsity_against_the_same_engine_and_the_bytes():
    own = decode_reading.sweep(frame(WHOLE, document(row("dense"), row("teal", 0.03, 0.4), prompt=5, new=200)))
    assert set(own["prompt"]) == {2048}, "the lengths with the most rows"
    points = decode_reading.sweep_points(own)
    last = points.iloc[-1]
    assert (last["x"], last["value"], last["limit"]) == pytest.approx((51, 1.6, 110 / 60))
    said = decode_reading.sweep_reading(own)
    assert "R-Sparse is faster in 2 of 2 timings, by at most 1.60 (50%, llama-2-7b, float32; bytes alone 1.83)" in said


def test_several_texts_want_more_together():
    many = document(row("dense"), row("r-sparse", 0.025, 0.5, bytes={"decoder": 90.0, "dense": 100.0}), batch=4)
    own = decode_reading.batches(frame(WHOLE, many))
    table = decode_reading.batch_table(own)
    assert table["texts"].tolist() == [1, 4] and table["tokens/s, all texts"].tolist() == pytest.approx([80, 160])
    assert table["over our dense engine"].tolist() == pytest.approx([1.6, 0.8])
    said = decode_reading.batch_reading(own)
    assert "1.60 with 1, 0.80 with 4, where 90% of the bytes are wanted instead of 50%" in said
    figures.speed_lines(decode_reading.batch_points(own), "texts", "", doubling=True, columns=2)


def test_three_ratios_and_eager_code_in_fp32():
    half = document(row("dense", 0.01), row("r-sparse", 0.008, 0.5), dtype="bfloat16")
    own = decode_reading.ratios(frame(WHOLE, half))
    table = decode_reading.ratio_table(own).set_index("storage")
    assert table.loc["float32", "over HF eager in FP32"] == pytest.approx(3.2)
    assert table.loc["bfloat16", "over HF eager in FP32"] == pytest.approx(5), "FP32's time over bfloat16's"
    assert pd.isna(table.loc["bfloat16", "over HF eager, same storage"])
    assert "1.25 to 1.60 over our dense engine" in decode_reading.ratio_reading(own)
    alone = decode_reading.ratios(frame(half))
    assert "Not measured beside it: HF compiled, same storage" in decode_reading.ratio_reading(alone)
    assert "another run" not in decode_reading.ratio_reading(own)
    later = document(row("dense"), row("r-sparse", 0.0125, 0.5), date="2026-01-02T00:00:00+00:00")
    rows = frame(document(*[row(name) for name in STEPS if name != "dense"]), later)
    halves = [later | {"dtype": "bfloat16"}, document(row("hf-eager"))]
    assert "another run on the same kind of device: Hugging Face, eager in FP32 (llama" in decode_reading.ratio_reading(
        decode_reading.ratios(frame(*halves))
    )
    assert "Timed in another run on the same kind of device: Hugging Face, compiled" in decode_reading.ratio_reading(
        decode_reading.ratios(rows)
    )


# Bounds


def short(device: str, dense: float, sparse: float, dtype: str = "bfloat16", memory: int = 1080) -> dict:
    rows = row("dense", 1 / dense), row("r-sparse", 1 / sparse, 0.5, gpu_peak_memory=memory)
    return document(*rows, dtype=dtype, prompt=5, new=200, device_name=device)


def test_bounds_are_judged_on_the_device_that_they_were_set_for():
    known = frame(short(H200, 230, 350), short(H200, 221, 361, "float16"), short(H100, 150, 200))
    found = decode_bounds_reading.table(known, pd.DataFrame())
    own = found[(found["model"] == "llama-2-7b") & found["device"].str.startswith("NVIDIA")]
    cells = {(x["bound"], x["device"]): (x["met"], x["storage"], x["measured"]) for _, x in own.iterrows()}
    assert cells["dense, tokens/s", H200][:2] == ("yes", "bfloat16"), "either storage will do"
    assert cells["R-Sparse, tokens/s", H200] == ("yes", "float16", pytest.approx(361))
    assert cells["dense, tokens/s", H100][0] == "not judged: no H200"
    assert cells["GPU memory, R-Sparse over dense", H200][::2] == ("yes", pytest.approx(1.08))
    assert cells["dense, ms of a step beside the weights", H200][2] == pytest.approx(1.0)
    slow = decode_bounds_reading.table(frame(short(H200, 200, 300, memory=1100)), pd.DataFrame())
    said = decode_bounds_reading.reading(slow)
    assert said.startswith("1 of 4 bounds that were measured are met.")
    assert "R-Sparse, tokens/s, llama-2-7b in bfloat16 on NVIDIA H200: 300 instead of at least 360" in said
    (limit,) = decode_bounds_reading.limits(frame(short(H200, 200, 300))).to_dict("records")
    assert (limit["projected byte limit"], limit["over our dense engine"]) == (1.96, pytest.approx(1.5))


def layers(sparse: float, **changes) -> pd.DataFrame:
    rows = row("dense", 0.1), row("r-sparse", sparse, 0.5, linears="kernels: cpu")
    return frame(document(*rows, device="cpu", device_name="CPU", layers=2, prompt=16, new=16, **changes))


def test_decoder_layers_alone_of_a_cpu():
    known = layers(0.08)
    (found,) = decode_bounds_reading.layers_rows(known)
    assert found["measured"] == pytest.approx(1.25) and found["met"] == "no"
    own = decode_live_reading.timed(known)
    assert "R-Sparse 50% 1.25 (less than the 1.4 asked for)" in decode_live_reading.reading(own)
    table = decode_live_reading.table(own)
    assert table["layers (ms)"].tolist() == pytest.approx([90, 72]) and table["range over repeats"][0] == ""
    live = decode_bounds_reading.table(known.iloc[:0], layers(0.05))
    assert live.iloc[-1]["met"] == "yes" and live.iloc[-1]["device"] == "CPU (this run)"
    assert "asked for" not in decode_live_reading.reading(layers(0.08, dtype="bfloat16"))
    with pytest.raises(ValueError, match="R-Sparse 50% has no dense row"):
        decode_live_reading.reading(own[own["name"] == "r-sparse"])


# Quality


def test_quality_of_a_preset_beside_speed_of_a_shape():
    cells = [("tiny", "tiny", "dense", 0.0, 2.0), ("tiny", "tiny", "r-sparse", 0.5, 2.2),
             ("tiny", "tiny", "teal", 0.5, 2.1), ("a6000", "Llama-3-8B", "dense", 0.0, 2.0),
             ("a6000", "Llama-3-8B", "teal", 0.5, 3.0),
             ("rehearsal", "random:llama-2-7b", "teal", 0.5, 3.0)]  # fmt: skip
    table = pd.DataFrame([
        {"preset": preset, "model": model, "method": method, "sparsity": s, "value": value, "task": "heldout",
         "metric": "perplexity", "scope": "all", "recipe": None, "rho": None, "score": "magnitude"}
        for preset, model, method, s, value in cells
    ])  # fmt: skip
    quality = decode_quality_reading.losses([table])
    assert set(quality["preset"]) == {"tiny", "a6000"}, "random weights have no quality"
    own = decode_quality_reading.pairs(frame(WHOLE), decode_quality_reading.chosen_presets(quality))
    assert set(own["preset"]) == {"tiny"}, "another model's quality is not set beside this shape"
    assert own.set_index("method")["loss"].to_dict() == pytest.approx({"teal": 0.0487902, "r-sparse": 0.0953102})
    assert own.set_index("method")["front"].to_dict() == {"teal": True, "r-sparse": False}, "as fast, and worse"
    assert "uniform TEAL at 50%" in decode_quality_reading.reading(own)
    assert "an analogue" in decode_quality_reading.reading(own)
    figures.pareto(own)


# Claims


def test_published_timings_decide_claims(folder, tmp_path):
    table = Table("figure-6", "h200", tmp_path / "results" / "h200")
    decode_speed.take(table, folder)
    table.finish(0, {})
    found = {x.claim.id: x for x in claims.evaluate(tmp_path / "results") if x.claim.exhibit == "figure-6"}
    assert found["generation-gain"].verdict == "analogue holds"
    assert found["generation-gain"].ours.value == pytest.approx(3.0), "the later of two timings"
    assert found["gain-shrinks-with-length"].verdict == "analogue does not hold"
    assert found["teal-decode-speedup"].ours.value == pytest.approx(1.6), "over the same engine, not over slower code"
    assert found["faster-than-the-same-engine"].verdict == found["faster-than-compiled"].verdict == "control passed"
    layers = found["layers-are-faster"]
    assert layers.verdict == "control passed" and layers.reason.startswith("holds for ")
    card = claims.scorecard_markdown(claims.judged(tmp_path / "results"))
    assert layers.devices and f"timed on {' and '.join(layers.devices)}" in card and "machine that ran" not in card


@pytest.mark.parametrize(("at_256", "expected"), [(23, "analogue holds"), (26, "analogue does not hold")])
def test_published_speeds_of_eager_code_are_judged_length_by_length(tmp_path, at_256, expected):
    speeds = {"128": 22, "256": at_256, "512": 25, "1024": 24, "2048": 23}
    (tmp_path / "decode").mkdir()
    timed = document(row("hf-eager", tokens_per_s=speeds), row("r-sparse", 0.0125, 0.5))
    short = document(row("hf-eager", tokens_per_s={"200": 20}), prompt=5, new=200)
    for name, content in (("a", timed), ("b", short)):
        (tmp_path / "decode" / f"{name}.json").write_text(json.dumps(content))
    table = Table("figure-6", "h200", tmp_path / "results" / "h200")
    decode_speed.take(table, tmp_path / "decode")
    rows = table.finish(0, {})
    own = rows[rows["metric"] == "tokens_per_s"]
    assert set(own["name"]) == {"hf-eager"} and sorted(own["generation"]) == [128, 200, 256, 512, 1024, 2048]
    (found,) = [x for x in claims.evaluate(tmp_path / "results") if x.claim.id == "dense-rises-then-falls"]
    assert (found.verdict, found.devices) == (expected, (H100,))


def test_a_baseline_of_another_file_counts_and_another_setting_does_not(tmp_path):
    sparse = document(row("r-sparse", 0.0125, 0.5), date="2026-01-02T00:00:00+00:00")
    other = document(*baselines(), batch=4)
    rows = [x for one in (document(row("dense")), sparse, other) for x in decode_rows.flat(one)]
    found = pd.DataFrame(decode_rows.ratio_rows(rows, 0))
    assert set(found["baseline"]) == {"dense"} and len(found[found["metric"] == "speedup"]) == 3
