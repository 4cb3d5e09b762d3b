"""The page from exhibits to functions names every notebook, and nothing that is not there."""

import importlib
import re

import pytest

from rsparse import claims
from rsparse.paths import HERE
from rsparse.presets import exhibits_in

TEXT = (HERE.book / "where.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([a-z0-9-]+)` \| \[.*\]\((.*)\) \| `(.*?)` \| (.*) \| (.*) \|$", re.MULTILINE)
ROWS = {row[0]: row for row in ROW.findall(TEXT)}


def test_every_notebook_has_its_row():
    assert {name: row[2] for name, row in ROWS.items()} == {
        name: path.name for name, path in exhibits_in(HERE.notebooks).items()
    }
    assert all(row[1] == f"exhibits/{name}.md" for name, row in ROWS.items())
    assert set(ROWS) <= set(claims.load().exhibits)


@pytest.mark.parametrize("name", ROWS)
def test_functions_exist_and_the_notebook_calls_them(name):
    source = exhibits_in(HERE.notebooks)[name].read_text(encoding="utf-8")
    for path in re.findall(r"`(.*?)`", " ".join(ROWS[name][3:])):
        module, _, function = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function))
        assert f"{module.rpartition('.')[2]}.{function}(" in source, path
