import os
import subprocess
import sys

import pytest

from quantbench.errors import DependencyError
from quantbench.infer.validate.machine import (
    chosen_isa,
    cpu_model,
    describe_machine,
    memory_bytes,
    usable_cores,
    waited_s,
)


def test_the_description_holds_what_a_figure_needs():
    machine = describe_machine(threads=1)
    assert machine["threads"] == 1
    assert describe_machine()["threads"] == machine["cores"] == len(os.sched_getaffinity(0)) == usable_cores()
    assert machine["memory_bytes"] > 1 << 28
    assert machine["isa"] in ("none", "generic", "avx2", "avxvnni", "avx512vnni", "avx512bf16", "amx")
    assert {"cpu", "os", "python", "numpy", "quantbench", "date"} <= machine.keys()
    assert all(machine.values())


def test_an_unknown_instruction_set_is_one_error(monkeypatch):
    monkeypatch.setenv("QUANTBENCH_ISA", "nonsense")
    with pytest.raises(DependencyError, match=r"^instruction set 'nonsense' \(QUANTBENCH_ISA\) .* It has: generic"):
        chosen_isa()
    command = [sys.executable, "-m", "quantbench", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "instruction set 'nonsense'" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_cpu_and_memory_are_read_from_the_kernels_files(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast CPU @ 3GHz\n")
    (tmp_path / "meminfo").write_text("MemTotal:       1024 kB\n")
    assert cpu_model(tmp_path / "cpuinfo") == "Fast CPU @ 3GHz"
    assert memory_bytes(tmp_path / "meminfo") == 1 << 20


def test_a_system_without_these_files_still_has_a_description(tmp_path):
    assert cpu_model(tmp_path / "none")
    assert memory_bytes(tmp_path / "none") == 0
    assert waited_s(tmp_path / "none") == 0


def test_waiting_for_the_processor_is_counted(tmp_path):
    (tmp_path / "schedstat").write_text("1000 2500000000 7\n")
    assert waited_s(tmp_path / "schedstat") == 2.5
    assert waited_s() <= waited_s() + 1e-9
