"""SVD factors, their store, the score map, the stable rank."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from rsparse.decompose import FactorStore, default_store, score_map, stable_rank, svd_factors, weight_key

SHAPES = {"tall": (60, 24), "wide": (24, 60), "square": (40, 40), "column": (9, 1), "row": (1, 9)}


def random(m: int, n: int, seed: int = 0, rank: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(m, n, generator=generator, dtype=torch.float64)
    return (
        torch.randn(m, rank, generator=generator).double()
        @ torch.randn(rank, n, generator=generator).double()
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_factors_against_numpy(shape):
    W = random(*shape)
    U, S, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    for rank in {0, 1, min(shape) // 2, min(shape)}:
        factors = svd_factors(W, rank)
        assert factors.A.shape == (shape[0], rank) and factors.B.shape == (shape[1], rank)
        assert factors.rank == rank and factors.A.dtype == factors.B.dtype == torch.float64
        best = torch.from_numpy(U[:, :rank] * S[:rank] @ Vh[:rank])
        torch.testing.assert_close(factors.A @ factors.B.T, best, rtol=0, atol=1e-12 * S[0])
        torch.testing.assert_close(
            factors.A.norm(dim=0), torch.from_numpy(S[:rank].copy())
        )  # A carries sigma
        torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(rank, dtype=torch.float64))


def test_padding_adds_components_of_nothing():
    W = random(24, 20)
    for rank, width in ((0, 0), (1, 8), (7, 8), (8, 8), (9, 16), (20, 24)):
        factors = svd_factors(W, rank)
        padded = factors.padded()
        assert padded.A.shape == (24, width) and padded.B.shape == (20, width)
        torch.testing.assert_close(padded.leading(rank).B, factors.B, rtol=0, atol=0)
        torch.testing.assert_close(padded.A @ padded.B.T, factors.A @ factors.B.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_truncation_is_optimal(shape):
    """Eckart-Young: the squared error is the sum of the squared singular values left out."""
    W = random(*shape)
    S = np.linalg.svd(W.numpy(), compute_uv=False)
    for rank in range(0, 21, 4):
        factors = svd_factors(W, rank)
        error = float((W - factors.A @ factors.B.T).square().sum())
        assert error == pytest.approx(float((S[rank:] ** 2).sum()), rel=1e-10, abs=1e-20)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_rank_deficient_and_zero_weights(shape):
    W = random(*shape, rank=5)
    for rank in (5, 12, 20):
        factors = svd_factors(W, rank)
        assert float((W - factors.A @ factors.B.T).norm() / W.norm()) < 1e-7
        assert torch.isfinite(factors.A).all() and torch.isfinite(factors.B).all()
    zero = svd_factors(torch.zeros(shape), 3)
    assert not zero.A.any() and torch.isfinite(zero.B).all()


def test_factors_of_half_precision_weights_are_computed_in_double():
    W = random(16, 12).bfloat16()
    factors = svd_factors(W, 12)
    torch.testing.assert_close(factors.A @ factors.B.T, W.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [-1, 13])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=rf"rank is {rank}; expected 0..12"):
        svd_factors(random(16, 12), rank)


class TestStore:
    @pytest.fixture
    def computed(self, monkeypatch):
        """How often factors were computed and not read."""
        calls = []
        monkeypatch.setattr(
            "rsparse.decompose.svd_factors", lambda W, r: calls.append(r) or svd_factors(W, r)
        )
        return calls

    def test_a_stored_rank_serves_smaller_ones(self, tmp_path, computed):
        W, store = torch.nn.Parameter(random(16, 12).float()), FactorStore(tmp_path)
        store.get(W, 8)
        for rank in (8, 3, 1):
            found = FactorStore(tmp_path).get(W, rank)
            whole = svd_factors(W, 12)
            assert (
                found.A.shape == (16, rank) and found.B.shape == (12, rank) and found.A.dtype == torch.float32
            )
            torch.testing.assert_close(found.A, whole.A[:, :rank].float(), rtol=0, atol=0)
            torch.testing.assert_close(found.B, whole.B[:, :rank].float(), rtol=0, atol=0)
        assert computed == [8]

    def test_a_larger_rank_is_computed_and_kept(self, tmp_path, computed):
        W, store = random(16, 12), FactorStore(tmp_path)
        for rank in (2, 10, 5, 10):
            assert store.get(W, rank).rank == rank
        assert computed == [2, 10] and len(list(tmp_path.iterdir())) == 1

    def test_the_file_is_safetensors(self, tmp_path):
        FactorStore(tmp_path / "new").get(random(16, 12), 4)
        (path,) = (tmp_path / "new").iterdir()
        with safe_open(path, framework="np") as file:
            assert set(file.keys()) == {"A", "B"} and file.get_tensor("A").shape == (16, 4)

    def test_keyed_by_content(self, tmp_path, computed):
        W, store = random(16, 12), FactorStore(tmp_path)
        store.get(W, 4)
        store.get(W.clone(), 4)
        assert computed == [4]
        store.get(W + 1e-15, 4)
        assert computed == [4, 4]

    @pytest.mark.parametrize(
        "change",
        [
            lambda w: w.mul_(2),
            lambda w: w[0].fill_(0),
            lambda w: setattr(w, "data", w.data * 2),
            lambda w: w.copy_(torch.ones_like(w)),
        ],
    )
    def test_a_changed_weight_is_noticed(self, tmp_path, change):
        W, store = torch.nn.Parameter(random(16, 12)), FactorStore(tmp_path)
        store.get(W, 12)
        with torch.no_grad():
            change(W)
        found = store.get(W, 12)
        torch.testing.assert_close(found.A @ found.B.T, W.detach(), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dtype_is_the_weights_or_the_one_asked_for(self, tmp_path, dtype):
        store, W = FactorStore(tmp_path), random(16, 12)
        assert store.get(W.to(dtype), 4).A.dtype == store.get(W.to(dtype), 4).B.dtype == dtype
        assert store.get(W, 4, dtype).A.dtype == store.get(W, 2, dtype).A.dtype == dtype

    def test_the_default_store_can_be_moved(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RSPARSE_CACHE", str(tmp_path))
        assert default_store().folder == tmp_path / "factors"

    def test_key_does_not_depend_on_strides(self):
        W = random(16, 12)
        assert weight_key(W) == weight_key(W.T.contiguous().T) != weight_key(W.reshape(12, 16))


@pytest.mark.parametrize("shape", [(10, 6), (6, 10)])
def test_score_map_is_the_mean_over_tokens(shape):
    W, x = random(*shape).float(), random(50, shape[1], seed=1).float()
    _, sigma, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    brute = np.abs(sigma[:, None] * x.numpy()[:, None, :] * Vh).mean(0)  # over tokens: (components, channels)
    found = score_map(svd_factors(W, 6), x.abs().mean(0))
    assert found.shape == (6, shape[1]) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), brute, rtol=2e-4, atol=1e-6)


def test_stable_rank():
    assert stable_rank(torch.ones(7)) == pytest.approx(7)
    assert stable_rank(torch.tensor([3.0, 4.0]).bfloat16()) == pytest.approx(25 / 16)
    W = random(20, 30)
    assert stable_rank(svd_factors(W, 20).sigma) == pytest.approx(np.linalg.norm(W) ** 2 / np.linalg.norm(W, 2) ** 2)
