"""Hashes that follow content, and imports that stay light."""

from __future__ import annotations

import subprocess
import sys

import pytest

import rsparse
from rsparse.provenance import Clock, code_hash, content_hash, data_hash, versions


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_hash_follows_names_and_content_and_nothing_else(tmp_path):
    part = tmp_path / "part"
    (part / "__pycache__").mkdir(parents=True)
    (part / "a.py").write_text("1")
    (part / "b.txt").write_text("2")

    def both() -> tuple[str, str]:
        return content_hash(tmp_path, ["part"], ".py"), content_hash(tmp_path, ["part"])

    before = both()
    (part / "__pycache__" / "a.py").write_text("ignored")
    (tmp_path / "outside.py").write_text("ignored")
    assert both() == before
    (part / "b.txt").write_text("3")
    assert both()[0] == before[0] and both()[1] != before[1]
    (part / "a.py").write_text("2")
    assert both()[0] != before[0]
    (part / "a.py").write_text("1")
    (part / "a.py").rename(part / "c.py")
    assert both()[0] != before[0]


def test_bytes_that_move_between_files_are_seen(tmp_path):
    (tmp_path / "a").write_text("xy")
    (tmp_path / "b").write_text("z")
    before = content_hash(tmp_path, ["."])
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("yz")
    assert content_hash(tmp_path, ["."]) != before


def test_provenance_says_what_computed_when_and_on_what():
    about = Clock("cpu").provenance(3, {"a": 1})
    assert about["code"] == code_hash() != about["data"] == data_hash()
    assert about["versions"] == versions() and {"python", "torch", "transformers"} <= set(versions())
    assert "CPU" in about["device"] and about["seed"] == 3 and about["parameters"] == {"a": 1}
    assert about["date"].endswith("+00:00")


def test_the_runner_and_the_package_need_no_torch():
    heavy = "{'torch', 'transformers', 'lm_eval', 'triton', 'matplotlib'}"
    program = f"import sys, rsparse, rsparse.batch, rsparse.book, rsparse.provenance; print({heavy} & set(sys.modules))"
    assert python(program).strip() == "set()"


def test_public_names_resolve_and_no_module_hides_one():
    program = (
        "import rsparse.apply, rsparse.study, rsparse.methods, types\n"
        "names = {name: getattr(rsparse, name) for name in rsparse.__all__}\n"
        "assert not any(isinstance(value, types.ModuleType) for value in names.values()), names\n"
        "assert callable(rsparse.sparsify) and rsparse.sparsify is rsparse.apply.sparsify\n"
        "print(*sorted(names))"
    )
    assert python(program).split() == rsparse.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="spasify"):
        rsparse.spasify  # noqa: B018
