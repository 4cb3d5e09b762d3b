"""The notebooks: how they are written, and that each runs alone, anywhere, on a checkout it may not write
to."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import small_checkpoint
import yaml
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from rsparse.models import TINY
from rsparse.paths import HERE, ROOT
from rsparse.presets import exhibits_in, load, parameters_of

SOURCES = exhibits_in(HERE.notebooks)
SMOKE = small_checkpoint.SMALL_SOURCES | dict(
    sparsities=[0.5],
    small_sparsities=[0.1],
    score_sparsities=[0.5],
    rhos=[0.5],
    layers=[0],
    cuts=[0.1],
    noises=[0.02],
    count=2,
    step=0.5,
    groups=2,
    population=4,
    generations=1,
    search_samples=2,
    search_length=32,
    planted=2,
    planted_shapes=[[48, 48]],
    group_sizes=[1, 2],
    phases=[1, 2],
    bias_tokens=60,
    counts=[1, 2],
    whitened_sparsities=[0.5],
    whitened_rhos=[0.5],
    weights=["int4-rtn"],
)
"""The least that a notebook can be asked for; each takes the names that it declares."""


def cells(name: str) -> list:
    return nbformat.read(SOURCES[name], as_version=4).cells


# How they are written


@pytest.mark.parametrize("name", SOURCES)
def test_sources_are_clean(name):
    nbformat.validate(nbformat.read(SOURCES[name], as_version=4))
    ids = [cell.id for cell in cells(name)]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", cell_id) for cell_id in ids), (
        "ids are names, not random"
    )
    for cell in cells(name):
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
    text = SOURCES[name].read_text()
    assert not re.search(r"/(home|root|work|tmp|Users)/", text), "a machine's path"


@pytest.mark.parametrize("name", SOURCES)
def test_prose_comes_first_and_cells_are_short(name):
    kinds = [cell.cell_type for cell in cells(name)]
    assert kinds[0] == "markdown" and cells(name)[0].source.startswith("# ")
    first_code = kinds.index("code")
    assert "parameters" in cells(name)[first_code].metadata.get("tags", []), (
        "parameters before any other code"
    )
    for cell in cells(name):
        limit = 40 if "parameters" in cell.metadata.get("tags", []) else 25  # a line per parameter
        assert len(cell.source.splitlines()) <= limit, cell.id


@pytest.mark.parametrize("name", SOURCES)
def test_one_parameters_cell_of_literals(name):
    tagged = [cell for cell in cells(name) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    values = {}
    for statement in ast.parse(tagged[0].source).body:
        assert isinstance(statement, ast.Assign) and len(statement.targets) == 1
        values[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert values == parameters_of(SOURCES[name])
    assert values["preset"] == "interactive" and values["results"] == "" and values["seed"] == 0


@pytest.mark.parametrize("name", SOURCES)
def test_every_figure_has_words(name):
    for cell in cells(name):
        if cell.cell_type != "code":
            continue
        for call in (x for x in ast.walk(ast.parse(cell.source)) if isinstance(x, ast.Call)):
            if ast.unparse(call.func) == "figures.show":
                words = {keyword.arg for keyword in call.keywords}
                assert {"alt", "caption"} <= words, cell.id


@pytest.mark.parametrize("preset", sorted(path.stem for path in HERE.presets.glob("*.yaml")))
def test_every_preset_is_understood_by_its_notebooks(preset):
    made = load(preset)
    assert made.name == preset and list(made.parameters) == [x for x in SOURCES if x in made.parameters]


def test_the_planted_shapes_are_those_of_the_tiny_model():
    config = json.loads((TINY / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = width // config["num_attention_heads"]
    heads = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {(heads[0], width), (heads[1], width), (width, heads[0]), (inner, width), (width, inner)}
    assert {tuple(shape) for shape in parameters_of(SOURCES["planted-control"])["shapes"]} == shapes


# That they run


def parameters(name: str, checkpoint: Path, **more) -> dict:
    wanted = SMOKE | {"checkpoint": str(checkpoint), "model": "smoke", "preset": "smoke"} | more
    if name == "table-2":
        wanted |= {"checkpoint": f"{checkpoint}-wide"}
    if name == "planted-control":
        wanted |= {"shapes": [[48, 48]], "sparsity": 0.5}
    if name == "teal":
        wanted |= {"context": 32}
    if name == "figure-6":
        wanted |= {"decoded": str(checkpoint), "layers": 0, "prompt": 4, "new": 4, "repeats": 1}
    if name == "kernels":  # the smallest linear there is
        wanted |= {"shape": "llama-3-8b", "linears": ["o"], "repeats": 2, "rounds": 1}
    declared = parameters_of(SOURCES[name])
    return {key: value for key, value in wanted.items() if key in declared}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smoke")
    small_checkpoint.save(folder / "checkpoint-wide", **small_checkpoint.WIDE)  # of the one that needs it
    return small_checkpoint.save(folder / "checkpoint")


@pytest.fixture(scope="module")
def read_only(tmp_path_factory):
    """(a copy of the checkout, the command that runs another one where the copy cannot be written)."""
    copy = tmp_path_factory.mktemp("read-only") / "checkout"
    for part in ("rsparse", "kernels", "data", "notebooks"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    if os.geteuid() != 0:
        subprocess.run(["chmod", "-R", "a-w", copy], check=True)
        yield copy, []
        subprocess.run(["chmod", "-R", "u+w", copy], check=True)
        return
    # permission bits do not bind root: a read-only mount in a mount namespace of its own does
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, str(copy)]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("root without the right to mount: nothing here can be made read-only")
    yield copy, command


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def kernel(read_only, tmp_path_factory):
    """The name of a kernel that lives where the copy cannot be written; PYTHONPATH says which checkout it imports."""
    _, command = read_only
    folder = tmp_path_factory.mktemp("kernel")
    program, address = str(Path(__file__).with_name("warm_kernel.py")), str(folder / "socket")
    environment = os.environ | {"PYTHONPATH": "", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    server = subprocess.Popen(
        [*command, sys.executable, program, address], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout.readline() == "ready\n"
    request = [sys.executable, "-I", "-S", program, address, "{connection_file}"]
    specification = {"argv": request, "display_name": "read-only", "language": "python"}
    (folder / "kernels" / "read-only").mkdir(parents=True)
    (folder / "kernels" / "read-only" / "kernel.json").write_text(json.dumps(specification))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        yield "read-only"
    server.kill()
    server.wait()


@pytest.mark.parametrize("name", SOURCES)
def test_alone_on_a_read_only_checkout_from_an_unrelated_folder(
    name, read_only, kernel, cache, checkpoint, tmp_path, monkeypatch
):
    """In a kernel of its own, without a module of this project from another notebook."""
    copy, command = read_only
    monkeypatch.setenv("PYTHONPATH", str(copy))
    monkeypatch.setenv("RSPARSE_CACHE", str(cache))
    probe = subprocess.run([*command, "touch", copy / "written"], capture_output=True, text=True)
    assert probe.returncode != 0, "the copy can be written: this test shows nothing"
    executed, source = tmp_path / "executed.ipynb", copy / "notebooks" / SOURCES[name].name
    given = parameters(name, checkpoint)
    papermill.execute_notebook(source, executed, given, kernel_name=kernel, cwd=tmp_path, progress_bar=False)
    folder = cache / "interactive" / name
    written = {path.name for path in folder.iterdir() if path.is_file()}  # in folders: recipes
    assert written == {f"{name}.{end}" for end in ("csv", "json", "jsonl")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["executed.ipynb"], "left behind"
    check_outputs(nbformat.read(executed, as_version=4))


def test_what_runs_is_the_read_only_copy(read_only, kernel, tmp_path, monkeypatch):
    """The kernels that notebooks get: which checkout they import and cannot write to, beginning without it."""
    copy, _ = read_only
    monkeypatch.setenv("PYTHONPATH", str(copy))
    code = f"""import os, sys
started_with = [x for x in sys.modules if x.split(".")[0] in ("rsparse", "kernels")]
import rsparse, kernels
try:
    open({str(copy / "written")!r}, "w")
except OSError:
    print(rsparse.__file__, kernels.__file__, os.getcwd(), started_with)"""
    manager, client = start_new_kernel(kernel_name=kernel, cwd=str(tmp_path))
    said = []
    try:
        client.execute_interactive(code, output_hook=lambda message: said.append(message["content"].get("text", "")))
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    files = [copy / package / "__init__.py" for package in ("rsparse", "kernels")]
    assert "".join(said).split() == [*map(str, files), str(tmp_path), "[]"]


def check_outputs(notebook: nbformat.NotebookNode) -> None:
    """Pictures with words, nothing that failed, no gap in a sentence, no warning."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output for output in outputs if "data" in output]
    assert any("image/png" in output.data for output in shown)
    for output in outputs:
        assert output.output_type != "error"
        told = output.get("text", "").replace("TqdmWarning", "")  # of transformers, without ipywidgets
        assert "Warning" not in told, output.text
    for output in shown:
        if "image/png" in output.data:
            assert output.metadata["image/png"]["alt"].strip()
        assert not re.search(
            r"\bnan\b|\bNone\b|NaN", output.data.get("text/markdown", "") + output.data.get("text/html", "")
        )


@pytest.mark.parametrize("place", ["root", "notebooks"])
def test_from_other_folders_a_rerun_computes_nothing(
    place, kernel, cache, checkpoint, tmp_path, monkeypatch
):
    """One kernel for all notebooks, emptied between them, as one would in Jupyter: imports take the most
    time."""
    finished = [name for name in SOURCES if (cache / "interactive" / name / f"{name}.jsonl").exists()]
    if not finished:
        pytest.skip("nothing was computed on the read-only checkout")
    shutil.copytree(cache / "interactive", tmp_path / "results")
    hidden = hide_weights(checkpoint) | hide_weights(Path(f"{checkpoint}-wide"))  # whoever would compute needs them
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = {"root": ROOT, "notebooks": HERE.notebooks}[place]
    before = sorted(folder.iterdir())
    manager, client = start_new_kernel(kernel_name=kernel, cwd=str(folder))
    try:
        for name in finished:
            rerun(name, tmp_path / "results" / name, checkpoint, manager, client)
            kept, again = (
                root / name / f"{name}.csv" for root in (cache / "interactive", tmp_path / "results")
            )
            assert kept.read_text() == again.read_text()
            client.execute_interactive("%reset_selective -f .", silent=True)  # %reset takes half a second
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        for path, (content, times) in hidden.items():
            path.write_bytes(content)
            os.utime(path, ns=times)
    assert sorted(folder.iterdir()) == before, "left behind"


def hide_weights(checkpoint: Path) -> dict[Path, tuple[bytes, tuple[int, int]]]:
    """Fill the weight files with zeros, leaving size and times as they are; what they held, to be written back."""
    held = {}
    for path in checkpoint.glob("*.safetensors"):
        held[path] = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        path.write_bytes(bytes(len(held[path][0])))
        os.utime(path, ns=held[path][1])
    return held


def rerun(name: str, results: Path, checkpoint: Path, manager, client) -> None:
    notebook = load_notebook_node(str(SOURCES[name]))
    given = parameters(name, checkpoint, results=str(results))
    notebook = parameterize_notebook(notebook, given, kernel_name="python3", language="python")
    runner = NotebookClient(notebook, km=manager, timeout=120)
    runner.kc = client
    runner.execute(cleanup_kc=False)
    check_outputs(notebook)


def test_a_notebook_with_a_preset_in_plain_papermill(tmp_path):
    """`papermill X.ipynb out.ipynb -f presets/Y.yaml`, as the README of the presets has it, from the root."""
    values = {"results": str(tmp_path), "count": 1, "noises": [0.02], "shapes": [[48, 48]], "step": 0.5}
    run = [
        sys.executable,
        "-m",
        "papermill",
        SOURCES["planted-control"],
        tmp_path / "out.ipynb",
        "-k",
        "python3",
    ]
    run += ["-f", HERE.presets / "tiny.yaml", "-y", yaml.safe_dump(values), "--cwd", HERE.notebooks]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "planted-control.csv").read_text().splitlines()
    assert table[1].startswith("tiny,"), "the preset's name goes into every row"
