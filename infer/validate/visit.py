"""One visit to one engine, in a process of its own.

A fresh process is what makes peak memory a fact (VmHWM starts at zero; memory that an earlier variant freed cannot
hide a later one's need) and keeps speed free of what the calibrating process holds: other thread pools, other memory.
The parent sends a job as JSON on stdin and reads one JSON object from stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import quantbench
from quantbench import errors
from quantbench.errors import QuantbenchError
from quantbench.infer.engine import Engine
from quantbench.infer.engine.mode import resolve_mode
from quantbench.infer.validate.ceilings import measure_ceilings
from quantbench.infer.validate.machine import usable_cores
from quantbench.infer.validate.roofline import Ceilings, Work
from quantbench.infer.validate.timing import DecodeTimes, Load, Times, time_engine


@dataclass(frozen=True)
class EngineSpec:
    """How to load an engine, in words, so that another process can; called, it loads one in this process."""

    model: str
    mode: str | None = None
    ops: str = "cpu"
    threads: int | None = None

    def __call__(self) -> Engine:
        return Engine.load(self.model, self.mode, ops=self.ops, threads=self.threads)


@dataclass(frozen=True)
class Visit:
    """What one visit found. Bytes and seconds; `times` as measured, nothing averaged."""

    load_s: float
    checkpoint_bytes: int
    weights_bytes: int
    cache_bytes: int
    peak_rss_bytes: int
    threads: int
    times: Times

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Visit:
        times = row["times"]
        decode = {int(b): DecodeTimes(**(d | {"work": Work(**d["work"])})) for b, d in times["decode"].items()}
        fields = times | {"prefill_work": Work(**times["prefill_work"]), "decode": decode}
        return cls(**(row | {"times": Times(**fields)}))


def visit_engine(spec: EngineSpec, load: Load) -> Visit:
    """Load, time and leave, in a fresh process. Raises what the engine raised there."""
    return Visit.from_json(_ask({"engine": asdict(spec), "load": asdict(load)}))


def visit_ceilings(ops: str, threads: int | None) -> Ceilings:
    """`measure_ceilings` in a fresh process, so that it disturbs and is disturbed by nothing else."""
    return Ceilings(**_ask({"ceilings": {"ops": ops, "threads": threads}}))


def _ask(job: dict[str, Any]) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, [str(Path(quantbench.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "quantbench.infer.validate.visit"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    if done.returncode != 0:
        raise QuantbenchError(_failure(job, done.returncode, done.stderr))
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise getattr(errors, answer["error"])(*answer["problems"])
    return answer


def _failure(job: dict[str, Any], code: int, stderr: str) -> str:
    what = f"model {job['engine']['model']!r}" if "engine" in job else "the ceilings"
    if code == -9:
        return f"measuring {what}: its process was killed, most likely for memory; measure smaller batches"
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    return f"measuring {what}: its process ended with code {code}: {last}"


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """The child's side of `_ask`."""
    if "ceilings" in job:
        return asdict(measure_ceilings(**job["ceilings"]))
    spec = EngineSpec(**job["engine"])
    load = Load(**(job["load"] | {"batches": tuple(job["load"]["batches"])}))
    engine = Engine.load(spec.model, spec.mode, ops=spec.ops, threads=spec.threads, **load.engine_options())
    times = time_engine(engine, load)
    found = Visit(
        load_s=engine.load_seconds,
        checkpoint_bytes=checkpoint_bytes(engine, spec.mode),
        peak_rss_bytes=peak_rss_bytes(),
        threads=spec.threads or usable_cores(),
        times=times,
        **engine.memory,
    )
    return asdict(found)


def checkpoint_bytes(engine: Engine, mode: str | None) -> int:
    """Bytes on disk of the file or of all .safetensors of the directory; of a model that was converted at load, what
    it takes in memory: a checkpoint in that mode would hold the same tensors."""
    if resolve_mode(engine.source, mode)[1]:
        return engine.memory["weights_bytes"]
    path = engine.source.path
    return sum(f.stat().st_size for f in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size


def peak_rss_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Most memory this process ever held. getrusage will not do: its ru_maxrss is inherited over exec."""
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise QuantbenchError(f"{status}: no VmHWM line; peak memory can only be measured on Linux")


def main() -> None:
    job = json.load(sys.stdin)
    try:
        found = answer(job)
    except QuantbenchError as error:
        found = {"error": type(error).__name__, "problems": error.problems}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
