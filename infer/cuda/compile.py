"""CUDA C++ to machine code, without a GPU: NVRTC makes a cubin, a cache keeps it.

The key of a cubin is a digest of its whole source (local includes are pasted in), its macros, the architecture and
NVRTC's version. Files are written under a temporary name and renamed, so a reader never sees half a cubin.
Kernels include no CUDA header, so a machine needs NVIDIA's driver and the NVRTC wheel, nothing else.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from quantbench.errors import DependencyError
from quantbench.infer.checkpoint.demo import cache_directory

KERNELS = Path(__file__).parent / "kernels"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")  # what CI compiles every kernel for
INSTALL = "pip install 'quantbench[cuda]'"
_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)
_KERNEL = re.compile(r"Compiling entry function '(\w+)'")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")

Macros = Mapping[str, int | str]


@dataclass(frozen=True)
class Usage:
    """What one kernel takes of a multiprocessor: registers a thread, and bytes spilled to memory a thread."""

    kernel: str
    registers: int
    spilled: int


@cache
def source_of(file: str) -> str:
    """One self-contained source: `file` of kernels/ with its local includes pasted in, each once."""
    return _paste(file, set())


def _paste(file: str, seen: set[str]) -> str:
    if file in seen:
        return ""
    seen.add(file)
    text = (KERNELS / file).read_text()
    return _INCLUDE.sub(lambda match: _paste(match.group(1), seen) + "\n", text)


def load_nvrtc() -> Any:
    """The NVRTC bindings. Raises DependencyError where the package or the library is missing."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise DependencyError(f"NVRTC, the compiler of CUDA kernels, cannot be loaded ({error}): {INSTALL}") from error
    return nvrtc


@cache
def compiler_version() -> str:
    _, major, minor = load_nvrtc().nvrtcVersion()
    return f"{major}.{minor}"


def cubin(file: str, arch: str, macros: Macros) -> bytes:
    """Machine code of kernels/`file` for `arch` ("sm_90a"), from the cache where it lies there.

    Raises DependencyError as `load_nvrtc`, and where the source does not compile.
    """
    source = source_of(file)
    defines = [f"-D{name}={value}" for name, value in sorted(macros.items())]
    key = sha256("\0".join([source, arch, compiler_version(), *defines]).encode()).hexdigest()[:32]
    path = cache_directory() / "cuda" / f"{Path(file).stem}-{arch}-{key}.cubin"
    if path.is_file():
        return path.read_bytes()
    code, _ = compile_source(source, file, arch, macros)
    _write(path, code)
    return code


def _write(path: Path, code: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as out:
        out.write(code)
    os.replace(temporary, path)


def compile_source(source: str, name: str, arch: str, macros: Macros) -> tuple[bytes, list[Usage]]:
    """A cubin and what its kernels use. Raises DependencyError with the compiler's words where it does not compile."""
    nvrtc = load_nvrtc()
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--ptxas-options=-v", "--extra-device-vectorization"]
    options += ["--no-cache"]  # NVRTC's own: what it has cached it compiles without a word about registers
    options += [f"-D{key}={value}" for key, value in macros.items()]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], [])
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _text(nvrtc.nvrtcGetProgramLogSize(program)[1], lambda out: nvrtc.nvrtcGetProgramLog(program, out))
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise DependencyError(f"{name} does not compile for {arch} with {dict(macros)}: {log}")
        code = bytearray(nvrtc.nvrtcGetCUBINSize(program)[1])
        nvrtc.nvrtcGetCUBIN(program, code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(code), usages(log)


def _text(size: int, fill: Any) -> str:
    out = bytearray(size)
    fill(out)
    return out.rstrip(b"\0").decode(errors="replace")


def usages(log: str) -> list[Usage]:
    """Registers and spills of every kernel, out of ptxas's log."""
    blocks = _KERNEL.split(log)[1:]
    return [_usage(name, text) for name, text in zip(blocks[::2], blocks[1::2], strict=True)]


def _usage(name: str, text: str) -> Usage:
    spilled = sum(int(stores) + int(loads) for stores, loads in _SPILL.findall(text))
    return Usage(name, sum(map(int, _REGISTERS.findall(text))), spilled)
