"""GRIFFIN: the prompt chooses, row by row, and the continuation keeps to it; against loops in float64."""

import math

import pytest
import torch

import rsparse
from reference import kept_of, llama_logits, own_sparsity, prompted, shapes_of, weights_of
from rsparse.apply import protocol_of, tokens_as
from rsparse.models import KINDS
from rsparse.prompted import PREFIX, PromptedLinear, statistic
from rsparse.protocol import TokenProtocol

MLP = ("gate", "up", "down")
SPARSITY = {None: "0.4", "mlp": "0.4", "all": "0.5"}


@pytest.fixture
def short(monkeypatch):
    """A prefix of 5 positions under tokens="all", so that rows can be short."""
    monkeypatch.setattr("rsparse.apply.PREFIX", 5)


def kept_channels(weights, scope) -> dict[str, int]:
    """Kind of linear -> kept input channels; gate and up shrink with down."""
    parts = dict.fromkeys(KINDS if scope == "all" else MLP, "1")
    p = own_sparsity(weights, SPARSITY[scope], parts)
    chooses = [kind for kind in parts if kind not in ("gate", "up")]
    return {kind: kept_of(shapes_of(weights)[kind][1], p) for kind in chooses}


def griffin(model, scope=None, **options):
    return rsparse.sparsify(model, "griffin", float(SPARSITY[scope]), scope=scope, **options)


def expected(model, weights, row, scope, first: int) -> torch.Tensor:
    return llama_logits(model.config, weights, row.tolist(), prompted(kept_channels(weights, scope), first))


FIRST = {"all": 5, 6: 6, 0: 1, -3: 9, -500: 1, 0.5: 6, "scored": 7, "decode": 8}


@pytest.mark.parametrize("tokens", FIRST)
@pytest.mark.parametrize("scope", ["mlp", "all"])
def test_logits(build, ids, logits, short, tokens, scope):
    """Rows of 12 tokens, the first 8 their context."""
    model, row = build(), ids[0, :12]
    weights = weights_of(model)
    griffin(model, scope, tokens=tokens)
    with protocol_of(model).rows([12], [8]):
        found = logits(model, row[None])[0]
    torch.testing.assert_close(found, expected(model, weights, row, scope, FIRST[tokens]), rtol=0, atol=1e-9)


def test_without_a_prompt_the_first_64_positions_choose(build, logits):
    assert PREFIX == 64
    model = build(max_position_embeddings=128)
    row = torch.randint(0, 97, (1, 70), generator=torch.Generator().manual_seed(3))
    dense = logits(model, row)
    griffin(model)
    found = logits(model, row)
    torch.testing.assert_close(found[:, :64], dense[:, :64], rtol=0, atol=1e-12)
    assert ((found - dense)[:, 64:].abs().amax(-1) > 1e-3).all()
    assert logits(model, row[:, :64]).equal(dense[:, :64])
    with tokens_as(model, 64):
        assert logits(model, row).equal(found)


def test_the_statistic_by_loops():
    z = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[0, 2] = 0.0
    prompt = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0]]).bool()
    found = statistic(z, prompt)
    for row in range(2):
        for j in range(5):
            total = 0.0
            for t in range(7):
                length = math.sqrt(sum(float(v) ** 2 for v in z[row, t]))
                if prompt[row, t] and length:
                    total += (float(z[row, t, j]) / length) ** 2
            assert float(found[row, j]) == pytest.approx(math.sqrt(total), rel=1e-12)
    assert statistic(z.bfloat16(), prompt).dtype == torch.float32


def test_the_statistic_is_row_normalised():
    """A token of large activations counts no more than another one."""
    z = torch.tensor([[[3.0, 0.0, 4.0], [0.0, 1e4, 0.0], [0.0, 0.0, 1e-4]]])
    found = statistic(z, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(found, torch.tensor([[0.6, 1.0, math.sqrt(1.64)]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_only_the_prompt_counts(bad):
    z = torch.randn(1, 7, 5, generator=torch.Generator().manual_seed(0))
    prompt = torch.tensor([[0, 1, 1, 1, 1, 0, 0]]).bool()
    alone = statistic(z, prompt)
    z[0, 0], z[0, 6, 2] = bad, bad
    assert statistic(z, prompt).equal(alone)
    z[0, 3, 2] = bad
    assert torch.isnan(statistic(z, prompt)[0, 2])


class TestPrefix:
    @pytest.mark.parametrize(
        ("tokens", "length", "context", "first"),
        [
            ("all", 12, None, 5), ("all", 5, None, 5), ("all", 3, None, 3), ("all", 12, 8, 5),
            ("decode", 12, 8, 8), ("decode", 12, None, 12), ("scored", 12, 8, 7), ("scored", 12, 1, 1),
            ("scored", 1, None, 1), (0, 12, None, 1), (3, 12, None, 3), (500, 12, None, 12), (-3, 12, None, 9),
            (-500, 12, None, 1), (0.0, 12, None, 1), (-1.0, 12, None, 1), (0.5, 12, None, 6), (0, 1, None, 1),
        ],
    )  # fmt: skip
    def test_first_sparse_position(self, tokens, length, context, first):
        assert TokenProtocol(tokens, 5).first_sparse(length, context) == first

    def test_what_is_dense_and_what_chooses(self):
        """Two rows padded on different sides: the prompt has no padding, nor has what is sparse."""
        protocol = TokenProtocol("all", 2)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
        protocol.begin(input_ids=torch.zeros(3, 6, dtype=torch.long), attention_mask=mask)
        cpu = torch.device("cpu")
        prompt, sparse = protocol.prompt(cpu).int().tolist(), protocol.on(cpu).int().tolist()
        assert prompt == [[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
        assert sparse == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
        with protocol.rows([6, 3, 1], [4, 2, 1]):
            protocol.tokens = "decode"
            protocol.begin(input_ids=torch.zeros(3, 6, dtype=torch.long))
        prompt, sparse = protocol.prompt(cpu).int().tolist(), protocol.on(cpu).int().tolist()
        assert prompt == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
        assert sparse == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]

    def test_without_it_nothing_changes(self):
        protocol = TokenProtocol("all")
        protocol.begin(input_ids=torch.zeros(1, 6, dtype=torch.long))
        assert protocol.positions is None and protocol.any_sparse and not protocol.continues
        assert TokenProtocol(0).first_sparse(12) == TokenProtocol("scored").first_sparse(12, 1) == 0


def generated(model, prompt: torch.Tensor, steps: int = 6, **options):
    """Tokens, and the logits (rows, steps, vocabulary) that they were chosen by, as the model puts them out."""
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, y: seen.append(y[:, -1]))
    options |= dict(max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0)
    text = model.generate(prompt, **options)
    handle.remove()
    return text, torch.stack(seen, 1)


@pytest.mark.parametrize("tokens", ["decode", "scored", 4, -3, 0.5])
@pytest.mark.parametrize("scope", ["mlp", "all"])
def test_generation_keeps_to_the_prompts_choice(build, ids, logits, scope, tokens):
    """With a cache, one token at a time: the same as one pass over the whole text, in which the same positions
    choose."""
    model = build()
    griffin(model, scope, tokens=tokens)
    first = protocol_of(model).first_sparse(12, 12)
    text, steps = generated(model, ids[:2, :12])
    with tokens_as(model, first):
        at_once = logits(model, text[:, :-1])
    torch.testing.assert_close(at_once[:, 11:], steps, rtol=0, atol=1e-9)


def test_generation_by_brute_force(build, ids):
    model, row = build(), ids[0, :8]
    weights = weights_of(model)
    griffin(model, tokens="decode")
    text, _ = generated(model, row[None], 4)
    for _ in range(4):
        row = torch.cat([row, expected(model, weights, row, "mlp", 8)[-1].argmax()[None]])
    assert text[0].equal(row)


@pytest.mark.parametrize("tokens", ["decode", "scored", 4, -3, 0.5])
@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padded_rows_equal_single_rows(build, ids, tokens, cache):
    """Padding chooses nothing, and rows do not choose for each other."""
    model = build()
    griffin(model, "all", tokens=tokens)
    mask = torch.ones_like(ids[:3, :14])
    mask[1, :6], mask[2, :9] = 0, 0
    text, steps = generated(model, ids[:3, :14], attention_mask=mask, cache_implementation=cache)
    for i, start in enumerate((0, 6, 9)):
        alone, alone_steps = generated(model, ids[i : i + 1, start:14], cache_implementation=cache)
        torch.testing.assert_close(steps[i], alone_steps[0], rtol=0, atol=1e-9)
        assert text[i, start:].equal(alone[0])


@pytest.mark.parametrize("tokens", ["decode", "scored", "all", 0.5, -3, 4])
def test_right_padded_rows_equal_single_rows(build, ids, logits, short, tokens):
    model = build()
    griffin(model, "all", tokens=tokens)
    lengths, contexts = [40, 25, 9, 1], [30, 1, 9, 1]
    with protocol_of(model).rows(lengths, contexts):
        together = logits(model, ids)
    for i, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        with protocol_of(model).rows([length], [context]):
            alone = logits(model, ids[i : i + 1, :length])[0]
        torch.testing.assert_close(together[i, :length], alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_cache_of_other_rows_is_refused(build, ids):
    model = build()
    griffin(model, tokens="decode")
    out = model(ids[:2, :8], use_cache=True)
    assert model(ids[:2, 8:9], past_key_values=out.past_key_values).logits.shape[0] == 2
    model(ids[:3, :8])
    with pytest.raises(ValueError, match="a cache of 2 rows continues a prompt of 3; expected the prompt's own rows"):
        model(ids[:2, 9:10], past_key_values=out.past_key_values)


def test_the_report_and_counts_by_hand(build, ids):
    """Exactly the planned channels at every sparse position, whatever is measured on; no calibration."""
    model = build()
    weights = weights_of(model)
    for scope in ("mlp", "all"):
        kept = kept_channels(weights, scope)
        report = griffin(model, scope, tokens=10)
        assert (report.threshold, report.scope) == ("prompt", scope) and math.isnan(report.nominal)
        for x in report.linears:
            leads = "down" if x.kind in MLP else x.kind
            assert x.kept == kept.get(leads, x.n) and x.channels == (176 if leads == "down" else 64)
            assert x.follows == (f"model.layers.{x.layer}.mlp.down_proj" if x.kind in ("gate", "up") else "")
            assert x.read == x.kept / x.channels == 1 - x.realised and x.spread == 0
            assert math.isnan(x.threshold) == (leads in kept)
        assert report.planned >= float(SPARSITY[scope]) and report.realised == pytest.approx(report.planned)
        with rsparse.apply.counting(model) as realised:
            model(ids)
            assert [x.realised for x in realised().linears] == pytest.approx([x.realised for x in report.linears])
            tallies = [m.tally for m in model.modules() if isinstance(m, PromptedLinear)]
        assert {t.tokens for t in tallies} == {4 * 30} and len(tallies) == 2 * len(kept)


def test_what_comes_after_the_prompt_has_no_say(build, ids, logits):
    model, other = build(), ids[:2].clone()
    other[:, 9:] = ids[2:, 9:]
    for tokens in (6, -31):
        griffin(model, "all", tokens=tokens)
        found, expected = logits(model, ids[:2]), logits(model, other)
        torch.testing.assert_close(found[:, :9], expected[:, :9], rtol=0, atol=1e-12)
        assert ((found - expected)[:, 9:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_surfaces(build, ids, logits, bad):
    """In the prompt and after it."""
    for position in (2, 9):
        model = build()
        griffin(model, "all", tokens=6)
        with torch.no_grad():
            model.model.embed_tokens.weight[ids[0, position], 3] = bad
        assert torch.isnan(logits(model, ids[:1, :12])[0, position:]).any(-1).all()
