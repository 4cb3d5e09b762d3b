"""The kernels' exhibit: rows from a measurement, and readings of made-up timings whose answers are known."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from kernels import processors
from rsparse.exhibits import kernel_bounds_reading, kernel_reading, kernel_speed
from rsparse.exhibits.kernel_speed import CHAIN
from rsparse.provenance import device_name
from rsparse.results import Table

PLAN = dict(shape="llama-2-7b", dtype="float32", device="cpu", sparsities=[0.5], rho=0.95, batches=[1],
            inputs=["gaussian"], linears=["down", "o"], repeats=2, rounds=1, breakdown=False,
            chained=False)  # fmt: skip


def timing(linear: str = "o", torch: float = 20.0, ours: float = 10.0, **changes) -> dict:
    """A row as `python -m kernels.bench` writes it: a thousand of two thousand bytes, at half of the bandwidth."""
    row = {
        "shape": "llama-2-7b", "dtype": "bfloat16", "sparsity": 0.5, "rho": 0.9, "batch": 1, "inputs": "gaussian",
        "device": "cuda", "repeats": 20, "seed": 0, "linear": linear, "m": 4096, "n": 4096, "bytes": 1000,
        "dense bytes": 2000, "torch us": torch, "ours dense us": 16.0, "ours us": ours, "ours p20 us": 9.0,
        "ours p80 us": 12.0, "over torch": torch / ours, "over ours dense": 16 / ours, "bandwidth share": 0.5,
        "read bandwidth": 200e6,
    }  # fmt: skip
    return row | changes


def frame(*rows: dict, device: str = "GPU", where: str = "cuda") -> pd.DataFrame:
    about = {"where": where, "device": device, "torch": "2", "date": "2026-01-01"}
    return pd.DataFrame([row | about for row in rows])


def write(folder, name: str, *rows: dict, device: str = "GPU", date: str = "2026-01-01T00:00:00+00:00") -> None:
    about = {"device": device, "threads": 1, "torch": "2", "cuda": "13", "date": date}
    (folder / name).write_text(json.dumps({"about": about, "rows": rows}))


# What a run measures


@pytest.fixture
def timed(monkeypatch):
    """The linears that were really timed, by bench calls that take no time."""
    asked_for: list = []

    def bench(asked, breakdown, linears):
        asked_for.append((asked.sparsity, *linears))
        torch = 20.0 + 2 * asked.seed
        more = {"sparse path us": 9.5, "as many channels, all read us": 8.0, "launch us": 1.0} if breakdown else {}
        row = timing(linears[0], torch, shape=asked.shape, ranks=[3], chosen={"ours": "cpu"}) | more
        yield {name: row[name] for name in row if name not in ("shape", "dtype", "sparsity", "rho", "batch", "inputs")}

    def chain(asked):
        asked_for.append((asked.sparsity, CHAIN))
        return {"torch us": 30.0, "ours dense us": 24.0, "ours us": 20.0, "linear": CHAIN, "over torch": 1.5,
                "over ours dense": 1.2}  # fmt: skip

    monkeypatch.setattr(kernel_speed.bench, "bench", bench)
    monkeypatch.setattr(kernel_speed.bench, "chain", chain)
    return asked_for


def test_rows_are_those_of_the_bench_and_are_measured_once(timed, tmp_path):
    plan = kernel_speed.Plan(**PLAN | dict(sparsities=[0.5, 0.75], breakdown=True, chained=True))
    for _ in range(2):
        table = Table("kernels", "smoke", tmp_path / "kernels")
        kernel_speed.measure(table, plan, 0)
        rows = table.finish(0, vars(plan))
    assert timed == [(s, linear) for s in (0.5, 0.75) for linear in ("o", "down", CHAIN)], "in the block's order, once"
    assert set(rows["model"]) == {"random:llama-2-7b"} and set(rows["device"]) == {device_name("cpu")}
    found = kernel_speed.wide(rows)
    assert list(found["linear"]) == ["o", "down", CHAIN] * 2 and set(found["shape"]) == {"llama-2-7b"}
    first = found.iloc[0]
    assert (first["torch us"], first["ours p80 us"], first["as many channels, all read us"]) == (20, 12, 8)
    assert (first["m"], first["bytes"], first["where"]) == (4096, 1000, "cpu")
    assert found.loc[2, "over torch"] == 1.5 and pd.isna(found.loc[2, "bytes"])


def test_rounds_are_averaged_with_their_spread(timed, tmp_path):
    table = Table("kernels", "smoke", tmp_path / "kernels")
    kernel_speed.measure(table, kernel_speed.Plan(**PLAN | dict(linears=["o"], rounds=3)), 1)
    (row,) = table.frame[table.frame["metric"] == "over_torch"].to_dict("records")
    assert row["value"] == pytest.approx(2.4) and row["n"] == 3, "22, 24 and 26 over 10"
    assert row["stderr"] == pytest.approx(0.2 / 3**0.5)
    (row,) = kernel_speed.wide(table.frame).to_dict("records")
    assert row["torch us"] == 24 and row["over torch stderr"] == pytest.approx(0.2 / 3**0.5)


def test_another_machine_measures_anew(timed, tmp_path, monkeypatch):
    for name in ("one", "one", "another"):
        monkeypatch.setattr(kernel_speed, "device_name", lambda _, name=name: name)
        table = Table("kernels", "smoke", tmp_path / "kernels")
        kernel_speed.measure(table, kernel_speed.Plan(**PLAN), 0)
        assert set(table.frame["device"]) == {name}
    assert len(timed) == 4


def test_a_linear_is_really_timed(tmp_path):
    table = Table("kernels", "smoke", tmp_path / "kernels")
    kernel_speed.measure(table, kernel_speed.Plan(**PLAN | dict(shape="llama-3-8b", linears=["o"])), 0)
    (row,) = kernel_speed.wide(table.frame).to_dict("records")
    assert row["over torch"] == pytest.approx(row["torch us"] / row["ours us"])
    assert row["dense bytes"] == 4 * 4096**2 and row["bytes"] == pytest.approx(row["dense bytes"] / 2, rel=0.05)
    assert "down" not in kernel_reading.live_reading(kernel_speed.wide(table.frame))
    assert 0 < row.get("processor share", 1.0) <= 1


@pytest.mark.parametrize("change", [
    dict(shape="tiny"), dict(dtype="int8"), dict(linears=["q"]), dict(inputs=["uniform"]), dict(sparsities=[]),
    dict(sparsities=[1.0]), dict(batches=[0]), dict(rho=1.5), dict(repeats=1), dict(rounds=0), dict(device="tpu"),
])  # fmt: skip
def test_what_cannot_be_timed_is_refused(change):
    with pytest.raises(ValueError, match=str(next(iter(change.values()))).strip("[]'\"") or "sparsities"):
        kernel_speed.Plan(**PLAN | change)


# What was published


def test_files_are_read_with_their_device_and_the_later_timing_counts(tmp_path):
    (tmp_path / "h200").mkdir()
    write(tmp_path, "b.json", timing(ours=10.0), timing("down"))
    write(tmp_path, "a.json", timing(ours=8.0), date="2026-01-02T00:00:00+00:00")
    write(tmp_path / "h200", "c.json", timing(ours=5.0), device="Other GPU")
    found = kernel_reading.published(tmp_path)
    assert found.set_index(["device", "linear"])["ours us"].to_dict() == {
        ("GPU", "down"): 10, ("GPU", "o"): 8, ("Other GPU", "o"): 5,
    }  # fmt: skip
    assert set(found["where"]) == {"cuda"}
    words = kernel_reading.coverage_reading(found)
    assert "3 timings on GPU and Other GPU" in words and "from 2026-01-01 to 2026-01-02" in words
    assert list(kernel_reading.coverage(found)["timings"]) == [2, 1]


def test_a_cpu_is_named_with_its_threads(tmp_path):
    write(tmp_path, "a.json", timing() | {"device": "cpu"}, device="x86_64 CPU")
    assert list(kernel_reading.published(tmp_path)["device"]) == ["x86_64 CPU, 1 threads"]


def test_no_timings_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no timings"):
        kernel_reading.published(tmp_path)


def test_devices_stay_apart_and_one_without_rows_is_left_out():
    both = pd.concat([frame(timing(), timing(sparsity=0.75)), frame(timing(), device="Other")])
    assert [name for name, _ in kernel_reading.devices(both, kernel_reading.sweep)] == ["GPU"]
    assert [len(own) for _, own in kernel_reading.devices(both, kernel_reading.headline)] == [1, 1]
    for choose in (kernel_reading.broken_down, kernel_reading.batches, kernel_reading.inputs):
        assert not list(kernel_reading.devices(both, choose))


# Readings


def test_sweep_takes_means_over_linears():
    own = kernel_reading.sweep(frame(
        timing("o", 20, 10), timing("down", 20, 2.5), timing("o", sparsity=0.75, ours=2.0, bytes=500),
        timing(CHAIN), timing(batch=2), timing(inputs="heavy"), timing(dtype="float32"),
    ))  # fmt: skip
    table = kernel_reading.sweep_table(own)
    assert list(table["over torch"]) == pytest.approx([4, 10]), "the geometric mean of 2 and 8"
    assert list(table["slowest linear"]) == [2, 10] and list(table["a block's linears (us)"]) == [12.5, 2]
    assert list(table["bytes, dense over read"]) == [2, 4] and list(table["of the bandwidth (%)"]) == [50, 50]
    words = kernel_reading.sweep_reading(own)
    assert "at every sparsity timed, from 50% on" in words
    assert "Our dense kernel takes 0.80 of torch's time" in words, "4 times with half of the bytes"


@pytest.mark.parametrize(("ratios", "words"), [
    ([1.1, 2.0], "faster one at every sparsity timed, from 25%"), ([0.5, 0.9], "slower one at every sparsity timed"),
    ([0.5, 1.5], "from about 50% on"), ([1.2, 0.9], "not at 75%"),
])  # fmt: skip
def test_the_crossover_lies_between_measured_sparsities(ratios, words):
    table = pd.DataFrame({"bytes left unread (%)": [25.0, 75.0], "over torch": ratios})
    assert words in kernel_reading.crossover(table)


def test_a_breakdown_is_of_differences():
    more = {"launch us": 1.0, "as many channels, all read us": 7.0, "sparse path us": 9.5}
    own = kernel_reading.broken_down(frame(timing(**more), timing("down", ours=9.0, **more), timing("qkv")))
    table = kernel_reading.breakdown_table(own)
    first = table.iloc[0]
    assert [first[x] for x in ("launch", "reading", "mask", "rank path", "together")] == [1, 6, 2.5, 0.5, 10]
    assert first["its bytes alone"] == pytest.approx(0.5), "a tenth of 1000 bytes at 200 MB/s"
    assert list(table["linear"]) == ["o", "down"] and table["rank path"].iloc[1] == -0.5
    words = kernel_reading.breakdown_reading(own)
    assert "less than can be seen of `llama-2-7b` in bfloat16 at 50%" in words, "one gains what the other loses"
    assert "its bytes alone: 5.3%" in words and "1 of 6 differences" in words
    bars = kernel_reading.parts(own)
    assert list(bars["value"][:4]) == [1, 7, 9.5, 10] and bars["panel"].nunique() == 1


def test_batches_say_where_gathering_pays_and_what_is_missing():
    several = [timing(batch=2, ours=25.0), timing(batch=2, sparsity=0.75), timing(batch=4, sparsity=0.75, ours=30.0)]
    own = kernel_reading.batches(frame(timing(), *several, timing(shape="mistral-7b")))
    table = kernel_reading.batch_table(own, 0.5)
    assert list(table["tokens"]) == [1, 2, 2, 4] and set(table["shape"]) == {"llama-2-7b"}
    assert list(table["rows wanted together (%)"]) == pytest.approx([50, 75, 43.75, 68.359375])
    assert list(table["gathered by the rule"]) == ["yes", "no", "yes", "no"]
    words = kernel_reading.batch_reading(own, 0.5)
    assert "faster at 2 tokens at 75%, of 3 cells timed" in words and "every cell agrees" in words
    assert "missing are 4 at 50%, 8 at 50%, 8 at 75%, 2 at 90%, 4 at 90% and 8 at 90%" in words
    assert "1 of them say otherwise" in kernel_reading.batch_reading(own, 0.3)
    assert kernel_reading.batch_points(own)["wanted"].tolist() == pytest.approx([0.5, 0.75, 0.4375, 0.68359375])


def test_storage_keeps_chains_apart():
    own = kernel_reading.headline(frame(
        timing("o", 20, 10), timing("down", 20, 2.5), timing(CHAIN, 15, 10), timing(dtype="int4"),
        timing("o", shape="mistral-7b"), timing(sparsity=0.9),
    ))  # fmt: skip
    table = kernel_reading.storage_table(own)
    assert table[["shape", "storage"]].to_numpy().tolist() == [
        ["llama-2-7b", "bfloat16"], ["llama-2-7b", "int4"], ["mistral-7b", "bfloat16"],
    ]  # fmt: skip
    assert table.loc[0, "over torch"] == pytest.approx(4) and table.loc[0, "slowest linear"] == 2
    assert table.loc[0, "chained, over torch"] == 1.5 and pd.isna(table.loc[1, "chained, over torch"])
    words = kernel_reading.storage_reading(own)
    assert "bfloat16 2.00 to 4.00 over torch" in words and "chained 1.50 over torch; int4 2.00" in words
    assert "INT4 stands beside torch's product in bfloat16" in words
    assert len(kernel_reading.storage_bars(own)) == 6


def test_bandwidth_and_inputs():
    found = frame(timing("o"), timing("down", m=4096, n=11008, **{"bandwidth share": 0.9}),
                  timing("o", inputs="heavy", ours=11.0), timing("o", inputs="published", ours=9.5))  # fmt: skip
    words = kernel_reading.roofline_reading(kernel_reading.roofline(found))
    assert "bfloat16 50% (4096x4096) to 90% (4096x11008)" in words
    own = kernel_reading.inputs(found)
    words = kernel_reading.inputs_reading(own[own["linear"] == "o"])
    assert "Gaussian 2.00, published activation quantiles 2.11 and heavy-tailed (Student's t) 1.82" in words
    assert "at most 10.0% (o, heavy-tailed" in words


def test_live_timings_name_their_machine():
    live = frame(timing(), timing("down", 20, 20), device="a CPU, 2 threads", where="cpu")
    words = kernel_reading.live_reading(live)
    assert "by this run on a CPU, 2 threads" in words and "o and down" in words and "1.41 over torch" in words
    table = kernel_reading.live_table(live)
    assert pd.isna(table.loc[0, "±"]) and table.loc[0, "m x n"] == "4096x4096"
    assert kernel_reading.live_table(live.assign(**{"over torch stderr": 0.1}))["±"].tolist() == [0.1, 0.1]
    assert set(kernel_reading.together(frame(timing()), live)["device"]) == {"GPU", "a CPU, 2 threads (this run)"}


def test_the_share_of_processors_is_what_threads_had_of_what_they_wanted():
    assert processors.share_of((1.0, 0.0), (3.0, 1.0)) == pytest.approx(2 / 3)
    assert math.isnan(processors.share_of(None, (1.0, 1.0))) and processors.shared(math.nan) == ""
    before = processors.scheduled()
    if before is not None:  # Linux
        sum(range(10**6))
        assert processors.scheduled()[0] > before[0]


def test_times_of_a_shared_machine_judge_nothing():
    live = frame(*whole(1.8, dtype="float32", **{"processor share": 0.97}), device="a CPU", where="cpu")
    assert kernel_reading.live_reading(live).startswith("Measured by this run")
    assert "yes" in set(kernel_bounds_reading.table(live)["met"])
    busy = live.assign(**{"processor share": [0.97, 0.52, 0.97, 0.97]})
    words = kernel_reading.live_reading(busy)
    assert words.startswith("**Others used the processors") and "had one for only 52% of the time" in words
    table = kernel_bounds_reading.table(busy)
    assert "yes" not in set(table["met"]) and "not judged: a shared machine" in set(table["met"])
    assert "1 cannot be judged by times of a machine" in kernel_bounds_reading.reading(table)


# Bounds


def whole(ratio: float, **changes) -> list[dict]:
    return [timing(linear, 10 * ratio, 10.0, **changes) for linear in ("qkv", "o", "gate+up", "down")]


def test_bounds_take_the_lowest_shape():
    found = frame(*whole(1.8), timing(CHAIN, 16, 10), *whole(1.6, shape="mistral-7b"), *whole(9.0, sparsity=0.9),
                  *whole(9.0, inputs="heavy"))  # fmt: skip
    cpu = frame(timing("o", 16, 10, dtype="float32"), device="a CPU", where="cpu")
    table = kernel_bounds_reading.table(pd.concat([found, cpu]))
    rows = {(row["bound"], row["storage"], row["at least"]): row for _, row in table.iterrows()}
    mean = rows["geometric mean over torch, linear by linear", "bfloat16", 1.7]
    assert (mean["measured"], mean["lowest of"], mean["met"]) == (pytest.approx(1.6), "mistral-7b", "no")
    assert mean["shapes that meet it"] == "1 of 2"
    chained = rows["over torch, chained through blocks", "bfloat16", 1.65]
    assert (chained["measured"], chained["shapes that meet it"]) == (1.6, "0 of 1")
    assert rows["slowest linear, over torch", "bfloat16", 1.55]["met"] == "yes"
    assert rows["share of the fastest reading, 4096x4096", "bfloat16", 0.48]["met"] == "yes"
    on_cpu = rows["geometric mean over torch, linear by linear", "float32", 1.5]
    assert (on_cpu["device"], on_cpu["lowest of"]) == ("a CPU", "llama-2-7b (o alone)")
    assert on_cpu["met"] == "not judged: some linears alone"
    words = kernel_bounds_reading.reading(table)
    assert "1 is of four linears, and only some of them were timed" in words
    assert words.startswith("2 of 4 bounds that were measured are met") and "1.60 instead of 1.7" in words
    assert f"{len(table) - 5} were not measured" in words


def test_shares_are_of_the_fastest_reading_of_a_device():
    """100 MB/s: half of plain reading's, and a quarter of what a product of torch's shows on the same device."""
    slow, fast = frame(timing("o")), frame(timing("down", torch=5.0, n=14336), device="other GPU")
    speeds = kernel_reading.fastest(pd.concat([slow, fast], ignore_index=True))
    assert dict(speeds) == {"GPU": 200e6, "other GPU": 400e6}
    both = pd.concat([fast, slow.assign(device="other GPU")], ignore_index=True)
    for own, share in ((slow, 0.5), (both, 0.25)):
        table = kernel_bounds_reading.table(own).set_index(["bound", "storage"])
        assert table.loc[("share of the fastest reading, 4096x4096", "bfloat16"), "measured"] == pytest.approx(share)
    assert "The fastest reading is at 0.00 TB/s" in kernel_reading.roofline_reading(kernel_reading.roofline(both))


def test_every_bound_is_listed_whatever_was_measured():
    table = kernel_bounds_reading.table(frame(timing(sparsity=0.9)))
    assert set(table["met"]) == {"not measured"}
    assert len(table) == sum(len(bound.dtypes) for bound in kernel_bounds_reading.BOUNDS)


def test_the_bench_refuses_linears_that_a_shape_does_not_have():
    asked = kernel_speed.bench.Asked("llama-2-7b", "float32", 0.5, 0.95, 1, "gaussian", "cpu", 2)
    with pytest.raises(ValueError, match=r"\['q'\]; expected some of qkv, o, gate\+up, down"):
        list(kernel_speed.bench.bench(asked, linears=["o", "q"]))
