"""Every method on a two-layer model against loops in float64 (tests/reference.py) and arithmetic by hand."""

import math
from fractions import Fraction

import pytest
import torch

import rsparse
from reference import dense, llama_logits, masked, weights_of
from rsparse import figures
from rsparse.methods import METHODS, Request
from rsparse.models import decoder_linears
from rsparse.recipe import Ask

SHAPES = {
    "q": (64, 64),
    "k": (16, 64),
    "v": (16, 64),
    "o": (64, 64),
    "gate": (176, 64),
    "up": (176, 64),
    "down": (64, 176),
}


def plan(kind: str, sparsity: str, rho: str) -> tuple[int, int]:
    """Kept channels and rank: r = floor((1 - rho) C m n / (m + n)), k = floor(C n - r (m + n) / m)."""
    (m, n), C, rho = SHAPES[kind], 1 - Fraction(sparsity), Fraction(rho)
    rank = math.floor((1 - rho) * C * m * n / (m + n))
    return (math.floor(C * n - Fraction(rank * (m + n), m)) if rho else 0), rank


def kind_of(name: str) -> str:
    return name.rsplit(".", 1)[1].removesuffix("_proj")


def by_hand(sparsity: str, rho: str, norms: str = "", thresholds: dict | None = None):
    """norms: kinds of linears, one word each, whose column norms enter the score; "every" for all."""

    def linear(name, W, x, position):
        kept, rank = plan(kind_of(name), sparsity, rho)
        weighted = norms == "every" or kind_of(name) in norms.split()
        return masked(kept, rank, weighted, thresholds and thresholds[name])(name, W, x, position)

    return linear


CASES = {
    "teal": (dict(method="teal", sparsity=0.4), by_hand("0.4", "1")),
    "teal ignores rho and score": (
        dict(method="teal", sparsity=0.4, rho=0.1, score="column-norm"),
        by_hand("0.4", "1"),
    ),
    "low-rank": (dict(method="low-rank", sparsity=0.5), by_hand("0.5", "0")),
    "r-sparse": (dict(method="r-sparse", sparsity=0.5), by_hand("0.5", "0.95")),
    "r-sparse, rho": (dict(method="r-sparse", sparsity=0.3, rho=0.7), by_hand("0.3", "0.7")),
    "r-sparse, rho 0": (dict(method="r-sparse", sparsity=0.5, rho=0.0), by_hand("0.5", "0")),
    "r-sparse, rho 1": (dict(method="r-sparse", sparsity=0.5, rho=1), by_hand("0.5", "1")),
    "r-sparse, score": (
        dict(method="r-sparse", sparsity=0.5, rho=0.8, score="column-norm"),
        by_hand("0.5", "0.8", "every"),
    ),
    "wina": (dict(method="wina", sparsity=0.6), by_hand("0.6", "1", "k gate")),
    "wina ignores rho and score": (
        dict(method="wina", sparsity=0.6, rho=0.1, score="column-norm"),
        by_hand("0.6", "1", "k gate"),
    ),
    "dense": (dict(method="dense", sparsity=0.5), dense),
    "no sparsity": (dict(method="r-sparse", sparsity=0.0), dense),
}


@pytest.mark.parametrize(("asked", "linear"), CASES.values(), ids=CASES)
def test_per_token(build, ids, logits, asked, linear):
    model, row = build(), ids[0, :12]
    weights = weights_of(model)
    rsparse.sparsify(model, threshold="per-token", **asked)
    expected = llama_logits(model.config, weights, row.tolist(), linear)
    torch.testing.assert_close(logits(model, row[None])[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["teal", "wina", "r-sparse"])
@pytest.mark.parametrize("score", ["magnitude", "column-norm"])
def test_static(build, ids, logits, method, score):
    model, row = build(), ids[0, :12]
    weights = weights_of(model)
    report = rsparse.sparsify(model, method, 0.5, rho=0.8, score=score, calibration=ids)
    thresholds = {x.name: x.threshold for x in report.linears}
    norms = {"wina": "k gate", "r-sparse": "every" if score == "column-norm" else ""}.get(method, "")
    linear = by_hand("0.5", "0.8" if method == "r-sparse" else "1", norms, thresholds)
    expected = llama_logits(model.config, weights, row.tolist(), linear)
    torch.testing.assert_close(logits(model, row[None])[0], expected, rtol=0, atol=1e-9)


def test_the_report_shows_what_was_used(build):
    model = build()
    for method, rho, score in (
        ("teal", 1.0, "magnitude"),
        ("low-rank", 0.0, "magnitude"),
        ("r-sparse", 0.7, "column-norm"),
    ):
        report = rsparse.sparsify(model, method, 0.5, rho=0.7, score="column-norm", threshold="per-token")
        for x in report.linears:
            assert (x.rho, x.score, x.sparsity) == (rho, score, 0.5)
            assert (x.kept, x.rank) == plan(x.kind, "0.5", str(Fraction(repr(rho))))
            assert x.read == pytest.approx(x.kept / x.n + x.rank * (x.m + x.n) / (x.m * x.n))


def test_the_registry():
    assert {"dense", "teal", "low-rank", "r-sparse"} <= set(METHODS) == {m.name for m in METHODS.values()}
    assert rsparse.METHODS is METHODS
    assert [m.name for m in METHODS.values() if m.takes_recipe] == ["r-sparse"]
    assert all(m.source for m in METHODS.values())
    assert set(METHODS) == set(figures.LOOK)  # one without a look would be missing from figures


def test_a_method_says_what_of_a_request_it_takes(build):
    """A field outside `takes` changes nothing that is asked of any linear; one inside changes something."""
    linears = decoder_linears(build())
    base = dict(sparsity=0.5, rho=0.9, score="magnitude", threshold="static")
    other = dict(sparsity=0.6, rho=0.8, score="column-norm", threshold="per-token")
    for method in METHODS.values():
        asked = method.plan(linears, Request(**base))
        effective = {name: {x: getattr(ask, x) for x in method.takes} for name, ask in asked.items()}
        for name, value in other.items():
            changed = method.plan(linears, Request(**base | {name: value}))
            now = {key: {x: getattr(ask, x) for x in method.takes} for key, ask in changed.items()}
            assert (now != effective) == (name in method.takes), (method.name, name)


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_asks_something_of_every_linear_in_scope(build, name):
    linears = decoder_linears(build())[4:7]
    asks = METHODS[name].plan(linears, Request(0.5, 0.9, "magnitude", "per-token"))
    assert set(asks) == {x.name for x in linears} and all(isinstance(a, Ask) for a in asks.values())
