"""INT4 weights: GPTQ against a few lines in float64, what hangs in the model, the bytes, and checkpoints on disk."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import small_checkpoint
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import rsparse
from kernels import packing, reference
from kernels.operations import Gemv
from kernels.quantized import Quantized, from_gptq, to_gptq
from rsparse import gptq, gptq_checkpoint, int4, models, quantize, texts
from rsparse.accounting import BYTES, split_budget
from rsparse.calibrate import Calibration, hooks, run_decoder
from rsparse.decompose import svd_factors
from rsparse.gptq_checkpoint import GptqCheckpoint
from rsparse.linears import SparseLinear
from rsparse.protocol import TokenProtocol
from rsparse.quantize import Quantization

GROUP = 128


def moments(X: torch.Tensor) -> torch.Tensor:
    """X^T X of inputs (tokens, n), float64: all that GPTQ takes from them."""
    return X.double().T @ X.double()


def gptq_reference(W: torch.Tensor, H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and what was rounded to codes, of W (m, n) for inputs of `moments` H, as in the GPTQ paper;
    float64, column by column."""
    W = W.detach().double().clone()
    H = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    steps, scales = torch.zeros_like(W), []
    for j in range(W.shape[1]):
        if j % GROUP == 0:
            scales.append(2 * W[:, j : j + GROUP].abs().amax(1) / 15)
        steps[:, j] = W[:, j] / scales[-1]
        error = (W[:, j] - steps[:, j].round().clamp(-8, 7) * scales[-1]) / U[j, j]
        W[:, j:] -= error[:, None] * U[j, j:]
    return (steps.round().clamp(-8, 7) + 8).to(torch.uint8), torch.stack(scales, 1), steps


def check_codes(found: Quantized, W: torch.Tensor, H: torch.Tensor, most: float = 0.05) -> None:
    """As the reference has them, but for outputs with a tie: there float32 may take the neighbour, by one code, and the
    columns behind follow. (A group's largest weight is a tie: it lies at 7.5 steps.) most: share of such outputs."""
    codes, scales, steps = gptq_reference(W, H)
    different = found.codes != codes
    rows = different.any(1)
    assert rows.double().mean() < most
    first = different[rows].double().argmax(1)[:, None]
    apart = found.codes[rows].gather(1, first).int() - codes[rows].gather(1, first).int()
    fraction = steps[rows].gather(1, first) % 1
    assert (apart.abs() == 1).all() and ((fraction - 0.5).abs() < 1e-3).all()
    torch.testing.assert_close(found.scales[~rows].double(), scales[~rows], rtol=2**-10, atol=0)


def output_error(W: torch.Tensor, quantized: Quantized, H: torch.Tensor) -> float:
    """Relative error of the outputs in the Frobenius norm, of inputs of `moments` H."""
    W = W.detach().double()
    wrong = W - quantized.dequantized(torch.float64)
    return float(((wrong @ H * wrong).sum() / (W @ H * W).sum()).sqrt())


# GPTQ


@pytest.fixture(scope="module")
def tiny():
    return models.load_model("tiny")


@pytest.fixture(scope="module")
def tiny_moments():
    """(block, site) -> `moments` of what was read of the text that the embedded codes were calibrated on: in the
    first block by its own weights, in the second behind the first one's codes."""
    checkpoint, model = GptqCheckpoint(gptq_checkpoint.TINY), models.load_model("tiny")
    about = checkpoint.config["meta"]
    ids = texts.token_ids("tiny", "calibration", models.load_tokenizer("tiny"), about["samples"], about["length"], 0)
    model.config.num_hidden_layers = 1  # the forward pass ends behind the first block
    linears = [x for x in models.decoder_linears(model) if x.layer == 0]
    found = defaultdict(float)

    def add(place, x):
        found[0, place.site] += moments(x.flatten(0, 1))

    with hooks([x for x in linears if x.kind in ("q", "o", "down")], add):
        run_decoder(model, ids)
    for x in linears:
        x.module.weight.data = checkpoint.read(x).dequantized(torch.float32)
    second = model.model.layers[1].input_layernorm

    def add_behind(_, args):
        found[1, "attn_in"] += moments(second(args[0]).flatten(0, 1))

    model.model.norm.register_forward_pre_hook(add_behind)
    run_decoder(model, ids)
    return found


@pytest.mark.parametrize(("layer", "kind"), [(0, "q"), (0, "k"), (0, "v"), (0, "o"), (0, "down"), (1, "q")])
def test_the_embedded_codes_are_gptqs(tiny, tiny_moments, layer, kind):
    linear = next(x for x in models.decoder_linears(tiny) if (x.layer, x.kind) == (layer, kind))
    W, H = linear.module.weight, tiny_moments[layer, linear.site]
    found = GptqCheckpoint(gptq_checkpoint.TINY).read(linear)
    check_codes(found, W, H, most=0.1 if layer else 0.05)  # a block in float32 lies before the second one's inputs
    assert output_error(W, found, H) < 0.9 * output_error(W, int4.nearest(W), H)


def test_a_quantised_model_is_near_its_own(tiny):
    """Far enough from broken that a forgotten causal mask or a shifted group would show."""
    held = texts.token_ids("tiny", "heldout", models.load_tokenizer("tiny"), 4, 512, 0)
    own = rsparse.perplexity(tiny, held)
    quantize.put(tiny, Quantization("int4-gptq", checkpoint="tiny"), ids=None)
    try:
        assert rsparse.perplexity(tiny, held) == pytest.approx(own, rel=0.01)
    finally:
        int4.restore(tiny)
    assert rsparse.perplexity(tiny, held) == own


@pytest.fixture
def model():
    """Two wide blocks in float32, random weights of some size."""
    sizes = small_checkpoint.SIZES | small_checkpoint.WIDE | dict(num_key_value_heads=2, vocab_size=64)
    made = models.random_model(models.shape_config("llama-2-7b", **sizes, max_position_embeddings=256), seed=1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.mul_(4)
    return made


@pytest.fixture
def ids():
    return torch.randint(0, 64, (24, 64), generator=torch.Generator().manual_seed(0))


def inputs_of(model, name: str, ids: torch.Tensor) -> torch.Tensor:
    """What a linear reads of the tokens, (tokens, n)."""
    seen, place = [], next(x for x in models.decoder_linears(model) if x.name == name)
    with hooks([place], lambda _, x: seen.append(x.flatten(0, 1))):
        run_decoder(model, ids)
    return torch.cat(seen)


def test_the_library_quantises_block_by_block_and_leaves_the_model(model, ids):
    pytest.importorskip("neural_compressor")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    codes = gptq.quantize(model, ids)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    linears = {x.name: x for x in models.decoder_linears(model)}
    assert codes.keys() == linears.keys()
    for kind in ("self_attn.k_proj", "mlp.down_proj"):
        name = f"model.layers.0.{kind}"
        check_codes(codes[name], linears[name].module.weight, moments(inputs_of(model, name, ids)))
    weights = {name: x.module.weight.clone() for name, x in linears.items()}
    for name, x in linears.items():  # the second block reads what the quantised first one leaves
        if x.layer == 0:
            x.module.weight.data = codes[name].dequantized(torch.float32)
    name = "model.layers.1.self_attn.q_proj"
    check_codes(codes[name], weights[name], moments(inputs_of(model, name, ids)))


class FakeLibrary:
    """Neural Compressor in the little that is called of it: every block is run on each input twice, then rounded to
    nearest."""

    def __init__(self, fails: bool = False):
        self.inputs, self.fails, self.twin = [], fails, None

    def GPTQConfig(self, **options):
        return options

    def prepare(self, twin, config):
        self.handle = twin.model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: self.inputs.append((args, kwargs)), with_kwargs=True)  # fmt: skip
        return twin

    def convert(self, twin):
        self.handle.remove()
        self.twin = twin
        for block in twin.model.layers:
            for args, kwargs in 2 * self.inputs:
                block(*args, **kwargs)
            if self.fails:
                raise RuntimeError("the library failed")
        for x in models.decoder_linears(twin):
            stored, holder = to_gptq(nearest(x)), torch.nn.Module()
            for name, value in stored.items():
                holder.register_buffer(name, value)
            x.exchange(holder)
        return twin

    def installed(self, monkeypatch):
        for name in ("neural_compressor", "neural_compressor.torch", "neural_compressor.torch.quantization"):
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        for name in ("GPTQConfig", "prepare", "convert"):
            setattr(module, name, getattr(self, name))
        return self


@pytest.mark.parametrize("fails", [False, True])
def test_a_bar_shows_the_block_that_is_quantised(model, ids, monkeypatch, capsys, fails):
    library = FakeLibrary(fails).installed(monkeypatch)
    monkeypatch.setattr(gptq, "tqdm", partial(tqdm, mininterval=0))
    with pytest.raises(RuntimeError, match="the library failed") if fails else nullcontext():
        codes = gptq.quantize(model, ids[:2])
        assert all(codes[x.name].codes.equal(nearest(x).codes) for x in models.decoder_linears(model))
    seen = re.findall(r"GPTQ, blocks: +\d+%\|[^|]*\| (\d/\d)", capsys.readouterr().err)
    assert list(dict.fromkeys(seen)) == (["0/2"] if fails else ["0/2", "1/2", "2/2"])
    assert not any(block._forward_pre_hooks for block in library.twin.model.layers), "hooks stay behind"


def test_codes_made_here_are_kept(model, ids, tmp_path, monkeypatch):
    pytest.importorskip("neural_compressor")
    monkeypatch.setenv("RSPARSE_CACHE", str(tmp_path))
    folder = gptq.kept_codes(model, ids)
    monkeypatch.setattr(gptq, "quantize", None)
    assert gptq.kept_codes(model, ids) == folder and folder.is_relative_to(tmp_path)
    GptqCheckpoint(folder).check(model)


def test_codes_are_kept_by_what_made_them(model, ids, tmp_path, monkeypatch):
    """Another grid, damping or library makes others."""
    monkeypatch.setenv("RSPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(gptq, "write", lambda folder, model, ids: folder.mkdir(parents=True))
    folders = {gptq.kept_codes(model, ids)}
    for name, value in (("DAMPING", 0.5), ("_version", lambda: "9.9")):
        monkeypatch.setattr(gptq, name, value)
        folders.add(gptq.kept_codes(model, ids))
    assert len(folders) == 3


def test_factors_wider_than_the_model_are_refused(model):
    """They would be counted by 32 bits and held in 16."""
    with pytest.raises(ValueError, match="factor_dtype is 'float32'"):
        int4.hang(model.to(torch.bfloat16), nearest, "float32")
    assert not int4.is_int4(model)


def test_without_the_library_the_error_says_how_to_install_it(model, ids, monkeypatch):
    monkeypatch.setattr(gptq.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"neural-compressor-pt.*pip install -e '.\[int4\]'"):
        gptq.quantize(model, ids)
    with pytest.raises(ValueError, match="neural-compressor-pt"):
        Quantization("int4-gptq")


# In the model


def nearest(linear) -> Quantized:
    return int4.nearest(linear.module.weight)


def test_hung_and_restored_bit_for_bit(model, ids):
    own = {x.name: x.module for x in models.decoder_linears(model)}
    before = model(ids).logits
    int4.hang(model, nearest)
    for x in models.decoder_linears(model):
        wanted = nearest_of(own[x.name])
        torch.testing.assert_close(x.module.weight, wanted.dequantized(torch.float32))
        assert torch.equal(x.module.quantized().codes, wanted.codes)
    assert not torch.equal(model(ids).logits, before)
    int4.restore(model)
    assert all(x.module is own[x.name] for x in models.decoder_linears(model))
    assert torch.equal(model(ids).logits, before)
    int4.restore(model)


def nearest_of(module) -> Quantized:
    return int4.nearest(module.weight)


def test_what_does_not_fit_is_refused_with_the_model_as_it_was(model, ids, tmp_path, monkeypatch):
    linears = models.decoder_linears(model)
    own = [x.module for x in linears]

    def failing(linear):
        if linear.name == linears[3].name:
            raise OSError("the disk is gone")
        return nearest(linear)

    with pytest.raises(OSError, match="gone"):
        int4.hang(model, failing)
    assert [x.hung for x in linears] == own and not int4.is_int4(model)
    with pytest.raises(ValueError, match="factor_dtype is 'int3'; expected one of float32"):
        int4.hang(model, nearest, "int3")
    int4.hang(model, nearest)
    with pytest.raises(ValueError, match="INT4 already"):
        int4.hang(model, nearest)
    monkeypatch.setattr(gptq, "check_library", lambda: None)
    with pytest.raises(ValueError, match="INT4 already"):
        gptq.quantize(model, ids)
    rsparse.sparsify(model, "teal", sparsity=0.5, threshold="per-token")
    with pytest.raises(ValueError, match="the model is sparse"):
        int4.restore(model)
    narrow = models.load_model(str(small_checkpoint.save(tmp_path / "narrow")))
    with pytest.raises(ValueError, match=r"q_proj' has shape \(64, 64\); INT4 needs a multiple of 128 inputs"):
        int4.hang(narrow, nearest)


def test_it_decodes_what_it_evaluates(model, ids):
    own = rsparse.decode.generate(model, ids[:1, :8], 6, stop=())
    int4.hang(model, nearest)
    found = rsparse.decode.generate(model, ids[:1, :8], 6, stop=())
    assert torch.equal(found[0, 8:], model(found[:, :-1]).logits[0, 7:].argmax(-1))
    int4.restore(model)
    assert torch.equal(rsparse.decode.generate(model, ids[:1, :8], 6, stop=()), own)


@pytest.mark.parametrize("dtype", int4.FACTORS)
def test_budgets_count_int4s_bytes_and_the_factors_own(model, ids, dtype):
    int4.hang(model, nearest, dtype)
    report = rsparse.sparsify(model, "r-sparse", sparsity=0.5, rho=0.5, calibration=Calibration(model, ids))
    weight, factor = Fraction(1, 2) + Fraction(2, 128), BYTES[dtype]
    for line in report.linears:
        used = line.kept * line.m * weight + line.rank * (line.m + line.n) * factor
        assert used <= line.m * line.n * weight / 2 < used + line.m * weight
        assert line.rank == (line.m * line.n * weight / 4) // ((line.m + line.n) * factor)
        assert line.read == pytest.approx(float(used / (line.m * line.n * weight)))
    assert {x.weight_bytes for x in models.decoder_linears(model) if isinstance(x.module, int4.Int4Linear)} <= {weight}
    module = rsparse.apply.masks_of(model)["model.layers.0.mlp.up_proj"][1]
    A = module.A[:, : module.split.rank]
    if dtype == int4.STORED:
        assert all(len(column.unique()) <= 15 * 2 for column in A.T), "two groups of at most 15 steps"
    else:
        assert torch.equal(A, A.to(models.DTYPES[dtype]).float())
    rsparse.restore(model)
    int4.restore(model)


def test_without_int4_the_factors_have_the_weights_bytes(model):
    assert all(x.factor_bytes == x.weight_bytes == 4 for x in models.decoder_linears(model))


@pytest.mark.parametrize("factor_dtype", ["float16", "int4-g128"])
def test_the_kernel_takes_what_the_evaluation_computes_with(factor_dtype):
    """Codes, scales and factors of a GPTQ linear of the embedded model, in the kernel's own layout."""
    tiny = models.load_model("tiny")
    linear = models.decoder_linears(tiny)[6]
    made = int4.Int4Linear(GptqCheckpoint(gptq_checkpoint.TINY).read(linear), torch.float64, None, factor_dtype)
    factors = made.rounded(svd_factors(made.weight, 8))
    split = split_budget(*linear.shape, 0.5, 0.95)
    module = SparseLinear(made, split.__class__(split.kept, 8, split.read), TokenProtocol("all"), factors,
                          threshold=0.7)  # fmt: skip
    x = torch.randn(1, 3, linear.channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = module(x)
    segment = packing.Segment(made.quantized(torch.float64), 0.7, factors.A, factors.B)
    torch.testing.assert_close(reference.linear(x, segment), wanted)
    narrow = packing.Segment(made.quantized(torch.float32), 0.7, factors.A.float(), factors.B.float())
    found = Gemv(packing.pack([narrow]))(x[0].float())
    torch.testing.assert_close(found.double(), wanted[0], rtol=1e-4, atol=1e-4)


# On disk


def test_packing_is_undone_by_reading():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (24, 256), generator=generator, dtype=torch.uint8)
    quantized = Quantized(codes, torch.rand(24, 2, generator=generator).half())
    stored = to_gptq(quantized)
    shapes = {name: (tuple(x.shape), x.dtype) for name, x in stored.items()}
    assert shapes == {"qweight": ((32, 24), torch.int32), "qzeros": ((2, 3), torch.int32),
                      "scales": ((2, 24), torch.float16), "g_idx": ((256,), torch.int32)}  # fmt: skip
    assert (stored["qzeros"] == 0x77777777).all()
    again = from_gptq(stored["qweight"], stored["scales"], stored["g_idx"])
    assert torch.equal(again.codes, codes) and torch.equal(again.scales, quantized.scales)
    with pytest.raises(ValueError, match="12 outputs"):
        to_gptq(Quantized(codes[:12], quantized.scales[:12]))


@pytest.fixture
def saved(model, tmp_path):
    codes = {x.name: nearest(x) for x in models.decoder_linears(model)}
    gptq_checkpoint.save(tmp_path / "gptq", model, codes, {"quantizer": "nearest"})
    return tmp_path / "gptq"


def test_a_checkpoint_reads_as_it_was_saved(model, saved):
    found = GptqCheckpoint(saved)
    found.check(model)
    for x in models.decoder_linears(model):
        read, wanted = found.read(x), nearest(x)
        assert torch.equal(read.codes, wanted.codes) and torch.equal(read.scales, wanted.scales)
    assert sorted(path.name for path in saved.iterdir()) == ["model.safetensors", "quantize_config.json"]
    config = json.loads((saved / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 128, True, False)


def test_saving_is_all_or_nothing(model, tmp_path):
    with pytest.raises(ValueError, match=r"no codes of 'model.layers.0.self_attn.q_proj'"):
        gptq_checkpoint.save(tmp_path / "gptq", model, {}, {})
    assert not (tmp_path / "gptq").exists() and not gptq_checkpoint.is_saved(tmp_path / "gptq")


def rewrite(saved, change) -> None:
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors")


def test_published_checkpoints_in_several_files_and_of_the_second_version(model, saved):
    """Zeros as they are, no g_idx, config.json with the rest of the model's weights beside the codes."""
    tensors = {name: x for name, x in load_file(saved / "model.safetensors").items() if not name.endswith("g_idx")}
    tensors |= {name: torch.full_like(x, -0x77777778) for name, x in tensors.items() if name.endswith("qzeros")}
    first = {name: x for name, x in tensors.items() if ".0." in name}
    save_file(first | {"lm_head.weight": torch.zeros(2)}, saved / "model-1.safetensors")
    save_file({name: x for name, x in tensors.items() if name not in first}, saved / "model-2.safetensors")
    (saved / "model.safetensors").unlink()
    quantization = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "quant_method": "gptq"}
    (saved / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    (saved / "quantize_config.json").unlink()
    found = GptqCheckpoint(saved)
    found.check(model)
    assert all(torch.equal(found.read(x).codes, nearest(x).codes) for x in models.decoder_linears(model))


def test_what_is_no_such_checkpoint_is_refused(model, saved, tmp_path):
    first, last = models.decoder_linears(model)[0], models.decoder_linears(model)[-1]
    with pytest.raises(ValueError, match="is no folder"):
        GptqCheckpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no GPTQ checkpoint"):
        GptqCheckpoint(small_checkpoint.save(tmp_path / "plain"))
    with torch.no_grad():
        first.module.weight.add_(1)
    with pytest.raises(ValueError, match="fingerprint"):
        GptqCheckpoint(saved).check(model)
    with torch.no_grad():
        first.module.weight.sub_(1)
    rewrite(saved, lambda x: x.update({f"{first.name}.qzeros": x[f"{first.name}.qzeros"] + 1}))
    with pytest.raises(ValueError, match=r"q_proj.qzeros holds \[7, 8\]; expected symmetric"):
        GptqCheckpoint(saved).read(first)
    rewrite(saved, lambda x: x.pop(f"{last.name}.scales"))
    config = json.loads((saved / "quantize_config.json").read_text())
    del config["meta"]["fingerprint"]
    (saved / "quantize_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"down_proj.scales in .* has shape None; expected \[2, 256\]"):
        GptqCheckpoint(saved).check(model)
    for name, value in (("bits", 8), ("group_size", 32), ("sym", False), ("desc_act", True)):
        (saved / "quantize_config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=f"has {name} {value!r}; expected"):
            GptqCheckpoint(saved)


# Which weights


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"weights": "int8"}, "weights are 'int8'; expected one of int4-rtn, int4-gptq"),
        ({"weights": "int4-rtn", "factor_dtype": "float8"}, "factor_dtype is 'float8'"),
        ({"weights": "int4-gptq", "checkpoint": "tiny", "samples": 0}, "samples is 0"),
        ({"weights": "int4-gptq", "checkpoint": "tiny", "length": 1.5}, "length is 1.5"),
        ({"weights": "int4-gptq", "checkpoint": "no/such/folder"}, "'no/such/folder' is no folder"),
    ],
)
def test_a_quantization_that_is_not_allowed_is_refused_early(values, said):
    with pytest.raises(ValueError, match=said):
        Quantization(**values)


def test_equal_weights_are_equal(model, saved):
    assert Quantization("int4-rtn", samples=3, checkpoint="nowhere") == Quantization("int4-rtn")
    one = Quantization("int4-gptq", checkpoint=str(saved))
    assert not one.calibrates and one.folder == saved
    quantize.put(model, one, ids=None)
    kept = [x.module.weight.clone() for x in models.decoder_linears(model)]
    int4.restore(model)
    quantize.put(model, Quantization("int4-rtn"), ids=None)
    assert all(torch.equal(x.module.weight, w) for x, w in zip(models.decoder_linears(model), kept, strict=True))
