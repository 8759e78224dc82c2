"""What resuming and redoing delete, and what they keep."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from quantbench.errors import RecipeError
from quantbench.pipeline import Options, discard, give_freed_memory_back, load
from tests.tiny import write_tiny_model

FILES = (
    "plan.json",
    "statistics/block_00000.safetensors",
    "work/hidden/hidden_00001.f32",
    "scales/a8w8/scales.json",
    "scales/a8w8/.scales.json.77.tmp",
    "checkpoint/a8w8.partial/checkpoint/.model-00001.safetensors.77.tmp",
    "accuracy.json",
    "gates.json",
    "report.json",
)


@pytest.mark.parametrize(
    ("start", "kept"),
    [
        (None, {"plan.json", "statistics", "work", "scales", "checkpoint", "accuracy.json", "gates.json"}),
        ("report", {"plan.json", "statistics", "work", "scales", "checkpoint", "accuracy.json", "gates.json"}),
        ("validate", {"plan.json", "statistics", "work", "scales", "checkpoint"}),
        ("choose", {"plan.json", "statistics"}),
        ("collect", {"plan.json"}),
    ],
)
def test_a_stage_and_what_follows_it_are_deleted(tmp_path: Path, start: str | None, kept: set[str]) -> None:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    discard(tmp_path, start)
    assert {p.name for p in tmp_path.iterdir()} == kept
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_model_that_cannot_be_rotated_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", hidden_size=100)
    recipe = tmp_path / "recipe.yaml"
    words = f"model: {model}\nmodes: [a8w8]\ntransforms: [rotate]\noutput: {tmp_path / 'run'}\n"
    recipe.write_text(words)
    with pytest.raises(RecipeError, match=r"^a8w8: hidden_size 100: rotation: no matrix for 100 channels"):
        load(str(recipe), Options())
    assert not (tmp_path / "run").exists()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_freed_arrays_leave_the_process() -> None:
    give_freed_memory_back()
    arrays = [np.ones(8 << 20, np.uint8) for _ in range(16)]
    before = resident_bytes()
    del arrays[:-1]  # the last one holds the top of a heap, where there is one
    assert before - resident_bytes() > 100 << 20
