"""Checkpoints: what is found in them, what is refused, and that every way to load gives the same model."""

import copy
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from reference import llama_logits, weights_of
from rsparse.models import (
    DTYPES,
    SCOPES,
    SHAPES,
    check_checkpoint,
    check_model,
    decoder_linears,
    depth,
    fingerprint,
    load_model,
    load_tokenizer,
    random_model,
    scope_share,
    shape_config,
    skeleton,
)

MODELS = {
    "multi-head": dict(num_key_value_heads=8),
    "grouped 2": dict(num_key_value_heads=4),
    "grouped 4": dict(num_key_value_heads=2),
    "grouped 8": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "bias": dict(attention_bias=True, mlp_bias=True),
    "mistral": dict(shape="mistral-7b"),
    "sliding window": dict(shape="mistral-7b", sliding_window=5),
    "theta": dict(shape="llama-3-8b", vocab_size=97),
}
every_model = pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)


@every_model
def test_random_models_are_what_their_configuration_says(build, ids, logits, sizes):
    """Against loops over positions: rotary frequencies, grouped heads, window, ties and biases all matter."""
    model, row = build(**sizes), ids[0, :11]
    expected = llama_logits(model.config, weights_of(model), row.tolist())
    torch.testing.assert_close(logits(model, row[None])[0], expected, rtol=0, atol=1e-9)


@every_model
def test_decoder_linears(build, sizes):
    model = build(**sizes)
    linears = decoder_linears(model)
    kv = 8 * model.config.num_key_value_heads
    shapes = {"q": (64, 64), "k": (kv, 64), "v": (kv, 64), "o": (64, 64), "gate": (176, 64), "up": (176, 64)}
    for i, linear in enumerate(linears):
        assert linear.layer == i // 7 and linear.kind == ("q", "k", "v", "o", "gate", "up", "down")[i % 7]
        assert linear.shape == shapes.get(linear.kind, (64, 176)) == tuple(linear.module.weight.shape)
        assert model.get_submodule(linear.name) is linear.module and linear.weight_bytes == 8
    assert len(linears) == 14
    attention, mlp = 2 * 64 * 64 + 2 * 64 * kv, 3 * 64 * 176
    assert scope_share(linears, "attention") * (attention + mlp) == attention
    assert scope_share(linears, "attention") + scope_share(linears, "mlp") == scope_share(linears, "all") == 1


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248), ("mistral-7b", 7_241_732_096),
     ("llama-2-13b", 13_015_864_320), ("llama-3-70b", 70_553_706_496)],
)  # fmt: skip
def test_named_shapes_have_the_published_number_of_parameters(shape, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(shape))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert set(SHAPES) >= {"llama-2-7b", "llama-3-8b", "mistral-7b"}


def test_random_weights_depend_on_the_seed_only():
    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    config = shape_config("llama-2-7b", vocab_size=50, **sizes)
    one, same, other = (random_model(config, seed=seed).lm_head.weight.detach() for seed in (1, 1, 2))
    assert one.equal(same) and not one.equal(other) and 0.018 < float(one.std()) < 0.022


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_stay_tied(build, tied):
    model = build(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


class TestFolder:
    @pytest.fixture
    def saved(self, build, tmp_path):
        """A sharded checkpoint on disk, of values that bfloat16 holds, and the model it came from."""
        model = build("bfloat16").float()
        model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
        assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
        return tmp_path / "model", model

    def test_sharded_checkpoints_load(self, saved, ids, logits):
        folder, model = saved
        loaded = load_model(str(folder))
        assert logits(loaded, ids).equal(logits(model, ids)) and not loaded.training
        assert fingerprint(loaded) == fingerprint(model)

    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
    def test_dtype(self, saved, dtype):
        folder, model = saved
        loaded = load_model(str(folder), dtype)
        assert {str(p.dtype) for p in loaded.parameters()} == {f"torch.{dtype}"}
        assert fingerprint(loaded) == fingerprint(model)

    def test_device_map_gives_the_same_model(self, saved, ids, logits):
        folder, model = saved
        assert logits(load_model(str(folder), device_map="auto"), ids).equal(logits(model, ids))

    def test_relative_folders(self, saved, monkeypatch):
        folder, _ = saved
        monkeypatch.chdir(folder.parent)
        assert check_checkpoint("model") == "model"

    @pytest.mark.parametrize("missing", ["config.json", "*.safetensors"])
    def test_a_folder_without_weights(self, saved, missing):
        folder, _ = saved
        for path in folder.glob(missing):
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"pickled")
        with pytest.raises(
            ValueError,
            match=f"folder {re.escape(repr(str(folder)))} holds no checkpoint; expected config.json",
        ):
            load_model(str(folder))

    @pytest.mark.parametrize("family", ["gpt2", "made-up", None])
    def test_another_architecture(self, saved, family):
        folder, _ = saved
        config = json.loads((folder / "config.json").read_text()) | {"model_type": family}
        (folder / "config.json").write_text(json.dumps(config))
        for call in (load_model, load_tokenizer):
            with pytest.raises(ValueError, match=f"is of type {family!r}; expected llama or mistral"):
                call(str(folder))


def test_what_names_no_model(tmp_path):
    for name in ("/no/such/folder", "./no", "~/no", "a/b/c", ""):
        with pytest.raises(ValueError, match="model|folder"):
            load_model(name)
    with pytest.raises(ValueError, match=r"shape is 'llama-9b'; expected one of llama-2-7b"):
        load_model("random:llama-9b")
    with pytest.raises(ValueError, match="dtype is 'int8'; expected one of float64"):
        load_model("random:llama-2-7b", dtype="int8")


@pytest.mark.parametrize(("name", "meant"), [
    ("tinny", "tiny"), ("Tiny", "tiny"), ("Llama-2-7b", "random:llama-2-7b"), ("randm:llama-3-8b", "random:llama-3-8b"),
])  # fmt: skip
def test_a_misspelt_name_is_not_asked_of_the_hub(name, meant, monkeypatch):
    monkeypatch.setattr("rsparse.models.PretrainedConfig.get_config_dict", lambda _: pytest.fail("asked the hub"))
    for call in (load_model, load_tokenizer, depth, skeleton):
        with pytest.raises(ValueError, match=f"model is {name!r}; did you mean {meant!r}"):
            call(name)


@pytest.mark.parametrize(("name", "said"), [
    ("gpt2", "We couldn't connect to .* Check your internet connection .*/installation#offline-mode'.$"),
    ("owner/tinny", "We couldn't connect to .* Check your internet connection .*/installation#offline-mode'.$"),
    ("bad:name", "Repo id must use .*: 'bad:name'.; expected tiny, a folder"),
])  # fmt: skip
def test_what_the_hub_does_not_give_is_named(name, said):
    """Offline, as every test."""
    for call in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=f"model {name!r} cannot be read: {said}"):
            call(name)


@pytest.mark.parametrize(("raised", "told"), [
    ("You are trying to access a gated repo.\nMake sure to have access to it at https://hub/owner/name.\n401 Error.",
     "at https://hub/owner/name. 401 Error."),
    ("There was a specific connection error when trying to load owner/name:\n503 Server Error: Busy. Try later.",
     "owner/name: 503 Server Error: Busy. Try later."),
    ("owner/name is not a local folder and is not a valid model identifier listed on 'https://hub'\nIf private, log in",
     "If private, log in; expected tiny, a folder, a hub id (owner/name) or random:SHAPE"),
])  # fmt: skip
def test_all_that_the_hub_says_is_told(raised, told, monkeypatch):
    """What is expected instead, where the name is wrong."""

    def fail(*_):
        raise OSError(raised) from RuntimeError("the hub's own")

    monkeypatch.setattr("rsparse.models.PretrainedConfig.get_config_dict", fail)
    with pytest.raises(ValueError, match=f"model 'owner/name' cannot be read: .*{re.escape(told)}$"):
        load_model("owner/name")


@pytest.mark.parametrize("chained", [True, False])
def test_a_cache_that_cannot_be_written_is_not_the_models_fault(chained, monkeypatch):
    """transformers makes an error without a number of it; the command tells which folder it is."""

    def fail(*_):
        try:
            raise PermissionError(13, "Permission denied", "/the/cache")
        except PermissionError as error:
            raise OSError("PermissionError at /the/cache") from (error if chained else None)

    monkeypatch.setattr("rsparse.models.PretrainedConfig.get_config_dict", fail)
    with pytest.raises(PermissionError) as raised:
        load_model("owner/name")
    assert raised.value.filename == "/the/cache"


def test_a_torn_checkpoint_is_named_and_a_full_disk_is_not_its_fault(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=f"model '{tmp_path}' cannot be read: .* is not a valid JSON file.$"):
        load_model(str(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rsparse.models.PretrainedConfig.get_config_dict", full)
    with pytest.raises(OSError, match="No space left"):
        load_model("owner/name")


def test_models_that_are_not_supported():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10, n_positions=8))
    for model, name in ((gpt2, "gpt2"), (torch.nn.Linear(2, 2), "Linear"), (None, "NoneType")):
        with pytest.raises(
            ValueError,
            match=f"model is of type '{name}'; expected a causal LM of the family llama or mistral",
        ):
            check_model(model)


def test_weights_of_another_dtype(build):
    linear = decoder_linears(build())[0]
    linear.module.weight = torch.nn.Parameter(linear.module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="q_proj' is int8; expected one of float64"):
        _ = linear.weight_bytes


def test_fingerprint_tells_models_apart(build):
    model = build()
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(model)) and fingerprint(model) == fingerprint(build())
    others = [
        build(seed=1),
        build(num_key_value_heads=4),
        build(num_hidden_layers=3),
        build(intermediate_size=180),
    ]
    assert len({fingerprint(m) for m in [model, *others]}) == 5


@pytest.mark.parametrize("seed", range(4))
def test_fingerprint_does_not_depend_on_the_dtype(build, seed):
    stored = build("bfloat16", seed=seed, num_hidden_layers=8)
    stored.model.layers[0].self_attn.q_proj.weight.data[0, :3] = torch.tensor([3e-5, -7e-6, 0.0])  # fp16 subnormals
    assert {fingerprint(copy.deepcopy(stored).to(dtype)) for dtype in DTYPES.values()} == {fingerprint(stored)}


def test_unknown_scope(build):
    with pytest.raises(ValueError, match="scope is 'ffn'; expected one of 'all', 'attention', 'mlp'"):
        scope_share(decoder_linears(build()), "ffn")
    assert set(SCOPES) == {"all", "attention", "mlp"}
