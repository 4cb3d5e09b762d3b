"""The README's library example runs as it stands there."""

import re

from rsparse.paths import ROOT


def test_the_library_example_runs(capsys):
    indented = re.search(r"    import rsparse\n(?:(?:    .*)?\n)+", (ROOT / "README.md").read_text(encoding="utf-8"))
    code = "".join(line.removeprefix("    ") for line in indented.group().splitlines(keepends=True))
    exec(compile(code, "README.md", "exec"), {})
    dense, sparse = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines())
    assert dense < sparse < 1.2 * dense
