"""The decode engine against Hugging Face: the same tokens, the same logits, and what it refuses."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import rsparse
from decoding import LLAMA_3, STYLES, error, every_style, share_equal, their_logits, theirs
from rsparse.apply import counting
from rsparse.decode import Engine, Sampling, engine_of, generate, stream
from rsparse.decode.attention import Seen, step_attention
from rsparse.decode.steps import CHUNK, Steps
from rsparse.models import load_model, load_tokenizer
from rsparse.texts import token_ids

OTHERS = {
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "head_dim": dict(head_dim=24),
    "one group": dict(num_key_value_heads=1),
    "epsilon": dict(rms_norm_eps=0.3),
    "linear": dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4)),
    "dynamic": dict(rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=1e4)),
    "yarn": dict(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4,
                                      original_max_position_embeddings=64)),
    "no window": dict(shape="mistral-7b", sliding_window=None),
}  # fmt: skip
every_model = pytest.mark.parametrize("sizes", (STYLES | OTHERS).values(), ids=STYLES | OTHERS)


@every_style
def test_greedy_tokens_are_hugging_faces_in_float64(build, ids, sizes):
    model = build(**sizes)
    assert generate(model, ids[:2, :20], 200, stop=()).equal(theirs(model, ids[:2, :20], 200))


def test_greedy_tokens_are_hugging_faces_on_the_tiny_model():
    model, ids = load_model("tiny", "float64"), token_ids("tiny", "heldout", load_tokenizer("tiny"), 1, 24)
    assert generate(model, ids, 200, stop=()).equal(theirs(model, ids, 200))


@every_model
def test_logits_are_hugging_faces_in_float64(build, ids, sizes):
    model = build(**sizes)
    if "attention_bias" in sizes:  # which begin at 0
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
    expected = their_logits(model, ids, 20)
    assert error(Engine(model).logits(ids, 20), expected) < 1e-6  # both take norms in float32
    assert their_logits(model, ids, 20).equal(expected)  # fusing left the model as it was


WRONG = {
    "a window of one more": (dict(shape="mistral-7b", sliding_window=24), dict(sliding_window=25)),
    "no rotary scaling": (dict(rope_parameters=LLAMA_3),
                          dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "another base": (dict(), dict(rope_parameters=dict(rope_type="default", rope_theta=1.1e4))),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sizes, slip", WRONG.values(), ids=WRONG)
def test_logits_are_as_near_to_float64_as_hugging_faces(build, ids, sizes, slip, dtype, record_property):
    """In 16 and 32 bits two right programs differ. Ours may be 1.3 times as far from the exact logits as theirs, which
    an engine that is slightly wrong is not."""
    model = build(dtype, **sizes)
    exact = their_logits(copy.deepcopy(model).double(), ids, 20)
    bound = 1.3 * error(their_logits(model, ids, 20), exact)
    found = error(Engine(model).logits(ids, 20), exact)
    record_property("error over bound", found / bound)
    assert found <= bound
    model.config.update(slip)
    assert error(Engine(model).logits(ids, 20), exact) > bound


@every_style
@pytest.mark.parametrize("dtype, least", [("float32", 0.99), ("bfloat16", 0.5)])
def test_free_running_tokens_in_low_precision(build, ids, sizes, dtype, least, record_property):
    """Reported, and a floor: one flipped token changes all that follow."""
    model = build(dtype, **sizes)
    share = share_equal(generate(model, ids[:, :20], 100, stop=()), theirs(model, ids[:, :20], 100), 20)
    record_property("share of equal tokens", share)
    print(f"{dtype}: {share:.3f} of the tokens equal Hugging Face's")
    assert share >= least


@pytest.mark.parametrize("dtype, least", [("float32", 0.9), ("bfloat16", 0.1)])
def test_free_running_tokens_of_the_tiny_model(dtype, least, record_property):
    model, ids = load_model("tiny", dtype), token_ids("tiny", "heldout", load_tokenizer("tiny"), 4, 24)
    share = share_equal(generate(model, ids, 80, stop=()), theirs(model, ids, 80), 24)
    record_property("share of equal tokens", share)
    print(f"tiny, {dtype}: {share:.3f} of the tokens equal Hugging Face's")
    assert share >= least


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_rows_do_not_depend_on_their_batch(build, batch):
    model = build()
    ids = torch.randint(0, 97, (batch, 9))
    alone = torch.cat([generate(model, row[None], 30, stop=()) for row in ids])
    assert generate(model, ids, 30, stop=()).equal(alone)


def test_stops_where_hugging_face_does(build, ids):
    model = build()
    free = theirs(model, ids, 60)
    for stop in ([int(free[0, 50])], [int(free[0, 50]), int(free[1, 45]), int(free[2, 70]), int(free[3, 41])]):
        for pad in (None, 5):
            model.generation_config.pad_token_id = pad
            expected = theirs(model, ids, 60, stop=stop)
            assert generate(model, ids, 60).equal(expected) and generate(model, ids, 60, stop=stop).equal(expected)
    assert expected.shape[1] < free.shape[1]
    assert generate(model, ids, 60, stop=()).equal(free)


def test_stop_tokens_of_the_configuration(build, ids):
    model = build()
    free = generate(model, ids[:1], 30, stop=())
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = int(free[0, 45])
    ended = generate(model, ids[:1], 30)
    assert ended.equal(free[:, : ended.shape[1]]) and ended[0, -1] == free[0, 45] and ended.shape[1] <= 46


def test_streams_what_it_generates(build, ids):
    model, heard = build(), []
    whole = generate(model, ids, 25, stop=(), on_token=heard.append)
    assert torch.stack(heard, 1).equal(whole[:, 40:])
    tokens = stream(model, ids, 25, stop=())
    assert next(tokens).equal(whole[:, 40]) and next(tokens).equal(whole[:, 41])
    assert torch.is_grad_enabled()  # not left off for whoever takes the tokens


def test_a_second_text_ends_the_first(build, ids):
    model = build()
    first = stream(model, ids, 5, stop=())
    next(first)
    generate(model, ids, 5, stop=())
    with pytest.raises(RuntimeError, match="another text was begun"):
        next(first)


def test_the_cache_is_used_again_and_forgets(build, ids):
    model = build()
    engine, fresh = Engine(model), Engine(model)
    long = engine.generate(ids, 100, stop=())
    cache = engine._steps.cache
    assert engine.generate(ids[:, :7], 50, stop=()).equal(fresh.generate(ids[:, :7], 50, stop=()))
    assert engine._steps.cache is cache and cache.length == CHUNK
    assert engine.generate(ids, 100, stop=()).equal(long)
    assert engine.generate(ids[:2], 100, stop=()).equal(long[:2]) and engine._steps.cache is not cache


def test_chunks_and_masks_see_what_a_step_sees():
    """On a GPU attention reads masked chunks of the cache, on a CPU the positions themselves."""
    q, keys, values = torch.randn(3, 8, 16), torch.randn(1, 3, 2, 48, 16), torch.randn(1, 3, 2, 48, 16)
    chunked = [x[0].unflatten(2, (3, 16)).movedim(2, 0).contiguous() for x in (keys, values)]
    for window in (None, 5, 100):
        for position in (0, 4, 15, 16, 31, 40):
            exact = step_attention(q, keys, values, Seen.exactly(position, window))
            last, at = (position // 16 + 1) * 16, torch.tensor([position])
            torch.testing.assert_close(step_attention(q, *chunked, Seen.within(at, last, window)), exact)
            torch.testing.assert_close(step_attention(q, keys, values, Seen.within(at, last, window)), exact)
            own = step_attention(q[:, 4:5], keys[:, :, 1:], values[:, :, 1:], Seen.exactly(position, window))
            torch.testing.assert_close(own[:, 0], exact[:, 4])


@every_style
def test_a_chunked_cache_as_graphs_need_it(build, ids, sizes):
    model = build(**sizes)
    engine = Engine(model, chunk=16)
    assert engine.generate(ids[:2, :20], 100, stop=()).equal(theirs(model, ids[:2, :20], 100))
    assert engine.generate(ids[:2, :16], 5, stop=()).equal(theirs(model, ids[:2, :16], 5))
    assert error(engine.logits(ids, 20), their_logits(model, ids, 20)) < 1e-6


class Replayed:
    """What a CUDA graph does, on a CPU: the same step again, into the same logits."""

    def __init__(self, steps, span):
        self.again = lambda: steps.launch(span - 1)
        self.logits = self.again()

    def replay(self):
        self.logits.copy_(self.again())


def test_graphs_are_captured_once_for_every_chunk(build, ids, monkeypatch):
    model, captured = build(), []

    def capture(steps, span):
        captured.append(span)
        graph = Replayed(steps, span)
        return graph, graph.logits

    monkeypatch.setattr(Steps, "_capture", capture)
    engine = Engine(model, chunk=16)
    engine.graphs = True
    expected = theirs(model, ids[:2, :20], 60)
    assert engine.generate(ids[:2, :20], 60, stop=()).equal(expected) and captured == [32, 48, 64, 80]
    assert engine.generate(ids[:2, :20], 60, stop=()).equal(expected) and len(captured) == 4
    other = Engine(model, chunk=16)
    other.graphs = True
    other.prepare(2, 20, 60)
    assert sorted(captured[4:]) == [32, 48, 64, 80]
    assert other.generate(ids[:2, :20], 60, stop=()).equal(expected) and len(captured) == 8
    with pytest.raises(ValueError, match="graphs is True on cpu; expected a GPU"):
        Engine(model, graphs=True)


def test_graphs_stand_back_where_python_watches_the_masks(build, ids, monkeypatch):
    model = build()
    monkeypatch.setattr(Steps, "_capture", lambda *_: pytest.fail("captured"))
    rsparse.sparsify(model, "griffin", 0.3)
    engine = Engine(model)
    assert not engine.graphs
    rsparse.sparsify(model, "teal", 0.5, calibration=ids)
    engine = Engine(model, chunk=16)
    engine.graphs = True
    with counting(model) as realised:
        engine.generate(ids, 9, stop=())
        assert realised().realised == pytest.approx(0.5, abs=0.1)


def test_weights_are_held_once(build, ids, logits):
    model = build(attention_bias=True)
    before, size = logits(model, ids), sum(x.numel() for x in model.parameters())
    engine = Engine(model)
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.parameters()}
    assert sum(held.values()) == 8 * size
    for block, layer in zip(engine.decoder.blocks, model.model.layers, strict=True):
        fused = block.step.qkv.product.weight
        assert fused.untyped_storage().data_ptr() == layer.self_attn.v_proj.weight.untyped_storage().data_ptr()
    assert logits(model, ids).equal(before)
    again = Engine(model)  # finds them side by side
    first, second = (x.decoder.blocks[0].step.qkv.product.weight for x in (engine, again))
    assert first.data_ptr() == second.data_ptr()
    twin = copy.deepcopy(model)
    twin.model.layers[0].self_attn.q_proj.weight.data.zero_()
    assert logits(model, ids).equal(before) and not logits(twin, ids).equal(before)


def test_an_engine_goes_with_its_model(build, ids):
    model = build()
    engine = engine_of(model)
    assert engine_of(model) is engine
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)  # in place: seen
    assert engine_of(model) is engine
    assert generate(model, ids, 9, stop=()).equal(theirs(model, ids, 9))
    model.float()
    assert not engine.fits(model) and engine_of(model) is not engine
    watched = weakref.ref(model)
    del model, engine
    gc.collect()
    assert watched() is None


def test_draws_follow_their_probabilities(build, ids):
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(3)) * 2
    for sampling in (Sampling(0.7), Sampling(1.5, top_k=5), Sampling(1.0, top_p=0.8), Sampling(2.0, 8, 0.9)):
        warpers = [TemperatureLogitsWarper(float(sampling.temperature))]
        warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p else []
        expected = LogitsProcessorList(warpers)(None, logits).softmax(-1)
        p = sampling.probabilities(logits)
        torch.testing.assert_close(p / p.sum(), expected)
        draws = sampling(logits.expand(20000, -1), torch.Generator().manual_seed(0))
        counts = torch.bincount(draws, minlength=20)
        assert not counts[expected[0] == 0].any()
        some = expected[0] > 0
        chi2 = float(((counts - 20000 * expected[0])[some] ** 2 / (20000 * expected[0])[some]).sum())
        freedom = int(some.sum()) - 1
        assert freedom > 0
        assert chi2 < freedom + 5 * (2 * freedom) ** 0.5  # mean and standard deviation of chi squared


def test_draws_depend_on_the_seed_alone(build, ids):
    model = build()

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, ids, 20, temperature=1.0, top_p=0.9, generator=generator, stop=())

    assert draw(0).equal(draw(0)) and not draw(0).equal(draw(1))
    assert generate(model, ids, 20, temperature=3.0, top_k=1, stop=()).equal(generate(model, ids, 20, stop=()))


REFUSED = {
    "no tokens": (dict(ids=torch.zeros(1, 0, dtype=torch.long)), "the prompt has shape .1, 0.; expected at least one"),
    "no rows": (dict(ids=torch.zeros(0, 3, dtype=torch.long)), "the prompt has shape .0, 3."),
    "one row as a vector": (dict(ids=torch.zeros(3, dtype=torch.long)), r"expected token ids, a LongTensor \(samples"),
    "no token id": (dict(ids=torch.full((1, 3), 97)), "holds token id 97; expected 0..96"),
    "17 rows": (dict(ids=torch.zeros(17, 3, dtype=torch.long)), "the batch has 17 rows; expected at most 16"),
    "nothing new": (dict(max_new_tokens=0), "max_new_tokens is 0; expected a whole number of at least 1"),
    "half a token": (dict(max_new_tokens=2.5), "max_new_tokens is 2.5"),
    "too long": (dict(max_new_tokens=247), "10 tokens and 247 new ones need 257 positions; expected at most 256, the"),
    "padding": (dict(attention_mask=torch.tensor([[0] + [1] * 9])), "attention_mask holds zeros; expected prompts of"),
    "temperature": (dict(temperature=-1.0), "temperature is -1.0; expected a number of at least 0"),
    "temperature NaN": (dict(temperature=float("nan")), "temperature is nan"),
    "top_k": (dict(temperature=1.0, top_k=0), "top_k is 0; expected a whole number of at least 1"),
    "top_p": (dict(temperature=1.0, top_p=1.5), r"top_p is 1.5; expected a number in \(0, 1\]"),
    "greedy top_k": (dict(top_k=5), "top_k is 5 where temperature is 0"),
    "stop": (dict(stop=[97]), "stop holds 97; expected token ids, 0..96"),
}  # fmt: skip


@pytest.mark.parametrize("asked, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_generated(build, ids, monkeypatch, asked, message):
    model, asked = build(), dict(ids=ids[:1, :10], max_new_tokens=5) | asked
    places = [x.data_ptr() for x in model.parameters()]
    for call in (stream, generate):
        with pytest.raises(ValueError, match=message):
            call(model, **asked)  # stream: before the first token is asked for
    assert [x.data_ptr() for x in model.parameters()] == places  # refused before weights were moved
    engine = engine_of(model)
    monkeypatch.setattr(engine.decoder, "new_cache", lambda *_: pytest.fail("allocated"))
    drawing = {name: asked.pop(name) for name in ("temperature", "top_k", "top_p") if name in asked}
    with pytest.raises(ValueError, match=message):
        engine.stream(**asked, sampling=Sampling(**drawing))


@pytest.mark.parametrize(("at", "where"), [((1, slice(-3, None)), "row 1 of the prompts ends"),
                                           ((2, slice(0, 2)), "row 2 of the prompts begins")])  # fmt: skip
def test_padding_shows_without_a_mask_where_it_can(build, ids, at, where):
    """A padding token that ends or begins texts too, or that every row has, tells nothing."""
    model, ids = build(), ids.clamp_min(4)
    ids[at] = model.config.pad_token_id = 0
    for call in (stream, generate):
        with pytest.raises(ValueError, match=f"{where} with 0, the padding token; .* an attention_mask of ones"):
            call(model, ids, 5)
    model.generation_config.pad_token_id = 3  # has precedence
    assert generate(model, ids, 2, stop=()).shape == (4, 42)
    model.generation_config.pad_token_id = None
    for told in (dict(attention_mask=torch.ones_like(ids)), dict(stop=[0]), dict(ids=ids[at[0]][None])):
        assert generate(**dict(model=model, ids=ids, max_new_tokens=2) | told).shape[1] > 40
    for config, name in ((model.generation_config, "eos_token_id"), (model.config, "bos_token_id")):
        before = getattr(config, name)
        setattr(config, name, 0)
        assert generate(model, ids, 2).shape[1] > 40
        setattr(config, name, before)
    ids[:, at[1]] = 0
    assert generate(model, ids, 2, stop=()).shape == (4, 42)


def test_what_does_not_fit_the_cache(build, ids):
    engine = Engine(build(), cache_length=64)
    assert engine.generate(ids, 24, stop=()).shape == (4, 64) and engine._steps.cache.length == 64
    with pytest.raises(ValueError, match="25 new ones need 65 positions; expected at most 64, the cache's"):
        engine.generate(ids, 25)
    with pytest.raises(ValueError, match="cache_length is 257; expected 1..256"):
        Engine(build(), cache_length=257)
    with pytest.raises(ValueError, match="context is 41; expected 1..40"):
        engine.logits(ids, 41)


UNSUPPORTED = {
    "longrope": (dict(rope_parameters=dict(rope_type="longrope", rope_theta=1e4)), "rope_type is 'longrope'"),
    "partial": (dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
                "partial_rotary_factor is 0.5; expected 1"),
    "soft caps": (dict(attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0; expected a configuration wit"),
    "window": (dict(sliding_window=0), "sliding_window is 0; expected at least 1"),
    "heads": (dict(num_key_value_heads=3), "num_key_value_heads is 3; expected a divisor of num_attention_heads, 8"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_not_computed_here(build, ids, change, message):
    model = build(shape="mistral-7b")
    places = [x.data_ptr() for x in model.parameters()]
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        generate(model, ids, 5)
    assert [x.data_ptr() for x in model.parameters()] == places  # refused before weights were moved


def test_models_of_other_families_and_mixed_weights(build, ids):
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    gemma = GemmaForCausalLM(GemmaConfig(vocab_size=97, num_key_value_heads=1, head_dim=16, **sizes))
    with pytest.raises(ValueError, match="model is of type 'gemma'; expected a causal LM of the family"):
        generate(gemma, ids, 5)
    model = build()
    model.lm_head.float()
    with pytest.raises(ValueError, match="'lm_head' is torch.float32 on cpu; expected torch.float64 on cpu"):
        generate(model, ids, 5)
    model = build()
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match="'model.layers.1.mlp.up_proj' is not in memory"):
        generate(model, ids, 5)


def test_the_fixed_name():
    assert rsparse.decode.generate is generate
