"""--help names the values that are allowed, as the code has them."""

import re

import pytest

import rsparse
from kernels import bench
from rsparse.__main__ import main
from rsparse.bench_decode import baselines, measure
from rsparse.evolution import FORMS, INITIAL
from rsparse.models import DTYPES, SHAPES
from rsparse.search_command import SEARCHERS
from rsparse.thresholds import SCORES

VALUES = [
    ("search", "--searcher", SEARCHERS), ("search", "--score", SCORES), ("search", "--initial", INITIAL),
    ("search", "--form", FORMS),
    ("search-cost", "--shape", SHAPES), ("search-cost", "--dtype", DTYPES),
    ("bench-decode", "--shape", SHAPES), ("bench-decode", "--dtype", (*DTYPES, measure.INT4)),
    ("bench-decode", "--methods", rsparse.METHODS), ("bench-decode", "--baselines", baselines.BASELINES),
    ("bench-decode", "--score", SCORES), ("bench-decode", "--batch", ("1", "16")),
    ("kernels.bench", "--sparsity", ("0", "0.99", "0.5")), ("kernels.bench", "--rho", ("0", "1", "0.95")),
    ("kernels.bench", "--batch", ("1", "16")),
]  # fmt: skip


@pytest.mark.parametrize(("command", "option", "values"), VALUES)
def test_every_allowed_value_is_named(command, option, values, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no value is broken at its hyphen
    with pytest.raises(SystemExit):
        bench.main(["--help"]) if command == "kernels.bench" else main([command, "--help"])
    said = re.search(rf"^  {option} .*(?:\n {{4,}}.*)*", capsys.readouterr().out, re.MULTILINE)[0]
    assert set(values) <= set(re.split(r"[\s,();:]+", said)), said
