"""ONNX Runtime GenAI as a peer of benchmarks/cpu.py: onnxruntime_peer.py DIRECTORY THREADS [STEPS] prints JSON.

DIRECTORY is what its model builder writes (`make bench-peers-onnx`). Prefill of 512 tokens, then greedy steps at
batches of 1, 8 and 16 after prompts of 32, the best of two each.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime_genai as og
from memory import peak_rss_mb

PROMPT, SHORT, BATCHES, ROUNDS = 512, 32, (1, 8, 16), 2


def prompts(batch: int, length: int) -> np.ndarray:
    return ((np.arange(length)[None, :] * 11 + np.arange(batch)[:, None]) % 997 + 3).astype(np.int32)


def run(model: og.Model, ids: np.ndarray, count: int) -> tuple[float, float, float, float]:
    """Seconds on the clock and on processors: of the prompt, and of `count` steps after the first token."""
    params = og.GeneratorParams(model)
    length = ids.shape[1] + count + 1
    params.set_search_options(do_sample=False, min_length=length, max_length=length, batch_size=len(ids))
    generator = og.Generator(model, params)
    clock, cpu = time.perf_counter(), time.process_time()
    generator.append_tokens(ids)
    generator.generate_next_token()
    between, spent = time.perf_counter(), time.process_time()
    for _ in range(count):
        generator.generate_next_token()
    return between - clock, spent - cpu, time.perf_counter() - between, time.process_time() - spent


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 32
    config = og.Config(path)
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    clock = time.perf_counter()
    model = og.Model(config)
    loaded = time.perf_counter() - clock
    run(model, prompts(1, PROMPT), 1)
    clock, cpu, _, _ = min(run(model, prompts(1, PROMPT), 1) for _ in range(ROUNDS))
    rate, spent = {"prefill": PROMPT / clock}, {"prefill": cpu / PROMPT * 1e3}
    for batch in BATCHES:
        steps = [run(model, prompts(batch, SHORT), count)[2:] for _ in range(ROUNDS)]
        clock, cpu = min(steps)
        rate[f"b{batch}"], spent[f"b{batch}"] = batch * count / clock, cpu / (batch * count) * 1e3
    print(json.dumps({
        "prefill": rate["prefill"], "decode": {str(b): rate[f"b{b}"] for b in BATCHES}, "cpu_ms": spent,
        "load_s": loaded, "peak_rss_mb": peak_rss_mb(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
