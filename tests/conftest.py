"""Shared by all tests: one thread per library (two cores are shared by many tests), and a tiny calibrated run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# CI looks at the same examples every time: what passed here passes there. Elsewhere every run looks at new ones.
settings.register_profile("fresh", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "fresh")

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))  # tests/tiny.py, from every folder of tests

Command = Callable[..., "subprocess.CompletedProcess[str]"]

RECIPE = """\
model: {model}
modes:
  - bf16
  - a8w8
  - {{name: a8w8-dynamic, mode: a8w8, activations: {{dynamic: true}}}}
  - a8w8c8
  - a8w8_fp8c8_fp8
  - a8w8c8_dynamic
  - weight_only_int8
  - weight_only_int4
calibration: {{data: "python:topics", samples: 8, length: 48, batch: 4}}
weights: {{group_size: 32}}
transforms: [{{smooth: {{alpha: 0.5}}}}]
accuracy: {{perplexity: [{{data: "python:topics", tokens: 126, context: 64}}]}}
throughput: {{batches: [1, 2], prompt: 16, output: 4, rounds: 1}}
parity: {{tokens: 63}}
gates: {{checkpoint_ratio: 90%}}
output: {output}
"""


@pytest.fixture(scope="session")
def quantbench() -> Command:
    """Runs the command line in its own process: `quantbench("calibrate", path)`."""

    def run(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "quantbench", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | settings,
            timeout=600,
        )

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_recipe(tiny_model: Path) -> Path:
    path = tiny_model.parent / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_model, output=tiny_model.parent / "run"))
    return path


@pytest.fixture(scope="session")
def tiny_run(quantbench: Command, tiny_recipe: Path) -> Path:
    """The run folder of a whole calibration of the tiny model, every kind of mode side by side."""
    done = quantbench("calibrate", tiny_recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    return tiny_recipe.parent / "run"
