"""Every Triton kernel and configuration compiles for the GPUs of the users, none of which is needed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("arch", [80, 86, 90])
def test_every_configuration_compiles(arch):
    """For sm_80, sm_86 (A6000) and sm_90; at most 99 KB of shared memory, 16-byte loads, next to nothing spilled."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(script.parents[1])
    done = subprocess.run(
        [sys.executable, script, str(arch)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    built = json.loads(done.stdout)
    kinds = {x["what"].split(" [")[0] for x in built}
    assert kinds >= {"fp32 1", "fp16 1", "bf16 1", "bf16 4", "int4 bf16 1", "attention bf16 512"}
    assert max(x["shared"] for x in built) <= 99 * 1024
    assert max(x["spilled"] for x in built) <= 128
    assert {x["list"] for x in built} >= {0, 1024, 8192}
    for x in built:
        kind, _, columns = x["what"].partition(" [")
        if kind.endswith(" 1"):
            narrow = kind.startswith("int4") and columns.startswith("128")  # 32 lanes, four rows of 64 bytes
            assert x["loads"] == [8 if narrow else 16], f"{x}: bytes that a thread reads of a weight at a time"
            assert x["ahead"] == (arch >= 90), f"{x}: what every token reads is asked for before a launch waits"
            assert x["declared"] == (x["list"] > 0) == columns.endswith(" 1]"), f"{x}: where its list is"
            assert x["shared"] <= 48 * 1024, f"{x}: more needs a driver's leave, which counts Triton's own alone"
        if kind in ("int4 fp16 1", "int4 bf16 1"):
            assert x["lanes"], f"{x}: tensor cores are given rows of other lanes"
