"""Peers of benchmarks/cpu.py: what one prints is read, and one that has nothing to show is told and left out."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def cpu() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "cpu.py"
    spec = importlib.util.spec_from_file_location("benchmarks_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))  # as where it runs as a script
    spec.loader.exec_module(module)
    return module


def printing(text: str) -> str:
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(f'print({text!r})')} {{threads}}"


def test_what_a_peer_prints(cpu: ModuleType) -> None:
    found = cpu.run_peer(printing(json.dumps({"prefill": 5, "decode": {"1": 2.5}, "cpu_ms": {"b1": 7}})), 2)
    assert found == ({"prefill": cpu.Sample(5.0), "b1": cpu.Sample(2.5, 7.0)}, {})


def test_what_a_peer_says_of_load_and_memory(cpu: ModuleType) -> None:
    found = cpu.run_peer(printing(json.dumps({"prefill": 5, "decode": {}, "load_s": 0.5, "peak_rss_mb": 300})), 2)
    assert found == ({"prefill": cpu.Sample(5.0)}, {"load_s": 0.5, "peak_rss_mb": 300.0})


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("no-such-runtime x", "no-such-runtime is not installed"),
        ("", "its command is not installed"),
        (printing("hello"), 'it did not print {"prefill"'),
        (f"{shlex.quote(sys.executable)} -c 'import sys; sys.exit(\"out of memory\")'", "exit code 1: out of memory"),
    ],
)
def test_a_peer_with_nothing_to_show(cpu: ModuleType, command: str, said: str) -> None:
    assert said in cpu.run_peer(command, 1)


def test_a_peer_that_hangs(cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "PATIENCE", 0.2)
    command = f"{shlex.quote(sys.executable)} -c 'import time; time.sleep(9)'"
    assert cpu.run_peer(command, 1) == "it took longer than 0.2 s"


def test_absent_peers_are_said(
    cpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "PEERS", {"other": ("nowhere", "x.py", "nothing.gguf")})
    assert cpu.installed_peers() == {}
    said = capsys.readouterr().out
    assert "peer other: skipped: .peers/nowhere/bin/python and .peers/nothing.gguf absent; `make bench-peers`" in said
