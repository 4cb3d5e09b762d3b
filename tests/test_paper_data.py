"""Integrity of data/paper/: checksums, no cell twice, values in range, every row with its source."""

import hashlib
import re

import pandas as pd
import pytest

from rsparse import paper

CELL = "paper where model method variant sparsity sparsity_kind rho against task metric".split()


def test_checksums():
    for line in (paper.FOLDER / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((paper.FOLDER / name).read_bytes()).hexdigest() == digest, name


def test_readme_counts_rows():
    text = (paper.FOLDER / "README.md").read_text()
    frames = {
        "reported.csv": paper.reported(),
        "statements.csv": paper.statements(),
        "teal_activation_quantiles.csv.gz": paper.activation_quantiles(),
        "teal_greedy_sparsity.csv": paper.greedy_sparsity(),
    }
    for name, frame in frames.items():
        assert f"| `{name}` | {len(frame):,} |" in text, name
    for level, count in paper.reported()["confidence"].value_counts().items():
        assert re.search(rf"`{level}`\s+{count}\b", text), (level, count)


def test_no_cell_twice():
    frame = paper.reported()
    doubled = frame[frame.duplicated(CELL, keep=False) & ~frame["flag"].str.contains("contradicts")]
    assert doubled.empty, doubled[[*CELL, "value"]].to_string()


def test_every_row_says_where_it_comes_from():
    for frame in (paper.reported(), paper.statements()):
        assert (frame["source"] != "").all()
        assert set(frame["confidence"]) <= {"seed", "quoted-by-two-or-more", "quoted-once", "inferred"}
        assert (frame["where"] != "").all()


def test_values_are_numbers_in_range():
    frame = paper.reported()
    assert frame["value"].notna().all()
    assert frame["sparsity"].dropna().between(0, 1, inclusive="left").all()
    assert frame["rho"].dropna().between(0, 1).all()
    accuracy = frame["metric"].isin(["acc", "acc_or_norm"])
    assert (frame.loc[accuracy, "unit"] == "%").all()
    assert frame.loc[accuracy, "value"].between(1, 100).all()
    assert frame.loc[frame["metric"] == "perplexity", "value"].between(1, 100).all()


def test_printed_averages_agree_with_their_cells():
    """Where all eight tasks are known their mean is the printed average; a misread cell would show."""
    frame = paper.reported()
    row = [c for c in CELL if c != "task"]
    eight = "winogrande piqa sciq obqa hellaswag boolq arc_easy arc_challenge".split()
    checked, off = 0, []
    for key, part in frame[frame["where"] != "derived"].groupby(row, dropna=False):
        cells = part.set_index("task")["value"]
        if set(eight) <= set(cells.index) and "average" in cells.index:
            checked += 1
            if abs(cells[eight].mean() - cells["average"]) > 0.051:
                off.append((key, cells[eight].mean(), cells["average"]))
    assert checked > 40
    assert not off, off


def test_suspect_cells_are_flagged():
    frame = paper.reported(paper="r-sparse", model="Mistral-7B")
    assert (frame.loc[frame["task"] == "obqa", "flag"] == paper.SUSPECT).all()
    assert (frame["task"] == "obqa").sum() == 2


def test_independent_reruns():
    frame = paper.reported("table-1", paper="wina")
    assert frame.loc[frame["method"] == "r-sparse", "independent"].all()
    assert not frame.loc[frame["method"] == "wina", "independent"].any()


def test_the_authors_recipe_is_not_shipped():
    names = {path.name for path in paper.FOLDER.iterdir()}
    assert not any("rsparse" in name or "recipe" in name for name in names)
    summary = paper.reported("table-4", "Llama-3-8B")
    assert set(summary.loc[summary["metric"] == "linears_rho_1", "value"]) == {193.0}


def test_filters():
    assert set(paper.reported("table-3")["exhibit"]) == {"table-3"}
    assert set(paper.reported(model="Mistral-7B")["model"]) == {"Mistral-7B"}
    with pytest.raises(ValueError, match="table-99.*table-1"):
        paper.reported("table-99")
    mine = paper.reported()
    mine["value"] = 0.0
    assert (paper.reported()["value"] != 0).all()  # callers get their own copy


def test_teal_tables():
    quantiles = paper.activation_quantiles()
    assert set(quantiles["input"]) == {"attn_in", "attn_out", "mlp_in", "mlp_hidden"}
    rising = quantiles.sort_values("quantile").groupby(["model", "layer", "input"])["abs_value"]
    assert (rising.diff().dropna() > 0).all()
    greedy = paper.greedy_sparsity()
    assert greedy[["q", "k", "v", "o", "gate", "up", "down"]].stack().between(0, 1).all()
    assert isinstance(greedy, pd.DataFrame) and "MIT" in (paper.FOLDER / "LICENSE-TEAL.txt").read_text()
