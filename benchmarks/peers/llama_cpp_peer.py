"""llama.cpp as a peer of benchmarks/cpu.py: llama_cpp_peer.py MODEL.gguf THREADS [STEPS] prints one JSON object.

Token ids in, tokens/s out: prefill of 512 tokens, then greedy steps at batches of 1, 8 and 16 after prompts of 32, the
best of two each. Sampling is left out: the same token is fed again.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp as lc
from memory import peak_rss_mb

PROMPT, SHORT, BATCHES, ROUNDS = 512, 32, (1, 8, 16), 2


class Session:
    def __init__(self, path: str, threads: int) -> None:
        self.silent = lc.llama_log_callback(lambda *_: None)  # kept: the library holds only a pointer
        lc.llama_log_set(self.silent, None)
        lc.llama_backend_init()
        self.model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"{path}: llama.cpp cannot load it")
        params = lc.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 16 * 512, 512, 512, 16
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        params.flash_attn_type = -1  # its own choice
        self.context = lc.llama_init_from_model(self.model, params)
        self.batch = lc.llama_batch_init(512, 0, 1)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Rows of (token, position, sequence, whether its logits are needed)."""
        b = self.batch
        b.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, logits
            b.seq_id[i][0] = sequence
        if lc.llama_decode(self.context, b) != 0:
            raise RuntimeError("llama_decode failed")

    def clear(self) -> None:
        lc.llama_memory_clear(lc.llama_get_memory(self.context), True)


def prefill(session: Session) -> tuple[float, float]:
    session.clear()
    rows = [((7 * i) % 997 + 3, i, 0, i == PROMPT - 1) for i in range(PROMPT)]
    return timed(lambda: session.decode(rows), PROMPT)


def steps(session: Session, batch: int, count: int) -> tuple[float, float]:
    session.clear()
    for s in range(batch):
        session.decode([((11 * i + s) % 997 + 3, i, s, i == SHORT - 1) for i in range(SHORT)])

    def run() -> None:
        for n in range(count):
            session.decode([(100 + s, SHORT + n, s, True) for s in range(batch)])

    return timed(run, batch * count)


def timed(run, tokens: int) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """Tokens/s, and milliseconds of processor time per token."""
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    return tokens / (time.perf_counter() - clock), (time.process_time() - cpu) / tokens * 1e3


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 32
    clock = time.perf_counter()
    session = Session(path, threads)
    loaded = time.perf_counter() - clock
    prefill(session)
    best = {"prefill": max(prefill(session) for _ in range(ROUNDS))}
    best |= {f"b{b}": max(steps(session, b, count) for _ in range(ROUNDS)) for b in BATCHES}
    print(json.dumps({
        "prefill": best["prefill"][0],
        "decode": {str(b): best[f"b{b}"][0] for b in BATCHES},
        "cpu_ms": {column: ms for column, (_, ms) in best.items()}, "load_s": loaded, "peak_rss_mb": peak_rss_mb(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
