"""The CPU runtime beside the limits of the machine and beside other runtimes: one command, a table per thread count.

    python benchmarks/cpu.py MODEL --threads 1,2 [--rounds 3] [--profile] [--json FILE]

MODEL is a float model (a HF directory, GGUF file, hub or demo name). It is rounded to nearest and written as
checkpoints: a8w8 and weight_only_int4 with the head held as int8 (what every peer's int8 file has), and bf16. Measured
are prefill of 512 tokens and decoding at batches of 1, 8 and 16; load time and memory, in fresh processes
(footprint.py); and int8 KV caches beside a float one at a long context, step by step (quantized_cache.py). Modes and
peers take turns within a round, so a machine that slows down slows all of them alike; ratios are those of the rounds,
shown with their extremes. CPU time per token hardly changes where other processes compete.

A peer (`--peer "NAME=COMMAND {threads}"`) is a command that prints one JSON object, {"prefill": tokens/s, "decode":
{"1": tokens/s, ...}, "cpu_ms": {"prefill": ms per token, "b1": ...}, "load_s": seconds, "peak_rss_mb": megabytes}, the
last three if it can, and runs in an environment of its own. Those that
`make bench-peers` put into .peers/ are found by themselves; their models are SmolLM2-135M, so MODEL should be
demo:smollm2.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import footprint
import quantized_cache
from rounded import rounded

from quantbench.errors import QuantbenchError
from quantbench.infer.checkpoint.source import open_model
from quantbench.infer.engine import Engine, Request, SamplingParams
from quantbench.infer.ops.cpu import load_kernels, set_threads
from quantbench.infer.validate.machine import cpu_model
from quantbench.infer.validate.profile import profile_steps

PROMPT = 512
SHORT = 32  # prompt of a decode measurement
PATIENCE = 180  # seconds that a peer may take
PROFILED = 16  # steps of a profile
CONTEXT = 1024  # at which caches are compared
MODES = ("a8w8+head", "bf16", "weight_only_int4+head")
CACHES = ("a8w8+head", "a8w8c8+head", "a8w8c8_dynamic+head")  # the same weights; the first cache is float
PEERS = {  # under .peers/: environment, script, model
    "llama.cpp Q8_0": ("llama.cpp", "llama_cpp_peer.py", "smollm2-q8_0.gguf"),
    "llama.cpp BF16": ("llama.cpp", "llama_cpp_peer.py", "smollm2-bf16.gguf"),
    "OpenVINO GenAI Q8_0": ("openvino", "openvino_peer.py", "smollm2-q8_0.gguf"),
    "ONNX Runtime GenAI int8": ("onnxruntime", "onnxruntime_peer.py", "smollm2-onnx-int8"),
}


@dataclass(frozen=True)
class Sample:
    """One measurement. `gb` and `gop` are billions of bytes read and of operations done per token; 0 for peers."""

    tokens_per_s: float
    cpu_ms: float = 0.0  # processor time of all threads, per token
    gb: float = 0.0
    gop: float = 0.0


Footprint = footprint.Footprint
Samples = dict[str, Sample]  # column ("prefill", "b1", "b8", …) -> sample


def load(checkpoint: Path, length: int = PROMPT) -> Engine:
    """Room for 16 sequences of `length` tokens."""
    return Engine.load(checkpoint, cache_tokens=16 * length, prefix_reuse=False)


def timed(work: Callable[[], int]) -> tuple[int, float, float]:
    """Tokens that `work` says it made, and its seconds on the clock and on processors."""
    clock, cpu = time.perf_counter(), time.process_time()
    tokens = work()
    return tokens, time.perf_counter() - clock, time.process_time() - cpu


def prefill(engine: Engine) -> Sample:
    prompt = [(7 * i) % 997 + 3 for i in range(PROMPT)]
    once = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    tokens, clock, cpu = timed(lambda: len(engine.generate([prompt], once)) * PROMPT)
    gb = engine.bytes_per_token(PROMPT, PROMPT // 2) / 1e9
    return Sample(tokens / clock, cpu / tokens * 1e3, gb, engine.operations_per_token(PROMPT // 2) / 1e9)


def decode(engine: Engine, batch: int, steps: int) -> Sample:
    params = SamplingParams(max_tokens=steps + 1, ignore_eos=True, detokenize=False)
    for number in range(batch):
        engine.add(Request([(11 * i + number) % 997 + 3 for i in range(SHORT)], params))
    waiting = batch
    while waiting:
        waiting -= len(engine.step())

    def rest() -> int:
        tokens = 0
        while not engine.idle:
            tokens += len(engine.step())
        return tokens

    tokens, clock, cpu = timed(rest)
    context = SHORT + steps // 2
    gb = engine.bytes_per_token(batch, context) / 1e9
    return Sample(tokens / clock, cpu / tokens * 1e3, gb, engine.operations_per_token(context) / 1e9)


def run_peer(command: str, threads: int) -> tuple[Samples, Footprint] | str:
    """What a peer's command prints, and of it what is said of load and memory; or why it has nothing to show."""
    words = shlex.split(command.replace("{threads}", str(threads)))
    if not words or shutil.which(words[0]) is None:
        return f"{words[0] if words else 'its command'} is not installed"
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"it took longer than {PATIENCE} s"
    if done.returncode:
        return f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    try:
        found = json.loads(done.stdout)
        rates = {"prefill": found["prefill"]} | {f"b{batch}": rate for batch, rate in found["decode"].items()}
        spent = found.get("cpu_ms", {})
        samples = {column: Sample(float(rate), float(spent.get(column, 0))) for column, rate in rates.items()}
        return samples, {key: float(found[key]) for key in ("load_s", "peak_rss_mb") if key in found}
    except (ValueError, KeyError, TypeError, AttributeError) as reason:
        return f'it did not print {{"prefill": …, "decode": {{…}}}} ({reason!r})'


def measure(
    engines: dict[str, Engine], peers: dict[str, str], threads: int, options: argparse.Namespace
) -> tuple[dict[str, list[Samples]], dict[str, list[Footprint]]]:
    """Samples of every round, after one that is thrown away, and footprints of peers. A peer that fails is said so once
    and left out."""
    found: dict[str, list[Samples]] = {name: [] for name in engines}
    prints: dict[str, list[Footprint]] = {}
    absent: set[str] = set()
    for number in range(options.rounds + 1):
        for name, engine in engines.items():
            steps = options.steps if number else 2
            sample = {"prefill": prefill(engine)} | {f"b{b}": decode(engine, b, steps) for b in options.batches}
            if number:
                found[name].append(sample)
        for name, command in peers.items() if number else ():
            if name in absent:
                continue
            result = run_peer(command, threads)
            if isinstance(result, str):
                absent.add(name)
                print(f"peer {name}: skipped: {result}")
            else:
                found.setdefault(name, []).append(result[0])
                prints.setdefault(name, []).append(result[1])
    return found, prints


def spread(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def show(found: dict[str, list[Samples]], ceilings: dict[str, float], columns: list[str]) -> None:
    base = next(iter(found))
    width = max(map(len, found))
    for column in columns:
        print(f"\n{column}: tokens/s, ratio of {base} to it, CPU ms per token, GB/s and GOP/s with their share")
        for name, rounds in found.items():
            mine = [r[column] for r in rounds if column in r]
            if not mine:
                continue
            ratios = [b[column].tokens_per_s / m.tokens_per_s for b, m in zip(found[base], mine, strict=False)]
            rates = [s.tokens_per_s for s in mine]
            print(f"  {name:<{width}}  {spread(rates, 0):<26}  x{spread(ratios, 2):<22}{_use(name, mine, ceilings)}")


def _use(name: str, samples: list[Sample], ceilings: dict[str, float]) -> str:
    """How much of the machine the median round used; nothing is known of a peer's."""
    typical = sorted(samples, key=lambda s: s.tokens_per_s)[len(samples) // 2]
    if not typical.cpu_ms:
        return ""
    if not typical.gb:
        return f"{median(s.cpu_ms for s in samples):8.2f} ms"
    kind = "int8" if name.startswith("a8w8") else "bf16" if name == "bf16" else "float32"
    peak = ceilings[f"{kind}_gop_per_s"]
    read, done = typical.tokens_per_s * typical.gb, typical.tokens_per_s * typical.gop
    shares = f"{read:6.1f} GB/s {read / ceilings['read_gb_per_s']:4.0%}  {done:6.0f} GOP/s {done / peak:4.0%}"
    return f"{median(s.cpu_ms for s in samples):8.2f} ms  {shares}"


def show_profiles(engines: dict[str, Engine]) -> None:
    print("\nwhere a decode step at batch 1 goes, ms")
    for name, engine in engines.items():
        prompt = [(11 * i) % 997 + 3 for i in range(SHORT)]
        engine.add(Request(prompt, SamplingParams(max_tokens=PROFILED + 4, ignore_eos=True, detokenize=False)))
        while not engine.step():
            pass
        kinds, operations = profile_steps(engine, PROFILED)
        parts = sorted(kinds.items(), key=lambda item: -item[1])
        while not engine.idle:
            engine.step()
        print(f"  {name}: " + ", ".join(f"{kind} {seconds * 1e3:.2f}" for kind, seconds in parts if seconds > 0))
        rates = {operation: spent.bytes / spent.seconds / 1e9 for operation, spent in operations.items() if spent.bytes}
        print("    GB/s of its operations: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))


def as_rows(
    found: dict[str, list[Samples]], threads: int, isa: str, ceilings: dict[str, float]
) -> list[dict[str, object]]:
    return [
        {"name": name, "threads": threads, "isa": isa, "round": number, "ceilings": ceilings}
        | {column: asdict(sample) for column, sample in samples.items()}
        for name, rounds in found.items()
        for number, samples in enumerate(rounds)
    ]


def installed_peers() -> dict[str, str]:
    """Commands of the peers under .peers/; says which are not there."""
    root = Path(__file__).resolve().parent.parent
    commands = {}
    for name, (environment, script, model) in PEERS.items():
        python, weights = root / ".peers" / environment / "bin" / "python", root / ".peers" / model
        absent = [str(path.relative_to(root)) for path in (python, weights) if not path.exists()]
        if absent:
            print(f"peer {name}: skipped: {' and '.join(absent)} absent; `make bench-peers` installs it")
            continue
        words = (str(python), str(Path(__file__).parent / "peers" / script), str(weights), "{threads}")
        commands[name] = " ".join(word if word == "{threads}" else shlex.quote(word) for word in words)
    return commands


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--modes", default=",".join(MODES), help=f"separated by commas; default {','.join(MODES)}")
    parser.add_argument("--threads", type=integers, default=[1, 2])
    parser.add_argument("--batches", type=integers, default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32, help="decode steps per measurement")
    parser.add_argument("--profile", action="store_true", help="split a decode step at batch 1 by kind of work")
    parser.add_argument("--json", type=Path, help="write every sample of every round here")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    return parser.parse_args(arguments)


def run(checkpoints: dict[str, Path], peers: dict[str, str], options: argparse.Namespace) -> None:
    """Every table, and the JSON file after each thread count."""
    modes = options.modes.split(",")
    visits = {m: [footprint.visit(checkpoints[m], max(options.threads)) for _ in range(options.rounds)] for m in modes}
    footprint.show(visits)
    report: dict[str, object] = {"cpu": cpu_model(), "footprints": visits}
    rows, caches, prints = [], [], {}
    engines = {mode: load(checkpoints[mode]) for mode in modes}
    first, *others = (load(checkpoints[name], 2 * CONTEXT) for name in CACHES)
    columns = ["prefill", *(f"b{b}" for b in options.batches)]
    for threads in options.threads:
        set_threads(threads)
        ceilings, isa = load_kernels().ceilings(threads), load_kernels().isa()
        limits = ", ".join(f"{name} {value:.1f}" for name, value in ceilings.items())
        print(f"\n== {cpu_model()}, {isa}, {threads} thread(s), {options.rounds} rounds; ceilings: {limits}")
        found, prints[str(threads)] = measure(engines, peers, threads, options)
        show(found, ceilings, columns)
        footprint.show_peers(prints[str(threads)])
        compared = [
            quantized_cache.compare((first, other), batch, CONTEXT, options.steps)
            for batch in (1, 16)
            for other in others
        ]
        quantized_cache.show(compared)
        rows += as_rows(found, threads, isa, ceilings)
        caches += [{"threads": threads, **asdict(pairs)} for pairs in compared]
        if options.profile:
            show_profiles(engines)
        if options.json:
            report |= {"rows": rows, "caches": caches, "peer_footprints": prints}
            options.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    peers = {} if options.no_peers else installed_peers()
    peers |= dict(peer.partition("=")[::2] for peer in options.peer)
    try:
        with tempfile.TemporaryDirectory(prefix="quantbench-cpu-") as place:
            names = dict.fromkeys((*options.modes.split(","), *CACHES))
            source = open_model(options.model)
            run({name: rounded(source, name, Path(place)) for name in names}, peers, options)
    except QuantbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
