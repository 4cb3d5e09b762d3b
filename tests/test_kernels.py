"""The rank-aware product: every path against float64 on the same mask, what it refuses, and what surfaces.

Without a GPU the Triton kernel runs under its interpreter (see conftest).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from kernels import (
    bench,
    cpu,
    inputs,
    operations,
    packing,
    quantized,
    reference,
    shapes,
    triton_gemv,
    triton_lists,
    tuning,
)
from kernels.destination import check_destination
from kernels.operations import Gemv, Neurons
from kernels.packing import Segment, pack
from kernels.triton_gemv import Configuration
from rsparse.paths import cache_folder

GPU = torch.cuda.is_available()
ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if GPU else "cpu"
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
THRESHOLDS = (-math.inf, 0.0, 0.4, 1.0, 2.5, math.inf)


@st.composite
def problems(draw):
    """(x, segments, gated): up to three linears on tokens x, of sizes that are no multiple of anything."""
    gated = draw(st.booleans())
    count = 2 if gated else draw(st.integers(1, 3))
    width = draw(st.integers(1, 150))
    widths = [width] * count if gated else [draw(st.integers(1, 150)) for _ in range(count)]
    n, dtype = draw(st.integers(1, 200)), draw(st.sampled_from(list(EPS)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    options = draw(st.booleans())
    segments = [
        segment(m, n, draw(st.integers(0, 9)), draw(st.sampled_from(THRESHOLDS)), dtype, generator, options, options)
        for m in widths
    ]
    x = torch.randn(draw(st.sampled_from([1, 1, 1, 3])), n, generator=generator)
    x[torch.rand(x.shape, generator=generator) < 0.1] = 0.4  # ties with a threshold
    return x.to(dtype), segments, gated


def segment(m, n, rank, threshold, dtype, generator, norms=False, bias=False) -> Segment:
    def drawn(*size):
        return torch.randn(size, generator=generator)

    factors = (None, None)
    if rank:
        factors = ((drawn(m, rank) / math.sqrt(rank)).to(dtype), (drawn(n, rank) / math.sqrt(n)).to(dtype))
    weighting, bias = drawn(n).abs() + 0.5 if norms else None, drawn(m) if bias else None
    return Segment((drawn(m, n) / math.sqrt(n)).to(dtype), threshold, *factors, weighting, bias)


def exact(x, segments, gated):
    """float64, on the masks of x as it is."""
    parts = [reference.linear(x.double(), one, reference.kept(x, one)) for one in segments]
    return torch.nn.functional.silu(parts[0]) * parts[1] if gated else torch.cat(parts, dim=-1)


def wrong_by(y, expected) -> float:
    return float((y.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def check(y, x, segments, gated):
    expected = exact(x, segments, gated)
    assert y.dtype == x.dtype and y.shape == expected.shape
    typical = max(expected.norm(), expected.numel() ** 0.5)  # outputs are of unit variance; some draws cancel
    assert (y.double() - expected).norm() < 16 * EPS[x.dtype] * typical


# Every path


@settings(max_examples=1000)
@given(problems())
def test_gathered_rows_on_a_cpu(problem):
    x, segments, gated = problem
    packed = pack(segments)
    check(operations.finish(cpu.gemv(x, packed), packed, gated, None), *problem)


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_blocks_and_threads_of_a_cpu(dtype):
    """More columns than a block has, more rows than are summed by themselves; the same bits from any shares."""
    generator = torch.Generator().manual_seed(0)
    segments = [
        segment(m, 300, 5, threshold, dtype, generator)
        for m, threshold in ((cpu.BLOCK + 40, 0.3), (70, 2.0), (2 * cpu.BLOCK + 1, 0.8))
    ]
    x, packed = torch.randn(2, 300, generator=generator).to(dtype), pack(segments)
    check(cpu.gemv(x, packed), x, segments, False)
    table, widths = packed.table.view(cpu.AS_BITS[dtype]).numpy(), np.array(packed.widths)
    counts = np.array([300, 150, 299])
    entries = np.argsort(np.random.default_rng(0).random((3, 300)))
    values, found = x.float().numpy()[0] * np.ones((3, 1), np.float32), []
    for threads in range(1, 10):
        y, cuts = np.full(widths.sum(), np.nan, np.float32), cpu._cuts(widths, counts, threads)
        for first, last in itertools.pairwise(cuts):
            cpu._share(table, entries, values, counts, widths, first, last, y)
        found.append(y)
    assert np.isfinite(found[0]).all() and all(np.array_equal(found[0], y) for y in found[1:])


def test_torchs_threads_stay_as_many():
    """Numba starts its own from the processors that it sees, which would set torch's number as well."""
    code = "import torch; torch.set_num_threads(1); from kernels import cpu; print(torch.get_num_threads())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert told.stdout.strip() == "1", told.stderr


def test_a_cpus_product_beside_autograd():
    """The operation takes an x that asks for a gradient, and has none to give."""
    module = Gemv(pack([segment(20, 30, 2, 0.5, torch.float32, torch.Generator())]))
    x = torch.randn(1, 30)
    assert torch.equal(module(x.clone().requires_grad_()).detach(), module(x))


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 400)), min_size=1, max_size=3), st.integers(1, 9))
def test_threads_share_what_is_read(segments, threads):
    """Shares cover every output once, and none has much more to read than another, but for 16 outputs' rounding."""
    widths, counts = (np.array(part) for part in zip(*segments, strict=True))
    cuts = cpu._cuts(widths, counts, threads)
    assert cuts[0] == 0 and cuts[-1] == widths.sum() and (np.diff(cuts) >= 0).all() and len(cuts) == threads + 1
    read = np.add.reduceat(np.append(np.repeat(counts, widths), 0), np.minimum(cuts[:-1], widths.sum()))
    read[np.diff(cuts) == 0] = 0
    assert read.max() <= (widths * counts).sum() / threads + 16 * counts.max() + 1


@settings(max_examples=150)
@given(problems())
def test_the_plain_product_of_a_table(problem):
    x, segments, gated = problem
    packed = pack(segments)
    check(operations.finish(operations.dense(x, packed), packed, gated, None), *problem)


@pytest.mark.parametrize("shard", range(20 if GPU else 2))
def test_one_launch_on_a_gpu(shard):
    """1,000 draws on a GPU and 200 under the interpreter, in shards, which `--dist worksteal` compiles side by side."""
    drawn = given(problems(), st.booleans(), st.integers(1, 4), st.sampled_from([64, 128]), st.sampled_from([1, 2, 4]))
    seed(shard)(settings(max_examples=50 if GPU else 100)(drawn(one_launch)))()


def one_launch(problem, listed, splits, columns, warps):
    """Twice in one workspace: the same bits, and nothing left behind in the flags. warps: where several tokens are."""
    x, segments, gated = problem
    packed = pack([to(one) for one in segments])
    configuration = Configuration(columns, columns // 4, splits, warps if len(x) > 1 else 1, listed)
    work = triton_gemv.workspace(packed, configuration, len(x))
    first, second = (triton_gemv.gemv(x.to(DEVICE), packed, gated, configuration, work) for _ in range(2))
    assert torch.equal(first, second) and not work.flags.any()
    check(first.cpu(), *problem)


@pytest.mark.parametrize(("dtype", "warps"), [(torch.bfloat16, 1), (torch.float16, 2), (torch.float32, 4)], ids=str)
def test_lists_of_several_passes_and_tokens_of_several_programs(dtype, warps):
    """Channels that no list takes at once, z of two stretches, more tokens than a program adds up, and then fewer in
    the same workspace."""
    generator = torch.Generator().manual_seed(7)
    one = segment(150, 2500, 9, 0.7, dtype, generator, norms=True, bias=True)
    packed, cut = pack([to(one)]), Configuration(64, 16, 2, warps, True)
    assert triton_gemv.grid_of(packed, cut, 6).stretch > triton_gemv.LIST * warps
    work = triton_gemv.workspace(packed, cut, 6)
    for tokens in (6, 1, 3, 2):
        x = torch.randn(tokens, 2500, generator=generator).to(dtype)
        found = triton_gemv.gemv(x.to(DEVICE), packed, False, cut, work).cpu()
        check(found, x, [one], False)
        assert not work.flags.any()


LONGEST = triton_lists.LONGEST
FULL = [("plain", LONGEST), ("plain", LONGEST + 128), ("int4", triton_lists.LEAST)]


@pytest.mark.parametrize(("stored", "stretch"), FULL + [("int4", LONGEST), ("int4", LONGEST + 128)] * GPU)
def test_a_full_list_of_one_stretch(stored, stretch):
    """As long as shared memory has room for, and one that is longer; every channel is kept, so that all is written."""
    generator = torch.Generator().manual_seed(3)
    one = segment(40, stretch, 2, -math.inf, torch.float16, generator)
    one = int4(one) if stored == "int4" else one
    packed, cut = pack([to(one)]), Configuration(128 if stored == "int4" else 64, 32, 1, 1, True)
    x = torch.randn(1, stretch, generator=generator).half()
    check(triton_gemv.gemv(x.to(DEVICE), packed, False, cut, triton_gemv.workspace(packed, cut)).cpu(), x, [one], False)


def test_where_a_list_is(monkeypatch):
    """One token's, of a program of one warp, in shared memory as far as it has room; all others in the workspace."""
    monkeypatch.setattr(triton_gemv, "INTERPRETED", False)
    packed = pack([Segment(torch.empty(64, LONGEST + 128, device="meta"), 0.5)])

    def places(tokens=1, **changed):
        cut = Configuration(**(dict(columns=64, rows=32, splits=2, warps=1, listed=True) | changed))
        grid = triton_gemv.grid_of(packed, cut, tokens)
        return grid.stretch, grid.shared, grid.scratch

    assert places() == (4160, 8192, 0)
    assert places(splits=1) == (8320, 0, 8320)
    assert places(listed=False) == (4160, 0, 0)
    assert places(rows=256) == (4352, 0, 4352)
    assert places(warps=2) == (4160, 0, 4160)
    assert places(tokens=2) == (4160, 0, 4160 + 32)


def test_lists_in_shared_memory_have_room():
    """For every channel and a tile more, in few sizes; five programs fit a processor of an A6000 (100 KB)."""
    sizes = {stretch: triton_lists.shared_entries(stretch) for stretch in range(1, LONGEST + 1)}
    assert all(entries >= stretch for stretch, entries in sizes.items()) and len(set(sizes.values())) == 4
    assert triton_lists.shared_entries(LONGEST + 1) == 0
    assert 5 * (1024 + triton_lists.shared_bytes(LONGEST)) <= 100 * 1024
    assert triton_lists.BEHIND >= quantized.GROUP


@pytest.mark.parametrize("tokens", [1, 3])
def test_ranks_that_a_linear_lacks_are_not_read(tokens):
    """Of linears side by side, whose B is padded to the highest rank."""
    generator = torch.Generator().manual_seed(5)
    segments = [segment(70, 150, rank, 0.7, torch.float32, generator) for rank in (9, 0, 5)]
    packed, cut = pack([to(one) for one in segments]), Configuration(64, 16, 2, 1, True)
    for padding in (packed.B[1], packed.B[2, 5:]):
        padding.fill_(math.nan)
    work = triton_gemv.workspace(packed, cut, tokens)
    work.z.zero_()
    x = torch.randn(tokens, 150, generator=generator)
    check(triton_gemv.gemv(x.to(DEVICE), packed, False, cut, work).cpu(), x, segments, False)
    assert work.z.any() and work.z.isfinite().all()


def to(one: Segment) -> Segment:
    """On the device that runs Triton."""
    weight = one.weight
    if isinstance(weight, quantized.Quantized):
        weight = quantized.Quantized(weight.codes.to(DEVICE), weight.scales.to(DEVICE))
    moved = {name: value.to(DEVICE) for name, value in vars(one).items() if isinstance(value, torch.Tensor)}
    return Segment(**(vars(one) | {"weight": weight} | moved))


@pytest.mark.parametrize("path", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_errors_are_those_of_a_dense_product(dtype, path):
    """Norm-wise over many draws: at most twice that of torch's dense product in float32, 1.2 times in 16 bits."""
    if path == "triton" and dtype == torch.bfloat16 and not GPU:
        pytest.skip("the interpreter cuts off what a GPU rounds to bfloat16")
    generator, ours, theirs = torch.Generator().manual_seed(0), [], []
    device = DEVICE if path == "triton" else "cpu"
    cuts = [Configuration(64, 32, 3, 1, False), Configuration(64, 32, 3, 1, True), Configuration(128, 32, 2, 1, True)]
    for i in range(21):
        one = segment(256, 1024, 8, 0.7, dtype, generator)
        x = torch.randn(1024, generator=generator).to(dtype)
        if path == "cpu":
            y = cpu.gemv(x[None], pack([one]))[0]
        else:
            packed, cut = pack([to(one)]), cuts[i % 3]
            y = triton_gemv.gemv(x[None].to(device), packed, False, cut, triton_gemv.workspace(packed, cut))[0].cpu()
        ours.append(wrong_by(y, exact(x, [one], False)))
        theirs.append(wrong_by((one.weight.to(device) @ x.to(device)).cpu(), one.weight.double() @ x.double()))
    most = 2.0 if dtype == torch.float32 else 1.2
    assert torch.tensor(ours).square().mean().sqrt() <= most * torch.tensor(theirs).square().mean().sqrt()


@pytest.mark.skipif(not GPU, reason="five gigabytes of weights")
def test_tables_of_more_than_two_to_the_31_elements():
    """Rows and columns whose places need 64 bits, gathered and dense, one token and several."""
    n, m = 8192, 2**18 + 2**13 + 100
    weight = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    weight.normal_(generator=torch.Generator("cuda").manual_seed(0))
    packed = pack([Segment(weight, 1.0)])
    assert packed.table.numel() > 2**31
    x = 0.5 * torch.rand(2, n, device="cuda").to(torch.bfloat16)
    x[:, [0, 77, n - 2, n - 1]] = torch.tensor([2.0, -3.0, 5.0, 4.0], dtype=torch.bfloat16, device="cuda")
    kept = x.double() * (x.abs() > 1.0)
    expected = kept[:, kept.any(0)] @ weight[:, kept.any(0)].double().T
    for listed in (False, True):
        cut = Configuration(64, 32, 8, 1, listed)
        work = triton_gemv.workspace(packed, cut, 2)
        for rows in (1, 2):
            found = triton_gemv.gemv(x[:rows], packed, False, cut, work)
            assert wrong_by(found, expected[:rows]) < 2 * EPS[torch.bfloat16]
    assert wrong_by(operations.dense(x, packed), expected) < 2 * EPS[torch.bfloat16]


# What surfaces, what is zero


def paths(segments, gated=False):
    """name -> function of x (tokens, n)."""
    flat = pack([to(one) for one in segments])

    def one_launch(x, listed):
        configuration = Configuration(64, 16, 3, 1, listed)
        return torch.stack([
            triton_gemv.gemv(row[None], flat, gated, configuration, triton_gemv.workspace(flat, configuration))[0]
            for row in x.to(DEVICE)
        ]).cpu()  # fmt: skip

    return {
        "cpu": lambda x: cpu.gemv(x, pack(segments)),
        "dense": lambda x: operations.dense(x.to(DEVICE), flat).cpu(),
        "masked": lambda x: one_launch(x, False),
        "listed": lambda x: one_launch(x, True),
    }


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("path", ["cpu", "dense", "masked", "listed"])
@pytest.mark.parametrize("rank", [0, 1])
def test_extremes(path, rank, dtype):
    """NaN and inf surface, zero is zero, everything and nothing is dropped, and what is at the threshold."""
    generator = torch.Generator().manual_seed(0)
    one = segment(40, 30, rank, 0.8, dtype, generator)
    run = paths([one])[path]
    x = torch.randn(30, generator=generator).to(dtype)
    assert not run(torch.zeros(1, 30, dtype=dtype)).any()
    for value in (math.nan, math.inf, -math.inf):
        bad = x.clone()
        bad[7] = value
        assert not run(bad[None]).isfinite().any(), "surfaces in every output"
    one = replace(one, threshold=float(torch.tensor(0.8).to(dtype)))
    tie = torch.zeros(30, dtype=dtype)
    tie[3], tie[4] = one.threshold, -one.threshold
    for threshold, row in ((math.inf, x), (-math.inf, x), (one.threshold, tie)):
        cut = replace(one, threshold=threshold)
        dropped = row.double() * (row.abs().double() <= threshold)
        expected = one.weight.double() @ (row.double() - dropped)
        if rank:
            expected += one.A.double() @ (one.B.double().T @ dropped)
        found = paths([cut])[path](row[None])[0]
        assert wrong_by(found, expected) < 8 * EPS[dtype] if expected.any() else not found.any()
    dropped = replace(one, threshold=math.inf)
    assert not paths([dropped])[path](torch.full((1, 30), math.inf, dtype=dtype)).isfinite().any()


# The operation


def test_the_operation_picks_its_path_and_says_which():
    generator = torch.Generator().manual_seed(1)
    segments = [segment(m, 64, 3, 0.6, torch.float32, generator, bias=True) for m in (50, 20, 20)]
    module = Gemv(pack(segments))
    assert (module.takes(1), module.takes(3), module.takes(4)) == ("cpu", "cpu", "dense") and "cpu" in repr(module)
    x = torch.randn(2, 4, 64, generator=generator)
    expected = torch.cat([reference.linear(x, one) for one in segments], dim=-1)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module(x[0, 0]), expected[0, 0], rtol=1e-5, atol=1e-5)
    strided = torch.randn(64, 2, generator=generator)[:, 0]
    expected = torch.cat([reference.linear(strided, one) for one in segments])
    torch.testing.assert_close(module(strided), expected, rtol=1e-5, atol=1e-5)
    other = Gemv(module.packed.with_thresholds([-math.inf] * 3))
    whole = torch.cat([one.weight @ strided + one.bias for one in segments])
    torch.testing.assert_close(other(strided), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["cpu", "dense"])
def test_the_operation_is_registered_as_torch_asks(path):
    packed = pack([segment(m, 32, 2, 0.5, torch.float32, torch.Generator().manual_seed(m)) for m in (24, 24)])
    x = torch.randn(1, 32)
    work = [torch.zeros(1)]
    arguments = (x, packed.table, packed.A, packed.B, packed.ranks, packed.thresholds, None, None, None, x[0], 1e-5,
                 torch.randn(1, 24), [], None, [24, 24], True, path, [], work)  # fmt: skip
    torch.library.opcheck(torch.ops.rsparse_kernels.gemv.default, arguments)


@pytest.mark.parametrize("chosen", [None, torch.tensor([1, 4], dtype=torch.int32)])
def test_neurons_are_registered_as_torch_asks(chosen):
    gate, up = torch.randn(2, 6, 8)
    arguments = (torch.randn(2, 8), gate, up, 0.1, chosen, None, 0.0, "dense")
    torch.library.opcheck(torch.ops.rsparse_kernels.neurons.default, arguments)


def test_under_torch_compile():
    module = Gemv(pack([segment(48, 32, 2, 0.5, torch.float32, torch.Generator().manual_seed(0))]))
    compiled = torch.compile(lambda x, y: module(x, y).relu(), fullgraph=True, backend="aot_eager")
    for tokens in (1, 2, 3):
        x, y = torch.randn(tokens, 32), torch.randn(tokens, 48)
        torch.testing.assert_close(compiled(x, y), module(x, y).relu())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: [], "no segments"),
        (lambda a: [a.replace(weight=a.one.weight.double())], "float64"),
        (lambda a: [a.one, a.replace(weight=torch.randn(5, 9))], "expected 8 channels"),
        (lambda a: [a.one, a.replace(weight=a.one.weight.half())], "float16"),
        (lambda a: [a.replace(B=None)], "one factor"),
        (lambda a: [a.replace(A=torch.randn(5, 3))], "expected (6, r)"),
        (lambda a: [a.replace(norms=torch.ones(6))], "expected (8,)"),
        (lambda a: [a.replace(bias=torch.ones(8))], "expected (6,)"),
        (lambda a: [a.replace(threshold=math.nan)], "expected a number"),
        (lambda a: [a.replace(weight=torch.ones(6))], "a weight (6,); expected (m, n)"),
        (lambda a: [a.replace(A=torch.ones(6))], "factors (6,) and (8, 2)"),
        (lambda a: [a.replace(B=torch.ones(8))], "factors (6, 2) and (8,)"),
    ],
)
def test_segments_that_cannot_be_packed(change, said):
    class Made:
        one = segment(6, 8, 2, 0.5, torch.float32, torch.Generator())

        def replace(self, **fields):
            return Segment(**(vars(self.one) | fields))

    with pytest.raises(ValueError) as error:
        pack(change(Made()))
    assert said in str(error.value)


@pytest.mark.parametrize("kind", ["gemv", "neurons"])
@pytest.mark.parametrize(
    ("x", "said"),
    [(torch.ones(1, 7), "(1, 7)"), (torch.ones(8).double(), "float64"), (torch.ones(8, 1), "(8, 1)"),
     (torch.ones(0, 8), "(0, 8)"), (torch.tensor(1.0), "x is (),"), (torch.ones(8, device="meta"), "on meta")],
)  # fmt: skip
def test_inputs_that_do_not_fit(x, said, kind):
    one = segment(6, 8, 2, 0.5, torch.float32, torch.Generator())
    module = Gemv(pack([one])) if kind == "gemv" else Neurons(one.weight, one.weight)
    with pytest.raises(ValueError) as error:
        module(x)
    assert said in str(error.value) and "expected (..., 8), at least one token" in str(error.value)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda y: y[:1], "residual is (1, "), (lambda y: y[None], "residual is (1, 2, "),
     (lambda y: y.half(), "float16"), (lambda y: y.to("meta"), "on meta")],
)  # fmt: skip
def test_residuals_that_do_not_fit(change, said, gated):
    module = Gemv(pack([segment(6, 8, 2, 0.5, torch.float32, torch.Generator())] * 2), gated)
    x, y = torch.ones(2, 8), torch.ones(2, 6 if gated else 12)
    assert module(x, y).shape == y.shape
    with pytest.raises(ValueError) as error:
        module(x, change(y))
    assert said in str(error.value) and f"expected (2, {y.shape[1]}), torch.float32 on cpu" in str(error.value)


@pytest.mark.parametrize("thresholds", [[0.5], [0.5] * 3, [0.5, math.nan]])
def test_thresholds_that_do_not_fit(thresholds):
    packed = pack([segment(6, 8, 2, 0.5, torch.float32, torch.Generator())] * 2)
    with pytest.raises(ValueError, match="expected 2 numbers, by segment"):
        packed.with_thresholds(thresholds)


def test_a_norm_that_does_not_read_what_is_before_it():
    one = segment(6, 8, 2, 0.5, torch.float32, torch.Generator())
    before = Gemv(pack([one]))
    for norm in (None, (torch.ones(8), 1e-5)):
        with pytest.raises(ValueError, match="after is 6 wide and norm .*; expected 8"):
            Gemv(pack([one]), norm=norm, after=before)


def test_what_cannot_be_gated_or_cut():
    one = segment(6, 8, 2, 0.5, torch.float32, torch.Generator())
    with pytest.raises(ValueError, match="two of one width"):
        Gemv(pack([one]), gated=True)
    for field in ("columns", "rows", "splits", "warps"):
        with pytest.raises(ValueError, match=f"{field} is 0"):
            Configuration(**{field: 0})
    with pytest.raises(ValueError, match="rows is 24"):
        Configuration(rows=24)
    for wrong in (Configuration(64, 8), Configuration(128, 128)):
        triton_gemv.grid_of(pack([one]), wrong)
        with pytest.raises(ValueError, match="for several tokens"):
            triton_gemv.grid_of(pack([one]), wrong, 2)


# A norm in front, a residual behind


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("path", ["triton", "module"])
def test_a_norm_in_front_and_a_residual_behind(tokens, path):
    """As Llama's norm, product and addition one after another."""
    generator = torch.Generator().manual_seed(3)
    segments = [segment(40, 96, 4, 0.7, torch.float32, generator, norms=True) for _ in range(2)]
    x, residual = torch.randn(tokens, 96, generator=generator), torch.randn(tokens, 40, generator=generator)
    norm = torch.rand(96, generator=generator) + 0.5
    expected = exact(reference.rms_norm(x, norm, 1e-5), segments, True) + residual
    if path == "module":
        found = Gemv(pack(segments), True, (norm, 1e-5))(x, residual)
    else:
        packed, cut = pack([to(one) for one in segments]), Configuration(32, 16, 3, 1, False)
        work = triton_gemv.workspace(packed, cut, tokens)
        given = (norm.to(DEVICE), 1e-5, residual.to(DEVICE))
        found = triton_gemv.gemv(x.to(DEVICE), packed, True, cut, work, *given).cpu()
    assert wrong_by(found, expected) < 12 * EPS[torch.float32]


@pytest.mark.parametrize(
    ("tokens", "dtype", "listed"),
    list(itertools.product([1, 3, 6], EPS, [False, True])) if GPU else  # interpreted: every pair of two
    [(1, torch.float32, False), (3, torch.float16, False), (1, torch.bfloat16, True), (3, torch.float32, True),
     (1, torch.float16, True), (3, torch.bfloat16, False), (6, torch.float16, True)],
)  # fmt: skip
def test_a_launch_leaves_what_the_next_norm_needs(tokens, dtype, listed, monkeypatch):
    """o with its residual, then gate and up behind a norm of their sum: as modules that know of each other, on a GPU's
    layout."""
    monkeypatch.setattr(Gemv, "takes", lambda module, tokens: "triton")
    generator = torch.Generator().manual_seed(5)
    o = segment(150, 96, 4, 0.7, dtype, generator, bias=True)
    pair = [segment(40, 150, 5, 0.5, dtype, generator, norms=True) for _ in range(2)]
    x, residual = (torch.randn(tokens, size, generator=generator).to(dtype) for size in (96, 150))
    norm = (torch.rand(150, generator=generator) + 0.5).to(dtype)
    packs = [pack([to(one) for one in parts]) for parts in ([o], pair)]
    cut = Configuration(32, 16, 3, 1, listed)
    first = Gemv(packs[0], configuration=cut, most_tokens=6)
    second = Gemv(packs[1], True, (norm.to(DEVICE), 1e-5), cut, 6, after=first)
    alone = Gemv(packs[1], True, (norm.to(DEVICE), 1e-5), cut, 6)
    like = Gemv(packs[0], configuration=cut, most_tokens=6, like=first)
    Gemv(packs[1], True, (norm.to(DEVICE), 1e-5), cut, 6, after=like)
    assert like.left[0] is first.left[0] and second.left == ()
    for scale in (1.0, 30.0):  # nothing of the call before is left
        y = first(x.to(DEVICE), scale * residual.to(DEVICE))
        found = second(y).cpu()
        wide = y.cpu().double()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * norm.double()
        assert wrong_by(found, exact(normed.float(), pair, True)) < 16 * EPS[dtype]
        assert wrong_by(alone(y).cpu(), exact(normed.float(), pair, True)) < 60 * EPS[dtype]  # a mask may flip
    with pytest.raises(ValueError, match="expected one, which a norm can read"):
        Gemv(pack([to(segment(96, 80, 0, 0.5, dtype, generator))]), False,
             (norm[:80].to(DEVICE), 1e-5), cut, 6, after=Gemv(packs[1], configuration=cut))  # fmt: skip


# INT4


def test_codes_are_the_nearest_and_survive_gptqs_layout():
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    found = quantized.round_to_nearest(weight)
    steps = found.scales.repeat_interleave(128, dim=1)
    assert ((found.dequantized() - weight).abs() <= 0.5 * steps * (1 + 1e-5)).all()
    rows = found.codes.T.reshape(-1, 8, 24).int()  # eight inputs of one output in a word
    qweight = sum(rows[:, k] << 4 * k for k in range(8))
    again = quantized.from_gptq(qweight, found.scales.T, torch.arange(256) // 128)
    assert torch.equal(again.codes, found.codes) and torch.equal(again.scales, found.scales)
    with pytest.raises(ValueError, match="reorders"):
        quantized.from_gptq(qweight, found.scales.T, torch.arange(256).flip(0) // 128)
    with pytest.raises(ValueError, match="200 inputs"):
        quantized.round_to_nearest(torch.randn(4, 200))
    with pytest.raises(ValueError, match="one scale per output"):
        quantized.Quantized(found.codes, found.scales[:, :1])
    with pytest.raises(ValueError, match=r"codes are \(256,\)"):
        quantized.Quantized(found.codes[0], found.scales[0])
    with pytest.raises(ValueError, match="codes go up to 16; expected 0 to 15"):
        quantized.Quantized(found.codes + found.codes.eq(15).byte(), found.scales)


INT4_CUTS = [((200,), 256, True, 16), ((70, 260), 128, False, 32), ((40, 40), 128, True, 32)]


@pytest.mark.parametrize(
    ("dtype", "threshold", "widths", "columns", "listed", "rows"),
    [(dtype, threshold, *cut) for dtype in EPS for threshold in (-math.inf, 0.8, math.inf) for cut in INT4_CUTS] if GPU
    else [(torch.float32, -math.inf, *INT4_CUTS[0]), (torch.float16, 0.8, *INT4_CUTS[1]),
          (torch.bfloat16, 0.8, *INT4_CUTS[2]), (torch.float32, math.inf, *INT4_CUTS[1])],
)  # fmt: skip
def test_int4(dtype, threshold, widths, columns, listed, rows):
    """The kernel and the dequantised product against float64, on a table of words."""
    generator, gated = torch.Generator().manual_seed(1), widths == (40, 40)
    segments = [int4(segment(m, 384, 5, threshold, dtype, generator, norms=True, bias=True)) for m in widths]
    x = torch.randn(1, 384, generator=generator).to(dtype)
    packed, cut = pack([to(one) for one in segments]), Configuration(columns, rows, 2, 1, listed)
    assert packed.table.dtype == torch.int32 and packed.table.nbytes == sum(packed.padded) * 384 / 2
    work = triton_gemv.workspace(packed, cut)
    first, second = (triton_gemv.gemv(x.to(DEVICE), packed, gated, cut, work) for _ in range(2))
    assert torch.equal(first, second) and not work.flags.any()
    check(first.cpu(), x, segments, gated)
    module = Gemv(packed, gated, most_tokens=0)
    assert module.takes(1) == "dense"
    check(module(x.to(DEVICE)).cpu(), x, segments, gated)
    for value in (math.nan, math.inf):
        x[0, 7] = value
        assert not triton_gemv.gemv(x.to(DEVICE), packed, gated, cut, work).isfinite().any()
    for i, one in enumerate(segments):
        torch.testing.assert_close(packing.weights(packed, i).T.cpu(), one.weight.dequantized())


def int4(one: Segment) -> Segment:
    return Segment(**(vars(one) | {"weight": quantized.round_to_nearest(one.weight)}))


@pytest.mark.parametrize("dtype", EPS if GPU else [torch.float32], ids=str)
@pytest.mark.parametrize("listed", [False, True])
def test_int4_as_a_decoder_runs_it(dtype, listed, monkeypatch):
    """o with its residual, then gate and up behind a norm of their sum, which o has left or which they take."""
    monkeypatch.setattr(Gemv, "takes", lambda module, tokens: "triton")
    generator = torch.Generator().manual_seed(6)
    o = int4(segment(128, 256, 4, 0.7, dtype, generator, bias=True))
    pair = [int4(segment(40, 128, 5, 0.5, dtype, generator, norms=True)) for _ in range(2)]
    x, residual = (torch.randn(1, size, generator=generator).to(dtype) for size in (256, 128))
    norm = (torch.rand(128, generator=generator) + 0.5).to(dtype)
    packs = [pack([to(one) for one in parts]) for parts in ([o], pair)]
    cut, front = Configuration(128, 16, 2, 1, listed), (norm.to(DEVICE), 1e-5)
    first = Gemv(packs[0], configuration=cut)
    second, alone = Gemv(packs[1], True, front, cut, after=first), Gemv(packs[1], True, front, cut)
    y = first(x.to(DEVICE), residual.to(DEVICE))
    assert wrong_by(y.cpu(), exact(x, [o], False) + residual.double()) < 4 * EPS[dtype]
    wide = y.cpu().double()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * norm.double()).float()
    for module, most in ((second, 16), (alone, 60)):  # a mask may flip where the norm is rounded first
        assert wrong_by(module(y).cpu(), exact(normed, pair, True)) < most * EPS[dtype]


def test_int4_keeps_to_its_own():
    one = segment(8, 128, 0, 0.5, torch.float32, torch.Generator())
    with pytest.raises(ValueError, match="segment 1 is Tensor; expected Quantized"):
        pack([int4(one), one])
    packed = pack([int4(one)])
    with pytest.raises(ValueError, match="2 tokens; expected 1 to 1"):
        triton_gemv.workspace(packed, Configuration(128), 2)
    for wrong in (Configuration(64), Configuration(128, 4), Configuration(128, 256), Configuration(128, warps=2)):
        with pytest.raises(ValueError, match="at least 128 columns, 8 to 128 rows and 1 warp for INT4"):
            triton_gemv.workspace(packed, wrong)
    with pytest.raises(ValueError, match="columns is 256; expected a divisor"):
        triton_gemv.workspace(packed, Configuration(256))


# Neurons of an MLP


@pytest.mark.parametrize("chosen", [None, [0, 3, 36]])
@pytest.mark.parametrize("norm", [False, True])
def test_neurons(chosen, norm):
    from kernels.triton_neurons import neurons

    generator = torch.Generator().manual_seed(2)
    gate, up = torch.randn(2, 37, 600, generator=generator).double() / 24
    x = torch.randn(600, generator=generator).double()
    weight = torch.rand(600, generator=generator).double() + 0.5
    list_ = None if chosen is None else torch.tensor(chosen, dtype=torch.int32)
    given = reference.rms_norm(x, weight, 1e-5) if norm else x
    cats = chosen is None
    expected = reference.cats(given, gate, up, 0.3) if cats else reference.chosen(given, gate, up, list_.long())
    assert 0 < (expected == 0).sum() < 37
    front = (weight.float(), 1e-5) if norm else None
    module = Neurons(gate.float(), up.float(), 0.3, list_, front)
    assert module.takes(1) == "dense"
    given = [y if y is None else y.to(DEVICE) for y in (x.float(), gate.float(), up.float(), list_)]
    front = (weight.float().to(DEVICE), 1e-5) if norm else (None, 0.0)
    for found in (module(x.float()), neurons(*given[:3], 0.3, given[3], *front).cpu()):
        assert torch.equal(found == 0, expected == 0)
        assert wrong_by(found, expected) < 12 * EPS[torch.float32]


def test_neurons_that_do_not_fit():
    gate = torch.ones(4, 8)
    with pytest.raises(ValueError, match="expected the same"):
        Neurons(gate, torch.ones(5, 8))
    for chosen in ([4], [-1], [], [[0]]):
        with pytest.raises(ValueError, match="at least one, int32, 0 to 3"):
            Neurons(gate, gate, chosen=torch.tensor(chosen, dtype=torch.int32))
    for other in (gate.half(), gate.to("meta")):
        with pytest.raises(ValueError, match="expected the same"):
            Neurons(gate, other)
    for weight in (torch.ones(8, 8, 8), gate.double()):
        with pytest.raises(ValueError, match=r"expected \(m, n\), one of torch.float32"):
            Neurons(weight, weight)
    for norm in (torch.ones(1), torch.ones(8).half(), torch.ones(8, device="meta")):
        with pytest.raises(ValueError, match=r"the norm's weight is .*; expected \(8,\), torch.float32 on cpu"):
            Neurons(gate, gate, norm=(norm, 1e-5))
    with pytest.raises(ValueError, match="threshold is nan"):
        Neurons(gate, gate, math.nan)


def test_no_launch_has_more_than_three_segments():
    packed = pack([segment(8, 16, 0, 0.5, torch.float32, torch.Generator())] * 4)
    with pytest.raises(ValueError, match=r"segments are \(8, 8, 8, 8\) wide; expected at most 3"):
        triton_gemv.workspace(packed, Configuration())


# The benchmark


def test_the_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(shapes.SIZES, "llama-2-7b", (64, 96, 32))
    monkeypatch.setitem(bench.timing.CACHES, "cpu", 1e3)
    monkeypatch.setattr(bench.timing, "bandwidth", lambda *_: 1e10)
    path = tmp_path / "out.json"
    asked = ["--device", "cpu", "--repeats", "3", "--inputs", "heavy", "--batch", "1", "2", "--json", str(path)]
    assert bench.main([*asked, "--chain", "--breakdown"]) == 0
    found = json.loads(path.read_text())
    assert [x["linear"] for x in found["rows"]] == 2 * ["qkv", "o", "gate+up", "down", "chain"]
    for row in found["rows"]:
        assert row["over torch"] == pytest.approx(row["torch us"] / row["ours us"]) and row["sparsity"] == 0.5
        if row["linear"] != "chain":
            assert 0.2 * row["dense bytes"] < row["bytes"] < 0.9 * row["dense bytes"] and row["sparse path us"] > 0
    printed = capsys.readouterr().out
    assert "geometric means" in printed and found["about"]["torch"] == torch.__version__
    for row in found["rows"][:4]:
        assert f"breakdown of {row['linear']}: sparse path us {row['sparse path us']:.2f}; as many" in printed
    with pytest.raises(ValueError, match="shape is 'llama'"):
        shapes.fused("llama")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--sparsity", "1.5"], "sparsity is 1.5"),
        (["--batch", "17"], "batch is 17"),
        (["--dtype", "int4", "--batch", "2"], "expected 1 for int4"),
        (["--dtype", "int4", "--device", "cpu"], "there is no CPU kernel of INT4 words"),
        (["--device", "cuda"], "sees no GPU here"),
        (["--seed", "-1"], "seed is -1; expected 0 to 9223372036854775807"),
        (["--seed", str(2**63)], "seed is 9223372036854775808"),
        (["--json", "{folder}"], "is a folder; expected a file"),
        (["--json", "{folder}/file/out.json"], "file is no folder; expected one"),
        (["--json", "/dev/null"], "/dev/null is no file"),
    ],
)
def test_what_the_benchmark_refuses(wrong, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "bench", lambda *_: pytest.fail("something was timed"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        bench.main([x.format(folder=tmp_path) for x in wrong])
    assert said in capsys.readouterr().err
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_the_benchmark_says_what_int4_is_compared_with_and_every_option_what_it_does(monkeypatch, capsys):
    row = {"linear": "o", "m": 8, "n": 8} | dict.fromkeys(
        ("torch us", "ours dense us", "ours us", "over torch", "over ours dense", "bandwidth share"), 1.0)  # fmt: skip
    monkeypatch.setattr(bench, "bench", lambda *_: iter([row]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for dtype, said in (("int4", "llama-2-7b, int4 (torch in bfloat16), "), ("float16", "llama-2-7b, float16, ")):
        assert bench.main(["--dtype", dtype, "--device", "cuda"]) == 0
        assert capsys.readouterr().out.startswith(said)
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    lines = capsys.readouterr().out.partition("options:\n")[2].splitlines()
    for line, after in itertools.pairwise([*lines, ""]):
        assert not line.startswith("  -") or "  " in line.strip() or after.startswith(" " * 10), f"{line}: no help"


@pytest.mark.parametrize(("place", "reason"), [
    ("/proc/nowhere/a.json", ""), ("{folder}/" + 300 * "a", "File name too long"),
    ("{folder}/" + 300 * "a" + "/new/a.json", "File name too long"),
])  # fmt: skip
def test_a_file_that_cannot_be_made_is_refused_whoever_asks(place, reason, tmp_path):
    """To root every folder seems writable, until something is written."""
    with pytest.raises(ValueError, match=rf"cannot be written: .*{reason}; expected a place for a file"):
        check_destination(Path(place.format(folder=tmp_path)))
    assert not list(tmp_path.iterdir())


def test_asking_for_a_place_leaves_nothing_behind(tmp_path, monkeypatch):
    """Nor is a folder made meanwhile, that another process could find. The longest names are allowed."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("made a folder"))
        for name in ("a.json", 255 * "a"):
            check_destination(tmp_path / name)
            check_destination(tmp_path / "new" / "newer" / name)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.json").write_text("old")
    check_destination(tmp_path / "a.json")
    assert [x.name for x in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_json_is_written_whole_or_not_at_all(tmp_path):
    tuning.write_json(tmp_path / "new" / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        tuning.write_json(tmp_path / "new" / "a.json", {"a": torch})
    with pytest.raises(OSError):
        tuning.write_json(tmp_path / "new", {"a": 1})
    assert [x.name for x in tmp_path.iterdir()] == ["new"]
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("kind", inputs.KINDS)
def test_inputs(kind):
    """As many values as asked for, the same for one seed; real activations are heavier-tailed than Gaussian ones."""
    drawn = [inputs.draw(kind, (4, 20000), torch.Generator().manual_seed(0), "llama-3-8b", "down") for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].shape == (4, 20000) and drawn[0].isfinite().all()
    kurtosis = (drawn[0] ** 4).mean() / (drawn[0] ** 2).mean() ** 2
    assert (kurtosis > 4) == (kind != "gaussian")


def test_inputs_that_are_not_published():
    with pytest.raises(ValueError, match="inputs are 'flat'"):
        inputs.draw("flat", (3,), torch.Generator())
    with pytest.raises(ValueError, match="published for 'llama-9'"):
        inputs.draw("published", (3,), torch.Generator(), "llama-9", "o")


def test_copies_outgrow_a_cache_and_not_the_memory():
    """What is read of them all, unless they held too much."""
    for device, cache in bench.timing.CACHES.items():
        for size, unread in itertools.product((1e6, 4e7, 2e8), (0.0, 0.5, 0.95, 1.0)):
            count = bench.timing.copies(size, device, unread)
            assert count * size <= bench.timing.HELD
            assert (count - 1) * (1 - unread) * size >= cache or (count + 1) * size > bench.timing.HELD
    assert bench.timing.copies(1e10, "cpu", 0.5) == 2, "never one alone"


def test_a_bench_reads_the_budget_it_is_asked_for():
    """Half of the bytes at any rho, up to what is rounded down; and with factors of four times the weights' width."""
    one = shapes.fused("llama-3-8b")[0]
    m, n = one.widths[1], one.channels
    for rho in (0.0, 0.5, 0.95, 1.0):
        for ratio in (1.0, 4.0):
            share, rank = bench.split(m, n, 0.5, rho, ratio)
            assert share * m * n + rank * ratio * (m + n) == pytest.approx(0.5 * m * n)
            assert share - 0.5 * rho < 0.02


def test_how_many_tokens_are_gathered():
    assert [operations.gathered_tokens(s) for s in (0.0, 0.5, 0.75, 0.9, 0.99)] == [1, 2, 4, 4, 4]


def test_a_model_of_packed_linears_is_held_once():
    """What a table holds beyond the weights and their factors is a few percent."""
    one = segment(1024, 512, 8, 0.5, torch.bfloat16, torch.Generator())
    asked = one.weight.nbytes + one.A.nbytes + one.B.nbytes
    assert pack([one] * 3).nbytes < 1.02 * 3 * asked


@pytest.mark.parametrize(("int4", "tokens"), [(False, 1), (True, 1), (False, 4)])
def test_candidates_are_distinct_grids(int4, tokens):
    """A row names the splits that ran, and none is timed twice."""
    weight = torch.empty(4096, 11008, dtype=torch.bfloat16, device="meta")
    if int4:
        weight = quantized.Quantized(weight.to(torch.uint8), weight[:, ::128])
    packed = pack([Segment(weight, 0.5)])
    found = tuning.candidates(packed, tokens)
    grids = [triton_gemv.grid_of(packed, x, tokens) for x in found]
    assert len(found) == len(set(found)) > 5
    assert [grid.splits for grid in grids] == [x.splits for x in found]
    some = {43, 86} if int4 else {16, 32} if tokens == 1 else {12, 16}
    assert {x.splits for x in found if x.columns == 128} >= some
    if int4:
        with pytest.raises(ValueError, match="2 tokens; expected 1 for int4"):
            tuning.candidates(packed, 2)


@pytest.mark.parametrize("place", ["new", "file/in"])
def test_a_launch_is_measured_once_wherever_it_can_be_kept(place, tmp_path, monkeypatch, recwarn):
    """Once for the process where nothing can be written, which is told once."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("RSPARSE_CACHE", str(tmp_path / place))
    monkeypatch.setattr(tuning, "_UNSAVED", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(tuning, "Gemv", lambda *_: None)
    times = itertools.count(3, -1)
    measured = []

    def measure(*_):
        measured.append(next(times) % 5)
        return SimpleNamespace(p50=measured[-1])

    monkeypatch.setattr(tuning.timing, "measure", measure)
    packed = pack([Segment(torch.empty(4096, 1024, dtype=torch.bfloat16, device="meta"), 0.5)])
    for sparsity in (0.5, 0.6):
        x, count = torch.ones(1, 1024), len(measured)
        found = [tuning.tune([packed], False, x, sparsity) for _ in range(2)]
        offered = tuning.candidates(packed)
        assert len(measured) - count == len(offered) > 1, "the second time it was known"
        fastest = offered[min(range(len(offered)), key=measured[count:].__getitem__)]
        assert found == [fastest, fastest]
    assert len(recwarn) == (place != "new") and (tmp_path / "new" / "kernels.json").exists() == (place == "new")


def test_without_a_home_choices_are_kept_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delenv("RSPARSE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    folder = tuning.cache_path().parent
    assert folder == cache_folder() and folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuning.cache_path() == tmp_path / "home" / ".cache" / "rsparse" / "kernels.json"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A home folder and a temporary one of this test; `deny` lets nothing be written into the former."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.delenv("RSPARSE_CACHE")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    real = tempfile.NamedTemporaryFile

    def refuse(*arguments, dir, **more):
        if Path(dir).is_relative_to(home):
            raise OSError(30, "Read-only file system")
        return real(*arguments, dir=dir, **more)

    def deny():
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)

    return SimpleNamespace(home=home / ".cache" / "rsparse", temporary=temporary / f"rsparse-{os.getuid()}", deny=deny)


def known_configuration(monkeypatch, content: bytes, folder: Path):
    """What is known of one launch, where `folder` holds `content`, in which KEY is that launch; None: measured."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(tuning, "_UNSAVED", {})
    monkeypatch.setattr(tuning, "_key", lambda *_: "KEY")
    monkeypatch.setattr(tuning, "tune", lambda *_: None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_bytes(content)
    packed = pack([Segment(torch.ones(128, 64), 0.5)])
    return tuning.configuration_for(packed, False, [0.5])


CHOICE = Configuration(64, 32, 6, 1, True)


@pytest.mark.parametrize("content", [b"", b"[1]", b"3", b"null", b"\xff{}", b"{"])
def test_a_file_that_holds_no_choices_counts_as_empty(content, tmp_path, monkeypatch):
    monkeypatch.setenv("RSPARSE_CACHE", str(tmp_path))
    assert known_configuration(monkeypatch, content, tmp_path) is None
    assert known_configuration(monkeypatch, json.dumps({"KEY": asdict(CHOICE)}).encode(), tmp_path) == CHOICE


def test_choices_are_read_at_home_though_it_cannot_be_written(places, monkeypatch):
    """And nothing is made by reading."""
    places.deny()
    assert known_configuration(monkeypatch, json.dumps({"KEY": asdict(CHOICE)}).encode(), places.home) == CHOICE
    assert not places.temporary.exists() and len(list(places.home.iterdir())) == 1
    assert tuning.cache_path().parent == places.temporary
    other = json.dumps({"KEY": asdict(CHOICE) | {"splits": 8}}).encode()
    assert known_configuration(monkeypatch, other, places.temporary) == CHOICE
    (places.home / "kernels.json").unlink()
    assert known_configuration(monkeypatch, other, places.temporary).splits == 8


def test_the_cache_stays_where_it_was_found(places):
    """A disk that is full for a moment does not move it."""
    assert cache_folder() == places.home
    places.deny()
    assert cache_folder() == places.home


@pytest.mark.parametrize("of", ["another user", "a link"])
def test_a_temporary_folder_of_others_is_not_taken(of, places, tmp_path, monkeypatch):
    """Anybody can make one of that name, and what lies in it is read as one's own."""
    places.deny()
    if of == "a link":
        (tmp_path / "elsewhere").mkdir()
        places.temporary.symlink_to(tmp_path / "elsewhere")
    else:
        places.temporary.mkdir()
        mine = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: mine + 1)
        places.temporary.rename(places.temporary.with_name(f"rsparse-{os.getuid()}"))
    content = json.dumps({"KEY": asdict(CHOICE)}).encode()
    taken = places.temporary.with_name(f"rsparse-{os.getuid()}")
    assert known_configuration(monkeypatch, content, taken) is None
    assert cache_folder() == places.home  # whose own error tells why it cannot be written


def test_a_user_without_a_home_has_a_temporary_cache(places, monkeypatch):
    def homeless(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert tuning.cache_path().parent == cache_folder() == places.temporary
    places.temporary.rmdir()
    places.temporary.touch()
    with pytest.raises(PermissionError, match="no folder of this user; expected one in RSPARSE_CACHE: .*rsparse-"):
        cache_folder()
