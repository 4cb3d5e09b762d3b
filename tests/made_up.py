"""A small checkout with made-up notebooks, for the tests of the runner and of the book."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from rsparse.paths import ROOT, Checkout

PARAMETERS = """preset = "interactive"
results = ""
seed = 0
scale = 1.0  # a float
items = [1, 2]
"""
SHOW = """import base64
from IPython.display import Markdown, display
png = base64.b64encode(base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="))
display({"image/png": png.decode()}, raw=True,
        metadata={"image/png": {"alt": 'A "dot": one | pixel', "caption": "Scale: `%s`" % scale}})
display(Markdown("*Emphasised* in Markdown"))
print("printed by", preset)"""
FINISH = """import json, os, pathlib
import pandas
folder = pathlib.Path(results)
with open(folder / "attempts.jsonl", "a") as journal:
    journal.write("one\\n")
frame = pandas.DataFrame({"preset": [preset], "value": [scale], "items": [len(items)]})
frame.to_csv(folder / f"{exhibit}.csv", index=False)
provenance = {"device": "a made-up device", "versions": {"pandas": pandas.__version__}, "folder": str(folder)}
(folder / f"{exhibit}.json").write_text(json.dumps(provenance))
frame"""


def notebook(exhibit: str, work: str = "", parameters: str = PARAMETERS) -> nbformat.NotebookNode:
    """A notebook whose results go where a real one's go; `work` is its own cell."""
    cells = [
        new_markdown_cell(f"# About {exhibit}\n\nWhat it measures: $x^2$.", id="title"),
        new_code_cell(parameters, id="parameters", metadata={"tags": ["parameters"]}),
        new_code_cell(work or "pass", id="work"),
        new_markdown_cell("## Result", id="result"),
        new_code_cell(SHOW, id="show"),
        new_code_cell(f"exhibit = {exhibit!r}\n{FINISH}", id="finish"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def write_notebook(checkout: Checkout, name: str, **parts: str) -> Path:
    path = checkout.notebooks / name
    nbformat.write(notebook(name.partition("-")[2].removesuffix(".ipynb"), **parts), path)
    return path


def write_preset(checkout: Checkout, name: str, **content) -> Path:
    path = checkout.presets / f"{name}.yaml"
    defaults = {"preset": name, "title": f"The {name} preset", "device_note": "two cores"}
    path.write_text(yaml.safe_dump(defaults | content))
    return path


def checkout(folder: Path) -> Checkout:
    """Two notebooks, the presets `small` (both) and `other` (the first), and the real book's frame."""
    made = Checkout(folder)
    made.presets.mkdir(parents=True)
    write_notebook(made, "10-first.ipynb")
    write_notebook(made, "20-second-one.ipynb")
    write_preset(
        made, "small", seed=7, notebooks={"first": {"scale": 2}, "second-one": {}}, overnight={"first": {"scale": 1}}
    )
    write_preset(made, "other", notebooks={"first": {"scale": 3.5}})
    for part in ("_ext", "_static"):
        shutil.copytree(ROOT / "book" / part, made.book / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "_config.yml", made.root)
    (made.book / "references.bib").write_text("")
    (made.book / "intro.md").write_text("# A made-up book\n\n```{include} _generated/status.md\n```\n")
    (made.book / "scorecard.md").write_text("# Scorecard\n")
    toc = {
        "format": "jb-book",
        "root": "intro",
        "chapters": [{"file": "exhibits/first"}, {"file": "exhibits/second-one"}, {"file": "scorecard"}],
    }
    (made.root / "_toc.yml").write_text(yaml.safe_dump(toc))
    for name in ("_config.yml", "_toc.yml"):
        (made.book / name).symlink_to(Path("..") / name)
    return made
