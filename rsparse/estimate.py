"""What a batch on the users' GPU will take, projected from a rehearsal at full shape with random weights.

A rehearsal preset runs the notebooks and the grid of settings of the real one, with few samples. Its journals say
of every measurement what work it did, for how long, and over how many tokens. Work scales with the tokens and with
the speed of the GPU; decompositions with its float64 speed; the rest of a notebook's time (loading, figures,
lm-eval's own part) is taken as it was. A search, of which a rehearsal runs too few candidates to tell, is projected
from `python -m rsparse search-cost`, which times one at full shape.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kernels.destination import check_destination
from rsparse.files import write_json
from rsparse.paths import HERE, Checkout
from rsparse.presets import Preset, exhibits_in, has_overnight, load, names, parameters_of, unknown
from rsparse.results import read_journal

GPUS = {  # vendors' data sheets: dense bfloat16 and float64 TFLOP/s, memory TB/s
    "A6000": {"bfloat16": 155, "float64": 0.6, "memory": 0.768},
    "H100": {"bfloat16": 989, "float64": 34, "memory": 3.35},
    "H200": {"bfloat16": 989, "float64": 34, "memory": 4.8},
}
TARGET = "A6000"
OFFICIAL_ROWS = {  # task -> (items, options, assumed mean tokens of a row); items: sizes of the scored splits
    "winogrande": (1267, 2, 30), "piqa": (1838, 2, 45), "sciq": (1000, 4, 130), "obqa": (500, 4, 20),
    "hellaswag": (10042, 4, 100), "boolq": (3270, 2, 140), "arc_easy": (2376, 4, 40), "arc_challenge": (1172, 4, 45),
}  # fmt: skip
TEAL_ROWS = {  # the same with TEAL's examples before each question; a token that is written counts as fifteen
    "mmlu": (14042, 4, 700), "arc_challenge": (1172, 4, 1100), "hellaswag": (10042, 4, 1000), "gsm8k": (1319, 1, 2900),
    "piqa": (1838, 2, 45), "winogrande": (1267, 2, 170),
}  # fmt: skip

SEARCH_COSTS = "search-cost"
"""Folder of the published results with what `python -m rsparse search-cost` measured; one file per shape."""
SAME_BLOCKS = {"mistral-7b": "llama-3-8b"}
"""Shape -> one of the same blocks and a larger vocabulary, whose search costs stand for its own."""

KEPT = ("factors of calibrate", "factors of search")
"""Kinds of work that are done once for a model and kept."""


def project(
    preset: str, rehearsal: str, run: Path | None = None, checkout: Checkout = HERE, only: Sequence[str] = ()
) -> Path:
    """Write data/results/<preset>/estimate.json from a finished run of the preset `rehearsal`.

    It holds, for the whole and for the overnight subset: per notebook, projected seconds on an A6000 and the peaks
    of memory that the rehearsal measured, in bytes; and the low-rank factors, which are computed once and kept.
    only: exhibits to project anew; the others, the factors and what was assumed stay as the file has them.
    Raises ValueError where a notebook of the preset was not rehearsed in one go, the rehearsal's GPU is unknown, or the
    file cannot be written; and for `only` where the preset has no such exhibit, there is no file yet, or it is of
    another rehearsal or of other variants; for a rehearsal that is no preset, or was not run.
    """
    if rehearsal not in (presets := names(checkout)):
        raise unknown("preset", rehearsal, presets)
    folder = (run or checkout.run_folder(rehearsal)) / "results"
    variants = {"whole": load(preset, checkout)}
    if has_overnight(preset, checkout):
        variants["overnight"] = load(preset, checkout, overnight=True)
    whole, target = variants["whole"], checkout.results / preset / "estimate.json"
    if others := [exhibit for exhibit in only if exhibit not in whole.parameters]:
        raise ValueError(f"only {', '.join(others)}; expected some of {', '.join(whole.parameters)}")
    known = _known(target, preset, rehearsal, variants) if only else {}
    if not folder.is_dir():
        made_by = f"python -m rsparse run --preset {rehearsal}, on a GPU"
        raise ValueError(f"{folder.parent} holds no run; expected one of: {made_by}")
    check_destination(target)
    rehearsed = {exhibit: _rehearsed(folder, exhibit, preset) for exhibit in only or whole.parameters}
    defaults = {exhibit: parameters_of(path) for exhibit, path in exhibits_in(checkout.notebooks).items()}
    shape = load(rehearsal, checkout).parameters[next(iter(rehearsed))]["checkpoint"].removeprefix("random:")
    searched = next((x for x in search_costs(checkout) if x["shape"] == SAME_BLOCKS.get(shape, shape)), None)
    found: dict[str, Any] = {
        name: _variant(one, whole, defaults, rehearsed, searched) for name, one in variants.items()
    }
    assumed = {"gpus": GPUS, "official_rows": OFFICIAL_ROWS, "teal_rows": TEAL_ROWS}
    codes = dict.fromkeys(provenance["code"] for provenance, _ in rehearsed.values())
    found["source"] = {"rehearsal": rehearsal, "code": list(codes)} | assumed
    write_json(target, _merged(known, found, whole) if only else found)
    return target


def _known(target: Path, preset: str, rehearsal: str, variants: Iterable[str]) -> dict[str, Any]:
    """What the file `target` says. ValueError unless some exhibits of `rehearsal` can stand beside its own: it is
    there, of the same rehearsal, whose work and GPUs it tells of, and has a part for each of `variants` and no other.
    """
    if not target.exists():
        raise ValueError(f"{preset} has no estimate yet; expected one of all of its exhibits first, without only")
    known = json.loads(target.read_text(encoding="utf-8"))
    if (theirs := known["source"]["rehearsal"]) != rehearsal:
        raise ValueError(f"{target} is of the rehearsal {theirs}, not {rehearsal}; expected the same one, or no only")
    if (parts := known.keys() - {"source"}) != set(variants):
        raise ValueError(f"{target} holds {', '.join(sorted(parts))}, and {preset} has {', '.join(sorted(variants))}; "
                         "expected an estimate of all exhibits, without only")  # fmt: skip
    return known


def _merged(known: Mapping[str, Any], found: Mapping[str, Any], whole: Preset) -> dict[str, Any]:
    """What is `known` with the notebooks that were `found` in the place of its own, in the preset's order, and their
    code beside its own. What was assumed stays, as most notebooks are of it."""
    merged = dict(known)
    for name in found.keys() - {"source"}:
        own = known[name]["notebooks"] | found[name]["notebooks"]
        merged[name] = known[name] | {"notebooks": {x: own[x] for x in whole.parameters if x in own}}
    codes = dict.fromkeys([*known["source"]["code"], *found["source"]["code"]])
    return merged | {"source": found["source"] | known["source"] | {"code": list(codes)}}


def search_costs(checkout: Checkout = HERE) -> list[dict[str, Any]]:
    """What `python -m rsparse search-cost` measured, one entry per shape; see rsparse.search_cost for the fields."""
    return search_costs_in(checkout.results)


def search_costs_in(results: Path) -> list[dict[str, Any]]:
    """The same, of a folder of published results."""
    paths = sorted((Path(results) / SEARCH_COSTS).glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _rehearsed(folder: Path, exhibit: str, preset: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Provenance of one rehearsed notebook, with how much slower the target is and the time outside measurements;
    and its costs, each with its method and, as "from", the notebook that it was paid in."""
    path = folder / exhibit / f"{exhibit}.json"
    if not path.exists():
        raise ValueError(f"{exhibit} of {preset} was not rehearsed: {path.parent} holds no finished table")
    provenance = json.loads(path.read_text(encoding="utf-8"))
    groups = read_journal(path.with_suffix(".jsonl")).values()
    costs = [
        cost | {"from": group.get("from", exhibit)} | _of_rows(group) for group in groups for cost in group["costs"]
    ]
    own = sum(cost["seconds"] for cost in costs if cost["from"] == exhibit)
    if own > provenance["seconds"] + 1:
        raise ValueError(f"{exhibit} was rehearsed in several attempts; run the rehearsal again with --fresh")
    slower = slower_than(provenance["device"]) if costs else 1.0
    return provenance | {"rest": max(provenance["seconds"] - own, 0.0), "slower": slower}, costs


def _of_rows(group: Mapping[str, Any]) -> dict[str, Any]:
    row = next(iter(group.get("rows", ())), {})
    return {name: row.get(name) for name in ("method", "searcher")}


def _variant(
    preset: Preset, whole: Preset, defaults: Mapping[str, dict], rehearsed: Mapping[str, tuple[dict, list[dict]]],
    searched: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """The projection of a preset or of its overnight subset; a measurement that two notebooks share is paid once."""
    notebooks: dict[str, Any] = {}
    for exhibit, parameters in ((x, y) for x, y in preset.parameters.items() if x in rehearsed):
        provenance, costs = rehearsed[exhibit]
        paid = [x for x in costs if x["from"] == exhibit or x["from"] not in preset.parameters]
        own, all_ = defaults[exhibit] | parameters, defaults[exhibit] | whole.parameters[exhibit]
        left_out = _sparsities(all_) - _sparsities(own)
        needed = [x for x in paid if x.get("sparsity") not in left_out]
        searches = [x for x in needed if searched and x["what"] == "search"]
        others = [x for x in needed if x not in searches]
        seconds = provenance["rest"] + _scaled(others, own, provenance["slower"])
        seconds += sum(search_seconds(x["searcher"], own, searched) for x in searches)
        measured = {name: provenance[name] for name in ("peak_memory", "gpu_peak_memory", "device")}
        notebooks[exhibit] = {"seconds": round(seconds), **measured}
    return {"notebooks": notebooks, "factors": {"seconds": round(_factors(rehearsed.values()))}}


def _sparsities(parameters: Mapping[str, Any]) -> set[float]:
    """Every budget that a notebook measures at; an operating point is a method and its budget."""
    points = (float(point.split()[-1]) for point in parameters.get("operating_points", ()))
    return {*parameters.get("sparsities", ()), *parameters.get("small_sparsities", ()), *points}


def _factors(rehearsed: Iterable[tuple[dict[str, Any], list[dict[str, Any]]]]) -> float:
    """Seconds of the decompositions that are kept: a method's n-th of one shape is the same in every notebook, though
    notebooks that were rehearsed on different machines have each computed it."""
    once: dict[tuple, float] = {}
    for provenance, costs in rehearsed:
        met: Counter[tuple] = Counter()
        for cost in costs:
            if cost["what"] in KEPT:  # of a search: of larger ranks
                which = cost["what"], cost["method"], cost["m"], cost["n"]
                met[which] += 1
                seconds = decomposition_seconds(cost, provenance["slower"])
                once[*which, met[which]] = max(seconds, once.get((*which, met[which]), 0.0))
    return sum(once.values())


def _scaled(costs: Iterable[Mapping[str, Any]], parameters: Mapping[str, Any], slower: float) -> float:
    """Seconds on the target: token by token for what feeds tokens, by the median of its kind, because the first of
    each waits for files and for the GPU to warm up."""
    frame, total = pd.DataFrame(costs), 0.0
    for what, part in frame.groupby("what") if len(frame) else ():
        if what == "factors of maps":
            total += sum(decomposition_seconds(x, slower) for x in part.to_dict("records"))
        elif what not in KEPT:  # these are kept, and projected apart
            fed = part[part["tokens"] > 0]
            per_token = (fed["seconds"] / fed["tokens"]).median() if len(fed) else 0.0
            total += slower * (len(fed) * per_token * tokens(what, parameters) if len(fed) else 0.0)
            total += slower * part.loc[part["tokens"] == 0, "seconds"].sum()
    return total


def tokens(what: str, parameters: Mapping[str, Any]) -> float:
    """Tokens that one measurement of the kind `what` feeds under a real preset's parameters."""
    if what == "calibrate":
        return parameters["samples"] * parameters["length"]
    if what == "propagation":  # the dense and the sparse model side by side
        return 2 * parameters["windows"] * parameters["window"]
    if what in ("residuals", "inside"):
        return parameters["samples"] * parameters["length"] + parameters["windows"] * parameters["window"]
    if what == "importance":
        texts = parameters["samples"] * (1 + len(parameters["sources"])) + max(parameters["counts"])
        return texts * parameters["length"]
    if what == "gptq":  # a part of it does not grow with the tokens: an upper bound where there are more of them
        return parameters["gptq_samples"] * parameters["gptq_length"]
    if what == "greedy":
        from rsparse.greedy import TOKENS  # with torch, which the claims do without

        return min(parameters["samples"] * parameters["length"], TOKENS)
    if what == "heldout":
        return parameters["windows"] * parameters["window"]
    if what == "search":
        return _search_passes(parameters) * parameters["search_samples"] * parameters["search_length"]
    if what == "summaries":
        return parameters["articles"] * parameters["summary_tokens"]
    suites = {"official": OFFICIAL_ROWS, "teal": TEAL_ROWS}
    if what not in ("tasks", "some tasks") or parameters["suite"] not in suites:
        raise ValueError(f"no projection for {what!r} of suite {parameters.get('suite')!r}; expected official tasks")
    limit, rows = parameters["items"] or 10**9, suites[parameters["suite"]]
    chosen = rows.values() if what == "tasks" else [rows[task] for task in parameters["tasks"]]
    return sum(min(items, limit) * options * length for items, options, length in chosen)


def _search_passes(parameters: Mapping[str, Any]) -> float:
    """Full passes over the text that is searched, at most: of the uniform grid, two at every rho, and of a search,
    whose candidates run half of the blocks on average. Either counts as both."""
    uniform = 2 * (round(1 / parameters["step"]) + 1)
    return uniform + parameters["population"] * parameters["generations"] * (parameters["groups"] + 1) / 2


def search_seconds(searcher: str, parameters: Mapping[str, Any], measured: Mapping[str, Any]) -> float:
    """Seconds of one search on the target, from what `measured` says of a full pass, a candidate and a group's start.

    The uniform grid takes two passes at every rho. The others evaluate `population` x `generations` candidates per
    group. ValueError where it was measured for another number of groups.
    """
    if parameters["groups"] != measured["groups"]:
        raise ValueError(f"a search in {parameters['groups']} groups; expected {measured['groups']}, as was measured")
    tokens_ = parameters["search_samples"] * parameters["search_length"]
    scale = slower_than(measured["device"]) * tokens_ / (measured["samples"] * measured["length"])
    if searcher == "uniform":
        return scale * measured["full_pass_s"] * 2 * (round(1 / parameters["step"]) + 1)
    candidates = parameters["population"] * parameters["generations"] * parameters["groups"]
    return scale * (candidates * measured["mean_share"] * measured["full_pass_s"] + sum(measured["open_s"]))


def decomposition_seconds(cost: Mapping[str, Any], slower: float) -> float:
    """One `svd_factors` on the target: as much slower as other work, or bound by float64 at half its peak rate.

    Operations: two products with the weight, 4 m n s, and the eigenvectors of the Gram matrix, about 9 s^3, with
    s = min(m, n) (Golub and Van Loan, Matrix Computations, section 8.3).
    """
    m, n = cost["m"], cost["n"]
    operations = 4 * m * n * min(m, n) + 9 * min(m, n) ** 3
    return max(slower * cost["seconds"], 2 * operations / (GPUS[TARGET]["float64"] * 1e12))


def slower_than(device: str) -> float:
    """How much slower the target is than `device`: the larger of the ratios of arithmetic and of memory speed."""
    known = [name for name in GPUS if name in device]
    if not known:
        raise ValueError(f"the rehearsal ran on {device!r}; expected a GPU of {', '.join(GPUS)}")
    ours, target = GPUS[known[0]], GPUS[TARGET]
    return max(ours["bfloat16"] / target["bfloat16"], ours["memory"] / target["memory"])
