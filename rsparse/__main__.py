"""The commands: `python -m rsparse run | publish | estimate | search | search-cost | bench-decode | build`.

Each has --help.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from pathlib import Path

from rsparse.paths import HERE, Checkout


def main(arguments: Sequence[str] | None = None, checkout: Checkout = HERE) -> int:
    """Exit code: 0 done, 1 a notebook failed, 2 the request was refused, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options, checkout)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        elsewhere = "; --out names another place to write to" * hasattr(options, "out")
        print(f"error: no permission for {error.filename}{elsewhere}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the same command{' without --fresh' * getattr(options, 'fresh', False)} continues",
              file=sys.stderr)  # fmt: skip
        return 130


# The commands import what they need: --help answers at once. Values in it are written out; a test compares them.

SHAPES = "llama-2-7b, llama-2-13b, llama-3-8b, llama-3-70b or mistral-7b"
METHODS = ("dense, relufication, cats, griffin, chess, teal, teal-greedy, wina, wina-rotated, larosa, low-rank and "
           "r-sparse")  # fmt: skip


def _run(options: argparse.Namespace, checkout: Checkout) -> int:
    from rsparse import batch

    failed = batch.run(options.preset, checkout, options.out, options.only, options.fresh, options.overnight)
    return 1 if failed else 0


def _publish(options: argparse.Namespace, checkout: Checkout) -> int:
    from rsparse import book

    if options.preset is None:
        book.write_pages(checkout)
        return 0
    run = options.run or checkout.run_folder(options.preset)
    published = book.publish(run, options.preset, checkout, options.allow_partial)
    print(f"published {', '.join(published)}; the pages are in {checkout.exhibits}")
    return 0


def _build(options: argparse.Namespace, checkout: Checkout) -> int:
    from rsparse import book

    print(f"the book is at {book.build(checkout, options.run, options.out)}")
    return 0


def _estimate(options: argparse.Namespace, checkout: Checkout) -> int:
    from rsparse.estimate import project

    print(f"wrote {project(options.preset, options.rehearsal, options.run, checkout, options.only)}")
    return 0


def _search(options: argparse.Namespace, checkout: Checkout) -> int:
    from rsparse import search_command

    plan = {name: value for name in search_command.OPTIONS if (value := getattr(options, name)) is not None}
    for line in search_command.run(options.preset, options.sparsity, options.out, options.searcher, plan,
                                   options.fresh, checkout):  # fmt: skip
        print(line)
    return 0


def _search_cost(options: argparse.Namespace, checkout: Checkout) -> int:
    from kernels.destination import check_destination

    check_destination(options.json)
    from rsparse import search_cost  # takes seconds

    size = options.groups, options.samples, options.length, options.repeats
    found = search_cost.measure(options.shape, options.sparsity, *size, options.dtype, options.device)
    search_cost.save(found, options.json)
    share, bound, groups = found["mean_share"], found["bound"], found["groups"]
    print(f"a candidate costs {share:.3f} of a full pass of {found['full_pass_s']:.2f} s on average; (G + 1) / (2 G) "
          f"is {bound:.3f} for {groups} groups. {found['evaluations']} candidates per group take "
          f"{found['hours_per_group']:.2f} h, in total {found['hours_in_total']:.2f} h")  # fmt: skip
    return 0


def _bench_decode(options: argparse.Namespace, checkout: Checkout) -> int:
    from rsparse.bench_decode import measure

    given = {name: value for name in measure.OPTIONS if (value := getattr(options, name)) is not None}
    if (options.shape is None) == (options.model is None):
        raise ValueError("give --shape for random weights, or --model for a checkpoint")
    model = options.model or f"random:{options.shape}"
    plan = measure.Plan(model, **given)
    if plan.random and plan.text is not None:  # a preset may name one along with them; typed, it was meant
        raise ValueError(f"text is {plan.text!r} for random weights, which read none; expected a checkpoint")
    found = measure.measure(plan, options.json)
    print("\n".join(measure.lines(found)))
    return 0


def _names(value: str) -> tuple[str, ...]:
    return tuple(filter(None, value.split(",")))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rsparse", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a preset's notebooks; finished ones are not repeated")
    run.add_argument("--preset", required=True, help="a file of notebooks/presets, without .yaml")
    run.add_argument("--only", nargs="+", default=(), metavar="EXHIBIT", help="e.g. table-3 figure-5")
    run.add_argument("--fresh", action="store_true", help="start the chosen notebooks from nothing")
    run.add_argument("--overnight", action="store_true", help="only the preset's overnight subset")
    run.add_argument("--out", type=Path, help="run folder (default: _runs/PRESET in the checkout)")
    run.set_defaults(command=_run)

    publish = commands.add_parser("publish", help="take a finished run into data/results and the pages")
    publish.add_argument("--preset", help="without it, only the pages are written anew")
    publish.add_argument("--run", type=Path, help="run folder (default: _runs/PRESET in the checkout)")
    publish.add_argument("--allow-partial", action="store_true", help="publish what is finished so far")
    publish.set_defaults(command=_publish)

    project = commands.add_parser("estimate", help="project a preset's hours from its rehearsal")
    project.add_argument("--preset", required=True, help="the preset to project, e.g. a6000-llama-2-7b")
    project.add_argument("--rehearsal", required=True, help="the rehearsed preset, e.g. rehearsal-llama-2-7b")
    project.add_argument("--run", type=Path, help="its run folder (default: _runs/REHEARSAL in the checkout)")
    project.add_argument("--only", nargs="+", default=(), metavar="EXHIBIT", help="leave the others as they stand")
    project.set_defaults(command=_estimate)

    search = commands.add_parser("search", help="search a recipe for a preset's model; a killed search resumes")
    search.add_argument("--preset", required=True, help="whose checkpoint, texts and search settings (of table-4)")
    search.add_argument("--sparsity", type=float, required=True, help="model-level, e.g. 0.5")
    search.add_argument("--out", type=Path, required=True, help="the recipe, a JSON file; evaluations lie beside it")
    search.add_argument("--searcher", default="evolution",
                        help="evolution (default), random, coordinate, moving, uniform or greedy")  # fmt: skip
    search.add_argument("--start", type=float, help="uniform rho to begin with (default: the best of the grid)")
    search.add_argument("--score", help="magnitude (default) or column-norm")
    for name in ("seed", "groups", "population", "generations", "samples", "length"):
        search.add_argument(f"--{name}", type=int, help="default: the preset's")
    for name in ("step", "mutation", "crossover"):
        search.add_argument(f"--{name}", type=float, help="default: the preset's")
    for name, values in (("initial", "scattered or uniform"), ("form", "steps or difference")):
        search.add_argument(f"--{name}", help=f"{values} (default: the preset's); see rsparse/evolution.py")
    search.add_argument("--fresh", action="store_true", help="forget the evaluations of an earlier attempt")
    search.set_defaults(command=_search)

    cost = commands.add_parser("search-cost", help="time a search at the size of a real model, random weights")
    cost.add_argument("--shape", required=True, help=SHAPES)
    cost.add_argument("--json", type=Path, required=True, help="where the figures go")
    for name, default in (("groups", 8), ("samples", 16), ("length", 2048), ("repeats", 5)):
        cost.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    cost.add_argument("--sparsity", type=float, default=0.5, help="default: 0.5")
    cost.add_argument("--dtype", default="bfloat16", help="float64, float32, bfloat16 (default) or float16")
    cost.add_argument("--device", default="cuda", help="default: cuda")
    cost.set_defaults(command=_search_cost)

    bench = commands.add_parser("bench-decode", help="time decoding: dense, sparse, and Hugging Face beside it")
    bench.add_argument("--shape", help=f"random weights of a published size: {SHAPES}")
    bench.add_argument("--model", help="or a checkpoint: tiny, a folder, a hub id (owner/name)")
    bench.add_argument("--json", type=Path, required=True, help="where the figures go, after each row")
    bench.add_argument("--methods", type=_names,
                       help=f"of {METHODS} (default: dense,teal,r-sparse); teal@0.25: at its own sparsity")  # fmt: skip
    bench.add_argument("--baselines", type=_names, help="default: hf-eager,hf-static-compiled; '' for none")
    bench.add_argument("--batch", type=int, help="texts, 1 (default) to 16; 1 for int4")
    for name, default in (("prompt", 2048), ("new", 2048), ("repeats", 5), ("seed", 0)):
        bench.add_argument(f"--{name}", type=int, help=f"default: {default}")
    bench.add_argument("--layers", type=int, help="of random weights (default: all of the shape's)")
    for name, default in (("sparsity", 0.5), ("rho", 0.95)):
        bench.add_argument(f"--{name}", type=float, help=f"default: {default}")
    bench.add_argument("--score", help="magnitude (default) or column-norm")
    bench.add_argument("--recipe", help="a recipe file, for r-sparse")
    bench.add_argument("--text", help="of a checkpoint: calibration and prompts (default: c4; tiny's own)")
    bench.add_argument("--dtype", help="of the weights: float64, float32, bfloat16 (default), float16 or int4")
    bench.add_argument("--device", help="default: cuda")
    bench.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=None,
                       help="torch.compile what lies between our engine's products (default: yes)")  # fmt: skip
    bench.set_defaults(command=_bench_decode)

    build = commands.add_parser("build", help="build the book from the published presets and one run")
    build.add_argument("--run", type=Path, help="a run folder that replaces what is published of its preset")
    build.add_argument("--out", type=Path, help="where _build/ goes (default: the checkout)")
    build.set_defaults(command=_build)
    return parser


if __name__ == "__main__":
    sys.exit(main())
