"""Choosing backends, instruction sets and threads, and what is said when one is not there."""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import numpy as np
import pytest

from quantbench.errors import DependencyError, RequestError
from quantbench.infer.checkpoint.source import LinearWeight
from quantbench.infer.ops import load_ops
from quantbench.infer.ops.cpu import CpuOps, available_isas, load_kernels, set_threads


def test_load_ops() -> None:
    assert load_ops("reference").name == "reference"
    assert load_ops("reference").set_threads(3) == 3
    assert load_ops().name == "cpu"
    with pytest.raises(DependencyError, match=r"unknown operations backend 'tpu'\. .*Known: cpu, cuda, reference"):
        load_ops("tpu")


def test_the_variable_forces_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTBENCH_ISA", "generic")
    assert CpuOps().isa == "generic"
    assert load_kernels().isa() == "generic"
    assert CpuOps(available_isas()[-1]).isa == available_isas()[-1]  # the argument goes first
    monkeypatch.delenv("QUANTBENCH_ISA")
    assert CpuOps().isa == available_isas()[-1]


def test_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTBENCH_ISA", "sse9")
    with pytest.raises(DependencyError, match=r"'sse9'.*It has: generic"):
        CpuOps()
    with pytest.raises(ValueError, match="'sse9' is not one this processor has: generic"):
        load_kernels().isa()


def test_packed_weights_are_in_memory_once() -> None:
    """What a weight was packed from, here as in a mapped file, is let go of."""
    w = np.zeros((64, 32), np.float32)
    packed = CpuOps().pack([LinearWeight("a", w, None), LinearWeight("b", w[:7], None)])
    gone = weakref.ref(w)
    del w
    assert gone() is None
    assert packed.nbytes < 96 * 32 * 4 + 256


def test_missing_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DependencyError, match=r"cannot be loaded.*pip install"):
        load_ops("cpu")


def test_threads() -> None:
    before = load_kernels().threads()
    try:
        assert set_threads(None) == load_kernels().processors() == load_kernels().threads()
        assert set_threads(2) == load_kernels().threads() == 2
    finally:
        set_threads(before)
    for wrong in (0, 5000):
        with pytest.raises(RequestError, match="between 1 and 1024"):
            set_threads(wrong)


@pytest.mark.parametrize("isa", available_isas())
def test_ceilings_are_above_nothing(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTBENCH_ISA", isa)
    before = load_kernels().threads()
    found = load_kernels().ceilings(1)
    assert set(found) == {"read_gb_per_s", "float32_gop_per_s", "int8_gop_per_s", "bf16_gop_per_s"}
    assert all(value > 0.1 for value in found.values())
    assert load_kernels().threads() == before
