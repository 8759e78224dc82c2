from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from quantbench.errors import DependencyError
from quantbench.infer.cuda import compile as compiling
from quantbench.infer.cuda.compile import Usage, compile_source, cubin, source_of, usages

ADD = 'extern "C" __global__ void add(float* x, const float* y) { x[threadIdx.x] += SCALE * y[threadIdx.x]; }\n'


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "add.cu").write_text('#include "scale.cuh"\n#include "scale.cuh"\n' + ADD)
    (folder / "scale.cuh").write_text("#define SCALE FACTOR\n")
    monkeypatch.setattr(compiling, "KERNELS", folder)
    monkeypatch.setenv("QUANTBENCH_CACHE", str(tmp_path / "cache"))
    source_of.cache_clear()
    yield folder
    source_of.cache_clear()


def test_includes_are_pasted_in_once(kernels: Path) -> None:
    text = source_of("add.cu")
    assert text.count("#define SCALE") == 1
    assert "#include" not in text


@pytest.mark.parametrize("arch", compiling.ARCHITECTURES)
def test_every_architecture_compiles_here_and_tells_what_it_uses(arch: str) -> None:
    code, found = compile_source(ADD, "add.cu", arch, {"SCALE": 2})
    assert code[:4] == b"\x7fELF"
    assert [(u.kernel, u.spilled) for u in found] == [("add", 0)]
    assert 0 < found[0].registers < 32


def test_a_cubin_is_compiled_once_and_again_when_anything_changes(kernels: Path, tmp_path: Path) -> None:
    first = cubin("add.cu", "sm_90a", {"FACTOR": 2})
    files = set((tmp_path / "cache" / "cuda").iterdir())
    assert len(files) == 1
    assert cubin("add.cu", "sm_90a", {"FACTOR": 2}) == first
    assert set((tmp_path / "cache" / "cuda").iterdir()) == files
    cubin("add.cu", "sm_90a", {"FACTOR": 3})
    cubin("add.cu", "sm_80", {"FACTOR": 2})
    (kernels / "scale.cuh").write_text("#define SCALE (FACTOR + 1)\n")
    source_of.cache_clear()
    cubin("add.cu", "sm_90a", {"FACTOR": 2})
    assert len(set((tmp_path / "cache" / "cuda").iterdir())) == 4


def test_what_does_not_compile_says_why(kernels: Path, tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match=r"add.cu does not compile for sm_90a with .*identifier \"FACTOR\""):
        cubin("add.cu", "sm_90a", {})
    assert not (tmp_path / "cache").exists()


def test_without_the_package_the_error_is_the_line_that_adds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_cuda(name: str, *rest: Any) -> Any:
        if name.startswith("cuda"):
            raise ImportError("No module named 'cuda'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_cuda)
    with pytest.raises(DependencyError, match=r"pip install 'quantbench\[cuda\]'"):
        compiling.load_nvrtc()


def test_usages_of_a_log() -> None:
    log = """ptxas info    : Compiling entry function 'a' for 'sm_80'
ptxas info    : Function properties for a
ptxas         .     0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : Compiling entry function 'b' for 'sm_80'
ptxas info    : Used 12 registers
"""
    assert usages(log) == [Usage("a", 255, 20), Usage("b", 12, 0)]
