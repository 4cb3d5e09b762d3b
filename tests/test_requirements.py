"""requirements.txt: every package that the code imports, pinned, and nothing else."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata

from rsparse.paths import ROOT

TOOLS = {"ipykernel", "jupyterlab", "jupyter-book", "sphinx-design", "pytest-xdist", "accelerate", "triton"}
OPTIONAL = {"neural_compressor": "neural-compressor-pt"}
"""Imported where it is installed, and its distribution, an extra of pyproject.toml."""
FOLDERS = ("rsparse", "kernels", "tests", "data", "book/_ext")


def pins() -> dict[str, str]:
    lines = [
        line.split("#")[0].split(";")[0].strip()
        for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    return dict(line.split("==") for line in lines if line)


def imported() -> set[str]:
    """Top-level names of all imports from outside the project and the standard library."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    ours = {path.stem for path in files} | {"rsparse", "kernels"}
    names = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names - ours - set(sys.stdlib_module_names)


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def test_requirements_are_what_the_code_imports_and_the_tools_it_runs():
    distributions = metadata.packages_distributions()
    needed = {normal(distributions[name][0]) for name in imported() - OPTIONAL.keys()}
    pinned = {normal(name) for name in pins()}
    assert needed - {"docutils", "sphinx"} - pinned == set()  # jupyter-book decides the versions of these two
    assert pinned - needed == TOOLS - needed


def test_pins_are_the_installed_versions():
    for name, version in pins().items():
        if name != "triton":  # not everywhere
            assert metadata.version(name).split("+")[0] == version


def test_extras_pin_what_is_imported_where_it_is_installed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {line.split("==")[0] for lines in extras.values() for line in lines if "==" in line}
    assert set(OPTIONAL.values()) <= pinned and OPTIONAL.keys() <= imported()
    assert not pinned & set(pins()), "an extra is not a requirement"
