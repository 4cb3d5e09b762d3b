"""Perplexity and summaries under a token protocol, against sums over positions and row-by-row generation."""

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import rsparse
from reference import llama_logits, masked, weights_of
from rsparse.apply import tokens_as
from rsparse.evaluate import _batches, influenced_share, perplexity, rouge_l, summarise, token_losses
from rsparse.protocol import first_sparse
from rsparse.texts import Summary

RULES = ["all", "decode", "scored", 0.9, -0.5, 5, -3]


def by_hand(logits: torch.Tensor, row: torch.Tensor, prompt: int) -> torch.Tensor:
    """Losses of row[prompt:], one by one; logits at position i are of token i + 1."""
    return torch.stack([logits[i - 1].logsumexp(0) - logits[i - 1, row[i]] for i in range(prompt, len(row))])


@pytest.mark.parametrize("context", [0, 1, 7, 39])
def test_losses_of_the_dense_model(build, ids, logits, context):
    model = build()
    found = token_losses(model, ids, context)
    prompt = max(context, 1)
    expected = torch.stack([by_hand(x, row, prompt) for x, row in zip(logits(model, ids), ids, strict=True)])
    assert found.shape == (4, 40 - prompt) and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert perplexity(model, ids, context) == pytest.approx(math.exp(expected.mean()), rel=1e-12)


@pytest.mark.parametrize("tokens", RULES)
@pytest.mark.parametrize("context", [0, 6])
def test_losses_of_a_sparse_model_by_brute_force(build, ids, tokens, context):
    model, row = build(), ids[0, :13]
    weights = weights_of(model)
    report = rsparse.sparsify(model, sparsity=0.5, rho=0.8, threshold="per-token", tokens=tokens)
    plan = {x.name: (x.kept, x.rank) for x in report.linears}
    prompt = max(context, 1)
    first = first_sparse(tokens, 12, prompt)  # the last token is not fed

    def linear(name, W, x, position):
        return masked(*plan[name], sparse=lambda p: p >= first)(name, W, x, position)

    expected = by_hand(llama_logits(model.config, weights, row[:-1].tolist(), linear), row, prompt)
    torch.testing.assert_close(token_losses(model, row[None], context)[0], expected, rtol=0, atol=1e-9)
    share = sum(i >= first for i in range(prompt - 1, 12)) / (13 - prompt)
    assert influenced_share(model, 13, context) == pytest.approx(share)


def test_a_dense_model_is_not_influenced(build):
    assert influenced_share(build(), 13) == 0


def test_teals_window(build):
    """2048 tokens of context, 512 scored, the last half sparse: every scored logit is influenced."""
    model = build()
    rsparse.sparsify(model, "teal", 0.5, threshold="per-token", tokens=-0.5)
    assert influenced_share(model, 2560, 2048) == 1
    assert influenced_share(model, 2560, 0) == pytest.approx(1279 / 2559)
    with tokens_as(model, 0.9):
        assert influenced_share(model, 2560, 2048) == pytest.approx(256 / 512)


def test_logits_are_taken_a_few_positions_at_a_time(build, ids, monkeypatch):
    model, widths = build(), []
    expected = token_losses(model, ids)
    monkeypatch.setattr("rsparse.evaluate.LOGIT_ROWS", 7)
    model.lm_head.register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    torch.testing.assert_close(token_losses(model, ids), expected, rtol=0, atol=1e-12)
    assert max(widths) == 7 and sum(widths) == 4 * 39


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_losses_of_16_bit_models_are_summed_in_single_precision(build, ids, logits, dtype):
    model = build(dtype)
    expected = torch.stack(
        [by_hand(x.float(), row, 1) for x, row in zip(logits(model, ids[:, :-1]), ids, strict=True)]
    )
    torch.testing.assert_close(token_losses(model, ids), expected.double(), rtol=0, atol=0.05)
    assert perplexity(model, ids) == pytest.approx(math.exp(expected.mean()), rel=1e-2)


def test_short_integers_will_do(build, ids):
    model = build()
    assert token_losses(model, ids.int()).equal(token_losses(model, ids))


@pytest.mark.parametrize(("context", "length"), [(-1, 40), (40, 40), (41, 40), (0, 1), (1, 1)])
def test_contexts_that_leave_nothing(build, ids, context, length):
    with pytest.raises(ValueError, match=f"context is {context} for rows of {length} tokens"):
        perplexity(build(), ids[:, :length], context)


def test_ids_that_are_none(build, ids):
    for bad, message in (
        (ids.repeat(1, 7), "280 tokens; expected at most 256"),
        (ids[0], "shape"),
        (ids + 90, "holds token id"),
        (ids[:0], "at least one token"),
        (None, "NoneType"),
    ):
        with pytest.raises(ValueError, match=f"ids .*{message}"):
            perplexity(build(), bad)


@pytest.fixture
def tokenizer():
    """One token for each of 96 characters and a line break: ids 1..97; 0 is the end of sequence."""
    characters = ["<end>"] + [chr(c) for c in range(32, 127)] + ["\n"]
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


ITEMS = [
    Summary("A fox ran.", "Fox ran."),
    Summary("It rained for two days over the town.", "Rain."),
    Summary("x", "y"),
    Summary("Ab c", "d"),
]


@pytest.mark.parametrize("tokens", ["dense", "all", "decode", "scored", 0.5, -3])
def test_summaries_equal_row_by_row_generation(build, tokenizer, tokens):
    model = build()
    if tokens != "dense":
        rsparse.sparsify(model, sparsity=0.6, rho=0.8, threshold="per-token", tokens=tokens)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("\n")] *= 2  # so that some summaries end early
    expected, ended = [], 0
    for item in ITEMS:
        assert item.prompt == f"Article: {item.article}\nSummary:"
        prompt = tokenizer(item.prompt, return_tensors="pt").input_ids
        row = model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(row[0, prompt.shape[1] :], skip_special_tokens=True)
        ended += "\n" in text
        expected.append(text.strip().split("\n")[0])
    for batch_size in (1, 3, 8):
        found, influenced = summarise(model, tokenizer, ITEMS, max_new_tokens=20, batch_size=batch_size)
        assert found == expected
        lowest, highest = {"dense": (0, 0), "decode": (0.5, 0.99)}.get(tokens, (1, 1))
        assert lowest <= influenced <= highest, "under 'decode' the first token of a summary comes of a dense prompt"
    assert tokenizer.padding_side == "right"
    assert len(set(expected)) > 1


@pytest.mark.parametrize("limit", [40, 90])
def test_articles_are_cut_to_the_models_positions(build, tokenizer, limit, monkeypatch):
    model = build(max_position_embeddings=limit)
    fed = []
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: fed.append(input_ids) or input_ids[:, :1])
    article = "abcdefghij" * 20
    summarise(model, tokenizer, [Summary(article, "x"), Summary("ab", "y")], max_new_tokens=16)
    texts = [t for ids in fed for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert sorted(map(len, texts)) == [len(Summary("ab", "").prompt), limit - 16]
    assert all(t.startswith("Article: ab") and t.endswith("\nSummary:") for t in texts)
    with pytest.raises(ValueError, match="prompts have 1 positions"):
        summarise(model, tokenizer, [Summary(article, "x")], max_new_tokens=limit - 1)


def test_batches_hold_similar_lengths_and_few_tokens():
    assert list(_batches([5, 90, 7, 6, 40], rows=2, tokens=100)) == [[0, 3], [2, 4], [1]]
    assert list(_batches([500], rows=2, tokens=100)) == [[0]] and list(_batches([], 2, 100)) == []


def test_rouge():
    references = [
        Summary("", "the cat sat on the mat"),
        Summary("", "dogs are barking"),
        Summary("", "one two three four"),
    ]
    frame = rouge_l(references, ["the cat lay on a mat", "a dog barked", ""])
    # common subsequences: the cat on mat, 4 of 6 and 6 words; dog bark (stemmed), 2 of 3 and 3; nothing
    assert frame.rouge_l.tolist() == pytest.approx([100 * 4 / 6, 100 * 2 / 3, 0])
    assert frame.task.unique().tolist() == ["summaries"] and frame.item.tolist() == [0, 1, 2]
    with pytest.raises(ValueError):
        rouge_l(references, ["one"])
