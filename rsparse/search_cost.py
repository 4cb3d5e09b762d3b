"""What a search costs at the size of real models: `python -m rsparse search-cost`, random weights at full shape.

Time does not depend on what the weights are. Measured: a full pass of the sparse model over the calibration tokens; a
candidate of every group, behind the boundary that is kept; and what begins a group. From these, the hours of the
paper's 32 x 5 candidates, once taken per group and once in total.

Every rho of the grid is run once beforehand: a GPU is slow at a product of a shape that it has not met, and a search
meets all shapes in its first group.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rsparse import models, search
from rsparse.calibrate import Calibration
from rsparse.evolution import Evolution
from rsparse.files import write_json
from rsparse.provenance import device_name, gpu_peak_memory, measuring_hash, versions


def measure(
    shape: str, sparsity: float, groups: int, samples: int, length: int, repeats: int, dtype: str = "bfloat16",
    device: str = "cuda", step: float = 0.05, rho: float = 0.95, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Seconds and their ratios; medians over `repeats` random candidates of each group, after one that is dropped.

    bound: (G + 1) / (2 G) for G groups, the mean share of a full pass if a pass had no embedding and no lm_head.
    ValueError for a shape, dtype or device that does not exist here, or values that `search.Plan` refuses.
    """
    plan = search.Plan(sparsity, Evolution(), seed, groups, step, rho)
    model = models.load_model(f"random:{shape}", dtype, device)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (samples, length), generator=generator)
    run = search.Run(Calibration(model, ids), plan)
    rng = random.Random(seed)
    full, opened, candidates = [], [], []
    with run.trials:
        for index, group in enumerate(tqdm(run.groups, desc="groups")):
            opened.append(_seconds(lambda index=index: run.open_group(run.groups[index]), model))
            for rho in () if index else plan.rhos:
                run.trials.losses([{x.name: plan.ask(rho) for x in group}])
            drawn = [run.random_asks(group, rng) for _ in range(repeats + 1)]
            times = [_seconds(lambda asks=asks: run.trials.losses([asks]), model) for asks in drawn][1:]
            full = full or times  # the first group's candidates run every block
            candidates.append(statistics.median(times))
    return _summary(plan, shape, dtype, (samples, length), statistics.median(full), candidates, opened) | {
        "gpu_peak_memory": gpu_peak_memory(device), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device), "code": measuring_hash(), "versions": versions(),
    }  # fmt: skip


def save(found: dict[str, Any], path: Path) -> None:
    """Write what `measure` returned, atomically."""
    write_json(path, found)


def _summary(
    plan: search.Plan, shape: str, dtype: str, size: tuple[int, int], full: float, candidates: Sequence[float],
    opened: Sequence[float],
) -> dict[str, Any]:  # fmt: skip
    mean, evaluations, groups = statistics.mean(candidates), plan.searcher.evaluations, len(candidates)
    per_group = (evaluations * sum(candidates) + sum(opened)) / 3600
    total = (evaluations / groups * sum(candidates) + sum(opened)) / 3600
    return {
        "shape": shape, "dtype": dtype, "sparsity": plan.sparsity, "samples": size[0], "length": size[1],
        "groups": groups, "evaluations": evaluations, "full_pass_s": full, "candidate_s": list(candidates),
        "open_s": list(opened), "mean_share": mean / full, "bound": (groups + 1) / (2 * groups),
        "hours_per_group": per_group, "hours_in_total": total,
    }  # fmt: skip


def _seconds(work: Callable[[], Any], model: torch.nn.Module) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    started = time.perf_counter()
    work()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - started
