"""What single tokens read, against masks counted by hand on the recorded inputs."""

import pytest
import torch

import rsparse
from rsparse.apply import protocol_of
from rsparse.models import decoder_linears
from rsparse.token_sparsity import per_token, together


@pytest.mark.parametrize("method", ["teal", "r-sparse", "cats", "larosa"])
def test_means_and_spreads_are_those_that_are_streamed(build, ids, method):
    model = build()
    rsparse.sparsify(model, method, 0.2, rho=0.8, calibration=ids)
    streamed, found = rsparse.measure(model, ids), per_token(model, ids)
    assert [line.name for line in found] == [x.name for x in streamed.linears]
    for values, line in zip(found.values(), streamed.linears, strict=True):
        assert values.shape == (ids.numel(),)
        assert float(values.mean()) == pytest.approx(line.realised, abs=1e-9)
        assert float(values.std(correction=0)) == pytest.approx(line.spread, abs=1e-9)
    assert float(together(found).mean()) == pytest.approx(streamed.realised, abs=1e-9)


def test_every_token_is_counted_by_itself(build, ids):
    """The first block's q reads inputs that no mask has touched: its masks can be counted on the dense model."""
    model = build()
    seen: list = []
    q = decoder_linears(model)[0].module
    handle = q.register_forward_pre_hook(lambda m, args: seen.append(args[0][0].detach()))
    for row in ids:
        model(row[None])
    handle.remove()
    report = rsparse.sparsify(model, "r-sparse", 0.4, rho=0.8, calibration=ids, tokens=-1)
    first, values = next(iter(per_token(model, ids).items()))
    (m, n), threshold = (first.m, first.n), first.threshold
    for x, value in zip(torch.cat(seen), values, strict=True):
        kept = sum(abs(float(v)) > threshold for v in x)
        assert float(value) == pytest.approx(1 - (kept * m + first.rank * (m + n)) / (m * n), abs=1e-12)
    assert report.linears[0] == first and values.std() > 0
    assert protocol_of(model).tokens == -1, "the rule is put back"


def test_per_token_thresholds_have_no_spread(build, ids):
    model = build()
    rsparse.sparsify(model, "teal", 0.5, threshold="per-token")
    for line, values in per_token(model, ids).items():
        torch.testing.assert_close(values, torch.full_like(values, 1 - line.read))


def test_linears_weigh_by_their_bytes(build, ids):
    model = build()
    rsparse.sparsify(model, "teal", 0.5, scope="mlp", calibration=ids)
    found = per_token(model, ids)
    total = sum(x.m * x.n for x in found)
    token = 17
    want = sum(x.m * x.n * float(values[token]) for x, values in found.items()) / total
    assert float(together(found)[token]) == pytest.approx(want)
    assert not together({x: v for x, v in found.items() if x.kind in "qkvo"}).any()


def test_a_dense_model_is_refused(build, ids):
    with pytest.raises(ValueError, match="the model is dense"):
        per_token(build(), ids)
