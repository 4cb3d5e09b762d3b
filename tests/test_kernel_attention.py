"""One token's attention as the Triton kernel computes it, on a GPU or under the interpreter, against float64."""

import pytest
import torch

from kernels import triton_attention
from kernels.attention import workspace
from kernels.triton_attention import attend, tile
from rsparse.decode.attention import Seen, StepAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SIZES = {  # rows, heads, kv_heads, head_dim, chunk, chunks
    "many heads": (1, 4, 4, 32, 64, 3), "grouped": (2, 8, 2, 16, 64, 2), "one head": (2, 1, 1, 64, 192, 1),
}  # fmt: skip


class Case:
    """A cache with noise in all of its positions, and a token."""

    def __init__(self, sizes, dtype, seed=0):
        rows, self.heads, kv, dim, chunk, chunks = sizes
        generator = torch.Generator().manual_seed(seed)

        def noise(*size):
            return torch.randn(size, generator=generator).to(DEVICE, dtype)

        self.qkv = noise(rows, 1, (self.heads + 2 * kv) * dim)
        self.keys, self.values = noise(chunks, rows, kv, chunk, dim), noise(chunks, rows, kv, chunk, dim)
        angle = torch.outer(torch.arange(chunks * chunk), 1.0 / 10 ** torch.linspace(0, 2, dim // 2)).repeat(1, 2)
        self.cos, self.sin = angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)
        left = rows * self.heads * chunks * chunk // 32
        self.work = (torch.full((left, dim), torch.nan, device=DEVICE), torch.full((left, 2), torch.nan, device=DEVICE),
                     torch.zeros(rows * self.heads, dtype=torch.int32, device=DEVICE))  # fmt: skip

    @property
    def span(self):
        return self.keys.shape[0] * self.keys.shape[3]

    def found(self, at, window=None, span=None):
        """The output, and the cache afterwards."""
        keys, values = self.keys.clone(), self.values.clone()
        position = torch.tensor([at], device=DEVICE)
        y = attend(self.qkv[:, 0], self.cos, self.sin, position, keys, values, self.heads, span or self.span, window,
                   *self.work)  # fmt: skip
        return y, keys, values

    def expected(self, at, window=None):
        chunk, kv = self.keys.shape[3], self.keys.shape[2]
        keys, values = self.keys.double(), self.values.double()
        position = torch.tensor([at], device=DEVICE)
        seen = Seen.within(position, self.span, window)
        cos, sin = self.cos[at : at + 1].double(), self.sin[at : at + 1].double()
        slot = position // chunk, position % chunk
        y = StepAttention(self.heads, kv, cos, sin, slot, seen)(self.qkv.double(), keys, values)
        return y[:, 0], keys, values


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("long", [10**6, 0], ids=["a head", "a group"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_against_float64(sizes, dtype, long, monkeypatch):
    monkeypatch.setattr(triton_attention, "LONG", long)
    case = Case(sizes, dtype)
    for at in (0, 1, 31, 32, 63, case.span - 1):
        y, keys, values = case.found(at)
        expected, theirs, their_values = case.expected(at)
        assert error(y, expected) < TOLERANCE[dtype], at
        assert error(keys, theirs) < TOLERANCE[dtype] and values.equal(their_values.to(dtype))
        changed = (keys != case.keys).any(-1).any(1).any(1).flatten().nonzero().flatten().tolist()
        assert changed == [at]
    assert not case.work[2].any()


@pytest.mark.parametrize("window", [1, 5, 32, 40, 1000])
def test_a_window(window):
    case = Case(SIZES["many heads"], torch.float32)
    for at in (0, 4, 63, 100, 191):
        assert error(case.found(at, window)[0], case.expected(at, window)[0]) < 2e-6
    if window < 100:
        assert error(case.found(191, window)[0], case.expected(191)[0]) > 1e-2


def test_a_span_that_ends_behind_the_position():
    case = Case(SIZES["many heads"], torch.float32)
    assert case.found(70, span=71)[0].equal(case.found(70)[0])
    assert case.found(70, span=128)[0].equal(case.found(70)[0])


def test_same_bits_and_what_is_not_finite():
    case = Case(SIZES["grouped"], torch.float32)
    first = case.found(100)[0]
    assert all(case.found(100)[0].equal(first) for _ in range(5))
    case.keys[0, 1, 0, 7] = torch.nan  # of row 1, head 0: query heads 0 to 3
    found = case.found(100)[0].view(2, 8, 16)
    assert found[1, :4].isnan().all() and found[1, 4:].isfinite().all() and found[0].isfinite().all()
    case.keys[:] = torch.nan  # positions behind the token are not looked at
    case.values[:] = torch.inf
    assert case.found(0)[0].isfinite().all()


def test_registered_as_torch_asks():
    case = Case(SIZES["grouped"], torch.float32)
    arguments = (case.qkv[:, 0], case.cos, case.sin, torch.tensor([70], device=DEVICE), case.keys, case.values, 8, 128,
                 None, [x.nan_to_num() for x in case.work])  # fmt: skip
    torch.library.opcheck(torch.ops.rsparse_kernels.attend.default, arguments)


def test_where_there_is_no_kernel():
    """Elsewhere than on a GPU; which other caches it refuses, a GPU tells."""
    case = Case(SIZES["many heads"], torch.float32)
    assert workspace(case.keys.cpu(), 4) is None
    if DEVICE == "cuda":
        assert workspace(case.keys, 4) is not None
        assert workspace(case.keys.double(), 4) is workspace(case.keys[..., :24], 4) is None
        assert workspace(case.keys[:, :, :, :48], 4) is None


def test_tiles_divide_chunks():
    assert tile(2, 512) == tile(4, 4096) == 32 and tile(2, 4096) == 64
