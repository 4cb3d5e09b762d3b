"""What the kernels take against dense products: `python -m kernels.bench --shape llama-2-7b --dtype bfloat16`.

Per fused linear of one block: torch's dense product, our kernel at sparsity 0, and our kernel at the asked sparsity,
low-rank path included, in one run; on a GPU our two are tuned. With --chain, the linears of whole blocks one behind
another; with --breakdown, what a launch spends its time on. Bytes are those of the weights that a token reads.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from tqdm import tqdm

from kernels import inputs, packing, timing
from kernels.destination import check_destination
from kernels.operations import Gemv, has_triton
from kernels.packing import Packed, Segment
from kernels.processors import shared
from kernels.quantized import GROUP, Quantized
from kernels.shapes import SIZES, Fused, fused
from kernels.tuning import tune, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int4": torch.bfloat16}
"""Of storage -> of x."""
DRAWN = 1 << 18
"""Values of x that thresholds are read from."""
LAYERS = 4
"""Blocks of a chain, with weights of their own."""
PARTS = ("sparse path us", "as many channels, all read us", "launch us")
"""Fields of a breakdown."""


@dataclass(frozen=True)
class Asked:
    """One measurement: of which storage, sparsity (of the read bytes), rho, tokens, inputs, and where."""

    shape: str
    dtype: str
    sparsity: float
    rho: float
    batch: int
    inputs: str
    device: str
    repeats: int
    seed: int = 0

    @property
    def x_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def split(m: int, n: int, sparsity: float, rho: float, ratio: float = 1.0) -> tuple[float, int]:
    """Share of channels that are read, and rank: rho of the bytes, and what the rest buys. ratio: bytes of an element
    of the factors over those of the weight."""
    budget = 1 - sparsity
    rank = int(budget * (1 - rho) * m * n / ((m + n) * ratio))
    return budget - rank * (m + n) * ratio / (m * n), rank


def element(dtype: str) -> float:
    """Bytes of a stored weight; INT4 with its scales."""
    return 0.5 + 2 / GROUP if dtype == "int4" else DTYPES[dtype].itemsize


def weights(one: Fused, asked: Asked, sparsity: float, rho: float, drawn: Tensor, seed: int,
            gain: float = 1.0) -> Packed:  # fmt: skip
    """Random weights and factors of one fused linear, packed, with thresholds read from the values `drawn`."""
    generator = torch.Generator(asked.device).manual_seed(seed)
    ratio = asked.x_dtype.itemsize / element(asked.dtype)

    def normal(*size: int) -> Tensor:
        values = torch.randn(size, generator=generator, device=asked.device, dtype=asked.x_dtype)
        return values * (gain * one.channels**-0.5)

    parts = []
    for m in one.widths:
        share, rank = split(m, one.channels, sparsity, rho, ratio) if sparsity else (1.0, 0)
        threshold = float(drawn.abs().quantile(1 - share)) if sparsity else float("-inf")
        weight = normal(m, one.channels)
        if asked.dtype == "int4":
            codes = torch.randint(0, 16, weight.shape, generator=generator, device=asked.device, dtype=torch.uint8)
            weight = Quantized(codes, weight[:, ::GROUP].abs().contiguous() / 8)
        parts.append(Segment(weight, threshold, normal(m, rank), normal(one.channels, rank) / gain) if rank
                     else Segment(weight, threshold))  # fmt: skip
    return packing.pack(parts)


def operations(one: Fused, asked: Asked, sparsity: float, rho: float, x: Tensor, drawn: Tensor, count: int,
               gain: float = 1.0):  # fmt: skip
    """`count` modules of their own weights, tuned on a GPU. gain: of the outputs."""
    packs = [weights(one, asked, sparsity, rho, drawn, asked.seed + i, gain) for i in range(count)]
    configuration = None
    if asked.device == "cuda" and has_triton():
        configuration = tune(packs, one.gated, x, sparsity)
    return [Gemv(packed, one.gated, None, configuration, len(x)) for packed in packs]


def bench(asked: Asked, breakdown: bool = False, linears: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """One row per fused linear: microseconds of the three, bytes, ratios. linears: names of the wanted ones, else all.

    ValueError for a name that the shape does not have.
    """
    wanted = _named(asked.shape, linears)
    speed = timing.bandwidth(asked.device)
    title = f"{asked.shape} {asked.dtype} {asked.sparsity:.0%} batch {asked.batch} {asked.inputs}"
    for one in tqdm(wanted, desc=title, file=sys.stderr, leave=False):
        generator = torch.Generator().manual_seed(asked.seed)
        drawn = inputs.draw(asked.inputs, (DRAWN,), generator, asked.shape, one.name)
        x = inputs.draw(asked.inputs, (asked.batch, one.channels), generator, asked.shape, one.name)
        x = x.to(asked.device, asked.x_dtype)
        yield _row(one, asked, x, drawn, speed) | (_breakdown(one, asked, x, drawn) if breakdown else {})


def _named(shape: str, linears: Sequence[str]) -> list[Fused]:
    known = {one.name: one for one in fused(shape)}
    if unknown := [name for name in linears if name not in known]:
        raise ValueError(f"linears are {unknown}; expected some of {', '.join(known)}")
    return [one for name, one in known.items() if not linears or name in linears]


def _row(one: Fused, asked: Asked, x: Tensor, drawn: Tensor, speed: float) -> dict[str, Any]:
    size = one.elements * asked.x_dtype.itemsize
    dense = _dense_weights(one, asked, timing.copies(size, asked.device))
    times = {"torch": timing.measure([lambda W=W: _dense(x, W, one.gated) for W in dense], asked.device, asked.repeats)}
    del dense
    chosen = {}
    for name, sparsity in (("ours dense", 0.0), ("ours", asked.sparsity)):
        count = timing.copies(one.elements * element(asked.dtype), asked.device, sparsity)
        made = operations(one, asked, sparsity, asked.rho, x, drawn, count)
        times[name] = timing.measure([lambda o=o: o(x) for o in made], asked.device, asked.repeats)
        chosen[name] = f"{made[0].takes(len(x))} {made[0].configuration or ''}".strip()
        read, ranks = _bytes(made[0].packed, x, asked.dtype), made[0].packed.ranks.tolist()
        del made
    found = {"linear": one.name, "m": sum(one.widths), "n": one.channels, "ranks": ranks, "bytes": read,
             "dense bytes": size}  # fmt: skip
    for name, t in times.items():
        found |= {f"{name} us": 1e6 * t.p50, f"{name} p20 us": 1e6 * t.p20, f"{name} p80 us": 1e6 * t.p80}
    if not any(math.isnan(t.processors) for t in times.values()):
        found["processor share"] = min(t.processors for t in times.values())
    ours = times["ours"].p50
    return found | {
        "bandwidth share": read / ours / speed, "over torch": times["torch"].p50 / ours,
        "over ours dense": times["ours dense"].p50 / ours, "read bandwidth": speed, "chosen": chosen,
    }  # fmt: skip


def _breakdown(one: Fused, asked: Asked, x: Tensor, drawn: Tensor) -> dict[str, Any]:
    """Microseconds by leaving out: without the low-rank path (rho 1 at the sparse path's bytes), without thresholds (a
    dense product of as many channels), and of a launch that does nothing."""
    count = timing.copies(one.elements * element(asked.dtype), asked.device, asked.sparsity)
    share, _ = split(one.widths[0], one.channels, asked.sparsity, asked.rho)
    multiple = GROUP if asked.dtype == "int4" else 8
    narrow = Fused(one.name, one.widths, max(multiple, int(share * one.channels) // multiple * multiple), one.gated)
    found = {}
    for name, linears, sparsity in (("sparse path", one, 1 - share), ("as many channels, all read", narrow, 0.0)):
        given = x[:, : linears.channels].contiguous()
        made = operations(linears, asked, sparsity, 1.0, given, drawn, count)
        times = timing.measure([lambda o=o, g=given: o(g) for o in made], asked.device, asked.repeats)
        found[f"{name} us"] = 1e6 * times.p50
        del made
    nothing = torch.zeros(1, device=asked.device)
    found["launch us"] = 1e6 * timing.measure([lambda: nothing.add_(0)] * 2, asked.device, asked.repeats).p50
    return found


def _dense_weights(one: Fused, asked: Asked, count: int) -> list[Tensor]:
    size = (sum(one.widths), one.channels)
    return [torch.randn(size, device=asked.device, dtype=asked.x_dtype) * one.channels**-0.5 for _ in range(count)]


def _dense(x: Tensor, weight: Tensor, gated: bool) -> Tensor:
    y = linear(x, weight)
    if gated:
        gate, up = y.chunk(2, dim=1)
        return silu(gate) * up
    return y


def _bytes(packed: Packed, x: Tensor, dtype: str) -> int:
    """What a token reads of the weights: rows that any token keeps of every segment, and its factors."""
    total = 0.0
    for i, m in enumerate(packed.widths):
        kept = int((~(x.abs().float() <= packed.thresholds[i])).any(0).sum())
        total += kept * m * element(dtype) + int(packed.ranks[i]) * (m + packed.channels) * packed.dtype.itemsize
    return int(total)


def chain(asked: Asked) -> dict[str, Any]:
    """Microseconds of one block's linears, one behind another over `LAYERS` blocks of distinct weights; what one puts
    out the next one reads, at unit variance, and thresholds are read from it."""
    x = torch.randn(asked.batch, fused(asked.shape)[0].channels, generator=torch.Generator().manual_seed(asked.seed))
    x, found = x.to(asked.device, asked.x_dtype), {}
    dense = [[_dense_weights(one, asked, 1)[0] for one in fused(asked.shape)] for _ in range(LAYERS)]
    steps = [lambda x, W=W, one=one: _dense(x, W, one.gated) for layer in dense
             for W, one in zip(layer, fused(asked.shape), strict=True)]  # fmt: skip
    found["torch us"] = _chained(steps, x, asked)
    del dense, steps
    for name, sparsity in (("ours dense us", 0.0), ("ours us", asked.sparsity)):
        made = list(_scaled(asked, sparsity, x))
        found[name] = _chained(made, x, asked)
    ours = found["ours us"]
    return found | {"linear": "chain", "over torch": found["torch us"] / ours,
                    "over ours dense": found["ours dense us"] / ours}  # fmt: skip


def _fit(y: Tensor, channels: int) -> Tensor:
    """Attention stands between q/k/v and o: q's part goes on."""
    return y[:, :channels].contiguous()


def _scaled(asked: Asked, sparsity: float, x: Tensor) -> Iterator[Gemv]:
    """Our modules of a chain, thresholds read from what each is given; the outputs of plain linears are scaled to unit
    variance by their weights, so that every block sees inputs of one size."""
    for _ in range(LAYERS):
        for one in fused(asked.shape):
            x = _fit(x, one.channels)
            arguments = (one, asked, sparsity, asked.rho, x, x.float().cpu().flatten(), 1)
            module = operations(*arguments)[0]
            if not one.gated:
                module = operations(*arguments, 1 / float(module(x).float().std()))[0]
            yield module
            x = module(x)


def _chained(steps: Sequence, x: Tensor, asked: Asked) -> float:
    channels = [one.channels for one in fused(asked.shape)] * LAYERS

    def run() -> Tensor:
        y = x
        for step, n in zip(steps, channels, strict=True):
            y = step(_fit(y, n))
        return y

    calls = max(1, 40 // len(steps))
    return 1e6 * timing.measure([run], asked.device, asked.repeats, calls).p50 / LAYERS


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive values."""
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0. SystemExit for options that are not allowed, ValueError for inputs that are not published."""
    options = _options(arguments)
    rows = []
    for sparsity in options.sparsity:
        for batch in options.batch:
            asked = Asked(options.shape, options.dtype, sparsity, options.rho, batch, options.inputs, options.device,
                          options.repeats, options.seed)  # fmt: skip
            found = list(bench(asked, options.breakdown))
            _print(asked, found)
            if options.chain:
                found.append(chain(asked))
                print(f"chained through {LAYERS} blocks, us a block: " + ", ".join(
                    f"{name} {value:.2f}" for name, value in found[-1].items() if name != "linear"))  # fmt: skip
            rows += [asdict(asked) | row for row in found]
            if options.json:
                write_json(options.json, {"about": _where(options.device), "rows": rows})
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SIZES, default="llama-2-7b", help="whose linears (default: llama-2-7b)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32",
                        help="of the stored weights; int4, read by bfloat16 inputs, on a GPU (default: float32)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5],
                        help="of the bytes read, low-rank included: 0 to 0.99, several values (default: 0.5)")
    parser.add_argument("--rho", type=float, default=0.95,
                        help="share of the read bytes that the sparse path takes: 0 to 1 (default: 0.95)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1],
                        help="tokens, each with a mask of its own: 1 to 16, several values (default: 1); 1 for int4")
    parser.add_argument("--inputs", choices=inputs.KINDS, default="gaussian",
                        help="values of x; published: as real activations are (default: gaussian)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda where there is a GPU")
    parser.add_argument("--repeats", type=int, default=20, help="timings, whose medians are shown (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument("--breakdown", action="store_true", help="what a launch takes with parts left out")
    parser.add_argument("--chain", action="store_true", help="time whole blocks too, one linear behind another")
    parser.add_argument("--json", type=Path, help="where the figures go, after each sparsity and batch")
    options = parser.parse_args(arguments)
    limits = ("sparsity", 0, 0.99), ("rho", 0, 1), ("batch", 1, 16), ("repeats", 1, 10**6), ("seed", 0, 2**63 - 1)
    for name, low, high in limits:
        for value in getattr(options, name) if isinstance(getattr(options, name), list) else [getattr(options, name)]:
            if not low <= value <= high:
                parser.error(f"{name} is {value}; expected {low} to {high}")
    if options.dtype == "int4" and options.batch != [1]:
        parser.error(f"batch is {options.batch}; expected 1 for int4, whose kernel takes one token")
    if options.dtype == "int4" and options.device == "cpu":
        parser.error("device is cpu; expected cuda for int4: there is no CPU kernel of INT4 words")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"device is cuda, but torch {torch.__version__} sees no GPU here; expected cpu")
    if options.json:
        try:
            check_destination(options.json)
        except ValueError as error:
            parser.error(str(error))
    return options


def _print(asked: Asked, found: Sequence[dict[str, Any]]) -> None:
    columns = ("torch us", "ours dense us", "ours us", "over torch", "over ours dense", "bandwidth share")
    theirs = f" (torch in {str(asked.x_dtype).removeprefix('torch.')})" if asked.dtype == "int4" else ""
    print(f"{asked.shape}, {asked.dtype}{theirs}, sparsity {asked.sparsity}, rho {asked.rho}, "
          f"{asked.batch} tokens, {asked.inputs}")  # fmt: skip
    print(f"{'linear':8} {'shape':>12} " + " ".join(f"{name:>15}" for name in columns))
    for row in found:
        shape = f"{row['m']}x{row['n']}"
        print(f"{row['linear']:8} {shape:>12} " + " ".join(f"{row[name]:15.2f}" for name in columns))
    for row in found:
        if parts := [f"{name} {row[name]:.2f}" for name in PARTS if name in row]:
            print(f"breakdown of {row['linear']}: " + "; ".join(parts))
    if warning := shared(min(row.get("processor share", 1.0) for row in found)):
        print(warning)
    means = {name: geometric_mean([row[name] for row in found]) for name in ("over torch", "over ours dense")}
    print("geometric means: " + ", ".join(f"{name} {value:.2f}" for name, value in means.items()), flush=True)


def _where(device: str) -> dict[str, Any]:
    """Provenance, as far as a benchmark knows it."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    return {
        "device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
