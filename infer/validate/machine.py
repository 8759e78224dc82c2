"""What the figures were measured on. Every JSON file that holds a time carries this."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from quantbench import __version__
from quantbench.errors import DependencyError
from quantbench.infer.ops.cpu import CpuOps, load_kernels


def describe_machine(threads: int | None = None) -> dict[str, Any]:
    """CPU, cores this process may use, instruction set the kernels chose, memory in bytes, versions, date (UTC)."""
    cores = usable_cores()
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "threads": threads or cores,
        "isa": chosen_isa(),
        "memory_bytes": memory_bytes(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "quantbench": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def chosen_isa() -> str:
    """Instruction set the native kernels run with; "none" where they are not built.

    Raises DependencyError where QUANTBENCH_ISA asks for one that this processor lacks.
    """
    try:
        load_kernels()
    except DependencyError:
        return "none"
    return CpuOps().isa


def usable_cores() -> int:
    """Cores by affinity: in a container os.cpu_count() tells of the host's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the kernel tells it; the architecture where it does not."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory of the machine in bytes; 0 where the system does not tell."""
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    return 0


def waited_s(schedstat: Path = Path("/proc/self/schedstat")) -> float:
    """Seconds the main thread was ready to run while another process held the processor; 0 where nobody tells."""
    return int(schedstat.read_text().split()[1]) / 1e9 if schedstat.exists() else 0.0
