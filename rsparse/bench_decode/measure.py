"""One run: the baselines, our dense engine, and every method, on one model; a row for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rsparse
from kernels import timing
from kernels.destination import check_destination
from rsparse import int4, models, planning, texts
from rsparse.accounting import check_rho, check_sparsity
from rsparse.bench_decode import baselines
from rsparse.bench_decode.arrivals import Arrivals, repeated, summary, timed
from rsparse.bench_decode.baselines import BASELINES
from rsparse.bench_decode.parts import PRODUCTS, step_parts
from rsparse.bench_decode.settling import Steps, realised, settle
from rsparse.bench_decode.sketches import Sketches
from rsparse.bench_decode.traffic import Traffic, read_shares, traffic
from rsparse.decode.architecture import Architecture
from rsparse.decode.engine import Engine, check_request
from rsparse.files import write_json
from rsparse.provenance import (
    device_name,
    gpu_peak_memory,
    measuring_hash,
    process_peak_memory,
    reset_peak_memory,
    versions,
)
from rsparse.recipe import Recipe
from rsparse.thresholds import SCORES

INT4 = "int4"
"""The dtype of a plan whose weights are INT4, in groups of 128 and rounded to nearest, and whose activations are
bfloat16. Hugging Face's baselines have no INT4 kernel: they run before, on bfloat16 weights."""
CALIBRATION = (4, 512)
"""Samples and length of the text, or random tokens, from which thresholds start."""


@dataclass(frozen=True)
class Plan:
    """What is measured. model: a name that models.load_model takes; layers: of random weights, None for all. dtype: of
    the weights, one of models.DTYPES or INT4.

    methods: names in METHODS, or name@sparsity where it is not the plan's. sparsity, rho, score: as `sparsify` takes
    them. recipe: a file, for r-sparse. text: of real checkpoints, for calibration and prompts; random weights ignore
    it. ValueError for a value that is not allowed.
    """

    model: str
    dtype: str = "bfloat16"
    device: str = "cuda"
    methods: tuple[str, ...] = ("dense", "teal", "r-sparse")
    baselines: tuple[str, ...] = BASELINES
    sparsity: float = 0.5
    rho: float = 0.95
    score: str = "magnitude"
    recipe: str | None = None
    text: str | None = None
    batch: int = 1
    prompt: int = 2048
    new: int = 2048
    repeats: int = 5
    layers: int | None = None
    compiled: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        named = [name for name, _ in self.asked]
        known_dtypes = (*models.DTYPES, INT4)
        for what, chosen, known in (
            ("method", named, rsparse.METHODS), ("baseline", self.baselines, BASELINES),
            ("dtype", [self.dtype], known_dtypes), ("score", [self.score], SCORES),
        ):  # fmt: skip
            for value in chosen:
                if value not in known:
                    hint = ", and commas between several" if " " in value else ""
                    raise ValueError(f"{what} is {value!r}; expected one of {', '.join(known)}{hint}")
        self._check_rows()
        if self.dtype == INT4 and (self.batch > 1 or not self.device.startswith("cuda")):
            raise ValueError(f"batch is {self.batch}, device {self.device!r}; expected 1 and a GPU for {INT4}")
        for name, least in (("new", 2), ("prompt", 1), ("batch", 1), ("repeats", 1), ("layers", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        if self.layers is not None and not self.random:
            raise ValueError(f"layers is {self.layers} for the checkpoint {self.model!r}; expected random weights")
        check_rho(self.rho)
        if self.text is not None and not self.random:
            texts.check_text(self.text, "heldout")

    def _check_rows(self) -> None:
        """ValueError unless there is something to time, each once, with a sparsity where a method takes one."""
        if not self.methods and not self.baselines:
            raise ValueError("methods and baselines are empty; expected at least one of either")
        for asked in self.methods:
            name, at, _ = asked.partition("@")
            if at and "sparsity" not in rsparse.METHODS[name].takes:
                raise ValueError(f"method is {asked!r}; expected {name}, which takes no sparsity")
        rows = [f"{name}@{sparsity:g}" for name, sparsity in self.asked]
        for what, names in (("methods", rows), ("baselines", self.baselines)):
            if twice := next((x for i, x in enumerate(names) if x in names[:i]), None):
                raise ValueError(f"{what} are {','.join(getattr(self, what))}, with {twice} twice; expected each once")

    @property
    def random(self) -> bool:
        return self.model.startswith("random:")

    @property
    def loaded(self) -> str:
        """The dtype that weights are loaded in, and activations have."""
        return "bfloat16" if self.dtype == INT4 else self.dtype

    @property
    def asked(self) -> list[tuple[str, float]]:
        """Every method and its sparsity."""
        parts = [x.partition("@") for x in self.methods]
        try:
            return [(name, check_sparsity(float(own)) if own else self.sparsity) for name, _, own in parts]
        except ValueError:
            raise ValueError(f"methods are {','.join(self.methods)}; expected names, or name@sparsity with a sparsity "
                             "in [0, 1)") from None  # fmt: skip


OPTIONS = tuple(x.name for x in fields(Plan) if x.name != "model")
"""Names of the command's options."""


def measure(plan: Plan, path: Path | None = None) -> dict[str, Any]:
    """Figures of `plan`, one row after another; `path` is written after each, atomically. Seconds, bytes, and tokens
    per second of one row of the batch.

    dtype, of a baseline's row: of its weights, see INT4. linears, of a row: what computed the products, see `Engine`.
    "reference" reads every weight, whatever its bytes say: such a row is a sparse method's sparsity and its bytes, not
    its speed.

    Raises ValueError, before weights are loaded, for a `path` that cannot be written, a model, dtype, device or recipe
    that is not there; before anything is timed, for a recipe of another model, and with INT4, whose weights it must be
    of, before its own row.
    """
    if path is not None:
        check_destination(path)
    recipe = Recipe.load(plan.recipe) if plan.recipe else None
    empty = models.skeleton(plan.model)
    _check_positions(plan, empty.config.max_position_embeddings)
    _check_reach(plan, empty)
    Architecture.of(empty.config)
    check_request(empty, torch.zeros(plan.batch, plan.prompt, dtype=torch.long), plan.new)
    model = _load(plan)
    if recipe is not None and plan.dtype != INT4:  # INT4 weights are others, and not there yet
        recipe.check(model)
    ids, steps, calibration = _texts(plan, model)
    head = asdict(plan) | {
        "bandwidth": timing.bandwidth(model.device.type), "device_name": device_name(plan.device),
        "code": measuring_hash(), "versions": versions(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    found = head | {"rows": []}
    for row in _rows(plan, model, ids, steps, calibration, head["bandwidth"]):
        found["rows"].append(row)
        if path is not None:
            write_json(path, found)
    return found


def _rows(
    plan: Plan, model: nn.Module, ids: Tensor, steps: Steps, calibration: Tensor, bandwidth: float
) -> Iterator[dict[str, Any]]:
    theirs: Tensor | None = None
    for name in plan.baselines:
        reset_peak_memory(plan.device)
        runs = repeated(lambda name=name: baselines.run(model, name, ids, plan.new), plan.repeats)
        theirs = runs[0].tokens if name == "hf-eager" else theirs
        yield _row(name, "hugging face", runs, _traffic(plan, model), bandwidth, plan) | {
            "linears": "dense", "dtype": plan.loaded}  # fmt: skip
        baselines.forget_compiled()
    if plan.dtype == INT4:
        int4.hang(model, lambda linear: int4.nearest(linear.module.weight))
    for method, sparsity in plan.asked:
        about, read = _sparsify(plan, model, method, sparsity, steps, calibration)
        reset_peak_memory(plan.device)
        runs, of_engine = _ours(plan, model, ids)
        row = _row(method, "ours", runs, _traffic(plan, model, read), bandwidth, plan) | of_engine | about
        if method == "dense" and theirs is not None and plan.dtype != INT4:  # theirs are of other weights
            row["equal_to_hf_eager"] = _share_equal(runs[0].tokens, theirs)
        yield row
        rsparse.restore(model)
        baselines.forget_compiled()


def _check_positions(plan: Plan, most: int) -> None:
    if (asked := plan.prompt + plan.new) > most:
        raise ValueError(f"prompt {plan.prompt} and new {plan.new} take {asked} positions; expected at most {most}, "
                         f"{plan.model}'s")  # fmt: skip


def _check_reach(plan: Plan, model: nn.Module) -> None:
    """ValueError for more layers than `model` has, whose weights may be absent, and for a method that cannot reach its
    sparsity on it."""
    if plan.layers is not None and plan.layers > (most := model.config.num_hidden_layers):
        raise ValueError(f"layers is {plan.layers}; expected at most {most}, all of {plan.model}'s")
    check_sparsity(plan.sparsity)
    for method, sparsity in plan.asked:
        knob = "sparsity" in rsparse.METHODS[method].takes
        if knob and sparsity >= (most := planning.ceiling(model, method)):
            raise ValueError(f"sparsity {sparsity} cannot be reached by {method}; expected less than {most:.4f}, as in "
                             f"{method}@{most / 2:.2f}")  # fmt: skip


def _ours(plan: Plan, model: nn.Module, ids: Tensor) -> tuple[list[Arrivals], dict[str, Any]]:
    """The runs of an engine, and what a row says of it."""
    engine = Engine(model, compiled=plan.compiled)
    steps = engine.prepare(plan.batch, plan.prompt, plan.new)
    runs = repeated(lambda: timed(lambda: engine.stream(ids, plan.new, stop=())), plan.repeats)
    block = engine.decoder.blocks[0].step
    chosen = {slot: str(getattr(getattr(block, slot), "configuration", None) or "") for slot in PRODUCTS}
    return runs, {"linears": engine.linears, "configurations": chosen,
                  "step_parts_s": step_parts(steps, plan.prompt, plan.repeats)}  # fmt: skip


def _sparsify(
    plan: Plan, model: nn.Module, method: str, sparsity: float, steps: Steps, calibration: Tensor
) -> tuple[dict[str, Any], dict[str, float] | None]:
    """Put `method` on `model`; what a row says of it, and the share of each linear that is read."""
    if method == "dense":
        return {}, None
    recipe = Recipe.load(plan.recipe) if plan.recipe and method == "r-sparse" else None
    report = rsparse.sparsify(
        model, method, sparsity, rho=plan.rho, score=plan.score, tokens="decode", calibration=calibration,
        recipe=recipe, store=Sketches(plan.seed) if plan.random else None,
    )  # fmt: skip
    if plan.random:
        settle(model, steps)
    report, tape = realised(model, steps)
    about = {"factors": "random directions" if plan.random else "svd", "recipe": report.recipe,
             "asked": report.asked, "planned": report.planned, "realised": report.realised,
             "realised_worst": report.worst.name, "realised_worst_is": report.worst.realised}  # fmt: skip
    return {k: None if v != v else v for k, v in about.items()}, read_shares(report, tape)  # JSON has no NaN


def _row(
    name: str, engine: str, runs: Sequence[Arrivals], moved: Traffic, bandwidth: float, plan: Plan
) -> dict[str, Any]:
    """limit: tokens per second if a step took the time that its bytes take to read. non_weight_s: of a step, what the
    reading of the weights does not explain."""
    times = summary(runs)
    return {"name": name, "engine": engine, **times, "bytes": asdict(moved) | {"total": moved.total},
            "byte_limit_over_dense": (moved.dense - moved.decoder + moved.total) / moved.total,
            "limit_tokens_per_s": bandwidth / moved.total,
            "share_of_limit": moved.total / bandwidth / times["step_s"],
            "non_weight_s": times["step_s"] - moved.weights / bandwidth,
            "gpu_peak_memory": gpu_peak_memory(plan.device), "process_peak_memory": process_peak_memory()}  # fmt: skip


def _traffic(plan: Plan, model: nn.Module, read: dict[str, float] | None = None) -> Traffic:
    config, size = model.config, model.lm_head.weight.element_size()
    positions = plan.prompt + plan.new / 2
    if config.model_type == "mistral" and config.sliding_window is not None:
        positions = min(positions, config.sliding_window)
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    return traffic(model, plan.batch, plan.batch * positions * per_position, read)


def _share_equal(found: Tensor, expected: Tensor) -> float:
    """Share of the new tokens up to which two free-running continuations are the same."""
    return float((found == expected).long().cumprod(1).double().mean())


def _load(plan: Plan) -> nn.Module:
    if plan.layers is None:
        return models.load_model(plan.model, plan.loaded, plan.device, seed=plan.seed)
    models.check_device(plan.device)
    models.cap_gpu_memory(plan.device)
    config = models.shape_config(plan.model.removeprefix("random:"), num_hidden_layers=plan.layers)
    return models.random_model(config, plan.loaded, plan.device, plan.seed)


def _texts(plan: Plan, model: nn.Module) -> tuple[Tensor, Steps, Tensor]:
    """The prompts (batch, prompt) on the device; decode steps to settle on; calibration tokens."""
    length, (samples, wide) = plan.prompt + plan.new, CALIBRATION
    wide = min(wide, model.config.max_position_embeddings)
    if plan.random:
        generator = torch.Generator().manual_seed(plan.seed)
        size = [(plan.batch, length), (samples, wide)]
        ids, calibration = (torch.randint(0, model.config.vocab_size, x, generator=generator) for x in size)
    else:
        tokenizer = models.load_tokenizer(plan.model)
        text = plan.text or ("tiny" if plan.model == "tiny" else "c4")
        ids = texts.token_ids(text, "heldout", tokenizer, plan.batch, length, plan.seed)
        calibration = texts.token_ids(text, "calibration", tokenizer, samples, wide, plan.seed)
    return ids[:, : plan.prompt].to(model.device), Steps.over(ids, plan.prompt), calibration


def lines(found: dict[str, Any]) -> list[str]:
    """What `measure` returned, for a reader: one line a row, over the longest generation, ratios to every dense row."""
    dense = [row for row in found["rows"] if row["engine"] != "ours" or row["name"] == "dense"]
    text = [f"{found['model']}, {found['dtype']}, {found['device_name']}: prompt {found['prompt']}, {found['new']} new "
            f"tokens, batch {found['batch']}; reading reaches {found['bandwidth'] / 1e9:.0f} GB/s"]  # fmt: skip
    unit = "tokens/s" if found["batch"] == 1 else "tokens/s per text"
    for row in found["rows"]:
        ratios = [f"{x['step_s'] / row['step_s']:.2f}x {x['name']}" for x in dense if x is not row]
        realised = f", realised sparsity {row['realised']:.3f}" if row.get("realised") is not None else ""
        text.append(
            f"{row['name']} ({row['engine']}, {row['linears']}): {1 / row['step_s']:.1f} {unit}, "
            f"{100 * row['share_of_limit']:.0f}% of the bandwidth limit, {1e3 * row['non_weight_s']:.2f} ms beside the "
            f"weights, prefill {1e3 * row['prefill_s']:.0f} ms{realised}; {', '.join(ratios)}".rstrip("; ")
        )
    return text
