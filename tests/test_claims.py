"""Claims on made-up tables: every verdict can come out, and nothing comes out of nothing."""

import copy
import math
import re

import pandas as pd
import pytest
import yaml

from kernels.processors import OWN
from rsparse import claims
from rsparse.predicates import Context, NotMeasured, Outcome, decide, estimate

BASE = dict(method="r-sparse", sparsity=0.5, score="magnitude", rho=0.95, tokens="scored", task="average-4",
            metric="diff_acc", against="teal", seed=0, stderr=0.004, n=400)


def table(*rows):
    return pd.DataFrame([{**BASE, **row} for row in rows])


def write(folder, preset, exhibit, frame):
    (folder / preset).mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / preset / f"{exhibit}.csv", index=False)
    return folder


def verdict(folder, name, preset, **kwargs):
    found = [v for v in claims.evaluate(folder, **kwargs) if (v.claim.id, v.preset) == (name, preset)]
    assert len(found) == 1
    return found[0]


def dense(*values, model="Llama-2-7B", stderr=0.01):
    tasks = ["winogrande", "piqa", "sciq", "obqa"]
    return [dict(method="dense", sparsity=0.0, score=None, rho=None, against=None, metric="acc", task=task,
                 value=value, stderr=stderr, model=model) for task, value in zip(tasks, values, strict=True)]


PAPERS_DENSE = (0.6914, 0.7807, 0.938, 0.314)


@pytest.mark.parametrize(
    ("value", "low", "high", "preset", "expected"),
    [
        (0.012, 0.004, 0.020, "a6000-llama-2-7b", "reproduced"),
        (-0.012, -0.020, -0.004, "a6000-llama-2-7b", "not reproduced"),
        (0.002, -0.006, 0.010, "a6000-llama-2-7b", "undecided"),
        (0.012, 0.004, 0.020, "tiny", "analogue holds"),
        (-0.012, -0.020, -0.004, "tiny-full", "analogue does not hold"),
        (0.002, -0.006, 0.010, "somebody-elses", "undecided"),
        (0.012, 0.004, 0.020, "a6000-mistral-7b", "analogue holds"),  # the claim speaks of Llama-2-7B only
    ],
)
def test_verdicts(tmp_path, value, low, high, preset, expected):
    frame = table(dict(value=value, low=low, high=high), *dense(*PAPERS_DENSE))
    found = verdict(write(tmp_path, preset, "table-3", frame), "rank-path-accuracy", preset)
    assert found.verdict == expected
    assert found.ours.value == value
    if preset == "a6000-llama-2-7b":
        assert found.paper == {"Llama-2-7B": pytest.approx(0.0125)}
        assert found.difference == pytest.approx(value - 0.0125)


def test_no_verdict_before_the_dense_row_matches_the_paper(tmp_path):
    good = dict(value=0.012, low=0.004, high=0.020)
    off = [value - 0.03 for value in PAPERS_DENSE]
    found = verdict(write(tmp_path / "a", "a6000-llama-2-7b", "table-3", table(good, *dense(*off))),
                    "rank-path-accuracy", "a6000-llama-2-7b")
    assert found.verdict == "undecided" and "dense row" in found.reason
    found = verdict(write(tmp_path / "b", "a6000-llama-2-7b", "table-3", table(good)),
                    "rank-path-accuracy", "a6000-llama-2-7b")
    assert found.verdict == "undecided" and "cannot be checked" in found.reason
    found = verdict(write(tmp_path / "c", "tiny", "table-3", table(good)), "rank-path-accuracy", "tiny")
    assert found.verdict == "analogue holds"  # another model need not match the paper's dense row


@pytest.mark.parametrize(("value", "spread", "expected"), [
    (-0.004, 0.015, "analogue holds"), (0.03, 0.005, "analogue does not hold"), (0.02, 0.01, "undecided"),
])  # fmt: skip
def test_a_bound_of_what_may_be_missed(tmp_path, value, spread, expected):
    """At most 0.02 nats more on INT4 weights: what costs less holds, and so does what costs a little more."""
    base = dict(method="r-sparse", against="dense", sparsity=0.5, task="heldout", metric="diff_perplexity_log",
                score="magnitude", rho=0.95)  # fmt: skip
    own = base | dict(weights="int4-gptq", factor_dtype="float16", value=value, low=value - spread, high=value + spread,
                      stderr=spread / 2)  # fmt: skip
    frame = table(own, base | dict(weights=None, value=0.0, low=-1e-4, high=1e-4, stderr=5e-5))
    assert verdict(write(tmp_path, "tiny", "table-2", frame), "int4-compatible-perplexity", "tiny").verdict == expected


@pytest.mark.parametrize(("ratio", "expected"), [
    (1.6, "control passed"), (0.7, "control passed"), (5.0, "control failed"), (0.2, "control failed"),
])  # fmt: skip
def test_a_factor_of_two_has_two_sides(tmp_path, ratio, expected):
    base = dict(method=None, against=None, score="magnitude", metric="stable_rank", layer=0, linear="q", low=None,
                high=None, stderr=None, sparsity=0.9, rho=None)  # fmt: skip
    rows = [base | dict(task="dropped-values", value=3 * ratio), base | dict(task="bias-sums", value=3.0)]
    frame = table(*rows)
    assert verdict(write(tmp_path, "tiny", "figure-2", frame), "bias-rank-is-the-residuals", "tiny").verdict == expected


def test_controls_have_their_own_words(tmp_path):
    for value, low, expected in (
        (1.0, 0.91, "control passed"), (0.95, 0.83, "undecided"), (0.5, 0.3, "control failed"),
    ):  # fmt: skip
        bounds = {"low": [low, 0.0], "high": [min(1.0, value + 0.1), 0.09]}
        frame = pd.DataFrame({"metric": ["recovered_share", "false_share"], "value": [value, 0.0]} | bounds)
        write(tmp_path, "tiny", "planted-control", frame)
        assert verdict(tmp_path, "planted-rho-found", "tiny").verdict == expected
        assert verdict(tmp_path, "nothing-planted-nothing-found", "tiny").verdict == "control passed"


def test_absent_data_is_not_measured(tmp_path):
    assert claims.evaluate(tmp_path) == []
    write(tmp_path, "tiny", "table-3", pd.DataFrame({"unrelated": [1]}))
    write(tmp_path, "tiny", "figure-5", table(dict(value=0.1)).head(0))
    write(tmp_path, "tiny", "figure-1-3", table(dict(value=0.1, metric="other")).drop(columns="stderr"))
    assert {v.verdict for v in claims.evaluate(tmp_path)} == {"not measured"}


def test_random_weights_measure_speed_only(tmp_path):
    frame = table(dict(value=0.012, low=0.004, high=0.02))
    write(tmp_path, "h200", "table-3", frame)
    write(tmp_path, "tiny", "table-3", frame.assign(model="random:llama-2-7b"))
    speed = dict(method="r-sparse", against="dense", baseline="hf-eager", dtype="float32", sparsity=0.5, prompt=2048,
                 batch=1, layers=0, metric="speed_gain", model="random:llama-2-7b", shape="llama-2-7b")
    write(tmp_path, "h200", "figure-6", pd.DataFrame([{**speed, "generation": g, "value": v}
                                                      for g, v in ((128, 0.45), (2048, 0.3))]))
    assert verdict(tmp_path, "rank-path-accuracy", "h200").verdict == "not measured"
    assert verdict(tmp_path, "rank-path-accuracy", "tiny").verdict == "not measured"
    assert verdict(tmp_path, "generation-gain", "h200").verdict == "analogue holds"
    assert verdict(tmp_path, "gain-shrinks-with-length", "h200").verdict == "analogue holds"


GAIN = dict(method="r-sparse", against="dense", baseline="hf-eager", dtype="float32", sparsity=0.5, prompt=2048,
            batch=1, layers=0, metric="speed_gain", task="generation", device="NVIDIA RTX A6000", shape="llama-2-7b",
            linears="kernels: triton", new=2048)  # fmt: skip
LENGTHS = (128, 256, 512, 1024, 2048)


@pytest.mark.parametrize(("preset", "gain", "largest", "every"), [
    ("a6000-llama-2-7b", 0.36, "not reproduced", "reproduced"),  # 90% of 42 and of 38
    ("a6000-llama-3-8b", 0.365, "reproduced", "reproduced"),  # of 40 and of 36
    ("a6000-llama-3-8b", 0.3, "not reproduced", "not reproduced"),
    ("a6000-mistral-7b", 0.365, "analogue does not hold", "analogue holds"),  # nothing is printed: Llama-2-7B's
])  # fmt: skip
def test_a_gain_is_held_against_that_of_its_model(tmp_path, preset, gain, largest, every):
    write(tmp_path, preset, "figure-6", pd.DataFrame([GAIN | {"generation": x, "value": gain} for x in LENGTHS]))
    found = verdict(tmp_path, "generation-gain", preset)
    assert (found.verdict, found.devices) == (largest, ("NVIDIA RTX A6000",))
    assert "timed on NVIDIA RTX A6000" in claims.scorecard_markdown(claims.judged(tmp_path))
    assert verdict(tmp_path, "generation-gain-at-every-length", preset).verdict == every
    write(tmp_path, preset, "figure-6", pd.DataFrame([GAIN | {"generation": x, "value": 0.5} for x in LENGTHS[:-1]]))
    assert verdict(tmp_path, "generation-gain-at-every-length", preset).verdict == "not measured"


@pytest.mark.parametrize("elsewhere", [{"device": "other"}, {"shape": "other"}, {"new": 1024}])
def test_lengths_of_two_settings_are_not_every_length_of_one(tmp_path, elsewhere):
    rows = [GAIN | {"generation": x, "value": 0.5} for x in LENGTHS[:-1]]
    last = GAIN | {"generation": 2048, "value": 0.5}
    name, preset = "generation-gain-at-every-length", "a6000-llama-2-7b"
    write(tmp_path, preset, "figure-6", pd.DataFrame([*rows, last | elsewhere]))
    assert verdict(tmp_path, name, preset).verdict == "not measured"
    write(tmp_path, preset, "figure-6", pd.DataFrame([*rows, last, last | elsewhere | {"value": 0.1}]))
    found = verdict(tmp_path, name, preset)
    assert (found.verdict, found.reason) == ("reproduced", "holds for 1 of 1"), "the other one has too few lengths"


EAGER = GAIN | {"method": "dense", "name": "hf-eager", "linears": "dense", "against": None, "baseline": None,
                "metric": "tokens_per_s"}  # fmt: skip


def eager(speeds, **changes):
    return [EAGER | changes | {"generation": x, "value": y} for x, y in zip(LENGTHS, speeds, strict=True)]


PEAK = (20, 21, 22, 19, 18)


@pytest.mark.parametrize(("speeds", "expected"), [
    (PEAK, "reproduced"), ((22, 21, 20, 19, 18), "not reproduced"), ((20, 21, 22, 19, 23), "not reproduced"),
    ((20, 23, 22, 19, 18), "not reproduced"), ((20, 21, 22, 23, 18), "not reproduced"),
])  # fmt: skip
def test_the_dense_speed_has_its_peak_in_between(tmp_path, speeds, expected):
    write(tmp_path, "a6000-llama-2-7b", "figure-6", pd.DataFrame(eager(speeds)))
    found = verdict(tmp_path, "dense-rises-then-falls", "a6000-llama-2-7b")
    assert (found.verdict, found.devices) == (expected, ("NVIDIA RTX A6000",))


def test_the_peak_is_of_each_setting_and_not_of_their_mean(tmp_path):
    rows = eager([10 * x for x in PEAK]) + eager((20, 23, 22, 19, 18), device="other")
    write(tmp_path, "a6000-llama-2-7b", "figure-6", pd.DataFrame(rows))
    found = verdict(tmp_path, "dense-rises-then-falls", "a6000-llama-2-7b")
    assert (found.verdict, found.reason) == ("not reproduced", "holds for 1 of 2")
    assert found.devices == ("NVIDIA RTX A6000", "other")
    write(tmp_path, "a6000-llama-2-7b", "figure-6", pd.DataFrame([x for x in rows if x["generation"] in (512, 2048)]))
    assert verdict(tmp_path, "dense-rises-then-falls", "a6000-llama-2-7b").verdict == "not measured"


def test_whose_the_largest_number_is_stands_beside_all_that_were_timed(tmp_path):
    rows = [GAIN | {"generation": 128, "value": 0.3}, GAIN | {"generation": 128, "value": 0.5, "device": "other"}]
    write(tmp_path, "a6000-llama-2-7b", "figure-6", pd.DataFrame(rows))
    found = verdict(tmp_path, "generation-gain", "a6000-llama-2-7b")
    assert (found.devices, found.shown_on) == (("NVIDIA RTX A6000", "other"), ("other",))
    card = claims.scorecard_markdown(claims.judged(tmp_path))
    assert "timed on NVIDIA RTX A6000 and other, the number shown on other" in card


@pytest.mark.parametrize(("n", "low", "expected"), [
    (3, 1.01, "control passed"), (3, 0.99, "undecided"), (1, None, "control passed"), (1, 1.02, "control passed"),
])  # fmt: skip
def test_layers_timed_once_are_judged_without_a_range(tmp_path, n, low, expected):
    row = GAIN | dict(baseline="dense", metric="layers_over_dense", value=1.02, where="cuda", n=n, low=low)
    write(tmp_path, "h200", "figure-6", pd.DataFrame([row | {"high": low and 1.05}]))
    assert verdict(tmp_path, "layers-are-faster", "h200").verdict == expected
    write(tmp_path, "h200", "figure-6", pd.DataFrame([row | {"high": low and 1.05}, row | dict(
        value=0.98, n=1, low=None, device="other")]))  # fmt: skip
    assert verdict(tmp_path, "layers-are-faster", "h200").verdict == "control failed"


@pytest.mark.parametrize(("share", "expected"), [
    (None, "control passed"), (OWN, "control passed"), (OWN - 0.01, "undecided"),
])  # fmt: skip
def test_kernels_on_shared_processors_decide_nothing(tmp_path, share, expected):
    row = dict(task="gemv", sparsity=0.5, batch=1, inputs="gaussian", outputs=8, channels=8, device="CPU")
    rows = [row | dict(linear=x, metric="over_torch", value=1.4, stderr=0.01, n=3) for x in ("o", "down")]
    if share is not None:
        rows += [row | dict(linear=x, metric="processor_share", value=y) for x, y in (("o", 0.99), ("down", share))]
    write(tmp_path, "tiny", "kernels", pd.DataFrame(rows))
    found = verdict(tmp_path, "bytes-become-time", "tiny")
    assert found.verdict == expected
    assert found.reason == ("the machine was shared" if expected == "undecided" else "")


def test_tasks_and_budgets_that_the_paper_prints_have_verdicts(tmp_path):
    common = dict(task="average", metric="acc", stderr=0.004, n=9000)
    rows = [dict(method="dense", sparsity=0.0, value=0.659, **common),
            dict(method="r-sparse", sparsity=0.4, value=0.652, **common)]  # fmt: skip
    write(tmp_path, "a6000-llama-2-7b", "table-1", pd.DataFrame(rows))
    searched = dict(task="obqa", searcher="evolution", against="uniform 0.95", sparsity=0.7, value=0.03, low=0.01,
                    high=0.05)  # fmt: skip
    write(tmp_path, "a6000-llama-2-7b", "table-4", table(searched))
    teal = GAIN | dict(method="teal", baseline="dense", sparsity=0.4, metric="speedup", generation=200, value=1.36)
    write(tmp_path, "a6000-llama-2-7b", "figure-6", pd.DataFrame([teal]))
    assert verdict(tmp_path, "average-at-40", "a6000-llama-2-7b").verdict == "reproduced"
    assert verdict(tmp_path, "adaptive-at-70-on-obqa", "a6000-llama-2-7b").verdict == "reproduced"
    assert verdict(tmp_path, "teal-decode-speedup-40", "a6000-llama-2-7b").verdict == "not reproduced"  # 90% of 1.53


def test_a_printed_value_is_matched_within_two_standard_errors(tmp_path):
    common = dict(task="average", metric="acc", stderr=0.004, n=9000)
    rows = [dict(method="dense", sparsity=0.0, value=0.659, **common)]
    for value, expected in ((0.645, "reproduced"), (0.66, "not reproduced")):
        cell = dict(method="r-sparse", sparsity=0.5, value=value, **common)
        write(tmp_path, "a6000-llama-2-7b", "table-1", pd.DataFrame([*rows, cell]))
        assert verdict(tmp_path, "average-at-50", "a6000-llama-2-7b").verdict == expected
    write(tmp_path, "tiny", "table-1", pd.DataFrame([*rows, cell]))
    assert verdict(tmp_path, "average-at-50", "tiny").verdict == "not measured"


def test_score_map_share_counts_linears(tmp_path):
    common = dict(task="score-map", metric="share_top10")
    rows = [dict(control=control, layer=layer, linear=linear, value=value, **common)
            for layer in range(4) for linear in ("q", "down", "up", "o", "k")
            for control, value in (("real", 0.8), ("gaussian-w", 0.6), ("permuted-x", 0.85))]
    write(tmp_path, "tiny", "figure-1-3", pd.DataFrame(rows))
    assert verdict(tmp_path, "score-map-concentrates", "tiny").verdict == "analogue holds"
    assert verdict(tmp_path, "score-map-everywhere", "tiny").verdict == "analogue holds"
    assert verdict(tmp_path, "score-map-beyond-gaussian", "tiny").verdict == "control passed"
    assert verdict(tmp_path, "score-map-beyond-permuted", "tiny").verdict == "control failed"


def test_a_run_replaces_the_published_table(tmp_path):
    write(tmp_path / "published", "tiny", "table-3", table(dict(value=-0.1, low=-0.2, high=-0.01)))
    write(tmp_path / "run", "table-3", "table-3", table(dict(value=0.1, low=0.01, high=0.2)))
    published = verdict(tmp_path / "published", "rank-path-accuracy", "tiny")
    rerun = verdict(tmp_path / "published", "rank-path-accuracy", "tiny", runs={"tiny": tmp_path / "run"})
    assert (published.verdict, rerun.verdict) == ("analogue does not hold", "analogue holds")


# ---- predicates

def context(frame, **kwargs):
    return Context("t", {"t": frame}, lambda selector: 0.5, **kwargs)


def compare(left, op, right, **kwargs):
    return {"left": left, "is": op, "right": right, **kwargs}


ROWS = {"rows": {"metric": "diff_acc"}}


@pytest.mark.parametrize(
    ("low", "high", "op", "right", "extra", "state"),
    [
        (0.1, 0.3, ">", 0, {}, "holds"),
        (-0.1, 0.3, ">", 0, {}, "undecided"),
        (-0.3, -0.1, ">", 0, {}, "fails"),
        (-0.3, -0.1, "<", 0, {}, "holds"),
        (0.1, 0.3, ">", 0, {"margin": 0.2}, "undecided"),
        (0.1, 0.3, ">", 0, {"margin": 0.4}, "fails"),
        (-0.3, -0.1, "<", 0, {"margin": 0.05}, "holds"),
        (-0.1, 0.1, "within", 0, {"tolerance": 0.2}, "holds"),
        (-0.1, 0.3, "within", 0, {"tolerance": 0.2}, "undecided"),
        (0.3, 0.5, "within", 0, {"tolerance": 0.2}, "fails"),
        (0.0, 0.0, ">", 0, {}, "undecided"),  # all items tied
        (0.0, 0.0, ">", 0, {"interval": "exact"}, "fails"),
        (float("nan"), float("nan"), ">", 0, {}, "undecided"),
        (float("nan"), float("nan"), ">", 0, {"interval": "exact"}, "holds"),
    ],
)
def test_comparisons(low, high, op, right, extra, state):
    middle = (low + high) / 2 if low == low else 0.2
    frame = table(dict(value=middle, low=low, high=high, stderr=float("nan")))
    assert decide(compare(ROWS, op, right, **extra), context(frame)).state == state


def test_a_range_is_named_as_one():
    frame = table(dict(value=0.1, low=-0.1, high=0.3))
    outcome = decide(compare(ROWS, ">", 0, interval="range"), context(frame))
    assert (outcome.state, outcome.reason) == ("undecided", "the range includes the threshold")
    assert decide(compare(ROWS, ">", -0.2, interval="range"), context(frame)).state == "holds"


def test_differences_of_rows_add_errors_in_squares():
    frame = table(dict(method="a", value=0.6, stderr=0.03), dict(method="b", value=0.5, stderr=0.04))
    both = {"minus": [{"rows": {"method": "a"}}, {"rows": {"method": "b"}}]}
    found = estimate(both, context(frame))
    assert found.value == pytest.approx(0.1) and found.stderr == pytest.approx(0.05)
    ratio = estimate({"ratio": both["minus"]}, context(frame))
    assert ratio.value == pytest.approx(1.2)
    assert ratio.stderr == pytest.approx(1.2 * ((0.03 / 0.6) ** 2 + (0.04 / 0.5) ** 2) ** 0.5)


def test_tasks_average_as_independent_and_seeds_do_not():
    tasks = table(*(dict(task=t, value=v, stderr=0.02) for t, v in (("piqa", 0.4), ("sciq", 0.6))))
    found = estimate({"rows": {"task": ["piqa", "sciq"]}}, context(tasks))
    assert found.value == pytest.approx(0.5) and found.stderr == pytest.approx(0.02 / 2**0.5)
    seeds = table(*(dict(seed=s, value=v, stderr=0.02) for s, v in ((0, 0.4), (1, 0.6))))
    found = estimate(ROWS, context(seeds))
    assert found.value == pytest.approx(0.5) and found.stderr == pytest.approx(0.02)
    with pytest.raises(NotMeasured, match="obqa"):
        estimate({"rows": {"task": ["piqa", "obqa"]}}, context(tasks))
    seeds.loc[1, "stderr"] = float("nan")  # one seed without an error: the error of the mean is not known
    assert decide(compare(ROWS, ">", 0), context(seeds)).reason == "no interval beside the measured value"


def test_the_mean_over_seeds_stands_for_the_single_ones():
    rows = (dict(seed=s, value=v, stderr=e) for s, v, e in (("0", 0.2, 0.09), ("1", 0.6, 0.09), ("0/1", 0.4, 0.02)))
    frame = table(*rows, dict(seed="0", value=0.8, stderr=0.02, method="griffin"))  # calibrates nothing: one seed
    own = estimate({"rows": {"method": "r-sparse"}}, context(frame))
    assert (own.value, own.stderr) == pytest.approx((0.4, 0.02))
    both = estimate({"rows": {"method": ["r-sparse", "griffin"]}}, context(frame))
    assert both.value == pytest.approx(0.6)


def test_several_settings_are_not_mixed():
    frame = table(dict(value=0.1, tokens="all"), dict(value=0.3, tokens="decode"))
    outcome = decide(compare(ROWS, ">", 0), context(frame))
    assert (outcome.state, outcome.reason) == ("undecided", "rows differ in tokens")
    preferring = context(frame, prefer={"tokens": {"default": ["scored", "decode", "all"]}})
    assert estimate(ROWS, preferring).value == 0.3
    per_metric = context(frame, prefer={"tokens": {"default": ["decode"], "diff_acc": ["all"]}})
    assert estimate(ROWS, per_metric).value == 0.1


def test_argmin_query_and_logarithm():
    curve = {0.0: 9.0, 0.3: 7.0, 0.7: 6.0, 0.95: 5.0, 1.0: 5.5}
    frame = table(*(dict(rho=rho, value=value, stderr=0.3) for rho, value in curve.items()))
    where = context(frame)
    assert estimate({"argmin": ROWS, "of": "rho"}, where).value == 0.95
    assert math.isnan(estimate({"argmin": ROWS, "of": "rho"}, where).bounds()[0]), "for display only"
    one = {**ROWS, "query": "rho == 0"}
    found = estimate({"log": one}, where)
    assert found.value == pytest.approx(math.log(9)) and found.spread() == pytest.approx(0.3 / 9)
    assert estimate({"log": 2.0}, where).exact
    assert decide(compare({"log": {"minus": [1, 1]}}, "<", 0), where).state == "missing"
    assert decide(compare({**ROWS, "query": "depth > 0.8"}, "<", 0), where).state == "missing"


def test_one_of_several_or_each_of_them():
    """The forms of the claims about the sweep of rho: "some rho beats rho 1", "every step down is worse"."""

    def outcome(at_least: float, *reaches: tuple[float, float]) -> str:
        rows = [dict(value=(low + high) / 2, low=low, high=high) for low, high in reaches]
        frame = table(*(row | {"rho": 0.9 + i / 100} for i, row in enumerate(rows)))
        of = compare({**ROWS, "query": "rho < 1"}, "<", 0)
        return decide({"share": {"by": ["rho"], "at_least": at_least, "of": of}}, context(frame)).state

    better, worse, unclear = (-2, -1), (1, 2), (-1, 1)
    assert outcome(0.01, better, worse) == outcome(0.01, better, unclear) == "holds"
    assert outcome(0.01, worse, unclear) == "undecided" and outcome(0.01, worse, worse) == "fails"
    assert outcome(1, better, better) == "holds" and outcome(1, better, unclear) == "undecided"
    assert outcome(1, better, worse) == "fails"


def test_combinations():
    frame = table(dict(method="up", value=0.1, low=0.05, high=0.15), dict(method="down", value=-0.1, low=-0.2,
                  high=-0.05), dict(method="flat", value=0.0, low=-0.1, high=0.1))
    state = {name: compare({"rows": {"method": name}}, ">", 0) for name in ("up", "down", "flat", "none")}

    def of(kind, *names):
        return decide({kind: [state[name] for name in names]}, context(frame)).state

    assert of("all", "up", "up") == "holds"
    assert of("all", "up", "down", "none") == "fails"
    assert of("all", "up", "flat") == "undecided"
    assert of("all", "up", "none") == "missing"
    assert of("any", "down", "up", "none") == "holds"
    assert of("any", "down", "flat") == "undecided"
    assert of("any", "down", "down") == "fails"
    assert of("first", "none", "down", "up") == "fails"
    assert of("first", "none", "none") == "missing"


def test_what_a_predicate_needs():
    frame = table(dict(method="up", value=0.1, low=0.05, high=0.15), dict(method="down", value=-0.1, low=-0.2,
                  high=-0.05), dict(method="flat", value=0.0, low=-0.1, high=0.1))
    state = {name: compare({"rows": {"method": name}}, ">", 0) for name in ("up", "down", "flat", "none")}

    def of(name, needed):
        return decide(state[name] | {"needs": {"of": state[needed], "or": "why"}}, context(frame))

    assert of("up", "up").state == of("up", "none").state == "holds"
    assert of("down", "up").state == "fails" and of("none", "down").state == "missing"
    assert {of(name, needed) for name in ("up", "down") for needed in ("down", "flat")} == {Outcome("undecided", "why")}


# ---- the file

@pytest.fixture(scope="module")
def document():
    return yaml.safe_load(claims.CLAIMS.read_text())


def load(tmp_path, document):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(document))
    return claims.load(path)


def test_the_file_is_valid_and_every_exhibit_has_a_claim():
    found = claims.load()
    assert {claim.exhibit for claim in found.claims} == set(found.exhibits)
    text = claims.CLAIMS.read_text()
    assert not re.search(r"^\s*(text|note):.*\d\d\.\d\d", text, re.M)  # reported cells are selected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("text"), "low-rank-collapses.*text"),
        (lambda c: c.update(colour="red"), "low-rank-collapses.*colour"),
        (lambda c: c.update(predicate=compare(1, "=", 1)), "low-rank-collapses"),
        (lambda c: c.update(predicate=compare(1, "within", 1)), "low-rank-collapses.*tolerance"),
        (lambda c: c.update(ours={"rows": {"a": 1}, "query": "@x > 1"}), "low-rank-collapses.*query"),
        (lambda c: c.update(exhibit="table-99"), "low-rank-collapses.*table-99"),
        (lambda c: c.update(contradicts=["nobody"]), "low-rank-collapses.*nobody"),
        (lambda c: c.update(dense_check="average-9"), "low-rank-collapses.*average-9"),
        (lambda c: c.update(id="rank-path-accuracy"), "rank-path-accuracy.*2 times"),
        (lambda c: c.update(paper={"reported": {"paper": "r-sparse", "where": "Table 9", "metric": "acc"}}),
         "low-rank-collapses.*paper"),
    ],
)
def test_errors_name_the_claim(tmp_path, document, change, message):
    changed = copy.deepcopy(document)
    change(next(c for c in changed["claims"] if c["id"] == "low-rank-collapses"))
    with pytest.raises(ValueError, match=message):
        load(tmp_path, changed)


def test_suspect_cells_are_never_a_reference():
    cell = {"paper": "r-sparse", "where": "Table 1", "method": "dense", "task": "obqa", "metric": "acc"}
    assert claims.reported_value(cell, "Llama-2-7B") == pytest.approx(0.314)
    with pytest.raises(NotMeasured):
        claims.reported_value(cell, "Mistral-7B")


# ---- the pages

def test_scorecard_lists_every_exhibit_and_mismatches_first(tmp_path):
    known = claims.load()
    empty = claims.scorecard_markdown(claims.judged(tmp_path))
    for about in known.exhibits.values():
        assert f"## {about['title']}\n" in empty
    assert empty.count("**not measured**") == len(known.claims)
    assert "Nothing has been measured" in claims.verdicts_markdown(claims.judged(tmp_path))

    frame = table(dict(value=-0.012, low=-0.02, high=-0.004),
                  dict(method="teal", rho=None, against="dense", value=-0.01, low=-0.015, high=-0.005))
    write(tmp_path, "tiny", "table-3", frame)
    write(tmp_path, "second-preset", "table-3", frame)
    text = claims.scorecard_markdown(claims.judged(tmp_path))
    assert re.findall(r":::{tab-item} (\S+)", text) == ["tiny", "second-preset"]  # that of claims.yaml first
    tab = text.partition(":::{tab-item} tiny")[2].partition("\n:::\n")[0]
    words = re.findall(r"\*\*(.+?)\*\*", tab)
    assert words[:2] == ["analogue does not hold", "analogue holds"] and words[-1] == "not measured"
    assert "−1.20 points [−2.00, −0.40]" in tab and "1.25 points (Llama-2-7B)" in tab
    assert all(line.count("|") == 5 for line in text.splitlines() if line.startswith("|"))

    glance = claims.verdicts_markdown(claims.judged(tmp_path))
    assert "- **tiny**: 1 analogue does not hold" in glance
    assert "**analogue does not hold** on tiny" in glance
    assert all(word in claims.VERDICTS for word in re.findall(r"- \*\*(.+?)\*\* on ", glance))
