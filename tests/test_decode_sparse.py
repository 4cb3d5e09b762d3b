"""The decode engine on sparse models: what the sparsified Hugging Face model computes, prompt dense."""

import copy

import pytest
import torch
from torch import nn

import rsparse
from decoding import STYLES, error, every_style, share_equal, their_logits, theirs
from rsparse.apply import counting, protocol_of, tokens_as
from rsparse.decode import Engine, dense, engine_of, generate, reference
from rsparse.decode.projections import Added, Normed, Projections
from rsparse.replay import recording, replaying

ASKED = {
    "r-sparse": dict(rho=0.8),
    "r-sparse, column norm": dict(method="r-sparse", rho=0.8, score="column-norm"),
    "r-sparse, per token": dict(method="r-sparse", rho=0.8, threshold="per-token"),
    "r-sparse, mlp": dict(method="r-sparse", sparsity=0.3, scope="mlp"),
}
ASKED |= {name: dict(method=name, sparsity=0.3) for name in rsparse.METHODS if name != "r-sparse"}
every_method = pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)


@every_method
def test_every_method_is_what_the_evaluation_computes(build, ids, asked):
    model = build()
    rsparse.sparsify(model, **dict(calibration=ids, tokens="all") | asked)
    with tokens_as(model, "decode"):
        expected, tokens = their_logits(model, ids, 20), theirs(model, ids[:, :20], 30)
    dense_logits = None if asked.get("method") == "dense" else Engine(model).logits(ids, 40)
    assert error(Engine(model).logits(ids, 20), expected) < 1e-6
    assert generate(model, ids[:, :20], 30, stop=()).equal(tokens)
    rsparse.restore(model)
    if dense_logits is not None:
        assert error(Engine(model).logits(ids, 20), expected) > 1e-2  # so that agreement means something
        assert error(Engine(model).logits(ids, 40), dense_logits) < 1e-6  # the prompt was dense


@every_style
def test_sparse_tokens_over_200_steps_in_float64(build, ids, sizes):
    model = build(**sizes)
    rsparse.sparsify(model, sparsity=0.5, rho=0.8, calibration=ids, tokens="decode")
    assert generate(model, ids[:2, :20], 200, stop=()).equal(theirs(model, ids[:2, :20], 200))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@every_style
def test_replayed_masks_leave_rounding_alone(build, ids, sizes, dtype, record_property):
    """As near to the exact logits as the evaluation is, all three with the masks of its run."""
    model = build(dtype, **sizes)
    rsparse.sparsify(model, sparsity=0.5, rho=0.8, calibration=ids, tokens="decode")
    with recording(model) as tape:
        evaluated = their_logits(model, ids, 20)
    wide = copy.deepcopy(model).double()
    with replaying(wide, tape):
        exact = their_logits(wide, ids, 20)
    with replaying(model, tape):
        found = Engine(model, builder=reference).logits(ids, 20)
    bound = 1.3 * error(evaluated, exact)
    assert error(found, exact) <= bound
    record_property("error over bound", error(found, exact) / bound)
    others = {name: [masks[0]] * len(masks) for name, masks in tape.items()}
    with replaying(model, others):
        assert error(Engine(model, builder=reference).logits(ids, 20), exact) > bound
    share = share_equal(generate(model, ids[:, :20], 60, stop=()), theirs(model, ids[:, :20], 60), 20)
    print(f"{dtype}: {share:.3f} of the free-running sparse tokens equal the evaluation's")
    record_property("share of equal tokens", share)
    assert share > 0.1


def test_the_rule_of_the_model_is_left_alone(build, ids):
    model = build()
    rsparse.sparsify(model, "teal", 0.5, tokens=-0.5, calibration=ids)
    before = their_logits(model, ids, 20)
    generate(model, ids, 5)
    assert protocol_of(model).tokens == -0.5 and their_logits(model, ids, 20).equal(before)


def test_an_engine_goes_with_its_method(build, ids):
    model = build()
    engine = engine_of(model)
    rsparse.sparsify(model, "teal", 0.5, calibration=ids)
    assert not engine.fits(model)
    sparse = engine_of(model)
    assert sparse is engine_of(model) is not engine
    rsparse.sparsify(model, "teal", 0.4, calibration=ids)
    assert engine_of(model) is not sparse
    rsparse.restore(model)
    assert generate(model, ids, 20, stop=()).equal(theirs(model, ids, 20))


def test_masks_are_counted_while_decoding(build, ids):
    model = build()
    planned = rsparse.sparsify(model, "teal", 0.5, threshold="per-token", calibration=ids)
    with counting(model) as realised:
        generate(model, ids[:, :5], 11, stop=())
        counted = realised()
    assert counted.realised == pytest.approx(planned.planned)


@pytest.mark.parametrize("change, message", {
    "too few": (lambda masks: masks[:-1], "has ended at pass 9"),
    "too many": (lambda masks: masks + masks[:1], "has masks left over"),
    "another shape": (lambda masks: [x[:2] for x in masks], r"holds \(2, 1, 64\) at pass 0; expected \(4, 1, 64\)"),
}.values())  # fmt: skip
def test_a_tape_that_does_not_fit(build, ids, change, message):
    model = build()
    with pytest.raises(ValueError, match="the model is dense"), recording(model):
        pass
    rsparse.sparsify(model, "teal", 0.2, calibration=ids, scope="attention")
    with recording(model) as tape:
        Engine(model).logits(ids[:, :30], 20)
    with pytest.raises(ValueError, match=message), replaying(model, {x: change(masks) for x, masks in tape.items()}):
        Engine(model).logits(ids[:, :30], 20)
    with pytest.raises(ValueError, match="expected the same ones"), replaying(model, {}):
        pass
    with replaying(model, tape):
        Engine(model).logits(ids[:, :30], 20)  # nothing is left hanging


class Gathered(nn.Module):
    """One token's product from the kept columns alone, as a kernel computes it."""

    def __init__(self, linears, gated=False):
        super().__init__()
        self.linears, self.gated = linears, gated

    def one(self, linear, x):
        keep = (x[0, 0].abs() * (1 if linear.norms is None else linear.norms) > linear.threshold).nonzero()[:, 0]
        y = x[..., keep] @ linear.weight[:, keep].T
        dropped = x.index_fill(-1, keep, 0.0)
        return y if linear.A is None else y + dropped @ linear.B @ linear.A.T

    def forward(self, x):
        y = [self.one(linear, x) for linear in self.linears]
        return nn.functional.silu(y[0]) * y[1] if self.gated else torch.cat(y, -1)


def gathered(layer):
    """A builder that keeps one set of products for the prompt and another for single tokens."""
    a, m = layer.self_attn, layer.mlp
    step = Projections(
        Normed(layer.input_layernorm, Gathered([a.q_proj, a.k_proj, a.v_proj])), Added(Gathered([a.o_proj])),
        Normed(layer.post_attention_layernorm, Gathered([m.gate_proj, m.up_proj], gated=True)),
        Added(Gathered([m.down_proj])),
    )  # fmt: skip
    return reference(layer)[0], step


@pytest.mark.parametrize("score", ["magnitude", "column-norm"])
def test_products_can_be_exchanged(build, ids, score):
    model = build(**STYLES["llama-3"])
    rsparse.sparsify(model, sparsity=0.5, rho=0.8, score=score, calibration=ids, tokens="decode")
    expected = theirs(model, ids[:1, :20], 50)
    assert Engine(model, builder=gathered).generate(ids[:1, :20], 50, stop=()).equal(expected)


def test_dense_products_of_a_sparse_model_are_refused(build, ids):
    model = build()
    rsparse.sparsify(model, "teal", 0.5, calibration=ids)
    with pytest.raises(ValueError, match="q_proj is a SparseLinear; expected a dense model"):
        Engine(model, builder=dense)
