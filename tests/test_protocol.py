"""Which tokens are sparse, by position; and that a forward pass under "decode" is what a decoder computes."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rsparse
from reference import llama_logits, masked, weights_of
from rsparse.apply import protocol_of, tokens_as
from rsparse.protocol import PUBLISHED, TokenProtocol, check_tokens, first_sparse, real_positions, sparse_mask

RULES = ["all", "decode", "scored", 0, 3, 500, -1, -4, -500, 0.0, -0.0, 0.9, -0.5, -0.99, 1.0, -1.0]


@pytest.mark.parametrize(
    ("code", "length", "first"),
    [
        ("r-sparse", 30, 27), ("r-sparse", 31, 27), ("r-sparse", 101, 90),
        ("teal", 30, 15), ("teal", 31, 16), ("teal", 101, 51),
        ("wina", 30, 1), ("wina", 31, 1), ("wina", 101, 2),
        ("griffin", 30, 29), ("griffin", 31, 30), ("griffin", 101, 100),
        ("larosa", 30, 0), ("cats", 31, 0),
    ],
)  # fmt: skip
def test_published_defaults_by_position(code, length, first):
    mask = sparse_mask([first_sparse(PUBLISHED[code], length)], torch.ones(1, length, dtype=torch.bool))
    assert mask[0].nonzero().flatten().tolist() == list(range(first, length))


@pytest.mark.parametrize(
    ("tokens", "first"),
    [
        ("all", 0), ("decode", 12), ("scored", 11), (0, 0), (1, 1), (1.0, 20), (-1, 19), (-1.0, 0), (0.0, 0),
        (-0.0, 20), (20, 20), (25, 20), (-20, 0), (-25, 0), (0.5, 10), (-0.25, 15), (0.99, 19), (-0.04, 20),
        (0.05, 1), (0.15, 3),
    ],
)  # fmt: skip
def test_every_rule_on_twenty_positions_of_which_twelve_are_prompt(tokens, first):
    assert first_sparse(tokens, 20, 12) == first
    assert type(tokens)(tokens) == check_tokens(tokens)


@pytest.mark.parametrize(
    ("share", "length", "floor"), [(0.7, 10, 7), (0.29, 100, 29), (0.57, 100, 57), (0.1, 30, 3)]
)
def test_floors_are_taken_in_decimals(share, length, floor):
    assert first_sparse(share, length) == floor and first_sparse(-share, length) == length - floor
    assert first_sparse(np.float64(share), length) == floor


def test_a_row_without_a_context_is_a_prompt():
    assert first_sparse("decode", 9) == 9 and first_sparse("scored", 9) == 8


@pytest.mark.parametrize(
    "bad", ["none", "", True, None, math.nan, math.inf, 1.01, -1.5, [1], 1j, torch.tensor(1)]
)
def test_rules_that_are_not(bad):
    with pytest.raises(ValueError, match="tokens is .*expected one of"):
        check_tokens(bad)
    with pytest.raises(ValueError, match="tokens is"):
        TokenProtocol(bad)


@given(
    st.sampled_from(RULES),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20), st.integers(0, 5)), min_size=1, max_size=4),
)
def test_padding_on_either_side_is_never_sparse_and_never_counts(tokens, rows):
    width = max(sum(row) for row in rows)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (left, length, _) in enumerate(rows):
        real[i, left : left + length] = True
    mask = sparse_mask([first_sparse(tokens, length) for _, length, _ in rows], real)
    for i, (left, length, _) in enumerate(rows):
        alone = torch.arange(length) >= first_sparse(tokens, length)
        assert mask[i, left : left + length].equal(alone) and not (mask[i] & ~real[i]).any()


class Cache:
    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


def positions(protocol, rows=1, width=6, **kwargs):
    protocol.begin(input_ids=torch.zeros(rows, width, dtype=torch.long), **kwargs)
    found = protocol.on(torch.device("cpu"))
    return None if found is None else [row.nonzero().flatten().tolist() for row in found]


def test_a_bare_call_is_a_prompt_and_what_continues_a_cache_is_sparse():
    for tokens, expected in {"decode": [], "scored": [5], 2: [2, 3, 4, 5], 0.5: [3, 4, 5], -1: [5]}.items():
        protocol = TokenProtocol(tokens)
        assert positions(protocol) == positions(protocol, past_key_values=Cache(0)) == [expected]
        assert protocol.any_sparse == bool(expected)
        assert positions(protocol, width=1, past_key_values=Cache(6)) is None and protocol.any_sparse
        assert positions(protocol, width=3, past_key_values=Cache(6)) is None
    assert positions(TokenProtocol("all")) is None


def test_embeddings_stand_in_for_ids():
    protocol = TokenProtocol(2)
    protocol.begin(inputs_embeds=torch.zeros(1, 4, 8))
    assert protocol.positions[0].tolist() == [False, False, True, True]


def test_announced_rows():
    protocol = TokenProtocol("decode")
    with protocol.rows([6, 4], [2, 4]):
        assert positions(protocol, rows=2) == [[2, 3, 4, 5], []]
        protocol.tokens = "scored"
        assert positions(protocol, rows=2) == [[1, 2, 3, 4, 5], [3]]
        protocol.tokens = -0.5
        assert positions(protocol, rows=2) == [[3, 4, 5], [2, 3]]
        with protocol.rows([6], [6]):
            assert positions(protocol) == [[3, 4, 5]]
        assert positions(protocol, rows=2) == [[3, 4, 5], [2, 3]]
        with pytest.raises(ValueError, match="2 rows of up to 6 tokens were announced; got 3 x 6"):
            positions(protocol, rows=3)
        with pytest.raises(ValueError, match="got 2 x 5"):
            positions(protocol, rows=2, width=5)
    assert positions(protocol) == [[3, 4, 5]]


@pytest.mark.parametrize("row", [(4, 0), (4, 5), (0, 0)])
def test_rows_that_cannot_be(row):
    with (
        pytest.raises(ValueError, match="1 <= context <= length"),
        TokenProtocol("all").rows([4, row[0]], [1, row[1]]),
    ):
        pass


def test_masks_of_the_attention():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert real_positions(mask, 2, 4).equal(mask.bool()) and real_positions(mask, 2, 2).all()
    assert real_positions(None, 2, 4).all() and real_positions(torch.zeros(2, 1, 4, 4), 2, 4).all()


@pytest.mark.parametrize("shape", ["llama-2-7b", "mistral-7b"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [0.5, 3, -3, "scored", "decode"])
def test_a_static_cache_tells_padding_too(build, ids, shape, attention, tokens):
    model = build(shape=shape, **(dict(sliding_window=8) if shape == "mistral-7b" else {}))
    model.set_attn_implementation(attention)
    rsparse.sparsify(model, "teal", 0.5, threshold="per-token", tokens=tokens)
    mask = torch.ones_like(ids[:2, :12])
    mask[1, :6] = 0
    seen = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(model._rsparse.protocol.positions), prepend=False)
    options = dict(attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    found = [model.generate(ids[:2, :12], cache_implementation=cache, **options) for cache in (None, "static")]
    assert found[0].equal(found[1])
    assert seen[0].equal(seen[len(seen) // 2]) and not seen[0][1, :6].any()


THRESHOLDS = ["per-token", "static", "static-sequential"]


def decoded(model, row: torch.Tensor, context: int) -> torch.Tensor:
    """Logits of one row: the prompt in one call, then token by token through the cache."""
    out = model(row[None, :context], use_cache=True)
    logits = [out.logits[0]]
    for token in row[context:]:
        out = model(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0])
    return torch.cat(logits)


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["decode", "scored", "all"])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_one_forward_pass_equals_decoding_through_the_cache(build, ids, tokens, threshold):
    model = build()
    dense = model(ids).logits
    rsparse.sparsify(model, sparsity=0.5, threshold=threshold, tokens=tokens, calibration=ids)
    for context in (1, 17, 40):
        with protocol_of(model).rows([40], [context]):
            at_once = model(ids[:1]).logits[0]
        torch.testing.assert_close(at_once, decoded(model, ids[0], context), rtol=0, atol=1e-9)
    with protocol_of(model).rows([40], [17]):
        at_once = model(ids[:1]).logits[0]
    first = {"decode": 17, "scored": 16, "all": 0}[tokens]
    torch.testing.assert_close(at_once[:first], dense[0, :first], rtol=0, atol=1e-12)
    assert ((at_once - dense[0]).abs().amax(1)[first:] > 1e-3).all()


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["decode", "scored", "all", 0.9, -0.5, 7, -3])
def test_sparse_positions_by_brute_force(build, ids, tokens):
    """A whole model, position by position, in loops (tests/reference.py)."""
    model, row = build(), ids[0, :14]
    weights = weights_of(model)
    report = rsparse.sparsify(model, sparsity=0.5, rho=0.8, threshold="per-token", tokens=tokens)
    plan = {x.name: (x.kept, x.rank) for x in report.linears}
    first = first_sparse(tokens, 14, 9)

    def linear(name, W, x, position):
        return masked(*plan[name], sparse=lambda p: p >= first)(name, W, x, position)

    with protocol_of(model).rows([14], [9]):
        found = model(row[None]).logits[0]
    torch.testing.assert_close(
        found, llama_logits(model.config, weights, row.tolist(), linear), rtol=0, atol=1e-9
    )


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["decode", "scored", "all", 0.5, -3])
@pytest.mark.parametrize("threshold", ["per-token", "static"])
def test_padded_batches_equal_single_rows(build, ids, tokens, threshold):
    model = build()
    rsparse.sparsify(model, sparsity=0.5, threshold=threshold, tokens=tokens, calibration=ids)
    lengths, contexts = [40, 25, 9, 1], [30, 1, 9, 1]
    alone = []
    for row, length, context in zip(ids, lengths, contexts, strict=True):
        with protocol_of(model).rows([length], [context]):
            alone.append(model(row[None, :length]).logits[0])
    with protocol_of(model).rows(lengths, contexts):
        together = model(ids).logits
    for found, expected, length in zip(together, alone, lengths, strict=True):
        torch.testing.assert_close(found[:length], expected, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["decode", "scored", 0.5, -3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_prompt_equals_the_prompt_alone(build, ids, logits, tokens, side):
    model = build()
    rsparse.sparsify(model, sparsity=0.5, threshold="per-token", tokens=tokens)
    mask = torch.ones(4, 40, dtype=torch.long)
    real = slice(15, 40) if side == "left" else slice(0, 25)
    mask[1] = 0
    mask[1, real] = 1
    place = (mask.cumsum(1) - 1).clamp_min(0)
    together = logits(model, ids, attention_mask=mask, position_ids=place)
    for i, part in ((0, slice(0, 40)), (1, real)):
        torch.testing.assert_close(
            together[i, part], logits(model, ids[i : i + 1, part])[0], rtol=0, atol=1e-12
        )


@torch.no_grad()
def test_generation_prompt_by_rule_then_sparse(build, ids):
    """Inputs that generate feeds one by one are sparse under every rule: tokens equal the reference's."""
    model = build()
    weights = weights_of(model)
    report = rsparse.sparsify(model, sparsity=0.6, rho=0.8, threshold="per-token", tokens="decode")
    plan = {x.name: (x.kept, x.rank) for x in report.linears}
    prompt = ids[0, :8].tolist()
    for tokens, first in {"decode": 8, 6: 6, -0.5: 4}.items():
        row = list(prompt)

        def linear(name, W, x, position, first=first):
            return masked(*plan[name], sparse=lambda p: p >= first)(name, W, x, position)

        for _ in range(3):
            row.append(int(llama_logits(model.config, weights, row, linear)[-1].argmax()))
        with tokens_as(model, tokens):
            found = model.generate(ids[:1, :8], max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert found[0].tolist() == row


def test_a_deep_copy_has_a_protocol_of_its_own(build, ids, logits):
    model = build()
    rsparse.sparsify(model, sparsity=0.5, threshold="per-token", tokens=-4)
    expected = logits(model, ids)
    twin = copy.deepcopy(model)
    protocol_of(model).tokens = "all"
    logits(model, ids[:, :7])
    assert logits(twin, ids).equal(expected)
    rsparse.restore(model)
    assert logits(twin, ids).equal(expected)
    rsparse.restore(twin)
    assert logits(twin, ids).equal(logits(model, ids))
