"""What is asked of every linear: sparsity, rho, score, threshold, factors. Saved as JSON, checked when read."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from rsparse.accounting import check_rho, check_sparsity, square_split
from rsparse.decompose import FACTORS
from rsparse.files import write_json
from rsparse.models import KINDS, decoder_linears, fingerprint
from rsparse.thresholds import SCORES, THRESHOLDS


@dataclass(frozen=True)
class Ask:
    """What is asked of one linear. ValueError names a value that is not allowed."""

    sparsity: float  # of this linear: 1 - bytes read / dense bytes
    rho: float = 1.0
    score: str = "magnitude"
    threshold: str = "static"
    factors: str = "svd"  # of the low-rank path, see rsparse.whitening

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_rho(self.rho)
        for name, allowed in (("score", SCORES), ("threshold", THRESHOLDS), ("factors", FACTORS)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")


DENSE = Ask(sparsity=0.0)

_ASK_SCHEMA = {
    "type": "object",
    "properties": {
        "sparsity": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        "rho": {"type": "number", "minimum": 0, "maximum": 1},
        "score": {"enum": list(SCORES)},
        "threshold": {"enum": list(THRESHOLDS)},
        "factors": {"enum": list(FACTORS)},
    },
    "required": ["sparsity", "rho", "score", "threshold"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "format": {"const": "rsparse-recipe-1"},
        "name": {"type": "string"},
        "model": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
        "origin": {"type": "object"},
        "linears": {"type": "object", "additionalProperties": _ASK_SCHEMA, "minProperties": 1},
    },
    "required": ["format", "name", "model", "linears"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Recipe:
    """One `Ask` per decoder linear of one model.

    name: shown in results. model: fingerprint of the model it was made for. origin: how it came about
    (budget, seed, evaluations, fitness, source), free-form.
    """

    name: str
    model: str
    linears: dict[str, Ask]
    origin: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def uniform(
        cls, model: nn.Module, sparsity: float, rho: float, score: str = "magnitude", threshold: str = "static",
        factors: str = "svd",
    ) -> Recipe:  # fmt: skip
        """The same for every linear; its sparsity is then the model-level one."""
        ask = Ask(sparsity, rho, score, threshold, factors)
        linears = {linear.name: ask for linear in decoder_linears(model)}
        return cls(f"uniform-{rho:g}", fingerprint(model), linears, {"sparsity": sparsity, "rho": rho})

    @classmethod
    def square_kv(
        cls, model: nn.Module, sparsity: float, rho: float, score: str = "magnitude", threshold: str = "static"
    ) -> Recipe:
        """Uniform, but k and v get the channels and the rank of a square linear, whatever their shape.

        What the R-Sparse authors' code does under grouped-query attention (utils/setup.py); the model then reads a
        little more than asked. The same as `uniform` where k and v are square.
        """
        found = {}
        for linear in decoder_linears(model):
            m, n = linear.shape
            split = square_split(m, n, sparsity, rho) if linear.kind in ("k", "v") and m < n else (sparsity, rho)
            found[linear.name] = Ask(*split, score, threshold)
        origin = {"sparsity": sparsity, "rho": rho, "k and v": "budgeted as square"}
        return cls(f"square-kv-{rho:g}", fingerprint(model), found, origin)

    @classmethod
    def from_rsparse_list(cls, path: str | Path, model: nn.Module) -> Recipe:
        """The R-Sparse authors' recipe file for `model`, e.g. config/llama3_sparsity_50_evolutionary_search.npy.

        Despite its name it is text: (rho, sparsity) per linear, in the order q k v o gate up down by layer.
        Their code masks by |x| where rho is 1 and by |x| times the column norm elsewhere; so does the recipe.

        Raises ValueError when the file does not hold two numbers for each of the model's decoder linears.
        """
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        values = [float(v) for v in re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", text)]
        names = [linear.name for linear in decoder_linears(model)]
        if len(values) != 2 * len(names):
            raise ValueError(f"{path} holds {len(values)} numbers; expected {2 * len(names)}, rho and sparsity "
                             f"for each of the model's {len(names)} decoder linears")
        linears = {
            name: Ask(sparsity, rho, "magnitude" if rho == 1 else "column-norm")
            for name, rho, sparsity in zip(names, values[::2], values[1::2], strict=True)
        }
        return cls(Path(path).stem, fingerprint(model), linears, {"source": Path(path).name})

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe; ValueError says which part of the file does not fit the format, or why it cannot be read."""
        import jsonschema  # slow to import, and most notebooks read no recipe

        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            jsonschema.validate(raw, SCHEMA)
        except OSError as error:
            raise ValueError(f"recipe {path} cannot be read: {error.strerror}; expected a JSON file") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        except jsonschema.ValidationError as error:
            raise ValueError(f"{path} is not a recipe: at {error.json_path}, {error.message}") from None
        linears = {name: Ask(**ask) for name, ask in raw["linears"].items()}
        return cls(raw["name"], raw["model"], linears, raw.get("origin", {}))

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON, atomically."""
        linears = {name: asdict(ask) for name, ask in self.linears.items()}
        head = {"format": "rsparse-recipe-1", "name": self.name, "model": self.model, "origin": self.origin}
        write_json(Path(path), head | {"linears": linears})

    def check(self, model: nn.Module) -> None:
        """ValueError unless the recipe was made for `model`."""
        if (found := fingerprint(model)) != self.model:
            made_for = f"recipe {self.name!r} is for the model with fingerprint {self.model}"
            raise ValueError(f"{made_for}; this one has {found}")
        if missing := {linear.name for linear in decoder_linears(model)} ^ set(self.linears):
            raise ValueError(f"recipe {self.name!r} does not fit the model: {sorted(missing)[0]!r} is on one side only")

    def within(self, kinds: tuple[str, ...]) -> Recipe:
        """The same recipe with the linears outside `kinds` dense."""
        outside = tuple(f"{kind}_proj" for kind in KINDS if kind not in kinds)
        linears = {name: DENSE if name.endswith(outside) else ask for name, ask in self.linears.items()}
        return replace(self, linears=linears)
