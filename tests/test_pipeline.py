"""What resuming and redoing delete, and what they keep."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantbench.errors import RecipeError
from quantbench.pipeline import Options, discard, load
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
