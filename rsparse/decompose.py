"""Truncated SVD factors of a weight, their store on disk, the score map, and the stable rank."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary

from rsparse.files import atomic_path
from rsparse.paths import cache_folder

FACTORS = ("svd", "whitened")
"""What the low-rank path can be made of: the singular vectors of W, or those of W weighted by the residual."""
ALIGNED = 8
"""Columns whose 16-bit rows begin at 16 bytes: matrix products of other widths miss a GPU's fast path."""


@dataclass(frozen=True)
class Factors:
    """Leading components of W = U S V^T: A = U_r diag(S_r) of shape (m, r), B = V_r of shape (n, r)."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @property
    def sigma(self) -> Tensor:
        """Singular values (r,), largest first."""
        return self.A.norm(dim=0)

    def leading(self, rank: int) -> Factors:
        """The first `rank` components (a view)."""
        return Factors(self.A[:, :rank], self.B[:, :rank])

    def padded(self) -> Factors:
        """With columns of zeros behind, up to a multiple of `ALIGNED`."""
        missing = -self.rank % ALIGNED
        return Factors(pad(self.A, (0, missing)), pad(self.B, (0, missing))) if missing else self

    def to(self, *target: torch.dtype | torch.device) -> Factors:
        """Both factors in another dtype or on another device."""
        return Factors(self.A.to(*target), self.B.to(*target))


@torch.no_grad()
def svd_factors(weight: Tensor, rank: int) -> Factors:
    """Leading `rank` SVD components of `weight` (m, n), computed and returned in float64.

    Through the eigenvectors of the Gram matrix on the smaller side: several times faster than an SVD on either
    device. Singular values below sqrt(eps64) ||W||, about 1.5e-8 ||W||, come in no particular order; that is
    below the rounding of every precision that factors are stored in. On the CPU where the device has no float64.
    """
    m, n = weight.shape
    if not 0 <= rank <= min(m, n):
        raise ValueError(f"rank is {rank}; expected 0..{min(m, n)} for a weight of shape ({m}, {n})")
    W = weight.detach().to("cpu" if weight.device.type == "mps" else weight.device).double()
    if m < n:
        transposed = _tall_factors(W.T.contiguous(), rank)
        sigma = transposed.sigma
        return Factors(transposed.B * sigma, transposed.A / sigma.clamp_min(torch.finfo(torch.float64).tiny))
    return _tall_factors(W, rank)


def _tall_factors(W: Tensor, rank: int) -> Factors:
    """`svd_factors` for m >= n: W^T W = V S^2 V^T gives B = V_r, and A = W V_r = U_r diag(S_r)."""
    _, V = torch.linalg.eigh(W.T @ W)
    B = V[:, V.shape[1] - rank :].flip(1)
    return Factors(W @ B, B.contiguous())


@torch.no_grad()
def eigenbasis(gram: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix (n, n) as columns, largest eigenvalue first, float64 on its device."""
    return torch.linalg.eigh(gram.double()).eigenvectors.flip(1)


_KEYS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight -> ((version, address), key)


def weight_key(weight: Tensor) -> str:
    """Content hash of a weight (shape, dtype and every byte), independent of its device.

    Remembered until the weight is changed in place or moved (a write through ``weight.data`` goes unseen):
    hashing a 7B model takes some seconds.
    """
    state = weight._version, weight.data_ptr()
    known, key = _KEYS.get(weight, (None, ""))
    if known != state:
        raw = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(raw.data)
        key = digest.hexdigest()[:32]
        _KEYS[weight] = (state, key)
    return key


class FactorStore:
    """Factors on disk, one safetensors file per weight, keyed by the weight's content.

    A stored rank serves every smaller rank, and only the columns asked for are read: a sweep should begin
    with its largest rank. Factors are computed in float64 and stored in the dtype they will run in.

    computed: (m, n, seconds) of every decomposition made so far.
    """

    VERSION = 1  # part of the file names: count up when `svd_factors` changes what it returns

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.computed: list[tuple[int, int, float]] = []

    def get(self, weight: Tensor, rank: int, dtype: torch.dtype | None = None) -> Factors:
        """Leading `rank` factors of `weight` on its device, as `dtype` (default: the weight's)."""
        dtype, key = dtype or weight.dtype, weight_key(weight)
        stored = self.find(key, rank, dtype, weight.device)
        return stored or self._keep(key, self.compute(weight, rank).to(dtype), weight.device)

    def find(self, key: str, rank: int, dtype: torch.dtype, device: torch.device) -> Factors | None:
        """The first `rank` of the factors kept under `key` in `dtype`, on `device`; None where there are fewer."""
        return self._read(self._path(key, dtype), rank, device)

    def keep(self, key: str, weight: Tensor, make: Callable[[], Factors]) -> Factors:
        """Factors ``make()`` of `weight`, in its dtype on its device, kept under `key`; with their time noted."""
        with self.timed(weight):
            made = make()
        return self._keep(key, made.to(weight.dtype), weight.device)

    def _keep(self, key: str, factors: Factors, device: torch.device) -> Factors:
        self._save(self._path(key, factors.A.dtype), {"A": factors.A, "B": factors.B})
        return factors.to(device)

    def _path(self, key: str, dtype: torch.dtype) -> Path:
        return self.folder / f"{key}-{str(dtype).removeprefix('torch.')}-v{self.VERSION}.safetensors"

    def compute(self, weight: Tensor, rank: int) -> Factors:
        """`svd_factors`, with its time noted; nothing is read or stored."""
        with self.timed(weight):
            return svd_factors(weight, rank)

    def basis(self, key: str, gram: Callable[[], Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """`eigenbasis` of ``gram()``, a matrix that `key` names, as `dtype`; computed once and kept on disk."""
        path = self.folder / f"{key}-basis-{str(dtype).removeprefix('torch.')}-v{self.VERSION}.safetensors"
        if not path.exists():
            matrix = gram()
            with self.timed(matrix):
                V = eigenbasis(matrix).to(dtype)
            self._save(path, {"V": V})
        with safe_open(path, framework="pt", device=str(device)) as file:
            return file.get_tensor("V")

    @contextmanager
    def timed(self, matrix: Tensor) -> Iterator[None]:
        """Note the time of a decomposition inside, under the shape of `matrix`."""
        started = time.monotonic()
        yield
        if matrix.device.type == "cuda":
            torch.cuda.synchronize(matrix.device)
        self.computed.append((*matrix.shape, time.monotonic() - started))

    @staticmethod
    def _read(path: Path, rank: int, device: torch.device) -> Factors | None:
        if not path.exists():
            return None
        with safe_open(path, framework="pt", device=str(device)) as file:
            A, B = file.get_slice("A"), file.get_slice("B")
            if A.get_shape()[1] < rank:
                return None
            return Factors(A[:, :rank], B[:, :rank])

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def default_store() -> FactorStore:
    """The store in the cache folder, see rsparse.paths."""
    return FactorStore(cache_folder() / "factors")


@torch.no_grad()
def score_map(factors: Factors, mean_abs: Tensor) -> Tensor:
    """S_ij = E|sigma_i x_j V_ji|, shape (r, n), float32: row i a component, column j an input channel.

    It factorises into sigma_i |V_ji| E|x_j| (R-Sparse, section 3.2), so the mean over tokens of |x|,
    `mean_abs` of shape (n,), is all that it takes from the activations. Rows descend in sigma.
    """
    return (factors.sigma[:, None] * factors.B.T.abs() * mean_abs.to(factors.B)).float()


def stable_rank(sigma: Tensor) -> float:
    """||W||_F^2 / ||W||_2^2 of the matrix with the singular values `sigma` (min(m, n),), all of them: >= 1."""
    energy = sigma.double().square()
    return float(energy.sum() / energy.max())
