"""Lists of kept channels, in Triton: where each is put, and the memory of the program that makes one.

The list of a program of one warp and one token is in shared memory, declared in PTX, for Triton has none that can be
indexed: two bytes an entry, a distance from the program's first channel, or -1 where there is none. Other lists, those
of longer stretches and those under the interpreter are in global memory, four bytes an entry.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAST, LONGEST = 1024, 8192
"""Entries of the smallest list in shared memory, and channels of the longest stretch that has one: a longer list would
leave too few programs room. Powers of two between them, so that few kernels are compiled."""
BEHIND = 256
"""Entries behind the last one, of which a loop reads a tile in vain."""


def shared_entries(stretch: int) -> int:
    """Of a list in shared memory, for stretches of so many channels; 0 where they are too long for one."""
    return max(LEAST, triton.next_power_of_2(stretch)) if stretch <= LONGEST else 0


@triton.constexpr_function
def shared_bytes(entries):
    """What `own_memory` declares."""
    return 2 * (entries + BEHIND) if entries else 0


@triton.constexpr_function
def _declaration(entries):
    return f".shared .align 4 .b8 kept_channels[{shared_bytes(entries)}]; mov.u32 $0, kept_channels;"


@triton.jit
def own_memory(SHARED: tl.constexpr):
    """The address of a program's list of SHARED entries."""
    return tl.inline_asm_elementwise(_declaration(SHARED), "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def put(entries, place, distance, mask, SHARED: tl.constexpr):
    """Writes `distance` at `place` of a list, where `mask`."""
    if SHARED:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b16 h; setp.ne.u32 p, $3, 0; cvt.u16.u32 h, $2; @p st.shared.b16 [$1], h; "
            "mov.u32 $0, 0; }",
            "=r,r,r,r", [entries + 2 * place, distance, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(entries + place, distance, mask=mask)


@triton.jit
def got(entries, place, mask, other, SHARED: tl.constexpr):
    """The distance at `place` of a list; `other` without `mask`."""
    if SHARED:
        found = tl.inline_asm_elementwise("{ .reg .b16 h; ld.shared.b16 h, [$1]; cvt.s32.s16 $0, h; }", "=r,r",
                                          [entries + 2 * place], dtype=tl.int32, is_pure=False, pack=1)  # fmt: skip
        return tl.where(mask, found, other)
    else:
        return tl.load(entries + place, mask=mask, other=other)


def _ballots(count: int) -> tl.constexpr:
    """PTX: places among all that are kept of a warp's `count` flags a thread, in `count` registers, and how many there
    are, in as many."""
    flags = "".join(
        f"setp.ne.u32 p, ${2 * count + i}, 0; vote.sync.ballot.b32 b, p, 0xffffffff; and.b32 t, b, lower; "
        f"popc.b32 t, t; add.u32 ${i}, t, sum; popc.b32 t, b; add.u32 sum, sum, t; "
        for i in range(count)
    )
    totals = "".join(f"mov.u32 ${count + i}, sum; " for i in range(count))
    return tl.constexpr("{ .reg .pred p; .reg .b32 b, t, lower, sum; mov.u32 lower, %lanemask_lt; mov.u32 sum, 0; "
                        + flags + totals + "}")  # fmt: skip


_BALLOTS_4, _BALLOTS_8 = _ballots(4), _ballots(8)
_REGISTERS_4 = tl.constexpr(",".join(["=&r"] * 8 + ["r"] * 4))
_REGISTERS_8 = tl.constexpr(",".join(["=&r"] * 16 + ["r"] * 8))


@triton.jit
def places_of(keep, VOTES: tl.constexpr):
    """Places for the kept ones of `keep` (256 flags, or 128), without gaps, and how many they are. VOTES: of one warp,
    whose threads vote; the order is then that of registers."""
    if VOTES:
        if keep.shape[0] == 256:
            place, count = tl.inline_asm_elementwise(_BALLOTS_8, _REGISTERS_8, [keep], dtype=(tl.int32, tl.int32),
                                                     is_pure=False, pack=8)  # fmt: skip
        else:
            place, count = tl.inline_asm_elementwise(_BALLOTS_4, _REGISTERS_4, [keep], dtype=(tl.int32, tl.int32),
                                                     is_pure=False, pack=4)  # fmt: skip
        return place, tl.max(count, axis=0)
    else:
        return tl.cumsum(keep, axis=0) - 1, tl.sum(keep, axis=0)
