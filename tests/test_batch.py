"""The runner: what it refuses, what it repeats, and what it leaves when something fails or is killed."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import yaml

import made_up
from rsparse.__main__ import main
from rsparse.batch import Ledger, closing_table, estimate, exclusive, run, run_keys
from rsparse.paths import ROOT, Checkout
from rsparse.presets import load, parameters_of


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return made_up.checkout(tmp_path / "a {made} up checkout")


def files(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*")}


def attempts(folder: Path, exhibit: str) -> int:
    return len((folder / "results" / exhibit / "attempts.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"notebooks": {"frist": {}}}, "did you mean 'first'"),
        ({"notebooks": {"first": {}}, "sede": 1}, "did you mean 'seed'"),
        ({"notebooks": {"first": {"scael": 1.0}}}, "did you mean 'scale'"),
        ({"notebooks": {"first": {"scale": "2"}}}, "scale = '2' is a str"),
        ({"notebooks": {"first": {"seed": 1.5}}}, "seed = 1.5 is a float"),
        ({"notebooks": {"first": {"seed": True}}}, "seed = True is a bool"),
        ({"notebooks": {"first": {"items": [1, "two"]}}}, "items = [1, 'two'] is a list"),
        ({"notebooks": {"first": {"items": 3}}}, "items = 3 is a int"),
        ({"notebooks": {"first": {"preset": datetime.date(2026, 1, 1)}}}, "is a date"),
        ({"notebooks": {"first": {"results": "here"}}}, "set by the runner"),
        ({"notebooks": {"first": 3}}, "expected a mapping of parameters"),
        ({"notebooks": ["first"]}, "`notebooks` must be a dict"),
        ({"notebooks": {"first": {}}, "overnight": {"second-one": {}}}, "unknown overnight notebook"),
        ({"preset": "another", "notebooks": {"first": {}}}, "must be 'broken'"),
    ],
)
def test_a_preset_that_a_notebook_would_not_understand_is_refused(checkout, content, said):
    made_up.write_preset(checkout, "broken", **content)
    with pytest.raises(ValueError) as refusal:
        run("broken", checkout)
    assert said in str(refusal.value)
    assert not checkout.run_folder("broken").exists()


def test_unknown_names_on_the_command_line_exit_with_two(checkout, capsys):
    assert main(["run", "--preset", "smal"], checkout) == 2
    assert "did you mean 'small'" in capsys.readouterr().err
    assert main(["run", "--preset", "small", "--only", "fisrt"], checkout) == 2
    assert "did you mean 'first'" in capsys.readouterr().err
    assert main(["run", "--preset", "other", "--overnight"], checkout) == 2
    assert "no overnight subset" in capsys.readouterr().err


def test_invalid_yaml_and_a_computed_default_are_refused(checkout):
    (checkout.presets / "torn.yaml").write_text("preset: torn\nnotebooks: {first: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        load("torn", checkout)
    path = made_up.write_notebook(checkout, "30-third.ipynb", parameters="seed = 1 + 1\n")
    with pytest.raises(ValueError, match="must be a literal"):
        parameters_of(path)


def test_shared_values_reach_the_notebooks_that_declare_them_and_integers_become_floats(checkout):
    made_up.write_notebook(checkout, "30-third.ipynb", parameters='preset = ""\nresults = ""\nwidth = 3\n')
    made_up.write_preset(checkout, "mixed", seed=4, width=5, notebooks={"third": {}, "first": {"scale": 2}})
    preset = load("mixed", checkout)
    assert preset.parameters == {
        "first": {"preset": "mixed", "seed": 4, "scale": 2.0},
        "third": {"preset": "mixed", "width": 5},
    }
    assert isinstance(preset.parameters["first"]["scale"], float)
    assert list(preset.parameters) == ["first", "third"]  # reading order


def test_the_key_depends_on_parameters_notebook_code_and_data(checkout):
    keys = [run_keys(load("small", checkout), checkout)]
    for path in ("rsparse/method.py", "kernels/kernel.py", "data/tiny/text", "data/paper/claims.yaml"):
        (checkout.root / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout.root / path).write_text("changed")
        keys.append(run_keys(load("small", checkout), checkout))
    (checkout.root / "README.md").write_text("not part of any result")
    assert run_keys(load("small", checkout), checkout) == keys[-1]
    made_up.write_notebook(checkout, "10-first.ipynb", work="1 + 1")
    keys.append(run_keys(load("small", checkout), checkout))
    assert len({key["first"] for key in keys}) == len(keys)
    assert keys[-1]["second-one"] == keys[-2]["second-one"]


def test_a_failing_notebook_does_not_stop_the_others_and_is_told_at_the_end(checkout, capsys):
    made_up.write_notebook(checkout, "10-first.ipynb", work="raise RuntimeError('out of luck')")
    assert main(["run", "--preset", "small"], checkout) == 1
    said = capsys.readouterr().out
    assert "RuntimeError: out of luck" in said and "10-first.log" in said
    table = said[said.rindex("notebook ") :].splitlines()
    assert [row.split()[-1] for row in table[2:4]] == ["failed", "done"]
    folder = checkout.run_folder("small")
    assert "RuntimeError" in (folder / "10-first.log").read_text()
    assert not (folder / "10-first.ipynb").exists() and (folder / "20-second-one.ipynb").exists()


def test_a_failed_repetition_leaves_no_older_table(checkout):
    assert main(["run", "--preset", "other"], checkout) == 0
    results = checkout.run_folder("other") / "results" / "first"
    assert (results / "first.csv").exists() and (results / "first.json").exists()
    made_up.write_notebook(checkout, "10-first.ipynb", work="raise RuntimeError('out of luck')")
    assert main(["run", "--preset", "other"], checkout) == 1
    assert {path.name for path in results.iterdir()} == {"attempts.jsonl"}


def test_finished_notebooks_are_repeated_only_when_asked_for_or_changed(checkout, capsys):
    out = checkout.root.parent / "elsewhere"
    before = files(checkout.root)
    arguments = ["run", "--preset", "small", "--overnight", "--out", str(out)]
    assert main(arguments, checkout) == 0
    assert files(checkout.root) == before  # so a checkout that cannot be written will do
    first = json.loads((out / "ledger.json").read_text())["notebooks"]["first"]
    assert first["state"] == "done" and first["seconds"] > 0 and first["peak_memory"] > 2**20

    capsys.readouterr()
    assert main(arguments, checkout) == 0
    assert "done before, not repeated" in capsys.readouterr().out
    assert json.loads((out / "ledger.json").read_text())["notebooks"]["first"] == first

    assert main([*arguments, "--fresh"], checkout) == 0
    made_up.write_notebook(checkout, "10-first.ipynb", work="2 + 2")
    assert main(arguments, checkout) == 0
    assert json.loads((out / "ledger.json").read_text())["notebooks"]["first"]["started"] > first["started"]
    assert attempts(out, "first") == 2  # rows stay: the journal itself knows what they depend on


def test_a_killed_batch_leaves_no_process_and_resumes_where_it_was(checkout):
    pipe, folder = checkout.root / "pipe", checkout.run_folder("small")
    os.mkfifo(pipe)
    wait = f"""import pathlib, time
from rsparse.results import Table
journal = pathlib.Path(results) / "attempts.jsonl"
if not journal.exists():
    journal.write_text("cut short\\n")
    Table("second-one", "small", results).add({{"setting": 1}}, [])
    held = open({str(pipe)!r}, "w")
    held.write("running"); held.flush()
    time.sleep(600)"""
    made_up.write_notebook(checkout, "20-second-one.ipynb", work=wait)
    command = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; "
        f"from rsparse.__main__ import main; from rsparse.paths import Checkout; "
        f"main(['run', '--preset', 'small'], Checkout(Path({str(checkout.root)!r})))"
    )
    batch = subprocess.Popen([sys.executable, "-c", command], cwd=checkout.root, stdout=subprocess.DEVNULL)
    with pipe.open() as reader:  # opens when the second notebook runs
        assert reader.read(7) == "running"
        batch.send_signal(signal.SIGKILL)
        batch.wait()
        assert reader.read() == ""  # ends when the kernel is gone
    ledger = Ledger(folder)
    assert ledger.done("first") and ledger.entries["second-one"].state == "running"
    finished = ledger.entries["first"]

    assert main(["run", "--preset", "small"], checkout) == 0
    ledger = Ledger(folder)
    assert ledger.entries["first"] == finished
    assert ledger.done("second-one") and ledger.entries["second-one"].resumed
    assert attempts(folder, "second-one") == 2  # the journal of the killed attempt was kept


def test_a_notebook_whose_process_dies_counts_as_failed(checkout, capsys):
    made_up.write_notebook(checkout, "10-first.ipynb", work="import os; os.kill(os.getppid(), 9)")
    assert main(["run", "--preset", "other"], checkout) == 1
    assert "was killed" in capsys.readouterr().out


def test_one_batch_at_a_time_and_only_where_it_can_write(checkout):
    (checkout.root / "file").write_text("")
    with pytest.raises(ValueError, match="choose another folder with --out"):
        run("small", checkout, out=checkout.root / "file" / "run")
    with exclusive(checkout.root / "run"), pytest.raises(ValueError, match="another batch"):
        run("small", checkout, out=checkout.root / "run")


def test_the_estimate_prefers_what_was_measured_here_to_a_projection(checkout, capsys):
    preset = load("small", checkout)
    assert "no run published yet" in estimate(preset, ["first"], ["first"], checkout)
    folder = checkout.results / "small"
    folder.mkdir(parents=True)
    projected = {
        exhibit: {"seconds": 7200, "peak_memory": 2**31, "gpu_peak_memory": 40 * 2**30}
        for exhibit in ("first", "second-one")
    }
    shorter = {"notebooks": {"first": {"seconds": 60, "peak_memory": 2**30}}, "factors": {"seconds": 300}}
    (folder / "estimate.json").write_text(json.dumps({"whole": {"notebooks": projected}, "overnight": shorter}))
    measured = {"seconds": 3600, "peak_memory": 2**30, "variant": "whole"}
    (folder / "batch.json").write_text(json.dumps({"notebooks": {"first": measured}}))
    said = estimate(preset, ["first", "second-one"], ["first", "second-one"], checkout)
    assert "60.0 min, 1.0 GiB\n" in said and "2.0 h, 2.0 GiB + 40.0 GiB GPU" in said and "3.0 h" in said
    night = estimate(replace(preset, variant="overnight"), ["first"], ["first"], checkout)
    assert "60 s, 1.0 GiB\n" in night and "5.0 min more, once per model" in night and "60.0 min" not in night


def test_plain_papermill_takes_the_preset_file(checkout, tmp_path):
    made_up.write_notebook(checkout, "10-first.ipynb", work="results = '.'")
    command = [
        sys.executable,
        "-m",
        "papermill",
        "notebooks/10-first.ipynb",
        str(tmp_path / "out.ipynb"),
        "-f",
        "notebooks/presets/small.yaml",
        "--cwd",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    source = checkout.root.rename(tmp_path / "plain")  # papermill reads braces in a path as a format
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    printed = [
        output.text
        for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.get("name") == "stdout"
    ]
    assert printed == ["printed by small\n"]


def test_every_preset_of_the_book_is_accepted():
    names = [path.stem for path in (ROOT / "notebooks" / "presets").glob("*.yaml")]
    assert names
    for name in names:
        assert load(name).parameters


def test_the_closing_table_tells_of_notebooks_that_never_started(checkout, tmp_path):
    assert closing_table(["first"], ["first"], Ledger(tmp_path)).splitlines()[3].split() == [
        "first",
        "not",
        "started",
    ]


def test_the_injected_parameters_are_folded_away(checkout):
    assert main(["run", "--preset", "other"], checkout) == 0
    cells = nbformat.read(checkout.run_folder("other") / "10-first.ipynb", as_version=4).cells
    injected = next(cell for cell in cells if cell.id == "injected-parameters")
    assert set(injected.metadata.tags) == {"injected-parameters", "hide-input"}
    assert yaml.safe_load(injected.source.replace(" = ", ": "))["scale"] == 3.5


def test_several_names_in_one_are_told_apart(checkout):
    wanted = "unknown notebook of preset small 'first,second-one'.*; several are separated by spaces"
    with pytest.raises(ValueError, match=wanted):
        load("small", checkout).choose(["first,second-one"])
