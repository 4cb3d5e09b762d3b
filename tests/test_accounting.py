"""Budget arithmetic: exact, never over budget, in the decimals that were typed."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rsparse.accounting import (
    BYTES,
    Reach,
    check_rho,
    check_sparsity,
    exact,
    model_sparsity,
    split_budget,
    square_split,
    times,
)
from rsparse.methods import METHODS
from rsparse.models import SCOPES, SHAPES, decoder_linears, shape_config
from rsparse.rotations import overhead

sizes = st.integers(1, 3000)
sparsities = st.one_of(st.decimals(0, "0.999", places=3).map(float), st.floats(0, 1, exclude_max=True))
rhos = st.one_of(st.decimals(0, 1, places=2).map(float), st.floats(0, 1))
byte_sizes = st.sampled_from(list(BYTES.values()))
BAD = [math.nan, math.inf, -0.01, True, False, "0.5", None, [0.5], 1.01, 2]


@given(sizes, sizes, sparsities, rhos, byte_sizes, byte_sizes)
@example(1, 1, 0.7, 0.95, BYTES["float32"], BYTES["float32"])
@example(4096, 4096, 0.999, 0.0, BYTES["int4-g128"], BYTES["float16"])
def test_never_reads_more_than_the_budget(m, n, sparsity, rho, weight, factor):
    split = split_budget(m, n, sparsity, rho, weight, factor)
    budget = 1 - Fraction(repr(sparsity))
    read = Fraction(split.kept * m * weight + split.rank * (m + n) * factor) / (m * n * weight)
    assert read == split.read <= budget and split.sparsity == 1 - read
    assert 0 <= split.kept <= n and 0 <= split.rank <= min(m, n)


@given(sizes, sizes, sparsities.filter(lambda s: s > 0), rhos.filter(lambda r: r > 0), byte_sizes, byte_sizes)
def test_no_channel_that_fits_the_budget_is_left_out(m, n, sparsity, rho, weight, factor):
    split = split_budget(m, n, sparsity, rho, weight, factor)
    assert split.read + Fraction(1, n) > 1 - Fraction(repr(sparsity))


@given(sizes, sizes, sparsities.filter(lambda s: s > 0), rhos, byte_sizes, byte_sizes)
def test_rank_is_the_floor_of_its_share(m, n, sparsity, rho, weight, factor):
    share = (1 - Fraction(repr(rho))) * (1 - Fraction(repr(sparsity))) * m * n * weight / ((m + n) * factor)
    assert split_budget(m, n, sparsity, rho, weight, factor).rank == min(math.floor(share), m, n)


@pytest.mark.parametrize(
    ("m", "n", "sparsity", "rho", "kept", "rank"),
    [
        (4096, 4096, 0.5, 0.95, 1946, 51),  # r = floor(.05 x .5 x 2048), k = floor(2048 - 2 x 51)
        (4096, 4096, 0.5, 1.0, 2048, 0),
        (4096, 4096, 0.5, 0.0, 0, 1024),
        (1024, 4096, 0.5, 0.95, 1948, 20),  # k and v of Llama-3: not square, a rank costs 5 channels
        (14336, 4096, 0.5, 0.95, 1946, 79),
        (10, 10, 0.7, 1.0, 3, 0),  # 1 - 0.7 is 0.30000000000000004 in binary, and 0.7 + 0.3 rounds down to 2
        (10, 10, 0.9, 1.0, 1, 0),
        (7, 3, 0.0, 0.3, 3, 0),
    ],
)
def test_worked_examples(m, n, sparsity, rho, kept, rank):
    split = split_budget(m, n, sparsity, rho)
    assert (split.kept, split.rank) == (kept, rank)


def test_int4_weights_with_half_precision_factors():
    weight, factor = BYTES["int4-g128"], BYTES["float16"]
    assert weight == Fraction(33, 64)
    # r = floor(.1 x .5 x 4096^2 x 33/64 / (8192 x 2)) = 26
    # k = floor((.5 x 4096^2 x 33/64 - 26 x 16384) / (4096 x 33/64)) = 1846
    split = split_budget(4096, 4096, 0.5, 0.9, weight, factor)
    assert (split.rank, split.kept) == (26, 1846)
    assert split.read == (Fraction(1846 * 4096 * 33, 64) + 26 * 8192 * 2) / (4096 * 4096 * Fraction(33, 64))


@given(sizes, sizes, rhos, byte_sizes, byte_sizes)
def test_no_sparsity_is_the_dense_linear_for_every_rho(m, n, rho, weight, factor):
    split = split_budget(m, n, 0.0, rho, weight, factor)
    assert (split.kept, split.rank, split.read) == (n, 0, 1)


@pytest.mark.parametrize("value", [0.1, 0.7, 0.29, 1e-7, 5e-324])
def test_numbers_are_the_decimals_they_print_as(value):
    assert exact(value) == exact(np.float64(value)) == Fraction(str(value))


def test_numpy_numbers_are_accepted():
    assert split_budget(8, 8, np.float64(0.5), np.float64(1.0)) == split_budget(8, 8, 0.5, 1)


@pytest.mark.parametrize("bad", [*BAD, 1.0, 1])
def test_sparsity_must_be_below_one(bad):
    with pytest.raises(ValueError, match=r"sparsity is .*\[0, 1\)"):
        check_sparsity(bad)
    with pytest.raises(ValueError, match="sparsity is"):
        split_budget(8, 8, bad, 0.5)


@pytest.mark.parametrize("bad", BAD)
def test_rho_must_be_a_share(bad):
    with pytest.raises(ValueError, match=r"rho is .*\[0, 1\]"):
        check_rho(bad)
    with pytest.raises(ValueError, match="rho is"):
        split_budget(8, 8, 0.0, bad)


@pytest.mark.parametrize(("m", "n"), [(0, 4), (4, 0), (-1, 4)])
def test_a_linear_has_weights(m, n):
    with pytest.raises(ValueError, match=r"shape \("):
        split_budget(m, n, 0.5, 0.5)


def test_model_sparsity_weighs_by_bytes():
    assert model_sparsity([3.0, 1.0], [0.5, 1.0]) == 0.375
    with pytest.raises(ValueError):
        model_sparsity([1.0], [0.5, 0.5])


def share(shape: str, scope: str) -> Fraction:
    config = shape_config(shape)
    d, f = config.hidden_size, config.intermediate_size
    kv = d * config.num_key_value_heads // config.num_attention_heads
    attention, mlp = 2 * d * d + 2 * d * kv, 3 * d * f
    return Fraction({"attention": attention, "mlp": mlp, "all": attention + mlp}[scope], attention + mlp)


@pytest.mark.parametrize(
    ("shape", "scope", "ceiling"),
    [("llama-2-7b", "attention", 0.332), ("llama-3-8b", "attention", 0.192), ("llama-3-8b", "mlp", 0.808)],
)
def test_ceiling_of_a_scope(shape, scope, ceiling):
    held = share(shape, scope)
    assert round(float(held), 3) == ceiling
    below = math.floor(float(held) * 1000) / 1000
    assert 0 < Reach(held).own_sparsity(below, f"within {scope!r}") < 1
    with pytest.raises(ValueError, match=rf"{scope!r}.*expected less than {float(held):.4f}"):
        Reach(held).own_sparsity(below + 0.001, f"within {scope!r}")
    with pytest.raises(ValueError, match="cannot be reached"):
        Reach(held).own_sparsity(float(held), f"within {scope!r}")


@given(st.decimals("0.001", "0.999", places=3).map(float), st.fractions("1/100", 1))
def test_scoped_sparsity_is_enough_and_hardly_more(sparsity, held):
    try:
        local = Fraction(repr(Reach(held).own_sparsity(sparsity, "within mlp")))
    except ValueError:
        assert exact(sparsity) / held > 1 - Fraction(1, 10**12)
    else:
        assert exact(sparsity) <= local * held <= exact(sparsity) + Fraction(1, 10**12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scope", SCOPES)
def test_planned_and_requested_agree_to_half_a_point_at_published_widths(shape, scope):
    config = shape_config(shape)
    d, f = config.hidden_size, config.intermediate_size
    kv = d * config.num_key_value_heads // config.num_attention_heads
    attention, mlp = [(d, d), (kv, d), (kv, d), (d, d)], [(f, d), (f, d), (d, f)]
    held = share(shape, scope)
    for sparsity in (0.05, 0.1, 0.15, 0.4, 0.5, 0.6, 0.7, 0.9):
        if sparsity >= held:
            continue
        local = Reach(held).own_sparsity(sparsity, f"within {scope!r}")
        for rho in (0.0, 0.5, 0.95, 1.0):
            read = dense = Fraction(0)
            for kind, shapes in (("attention", attention), ("mlp", mlp)):
                asked = local if scope in ("all", kind) else 0.0
                for m, n in shapes:
                    dense += m * n
                    read += m * n * split_budget(m, n, asked, rho).read
            assert sparsity <= 1 - read / dense <= sparsity + 0.005, (sparsity, rho)


@given(
    st.decimals("0.001", "0.999", places=3).map(float),
    st.fractions("1/100", 1, max_denominator=1000),
    st.fractions(1, 2, max_denominator=100),
    st.fractions(0, "1/4", max_denominator=1000),
)
def test_own_sparsity_pays_for_what_every_token_reads(sparsity, share, largest, extra):
    reach = Reach(share, largest, extra)
    assert reach.ceiling == share / largest - extra
    if exact(sparsity) < reach.ceiling - Fraction(1, 10**9):
        own = exact(reach.own_sparsity(sparsity, "here"))
        assert exact(sparsity) <= own * share - extra <= exact(sparsity) + Fraction(1, 10**12)
        assert own * largest < 1
    elif exact(sparsity) >= reach.ceiling:
        with pytest.raises(ValueError, match=f"{sparsity} cannot be reached here; expected less than"):
            reach.own_sparsity(sparsity, "here")


def test_no_sparsity_pays_nothing():
    assert Reach(Fraction(1), Fraction(1), Fraction(1, 4)).own_sparsity(0.0, "here") == 0
    with pytest.raises(ValueError, match=r"sparsity is 1.0; expected a number in \[0, 1\)"):
        Reach(Fraction(1)).own_sparsity(1.0, "here")


@given(st.fractions("1/10", 2, max_denominator=100), st.floats(0, 0.499))
def test_a_part_of_a_sparsity_is_rounded_up(part, sparsity):
    found = exact(times(part, sparsity))
    assert part * exact(sparsity) <= found < part * exact(sparsity) + Fraction(1, 10**12)


def test_a_part_of_a_sparsity_stays_below_one():
    assert times(Fraction(12, 10), 0.5) == 0.6 and times(Fraction(8, 10), 0.7) == 0.56
    assert times(Fraction(12, 10), 0.9) == times(Fraction(1), 0.9999999999999999) == 1 - 1e-12


def block(shape: str) -> list:
    """The linears of one block at the published widths, without memory."""
    with torch.device("meta"):
        return decoder_linears(AutoModelForCausalLM.from_config(shape_config(shape, num_hidden_layers=1)))


PUBLISHED = {  # method, scope: share of a nominal 1, rotations, ceiling; Llama-2-7B, then Llama-3-8B and Mistral-7B
    ("cats", "mlp"): ((0.446, 0, 0.446), (0.538, 0, 0.538)),
    ("cats", "all"): ((0.446, 0, 0.446), (0.538, 0, 0.538)),
    ("relufication", "mlp"): ((0.446, 0, 0.446), (0.538, 0, 0.538)),
    ("griffin", "mlp"): ((0.668, 0, 0.668), (0.808, 0, 0.808)),
    ("griffin", "all"): ((1, 0, 1), (1, 0, 1)),
    ("chess", "all"): ((0.611, 0, 0.611), (0.692, 0, 0.692)),
    ("chess", "mlp"): ((0.446, 0, 0.446), (0.538, 0, 0.538)),
    ("chess", "attention"): ((0.166, 0, 0.166), (0.154, 0, 0.154)),
    ("wina-rotated", "all"): ((1, 0.166, 0.834), (1, 0.154, 0.846)),
    ("larosa", "all"): ((0.922, 0.166, 0.603), (0.938, 0.154, 0.628)),
}


@pytest.mark.parametrize(("shape", "column"), [("llama-2-7b", 0), ("llama-3-8b", 1), ("mistral-7b", 1)])
@pytest.mark.parametrize(("name", "scope"), PUBLISHED)
def test_what_a_method_reaches_at_published_widths(name, scope, shape, column):
    method, linears = METHODS[name], block(shape)
    total = sum(x.weight_bytes * x.shape[0] * x.shape[1] for x in linears)
    inside = [x for x in linears if x.kind in method.touches(scope)]
    share = sum(method.parts[x.kind] * x.weight_bytes * x.shape[0] * x.shape[1] for x in inside) / total
    extra = sum(overhead(inside, method.rotated).values(), Fraction(0)) / total
    reach = Reach(share, max(method.parts[x.kind] for x in inside), extra)
    found = [round(float(x), 3) for x in (share, extra, reach.ceiling)]
    assert found == list(PUBLISHED[name, scope][column])


@pytest.mark.parametrize(
    ("name", "percent"),
    [("cats", (22.3, 26.9)), ("griffin", (33.4, 40.4))],
)
@pytest.mark.parametrize(("shape", "column"), [("llama-2-7b", 0), ("llama-3-8b", 1), ("mistral-7b", 1)])
def test_half_of_the_neurons_at_published_widths(name, percent, shape, column):
    linears, method = block(shape), METHODS[name]
    sizes = {x.kind: x.shape[0] * x.shape[1] for x in linears}
    share = Fraction(sum(sizes[kind] for kind in method.touches(method.scope)), sum(sizes.values()))
    assert round(50 * float(share), 1) == percent[column]
    assert Reach(share).own_sparsity(percent[column] / 100, name) == pytest.approx(0.5, abs=0.0015)


@pytest.mark.parametrize(("m", "n"), [(1024, 4096), (1024, 8192), (512, 1024), (4096, 4096)])
@pytest.mark.parametrize("sparsity", ["0.3", "0.5", "0.7", "0.9"])
@pytest.mark.parametrize("rho", ["0", "0.5", "0.75", "0.9", "0.95", "1"])
def test_budgeted_as_square(m, n, sparsity, rho):
    """r = floor((1 - rho) C n / 2) and k = floor(rho C n), to which what a floored rank leaves over may add."""
    C, share = 1 - Fraction(sparsity), Fraction(rho)
    rank, kept = math.floor((1 - share) * C * n / 2), math.floor(share * C * n)
    read = (share * C * n * m + (1 - share) * C * n / 2 * (m + n)) / (m * n)
    if read > 1:
        with pytest.raises(ValueError, match=rf"reads {float(read):.2f} times its dense bytes"):
            square_split(m, n, float(sparsity), float(rho))
        return
    own, own_rho = square_split(m, n, float(sparsity), float(rho))
    assert own == pytest.approx(float(1 - read), abs=1e-12)
    found = split_budget(m, n, own, own_rho)
    assert found.rank == rank and kept <= found.kept <= kept + (m + n) / m
    if m == n:
        assert (own, own_rho) == (float(sparsity), float(rho))


def test_budgeted_as_square_by_hand():
    """k and v of Llama-3-8B at 50%, rho 0.95: 51.2 components of 5120 numbers and 1945.6 columns of 1024."""
    own, rho = square_split(1024, 4096, 0.5, 0.95)
    assert own == 0.4625 and rho == pytest.approx(0.475 / 0.5375, abs=1e-12)
    assert square_split(4096, 4096, 0.5, 0.95) == (0.5, 0.95)
    # rank 1002 of layer 23's k: 1.23 times the dense bytes, which is refused
    with pytest.raises(ValueError, match=r"shape \(1024, 4096\) reads 1.23 times its dense bytes"):
        square_split(1024, 4096, 0.5, 1 - 1002 / 1024)
