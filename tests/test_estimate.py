"""Projection of a batch from its rehearsal: what scales with tokens, what with float64, what not at all."""

import json
import shutil

import pytest
import yaml

from rsparse.estimate import GPUS, OFFICIAL_ROWS, decomposition_seconds, project, tokens
from rsparse.paths import HERE, Checkout
from rsparse.presets import exhibits_in, load

REAL = {"items": 0, "suite": "official", "windows": 32, "window": 4096, "samples": 16, "length": 4096} | {
    "articles": 500, "summary_tokens": 64,
}  # fmt: skip
SLOWER = 989 / 155


def test_tokens_of_one_measurement():
    everything = sum(items * options * length for items, options, length in OFFICIAL_ROWS.values())
    assert tokens("tasks", REAL) == everything
    limited = sum(500 * options * length for _, options, length in OFFICIAL_ROWS.values())
    assert tokens("tasks", REAL | {"items": 500}) == limited
    assert tokens("heldout", REAL) == 32 * 4096 and tokens("calibrate", REAL) == 16 * 4096
    assert tokens("summaries", REAL) == 500 * 64
    searched = {"step": 0.05, "population": 32, "generations": 5, "groups": 8} | {
        "search_samples": 16, "search_length": 2048,
    }  # fmt: skip
    assert tokens("search", REAL | searched) == (2 * 21 + 32 * 5 * 4.5) * 16 * 2048
    for what, suite in (("tasks", "tiny"), ("singing", "official")):
        with pytest.raises(ValueError, match=f"no projection for '{what}'"):
            tokens(what, REAL | {"suite": suite})


def test_decompositions_are_bound_by_float64_or_as_slow_as_the_rest():
    square = {"m": 4096, "n": 4096, "seconds": 1e-3}
    assert decomposition_seconds(square, SLOWER) == pytest.approx(2 * 13 * 4096**3 / 0.6e12)
    assert decomposition_seconds(square | {"seconds": 100.0}, SLOWER) == pytest.approx(100 * SLOWER)
    wide, tall = ({"m": m, "n": n, "seconds": 0.0} for m, n in ((1024, 4096), (4096, 1024)))
    assert decomposition_seconds(wide, 1) == decomposition_seconds(tall, 1)


def cost(what: str, seconds: float, tokens: int = 0, sparsity: float = 0.5, **more) -> dict:
    return {"what": what, "seconds": seconds, "tokens": tokens, "sparsity": sparsity} | more


COSTS = {
    "figure-1-3": [  # a map has no sparsity, a decomposition feeds no tokens
        [
            {"what": "maps", "seconds": 3.0, "tokens": 0},
            {"what": "factors of maps", "seconds": 20.0, "m": 4096, "n": 4096},
        ]
    ],
    "figure-5": [
        [cost("heldout", 9.0, 8192, 0.0), cost("tasks", 5.0, 1000, 0.0)],  # the first waits for the GPU
        [cost("calibrate", 2.0, 8192), cost("factors of calibrate", 50.0, m=4096, n=4096)],
        [cost("heldout", 1.0, 8192), cost("tasks", 4.0, 1000)],
        [cost("heldout", 2.0, 8192, 0.6)],
        [cost("summaries", 8.0, 256)],
    ],
    "table-3": [[cost("heldout", 1.5, 8192, 0.7), cost("calibrate", 0.5, 0, 0.7)]],
    "planted-control": [],
}


@pytest.fixture
def rehearsed(tmp_path):
    """A checkout whose notebooks and presets are ours, and a made-up run of the Llama-2-7B rehearsal."""
    made = Checkout(tmp_path)
    shutil.copytree(HERE.notebooks, made.notebooks)
    for exhibit, groups in (dict.fromkeys(exhibits_in(made.notebooks), ()) | COSTS).items():
        folder = made.run_folder("rehearsal-llama-2-7b") / "results" / exhibit
        folder.mkdir(parents=True)
        provenance = {"seconds": 100.0, "peak_memory": 3, "gpu_peak_memory": 5, "device": "NVIDIA H100", "code": "c"}
        (folder / f"{exhibit}.json").write_text(json.dumps(provenance))
        lines = [{"key": f"{exhibit} {i}", "costs": costs} for i, costs in enumerate(groups)]
        if exhibit == "table-3":  # Table 3 takes over what Figure 5 has measured
            shared = enumerate(COSTS["figure-5"][:4])
            lines += [{"key": f"5 {i}", "costs": costs, "from": "figure-5"} for i, costs in shared]
        (folder / f"{exhibit}.jsonl").write_text("\n".join(map(json.dumps, [{"about": {}}, *lines])) + "\n")
    return made


def test_every_part_scales_with_what_it_depends_on(rehearsed):
    path = project("a6000-llama-2-7b", "rehearsal-llama-2-7b", checkout=rehearsed)
    found = json.loads(path.read_text())
    assert path == rehearsed.results / "a6000-llama-2-7b" / "estimate.json"
    whole = {exhibit: cost["seconds"] for exhibit, cost in found["whole"]["notebooks"].items()}
    assert whole["figure-1-3"] == round(100 - 23 + SLOWER * (3 + 20))
    work = 3 * 2.0 / 8192 * tokens("heldout", REAL) + 2 * 0.0045 * tokens("tasks", REAL)  # by the median
    work += 2.0 / 8192 * tokens("calibrate", REAL) + 8.0 / 256 * tokens("summaries", REAL)
    assert whole["figure-5"] == round(100 - 81 + SLOWER * work)
    assert whole["table-3"] == round(98 + SLOWER * (1.5 * 16 + 0.5)), "shared measurements are paid once"
    assert found["whole"]["factors"]["seconds"] == found["overnight"]["factors"]["seconds"] == round(SLOWER * 50)
    assert found["whole"]["notebooks"]["figure-5"]["gpu_peak_memory"] == 5
    assert found["whole"]["notebooks"]["figure-5"]["device"] == "NVIDIA H100"
    assert found["source"]["rehearsal"] == "rehearsal-llama-2-7b" and found["source"]["gpus"] == GPUS


def test_factors_that_two_notebooks_computed_on_different_machines_are_paid_once(rehearsed):
    folder = rehearsed.run_folder("rehearsal-llama-2-7b") / "results"

    def journal(exhibit: str, *groups: tuple[str, list[float]]) -> None:
        lines = [
            {"key": f"{method} {exhibit}", "rows": [{"method": method}],
             "costs": [cost("factors of calibrate", seconds, m=4096, n=4096) for seconds in times]}
            for method, times in groups
        ]  # fmt: skip
        (folder / exhibit / f"{exhibit}.jsonl").write_text("\n".join(map(json.dumps, [{"about": {}}, *lines])) + "\n")

    journal("figure-5", ("r-sparse", [5.0, 6.0]))
    journal("scope", ("r-sparse", [7.0]), ("low-rank", [4.0]))
    journal("table-3")
    found = json.loads(project("a6000-llama-2-7b", "rehearsal-llama-2-7b", checkout=rehearsed).read_text())
    assert found["whole"]["factors"]["seconds"] == round(SLOWER * (7 + 6 + 4))


def test_a_search_takes_what_one_at_full_shape_took(rehearsed):
    """16 x 2048 tokens as measured: 21 rho twice; 8 groups of 32 x 5 candidates at 0.6 of a pass, and their starts."""
    folder = rehearsed.run_folder("rehearsal-llama-2-7b") / "results" / "table-4"
    lines = [
        {"key": searcher, "rows": [{"method": "r-sparse", "searcher": searcher}], "costs": [cost("search", 9.0, 99)]}
        for searcher in ("uniform", "evolution", "random")
    ]
    (folder / "table-4.jsonl").write_text("\n".join(map(json.dumps, [{"about": {}}, *lines])) + "\n")
    found = json.loads(project("a6000-llama-2-7b", "rehearsal-llama-2-7b", checkout=rehearsed).read_text())
    few = found["whole"]["notebooks"]["table-4"]["seconds"]
    passes = 42 + 160 * 4.5
    assert few == pytest.approx(73 + 3 * SLOWER * passes * 16 * 2048 * 9 / 99, rel=1e-6), "without: token by token"
    (rehearsed.results / "search-cost").mkdir()
    measured = {"shape": "llama-2-7b", "device": "NVIDIA H100", "samples": 16, "length": 2048, "full_pass_s": 2.0}
    measured |= {"mean_share": 0.6, "open_s": [10.0] * 8, "groups": 8}
    (rehearsed.results / "search-cost" / "llama-2-7b.json").write_text(json.dumps(measured))
    found = json.loads(project("a6000-llama-2-7b", "rehearsal-llama-2-7b", checkout=rehearsed).read_text())
    expected = 73 + SLOWER * (42 * 2.0 + 2 * (8 * 160 * 0.6 * 2.0 + 80))
    assert found["whole"]["notebooks"]["table-4"]["seconds"] == pytest.approx(expected, abs=1)
    (rehearsed.results / "search-cost" / "llama-2-7b.json").write_text(json.dumps(measured | {"groups": 4}))
    with pytest.raises(ValueError, match="in 8 groups; expected 4"):
        project("a6000-llama-2-7b", "rehearsal-llama-2-7b", checkout=rehearsed)


def test_the_overnight_subset_pays_for_its_own_settings(rehearsed):
    preset = rehearsed.presets / "a6000-llama-2-7b.yaml"
    subset = {"figure-1-3": {}, "table-3": {"items": 500, "sparsities": [0.5]}}
    preset.write_text(yaml.safe_dump(yaml.safe_load(preset.read_text()) | {"overnight": subset}))
    path = project("a6000-llama-2-7b", "rehearsal-llama-2-7b", checkout=rehearsed)
    night = json.loads(path.read_text())["overnight"]["notebooks"]
    assert set(night) == {"figure-1-3", "table-3"}
    shorter = REAL | {"items": 500}  # at 50% alone: what Figure 5 paid for in the whole, without its summaries
    work = 2 * 5.0 / 8192 * tokens("heldout", shorter) + 2 * 0.0045 * tokens("tasks", shorter)
    work += 2.0 / 8192 * tokens("calibrate", shorter)
    assert night["table-3"]["seconds"] == pytest.approx(98 + SLOWER * work, abs=1)


def test_some_exhibits_are_projected_beside_what_stands(rehearsed):
    names = "a6000-llama-2-7b", "rehearsal-llama-2-7b"
    with pytest.raises(ValueError, match="a6000-llama-2-7b has no estimate yet"):
        project(*names, checkout=rehearsed, only=["figure-1-3"])
    path = project(*names, checkout=rehearsed)
    before = json.loads(path.read_text())
    del before["whole"]["notebooks"]["inside"]  # as if it had come to the preset later
    path.write_text(json.dumps(before))
    results = rehearsed.run_folder(names[1]) / "results"
    for exhibit in ("figure-1-3", "inside"):
        about = {"seconds": 300.0, "peak_memory": 4, "gpu_peak_memory": 6, "device": "NVIDIA H200", "code": "d"}
        (results / exhibit / f"{exhibit}.json").write_text(json.dumps(about))
    shutil.rmtree(results / "figure-5")
    after = json.loads(project(*names, checkout=rehearsed, only=["inside", "figure-1-3"]).read_text())
    whole = after["whole"]["notebooks"]
    assert whole["inside"]["gpu_peak_memory"] == whole["figure-1-3"]["gpu_peak_memory"] == 6
    assert list(whole) == [x for x in load(names[0], rehearsed).parameters if x in whole]
    assert whole["figure-5"] == before["whole"]["notebooks"]["figure-5"]
    assert after["whole"]["factors"] == before["whole"]["factors"] and after["source"]["code"] == ["c", "d"]
    with pytest.raises(ValueError, match="only figure-9; expected some of figure-1-3"):
        project(*names, checkout=rehearsed, only=["figure-9"])


def test_some_exhibits_are_projected_beside_those_of_one_kind_alone(rehearsed):
    """What was assumed stays; another rehearsal or other variants are refused before a notebook is read."""
    names = "a6000-llama-2-7b", "rehearsal-llama-2-7b"
    path = project(*names, checkout=rehearsed)
    known = json.loads(path.read_text())
    del known["source"]["teal_rows"]  # as if it had come later
    path.write_text(json.dumps(known | {"source": known["source"] | {"gpus": {"H100": {"memory": 3}}}}))
    source = json.loads(project(*names, checkout=rehearsed, only=["figure-1-3"]).read_text())["source"]
    assert source["gpus"] == {"H100": {"memory": 3}} and "mmlu" in source["teal_rows"]
    shutil.rmtree(rehearsed.run_folder(names[1]))
    path.write_text(before := json.dumps({"whole": known["whole"], "source": known["source"]}))
    with pytest.raises(ValueError, match="holds whole, and a6000-llama-2-7b has overnight, whole; expected"):
        project(*names, checkout=rehearsed, only=["figure-1-3"])
    with pytest.raises(ValueError, match="of the rehearsal rehearsal-llama-2-7b, not rehearsal-mistral-7b; expected"):
        project(names[0], "rehearsal-mistral-7b", checkout=rehearsed, only=["figure-1-3"])
    assert path.read_text() == before


def test_what_cannot_be_projected_is_refused(rehearsed):
    folder = rehearsed.run_folder("rehearsal-llama-2-7b") / "results"

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            project("a6000-llama-2-7b", "rehearsal-llama-2-7b", checkout=rehearsed)
        assert not rehearsed.results.exists()

    about = json.loads((folder / "figure-1-3" / "figure-1-3.json").read_text())
    (folder / "figure-1-3" / "figure-1-3.json").write_text(json.dumps(about | {"device": "x86_64 CPU, 2 threads"}))
    refused("the rehearsal ran on 'x86_64 CPU, 2 threads'; expected a GPU of A6000, H100, H200")
    (folder / "figure-1-3" / "figure-1-3.json").write_text(json.dumps(about | {"seconds": 5.0}))
    refused("figure-1-3 was rehearsed in several attempts")
    (folder / "figure-1-3" / "figure-1-3.json").write_text(json.dumps(about))
    (folder / "figure-5" / "figure-5.json").unlink()
    refused("figure-5 of a6000-llama-2-7b was not rehearsed")
    rehearsed.results.parent.mkdir(exist_ok=True)
    rehearsed.results.touch()
    with pytest.raises(ValueError, match="results is no folder; expected one, for .*estimate.json"):
        project("a6000-llama-2-7b", "rehearsal-llama-2-7b", checkout=rehearsed)


def test_a_rehearsal_that_is_no_preset_or_was_not_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown preset 'rehearsal-lama-2-7b', did you mean 'rehearsal-llama-2-7b'"):
        project("a6000-llama-2-7b", "rehearsal-lama-2-7b")
    with pytest.raises(ValueError, match="holds no run; expected one of: .* --preset rehearsal-mistral-7b"):
        project("a6000-mistral-7b", "rehearsal-mistral-7b", tmp_path / "none")
