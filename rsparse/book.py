"""From finished runs to the built book: publish a run, write the generated pages, build the HTML."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from nbformat import NotebookNode

from kernels.destination import check_destination
from rsparse import claims, pages
from rsparse.batch import Entry, Ledger, gibibytes
from rsparse.exhibits import rank_reading
from rsparse.files import write_json, write_text
from rsparse.paths import HERE, Checkout
from rsparse.presets import exhibits_in, load, names, unknown

STAGED = ("book", "notebooks", "data/results", "_config.yml", "_toc.yml")
README_MARKS = ("<!-- runs:begin -->", "<!-- runs:end -->")
PROJECTED = """## Projected, not run

What the batches on an RTX A6000 are projected to take, from rehearsals at full shape with random weights, a few samples
and the GPU's memory capped at 44 GiB. Hours are computed; the peak memory was measured in the rehearsal. Take the hours
as upper bounds: tasks are projected from rows of a dozen tokens, at which a GPU waits for its CPU, and two rehearsals
shared each GPU. Low-rank factors come on top once per model, as `python -m rsparse run` says before it starts. A dash:
the overnight batch leaves the exhibit out. Rehearsals are shorter than batches, as their presets say; what memory may
feel of it is that `generalisation` was given texts of 512 tokens instead of 4096, and GPTQ, which holds the inputs of
one block for all its texts, 64 of 128, 1 GiB less at 7B shape."""


def publish(
    run: Path, preset: str | None, checkout: Checkout = HERE, allow_partial: bool = False
) -> list[str]:
    """Take a run's tables and executed notebooks into the checkout and renew all pages; computes nothing.

    Everything is checked before the first file changes: ValueError for a run of another preset, one that
    is not finished (unless `allow_partial`), a notebook without tables, output that no page can show, or a
    checkout that cannot be written to. Returns the exhibits published.
    """
    ledger, done = _finished(run, preset, checkout, allow_partial)
    held = ledger.about["preset"]
    record = checkout.results / held / "batch.json"
    for place in (record, *(checkout.exhibits / held / ledger.entries[exhibit].notebook for exhibit in done)):
        check_destination(place)
    _check_pages(checkout)
    files: dict[Path, str] = {}
    for exhibit in done:
        files |= _published_files(run, exhibit, ledger, checkout)
    for exhibit, path in exhibits_in(checkout.exhibits / held).items():
        if exhibit in done:
            path.unlink()  # its notebook may have been renumbered since
    for path, text in files.items():
        write_text(path, text)
    _record_batch(record, ledger, done)
    write_pages(checkout)
    return done


def _finished(run: Path, preset: str | None, checkout: Checkout, allow_partial: bool) -> tuple[Ledger, list[str]]:
    """The ledger of a run and its finished exhibits; ValueError where there is none that `publish` takes."""
    ledger = Ledger(run)
    held = ledger.about.get("preset")
    if held is None:
        if preset not in (None, *(known := names(checkout))):
            raise unknown("preset", preset, known)
        raise ValueError(f"{run} holds no run; make one with: python -m rsparse run --preset {preset or 'NAME'}")
    if preset not in (None, held):
        raise ValueError(f"{run} holds a run of preset {held!r}")
    done = [exhibit for exhibit in ledger.entries if ledger.done(exhibit)]
    missing = [exhibit for exhibit in ledger.about["wanted"] if exhibit not in done]
    if not done:
        raise ValueError(f"no notebook of preset {held} has finished in {run}; run it again")
    if missing and not allow_partial:
        raise ValueError(
            f"preset {held} is not finished, missing: {', '.join(missing)}. "
            "Run it again, or publish what there is with --allow-partial"
        )
    return ledger, done


def write_pages(checkout: Checkout = HERE) -> None:
    """Write book/exhibits/, book/_generated/ and the README's table anew from what is published. ValueError, before
    pages are made, where they cannot be written."""
    _check_pages(checkout)
    batches = _batches(checkout)
    figures: dict[str, bytes] = {}
    texts: dict[Path, str] = {}
    for exhibit, source in exhibits_in(checkout.notebooks).items():
        runs = [_executed(preset, batch, exhibit, checkout) for preset, batch in batches.items()]
        notebook = nbformat.read(source, as_version=4)
        page = pages.assemble(exhibit, source.name, notebook, list(filter(None, runs)))
        texts[checkout.exhibits / f"{exhibit}.md"] = page.text
        figures |= page.figures
    generated = checkout.book / "_generated"
    judged = claims.judged(checkout.results)
    texts[generated / "scorecard.md"] = claims.scorecard_markdown(judged)
    texts[generated / "verdicts.md"] = _answers(batches, checkout) + claims.verdicts_markdown(judged)
    status = _runs_table(batches, checkout), _versions_table(batches, checkout), _projections(checkout)
    texts[generated / "status.md"] = "\n\n".join(filter(None, status)) + "\n"
    for path, text in texts.items():
        write_text(path, text)
    shutil.rmtree(checkout.exhibits / "figures", ignore_errors=True)
    (checkout.exhibits / "figures").mkdir(parents=True)
    for name, content in figures.items():
        (checkout.exhibits / "figures" / name).write_bytes(content)
    _write_readme(checkout.root / "README.md", _runs_table(batches, checkout))


def _check_pages(checkout: Checkout) -> None:
    """ValueError unless the files of `write_pages` can be written."""
    for exhibit in exhibits_in(checkout.notebooks):
        check_destination(checkout.exhibits / f"{exhibit}.md")
    check_destination(checkout.book / "_generated" / "status.md")
    if (readme := checkout.root / "README.md").exists():  # a staged copy has none
        check_destination(readme)


def build(checkout: Checkout = HERE, run: Path | None = None, out: Path | None = None) -> Path:
    """Build the book into <out>/_build/html and return that folder; the checkout itself is left alone.

    The pages are those of the published presets, with `run`, finished or not, in place of its preset.
    Raises ValueError, before anything is copied, for a run that `publish` refuses and an `out` that cannot be
    written to; and if the build reports a warning or an error.
    """
    if run is not None:
        _finished(run, None, checkout, allow_partial=True)
    out = Path(out or checkout.root).resolve()
    check_destination(out / "_build" / "html" / "index.html")
    staged = stage(checkout, out / "_build" / "checkout")
    if run is not None:
        publish(run, None, staged, allow_partial=True)
    else:
        write_pages(staged)
    program = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    options = ["--path-output", str(out), "--all", "-W", "--keep-going", "-q"]
    command = [*program, "build", str(staged.book), *options]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise ValueError("jupyter-book reported the warnings above")
    return out / "_build" / "html"


def stage(checkout: Checkout, folder: Path) -> Checkout:
    """A copy of what the book is made of, where a run can be published without touching the checkout."""
    shutil.rmtree(folder, ignore_errors=True)
    for part in STAGED:
        source, target = checkout.root / part, folder / part
        if source.is_dir():
            ignored = shutil.ignore_patterns("_build")
            shutil.copytree(source, target, symlinks=True, ignore=ignored, copy_function=shutil.copyfile)
        elif source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    for path in folder.rglob("*"):
        if path.is_dir():  # of a read-only checkout, so are the copies of its folders
            path.chmod(0o755)
    return Checkout(folder)


def publishable(notebook: NotebookNode, preset: str) -> NotebookNode:
    """The executed notebook without timings, warnings and progress bars, as it can be tracked by git."""
    notebook.metadata = NotebookNode(
        {key: notebook.metadata[key] for key in ("kernelspec", "language_info") if key in notebook.metadata},
        rsparse={"preset": preset},
    )
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def _published_files(run: Path, exhibit: str, ledger: Ledger, checkout: Checkout) -> dict[Path, str]:
    """Target -> text of everything that one finished notebook adds to the checkout."""
    preset, entry = ledger.about["preset"], ledger.entries[exhibit]
    tables = {
        path.name: path for kind in ("csv", "json") for path in (run / "results" / exhibit).glob(f"*.{kind}")
    }
    for name in (f"{exhibit}.csv", f"{exhibit}.json"):
        if name not in tables:
            raise ValueError(f"{entry.notebook} finished without writing {name} to its results folder")
    notebook = publishable(nbformat.read(run / entry.notebook, as_version=4), preset)
    pages.check(exhibit, preset, notebook)
    texts = {
        checkout.results / preset / name: path.read_text(encoding="utf-8") for name, path in tables.items()
    }
    texts[checkout.exhibits / preset / entry.notebook] = nbformat.writes(notebook) + "\n"
    return {path: _without_private_paths(text, ledger) for path, text in texts.items()}


def _without_private_paths(text: str, ledger: Ledger) -> str:
    for private, public in sorted(ledger.about["private_paths"].items(), key=lambda item: -len(item[0])):
        text = text.replace(private, public)
    return text


def _record_batch(path: Path, ledger: Ledger, done: list[str]) -> None:
    """What the runner measured, beside the tables: the pages' minutes and memory, and the next estimate."""
    before = json.loads(path.read_text(encoding="utf-8"))["notebooks"] if path.exists() else {}
    about = {key: ledger.about[key] for key in ("preset", "title", "device_note")}
    write_json(path, about | {"notebooks": before | {key: asdict(ledger.entries[key]) for key in done}})


def _batches(checkout: Checkout) -> dict[str, dict[str, Any]]:
    """Preset -> its published batch, in the order of the tabs."""
    files = {path.parent.name: path for path in checkout.results.glob("*/batch.json")}
    return {preset: json.loads(files[preset].read_text(encoding="utf-8")) for preset in claims.tab_order(files)}


def _executed(preset: str, batch: dict[str, Any], exhibit: str, checkout: Checkout) -> pages.Executed | None:
    path = exhibits_in(checkout.exhibits / preset).get(exhibit)
    if path is None:
        return None
    facts = _facts(preset, batch, exhibit, checkout)
    return pages.Executed(preset, batch["title"], facts, path.name, nbformat.read(path, as_version=4))


def _facts(preset: str, batch: dict[str, Any], exhibit: str, checkout: Checkout) -> dict[str, str]:
    """What a published notebook ran on and took."""
    entry = Entry(**batch["notebooks"][exhibit])
    return {
        "Device": _provenance(checkout, preset, exhibit).get("device") or batch["device_note"],
        "Minutes": f"{entry.seconds / 60:.1f}" + (" (resumed)" if entry.resumed else ""),
        "Peak memory": gibibytes(asdict(entry)),
        "Date": entry.started[:10],
    }


def _provenance(checkout: Checkout, preset: str, exhibit: str) -> dict[str, Any]:
    return json.loads((checkout.results / preset / f"{exhibit}.json").read_text(encoding="utf-8"))


def _answers(batches: dict[str, dict[str, Any]], checkout: Checkout) -> str:
    """The central question's answer, in words, from every preset that measured Table 3."""
    lines = []
    for preset, batch in batches.items():
        path = checkout.results / preset / "table-3.csv"
        if path.exists() and "against" in (rows := pd.read_csv(path, low_memory=False)):
            model = str(rows["model"].iloc[0])
            points = rank_reading.sweep_points(rows)
            lines.append(f"- **{batch['title']}.** {rank_reading.reading(rows, model)}")
            lines += [f"  {rank_reading.sweep_reading(points, model)}"] if len(points) else []
    if not lines:
        return ""
    question = "**Does the low-rank path earn the bytes it reads?** R-Sparse against plain input sparsity (TEAL)"
    return "\n".join([f"{question}, [at the same budget](exhibits/table-3.md):", "", *lines, "", ""])


def _runs_table(batches: dict[str, dict[str, Any]], checkout: Checkout) -> str:
    """Device, minutes and memory of every published notebook, and minutes of a preset that ran on one device."""
    if not batches:
        return "No run has been published yet."
    rows = []
    for preset, batch in batches.items():
        own = [
            {"Run": batch["title"], "Exhibit": exhibit} | _facts(preset, batch, exhibit, checkout)
            for exhibit in batch["notebooks"]
        ]
        rows += own + _together(own)
    return pages.table(list(rows[0]), [list(row.values()) for row in rows])


def _together(own: list[dict[str, str]]) -> list[dict[str, str]]:
    """A row of the minutes of all; none where there is one, where some are of other devices, and where some began with
    what an earlier run had measured."""
    minutes, devices = [row["Minutes"] for row in own], {row["Device"] for row in own}
    if len(own) < 2 or len(devices) > 1 or any("resumed" in text for text in minutes):
        return []
    total = f"{sum(map(float, minutes)):.1f}"
    return [own[0] | {"Exhibit": "*together*", "Minutes": total, "Peak memory": "", "Date": ""}]


def _versions_table(batches: dict[str, dict[str, Any]], checkout: Checkout) -> str:
    """Versions as each preset's notebooks recorded them; several where its notebooks differ."""
    seen: dict[str, dict[str, set[str]]] = {}
    for preset, batch in batches.items():
        for exhibit in batch["notebooks"]:
            for package, version in _provenance(checkout, preset, exhibit).get("versions", {}).items():
                seen.setdefault(package, {}).setdefault(preset, set()).add(str(version))
    if not seen:
        return ""
    rows = [
        [package, *(", ".join(sorted(by_preset.get(preset, ()))) for preset in batches)]
        for package, by_preset in seen.items()
    ]
    return pages.table(["Package", *(batch["title"] for batch in batches.values())], rows)


def _projections(checkout: Checkout) -> str:
    """What the batches of `rsparse.estimate` are projected to take, whole and overnight."""
    rows = []
    for path in sorted(checkout.results.glob("*/estimate.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        night = found.get("overnight", {}).get("notebooks", {})
        batches = found["whole"]["notebooks"], night
        for exhibit, cost in found["whole"]["notebooks"].items():
            hours = [_hours([part[exhibit]]) if exhibit in part else "–" for part in batches]
            rows.append([path.parent.name, exhibit, *hours, gibibytes(cost), cost["device"]])
        absent = _not_rehearsed(path.parent.name, batches[0], checkout)
        rows += [[path.parent.name, exhibit, "not rehearsed", "–", "", ""] for exhibit in absent]
        together = [_hours(part.values()) if part else "–" for part in batches]
        rows.append([path.parent.name, "*together, without what was not rehearsed*" if absent else "*together*",
                     *together, "", ""])  # fmt: skip
    if not rows:
        return ""
    header = ["Preset", "Exhibit", "Hours, whole", "Hours, overnight", "Peak memory", "Rehearsed on"]
    return f"{PROJECTED}\n\n{pages.table(header, rows)}"


def _not_rehearsed(preset: str, rehearsed: Iterable[str], checkout: Checkout) -> list[str]:
    """Exhibits of the preset without a projection; none where the checkout has no such preset."""
    if preset not in names(checkout):
        return []
    return [exhibit for exhibit in load(preset, checkout).parameters if exhibit not in rehearsed]


def _hours(costs: Iterable[dict[str, Any]]) -> str:
    return f"{sum(cost['seconds'] for cost in costs) / 3600:.1f}"


def _write_readme(path: Path, text: str) -> None:
    if not path.exists():  # a staged copy has none
        return
    begin, end = README_MARKS
    head, found, rest = path.read_text(encoding="utf-8").partition(begin)
    if found:
        write_text(path, f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}")
