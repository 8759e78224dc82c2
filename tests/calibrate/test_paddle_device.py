from __future__ import annotations

import builtins
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from quantbench.calibrate.paddle_device import default_threads, each, import_paddle, select_device
from quantbench.errors import CalibrationError, DependencyError


@pytest.fixture
def no_paddle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "paddle":
            raise ImportError("No module named 'paddle'")
        return real(name, *args, **kwargs)

    import_paddle.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    yield
    import_paddle.cache_clear()


@pytest.mark.usefixtures("no_paddle")
def test_without_paddle_the_error_gives_the_pip_line() -> None:
    with pytest.raises(DependencyError, match=r'pip install "paddlepaddle>=3\.3,<3\.4"'):
        import_paddle()


def test_an_unknown_device_is_refused_with_those_there_are() -> None:
    with pytest.raises(CalibrationError, match=r"device 'tpu:9' cannot be used by this PaddlePaddle .* It has: cpu"):
        select_device(import_paddle(), "tpu:9")
    select_device(import_paddle(), "cpu")


def test_importing_is_silent() -> None:
    code = "from quantbench.calibrate.paddle_device import import_paddle; import_paddle()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout + done.stderr == ""


def test_threads_follow_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= default_threads() <= (os.cpu_count() or 1)


def test_importing_leaves_the_variable_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = "import os; from quantbench.calibrate.paddle_device import *; import_paddle(); print(default_threads())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert int(done.stdout) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("threads", [1, 3])
def test_each_keeps_the_order_and_passes_errors_on(threads: int) -> None:
    assert list(each(threads, lambda x: x * x, range(10))) == [x * x for x in range(10)]
    with pytest.raises(ZeroDivisionError):
        list(each(threads, lambda x: 1 // x, [3, 2, 0, 1]))


def test_the_programs_logging_is_left_alone() -> None:
    code = (
        "import logging\n"
        "from quantbench.calibrate.paddle_device import import_paddle\n"
        "import_paddle()\n"
        "root = logging.getLogger()\n"
        "assert root.level == logging.WARNING and not root.handlers, (root.level, root.handlers)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
