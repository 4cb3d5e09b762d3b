"""`sparsify` and `restore` on every kind of model: dense bit for bit where it should be, never half done."""

import math
import re

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from hypothesis import given, settings
from hypothesis import strategies as st

import rsparse
from rsparse import Recipe
from rsparse.apply import REALISED_TOKENS, protocol_of, report_of, tokens_as
from rsparse.decompose import FactorStore
from rsparse.linears import SparseLinear
from rsparse.models import (
    KINDS,
    decoder_linears,
    load_model,
    load_tokenizer,
    random_model,
    scope_share,
    shape_config,
)
from rsparse.recipe import Ask
from rsparse.texts import token_ids

MODELS = {
    "multi-head": dict(num_key_value_heads=8),
    "grouped 2": dict(num_key_value_heads=4),
    "grouped 4": dict(num_key_value_heads=2),
    "grouped 8": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "bias": dict(attention_bias=True, mlp_bias=True),
    "mistral": dict(shape="mistral-7b"),
    "sliding window": dict(shape="mistral-7b", sliding_window=5),
    "bfloat16": dict(dtype="bfloat16"),
    "float16": dict(dtype="float16"),
    "float32": dict(dtype="float32"),
}
every_model = pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
ASKED = {
    "teal": dict(method="teal"),
    "low-rank": dict(method="low-rank"),
    "r-sparse": dict(method="r-sparse"),
    "column norm": dict(method="r-sparse", score="column-norm", rho=0.8),
    "sequential": dict(method="r-sparse", threshold="static-sequential"),
    "per token": dict(method="r-sparse", threshold="per-token", tokens="decode"),
    "attention": dict(method="r-sparse", scope="attention", sparsity=0.2),
}
every_request = pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)


def sparse_linears(model) -> dict[str, SparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}



@every_model
@every_request
def test_sparse_then_dense_again_bit_for_bit(build, ids, logits, sizes, asked):
    model = build(**sizes)
    before, modules = logits(model, ids), [x.module for x in decoder_linears(model)]
    names = [name for name, _ in model.named_parameters()]
    report = rsparse.sparsify(model, **dict(sparsity=0.5, calibration=ids) | asked)
    with tokens_as(model, "all"):
        assert not logits(model, ids).equal(before) and torch.isfinite(logits(model, ids)).all()
    assert report.asked <= report.planned + 1e-12
    rsparse.restore(model)
    assert logits(model, ids).equal(before)
    assert all(x.module is module for x, module in zip(decoder_linears(model), modules, strict=True))
    assert [name for name, _ in model.named_parameters()] == names and report_of(model) is protocol_of(
        model
    ) is None
    assert not any(m._forward_pre_hooks for m in model.modules())
    rsparse.restore(model)  # harmless


@every_model
@pytest.mark.parametrize("method", [name for name in rsparse.METHODS if name != "relufication"])  # it has no knob
def test_no_sparsity_is_the_dense_model_bit_for_bit(build, ids, logits, sizes, method):
    model = build(**sizes)
    before = logits(model, ids)
    for rho in (0.0, 0.5, 1.0):
        report = rsparse.sparsify(model, method, 0.0, rho=rho)  # and needs no calibration
        assert logits(model, ids).equal(before)
        assert report.asked == report.planned == report.realised == 0
        assert all((x.kept, x.rank, x.threshold, x.read) == (x.n, 0, -math.inf, 1) for x in report.linears)


def test_each_call_starts_from_the_dense_model(build, ids, logits):
    model, twin = build(), build()
    for asked in (*ASKED.values(), *reversed(ASKED.values())):
        asked = dict(sparsity=0.5, calibration=ids, tokens="all") | asked
        rsparse.sparsify(model, **asked)
        rsparse.restore(twin)
        rsparse.sparsify(twin, **asked)
        assert logits(model, ids).equal(logits(twin, ids))
    rsparse.restore(model)
    assert logits(model, ids).equal(logits(build(), ids))


@pytest.mark.parametrize("tokens", ["decode", 0.5, 13])
def test_calibration_does_not_depend_on_the_token_rule(build, ids, tokens):
    model = build()
    everywhere, some = (
        rsparse.sparsify(model, "teal", 0.5, tokens=t, calibration=ids) for t in ("all", tokens)
    )
    assert everywhere.linears == some.linears and some.tokens == tokens == protocol_of(model).tokens


BAD = {
    "method": (dict(method="magic"), "method is 'magic'; expected one of dense"),
    "sparsity 1": (dict(sparsity=1.0), r"sparsity is 1.0; expected a number in \[0, 1\)"),
    "sparsity below 0": (dict(sparsity=-0.1), "sparsity is -0.1"),
    "sparsity NaN": (dict(sparsity=math.nan), "sparsity is nan"),
    "sparsity text": (dict(sparsity="0.5"), "sparsity is '0.5'"),
    "rho above 1": (dict(rho=1.1), r"rho is 1.1; expected a number in \[0, 1\]"),
    "rho NaN": (dict(rho=math.nan), "rho is nan"),
    "rho of another method": (dict(method="teal", rho=-1), "rho is -1"),
    "score": (dict(score="l1"), "score is 'l1'; expected one of 'magnitude', 'column-norm'"),
    "threshold": (dict(threshold="top"), "threshold is 'top'; expected one of 'static'"),
    "tokens": (dict(tokens="prompt"), "tokens is 'prompt'; expected one of 'all'"),
    "tokens, share": (dict(tokens=1.5), "tokens is 1.5"),
    "scope": (dict(scope="ffn"), "scope is 'ffn'; expected one of 'all', 'attention', 'mlp'"),
    "out of the scope's reach": (
        dict(scope="attention", sparsity=0.5),
        "cannot be reached within scope 'attention'",
    ),
    "no calibration": (dict(calibration=None), "calibration is None; static thresholds need token ids"),
    "empty calibration": (dict(calibration=torch.zeros(0, 4, dtype=torch.long)), "calibration has shape"),
    "calibration of floats": (dict(calibration=torch.zeros(2, 4)), "calibration is a torch.float32"),
    "ids too large": (
        dict(calibration=torch.tensor([[96, 97]])),
        "calibration holds token id 97; expected 0..96",
    ),
    "ids below 0": (dict(calibration=torch.tensor([[0, -3]])), "calibration holds token id -3"),
    "recipe of another model": (dict(recipe="other"), "recipe 'uniform-1' is for the model with fingerprint"),
    "recipe for teal": (dict(recipe="own", method="teal"), "method 'teal' takes no recipe"),
    "recipe as a path": (dict(recipe="path"), "recipe is 'recipe.json'; expected a Recipe"),
}


@pytest.mark.parametrize("sparse_before", [False, True])
@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_bad_input_changes_nothing(build, ids, logits, monkeypatch, bad, message, sparse_before):
    model = build()
    if sparse_before:
        rsparse.sparsify(model, sparsity=0.4, rho=0.7, tokens=-20, calibration=ids)
    before, report, modules = logits(model, ids), report_of(model), list(model.modules())
    recipes = {
        "other": Recipe.uniform(build(seed=1), 0.5, 1.0),
        "own": Recipe.uniform(model, 0.5, 1.0),
        "path": "recipe.json",
    }
    if "recipe" in bad:
        bad = bad | {"recipe": recipes[bad["recipe"]]}
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "forward", lambda *a, **k: pytest.fail("computed before the check"))
        with pytest.raises((ValueError, TypeError), match=message) as error:
            rsparse.sparsify(model, **dict(sparsity=0.5, calibration=ids) | bad)
    assert len(str(error.value)) < 250 and str(error.value).count(". ") <= 1
    assert logits(model, ids).equal(before) and report_of(model) is report
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("threshold", "passes"),
    [("static", 0), ("static", 5), ("static", 7), ("static-dense", 1), ("static-dense", 5)]
    + [("static-sequential", 0), ("static-sequential", 2)],
)
@pytest.mark.parametrize("sparse_before", [False, True])
def test_an_error_half_way_changes_nothing(build, ids, logits, error, threshold, sparse_before, passes):
    """Whether it strikes in calibration, dense or sparse, or in measuring what was realised."""
    model = build()
    if sparse_before:
        rsparse.sparsify(model, sparsity=0.4, rho=0.7, tokens=-20, calibration=ids)
    before, report = logits(model, ids), report_of(model)
    calls = iter(range(1000))

    def strike(*_):
        if next(calls) == passes:
            raise error

    handle = model.model.layers[1].mlp.register_forward_pre_hook(strike)
    with pytest.raises(error):
        rsparse.sparsify(model, sparsity=0.5, threshold=threshold, calibration=ids)
    handle.remove()
    assert logits(model, ids).equal(before) and report_of(model) is report
    assert not any(x.tally for x in sparse_linears(model).values())
    rsparse.restore(model)
    assert logits(model, ids).equal(logits(build(), ids))


def test_unsupported_models():
    with pytest.raises(
        ValueError, match="model is of type 'Linear'; expected a causal LM of the family llama or mistral"
    ):
        rsparse.sparsify(torch.nn.Linear(2, 2))


@settings(max_examples=25)
@given(
    st.decimals("0.01", "0.95", places=2).map(float),
    st.decimals(0, 1, places=2).map(float),
    st.sampled_from(["all", "mlp"]),
)
def test_never_over_budget_and_close_to_it(sparsity, rho, scope):
    model = WIDE.setdefault("model", wide())
    share = float(scope_share(decoder_linears(model), scope))
    if sparsity >= share:
        with pytest.raises(ValueError, match="cannot be reached"):
            rsparse.sparsify(model, sparsity=sparsity, rho=rho, scope=scope, threshold="per-token")
        return
    report = rsparse.sparsify(model, sparsity=sparsity, rho=rho, scope=scope, threshold="per-token")
    dense = sum(x.m * x.n for x in report.linears)
    read = sum(x.kept * x.m + x.rank * (x.m + x.n) for x in report.linears)
    assert report.planned == pytest.approx(1 - read / dense, abs=1e-12)
    assert sparsity - 1e-12 <= report.planned <= sparsity + 0.005
    assert report.asked == pytest.approx(sparsity, abs=1e-9) and report.realised == pytest.approx(
        report.planned
    )
    outside = [x for x in report.linears if scope == "mlp" and x.kind in "qkvo"]
    assert all(x.read == 1 and x.sparsity == 0 for x in outside) and len(outside) in (0, 4)


WIDE: dict = {}


def wide():
    """One block as wide as models are, of random weights; its factors are made once and stored."""
    sizes = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=1, num_attention_heads=8)
    return random_model(shape_config("llama-2-7b", vocab_size=97, num_key_value_heads=4, **sizes))


@pytest.mark.parametrize("threshold", ["static", "static-sequential"])
@pytest.mark.parametrize("method", ["teal", "r-sparse"])
def test_realised_against_planned_on_other_text(build, threshold, method):
    """Model-level, over every position of text that was not calibrated on."""
    model = build("float32", hidden_size=128, intermediate_size=352)
    text = torch.randint(0, 97, (24, 64), generator=torch.Generator().manual_seed(5))
    report = rsparse.sparsify(model, method, 0.5, threshold=threshold, calibration=text[:16])
    found = rsparse.measure(model, text[16:])
    assert abs(found.realised - found.planned) <= 0.01
    assert abs(report.realised - report.planned) <= 0.01
    assert 0 < found.spread < 0.2 and found.worst in found.linears
    assert all(
        abs(x.realised - (1 - x.read)) <= abs(found.worst.realised - (1 - found.worst.read))
        for x in found.linears
    )
    for name in ("asked", "planned", "realised", found.worst.name):
        assert name in str(found)


ALL_KEPT = ("griffin", "low-rank", "larosa", "dense")
TOUCHED = {"cats": {"up", "down"}, "griffin": {"gate", "up", "down"}, "dense": set()}


@pytest.mark.parametrize("method", ["teal", "cats", *ALL_KEPT])
def test_a_report_names_a_linear_only_where_one_left_its_plan(build, ids, method):
    """None that the method leaves dense, and none of plans that were kept, whatever a rotation costs."""
    model = build()
    rsparse.sparsify(model, method, 0.2, calibration=ids[:2])
    found = rsparse.measure(model, ids[2:])
    touched = {x.kind for x in found.linears if x.touched}
    assert touched == TOUCHED.get(method, set(KINDS)) and (found.worst.kind in touched or method == "dense")
    _, told, named = str(found).partition(" (farthest from its plan: ")
    assert bool(told) == (method not in ALL_KEPT)
    if told:
        worst = found.worst
        assert named == f"{worst.name}, {worst.realised:.4f} instead of {1 - worst.read:.4f})"


def test_measured_sparsity_by_counting(build, ids):
    """Realised: bytes counted from masks of a hook; spread: over tokens."""
    model = build()
    report = rsparse.sparsify(model, sparsity=0.5, rho=0.8, tokens=0.9, calibration=ids)
    masks: dict[str, list] = {}
    for name, module in sparse_linears(model).items():
        module.register_forward_pre_hook(
            lambda m, args, name=name: masks.setdefault(name, []).append(
                (args[0].abs().float() > m.threshold).sum(-1)[0]
            )
        )
    found = rsparse.measure(model, ids)
    assert protocol_of(model).tokens == 0.9
    for x in found.linears:
        kept = torch.cat(masks[x.name]).double()
        assert kept.numel() == ids.numel()
        assert x.realised == pytest.approx(1 - float(kept.mean()) / x.n - x.rank * (x.m + x.n) / (x.m * x.n))
        assert x.spread == pytest.approx(float(kept.std(correction=0)) / x.n)
    assert found.linears == report.linears  # sparsify measured the same ids


def test_measure_wants_a_sparse_model(build, ids):
    with pytest.raises(ValueError, match="the model is dense"):
        rsparse.measure(build(), ids)


def test_the_table_has_a_row_per_linear(build):
    table = rsparse.sparsify(build(), sparsity=0.5, threshold="per-token").table()
    assert len(table) == 14 and {"name", "kept", "rank", "threshold", "read", "realised", "spread"} <= set(
        table
    )
    assert table.threshold.isna().all() and (table.spread == 0).all()


def test_recipes_decide_linear_by_linear(build, ids, logits):
    model = build()
    recipe = Recipe.uniform(model, 0.5, 0.9)
    names = list(recipe.linears)
    recipe.linears.update({
        names[0]: Ask(0.0), names[1]: Ask(0.3, 0.5, "column-norm", "per-token"), names[6]: Ask(0.8, 0.0),
        names[9]: Ask(0.5, 1.0, "magnitude", "static-sequential"),
    })  # fmt: skip
    report = rsparse.sparsify(
        model, sparsity=0.1, rho=0.2, score="column-norm", recipe=recipe, calibration=ids
    )
    lines = {x.name: x for x in report.linears}
    for name, ask in recipe.linears.items():
        x = lines[name]
        assert (x.sparsity, x.rho, x.score) == (ask.sparsity, ask.rho, ask.score)
    assert lines[names[0]].read == 1 and lines[names[0]].threshold == -math.inf
    assert math.isnan(lines[names[1]].threshold) and lines[names[6]].threshold == math.inf
    assert math.isfinite(lines[names[9]].threshold) and not math.isnan(report.realised)
    sizes = [x.m * x.n for x in report.linears]
    asked = sum(
        s * recipe.linears[x.name].sparsity for s, x in zip(sizes, report.linears, strict=True)
    ) / sum(sizes)
    assert (
        report.asked == pytest.approx(asked) and report.recipe == recipe.name and report.threshold == "recipe"
    )


def test_a_uniform_recipe_is_the_plain_request(build, ids, logits, tmp_path):
    model = build()
    recipe = Recipe.uniform(model, 0.5, 0.8)
    recipe.save(tmp_path / "r.json")
    plain = rsparse.sparsify(model, sparsity=0.5, rho=0.8, calibration=ids)
    expected = logits(model, ids)
    by_recipe = rsparse.sparsify(model, recipe=Recipe.load(tmp_path / "r.json"), calibration=ids)
    assert by_recipe.linears == plain.linears and logits(model, ids).equal(expected)
    Recipe.uniform(model, 0.5, 0.8).check(model)  # of the sparse model, for the dense one
    in_scope = rsparse.sparsify(model, recipe=recipe, calibration=ids, scope="mlp")
    assert [x.sparsity for x in in_scope.linears] == [0, 0, 0, 0, 0.5, 0.5, 0.5] * 2


def test_the_authors_list_runs(build, ids, logits, tmp_path):
    model = build()
    path = tmp_path / "made-up.npy"
    path.write_text("\n".join(f"{v}" for v in ([1.0, 0.5] * 5 + [0.9, 0.5] * 2) * 2))
    report = rsparse.sparsify(model, recipe=Recipe.from_rsparse_list(path, model), calibration=ids)
    assert [(x.rho, x.score, x.rank > 0) for x in report.linears[4:6]] == [
        (1.0, "magnitude", False),
        (0.9, "column-norm", True),
    ]
    assert report.asked == pytest.approx(0.5) and torch.isfinite(logits(model, ids)).all()


def test_input_sparsity_keeps_no_second_copy_of_the_weights(build, ids):
    model = build("bfloat16")
    before = {x.name: (x.module.weight.data_ptr(), x.module) for x in decoder_linears(model)}
    parameters = sum(p.numel() for p in model.parameters())
    rsparse.sparsify(model, "teal", 0.5, calibration=ids)
    for name, module in sparse_linears(model).items():
        pointer, dense = before[name]
        assert module.weight.data_ptr() == pointer and module.dense is dense
        assert sum(b.numel() for b in module.buffers()) == 0
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


def test_low_rank_factors_are_stored_and_read_back(build, ids, logits, tmp_path, monkeypatch):
    model, store = build("float32"), FactorStore(tmp_path)
    rsparse.sparsify(model, sparsity=0.5, rho=0.5, threshold="per-token", store=store)
    first = logits(model, ids)
    assert len(list(tmp_path.glob("*.safetensors"))) == 14
    monkeypatch.setattr("rsparse.decompose.svd_factors", lambda *_: pytest.fail("computed again"))
    rsparse.sparsify(model, sparsity=0.5, rho=0.5, threshold="per-token", store=store)
    assert logits(model, ids).equal(first)
    rsparse.sparsify(model, sparsity=0.5, rho=0.9, threshold="per-token", store=store)  # smaller ranks


class TestPlacement:
    @pytest.fixture
    def folder(self, build, tmp_path):
        build("float32").save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
        return str(tmp_path)

    @every_request
    def test_sharded_and_dispatched_models_work_alike(self, folder, ids, logits, asked):
        """On a machine with several GPUs the parts lie on the first and on the last."""
        count = torch.cuda.device_count()
        home, away = ("cuda:0", f"cuda:{count - 1}") if count else ("cpu", "cpu")
        plain, auto = load_model(folder, device=home), load_model(folder, device_map="auto")
        hooked = dispatch_model(load_model(folder), {"": home}, main_device=home, force_hooks=True)
        split = {"model.embed_tokens": home, "model.layers.0": home, "model.layers.1": away}
        split |= {"model.norm": away, "model.rotary_emb": home, "lm_head": away}
        parts = dispatch_model(load_model(folder), split, main_device=home, force_hooks=True)
        on_home = ids.to(home)
        dense = logits(plain, on_home).cpu()
        found = []
        for model in (plain, auto, hooked, parts):
            rsparse.sparsify(model, **dict(sparsity=0.5, calibration=ids) | asked)
            found.append(logits(model, on_home).cpu())
            rsparse.restore(model)
            assert logits(model, on_home).cpu().equal(dense)
        assert all(x.equal(found[0]) for x in found)

    def test_offloaded_weights_are_refused(self, folder, ids, logits):
        model = cpu_offload(load_model(folder))
        before = logits(model, ids)
        with pytest.raises(ValueError, match=re.escape("'model.layers.0.self_attn.q_proj' is not in memory")):
            rsparse.sparsify(model, sparsity=0.5, calibration=ids)
        assert logits(model, ids).equal(before)


def test_tokens_as_is_for_the_time_being(build, ids, logits):
    model = build()
    dense = logits(model, ids)
    with tokens_as(model, "all"):  # no effect on a dense model
        assert logits(model, ids).equal(dense)
    rsparse.sparsify(model, sparsity=0.5, threshold="per-token", tokens="decode")
    assert logits(model, ids).equal(dense)  # a bare call is a prompt
    with pytest.raises(ZeroDivisionError), tokens_as(model, "all"):
        assert not logits(model, ids).equal(dense)
        raise ZeroDivisionError
    assert logits(model, ids).equal(dense)
    with pytest.raises(ValueError, match="tokens is 'some'"), tokens_as(model, "some"):
        pass
    assert protocol_of(model).tokens == "decode"


@pytest.mark.parametrize("where", ["embedding", "down"])
def test_nan_surfaces_in_the_logits(build, ids, logits, where):
    model = build()
    rsparse.sparsify(model, sparsity=0.5, calibration=ids)
    broken = (
        model.model.embed_tokens.weight[ids[0, 3]]
        if where == "embedding"
        else model.model.layers[0].mlp.down_proj.weight[3]
    )
    with torch.no_grad():
        broken[0] = math.nan
    assert torch.isnan(logits(model, ids[:1])[0, 3:]).any(-1).all()


class TestTiny:
    """The embedded default: a trained model, its own calibration text and held-out text."""

    CALIBRATION, HELDOUT = (8, 256), (4, 256)

    @pytest.fixture
    def tiny(self):
        tokenizer = load_tokenizer("tiny")
        texts = (("calibration", self.CALIBRATION), ("heldout", self.HELDOUT))
        return load_model("tiny"), *(token_ids("tiny", role, tokenizer, *size) for role, size in texts)

    @pytest.mark.parametrize("method", ["teal", "r-sparse", "low-rank"])
    @pytest.mark.parametrize("sparsity", [0.5, 0.7])
    def test_planned_requested_and_realised(self, tiny, method, sparsity):
        model, calibration, heldout = tiny
        report = rsparse.sparsify(model, method, sparsity, calibration=calibration)
        found = rsparse.measure(model, heldout)
        assert sparsity <= report.planned <= sparsity + 0.005
        assert abs(found.realised - found.planned) <= 0.01
        assert found.spread < 0.2 and abs(found.worst.realised - (1 - found.worst.read)) < 0.2

    def test_calibration_streams(self, tiny, monkeypatch):
        """No tensor of a static calibration is larger than one sample's, however many samples there are."""
        model, calibration, _ = tiny
        largest = []

        def see(module, args, output):
            largest.append(max(x.numel() for x in (*args, output) if isinstance(x, torch.Tensor)))

        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(see)
        for samples in (1, 8):
            largest.clear()
            rsparse.sparsify(model, "teal", 0.5, calibration=calibration[:samples])
            measured_at_once = max(1, REALISED_TOKENS // self.CALIBRATION[1])
            assert measured_at_once == 4 and len(largest) == 7 * 6 * (4 * samples + min(samples, measured_at_once))
            assert max(largest) == self.CALIBRATION[1] * model.config.intermediate_size

    def test_quality_falls_with_sparsity(self, tiny):
        model, calibration, heldout = tiny
        found = [rsparse.perplexity(model, heldout)]
        for sparsity in (0.3, 0.6):
            rsparse.sparsify(model, "teal", sparsity, threshold="per-token")
            found.append(rsparse.perplexity(model, heldout))
        assert found == sorted(found) and found[0] < model.config.vocab_size / 20
