"""What the papers and the independent reruns report: loaders of the tables in `data/paper/`.

The columns, their origin and their confidence levels are described in `data/paper/README.md`.
"""

from __future__ import annotations

from functools import cache

import pandas as pd

from rsparse.paths import DATA

FOLDER = DATA / "paper"
SUSPECT = "suspect-misread"
_TEXT = (
    "paper exhibit where model method variant sparsity_kind against task metric unit flag source_method "
    "source_task source_metric source_value source confidence"
).split()


@cache
def _reported() -> pd.DataFrame:
    return pd.read_csv(FOLDER / "reported.csv", dtype={name: str for name in _TEXT}, keep_default_na=False,
                       na_values={name: [""] for name in ("sparsity", "rho", "value")})


def reported(exhibit: str | None = None, model: str | None = None, paper: str | None = None) -> pd.DataFrame:
    """The cells of `data/paper/reported.csv`, one row each.

    `exhibit` is a key of this book ("table-3"), `model` a name such as "Llama-2-7B", `paper` a key such as
    "r-sparse", "teal", "wina"; None takes all. Text columns are "" where nothing is known, `sparsity` (model
    level unless `sparsity_kind` says otherwise), `rho` and `value` are float64, NaN where unknown. `value` is
    in the printed `unit`: accuracies in percent. Raises ValueError for a key that the table does not have.
    """
    frame = _reported()
    for column, wanted in (("exhibit", exhibit), ("model", model), ("paper", paper)):
        if wanted is None:
            continue
        known = sorted(set(_reported()[column]) - {""})
        if wanted not in known:
            raise ValueError(f"{column} {wanted!r} has no reported numbers; known: {', '.join(known)}.")
        frame = frame[frame[column] == wanted]
    return frame.reset_index(drop=True)


def statements() -> pd.DataFrame:
    """What the papers say in words or formulas (set-ups, trends), `data/paper/statements.csv`."""
    return pd.read_csv(FOLDER / "statements.csv", dtype=str, keep_default_na=False)


def activation_quantiles() -> pd.DataFrame:
    """Quantiles of |x| from TEAL's authors: model, layer, input, quantile, abs_value (MIT licence)."""
    return pd.read_csv(FOLDER / "teal_activation_quantiles.csv.gz")


def greedy_sparsity() -> pd.DataFrame:
    """TEAL's greedy sparsities: model, layer, target_sparsity, q, k, v, o, gate, up, down (MIT licence)."""
    return pd.read_csv(FOLDER / "teal_greedy_sparsity.csv")
