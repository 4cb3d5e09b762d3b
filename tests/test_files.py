"""Atomic writes."""

import json
import math

import pytest

from rsparse.files import atomic_path, write_json, write_text


def test_replaces_on_success(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one\n")
    write_text(path, "zwei – два\n")
    assert path.read_bytes() == "zwei – два\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half a fi")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_temporary_file_stands_beside_with_the_same_suffix(tmp_path):
    with atomic_path(tmp_path / "a.safetensors") as temporary:
        assert (
            temporary.parent == tmp_path and temporary.suffix == ".safetensors" and temporary.name[0] == "."
        )
        assert not (tmp_path / "a.safetensors").exists()


def test_others_may_read_it(tmp_path):
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_has_no_nan(tmp_path, value):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": value})
    assert not list(tmp_path.iterdir())
