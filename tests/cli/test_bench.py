"""`quantbench bench --profile` on a tiny model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Command = Callable[..., "subprocess.CompletedProcess[str]"]
OPERATIONS = ("embed", "add_norm", "qkv", "attention", "o", "gate_up", "silu_mul", "down", "head")


def test_a_profile_splits_a_step_by_operation(quantbench: Command, tiny_model: Path) -> None:
    asked = ("bench", tiny_model, "--mode", "a8w8", "--batches", "2", "--prompt", "8", "--output", "3", "--rounds", "1")
    shown = quantbench(*asked, "--profile")
    assert shown.returncode == 0, shown.stderr
    lines = [line.split() for line in shown.stdout.splitlines()]
    table = [line for line in lines if "decode@2" in line and line[line.index("decode@2") + 1] in OPERATIONS]
    assert [line[line.index("decode@2") + 1] for line in table] == list(OPERATIONS)
    assert 0.99 < sum(float(line[line.index("decode@2") + 3]) for line in table) < 1.01
    found = json.loads(quantbench(*asked, "--json").stdout)
    (variant,) = found["variants"].values()
    operations = variant["decode"]["2"]["operations"]
    assert list(operations) == list(OPERATIONS)
    assert all(set(spent) == {"ms", "share", "gb_per_s", "gop_per_s"} for spent in operations.values())
    assert operations["head"]["gb_per_s"] > 0
    assert operations["head"]["gop_per_s"] > 0
