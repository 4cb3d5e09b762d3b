"""--help names the values that are allowed, as the code has them, and no others."""

import re

import pytest

import rsparse
from kernels import bench
from rsparse.__main__ import main
from rsparse.bench_decode import baselines, measure
from rsparse.decode.gathering import MOST_ROWS
from rsparse.evolution import FORMS, INITIAL
from rsparse.models import DTYPES, SHAPES
from rsparse.search_command import SEARCHERS
from rsparse.thresholds import SCORES

VALUES = [
    ("search", "--searcher", SEARCHERS), ("search", "--score", SCORES), ("search", "--initial", INITIAL),
    ("search", "--form", FORMS),
    ("search-cost", "--shape", SHAPES), ("search-cost", "--dtype", DTYPES),
    ("bench-decode", "--shape", SHAPES), ("bench-decode", "--dtype", (*DTYPES, measure.INT4)),
    ("bench-decode", "--methods", rsparse.METHODS), ("bench-decode", "--score", SCORES),
]  # fmt: skip
WORD = r"[\w-]+(?: \(default\))?"
LIST = rf"(?:{WORD}, )*{WORD} (?:or|and) {WORD}"
"""As in "evolution (default), random or greedy"."""


@pytest.fixture
def said(capsys, monkeypatch):
    """said(command, option): what --help has on one option, on one line."""

    def text(command: str, option: str) -> str:
        monkeypatch.setenv("COLUMNS", "1000")  # no value is broken at its hyphen
        with pytest.raises(SystemExit):
            bench.main(["--help"]) if command == "kernels.bench" else main([command, "--help"])
        found = re.search(rf"^  {option} .*(?:\n {{4,}}.*)*", capsys.readouterr().out, re.MULTILINE)
        return " ".join(found[0].split())

    return text


@pytest.mark.parametrize(("command", "option", "values"), VALUES)
def test_the_allowed_values_are_named(command, option, values, said):
    found = re.search(LIST, said(command, option))[0].replace(" (default)", "")
    assert sorted(re.split(", | or | and ", found)) == sorted(values)


def test_the_baselines_are_named(said):
    assert f"default: {','.join(baselines.BASELINES)};" in said("bench-decode", "--baselines")


def test_the_rows_of_a_batch_are_named(said):
    least, most = re.search(r"(\d+) \(default\) to (\d+)", said("bench-decode", "--batch")).groups()
    assert (int(least), int(most)) == (measure.Plan.batch, MOST_ROWS)
    with pytest.raises(ValueError, match=f"batch is 0; expected at least {least}"):
        measure.Plan("random:llama-2-7b", batch=0)


@pytest.mark.parametrize("option", ["--sparsity", "--rho", "--batch"])
def test_ranges_are_those_that_are_refused_beyond(option, said, capsys):
    with pytest.raises(SystemExit):
        bench.main([option, "-1"])
    low, high = re.search(r"expected (\S+) to (\S+)", capsys.readouterr().err).groups()
    assert re.findall(r"([\d.]+) to ([\d.]+)", said("kernels.bench", option)) == [(low, high)]


@pytest.mark.parametrize("name", ["shape", "dtype", "sparsity", "rho", "batch", "inputs", "repeats", "seed"])
def test_defaults_are_those_that_are_measured(name, said, monkeypatch):
    asked = []

    def measured(one, _):
        asked.append(one)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "bench", measured)
    with pytest.raises(KeyboardInterrupt):
        bench.main([])
    assert f"(default: {getattr(asked[0], name)})" in said("kernels.bench", f"--{name}")
