"""Result tables: what survives a kill, what is computed anew, and what is written in the end."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from rsparse import results
from rsparse.paths import HERE, Checkout
from rsparse.results import COLUMNS, Table, interactive_folder, published

COST = {"what": "tasks", "seconds": 0.25, "tokens": 64}
ROW = {"method": "teal", "sparsity": 0.5, "metric": "acc", "value": 0.25, "n": 4}


def table(folder, preset: str = "made-up") -> Table:
    return Table("exhibit", preset, folder)


def key(number: int, **more) -> dict:
    return {"what": "made-up", "number": number, **more}


def journal(folder) -> str:
    return (folder / "exhibit.jsonl").read_text()


def strict(line: str) -> dict:
    """JSON as the standard has it: no NaN, no Infinity."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in {line}"))


def test_a_group_is_found_again_by_another_run(tmp_path):
    kept = table(tmp_path).add(key(1, b=(2, None)), [ROW], {"acc": [0.0, 1.0]}, [COST])
    again = table(tmp_path)
    assert again.find({"b": [2, None], **key(1)}) == kept
    assert kept == {"rows": [ROW], "items": {"acc": [0.0, 1.0]}, "costs": [COST]}
    assert again.find(key(1, b=(3, None))) is None


def test_a_torn_last_line_is_dropped_and_the_journal_goes_on(tmp_path):
    first = table(tmp_path)
    first.add(key(1), [ROW])
    first.add(key(2), [ROW])
    path = tmp_path / "exhibit.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    second = table(tmp_path)
    assert second.find(key(1)) and second.find(key(2)) is None
    second.add(key(3), [ROW])
    third = table(tmp_path)
    assert third.find(key(1)) and third.find(key(3))
    assert all(strict(line) for line in journal(tmp_path).splitlines())


@pytest.mark.parametrize("name", ["measuring_hash", "data_hash", "versions"])
def test_rows_of_other_code_data_or_packages_are_not_read_but_set_aside(tmp_path, monkeypatch, name):
    table(tmp_path).add(key(1), [ROW])
    before = journal(tmp_path)
    monkeypatch.setattr(results, name, lambda: "something else")
    assert table(tmp_path).find(key(1)) is None
    assert table(tmp_path).find(key(1)) is None
    assert (tmp_path / "exhibit.jsonl.old").read_text() == before
    monkeypatch.undo()
    assert table(tmp_path).find(key(1)) is None, "a journal of other code has been kept"


def test_exhibits_of_one_run_share_what_they_measure(tmp_path, monkeypatch):
    first = Table("first", "made-up", tmp_path / "first")
    kept = first.add(key(1), [ROW], {"acc": [1.0]}, [COST])
    second = Table("second", "made-up", tmp_path / "second")
    assert second.find(key(2)) is None and len(second.frame) == 0
    assert second.find(key(1)) == {"from": "first"} | kept
    assert second.frame["value"].tolist() == [0.25]
    first.add(key(3), [ROW])
    assert second.find(key(3)), "written while the other notebook was open"
    again = results.read_journal(tmp_path / "second" / "second.jsonl")
    assert [group["from"] for group in again.values()] == ["first", "first"]
    monkeypatch.setattr(results, "measuring_hash", lambda: "other code")
    assert Table("third", "made-up", tmp_path / "third").find(key(1)) is None


def test_one_measurement_can_stand_for_several_settings(tmp_path):
    made = table(tmp_path)
    made.add(key(1), [ROW], columns={"method": "teal"})
    made.find(key(1), {"method": "r-sparse", "rho": 1.0})
    made.find(key(1), {"method": "teal"})
    assert made.frame["method"].tolist() == ["teal", "r-sparse"] and made.frame["rho"].isna().tolist() == [True, False]


def test_only_groups_of_this_run_are_in_the_table_in_the_order_of_their_use(tmp_path):
    before = table(tmp_path)
    for number in range(3):
        before.add(key(number), [ROW | {"value": number / 2}])
    now = table(tmp_path)
    now.find(key(2))
    now.add(key(4), [ROW | {"value": 8.0}])
    now.find(key(0))
    now.find(key(2))
    assert now.frame["value"].tolist() == [1.0, 8.0, 0.0]


def test_columns_come_first_and_the_preset_is_the_one_of_this_run(tmp_path):
    table(tmp_path, "yesterday").add(key(1), [ROW | {"layer": 3}])
    now = table(tmp_path, "today")
    now.find(key(1))
    frame = now.frame
    assert tuple(frame.columns) == (*COLUMNS, "layer")
    assert frame["preset"].tolist() == ["today"]
    assert frame["stderr"].dtype == float and frame["stderr"].isna().all()
    assert frame["method"].tolist() == ["teal"] and frame["n"].tolist() == [4]


def test_nan_stays_valid_json_and_comes_back_as_nan(tmp_path):
    first = table(tmp_path)
    kept = first.add(key(1), [ROW | {"stderr": math.nan}], {"x": [1.0, math.nan]})
    assert kept["items"]["x"] == [1.0, None] == table(tmp_path).find(key(1))["items"]["x"]
    assert all(strict(line) for line in journal(tmp_path).splitlines())
    assert math.isnan(first.frame["stderr"].item())
    with pytest.raises(ValueError):
        first.add(key(2), [ROW | {"value": math.inf}])
    assert first.find(key(2)) is None and table(tmp_path).find(key(2)) is None


def test_finish_writes_table_and_provenance(tmp_path):
    made = table(tmp_path)
    made.add(key(1), [ROW, ROW | {"value": 1 / 3}])
    frame = made.finish(7, {"items": 4})
    read = pd.read_csv(tmp_path / "exhibit.csv")
    assert read.columns.tolist() == frame.columns.tolist()
    assert read["value"].tolist() == pytest.approx(frame["value"].tolist(), abs=1e-9)
    about = strict((tmp_path / "exhibit.json").read_text())
    assert about["seed"] == 7 and about["parameters"] == {"items": 4} and about["seconds"] >= 0
    assert about["peak_memory"] > 2**20 and about["gpu_peak_memory"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "exhibit.csv",
        "exhibit.json",
        "exhibit.jsonl",
    ]


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    made = table(tmp_path)
    made.add(key(1), [ROW])
    made.finish(0, {})
    before = (tmp_path / "exhibit.csv").read_text()
    made.add(key(2), [ROW])

    def torn(self, path, **_):
        path.write_text("half a table")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", torn)
    with pytest.raises(OSError):
        made.finish(0, {})
    assert (tmp_path / "exhibit.csv").read_text() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_published_tables_stand_below_one_another(tmp_path):
    checkout = Checkout(tmp_path)
    assert published("exhibit", checkout).columns.tolist() == list(COLUMNS)
    for preset in ("b", "a"):
        made = Table("exhibit", preset, checkout.results / preset)
        made.add(key(1), [ROW])
        made.finish(0, {})
    (checkout.results / "a" / "other.csv").write_text("preset\nc\n")
    assert published("exhibit", checkout)["preset"].tolist() == ["a", "b"]


def refuse(*_, **__):
    raise PermissionError


def test_a_notebook_opened_by_hand_writes_into_the_checkout_or_where_it_can(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "HERE", Checkout(tmp_path))
    assert interactive_folder("x") == tmp_path / "_runs" / "interactive" / "results" / "x"
    monkeypatch.setenv("RSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(results, "HERE", Checkout(tmp_path / "a file"))
    (tmp_path / "a file").touch()
    assert interactive_folder("x") == tmp_path / "cache" / "interactive" / "x"
    monkeypatch.setattr(results, "HERE", Checkout(tmp_path))
    monkeypatch.setattr("kernels.folders.tempfile.NamedTemporaryFile", refuse)
    assert Table("x", "p").folder == tmp_path / "cache" / "interactive" / "x"
    assert HERE.root.is_dir()
