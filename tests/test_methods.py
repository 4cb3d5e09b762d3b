"""Every method on a two-layer model against loops in float64 (tests/reference.py) and arithmetic by hand."""

import copy
import math
import re
from fractions import Fraction

import pytest
import torch
from accelerate import dispatch_model

import rsparse
from reference import dense, kind_of, llama_logits, masked, weights_of
from rsparse import figures
from rsparse.apply import report_of, tokens_as
from rsparse.calibrate import Calibration
from rsparse.decompose import default_store
from rsparse.methods import METHODS, Request
from rsparse.models import (
    decoder_activations,
    decoder_linears,
    load_model,
    load_tokenizer,
    random_model,
    shape_config,
)
from rsparse.recipe import Ask
from rsparse.texts import token_ids

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


def touched(name: str, linears: list) -> list:
    """Those of `linears` that a plan is made for."""
    return [x for x in linears if x.kind in METHODS[name].touches("all")]


def test_a_method_says_what_of_a_request_it_takes(build, ids):
    """A field outside `takes` changes nothing that is asked of any linear; one inside changes something."""
    model = build()
    kept = dict(calibration=Calibration(model, ids[:1]), store=default_store())
    base = dict(sparsity=0.5, rho=0.9, score="magnitude", threshold="static") | kept
    other = dict(sparsity=0.6, rho=0.8, score="column-norm", threshold="per-token", factors="whitened")
    for method in METHODS.values():
        linears = touched(method.name, decoder_linears(model))
        asked = method.plan(linears, Request(**base))
        effective = {name: {x: getattr(ask, x) for x in method.takes} for name, ask in asked.items()}
        for name, value in other.items():
            changed = method.plan(linears, Request(**base | {name: value}))
            now = {key: {x: getattr(ask, x) for x in method.takes} for key, ask in changed.items()}
            assert (now != effective) == (name in method.takes), (method.name, name)


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_asks_something_of_every_linear_that_it_is_made_for(build, ids, name):
    model = build()
    linears = touched(name, decoder_linears(model)[3:7])
    request = Request(0.5, 0.9, "magnitude", "per-token", Calibration(model, ids[:1]), default_store())
    asks = METHODS[name].plan(linears, request)
    assert set(asks) == {x.name for x in linears} and all(isinstance(a, Ask) for a in asks.values())


def test_what_a_method_says_of_itself_fits_together():
    scopes = {"cats": "mlp", "griffin": "mlp", "relufication": "mlp"}
    assert {m.name: m.scope for m in METHODS.values() if m.scope != "all"} == scopes
    assert [m.name for m in METHODS.values() if m.calibrates] == ["chess", "teal-greedy", "larosa"]
    assert [m.name for m in METHODS.values() if m.prompted] == ["griffin"]
    for method in METHODS.values():
        assert set(method.follows) <= set(method.parts) and bool(method.rotate) == bool(method.rotated)
        assert method.takes <= {"sparsity", "rho", "score", "threshold", "factors"}


def proportions(shape: str):
    """One block in the proportions of a published model, 64 times narrower, so that shares are its own."""
    config = shape_config(shape)
    groups = config.num_attention_heads // config.num_key_value_heads
    sizes = dict(hidden_size=config.hidden_size // 64, intermediate_size=config.intermediate_size // 64)
    sizes |= dict(num_attention_heads=8, num_key_value_heads=8 // groups, num_hidden_layers=1)
    return random_model(shape_config(shape, vocab_size=97, **sizes))


CEILINGS = {  # method, scope: Llama-2-7B, then Llama-3-8B and Mistral-7B
    ("cats", None): ("0.4456", "0.5385"),
    ("cats", "all"): ("0.4456", "0.5385"),
    ("chess", None): ("0.6114", "0.6923"),
    ("chess", "mlp"): ("0.4456", "0.5385"),
    ("griffin", None): ("0.6684", "0.8077"),
    ("wina-rotated", None): ("0.8342", "0.8462"),
    ("larosa", None): ("0.6028", "0.6282"),
    ("larosa", "mlp"): ("0.4370", "0.5513"),  # (0.8 x 2 + 1.2) / 1.2 x 11008 - 4096, of 49408; 14336, of 53248
}


@pytest.mark.parametrize(("shape", "column"), [("llama-2-7b", 0), ("llama-3-8b", 1), ("mistral-7b", 1)])
@pytest.mark.parametrize(("name", "scope"), CEILINGS)
@pytest.mark.parametrize("sparse_before", [False, True])
def test_a_sparsity_out_of_reach_is_refused(ids, logits, shape, column, name, scope, sparse_before):
    model, largest = proportions(shape), CEILINGS[name, scope][column]
    if sparse_before:
        rsparse.sparsify(model, "teal", 0.3, threshold="per-token")
    before, report, modules = logits(model, ids), report_of(model), list(model.modules())
    for sparsity in (float(largest) + 1e-4, 0.95):
        refusal = rf"sparsity {sparsity} cannot be reached .* by {name}; expected less than {re.escape(largest)}$"
        with pytest.raises(ValueError, match=refusal):
            rsparse.sparsify(model, name, sparsity, scope=scope, calibration=ids)
        assert logits(model, ids).equal(before) and report_of(model) is report
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    within = float(largest) - 1e-4
    options = dict(scope=scope, threshold="per-token", tokens=4, calibration=ids)
    found = rsparse.sparsify(model, name, within, **options)
    assert found.planned >= within and not logits(model, ids).equal(before)


@pytest.mark.parametrize("name", ["cats", "relufication"])
def test_a_scope_that_a_method_leaves_alone_is_refused(build, ids, logits, name):
    model = build()
    before = logits(model, ids)
    with pytest.raises(ValueError, match=f"scope is 'attention'; expected one with linears that {name} makes sparse"):
        rsparse.sparsify(model, name, 0.1, scope="attention", calibration=ids)
    assert logits(model, ids).equal(before) and report_of(model) is None


@pytest.mark.parametrize("name", ["chess", "teal-greedy", "larosa"])
def test_some_methods_calibrate_whatever_the_threshold_is(build, ids, name):
    model = build()
    with pytest.raises(ValueError, match=f"calibration is None; {name} needs token ids"):
        rsparse.sparsify(model, name, 0.1, threshold="per-token")
    assert report_of(model) is None
    assert rsparse.sparsify(model, name, 0.0, threshold="per-token").planned == 0


WIDE: dict = {}


def wide():
    """One block as wide as models are, in the proportions of Llama-3-8B."""
    sizes = dict(hidden_size=512, intermediate_size=1792, num_hidden_layers=1, num_attention_heads=8)
    return random_model(shape_config("llama-3-8b", vocab_size=97, num_key_value_heads=2, **sizes))


NEW = ("cats", "griffin", "chess", "teal-greedy", "wina-rotated", "larosa")
SETTINGS = [(name, None) for name in NEW] + [("griffin", "all"), ("chess", "mlp"), ("wina-rotated", "mlp")]


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.5])
@pytest.mark.parametrize(("name", "scope"), SETTINGS)
def test_planned_is_asked_to_half_a_point(ids, monkeypatch, name, scope, sparsity):
    monkeypatch.setattr("rsparse.greedy.LEVELS", 2)
    model = WIDE.setdefault("model", wide())
    calibration = WIDE.setdefault("calibration", Calibration(model, ids[:1]))
    rsparse.restore(model)
    report = rsparse.sparsify(model, name, sparsity, threshold="per-token", scope=scope, calibration=calibration)
    assert sparsity - 1e-12 <= report.planned <= sparsity + 0.005 and report.asked == sparsity
    sizes = {x.name: x.m * x.n for x in report.linears}
    read = sum(x.m * x.n * x.kept / x.channels for x in report.linears)
    if METHODS[name].rotated:  # of n x n numbers each
        read += 512 * 512 * (2 if scope is None else 1)
    assert report.planned == pytest.approx(1 - read / sum(sizes.values()), abs=1e-12)
    inside = METHODS[name].touches(report.scope)
    assert all((x.read, x.kept, x.realised) == (1, x.n, 0) for x in report.linears if x.kind not in inside)


REQUESTS = {
    "relufication": dict(method="relufication"),
    "cats": dict(method="cats", sparsity=0.2),
    "cats, sequential": dict(method="cats", sparsity=0.2, threshold="static-sequential"),
    "griffin": dict(method="griffin", tokens=9),
    "griffin, all": dict(method="griffin", scope="all", tokens=9),
    "chess": dict(method="chess", sparsity=0.3),
    "teal-greedy": dict(method="teal-greedy", sparsity=0.3),
    "wina-rotated": dict(method="wina-rotated", sparsity=0.4),
    "wina-rotated, sequential": dict(method="wina-rotated", sparsity=0.4, threshold="static-sequential"),
    "larosa": dict(method="larosa", sparsity=0.3),
}
every_request = pytest.mark.parametrize("asked", REQUESTS.values(), ids=REQUESTS)
MODELS = {
    "grouped": dict(),
    "mistral, bias": dict(shape="mistral-7b", num_key_value_heads=8, attention_bias=True, mlp_bias=True),
    "bfloat16": dict(dtype="bfloat16"),
}


@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
@every_request
def test_sparse_then_dense_again_bit_for_bit(build, ids, logits, sizes, asked):
    model = build(**sizes)
    places = [*decoder_linears(model), *decoder_activations(model)]
    before = logits(model, ids)
    rsparse.sparsify(model, **dict(calibration=ids) | asked)
    assert not logits(model, ids).equal(before) and torch.isfinite(logits(model, ids)).all()
    rsparse.restore(model)
    assert logits(model, ids).equal(before) and report_of(model) is None
    assert all(x.hung is x.module for x in places)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_each_call_starts_from_the_dense_model(build, ids, logits):
    model, twin = build(), build()
    for asked in reversed(REQUESTS.values()):
        rsparse.restore(twin)
        for x in (model, twin):
            rsparse.sparsify(x, **dict(calibration=ids) | asked)
        assert logits(model, ids).equal(logits(twin, ids)), asked


def test_one_calibration_serves_every_method(build, ids, logits):
    """Statistics are kept by what they are of: rotated inputs, activations, and inputs as they are."""
    model, expected = build(), {}
    for calibration in (ids, Calibration(model, ids)):
        for name, asked in REQUESTS.items():
            rsparse.sparsify(model, **asked | dict(calibration=calibration, threshold="static-dense"))
            assert logits(model, ids).equal(expected.setdefault(name, logits(model, ids))), name
            if calibration is not ids:
                rsparse.sparsify(model, "teal", 0.5, threshold="static-dense", calibration=calibration)


@every_request
def test_a_deep_copy_stands_on_its_own(build, ids, logits, asked):
    model = build()
    dense = logits(model, ids)
    rsparse.sparsify(model, **dict(calibration=ids) | asked)
    expected = logits(model, ids)
    twin = copy.deepcopy(model)
    with tokens_as(model, -4):
        assert not logits(model, ids[:, :7]).equal(logits(twin, ids[:, :7]))
        assert logits(twin, ids).equal(expected)
    rsparse.restore(model)
    assert logits(twin, ids).equal(expected)
    rsparse.restore(twin)
    assert logits(twin, ids).equal(dense)


@every_request
@pytest.mark.parametrize("where", ["embedding", "up", "down", "v"])
def test_nan_surfaces_in_the_logits(build, ids, logits, asked, where):
    model = build()
    rsparse.sparsify(model, **dict(calibration=ids) | asked | dict(tokens=2))
    broken = {
        "embedding": model.model.embed_tokens.weight[ids[0, 12]],
        "up": model.model.layers[0].mlp.up_proj.weight[3],
        "down": model.model.layers[0].mlp.down_proj.weight[3],
        "v": model.model.layers[0].self_attn.v_proj.weight[3],
    }[where]
    with torch.no_grad():
        broken[:1] = math.nan
    assert torch.isnan(logits(model, ids[:1])[0, 12:]).any(-1).all()


@every_request
def test_a_model_that_accelerate_placed_works_alike(build, ids, logits, asked):
    plain, placed = build(), dispatch_model(build(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    dense = logits(placed, ids)
    for model in (plain, placed):
        rsparse.sparsify(model, **dict(calibration=ids) | asked)
    assert logits(placed, ids).equal(logits(plain, ids))
    rsparse.restore(placed)
    assert logits(placed, ids).equal(dense)


@pytest.mark.parametrize("tokens", ["decode", 13, -4])
@every_request
def test_dense_positions_are_those_of_the_dense_model(build, ids, logits, asked, tokens):
    model = build()
    dense = logits(model, ids)
    rsparse.sparsify(model, **dict(calibration=ids) | asked | dict(tokens=tokens))
    first = {"decode": 40, 13: 13, -4: 36}[tokens]
    found = logits(model, ids)
    torch.testing.assert_close(found[:, :first], dense[:, :first], rtol=0, atol=1e-12)
    assert ((found - dense)[:, first:].abs().amax(-1) > 1e-4).all()


class TestTiny:
    """The first two blocks of the embedded default: a trained model, its calibration text and its held-out text."""

    @pytest.mark.parametrize("name", NEW)
    def test_planned_asked_and_realised(self, monkeypatch, tmp_path, name):
        monkeypatch.setenv("RSPARSE_CACHE", str(tmp_path))
        monkeypatch.setattr("rsparse.greedy.LEVELS", 2)
        monkeypatch.setattr("rsparse.greedy.TOKENS", 256)
        model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
        model.model.layers = model.model.layers[:2]
        calibration = token_ids("tiny", "calibration", tokenizer, 8, 128)
        heldout = token_ids("tiny", "heldout", tokenizer, 8, 128)
        report = rsparse.sparsify(model, name, 0.4, calibration=calibration)
        found = rsparse.measure(model, heldout)
        assert 0.4 <= report.planned <= 0.405
        assert abs(found.realised - found.planned) <= 0.01
