"""Run the notebooks of a preset one after the other, remember what is finished, and resume after a kill.

Notebooks run in sequence even where there are several GPUs: memory and timings of one would disturb the
other, and a model that outgrows one GPU is spread over all of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rsparse.execution import Job
from rsparse.files import write_json
from rsparse.paths import HERE, ROOT, Checkout, stamp
from rsparse.presets import Preset, exhibits_in, load
from rsparse.provenance import CODE, DATA, content_hash, versions
from rsparse.results import made_with, read_journal

HEARTBEAT_S = 60
TRACEBACK_LINES = 15


@dataclass(frozen=True)
class Entry:
    """What the ledger knows of one notebook: times in seconds, memory in bytes.

    `resumed`: rows of an interrupted attempt were kept, so `seconds` counts the last attempt only. `variant`: of
    the preset, "whole" or "overnight".
    """

    notebook: str
    key: str
    state: str  # "running" (also: killed), "done", "failed"
    started: str
    seconds: float = 0.0
    peak_memory: int = 0
    gpu_peak_memory: int = 0
    resumed: bool = False
    variant: str = "whole"


class Ledger:
    """`ledger.json` of a run folder, rewritten whole and atomically after every change."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.json"
        document = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        self.about: dict[str, Any] = document.get("about", {})
        self.entries = {exhibit: Entry(**fields) for exhibit, fields in document.get("notebooks", {}).items()}

    def record(self, exhibit: str, entry: Entry) -> None:
        self.entries[exhibit] = entry
        self.save()

    def save(self) -> None:
        notebooks = {exhibit: asdict(entry) for exhibit, entry in self.entries.items()}
        write_json(self.path, {"about": self.about, "notebooks": notebooks})

    def done(self, exhibit: str, key: str | None = None) -> bool:
        """Whether the notebook has finished - under `key`, where one is given."""
        entry = self.entries.get(exhibit)
        return entry is not None and entry.state == "done" and key in (None, entry.key)


def run(
    name: str,
    checkout: Checkout = HERE,
    out: Path | None = None,
    only: Iterable[str] = (),
    fresh: bool = False,
    overnight: bool = False,
    say: Callable[[str], None] = print,
) -> int:
    """Run a preset's notebooks that are not finished yet; returns the number of notebooks that failed.

    Raises ValueError, before anything runs, for an unknown preset, notebook or parameter, a value of the
    wrong type, a GPU that is not there, a folder that cannot be written, or one in use by another batch.
    """
    preset = load(name, checkout, overnight)
    chosen = preset.choose(only)
    _check_devices(preset.parameters[exhibit].get("device", "cpu") for exhibit in chosen)
    folder = Path(out or checkout.run_folder(name)).resolve()
    with exclusive(folder):
        ledger = Ledger(folder)
        ledger.about = _about(preset, checkout, folder)
        keys = run_keys(preset, checkout)
        waiting = [exhibit for exhibit in chosen if fresh or not ledger.done(exhibit, keys[exhibit])]
        say(estimate(preset, chosen, waiting, checkout))
        try:
            for position, exhibit in enumerate(waiting, 1):
                say(f"[{position}/{len(waiting)}] {exhibit} ...")
                entry = _run_one(exhibit, preset, checkout, folder, ledger, keys[exhibit], fresh, say)
                say(f"[{position}/{len(waiting)}] {exhibit} {entry.state} in {duration(entry.seconds)}")
        finally:  # also after Ctrl-C
            failed = [exhibit for exhibit in waiting if _state(ledger, exhibit) == "failed"]
            for exhibit in failed:
                say(
                    f"\n{exhibit} failed; the whole log is {_log(folder, ledger.entries[exhibit].notebook)}\n"
                    + _tail(_log(folder, ledger.entries[exhibit].notebook))
                )
            say(closing_table(chosen, waiting, ledger))
    return len(failed)


def _check_devices(devices: Iterable[str]) -> None:
    if others := sorted({device for device in devices if device != "cpu"}):
        from rsparse.models import check_device  # takes seconds, which a batch on the CPU need not wait

        for device in others:
            check_device(device)


def run_keys(preset: Preset, checkout: Checkout) -> dict[str, str]:
    """Exhibit -> hash over all that its result depends on: parameters, notebook, code, data, packages, and the
    files of folders that parameters name."""
    surroundings = content_hash(checkout.root, CODE, ".py") + content_hash(checkout.root, DATA) + json.dumps(versions())
    keys = {}
    for exhibit, parameters in preset.parameters.items():
        source = exhibits_in(checkout.notebooks)[exhibit].read_bytes()
        stamps = [stamp(value) for value in parameters.values() if isinstance(value, str)]
        parts = surroundings.encode() + json.dumps([parameters, stamps], sort_keys=True).encode() + source
        keys[exhibit] = hashlib.sha256(parts).hexdigest()
    return keys


def estimate(preset: Preset, chosen: list[str], waiting: list[str], checkout: Checkout) -> str:
    """What each chosen notebook took where this preset was run before, or is projected to take."""
    projected = _read_json(checkout.results / preset.name / "estimate.json").get(preset.variant, {})
    measured = _read_json(checkout.results / preset.name / "batch.json").get("notebooks", {})
    measured = {exhibit: cost for exhibit, cost in measured.items() if cost.get("variant", "whole") == preset.variant}
    known = projected.get("notebooks", {}) | measured
    rows = []
    for exhibit in chosen:
        cost = known.get(exhibit)
        text = f"{duration(cost['seconds'])}, {gibibytes(cost)}" if cost else "no run published yet"
        rows.append((exhibit, text if exhibit in waiting else "done before, not repeated"))
    missing = [exhibit for exhibit in waiting if exhibit not in known]
    total = duration(sum(known[exhibit]["seconds"] for exhibit in waiting if exhibit in known))
    total += f" and {len(missing)} notebook(s) without an estimate" if missing else ""
    rows.append(("together", total))
    if (factors := projected.get("factors", {}).get("seconds")) and not measured:
        rows.append(("low-rank factors", f"{duration(factors)} more, once per model; kept in the cache folder"))
    title = f"Preset {preset.name}: {len(waiting)} of {len(chosen)} notebooks to run"
    return _table(title, ("notebook", "estimate"), rows)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def closing_table(chosen: list[str], waiting: list[str], ledger: Ledger) -> str:
    """Notebook, minutes, peak memory and state of every chosen notebook."""
    rows = []
    for exhibit in chosen:
        entry = ledger.entries.get(exhibit)
        if entry is None:
            rows.append((exhibit, "", "", "not started"))
            continue
        state = {"running": "interrupted"}.get(entry.state, entry.state)
        if exhibit not in waiting:
            state = "done before"
        rows.append((exhibit, f"{entry.seconds / 60:.1f}", gibibytes(asdict(entry)), state))
    return _table("", ("notebook", "minutes", "peak memory", "state"), rows)


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def gibibytes(cost: dict[str, Any]) -> str:
    """The peak memory of one notebook, and the GPU's where there is one."""
    text = f"{cost['peak_memory'] / 2**30:.1f} GiB"
    gpu = cost.get("gpu_peak_memory")
    return f"{text} + {gpu / 2**30:.1f} GiB GPU" if gpu else text


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the run folder; ValueError where it cannot be written or another batch holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")
    except OSError as error:
        reason = f"cannot write to {folder} ({error.strerror}); choose another folder with --out"
        raise ValueError(reason) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another batch is running in {folder}") from None
        yield


def _about(preset: Preset, checkout: Checkout, folder: Path) -> dict[str, Any]:
    """What `publish` needs to know, also when it runs later, elsewhere, or after the preset has changed."""
    private = {folder: f"_runs/{preset.name}", checkout.root: ".", ROOT: ".", Path.home(): "~"}
    return {
        "preset": preset.name,
        "title": preset.title,
        "device_note": preset.device_note,
        "wanted": list(preset.parameters),
        "private_paths": {str(path): public for path, public in private.items() if path != Path("/")},
    }


def _run_one(
    exhibit: str,
    preset: Preset,
    checkout: Checkout,
    folder: Path,
    ledger: Ledger,
    key: str,
    fresh: bool,
    say: Callable[[str], None],
) -> Entry:
    source = exhibits_in(checkout.notebooks)[exhibit]
    results = folder / "results" / exhibit
    if fresh:
        shutil.rmtree(results, ignore_errors=True)
    resumed = bool(read_journal(results / f"{exhibit}.jsonl", made_with()))
    results.mkdir(parents=True, exist_ok=True)
    for old in (folder / source.name, results / f"{exhibit}.csv", results / f"{exhibit}.json"):
        old.unlink(missing_ok=True)  # the journal alone is a start; nothing else may outlive a run that fails
    started = datetime.now(UTC).isoformat(timespec="seconds")
    about = {"started": started, "resumed": resumed, "variant": preset.variant}
    ledger.record(exhibit, Entry(source.name, key, "running", **about))

    report, log = folder / f"{source.stem}.report.json", _log(folder, source.name)
    parameters = preset.parameters[exhibit] | {"results": str(results)}
    job = Job(str(source), str(folder / source.name), str(report), parameters)
    clock = time.monotonic()
    _execute(job, log, lambda text: say(f"    {exhibit}: {text}"))
    seconds = round(time.monotonic() - clock, 1)
    if report.exists():
        outcome = json.loads(report.read_text(encoding="utf-8"))
        report.unlink()
    else:
        outcome = {"state": "failed"}
        with log.open("a", encoding="utf-8") as stream:
            stream.write("The notebook's process was killed, by the system for want of memory or by hand.\n")
    entry = Entry(source.name, key, seconds=seconds, gpu_peak_memory=_gpu_peak_memory(results), **about, **outcome)
    ledger.record(exhibit, entry)
    return entry


def _execute(job: Job, log: Path, say: Callable[[str], None]) -> None:
    """Start the notebook's process and wait; it dies with us, because it holds the other end of a pipe."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this interpreter, not one installed for the user
    }
    clock = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            job.command(),
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                try:
                    process.wait(HEARTBEAT_S)
                except subprocess.TimeoutExpired:
                    say(f"{_progress(log)}, {duration(time.monotonic() - clock)}")
        finally:
            process.stdin.close()
            process.wait()


def _gpu_peak_memory(results: Path) -> int:
    """What the notebook's provenance reports; only the notebook's own process can ask the GPU."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")]
    return max((report.get("gpu_peak_memory") or 0 for report in reports), default=0)


def _log(folder: Path, notebook: str) -> Path:
    return (folder / notebook).with_suffix(".log")


def _progress(log: Path) -> str:
    """The cell that runs, and how far its outermost progress bar is."""
    text = log.read_text(encoding="utf-8", errors="replace")
    before, found, after = text.rpartition("Executing Cell ")
    if not found:
        return "starting"
    bars = re.findall(r"([A-Za-z][\w -]*): +\d+%\|[^|]*\| (\d+/\d+)", after)
    outermost = [bar for bar in bars if bar[0] == bars[0][0]][-1:]
    return f"cell {after.split()[0].rstrip('-')}" + "".join(f", {name} {count}" for name, count in outermost)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    return "\n".join(f"    {line}" for line in lines[-TRACEBACK_LINES:])


def _state(ledger: Ledger, exhibit: str) -> str | None:
    return ledger.entries[exhibit].state if exhibit in ledger.entries else None


def _table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    form = "  ".join(f"{{:{width}}}" for width in widths)
    lines = [form.format(*row).rstrip() for row in [header, *rows]]
    return "\n".join([title, lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:], ""])
