"""The decode engine with the sparse kernels: what the evaluation's modules compute, and the model goes on as before."""

import copy

import pytest
import torch

import rsparse
from decoding import error, every_style, their_logits, theirs
from kernels import packing
from kernels.operations import Gemv
from kernels.triton_gemv import Configuration
from rsparse import int4
from rsparse.apply import counting
from rsparse.bench_decode.parts import step_parts
from rsparse.decode import Engine, gathering, generate, reference, stream
from rsparse.decode.gathering import Gathering, OneRow, unsupported, view_of
from rsparse.decode.projections import Fused
from rsparse.methods import METHODS

KERNELS = {
    "r-sparse": dict(rho=0.8),
    "r-sparse, column norm": dict(method="r-sparse", rho=0.8, score="column-norm"),
    "r-sparse, low rank alone": dict(method="r-sparse", rho=0.0),
    "r-sparse, mlp": dict(method="r-sparse", sparsity=0.3, scope="mlp"),
    "r-sparse, attention": dict(method="r-sparse", sparsity=0.2, scope="attention"),
    "low-rank": {}, "teal": {}, "wina": {}, "cats": dict(sparsity=0.2), "griffin": dict(sparsity=0.3),
}  # fmt: skip


def sparse(build, ids, asked, dtype="float32", name="r-sparse", **sizes):
    model = build(dtype, **sizes)
    options = dict(method=name, sparsity=0.5, calibration=ids, tokens="decode") | asked
    rsparse.sparsify(model, **options)
    return model


@pytest.mark.parametrize("name", KERNELS)
def test_as_the_evaluation(build, ids, name):
    model = sparse(build, ids, KERNELS[name], name=name.split(",")[0])
    engine = Engine(model)
    assert engine.linears == "kernels: cpu"
    for rows in (1, 4):
        expected = their_logits(model, ids[:rows], 20)
        assert error(engine.logits(ids[:rows], 20), expected) < 2e-5, rows
    rsparse.restore(model)
    assert error(engine.logits(ids, 20), their_logits(model, ids, 20)) > 1e-2  # so that agreement means something


@every_style
def test_tokens_of_every_style(build, ids, sizes):
    model = sparse(build, ids, dict(rho=0.8), **sizes)
    assert generate(model, ids[:1, :20], 40, stop=()).equal(theirs(model, ids[:1, :20], 40))
    assert len(list(stream(model, ids[:1, :20], 5, stop=()))) == 5


@pytest.mark.parametrize("asked", [{}, dict(scope="mlp", sparsity=0.3)], ids=["all", "mlp"])
def test_in_16_bits(build, ids, asked):
    """Masks flip next to a threshold, here as in the evaluation: as near to the exact logits as it is."""
    model = sparse(build, ids, dict(rho=0.8) | asked, "bfloat16")
    evaluated, found = (Engine(model, builder=x).logits(ids, 20) for x in (reference, None))
    exact = their_logits(copy.deepcopy(model).double(), ids, 20)
    assert error(found, exact) < 1.3 * error(evaluated, exact)


@pytest.mark.parametrize("asked", [dict(rho=0.8), dict(rho=0.8, scope="mlp", sparsity=0.3)], ids=["all", "mlp"])
def test_parts_of_a_step(build, ids, asked):
    model = sparse(build, ids, asked)
    parts = step_parts(Engine(model).prepare(1, 10, 10), 12, 2)
    assert min(parts[x] for x in parts if x != "left") > 0


def test_dense_products_stay_fused(build, ids):
    model = sparse(build, ids, dict(sparsity=0.3, scope="mlp"))
    step = Engine(model).decoder.blocks[0].step
    assert isinstance(step.qkv.product, Fused) and isinstance(step.gated, Gemv) and isinstance(step.down, Gemv)


def test_griffins_rows_choose_for_themselves(build, ids):
    model = sparse(build, ids, dict(sparsity=0.3), name="griffin")
    engine = Engine(model)
    for prompt in (ids[:1], ids[1:2], ids[:3]):  # one engine: every prompt chooses anew
        assert error(engine.logits(prompt, 30), their_logits(model, prompt, 30)) < 2e-5


def test_layers_share_memory_for_sums(build, ids, monkeypatch):
    model = sparse(build, ids, dict(rho=0.8))
    made = []

    class Noted(Gemv):
        def __init__(self, *args, like, after, **named):
            made.append((like is None, after is None))
            super().__init__(*args, like=like, after=after, **named)

    monkeypatch.setattr("rsparse.decode.gathering.Gemv", Noted)
    Engine(model)
    assert [like for like, _ in made] == [True] * 4 + [False] * 4
    assert [after for _, after in made] == [True, True, False, True] + [False, True] * 2  # gate and up follow o


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors under the interpreter")
def test_a_batch_has_launches_of_its_own(build, ids, monkeypatch):
    """Of the Triton kernel, cut up anew when the number of rows changes, and back again."""
    asked = []

    def configuration(packed, gated, shares, front, rows):
        asked.append(rows)
        return Configuration(32, 16, 3 if rows == 1 else 2, 1, rows > 1)

    monkeypatch.setattr(gathering, "_configuration", configuration)
    monkeypatch.setattr(Gemv, "takes", lambda module, tokens: "triton" if tokens <= module.most_tokens else "dense")
    model = sparse(build, ids, dict(rho=0.8))
    engine = Engine(model)
    made = [x for block in engine.decoder.blocks for x in vars(block.step).values()]
    for rows in (1, 3, 1):
        assert error(engine.logits(ids[:rows, :21], 20), their_logits(model, ids[:rows, :21], 20)) < 2e-5, rows
        assert {x.configuration.splits for x in made} == {2 if rows > 1 else 3}
        assert all(x.takes(rows) == "triton" for x in made)
        assert len({x.work[0].data_ptr() for x in made}) == 4  # still shared
    assert asked == [1] * 4 + [4] * 4 + [1] * 4  # three rows are four's


@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors under the interpreter")
def test_an_interrupted_batch_is_cut_up_again(build, ids, monkeypatch):
    monkeypatch.setattr(gathering, "_configuration", lambda *_: Configuration(32, 16, 3, 1, True))
    monkeypatch.setattr(Gemv, "takes", lambda module, tokens: "triton" if tokens <= module.most_tokens else "dense")
    model = sparse(build, ids, dict(rho=0.8))
    engine, asked = Engine(model), []

    def interrupted(*_):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return Configuration(32, 16, 2, 1, True)

    monkeypatch.setattr(gathering, "_configuration", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.prepare(2, 20, 1)
    engine.prepare(2, 20, 1)
    made = [x for block in engine.decoder.blocks for x in vars(block.step).values()]
    assert {(x.most_tokens, x.configuration.splits) for x in made} == {(2, 2)} and len(asked) == 2 + 4


REASONS = {
    "float64": (dict(dtype="float64"), {}, "weights are torch.float64"),
    "per token": ({}, dict(threshold="per-token"), "has a threshold for every token"),
    "rotated": ({}, dict(method="larosa", sparsity=0.3), "is a RotatedLinear"),
    "chess": ({}, dict(method="chess", sparsity=0.3), "is switched off by another rule"),
    "relu": ({}, dict(method="relufication"), "is switched off by another rule"),
    "griffin": ({}, dict(method="griffin", scope="all", sparsity=0.3), "the prompt chooses channels of model.layers.0"),
    "activation": (dict(hidden_act="gelu"), {}, "the activation is gelu"),
}


@pytest.mark.parametrize("sizes, asked, reason", REASONS.values(), ids=REASONS)
def test_what_kernels_do_not_compute_is_computed_by_the_evaluation(build, ids, sizes, asked, reason):
    model = build(**dict(dtype="float32") | sizes)
    rsparse.sparsify(model, **dict(sparsity=0.5, rho=0.8, calibration=ids, tokens="decode") | asked)
    assert reason in unsupported(model)
    engine = Engine(model)
    assert engine.linears.startswith("reference: ") and reason in engine.linears
    assert error(engine.logits(ids, 20), their_logits(model, ids, 20)) < 2e-5
    with pytest.raises(ValueError, match="expected what the kernels compute, or builder=rsparse.decode.reference"):
        Gathering(model)


def test_every_method_has_been_thought_of():
    tried = {name.split(",")[0] for name in KERNELS} | {"larosa", "chess", "relufication", "dense"}
    assert set(METHODS) - tried <= {"teal-greedy", "wina-rotated"}  # as teal and larosa


def test_masks_cannot_be_counted_by_kernels(build, ids):
    model = sparse(build, ids, dict(rho=0.8))
    engine = Engine(model)
    with counting(model), pytest.raises(ValueError, match="expected an engine with builder=rsparse.decode.reference"):
        engine.generate(ids[:1], 5)
    with counting(model) as realised:
        Engine(model, builder=reference).generate(ids[:1], 30, stop=())
        assert 0.3 < realised().realised < 0.7


@torch.no_grad()
def test_a_table_holds_the_models_own_weights(build, ids):
    """Parameters and factors are views, values the same bit for bit."""
    model = sparse(build, ids, dict(rho=0.8))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    attention = model.model.layers[0].self_attn
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    factors = [(x.A.clone(), x.B.clone()) for x in linears]
    expected = their_logits(model, ids, 20)
    packed = packing.pack([packing.Segment(x.weight, 0.5, x.A, x.B) for x in linears])
    view_of(packed, linears)
    for linear, (A, B) in zip(linears, factors, strict=True):
        assert linear.weight.untyped_storage().data_ptr() == packed.table.untyped_storage().data_ptr()
        assert linear.A.untyped_storage().data_ptr() == packed.table.untyped_storage().data_ptr()
        assert linear.A.equal(A) and linear.B.equal(B)
    assert all(x.equal(before[name]) for name, x in model.state_dict().items())
    assert error(their_logits(model, ids, 20), expected) < 1e-6
    packed.table.zero_()
    assert not attention.q_proj.weight.any()


@torch.no_grad()
def test_a_sparse_model_is_held_once(build, ids):
    """By an engine, too."""
    model = sparse(build, ids, dict(rho=0.8))
    engine = Engine(model)
    for block, layer in zip(engine.decoder.blocks, model.model.layers, strict=True):
        made, own = vars(block.step).values(), [*layer.self_attn.children(), *layer.mlp.children()]
        tables = {x.packed.table.untyped_storage().data_ptr() for x in made}
        weights = {x.weight.untyped_storage().data_ptr() for x in own if hasattr(x, "weight")}
        assert len(tables) == 4 and weights == tables


@torch.no_grad()
def test_weights_are_laid_out_again(build, ids):
    """After a table, for methods that read rows as they were stored, and for a dense engine."""
    model = sparse(build, ids, dict(rho=0.8))
    for layer in model.model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            view_of(packing.pack([packing.Segment(linear.weight, 0.5, linear.A, linear.B)]), [linear])
    assert not model.model.layers[0].mlp.gate_proj.weight.is_contiguous()
    rsparse.sparsify(model, "cats", 0.2, calibration=ids, tokens="decode")
    assert error(Engine(model).logits(ids[:1], 20), their_logits(model, ids[:1], 20)) < 2e-5
    assert model.model.layers[0].mlp.gate_proj.weight.is_contiguous()
    rsparse.restore(model)
    assert generate(model, ids, 20, stop=()).equal(theirs(model, ids, 20))


# INT4


@pytest.mark.parametrize("name", ["dense", "r-sparse", "teal"])
def test_int4_words(build, ids, monkeypatch, name):
    """On a GPU's layout of words: one token by them, several rows and the prompt by the numbers they stand for."""
    model = build("float32", hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    int4.hang(model, lambda linear: int4.nearest(linear.module.weight))
    if name != "dense":
        rsparse.sparsify(model, name, 0.5, rho=0.8, calibration=ids, tokens="decode")
    monkeypatch.setattr(gathering, "_words", lambda x: isinstance(gathering._own(x), int4.Int4Linear))
    expected = their_logits(model, ids, 20)
    engine = Engine(model)
    assert engine.linears == "kernels: cpu, INT4 for one row"
    step = engine.decoder.blocks[0].step
    slots = [step.qkv, step.out, step.gated, step.down]
    assert all(isinstance(x, OneRow) and x.kernel.packed.table.dtype == torch.int32 for x in slots)
    for rows in (1, 3):
        assert error(engine.logits(ids[:rows], 20), expected[:rows]) < 2e-5, rows


def test_int4_neurons_have_no_kernel_of_words(build, ids, monkeypatch):
    """A CPU computes with the numbers that the words stand for, by the kernels that it has."""
    model = build("float32", hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    int4.hang(model, lambda linear: int4.nearest(linear.module.weight))
    rsparse.sparsify(model, "cats", 0.2, calibration=ids, tokens="decode")
    assert unsupported(model) is None
    assert error(Engine(model).logits(ids[:1], 20), their_logits(model, ids[:1], 20)) < 2e-5
    monkeypatch.setattr(gathering, "_words", lambda x: isinstance(gathering._own(x), int4.Int4Linear))
    assert "is a SparseActivation of INT4 weights" in unsupported(model)


def test_an_engine_belongs_to_its_codes(build, ids, monkeypatch):
    """Other codes may come to lie where its own did."""
    monkeypatch.setattr("rsparse.decode.engine._places", lambda model: "as before")
    model = build("float32", hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    int4.hang(model, lambda linear: int4.nearest(linear.module.weight))
    engine = Engine(model)
    assert engine.fits(model)
    int4.restore(model)
    int4.hang(model, lambda linear: int4.nearest(-linear.module.weight))
    assert not engine.fits(model)
