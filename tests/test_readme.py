"""The README's library examples run as they stand there."""

import re

from rsparse.paths import ROOT

EXAMPLE = re.compile(r"    import rsparse\n(?:(?:    .*)?\n)+")


def example(number: int) -> str:
    indented = EXAMPLE.findall((ROOT / "README.md").read_text(encoding="utf-8"))[number]
    return "".join(line.removeprefix("    ") for line in indented.splitlines(keepends=True))


def test_the_library_example_runs(capsys):
    exec(compile(example(0), "README.md", "exec"), {})
    dense, sparse = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines())
    assert dense < sparse < 1.2 * dense


def test_the_decoding_example_runs_in_ten_lines(capsys):
    code = example(1)
    assert len([line for line in code.splitlines() if line]) <= 10
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    prompt, text = "The old teacher walked to the", capsys.readouterr().out
    written, streamed = text.removeprefix(prompt).split("\n")
    assert text.startswith(prompt) and written == streamed and len(written.split()) > 6
    assert names["decode"].engine_of(names["model"]).linears.startswith("kernels"), "decoded by the sparse kernels"
