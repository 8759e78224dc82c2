"""Does the CUDA runtime serve a checkpoint as the CPU runtime does? Measured on the same windows of a text.

    python benchmarks/cuda_agreement.py CHECKPOINT... --text demo:wikipedia-heldout --tokens 4088 --out result.json

Per checkpoint and dtype between operations:

- `codes`: every int8 or e4m3 input of every linear that the GPU served, quantized again by the CPU's kernel
- `linears`: every product of int8 codes with int8 weights, GPU against CPU, on the same codes, bit for bit
- `blocks_sqnr_db`: each block's output on the input that the CPU's block had, the worst block
- `top1_same_input`: most likely tokens from the CPU's last hidden state
- `top1`, `perplexity`: both run freely from the first token. Differences of 1e-7 grow to the size of the
  quantization noise within a dozen layers where inputs are quantized (docs/measuring.md, Parity): `cpu_isas` says how
  far two instruction sets of the CPU are apart on the same windows.

With `--reference FOLDER` also `exact`: the GPU with every sum of floats in double, against the numpy column of the op
table, whose sums are double too. No order of terms matters then, so both may run freely: `top1`, `perplexity_change`,
`largest_nll_difference` (nats of one token) and `rows_different` (a traced window: inputs of a linear of which any code
differs) are of whole runs from the first token. What numpy computes, a minute a checkpoint, is kept in FOLDER, and read
where it is there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from datetime import datetime, timezone
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.infer.cuda.bench import describe
from quantbench.infer.cuda.ops import CudaOps
from quantbench.infer.engine import Engine
from quantbench.infer.engine.forward import Model, Rows, batch_of, logits_of, project, rope_tables
from quantbench.infer.engine.trace import Trace
from quantbench.infer.ops import Activation
from quantbench.infer.ops.cpu import CpuOps
from quantbench.infer.validate.evaluate import read_windows
from quantbench.infer.validate.likelihood import token_nll
from quantbench.infer.validate.machine import describe_machine

F32 = npt.NDArray[np.float32]
TRACED = 256  # tokens of the window that is compared operation by operation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--text", default="demo:wikipedia-heldout")
    parser.add_argument("--tokens", type=int, default=4088)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="also the numpy column, kept in FOLDER")
    parser.add_argument("--only-reference", action="store_true", help="fill FOLDER and stop: needs no GPU")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if asked.only_reference:
        for path in asked.checkpoints:
            reference_of(path, windows_of(path, asked), asked.reference)
        return
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(None) | {"gpu": describe(CudaOps().device)},
        "text": asked.text, "tokens": asked.tokens, "context": asked.context, "checkpoints": {},
    }  # fmt: skip
    for path in asked.checkpoints:
        found["checkpoints"][Path(path).name] = compare(path, asked)
        asked.out.write_text(json.dumps(found, indent=1))


def compare(path: str, asked: argparse.Namespace) -> dict[str, Any]:
    source, windows = open_model(path), windows_of(path, asked)
    cpu = Engine.load(source, ops="cpu")
    base = [cpu.score(window) for window in windows]
    other = Engine.load(source, ops=CpuOps("avx2"))
    row: dict[str, Any] = {
        "perplexity_cpu": perplexity(base, windows),
        "cpu_isas": agreement(base, [other.score(window) for window in windows]),
    }
    trace = cpu.trace(windows[0][:TRACED])
    for dtype in asked.dtypes.split(","):
        gpu = Engine.load(source, ops=CudaOps(dtype))
        mine = [gpu.score(window) for window in windows]
        row[dtype] = (
            agreement(base, mine) | {"perplexity": perplexity(mine, windows)} | operations(cpu, gpu, trace, windows)
        )
        row[dtype]["perplexity_change"] = row[dtype]["perplexity"] / row["perplexity_cpu"] - 1
        print(Path(path).name, dtype, json.dumps(row[dtype]), "cpu isas:", json.dumps(row["cpu_isas"]), flush=True)
        gpu.runner.ops.device.release()  # type: ignore[attr-defined]
    if asked.reference:
        row["exact"] = exact(source, windows, reference_of(path, windows, asked.reference))
        print(Path(path).name, "exact", json.dumps(row["exact"]), flush=True)
    return row


def windows_of(path: str, asked: argparse.Namespace) -> list[list[int]]:
    tokenizer = open_model(path).tokenizer()
    return [w.tolist() for w in read_windows(asked.text, tokenizer, asked.context, asked.tokens).windows]


def outcome(engine: Engine, windows: list[list[int]]) -> dict[str, npt.NDArray[Any]]:
    """Of a free run: the most likely token and the nats of every position, and a digest of every token's codes at every
    tap of one traced window."""
    logits = [engine.score(window) for window in windows]
    taps = engine.trace(windows[0][:TRACED]).taps
    return {
        "top1": np.concatenate([x.argmax(1) for x in logits]),
        "nll": np.concatenate([token_nll(x, w) for x, w in zip(logits, windows, strict=True)]),
    } | {f"codes {name}": digests(tap.codes) for name, tap in taps.items() if tap.codes is not None}


def digests(codes: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """One number per row of codes [T, …]."""
    rows = np.ascontiguousarray(codes).reshape(len(codes), -1)
    return np.array([int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), "big") for row in rows], np.uint64)


def reference_of(path: str, windows: list[list[int]], folder: Path) -> dict[str, npt.NDArray[Any]]:
    file = folder / f"{Path(path).name}.npz"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, **outcome(Engine.load(path, ops="reference"), windows))
    with np.load(file) as kept:
        return dict(kept)


def exact(source: ModelSource, windows: list[list[int]], want: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """GPU and numpy, both with sums in double, each from the first token to the last."""
    got = outcome(Engine.load(source, ops=CudaOps("exact")), windows)
    coded = [name for name in want if name.startswith("codes ")]
    return {
        "top1": float((got["top1"] == want["top1"]).mean()), "positions": int(want["top1"].size),
        "perplexity": float(np.exp(got["nll"].mean())),
        "perplexity_change": float(np.exp(got["nll"].mean() - want["nll"].mean()) - 1),
        "largest_nll_difference": float(np.abs(got["nll"] - want["nll"]).max()),
        "rows": sum(want[name].size for name in coded),
        "rows_different": sum(int((got[name] != want[name]).sum()) for name in coded),
    }  # fmt: skip


def perplexity(logits: list[F32], windows: list[list[int]]) -> float:
    return float(np.exp(np.concatenate([token_nll(x, w) for x, w in zip(logits, windows, strict=True)]).mean()))


def agreement(base: list[F32], other: list[F32]) -> dict[str, float]:
    same = np.concatenate([a.argmax(1) == b.argmax(1) for a, b in zip(base, other, strict=True)])
    return {"top1": float(same.mean()), "positions": int(same.size)}


def operations(cpu: Engine, gpu: Engine, trace: Trace, windows: list[list[int]]) -> dict[str, Any]:
    """The figures that need no free running."""
    served = gpu.trace(windows[0][:TRACED])
    codes = wrong = 0
    for name, tap in served.taps.items():
        if tap.codes is None or tap.scale is None or name.endswith((".k", ".v")):
            continue
        spec = spec_of(gpu.runner.model, name)
        again = cpu.runner.ops.quantize(tap.values, replace(spec, keep_float=False))
        codes += tap.codes.size
        wrong += int((np.asarray(again.codes).view(np.uint8) != np.asarray(tap.codes).view(np.uint8)).sum())
    linears, different = products(cpu, gpu, served)
    ids = np.array(windows[0][:TRACED], np.int32)
    inputs = [gpu.runner.ops.embed(gpu.runner.model.embedding, ids), *trace.hidden[:-1]]
    blocks = [block(gpu, x.copy(), layer) for layer, x in enumerate(inputs)]
    sqnr = [decibels(want, got) for want, got in zip(trace.hidden, blocks, strict=True)]
    last = logits_of(gpu.runner.ops, gpu.runner.model, trace.hidden[-1].copy(), None)
    return {
        "codes": codes, "codes_different": wrong, "linears": linears, "linears_different": different,
        "blocks_sqnr_db": min(sqnr), "blocks_sqnr_db_median": float(np.median(sqnr)),
        "top1_same_input": float((last.argmax(1) == trace.logits.argmax(1)).mean()),
    }  # fmt: skip


def spec_of(model: Model, tap: str) -> Any:
    if tap == "lm_head":
        return model.head.spec
    layer = model.layers[int(tap.split(".")[2])]
    return {"attn_in": layer.qkv, "o_in": layer.o, "mlp_in": layer.gate_up, "down_in": layer.down}[
        tap.rsplit(".", 1)[1]
    ].spec


def products(cpu: Engine, gpu: Engine, served: Trace) -> tuple[int, int]:
    """Outputs of int8 products, and those that differ in any bit between CPU and GPU."""
    count = different = 0
    for number, (mine, theirs) in enumerate(zip(gpu.runner.model.layers, cpu.runner.model.layers, strict=True)):
        for tap, name in (("attn_in", "qkv"), ("o_in", "o"), ("mlp_in", "gate_up"), ("down_in", "down")):
            seen = served.taps[f"model.layers.{number}.{tap}"]
            if seen.codes is None or seen.codes.dtype != np.int8:
                continue
            a = Activation(None, np.ascontiguousarray(seen.codes), seen.scale, "int8")
            got, want = (project(e.runner.ops, a, getattr(layer, name)) for e, layer in ((gpu, mine), (cpu, theirs)))
            count += got.size
            different += int((got != want).sum())
    return count, different


def block(gpu: Engine, x: F32, number: int) -> F32:
    """Hidden state after one block of the GPU's, on `x`, the CPU's before it."""
    ops, model, layer = gpu.runner.ops, gpu.runner.model, gpu.runner.model.layers[number]
    tokens, eps = len(x), model.config.norm_eps
    batch = batch_of([Rows([0] * tokens, 0, list(range(-(-tokens // 64))))])
    pages = gpu.runner.cache.layers[number]
    rope = rope_tables(model.config, tokens)
    a = ops.add_norm(x, None, layer.attn_norm, eps, layer.qkv.spec)
    q = ops.rope_write(project(ops, a, layer.qkv), batch, rope, layer.qk_norms, eps, pages)
    delta = project(ops, ops.quantize(ops.attention(q, batch, pages, layer.window), layer.o.spec), layer.o)
    a = ops.add_norm(x, delta, layer.mlp_norm, eps, layer.gate_up.spec)
    out: F32 = x + project(ops, ops.silu_mul(project(ops, a, layer.gate_up), layer.down.spec), layer.down)
    return out


def decibels(want: F32, got: F32) -> float:
    noise = float(np.square(want.astype(np.float64) - got).sum())
    return 200.0 if noise == 0 else 10 * float(np.log10(np.square(want.astype(np.float64)).sum() / noise))


if __name__ == "__main__":
    main()
