"""What a batch on the users' GPU will take, projected from a rehearsal at full shape with random weights.

A rehearsal preset runs the same notebooks and the same grid of settings as the real one, with few samples. Its
journal says how long every group of rows took, and how long putting its setting on the model took before. The
first scales with the tokens fed, the second does not; both scale with the speed of the GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rsparse.files import write_json
from rsparse.paths import HERE, Checkout
from rsparse.presets import load

SLOWER = 6.4
"""A6000 against H200: dense bf16 155 and 989 TFLOP/s, memory 768 GB/s and 4.8 TB/s by the vendor's data sheets."""
OFFICIAL_ROWS = {  # task -> (items, options, assumed mean tokens of a row); items: sizes of the scored splits
    "winogrande": (1267, 2, 30), "piqa": (1838, 2, 45), "sciq": (1000, 4, 130), "obqa": (500, 4, 20),
    "hellaswag": (10042, 4, 100), "boolq": (3270, 2, 140), "arc_easy": (2376, 4, 40), "arc_challenge": (1172, 4, 45),
}  # fmt: skip
TINY_ROW = 60
"""Assumed mean tokens of a row of the embedded tasks."""


def project(preset: str, rehearsal: str, run: Path | None = None, checkout: Checkout = HERE) -> Path:
    """Write data/results/<preset>/estimate.json from a finished run of the preset `rehearsal`.

    Per notebook: projected seconds on an A6000 and the peaks of memory that the rehearsal measured, in bytes.
    Raises ValueError where a notebook of the preset was not rehearsed.
    """
    wanted, had = load(preset, checkout).parameters, load(rehearsal, checkout).parameters
    folder = run or checkout.run_folder(rehearsal)
    notebooks = {}
    for exhibit, parameters in wanted.items():
        table = folder / "results" / exhibit
        if not (table / f"{exhibit}.json").exists():
            raise ValueError(f"{exhibit} of {preset} was not rehearsed: {table} holds no finished table")
        provenance = json.loads((table / f"{exhibit}.json").read_text(encoding="utf-8"))
        seconds = _seconds(table / f"{exhibit}.jsonl", provenance["seconds"], parameters, had[exhibit])
        memory = {name: provenance[name] for name in ("peak_memory", "gpu_peak_memory")}
        notebooks[exhibit] = {"seconds": round(seconds), **memory}
    target = checkout.results / preset / "estimate.json"
    source = {"rehearsal": rehearsal, "device": provenance["device"], "code": provenance["code"], "slower": SLOWER,
              "official_rows": OFFICIAL_ROWS}  # fmt: skip
    write_json(target, {"notebooks": notebooks, "source": source})
    return target


def _seconds(journal: Path, total: float, wanted: Mapping[str, Any], had: Mapping[str, Any]) -> float:
    """Projected seconds of one notebook: its groups scaled by their tokens, the rest as it was.

    By the median group of a kind: the first of each waits for files and for the GPU to warm up.
    """
    groups = pd.DataFrame(map(json.loads, journal.read_text(encoding="utf-8").splitlines()[1:]))
    rest, scaled = total - groups["seconds"].sum(), 0.0
    for what, seconds in groups.groupby("what")["seconds"]:
        scaled += len(seconds) * seconds.median() * work(what, wanted) / work(what, had)
    return SLOWER * (scaled + rest)


def work(what: str, parameters: Mapping[str, Any]) -> float:
    """Tokens that a group of rows of this kind feeds; 1 where the kind does not depend on sample numbers."""
    if what == "tasks":
        limit = parameters["items"] or 10**9
        if parameters["suite"] == "tiny":
            return float(sum(limit * options * TINY_ROW for _, options, _ in OFFICIAL_ROWS.values()))
        return float(sum(min(items, limit) * options * length for items, options, length in OFFICIAL_ROWS.values()))
    if what == "losses":
        return float(parameters["windows"] * parameters["window"])
    if what == "rouge":
        return float(parameters["articles"])
    return 1.0
