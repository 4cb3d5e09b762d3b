"""Presets: which notebooks run with which parameters. Checked completely before anything runs.

The file format is described in notebooks/presets/README.md.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml

from rsparse.paths import HERE, Checkout

RUNNER_KEYS = {"title": str, "device_note": str, "notebooks": dict, "overnight": dict}
SET_BY_RUNNER = "results"
LITERALS = (bool, int, float, str, list, dict, type(None))  # what papermill writes into a notebook unchanged


@dataclass(frozen=True)
class Preset:
    """`parameters[exhibit]` are the values given to that exhibit's notebook, in reading order."""

    name: str
    title: str
    device_note: str
    parameters: Mapping[str, dict[str, Any]]
    variant: str = "whole"  # or "overnight"

    def choose(self, only: Iterable[str] = ()) -> list[str]:
        """Exhibits to run, in reading order; ValueError names one that the preset does not have."""
        only = set(only)
        for exhibit in sorted(only - set(self.parameters)):
            raise unknown(f"notebook of preset {self.name}", exhibit, self.parameters)
        return [exhibit for exhibit in self.parameters if exhibit in (only or self.parameters)]


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not among `known`, with the closest known one as a hint."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f", did you mean {close[0]!r}?" if close else "."
    several = "; several are separated by spaces" if "," in str(name) else ""
    return ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(known) or 'none'}{several}")


def exhibits_in(folder: Path) -> dict[str, Path]:
    """Exhibit -> notebook, in reading order: 30-table-3.ipynb is the exhibit `table-3`."""
    return {path.stem.partition("-")[2]: path for path in sorted(folder.glob("[0-9]*-*.ipynb"))}


def names(checkout: Checkout = HERE) -> list[str]:
    """The presets of notebooks/presets/, in alphabetic order."""
    return sorted(path.stem for path in checkout.presets.glob("*.yaml"))


def load(name: str, checkout: Checkout = HERE, overnight: bool = False) -> Preset:
    """Read notebooks/presets/<name>.yaml; ValueError for anything a notebook would not understand."""
    if name not in (known := names(checkout)):
        raise unknown("preset", name, known)
    path = checkout.presets / f"{name}.yaml"
    document = _read_yaml(path)
    if document.get("preset") != name:
        raise ValueError(f"{path.name}: `preset` is {document.get('preset')!r}, it must be {name!r}")
    overrides = document.get("notebooks") or {}
    if not overrides:
        raise ValueError(f"{path.name} names no notebook; expected some under `notebooks:`")
    shared = {key: value for key, value in document.items() if key not in RUNNER_KEYS}
    sources = exhibits_in(checkout.notebooks)
    for exhibit in overrides:
        if exhibit not in sources:
            raise unknown(f"notebook in preset {name}", exhibit, sources)
    defaults = {exhibit: parameters_of(path) for exhibit, path in sources.items() if exhibit in overrides}
    declared_names = set().union(*defaults.values())
    for key in shared:
        if key not in declared_names:
            raise unknown(f"parameter in preset {name}", key, {*RUNNER_KEYS, *declared_names})
    parameters = {
        exhibit: _values(f"preset {name}, {exhibit}", declared, shared, overrides[exhibit] or {})
        for exhibit, declared in defaults.items()
    }
    shorter = _overnight(name, document.get("overnight") or {}, parameters, defaults)
    if overnight and not shorter:
        raise ValueError(f"preset {name!r} has no overnight subset; run it without --overnight")
    title, device_note = document.get("title") or name, document.get("device_note") or ""
    if overnight:
        return Preset(name, title, device_note, shorter, "overnight")
    return Preset(name, title, device_note, parameters)


def has_overnight(name: str, checkout: Checkout = HERE) -> bool:
    """Whether the preset, which must exist, has an overnight subset."""
    return bool(_read_yaml(checkout.presets / f"{name}.yaml").get("overnight"))


def _overnight(name: str, subset: dict[str, Any], parameters: dict, defaults: dict) -> dict[str, dict[str, Any]]:
    """The parameters of the overnight subset: those of the whole, but for what the subset sets anew."""
    for exhibit in subset:
        if exhibit not in parameters:
            raise unknown(f"overnight notebook in preset {name}", exhibit, parameters)
    return {
        exhibit: parameters[exhibit]
        | _values(f"preset {name}, overnight {exhibit}", defaults[exhibit], {}, subset[exhibit] or {})
        for exhibit in parameters
        if exhibit in subset
    }


def parameters_of(path: Path) -> dict[str, Any]:
    """Names and default values of a notebook's `parameters` cell; ValueError if one is not a literal."""
    inspected = papermill.inspect_notebook(nbformat.read(path, as_version=4))
    if not inspected:
        raise ValueError(f"{path.name} has no cell tagged `parameters` that assigns literals")
    defaults = {}
    for name, parameter in inspected.items():
        try:
            defaults[name] = ast.literal_eval(parameter["default"])
        except (ValueError, SyntaxError):
            reason = f"{path.name}: parameter {name!r} must be a literal, not {parameter['default']}"
            raise ValueError(reason) from None
    return defaults


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path.name} must be a mapping of keys to values")
    for key, kind in RUNNER_KEYS.items():
        if not isinstance(document.get(key, kind()), kind):
            raise ValueError(f"{path.name}: `{key}` must be a {kind.__name__}, not {document[key]!r}")
    return document


def _values(where: str, declared: dict, shared: dict, own: Any) -> dict[str, Any]:
    """The shared values that this notebook declares, and its own ones, all of which it must declare."""
    if not isinstance(own, dict):
        raise ValueError(f"{where}: expected a mapping of parameters, not {own!r}")
    for key in own:
        if key not in declared:
            raise unknown(f"parameter ({where})", key, declared)
    values = {key: value for key, value in shared.items() if key in declared} | own
    if SET_BY_RUNNER in values:
        raise ValueError(f"{where}: `{SET_BY_RUNNER}` is set by the runner; choose the folder with --out")
    for key, value in values.items():
        try:
            values[key] = _like(value, declared[key])
        except TypeError:
            raise ValueError(
                f"{where}: {key} = {value!r} is a {type(value).__name__}; "
                f"the notebook expects values like {declared[key]!r}"
            ) from None
    return values


def _like(value: Any, default: Any) -> Any:
    """`value` as the type of the notebook's default, where at most an int has to become a float."""
    if default is None and isinstance(value, LITERALS):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, list) and isinstance(value, list):
        return [_like(item, default[0] if default else None) for item in value]
    if type(value) is not type(default):
        raise TypeError
    return value
