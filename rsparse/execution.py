"""One notebook in a process of its own, started by the batch: `python -m rsparse.execution JOB`.

A process per notebook gives every notebook an empty memory, a peak memory of its own, and lets the
others run on when one dies.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from rsparse.files import write_json, write_text

INJECTED = "injected-parameters"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Job:
    """What to run (absolute paths) and where the executed notebook and the report go."""

    source: str
    executed: str
    report: str
    parameters: dict[str, Any]

    def command(self) -> list[str]:
        return [sys.executable, "-m", "rsparse.execution", json.dumps(asdict(self))]


def execute(job: Job) -> None:
    """Run the notebook; its executed copy appears under its final name only when every cell succeeded."""
    import nbformat
    import papermill

    executed = Path(job.executed)
    partial = executed.with_suffix(".partial.ipynb")
    papermill.execute_notebook(
        _unformatted(job.source),
        _unformatted(partial),
        job.parameters,
        cwd=Path(job.source).parent,
        kernel_name="python3",
        progress_bar=False,
        log_output=True,
        shutdown_kernel="immediate",  # all is written by then, and taking down PyTorch's modules takes two seconds
    )
    notebook = nbformat.read(partial, as_version=4)
    for cell in notebook.cells:
        if INJECTED in cell.metadata.get("tags", []):
            cell.id = INJECTED
            cell.metadata.tags.append("hide-input")
    write_text(executed, nbformat.writes(notebook))
    partial.unlink()


def _unformatted(path: str | Path) -> str:
    """papermill treats paths as format strings."""
    return str(path).replace("{", "{{").replace("}", "}}")


def peak_memory() -> int:
    """Largest resident size, in bytes, that a finished child (the kernel) has had."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def die_with_parent() -> None:
    """Wait until the batch is gone (its end of our stdin closes, even on kill -9), then stop the kernel."""
    while os.read(0, 1):  # unbuffered: Python's own reader would still hold its lock when we finish first
        pass
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os._exit(1)


def main() -> int:
    job = Job(**json.loads(sys.argv[1]))
    sys.modules["rfc3987_syntax"] = None  # jsonschema does without; building its grammar takes two seconds
    threading.Thread(target=die_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    state = "done"
    try:
        execute(job)
    except Exception as error:  # whatever stopped the notebook belongs into its log
        print(ANSI.sub("", "".join(traceback.format_exception(error))), file=sys.stderr)
        state = "failed"
    write_json(Path(job.report), {"state": state, "peak_memory": peak_memory()})
    return 0 if state == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
