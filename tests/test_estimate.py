"""Projection of a batch from its rehearsal: what scales with the tokens fed, and what does not."""

import json

import pytest

from rsparse.estimate import OFFICIAL_ROWS, SLOWER, TINY_ROW, project, work
from rsparse.paths import HERE, Checkout

SHARED = {"items": 8, "suite": "tiny", "windows": 2, "window": 4096, "articles": 4}


def test_work_counts_the_tokens_of_a_group():
    rows = sum(options for _, options, _ in OFFICIAL_ROWS.values())
    assert work("tasks", SHARED) == 8 * rows * TINY_ROW
    everything = sum(items * options * length for items, options, length in OFFICIAL_ROWS.values())
    assert work("tasks", SHARED | {"items": 0, "suite": "official"}) == everything
    limited = work("tasks", SHARED | {"items": 500, "suite": "official"})
    assert limited == sum(500 * options * length for _, options, length in OFFICIAL_ROWS.values())
    assert work("losses", SHARED) == 8192 and work("rouge", SHARED) == 4 and work("differences", SHARED) == 1


@pytest.fixture
def rehearsed(tmp_path):
    """A checkout whose notebooks and presets are ours, and a made-up run of the Llama-2-7B rehearsal."""
    made = Checkout(tmp_path)
    made.notebooks.symlink_to(HERE.notebooks)
    for exhibit in ("figure-1-3", "figure-5", "table-3", "planted-control"):
        folder = made.run_folder("rehearsal-llama-2-7b") / "results" / exhibit
        folder.mkdir(parents=True)
        provenance = {"seconds": 100.0, "peak_memory": 3, "gpu_peak_memory": 5, "device": "a GPU", "code": "c"}
        (folder / f"{exhibit}.json").write_text(json.dumps(provenance))
        groups = [{"what": "losses", "seconds": s} for s in (9.0, 1.0, 2.0)] if exhibit == "table-3" else []
        groups = groups or [{"what": "score-map", "seconds": 40.0}]
        (folder / f"{exhibit}.jsonl").write_text("\n".join(map(json.dumps, [{"about": {}}, *groups])) + "\n")
    return made


def test_groups_scale_with_their_tokens_and_the_rest_with_the_gpu(rehearsed):
    path = project("a6000-llama-2-7b", "rehearsal-llama-2-7b", checkout=rehearsed)
    found = json.loads(path.read_text())
    assert path == rehearsed.results / "a6000-llama-2-7b" / "estimate.json"
    assert found["notebooks"]["figure-1-3"] == {
        "seconds": round(SLOWER * 100), "peak_memory": 3, "gpu_peak_memory": 5,
    }  # fmt: skip
    # three groups at their median of 2 s, sixteen times the windows; 100 - 12 s of anything else
    assert found["notebooks"]["table-3"]["seconds"] == round(SLOWER * (3 * 2 * 16 + 88))
    assert found["source"]["rehearsal"] == "rehearsal-llama-2-7b"


def test_a_notebook_that_was_not_rehearsed_is_named(rehearsed):
    (rehearsed.run_folder("rehearsal-llama-2-7b") / "results" / "figure-5" / "figure-5.json").unlink()
    with pytest.raises(ValueError, match="figure-5 of a6000-llama-2-7b was not rehearsed"):
        project("a6000-llama-2-7b", "rehearsal-llama-2-7b", checkout=rehearsed)
    assert not rehearsed.results.exists()
