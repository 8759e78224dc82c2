"""OpenVINO GenAI as a peer of benchmarks/cpu.py: openvino_peer.py MODEL THREADS [STEPS] prints one JSON object.

MODEL is what LLMPipeline opens: an exported directory, or a GGUF file (to_gguf.py). Prefill of 512 tokens is the time
to the first token; decoding at batches of 1, 8 and 16 after prompts of 32 is the time of STEPS further tokens. Best of
two each.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai as genai
from memory import peak_rss_mb

PROMPT, SHORT, BATCHES, ROUNDS = 512, 32, (1, 8, 16), 2


def inputs(batch: int, length: int, number: int = 0) -> genai.TokenizedInputs:
    """Every `number` another text: a pipeline may keep what it has seen."""
    ids = (np.arange(length)[None, :] * 11 + np.arange(batch)[:, None] + 131 * number) % 997 + 3
    return genai.TokenizedInputs(ov.Tensor(ids.astype(np.int64)), ov.Tensor(np.ones((batch, length), np.int64)))


def seconds(pipe: genai.LLMPipeline, prompt: genai.TokenizedInputs, tokens: int) -> tuple[float, float]:
    """On the clock and on processors, to make `tokens` tokens of every prompt."""
    config = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
    clock, cpu = time.perf_counter(), time.process_time()
    pipe.generate(prompt, config)
    return time.perf_counter() - clock, time.process_time() - cpu


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 32
    clock = time.perf_counter()
    pipe = genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)
    loaded = time.perf_counter() - clock
    rate, spent = {}, {}
    seconds(pipe, inputs(1, PROMPT), 1)
    clock, cpu = min(seconds(pipe, inputs(1, PROMPT, n), 1) for n in range(1, ROUNDS + 1))
    rate["prefill"], spent["prefill"] = PROMPT / clock, cpu / PROMPT * 1e3
    for batch in BATCHES:
        short = inputs(batch, SHORT)
        seconds(pipe, short, 2)
        first = min(seconds(pipe, short, 1) for _ in range(ROUNDS))
        whole = min(seconds(pipe, short, count + 1) for _ in range(ROUNDS))
        rate[f"b{batch}"] = batch * count / (whole[0] - first[0])
        spent[f"b{batch}"] = (whole[1] - first[1]) / (batch * count) * 1e3
    print(json.dumps({
        "prefill": rate["prefill"], "decode": {str(b): rate[f"b{b}"] for b in BATCHES}, "cpu_ms": spent,
        "load_s": loaded, "peak_rss_mb": peak_rss_mb(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
