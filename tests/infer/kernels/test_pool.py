"""The thread pool: many short jobs, calls from several Python threads, and a forked child."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from quantbench.infer.checkpoint.source import LinearWeight
from quantbench.infer.ops import Activation
from quantbench.infer.ops.cpu import CpuOps, load_kernels, set_threads

WEIGHT = LinearWeight("w", np.random.default_rng(0).standard_normal((512, 256)).astype(np.float32), None)
X = np.random.default_rng(1).standard_normal((2, 256)).astype(np.float32)


@pytest.fixture
def three_threads() -> object:
    before = load_kernels().threads()
    set_threads(3)
    yield
    set_threads(before)


def test_many_short_jobs(three_threads: object) -> None:
    ops = CpuOps()
    packed = ops.pack(WEIGHT)
    want = ops.linear(Activation(X), packed)
    for _ in range(3000):
        assert np.array_equal(ops.linear(Activation(X), packed), want)


def test_callers_on_several_threads(three_threads: object) -> None:
    ops = CpuOps()
    packed = ops.pack(WEIGHT)
    want = ops.linear(Activation(X), packed)
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(200):
            if not np.array_equal(ops.linear(Activation(X), packed), want):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork: runs on Linux, as in CI, and macOS")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_a_pool_of_its_own(three_threads: object) -> None:
    ops = CpuOps()
    packed = ops.pack(WEIGHT)
    want = ops.linear(Activation(X), packed)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(ops.linear(Activation(X), packed), want) else 1)
    assert os.waitpid(child, 0)[1] == 0
