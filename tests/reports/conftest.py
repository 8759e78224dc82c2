"""A run folder like one that the pipeline leaves: a Llama of 30 blocks with real linear names, the accuracy and
outliers of a small model, and narrow channels, so that it is written in a moment. Statistics and scale tables come
from scales/ itself, so these tests also hold the two formats together.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from quantbench.scales.statistics import observe, save
from quantbench.scales.table import Entry, ScaleTable

BLOCKS, WIDTH, HEADS = 30, 48, 3
LINEARS = {
    "self_attn.q_proj": "attn_in",
    "self_attn.k_proj": "attn_in",
    "self_attn.v_proj": "attn_in",
    "self_attn.o_proj": "o_in",
    "mlp.gate_proj": "mlp_in",
    "mlp.up_proj": "mlp_in",
    "mlp.down_proj": "down_in",
}
OUTLIERS = {(11, "down_in"): 3537.0, (28, "down_in"): 2389.0, (29, "down_in"): 514.0}
QUANTIZED = {  # variant -> weights, granularity, activations, dynamic, cache
    "a8w8": ("int8", "channel", "int8", False, "bfloat16"),
    "a8w8_dynamic": ("int8", "channel", "int8", True, "bfloat16"),
    "a8w8c8": ("int8", "channel", "int8", True, "int8"),
    "a8w8_fp8": ("fp8_e4m3", "tensor", "fp8_e4m3", False, "bfloat16"),
    "weight_only_int8": ("int8", "channel", None, False, "bfloat16"),
    "weight_only_int4": ("int4", "group", None, False, "bfloat16"),
}
FLOATS = {"fp32": "float32", "bf16": "bfloat16"}
SCORES = {  # variant -> perplexity, kl, top-1, decode speed, prefill speed, checkpoint MB
    "fp32": (23.68, 0.0, 1.0, 30.0, 210.0, 538),
    "bf16": (23.69, 0.0004, 0.991, 52.0, 212.0, 269),
    "a8w8": (59.3, 1.1, 0.58, 92.0, 640.0, 220),
    "a8w8_dynamic": (24.5, 0.031, 0.91, 88.0, 610.0, 220),
    "a8w8c8": (24.6, 0.033, 0.908, 90.0, 600.0, 220),
    "a8w8_fp8": (24.13, 0.02, 0.93, 71.0, 230.0, 220),
    "weight_only_int8": (23.74, 0.002, 0.98, 95.0, 205.0, 220),
    "weight_only_int4": (27.2, 0.12, 0.84, 128.0, 190.0, 173),
}
BASE = SCORES["fp32"]


def layer_names() -> list[str]:
    return [f"model.layers.{block}.{linear}" for block in range(BLOCKS) for linear in LINEARS]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))


def write_sample(root: Path) -> Path:
    """A complete run folder at `root`."""
    root.mkdir(parents=True)
    (root / "recipe.lock.yaml").write_text(yaml.safe_dump(_recipe()))
    write_json(root / "plan.json", _plan())
    ranges = _write_statistics(root / "statistics")
    for variant in QUANTIZED:
        _write_table(root / "scales" / variant, variant, ranges)
    for variant in SCORES:
        _write_checkpoint(root / "checkpoint" / variant, variant)
    write_json(root / "accuracy.json", _accuracy())
    write_json(root / "throughput.json", _throughput())
    write_json(root / "parity.json", _parity())
    write_json(root / "gates.json", _gates())
    return root


def _recipe() -> dict[str, Any]:
    return {
        "model": "demo:smollm2",
        "modes": list(SCORES),
        "calibration": {"data": "demo:wikipedia", "samples": 64, "length": 256, "seed": 0},
        "gates": {"perplexity_increase": 0.05, "decode_speedup": 1.2},
    }


def _plan() -> dict[str, Any]:
    variants: dict[str, Any] = {
        name: {
            "mode": name,
            "dtype": dtype,
            "cache": {"format": dtype},
            "transforms": [],
            "layers": {layer: {"weights": dtype} for layer in [*layer_names(), "lm_head"]},
        }
        for name, dtype in FLOATS.items()
    }
    for name, (weights, granularity, activations, dynamic, cache) in QUANTIZED.items():
        linear = {
            "weights": weights,
            "granularity": granularity,
            "group_size": 32 if granularity == "group" else None,
            "activations": activations,
            "dynamic": dynamic,
            "method": "rtn",
            "rule": "default",
        }
        layers: dict[str, Any] = dict.fromkeys(layer_names(), linear)
        layers["lm_head"] = {"weights": "bfloat16", "rule": "lm_head stays float"}
        variants[name] = {
            "mode": "a8w8" if name == "a8w8_dynamic" else name,
            "dtype": "bfloat16",
            "cache": {"format": cache, "granularity": "head"},
            "transforms": [{"smooth": {"alpha": 0.5}}] if name == "a8w8c8" else [],
            "layers": layers,
        }
    return {"model": "demo:smollm2", "variants": variants, "forecast": {"memory_bytes": 10**9, "seconds": 180}}


def _write_statistics(root: Path) -> dict[tuple[int, str], tuple[float, np.ndarray]]:
    rng = np.random.default_rng(0)
    ranges = {}
    for block in range(BLOCKS):
        taps = {}
        for tap, spread in (("attn_in", 1.0), ("o_in", 0.3), ("mlp_in", 1.3), ("down_in", 2.0)):
            x = (spread * (1 + block / 20) * rng.standard_normal((128, WIDTH))).astype(np.float32)
            x[:, 5] *= 4  # one loud channel, as models have
            if (block, tap) in OUTLIERS:
                x[7, 11] = OUTLIERS[block, tap]
            taps[tap] = observe(x)
        for tap in ("k", "v"):
            loud = np.repeat(1 + np.arange(HEADS) * (block % 4), 4)
            taps[tap] = observe((loud * rng.standard_normal((128, HEADS * 4))).astype(np.float32), rows=HEADS)
            taps[tap].histogram = None  # eight of ten rows, and no report looks at them
        save(root / f"block_{block:05d}.safetensors", taps)
        ranges |= {(block, tap): (float(s.absmax.max()), s.channel_absmax) for tap, s in taps.items()}
        ranges |= {(block, tap): (float(taps[tap].absmax.max()), taps[tap].absmax) for tap in ("k", "v")}
    return ranges


def _write_table(folder: Path, variant: str, ranges: dict[tuple[int, str], tuple[float, np.ndarray]]) -> None:
    weights, granularity, activations, dynamic, cache = QUANTIZED[variant]
    rng = np.random.default_rng(1)
    table = ScaleTable()
    qmax = {"int8": 127, "int4": 7.5, "fp8_e4m3": 448}
    for layer in layer_names():
        block, tap = int(layer.split(".")[2]), LINEARS[layer.split(".", 3)[3]]
        shape = {"channel": (WIDTH, 1), "tensor": (1,), "group": (WIDTH, 2)}[granularity]
        absmax = (0.2 + 0.1 * rng.random(shape)).astype(np.float32)
        loss = {"int8": 4e-5, "int4": 8e-3, "fp8_e4m3": 7e-4}[weights] * float(1 + rng.random())
        group = 32 if granularity == "group" else None
        table.add(
            Entry(f"{layer}.weight", "weight", weights, granularity, absmax / np.float32(qmax[weights]), None, absmax,
                  group, "absmax", "default", loss)
        )  # fmt: skip
        if activations is None:
            continue
        reached = np.array([] if dynamic else [ranges[block, tap][0]], np.float32)
        input_loss = 2e-4 if dynamic or activations != "int8" else (reached.item() / 127) ** 2 / 12 / 30
        table.add(
            Entry(f"{layer}.input", "input", activations, "token" if dynamic else "tensor",
                  reached / np.float32(qmax[activations]), None, reached, None, "absmax", "default",
                  min(input_loss, 0.9))
        )  # fmt: skip
    if cache == "int8":
        for block in range(BLOCKS):
            for part in ("k", "v"):
                per_head = ranges[block, part][1]
                name = f"model.layers.{block}.self_attn.{part}_cache"
                table.add(
                    Entry(name, "cache", "int8", "head", per_head / np.float32(127), None, per_head, None, "absmax",
                          "default", 3e-4)
                )  # fmt: skip
            channels = ranges[block, "attn_in"][1]
            factor = np.sqrt(channels / channels.mean()).astype(np.float32)
            name = f"model.layers.{block}.input_layernorm.smooth"
            table.add(
                Entry(
                    name, "transform", "float32", "channel", factor, None, channels, None, "absmax", "alpha 0.5", None
                )
            )
    table.save(folder)


def _write_checkpoint(folder: Path, variant: str) -> None:
    folder.mkdir(parents=True)
    wide = {"fp32": np.float32, "bf16": np.float16}.get(variant, np.int8)
    arrays = {
        "model.embed_tokens.weight": np.zeros((64, WIDTH), np.float32 if variant == "fp32" else np.float16),
        "model.layers.0.self_attn.q_proj.weight": np.zeros((WIDTH, WIDTH), wide),
        "model.layers.0.mlp.down_proj.weight": np.zeros((WIDTH, 2 * WIDTH), wide),
        "model.norm.weight": np.zeros(WIDTH, np.float32),
    }
    save_file(arrays, folder / "model.safetensors")


def _accuracy() -> dict[str, Any]:
    perplexity = {}
    divergence = {}
    choices = {}
    for name, (value, kl, top1, *_) in SCORES.items():
        score = {"perplexity": value, "nll": float(np.log(value))}
        increase = value / BASE[0] - 1
        chosen: dict[str, Any] = {"accuracy": 0.4 - kl / 5}
        if name != "fp32":
            bounds = [increase - 0.006, increase + 0.006]
            score |= {"increase": increase, "increase_interval": bounds}
            divergence[name] = {
                "kl": kl, "kl_interval": [kl * 0.9, kl * 1.1],
                "top1": top1, "top1_interval": [top1 - 0.01, top1 + 0.01],
            }  # fmt: skip
            chosen |= {"delta": -kl / 5, "delta_interval": [-kl / 5 - 0.03, -kl / 5 + 0.03]}
        perplexity[name] = score
        choices[name] = chosen
    return {
        "baseline": "fp32",
        "perplexity": [{"data": "demo:wikipedia-heldout", "tokens": 4088, "context": 512, "variants": perplexity}],
        "divergence": [{"data": "demo:wikipedia-heldout", "tokens": 4088, "variants": divergence}],
        "choices": [{"data": "questions.jsonl", "questions": 100, "variants": choices}],
    }


def _spread(value: float) -> dict[str, float]:
    return {"median": value, "min": value * 0.97, "max": value * 1.02}


def _throughput() -> dict[str, Any]:
    variants = {}
    for name, (_, _, _, decode, prefill, megabytes) in SCORES.items():
        bytes_read = megabytes * 1e-3 * decode
        variants[name] = {
            "load_s": 0.4,
            "checkpoint_bytes": megabytes * 10**6,
            "weights_bytes": megabytes * 10**6,
            "cache_bytes": 3 * 10**7 if name.endswith("c8") else 6 * 10**7,
            "peak_rss_bytes": (megabytes + 180) * 10**6,
            "prefill": {"tokens_per_s": _spread(prefill), "gop_per_s": prefill * 0.27, "share_of_ceiling": 0.4},
            "decode": {
                str(batch): {
                    "tokens_per_s": _spread(decode * batch**0.6), "ttft_ms": 180.0, "itl_p50_ms": 11.0,
                    "itl_p95_ms": 14.0, "gb_per_s": bytes_read, "share_of_ceiling": min(0.95, bytes_read / 37.8),
                    "bound": "memory", "why": f"reads {megabytes} MB per token",
                }
                for batch in (1, 8)
            },
        }  # fmt: skip
    return {
        "machine": {"cpu": "Example CPU", "threads": 2, "isa": "avx512vnni"},
        "prompt": 128, "output": 64, "rounds": 3,
        "ceilings": {"read_gb_per_s": 37.8, "float32_gop_per_s": 220, "int8_gop_per_s": 900},
        "variants": variants,
    }  # fmt: skip


def _parity() -> dict[str, Any]:
    def layers(level: float) -> list[dict[str, Any]]:
        return [
            {
                "name": f"model.layers.{block}",
                "sqnr_simulated_db": level - block / 3 - (18 if level < 30 and block > 11 else 0),
                "sqnr_served_db": level - block / 3 - (18 if level < 30 and block > 11 else 0),
                "sqnr_served_to_simulated_db": 110.0,
            }
            for block in range(BLOCKS)
        ]

    levels = {
        "a8w8": 26,
        "a8w8_dynamic": 38,
        "a8w8c8": 37,
        "a8w8_fp8": 33,
        "weight_only_int8": 45,
        "weight_only_int4": 24,
    }
    return {
        "tokens": 512,
        "variants": {
            name: {
                "codes_compared": 10**6, "codes_different": 0, "top1_served_simulated": 0.9995,
                "kl_served_simulated": 1e-6, "top1_free_running": 0.91, "kl_free_running": 0.03,
                "layers": layers(level), "first_departure": None,
            }
            for name, level in levels.items()
        },
    }  # fmt: skip


def _gates() -> dict[str, Any]:
    gates = []
    for name, (value, _, _, decode, *_) in SCORES.items():
        if name in FLOATS:
            continue
        increase, speedup = value / BASE[0] - 1, decode / BASE[3]
        gates.append(_gate(name, "perplexity_increase", increase, 0.05, increase <= 0.05))
        gates.append(_gate(name, "decode_speedup", speedup, 1.2, speedup >= 1.2))
    return {"gates": gates}


def _gate(variant: str, gate: str, value: float, limit: float, passed: bool) -> dict[str, Any]:
    told = f"{variant}: {gate} {value:.3f} {'meets' if passed else 'misses'} the limit of {limit:.3f}"
    return {
        "variant": variant, "name": gate, "limit": limit, "value": value, "passed": passed,
        "why": told,
    }  # fmt: skip


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run folder; do not change it."""
    return write_sample(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def scratch(sample: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(sample, tmp_path / "demo"))
