"""Compiles every kernel for every architecture without a GPU, and tells registers and spills.

    python -m quantbench.infer.cuda.report [--out FILE]

Which specializations there are is not written down anywhere: a device that only takes notes runs one layer of random
models in every mode, dtype and kind of step, and the kernels that it is asked for are compiled. One specialization per
kernel and element kind is enough to see that it compiles; cubins are cached, so the second run takes seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantbench.errors import DependencyError
from quantbench.infer.cuda import blas, sample
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.batch import DeviceBatch, DeviceCache
from quantbench.infer.cuda.compile import ARCHITECTURES, Usage, compile_source, source_of
from quantbench.infer.cuda.device import DTYPES, Device, Kernel, TensorMap
from quantbench.infer.cuda.forward import DeviceModel, logits_of, run_layers
from quantbench.infer.cuda.random import config_of, random_model
from quantbench.infer.engine.cache import storage
from quantbench.infer.models import ModelConfig
from quantbench.infer.ops import PAGE
from quantbench.vocabulary import CACHE_FORMATS, DYNAMIC, FLOAT_DTYPES, parse_mode

# by dtype between operations
ALL = ("fp32", "bf16", "fp16", "a8w8", "a8w8_fp8", "weight_only_int8", "weight_only_int4")
MODES = {"bfloat16": ALL, "float32": ALL, "float16": ("fp16", "a8w8", "weight_only_int4"), "exact": ("bf16", "a8w8")}
STEPS = ((1, True), (32, True), (256, True), (512, False))  # tokens, each of a sequence of its own
HEADS = (64, 80, 96, 128, 256)
SIZES = (
    "SIZE",
    "GROUP",
    "HEADS",
    "KV_HEADS",
    "TILES",
    "TOKENS",
    "WIDTH",
    "THREADS",
    "BLOCKS",
    "SPLIT",
    "STAGES",
    "KEYS",
)


@dataclass(frozen=True)
class Special:
    """A source with its macros."""

    file: str
    macros: tuple[tuple[str, int | str], ...]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What it has in common with others that need no compilation of their own."""
        return (self.file, tuple((k, v) for k, v in self.macros if k not in SIZES))


class Notes(Device):
    """A device that does nothing but write down which kernels are asked for."""

    def __init__(self, arch: str, dtype: str) -> None:
        number = int(arch.removeprefix("sm_").rstrip("a"))
        self.arch, self.dtype, self.exact = arch, DTYPES[dtype], dtype == "exact"
        self.capability = (number // 10, number % 10)
        self.hopper = arch == "sm_90a"
        self.multiprocessors = 132
        self.section = ""
        self.seen: dict[Special, None] = {}
        self._next = itertools.count(1 << 20, 1 << 20)
        self.bad = self.allocate((1,), np.int32)
        blas.forbid(self)

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        return DeviceArray(next(self._next), shape, np.dtype(dtype))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        return self.allocate(shape, dtype)

    def upload(self, array: npt.NDArray[Any]) -> DeviceArray:
        return self.allocate(array.shape, array.dtype)

    def write(self, out: DeviceArray, array: npt.NDArray[Any]) -> None: ...

    def fill(self, array: DeviceArray, byte: int) -> None: ...

    def kernel(self, file: str, entry: str, **macros: int | str) -> Kernel:
        self.seen[Special(file, tuple(sorted(macros.items())))] = None
        return Kernel(entry, None)

    def launch(self, *arguments: Any, **options: Any) -> None: ...

    def tensor_map(self, array: DeviceArray, box: tuple[int, int], swizzle: int = 128) -> TensorMap:
        return TensorMap(None, array)


def specials(arch: str) -> list[Special]:
    """One specialization per kernel and kind that the runtime asks for on `arch`."""
    kinds: dict[tuple[Any, ...], Special] = {}
    for dtype, modes in MODES.items():
        notes = Notes(arch, dtype)
        for mode in modes:
            run(notes, config_of("llama-3.2-1b"), mode, {"fp32": "float32", "fp16": "float16"}.get(mode, "bfloat16"))
        heads = HEADS if arch == "sm_90a" and dtype != "float16" else (128,)
        for head, cache in itertools.product(heads, [c for c in CACHE_FORMATS if c not in FLOAT_DTYPES]):
            run(notes, replace(config_of("llama-3.2-1b"), head_dim=head), "bf16", cache)
        for special in notes.seen:
            kinds.setdefault(special.kind, special)
    return [*kinds.values(), Special("step.cu", ())]


def run(notes: Notes, config: ModelConfig, mode: str, cache: str) -> None:
    """One layer of `mode` in every kind of step."""
    small = replace(config, num_layers=1)
    model = DeviceModel.upload(notes, random_model(notes, small, parse_mode(mode)))
    pages = notes.empty((64, small.num_kv_heads, PAGE, small.head_dim), storage(cache))
    scale = notes.empty(pages.shape[:3] if cache.endswith(DYNAMIC) else (small.num_kv_heads,), np.float32)
    table = notes.empty((1024, small.head_dim // 2), np.float32)
    for tokens, decode in STEPS:
        batch = batch_for(notes, tokens, decode)
        layer = DeviceCache(pages, pages, scale, scale)
        x, delta = run_layers(notes, model, batch, (table, table), [layer])
        logits = logits_of(notes, model, x, delta, None if decode else notes.empty((1,), np.int32))
        floats = [notes.empty((len(logits),), np.float32) for _ in range(3)]
        ints = notes.empty((len(logits),), np.int32)
        sample.argmax(notes, logits)
        sample.sample(notes, logits, floats[0], ints, floats[1], floats[2])
        sample.logprobs(notes, logits, ints)


def batch_for(notes: Notes, tokens: int, decode: bool) -> DeviceBatch:
    sequences = tokens if decode else 1

    def ints(*shape: int) -> DeviceArray:
        return notes.empty(shape, np.int32)

    lengths = None if decode else np.array([tokens])
    return DeviceBatch(
        ints(tokens), ints(tokens), notes.empty((tokens,), np.int64), ints(sequences + 1), ints(sequences),
        ints(sequences, 16), decode, 1024, 1 if decode else tokens, lengths, lengths,
    )  # fmt: skip


@dataclass
class Report:
    """What was compiled. `problems`: what was not."""

    usages: dict[str, dict[str, list[int]]] = field(
        default_factory=dict
    )  # "kernel file macros" -> arch -> [regs, spill]
    problems: list[str] = field(default_factory=list)

    def add(self, special: Special, arch: str, found: list[Usage]) -> None:
        macros = " ".join(f"{k}={v}" for k, v in special.macros)
        for usage in found:
            row = self.usages.setdefault(f"{usage.kernel} {special.file} {macros}".strip(), {})
            row[arch] = [usage.registers, usage.spilled]


def compile_all(architectures: tuple[str, ...] = ARCHITECTURES) -> Report:
    """Every kernel for every architecture, on all processors."""
    report = Report()
    jobs = [(special, arch) for arch in architectures for special in specials(arch)]

    def one(job: tuple[Special, str]) -> tuple[list[Usage], str]:
        special, arch = job
        try:
            return compile_source(source_of(special.file), special.file, arch, dict(special.macros))[1], ""
        except DependencyError as error:
            return [], str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (special, arch), (found, problem) in zip(jobs, pool.map(one, jobs), strict=True):
            report.add(special, arch, found)
            report.problems += [problem] if problem else []
    return report


def lines(report: Report) -> Iterator[str]:
    """The report as text: one line per kernel, registers by architecture, spilled bytes after a plus."""
    yield " ".join(f"{arch:>9}" for arch in ARCHITECTURES) + "  registers a thread (+ bytes spilled)"
    for name, row in sorted(report.usages.items()):
        cells = [f"{r}{f'+{s}' if s else ''}" for r, s in (row.get(arch, (0, 0)) for arch in ARCHITECTURES)]
        yield " ".join(f"{'-' if cell == '0' else cell:>9}" for cell in cells) + f"  {name}"
    yield from report.problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the report as JSON")
    asked = parser.parse_args()
    report = compile_all()
    print("\n".join(lines(report)))
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps({"usages": report.usages, "problems": report.problems}, indent=1) + "\n")
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main()
