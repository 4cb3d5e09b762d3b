"""Compile the Triton kernels for GPUs that are not here; prints what was built as JSON. A program of its own: the other
tests run under Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import triton_attention, triton_gemv, triton_lists, triton_neurons
from kernels.packing import Packed, Segment, pack
from kernels.quantized import GROUP, Quantized
from kernels.triton_gemv import Configuration
from kernels.tuning import KINDS, SEVERAL

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32",
         torch.int64: "i64"}  # fmt: skip
AHEAD = ("prefetch.global.L2", "griddepcontrol.wait")
empty = partial(torch.empty, device="meta")


def packed_of(dtype: torch.dtype, int4: bool, all_options: bool, segments: int) -> Packed:
    """q/k/v, gate and up, or one linear, of a large model's sizes, without memory."""
    m, n, r = 4096, 11008, 51
    weight = empty(m, n, dtype=dtype)
    if int4:
        weight = Quantized(empty(m, n, dtype=torch.uint8), empty(m, n // GROUP, dtype=dtype))
    factors = (empty(m, r, dtype=dtype), empty(n, r, dtype=dtype))
    options = (empty(n), empty(m)) if all_options else (None, None)
    return pack([Segment(weight, 0.5, *factors, *options)] * segments)


def gemv(dtype: torch.dtype, configuration: Configuration, int4: bool, tokens: int, all_options: bool,
         segments: int) -> tuple[dict, dict]:  # fmt: skip
    """Arguments and constants of a launch."""
    packed = packed_of(dtype, int4, all_options, segments)
    grid = triton_gemv.grid_of(packed, configuration, tokens)
    x, gated = empty(tokens, packed.channels, dtype=dtype), segments == 2
    y = empty(tokens, packed.rows // (1 + gated), dtype=dtype)
    front, residual = (x[0], y) if all_options else (None, None)
    work = triton_gemv.workspace(packed, configuration, tokens)
    configured = dict(before=None, next=None, after=None)
    if all_options and configuration.listed:  # others pass a norm of their own
        configured["before"] = triton_gemv.Left(empty(tokens, packed.channels), empty(tokens, 64))
    if all_options and segments == 1:
        configured |= dict(next=y[0], after=triton_gemv.left(packed, configuration, tokens))
    given = triton_gemv.arguments(x, packed, grid, work, y, front, 1e-5, residual, **configured)
    return given, triton_gemv.constants(packed, gated, configuration, grid, given)


def neurons(dtype: torch.dtype, chosen: bool, normed: bool) -> tuple[dict, dict]:
    m, n = 11008, 4096
    x, weight, y = empty(n, dtype=dtype), empty(m, n, dtype=dtype), empty(m, dtype=dtype)
    list_ = empty(m // 2, dtype=torch.int32) if chosen else None
    given = dict(x=x, gate=weight, up=weight, list_=list_, front=x if normed else None, y=y, threshold=0.1, eps=1e-5,
                 n=n, count=m)  # fmt: skip
    return given, dict(
        CHOSEN=chosen, FRONT=normed, ROWS=triton_neurons.ROWS, WIDTH=triton_neurons.WIDTH,
        NORM_WIDTH=4096 // dtype.itemsize,
    )  # fmt: skip


def attention(dtype: torch.dtype, span: int, window: bool, kv: int) -> tuple[dict, dict]:
    heads, dim, chunk = 32, 128, 512
    qkv, y = empty(heads + 2 * kv, dim, dtype=dtype), empty(heads, dim, dtype=dtype)
    cache, turns = empty(span // chunk, 1, kv, chunk, dim, dtype=dtype), empty(span, dim, dtype=dtype)
    size = triton_attention.tile(dtype.itemsize, span)
    given = dict(qkv=qkv, cos=turns, sin=turns, position=empty(1, dtype=torch.int64), keys=cache, values=cache, y=y,
                 partial=empty(heads, span // size, dim), sums=empty(heads, span // size, 2),
                 flags=empty(heads, dtype=torch.int32), rows=1, chunk=chunk, window=4096 * window, scale=dim**-0.5,
                 splits=span // size)  # fmt: skip
    members = heads // kv if span > triton_attention.LONG else 1
    return given, dict(HEADS=heads, KV=kv, MEMBERS=members, DIM=dim, TILE=size, WINDOW=window)


def build(kernel, arch: int, given: dict, constants: dict, options: dict):
    """`kernel` as a launch with `given` would compile it."""
    constants = constants | {name: value for name, value in given.items() if value is None}
    constants |= {"CHAINED": arch >= 90} | ({"INTERPRETED": False} if "INTERPRETED" in kernel.arg_names else {})
    signature, attributes = {}, {}
    plain = {kernel.arg_names.index(x) if isinstance(x, str) else x for x in kernel.do_not_specialize or ()}
    for place, name in enumerate(kernel.arg_names):
        value = given.get(name)
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(place,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if place not in plain and isinstance(value, int) and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def launches() -> Iterator[tuple[str, object, dict, dict, dict]]:
    """(what, kernel, arguments, constants, options) of all that a decoder can ask for."""
    for dtype, int4 in product((torch.float32, torch.float16, torch.bfloat16), (False, True)):
        name = "int4 " * int4 + TYPES[dtype]
        storage = "int4" if int4 else f"{8 * dtype.itemsize} bit"
        kinds = [(1, x) for x in KINDS[storage]] + [(t, x) for t in (4, 16) for x in SEVERAL.get(storage, ())]
        kinds += [(4, (64, 32, 1, False))] * (not int4)  # what a module has that nobody tuned
        for i, (tokens, (columns, rows, warps, listed)) in enumerate(kinds):
            configuration = Configuration(columns, rows, 2 if i == 2 else 16, warps, listed)  # long and short lists
            given = gemv(dtype, configuration, int4, tokens, i != 1, 1 + (i + 1) % 3)
            most = triton_gemv.most_registers(packed_of(dtype, int4, False, 1), configuration, tokens)
            options = {"num_warps": warps} | ({"maxnreg": most} if most else {})
            yield f"{name} {tokens} {configuration.numbers()}", triton_gemv._gemv, *given, options
        if not int4:
            for span, window, kv in ((512, False, 32), (4096, True, 8)):
                given = attention(dtype, span, window, kv)
                options = {"num_warps": triton_attention.WARPS}
                yield f"attention {name} {span}", triton_attention._attend, *given, options
            for chosen, normed in product((False, True), repeat=2):
                options = {"num_warps": triton_neurons.WARPS}
                yield f"neurons {name}", triton_neurons._neurons, *neurons(dtype, chosen, normed), options


def resources(kernel) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, as the assembler reports them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return int(told.split("REG:")[1].split()[0]), int(told.split("STACK:")[1].split()[0])


def weight_loads(kernel) -> set[int]:
    """Bytes of a thread's loads of weights, which alone are not kept in the cache."""
    loads = re.findall(r"ld\.global\S*L1::evict_first\S*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    return {int(count or 1) * int(bits) // 8 for count, bits in loads}


def lanes_are_rows(kernel) -> bool:
    """Whether every tensor that the tensor cores' assembly takes has row i in lane i, as `triton_tiles.int4` has it."""
    text = kernel.asm["ttgir"]
    given = [line for line in text.splitlines() if "elementwise_inline_asm" in line and "mma.sync" in line]
    layouts = {name for line in given for name in re.findall(r"tensor<32x\d+x\w+, (#\w+)>", line)}
    threads = [re.search(rf"{name} = #ttg\.blocked<.*threadsPerWarp = \[32, 1\]", text) for name in layouts]
    return bool(given) and bool(layouts) and all(threads)


def main() -> None:
    built = []
    for arch, (what, kernel, given, constants, options) in product(map(int, sys.argv[1:]), list(launches())):
        made = build(kernel, arch, given, constants, options)
        registers, spilled = resources(made)
        entries, (ahead, waits) = constants.get("SHARED", 0), map(made.asm["ptx"].find, AHEAD)
        own = triton_lists.shared_bytes(entries)  # which Triton does not know of
        built.append({"arch": arch, "what": what, "shared": made.metadata.shared + own, "registers": registers,
                      "list": entries, "declared": "kept_channels[" in made.asm["ptx"], "ahead": 0 < ahead < waits,
                      "spilled": spilled, "loads": sorted(weight_loads(made)),
                      "lanes": lanes_are_rows(made)})  # fmt: skip
    print(json.dumps(built))


if __name__ == "__main__":
    main()
