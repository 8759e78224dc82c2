"""A calibration killed at random moments and resumed ends with the bytes of one that was never disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_flow import files_of

OFF = ["--set", "throughput=off", "--set", "parity=off", "--set", "accuracy.divergence=off"]


def start(recipe: Path, folder: Path, words: str) -> subprocess.Popen[bytes]:
    arguments = ["--resume", *OFF, "--set", f"output={folder}", "--set", words]
    return subprocess.Popen(
        [sys.executable, "-m", "quantbench", "calibrate", str(recipe), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def products(folder: Path) -> int:
    """Files and folders below `folder`. The run renames and removes folders meanwhile: os.walk passes over those."""
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))


def kill_after(process: subprocess.Popen[bytes], folder: Path, more: int, delay: float) -> bool:
    """SIGKILL once `more` new files have appeared and `delay` seconds have passed; whether that is what ended it."""
    before = products(folder)
    while process.poll() is None:
        if products(folder) >= before + more:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            return process.wait() == -signal.SIGKILL
        time.sleep(0.002)
    return False


@pytest.mark.parametrize(
    "words", ["calibration.inputs=float", "calibration.inputs=quantized", "transforms=[{rotate: {}}, {smooth: {}}]"]
)
def test_killed_at_random_moments(tiny_recipe: Path, tmp_path: Path, words: str) -> None:
    undisturbed = tmp_path / "undisturbed"
    assert start(tiny_recipe, undisturbed, words).wait(300) == 0
    chance = random.Random(os.environ.get("QUANTBENCH_TEST_SEED", "7"))
    disturbed, kills = tmp_path / "disturbed", 0
    for _ in range(4):
        process = start(tiny_recipe, disturbed, words)
        kills += kill_after(process, disturbed, chance.randint(1, 60), chance.random() * 0.05)
    assert kills >= 2
    assert start(tiny_recipe, disturbed, words).wait(300) == 0
    assert files_of(disturbed) == files_of(undisturbed)
