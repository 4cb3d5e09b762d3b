"""Errors of the residual stream, against a dense and a sparse pass whose states are kept whole."""

import pytest
import torch

import rsparse
from rsparse.apply import protocol_of, tokens_as
from rsparse.propagation import block_errors


@torch.no_grad()
def states(model, ids) -> torch.Tensor:
    """What every block puts out, (samples, blocks, positions, width)."""
    kept: list = []
    handles = [
        x.register_forward_hook(lambda m, a, y: kept.append(y[0] if isinstance(y, tuple) else y))
        for x in model.model.layers
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return torch.stack(kept, 1)


@pytest.mark.parametrize("method", ["teal", "r-sparse", "low-rank", "cats", "larosa", "wina-rotated"])
def test_errors_are_those_of_two_passes(build, ids, method):
    model = build()
    dense = states(model, ids)
    rsparse.sparsify(model, method, 0.2, rho=0.8, calibration=ids, tokens="decode")
    with tokens_as(model, "all"):
        sparse = states(model, ids)
    found = block_errors(model, ids)
    want = ((sparse - dense).norm(dim=-1) / dense.norm(dim=-1))[:, :, :-1].mean(-1)
    assert found.shape == (4, 2)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    assert (found > 1e-6).all() and protocol_of(model).tokens == "decode"


def test_without_dropped_channels_nothing_is_lost(build, ids):
    model = build()
    rsparse.sparsify(model, "teal", 0.001, threshold="per-token")
    assert block_errors(model, ids).max() < 0.1
    rsparse.sparsify(model, "teal", 0.9, threshold="per-token")
    assert block_errors(model, ids).min() > 0.1


def test_what_cannot_be_compared_is_refused(build, ids):
    model = build()
    with pytest.raises(ValueError, match="expected a sparsified model"):
        block_errors(model, ids)
    rsparse.sparsify(model, "griffin", 0.2)
    with pytest.raises(ValueError, match="expected a sparsified model"):
        block_errors(model, ids)
    rsparse.sparsify(model, "teal", 0.5, threshold="per-token")
    with pytest.raises(ValueError, match="at least 2"):
        block_errors(model, ids[:, :1])
