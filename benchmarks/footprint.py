"""Load time and memory of a checkpoint, in a process of its own: python benchmarks/footprint.py CHECKPOINT THREADS.

Prints one JSON object. `load_s` is what `Engine.load` takes, the first in the process: from the call until the next
step can be computed, all weights packed. `import_s`, before it: importing quantbench, numpy and the kernels.
`first_step_s`, after it: a step of one token. `peak_rss_mb` was read after a cache of 16 sequences of 512 tokens had
been filled: the most this process ever held, which is to stay within `checkpoint_mb` + `cache_mb` + 150.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

SEQUENCES, LENGTH = 16, 512
SPARE_MB = 150.0
Footprint = dict[str, float]


def measure(checkpoint: str, threads: int) -> Footprint:
    """Of this process, which must not have loaded anything yet."""
    start = time.perf_counter()
    from quantbench.infer.engine import Engine, SamplingParams

    imported = time.perf_counter()
    engine = Engine.load(checkpoint, threads=threads, cache_tokens=SEQUENCES * LENGTH, prefix_reuse=False)
    loaded = time.perf_counter()
    once = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    engine.generate([[3]], once)
    stepped = time.perf_counter()
    engine.generate([[(7 * i + s) % 499 + 3 for i in range(LENGTH - 1)] for s in range(SEQUENCES)], once)
    from quantbench.infer.validate.visit import checkpoint_bytes, peak_rss_bytes

    return {
        "import_s": imported - start,
        "load_s": loaded - imported,
        "first_step_s": stepped - loaded,
        "peak_rss_mb": peak_rss_bytes() / 1e6,
        "checkpoint_mb": checkpoint_bytes(engine, None) / 1e6,
        "cache_mb": engine.memory["cache_bytes"] / 1e6,
    }


def visit(checkpoint: Path, threads: int) -> Footprint:
    """`measure` in a fresh process. Raises CalledProcessError where it fails, having shown its message."""
    words = [sys.executable, __file__, str(checkpoint), str(threads)]
    found: Footprint = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def limit_mb(found: Footprint) -> float:
    return found["checkpoint_mb"] + found["cache_mb"] + SPARE_MB


def show(found: dict[str, list[Footprint]]) -> None:
    width = max(map(len, found))
    print("\nload, the first in a process, after imports; peak memory with 16 sequences of 512 tokens in the cache")
    for name, visits in found.items():
        loads = [v["load_s"] for v in visits]
        typical = {key: median(v[key] for v in visits) for key in visits[0]}
        peak = max(v["peak_rss_mb"] for v in visits)
        verdict = "within" if peak <= limit_mb(typical) else "ABOVE"
        sizes = f"{typical['checkpoint_mb']:.0f} checkpoint + {typical['cache_mb']:.0f} cache + {SPARE_MB:.0f}"
        print(
            f"  {name:<{width}}  load {median(loads):.2f} s ({min(loads):.2f} to {max(loads):.2f})  imports "
            f"{typical['import_s']:.2f} s  first step {typical['first_step_s'] * 1e3:.0f} ms  RSS {peak:.0f} MB, "
            f"{verdict} {sizes}"
        )


def show_peers(found: dict[str, list[Footprint]]) -> None:
    """As far as they say, with a cache for as many tokens, of which they fill less."""
    for name, visits in found.items():
        loads, peaks = ([v[key] for v in visits if key in v] for key in ("load_s", "peak_rss_mb"))
        if loads and peaks:
            print(
                f"  {name}: load {median(loads):.2f} s ({min(loads):.2f} to {max(loads):.2f})  RSS {max(peaks):.0f} MB"
            )


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
