"""Rotated inputs (WINA's transform, LaRoSA) against loops in float64 with rotations from an SVD of their own."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import rsparse
from reference import (
    kept_of,
    kind_of,
    llama_logits,
    masked,
    own_sparsity,
    recorded,
    rotated,
    shapes_of,
    weights_of,
)
from rsparse import rotations
from rsparse.accounting import Split
from rsparse.apply import protocol_of
from rsparse.calibrate import Calibration
from rsparse.decompose import FactorStore, eigenbasis
from rsparse.linears import KeptTally
from rsparse.models import KINDS, SCOPES, decoder_linears
from rsparse.protocol import TokenProtocol, first_sparse
from rsparse.rotations import RotatedLinear, Rotation

PARTS = {
    "wina-rotated": dict.fromkeys(KINDS, "1"),
    "larosa": dict.fromkeys(KINDS, "0.8") | {"o": "1.2", "down": "1.2"},
}
SITES = {"attn_in": ("q", "k", "v"), "mlp_in": ("gate", "up")}
TURNED = ("q", "k", "v", "gate", "up")
SQUARE = dict(num_key_value_heads=8)  # k has full rank then, and its singular vectors are its own


def kept_channels(weights, name: str, scope: str, sparsity: str) -> tuple[dict[str, int], Fraction]:
    """Kind -> kept channels, when a block reads an n x n rotation for each site in scope; and the nominal sparsity."""
    shapes = shapes_of(weights)
    parts = {kind: PARTS[name][kind] for kind in SCOPES[scope]}
    n = shapes["q"][1]
    p = own_sparsity(weights, sparsity, parts, extra=n * n * (2 if scope == "all" else 1))
    return {kind: kept_of(shapes[kind][1], Fraction(part) * p) for kind, part in parts.items()}, p


def own_rotations(model, weights, ids, name: str) -> dict[str, torch.Tensor]:
    """Linear -> V: right singular vectors of k or gate, or of the inputs that the dense model has there."""
    if name == "larosa":
        inputs = recorded(model, ids)[0]
        return {x: torch.linalg.svd(inputs[x], full_matrices=False).Vh.T for x in inputs if kind_of(x) in TURNED}
    found = {}
    for layer in range(2):
        for part, leader, kinds in (("self_attn", "k", "qkv"), ("mlp", "gate", ("gate", "up"))):
            V = torch.linalg.svd(weights[f"model.layers.{layer}.{part}.{leader}_proj.weight"]).Vh.T
            found |= {f"model.layers.{layer}.{part}.{kind}_proj": V for kind in kinds}
    return found


def by_hand(turns, kept, norms=(), thresholds=None, sparse=lambda position: True):
    """The linear of the reference. norms: kinds whose column norms enter the score."""

    def linear(name, W, x, position):
        kind = kind_of(name)
        if kind not in kept:
            return W @ x
        threshold = thresholds and thresholds[name]
        if name in turns:
            function = rotated(turns[name], kept[kind], kind in norms, threshold, sparse)
        else:
            function = masked(kept[kind], 0, False, threshold, sparse)
        return function(name, W, x, position)

    return linear


NORMS = {"wina-rotated": ("k", "gate"), "larosa": ()}


@pytest.mark.parametrize("threshold", ["per-token", "static"])
@pytest.mark.parametrize(("scope", "sparsity"), [("all", "0.4"), ("mlp", "0.2"), ("attention", "0.1")])
@pytest.mark.parametrize("name", PARTS)
def test_logits(build, ids, logits, name, scope, sparsity, threshold):
    model, row = build(**SQUARE), ids[0, :12]
    weights = weights_of(model)
    turns = own_rotations(model, weights, ids, name)
    kept, nominal = kept_channels(weights, name, scope, sparsity)
    report = rsparse.sparsify(model, name, float(sparsity), threshold=threshold, scope=scope, calibration=ids)
    assert report.nominal == pytest.approx(float(nominal), abs=1e-9)
    assert {x.kind: x.kept for x in report.linears if x.sparsity} == kept
    static = threshold == "static" and name != "larosa"  # it has no threshold
    thresholds = {x.name: x.threshold for x in report.linears} if static else None
    linear = by_hand(turns, kept, NORMS[name], thresholds)
    expected = llama_logits(model.config, weights, row.tolist(), linear)
    torch.testing.assert_close(logits(model, row[None])[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tokens", [0.5, -3, 7])
@pytest.mark.parametrize("name", PARTS)
def test_dense_positions(build, ids, logits, name, tokens):
    model, row = build(**SQUARE), ids[0, :12]
    weights = weights_of(model)
    turns, (kept, _) = own_rotations(model, weights, ids, name), kept_channels(weights, name, "all", "0.4")
    rsparse.sparsify(model, name, 0.4, threshold="per-token", tokens=tokens, calibration=ids)
    first = first_sparse(tokens, 12)
    linear = by_hand(turns, kept, NORMS[name], sparse=lambda position: position >= first)
    expected = llama_logits(model.config, weights, row.tolist(), linear)
    torch.testing.assert_close(logits(model, row[None])[0], expected, rtol=0, atol=1e-9)


def modules_of(model) -> dict[str, RotatedLinear]:
    return {name: x for name, x in model.named_modules() if isinstance(x, RotatedLinear)}


def test_under_grouped_query_attention(build, ids, logits):
    """k is 16 x 64 then: the basis of what it makes zero is anyone's, so it is taken from the library; the columns of
    k and gate are orthogonal in it."""
    model, row = build(), ids[0, :12]
    weights = weights_of(model)
    kept, _ = kept_channels(weights, "wina-rotated", "all", "0.4")
    rsparse.sparsify(model, "wina-rotated", 0.4, threshold="per-token")
    found = modules_of(model)
    assert {kind_of(name) for name in found} == set(TURNED) and len(found) == 10
    turns = {name: x.rotation.V for name, x in found.items()}
    for name, V in turns.items():
        torch.testing.assert_close(V.T @ V, torch.eye(64, dtype=V.dtype), rtol=0, atol=1e-12)
        leader = name.replace("q_proj", "k_proj").replace("v_proj", "k_proj").replace("up_proj", "gate_proj")
        assert V is turns[leader]
        product = weights[f"{leader}.weight"] @ V
        gram = product.T @ product
        norms = gram.diagonal().clamp_min(0).sqrt()
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-10)
        assert (norms[:-1] >= norms[1:] - 1e-6).all()
        sigma = torch.linalg.svdvals(weights[f"{leader}.weight"])
        torch.testing.assert_close(norms[: len(sigma)], sigma, rtol=1e-9, atol=0)
    expected = llama_logits(model.config, weights, row.tolist(), by_hand(turns, kept, ("k", "gate")))
    torch.testing.assert_close(logits(model, row[None])[0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("threshold", ["static-dense", "static-sequential"])
@pytest.mark.parametrize("name", ["wina-rotated"])  # LaRoSA has none
def test_thresholds_are_quantiles_in_the_rotated_basis(build, ids, name, threshold):
    """Of the dense model's inputs, or of those of the model that is sparse up to there."""
    model = build(**SQUARE)
    weights, inputs = weights_of(model), recorded(model, ids)[0]
    turns = own_rotations(model, weights, ids, name)
    report = rsparse.sparsify(model, name, 0.4, threshold=threshold, calibration=ids)
    if threshold == "static-sequential":
        inputs = recorded(model, ids)[0]
    for x in report.linears:
        seen = inputs[x.name]
        if x.name in turns:
            seen = seen @ turns[x.name]
            if x.kind in NORMS[name]:
                seen = seen * (weights[f"{x.name}.weight"] @ turns[x.name]).norm(dim=0)
        low, high = (
            float(seen.abs().flatten().quantile(1 - x.kept / x.n, interpolation=i)) for i in ("lower", "higher")
        )
        assert low * (1 - 2**-9) <= x.threshold <= high * (1 + 2**-9), x.name


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("scope", ["all", "mlp", "attention"])
def test_counted_by_hand(build, ids, name, scope):
    """What is read, rotations included, planned and realised; `nominal` leaves the rotations out."""
    model = build()  # grouped: k and v are smaller than q, and pay as much less for the rotation that they share
    weights = weights_of(model)
    sparsity = {"all": "0.4", "mlp": "0.2", "attention": "0.05"}[scope]
    kept, p = kept_channels(weights, name, scope, sparsity)
    report = rsparse.sparsify(model, name, float(sparsity), scope=scope, calibration=ids)
    found = rsparse.measure(model, ids)
    inputs = recorded(model, ids)[0]
    turns = {place: x.rotation.V for place, x in modules_of(model).items()}
    read = realised = nominal = 0
    outputs = {"attn_in": 64 + 16 + 16, "mlp_in": 2 * 176}
    for x in found.linears:
        if x.kind not in kept:
            assert (x.read, x.realised, x.overhead) == (1, 0, 0)
            read, realised, nominal = read + x.m * x.n, realised + x.m * x.n, nominal + x.m * x.n
            continue
        site = next((site for site, kinds in SITES.items() if x.kind in kinds), None)
        overhead = 64 * x.m / outputs[site] / x.m if site else 0.0
        assert x.overhead == pytest.approx(overhead) and x.read == pytest.approx(kept[x.kind] / x.n + overhead)
        assert (x.kept, x.channels, x.rank, x.follows) == (kept[x.kind], x.n, 0, "")
        z = inputs[x.name] @ turns[x.name] if site else inputs[x.name]
        if x.kind in NORMS[name]:
            z = z * (weights[f"{x.name}.weight"] @ turns[x.name]).norm(dim=0)
        share = (z.abs() > x.threshold).double().mean(1)
        if name == "larosa":  # the same number for every token
            share = torch.full_like(share, x.kept / x.n)
        assert x.realised == pytest.approx(1 - overhead - float(share.mean()), abs=1e-9)
        assert x.spread == pytest.approx(float(share.std(correction=0)), abs=1e-9)
        read, nominal = read + x.m * x.n * x.read, nominal + x.m * x.n * (1 - float(p * Fraction(PARTS[name][x.kind])))
        realised += x.m * x.n * (1 - x.realised)
    total = sum(x.m * x.n for x in found.linears)
    assert found.planned == pytest.approx(1 - read / total) and found.realised == pytest.approx(1 - realised / total)
    rotation = 2 * 64 * 64 * (2 if scope == "all" else 1) / total
    assert 1 - nominal / total - rotation == pytest.approx(float(sparsity))
    assert report.nominal == found.nominal == pytest.approx(float(p), abs=1e-9)


def test_overhead_is_one_square_matrix_a_block_and_site(build):
    linears = decoder_linears(build("bfloat16"))
    found = rotations.overhead(linears, ("attn_in", "mlp_in"))
    assert {name.rsplit(".", 1)[1] for name in found} == {f"{kind}_proj" for kind in TURNED}
    assert sum(found.values()) == 2 * 2 * 64 * 64 * 2  # bytes, blocks, sites
    per_byte = {x.name: found[x.name] / (x.shape[0] * x.shape[1] * 2) for x in linears if x.name in found}
    assert set(per_byte.values()) == {Fraction(64, 96), Fraction(64, 352)}
    assert rotations.overhead(linears, ()) == {}
    only_k = [x for x in linears if x.kind == "k"]
    assert sum(rotations.overhead(only_k, ("attn_in",)).values()) == 2 * 2 * 64 * 64


def test_second_moments_of_the_inputs(build, ids):
    model = build()
    inputs = recorded(model, ids)[0]
    linears = [x for x in decoder_linears(model) if x.kind in TURNED]
    found = rotations.second_moments(model, ids, linears)
    assert set(found) == {(layer, site) for layer in range(2) for site in SITES}
    for (layer, site), gram in found.items():
        x = next(x for x in linears if x.layer == layer and x.site == site)
        torch.testing.assert_close(gram, inputs[x.name].T @ inputs[x.name])


def test_eigenvectors_with_the_largest_first():
    X = torch.randn(200, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1.0, 13)
    V = eigenbasis((X.T @ X).float())
    assert V.dtype == torch.float64
    energy = (X @ V).square().sum(0)
    assert (energy[:-1] > energy[1:]).all() and energy[0] > 0.9 * torch.linalg.matrix_norm(X, 2) ** 2
    torch.testing.assert_close(V.T @ V, torch.eye(12, dtype=V.dtype))


def test_rotations_are_kept_on_disk(build, ids, logits, tmp_path, monkeypatch):
    model, store = build(), FactorStore(tmp_path)
    rsparse.sparsify(model, "larosa", 0.3, threshold="per-token", calibration=ids, store=store)
    first = logits(model, ids)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(store.computed) == 4
    rsparse.sparsify(model, "larosa", 0.3, threshold="per-token", calibration=ids[:3], store=store)  # other tokens
    assert len(list(tmp_path.glob("*.safetensors"))) == len(store.computed) == 8
    assert not logits(model, ids).equal(first)
    rsparse.sparsify(model, "wina-rotated", 0.3, threshold="per-token", store=store)
    turned = logits(model, ids)
    assert len(store.computed) == 12
    monkeypatch.setattr("rsparse.methods.larosa.second_moments", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr("rsparse.decompose.eigenbasis", lambda *_: pytest.fail("computed again"))
    rsparse.sparsify(model, "larosa", 0.3, threshold="per-token", calibration=ids, store=store)
    assert logits(model, ids).equal(first)
    rsparse.sparsify(model, "wina-rotated", 0.3, threshold="per-token", store=store)
    assert logits(model, ids).equal(turned)


def test_one_pass_finds_all_rotations(build, ids, tmp_path):
    model, passes = build(), []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    rsparse.sparsify(model, "larosa", 0.3, threshold="per-token", calibration=ids, store=FactorStore(tmp_path))
    assert len(passes) == len(ids)


def test_methods_do_not_share_statistics_of_other_bases(build, ids):
    """One `Calibration` for rotations to singular vectors, to principal directions, and none."""
    shared, model = {}, build(**SQUARE)
    calibration = Calibration(model, ids)
    for method in ("teal", "larosa", "wina-rotated", "wina"):
        options = dict(threshold="static-dense", calibration=calibration)
        shared[method] = rsparse.sparsify(model, method, 0.3, **options).linears
        fresh = rsparse.sparsify(model, method, 0.3, **options | dict(calibration=ids)).linears
        assert shared[method] == fresh
    q = {method: lines[0].threshold for method, lines in shared.items()}
    assert q["teal"] == q["wina"] and len(set(q.values())) == 3


M, N = 24, 32


def make(kept=12, threshold=None, norms=False, tokens="all", bias=False):
    """A RotatedLinear whose protocol stands at a forward pass of 2 x 10 positions."""
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(N, M, bias=bias, dtype=torch.float64).requires_grad_(False)
    dense.weight.normal_(generator=generator)
    V = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64)).Q
    protocol = TokenProtocol(tokens)
    protocol.begin(input_ids=torch.zeros(2, 10, dtype=torch.long))
    weights = (dense.weight @ V).norm(dim=0) if norms else None
    return RotatedLinear(dense, Split(kept, 0, Fraction(0)), protocol, Rotation(V, "test"), weights, threshold)


def inputs_of_linear():
    return torch.randn(2, 10, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CONFIGURATIONS = {
    "per token": dict(),
    "static": dict(threshold=0.8),
    "column norm": dict(norms=True),
    "column norm, static": dict(norms=True, threshold=4.0),
    "bias": dict(bias=True),
    "nothing": dict(kept=0),
}
every_configuration = pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)


@every_configuration
@pytest.mark.parametrize("tokens", ["all", 0.5])
def test_one_linear_by_hand(configuration, tokens):
    linear, x = make(**configuration, tokens=tokens), inputs_of_linear()
    linear.tally = KeptTally()
    found, W, V = linear(x), linear.weight, linear.rotation.V
    kept = []
    for row in range(2):
        for position in range(10):
            z = V.T @ x[row, position]
            score = z.abs()
            if linear.norms is not None:
                score = score * torch.tensor([float((W @ V[:, j]).norm()) for j in range(N)])
            if linear.split.kept == 0:
                keep = torch.zeros(N, dtype=torch.bool)
            elif linear.threshold is None:
                keep = score >= score.sort(descending=True).values[linear.split.kept - 1]
            else:
                keep = score > linear.threshold
            if tokens == 0.5 and position < 5:
                keep[:] = True
            else:
                kept.append(int(keep.sum()))
            y = (W @ V)[:, keep] @ z[keep] + (0 if linear.bias is None else linear.bias)
            torch.testing.assert_close(found[row, position], y, rtol=0, atol=1e-12)
    assert linear.tally.tokens == len(kept) and linear.tally.mean == pytest.approx(sum(kept) / len(kept))
    if tokens == 0.5:
        assert found[:, :5].equal(linear.dense(x)[:, :5])


@every_configuration
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", ["all", 0.5])
def test_what_is_not_finite_surfaces(configuration, bad, tokens):
    linear = make(**configuration, tokens=tokens)
    for position in (2, 7):
        x = inputs_of_linear()
        x[1, position, 5] = bad
        lost = ~torch.isfinite(linear(x)).all(-1)
        assert lost[1, position] and lost.sum() == 1


def test_no_sparse_position_calls_the_plain_linear():
    linear, x = make(tokens="decode"), inputs_of_linear()
    assert linear(x).equal(linear.dense(x))


def test_linears_of_a_site_share_one_rotation_and_no_weight_is_copied(build):
    model = build("bfloat16")
    pointers = {x.name: x.module.weight.data_ptr() for x in decoder_linears(model)}
    parameters = sum(p.numel() for p in model.parameters())
    rsparse.sparsify(model, "wina-rotated", 0.3, threshold="per-token")
    found = modules_of(model)
    assert len({id(x.rotation) for x in found.values()}) == 4
    assert all(x.rotation.V.dtype == torch.bfloat16 for x in found.values())
    assert all(x.weight.data_ptr() == pointers[name] for name, x in found.items())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert protocol_of(model) is found["model.layers.0.self_attn.q_proj"].protocol
    assert not [key for key in model.state_dict() if "rotation" in key or key.endswith("norms")]
