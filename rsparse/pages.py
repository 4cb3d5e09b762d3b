"""One page per exhibit, from the notebook's source and the executed copy of every published preset.

Prose and code are shown once; below each code cell stands what it put out, one tab per preset. Cells are
matched by their id, so a cell that a preset ran before it was rewritten still finds its place.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nbformat import NotebookNode

from rsparse.execution import INJECTED

PICTURES = {"image/png": "png", "image/svg+xml": "svg"}
ACTIVE_HTML = re.compile(r"<script|<iframe|<link|\bsrc\s*=\s*[\"']?\s*(?:https?:)?//", re.IGNORECASE)
VERDICTS = "What it says of the papers' claims stands on the [scorecard](../scorecard.md)."
CAPTION = re.compile(r"<caption>(.*?)</caption>\n?", re.DOTALL)


@dataclass(frozen=True)
class Executed:
    """An exhibit's notebook as one preset ran it. `facts`: its row in the page's table of runs."""

    preset: str
    title: str
    facts: Mapping[str, str]
    file: str
    notebook: NotebookNode

    def cell(self, identifier: str) -> NotebookNode | None:
        return next((cell for cell in self.notebook.cells if cell.id == identifier), None)


@dataclass(frozen=True)
class Page:
    """MyST text, and the picture files (name -> content) that it shows from `figures/`."""

    text: str
    figures: Mapping[str, bytes]


def source_hash(notebook: NotebookNode) -> str:
    """Identifies prose and code of a notebook, whatever was injected into it and put out by it."""
    cells = [(cell.id, cell.source) for cell in notebook.cells if cell.id != INJECTED]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def assemble(exhibit: str, source_name: str, source: NotebookNode, runs: list[Executed]) -> Page:
    """The page of one exhibit; ValueError names the cell whose output cannot be shown.

    Code is folded, that of cells without output together with the next one's. Tags: remove-cell, remove-input,
    remove-output as in Jupyter Book; quoted, for output that is the same in every preset and stands without tabs.
    """
    first = source.cells[0]
    if first.cell_type != "markdown" or not first.source.startswith("# "):
        raise ValueError(f"{source_name}: the first cell must be Markdown and start with the page's title")
    title, _, introduction = first.source.partition("\n")
    parts = [title, _runs_table(source_name, source, runs), introduction.strip()]
    figures: dict[str, bytes] = {}
    code: list[str] = []
    for cell in source.cells[1:]:
        tags = cell.metadata.get("tags", [])
        if "remove-cell" in tags:
            continue
        if cell.cell_type == "markdown":
            parts += [_code("Code", code), cell.source]
        elif "parameters" in tags:
            parts += [_code("Parameters", [cell.source]), _tabs((run, _injected(run)) for run in runs)]
        elif cell.cell_type == "code":
            code += [] if "remove-input" in tags else [cell.source]
            outputs = [(run, _outputs(run, exhibit, cell.id, figures)) for run in runs]
            shown = outputs[0][1] if outputs and "quoted" in tags else _tabs(outputs)
            parts += [_code("Code", code), shown] if shown else []
    parts.append(_code("Code", code))
    return Page("\n\n".join(part for part in parts if part) + "\n", figures)


def check(exhibit: str, preset: str, notebook: NotebookNode) -> None:
    """ValueError names the cell of an executed notebook whose output no page can show."""
    run = Executed(preset, preset, {}, "", notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            _outputs(run, exhibit, cell.id, {})


def fence(directive: str, body: str, argument: str = "", **options: str) -> str:
    """A MyST directive around `body`, fenced with more backticks than `body` has in a row."""
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", body))])
    lines = [f"{ticks}{{{directive}}} {argument}".rstrip()]
    lines += [f":{name.replace('_', '-')}: {value}".rstrip() for name, value in options.items()]
    return "\n".join([*lines, *([""] if options else []), body, ticks])


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _runs_table(source_name: str, source: NotebookNode, runs: list[Executed]) -> str:
    notebook = f"Source: {{download}}`notebooks/{source_name} <../../notebooks/{source_name}>`. {VERDICTS}"
    if not runs:
        return f"{notebook} No run of this notebook has been published yet."
    rows = []
    for run in runs:
        version = "as shown" if source_hash(run.notebook) == source_hash(source) else "an earlier version"
        download = f"{{download}}`{version} <{run.preset}/{run.file}>`"
        rows.append([run.title, *run.facts.values(), download])
    return table(["Run", *runs[0].facts, "Executed notebook"], rows) + f"\n\n{notebook}"


def _injected(run: Executed) -> str:
    cell = run.cell(INJECTED)
    return _code("Parameters of this run", [cell.source]) if cell else ""


def _code(label: str, sources: list[str]) -> str:
    """A folded block of all `sources`, which are then used up; "" for none."""
    text = "\n\n".join(sources)
    sources.clear()
    return fence("dropdown", fence("code-block", text, "python"), label) if text else ""


def _tabs(contents: Iterable[tuple[Executed, str]]) -> str:
    items = [fence("tab-item", content, run.title, sync=run.preset) for run, content in contents if content]
    return fence("tab-set", "\n\n".join(items), sync_group="preset") if items else ""


def _outputs(run: Executed, exhibit: str, identifier: str, figures: dict[str, bytes]) -> str:
    cell = run.cell(identifier)
    if cell is None or "remove-output" in cell.metadata.get("tags", []):
        return ""
    shown, printed = [], []
    for number, output in enumerate(cell.get("outputs", [])):
        where = f"preset {run.preset}, {exhibit}, cell {identifier}"
        if output.output_type == "error":
            raise ValueError(f"{where} ended in an error: {output.ename}: {output.evalue}")
        if output.output_type == "stream":
            printed += [_last_state(output.text)] if output.name == "stdout" else []
            continue
        name = f"{exhibit}-{run.preset}-{identifier}-{number}"
        shown.append(_displayed(output, where, name, figures))
    text = "\n".join(part.rstrip() for part in printed)
    if text:
        shown.append(fence("dropdown", fence("code-block", text, "text"), "Printed output"))
    return "\n\n".join(part for part in shown if part)


def _displayed(output: NotebookNode, where: str, name: str, figures: dict[str, bytes]) -> str:
    """The richest form of a displayed object that a page without scripts can show."""
    data = output.data
    for kind, suffix in PICTURES.items():
        if kind in data:
            content = data[kind].encode() if suffix == "svg" else base64.b64decode(data[kind])
            figures[f"{name}.{suffix}"] = content
            return _figure(f"{name}.{suffix}", where, output.metadata.get(kind, {}))
    if "text/html" in data:
        return _html(data["text/html"], where)
    if "text/markdown" in data:
        return data["text/markdown"]
    if any("widget" in kind for kind in data):  # a progress bar
        return ""
    return fence("code-block", data.get("text/plain", ""), "text")


def _figure(file: str, where: str, about: Mapping[str, Any]) -> str:
    alt = " ".join(about.get("alt", "").split())
    if not alt:
        raise ValueError(f"{where}: the picture has no alt text; use rsparse.figures.show(figure, alt=...)")
    quoted = json.dumps(alt, ensure_ascii=False)
    return fence("figure", about.get("caption", ""), f"figures/{file}", alt=quoted)


def _html(content: str, where: str) -> str:
    """A table in a box that scrolls sideways; its caption stands above the box, where it does not scroll away."""
    if ACTIVE_HTML.search(content):
        raise ValueError(f"{where}: HTML output with a script, or with anything loaded from another place")
    caption = CAPTION.search(content)
    above, label = "", "Table"
    if caption:
        content = content.replace(caption[0], "", 1)
        above, label = f'<p class="table-caption">{caption[1]}</p>\n', caption[1].replace('"', "&quot;")
    box = f'<div class="scroll-box" role="region" tabindex="0" aria-label="{label}">'
    return fence("raw", f"{above}{box}\n{content}\n</div>", "html")


def _last_state(text: str) -> str:
    """What a terminal would show: of a line overwritten by carriage returns, its last state."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
