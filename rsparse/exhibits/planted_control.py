"""The planted control over many linears: how often the best rho is found, and how often in nothing.

The shapes are a model's own; a planted rho is drawn from the inner grid. Found means: the grid's best rho is
at most one grid step from the planted one. A null linear should give rho = 1, where no byte goes to rank.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pandas as pd
from tqdm import tqdm

from rsparse import intervals, planted
from rsparse.results import Table


def grid(step: float) -> list[float]:
    """rho from 0 to 1 in steps of `step`."""
    return [round(i * step, 10) for i in range(round(1 / step) + 1)]


def measure(
    table: Table, shapes: Sequence[tuple[int, int]], sparsity: float, noises: Sequence[float], step: float,
    count: int, seed: int,
) -> pd.DataFrame:  # fmt: skip
    """One row per linear: shape, planted rho (NaN in a null linear), best rho found, noise, step.

    `count` planted linears per noise level, and as many null ones; shapes (m, n) are taken in turn. Raises
    ValueError, before anything is computed, for a count below 1, no noise level, a step that does not divide
    1, or a shape too small to plant something at every rho of the inner grid.
    """
    if count < 1 or not noises or not shapes:
        raise ValueError(
            f"count is {count}, with {len(noises)} noises and {len(shapes)} shapes; expected at least 1 each"
        )
    if not 0 < step <= 0.5 or abs(1 / step - round(1 / step)) > 1e-6:
        raise ValueError(f"step is {step}; expected 1 over a whole number of at least 2")
    rhos = grid(step)
    for shape in shapes:
        for rho in rhos[1:-1]:
            planted.check_plan(*shape, sparsity, rho)
    found = []
    for noise in (*noises, None):
        key = {"what": "planted", "shapes": shapes, "sparsity": sparsity, "noise": noise,
               "quietest": min(noises), "step": step, "count": count, "seed": seed}  # fmt: skip
        if (kept := table.find(key)) is None:
            items = [_one(shapes[i % len(shapes)], sparsity, noise, rhos, seed, i)
                     for i in tqdm(range(count), desc=f"noise {noise}")]  # fmt: skip
            columns = {name: [item[name] for item in items] for name in items[0]}
            kept = table.add(key, [_row(columns, noise, sparsity, step, seed, noises)], columns)
        found.append(pd.DataFrame(kept["items"]).assign(noise=noise, step=step))
    return pd.concat(found, ignore_index=True)


def _one(
    shape: tuple[int, int], sparsity: float, noise: float | None, rhos: Sequence[float], seed: int, i: int
) -> dict:
    own = 1_000_003 * seed + i  # seeds share no linear
    if noise is None:
        linear = planted.null(*shape, own)
    else:
        linear = planted.plant(*shape, sparsity, random.Random(own).choice(rhos[1:-1]), own, noise)
    return {
        "m": shape[0],
        "n": shape[1],
        "planted": linear.best_rho,
        "found": planted.best_rho(linear, sparsity, rhos),
    }


def _row(
    columns: dict, noise: float | None, sparsity: float, step: float, seed: int, noises: Sequence[float]
) -> dict:
    """The share found, with its exact interval. Claims read the quietest level; louder ones find the limit."""
    base = {"model": "planted", "method": "r-sparse", "sparsity": sparsity, "score": "magnitude",
            "threshold": "static", "task": "planted", "seed": seed}  # fmt: skip
    if noise is None:
        return base | {"metric": "false_share"} | _share([rho != 1 for rho in columns["found"]])
    metric = "recovered_share" if noise == min(noises) else f"recovered_share_noise_{noise:g}"
    return base | {"metric": metric} | _share(within(columns["found"], columns["planted"], step))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per noise level, and one for the null linears: shares in percent with their interval."""
    levels = rows["metric"].str.extract(r"^recovered_share(?:_noise_(.+))?$", expand=False)
    names = ["planted, lowest noise" if pd.isna(level) else f"planted, noise {level}" for level in levels]
    names = ["null: rho below 1 best" if m == "false_share" else n for m, n in zip(rows["metric"], names, strict=True)]
    percent = 100 * rows[["value", "low", "high"]]
    return pd.concat([pd.Series(names, rows.index, name="linears"), percent, rows["n"]], axis=1).rename(
        columns={"value": "found (%)", "low": "low (%)", "high": "high (%)"}
    )


def _share(hits: Sequence[bool]) -> dict:
    return intervals.share(sum(hits), len(hits)).row()


def within(found: Sequence[float], wanted: Sequence[float], step: float) -> list[bool]:
    """Of every linear, whether its best rho is at most `step` from the wanted one."""
    return [abs(a - b) <= step + 1e-9 for a, b in zip(found, wanted, strict=True)]
