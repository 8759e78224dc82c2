"""A model of random weights, made on the device: what a benchmark needs where there is no checkpoint.

Numbers are uniform, of a size that keeps a deep network's stream finite. Random bits also draw the power that real
weights draw, which zeros would not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantbench.errors import ModelError, unknown
from quantbench.infer.checkpoint.source import ModelSource
from quantbench.infer.checkpoint.tokenizer import Tokenizer
from quantbench.infer.cuda import layout, mixed
from quantbench.infer.cuda.array import DeviceArray
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.kinds import BF16, E4M3, F16, F32, INT4, INT8
from quantbench.infer.cuda.ops import CudaOps
from quantbench.infer.cuda.runner import CudaRunner
from quantbench.infer.cuda.weight import CudaPacked, DeviceWeight
from quantbench.infer.engine.cache import KVCache
from quantbench.infer.engine.engine import Engine
from quantbench.infer.engine.forward import Layer, Model, Projection
from quantbench.infer.engine.limits import limits_of
from quantbench.infer.engine.scheduler import Scheduler
from quantbench.infer.models import ModelConfig
from quantbench.infer.models.llama import read_config
from quantbench.infer.ops import ActSpec
from quantbench.infer.ops.pack import INT8_DOT
from quantbench.vocabulary import DYNAMIC, Mode, parse_mode

DEVIATION = 0.02  # of weights, about as trained ones
SPREAD = {INT8: 73.3, INT8_DOT: 73.3, INT4: 4.6, E4M3: 130.0}  # standard deviation of random codes
CACHE_SCALE = {"int8": 0.02, "fp8_e4m3": 0.01}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    },
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Nothing:
    """A store without tensors."""

    files: list[Path] = field(default_factory=list)

    def names(self) -> list[str]:
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        raise ModelError(f"{name}: a model of random weights has no stored tensors")

    def dtype(self, name: str) -> np.dtype[Any]:
        raise ModelError(f"{name}: a model of random weights has no stored tensors")

    def read(self, name: str) -> Any:
        raise ModelError(f"{name}: a model of random weights has no stored tensors")


def config_of(name: str) -> ModelConfig:
    """Raises ModelError for an unknown name."""
    if name not in CONFIGS:
        raise ModelError(unknown("--config", name, CONFIGS))
    return read_config(CONFIGS[name])


def fill_random(device: Device, array: DeviceArray, kind: int, amplitude: float = 1.0, seed: int = 0) -> None:
    """Random numbers of a kind (gemm's); INT4: any bytes. `amplitude` bounds floats."""
    kernel = device.kernel("bench.cu", "fill_random", KIND=kind)
    words = np.int64(array.nbytes // 4)
    device.launch(kernel, 8 * device.multiprocessors, 512, array, words, seed, amplitude)


class Dice:
    """Makes weights, each with a seed of its own."""

    def __init__(self, device: Device) -> None:
        self._device, self._seed = device, 0

    def linear(self, name: str, kind: int, rows: int, columns: int, group: int, activations: str | None) -> CudaPacked:
        tiled = activations is None and mixed.packs(self._device, kind, (rows, columns), group, False)
        shapes = layout.fields(kind, rows, columns, group, False, tiled)
        arrays = {n: self._device.allocate(*f) for n, f in shapes.items()}
        self._seed += 1
        bound = DEVIATION * 3**0.5  # of a uniform distribution
        base = INT8 if kind == INT8_DOT else kind
        fill_random(self._device, arrays["codes"], base, bound, self._seed)
        if "scale" in arrays:
            scale = np.full(arrays["scale"].shape, DEVIATION / SPREAD[kind], np.float32)
            self._device.write(arrays["scale"], scale)
        weight = DeviceWeight(
            kind, rows, columns, arrays["codes"], arrays.get("scale"), None, group or columns, None, activations
        )
        return CudaPacked((name,), (rows, columns), weight.nbytes, (weight,))


def random_model(device: Device, config: ModelConfig, mode: Mode, group: int = 128) -> Model:
    """All linears of the blocks in `mode`; embedding and head in bf16 (or the mode's float dtype)."""
    dice = Dice(device)
    kind, spec = kind_of_mode(mode), ActSpec(mode.activations)
    groups = group if kind == INT4 else 0
    d, i, h = config.hidden_size, config.intermediate_size, config.head_dim
    shapes = {
        "qkv": ((config.num_heads + 2 * config.num_kv_heads) * h, d), "o": (d, config.num_heads * h),
        "gate_up": (2 * i, d), "down": (d, i),
    }  # fmt: skip
    ones = np.ones(d, np.float32)

    def layer(number: int) -> Layer:
        made = {
            name: Projection(spec, (dice.linear(f"{number}.{name}", kind, *shape, groups, mode.activations),))
            for name, shape in shapes.items()
        }
        return Layer(ones, made["qkv"], None, config.window_of(number), made["o"], ones, made["gate_up"], made["down"])

    outer = F16 if device.dtype == np.float16 else kind if kind in (F32, F16) else BF16
    layers = tuple(layer(number) for number in range(config.num_layers))
    embedding = dice.linear("embedding", outer, config.vocab_size, d, 0, None)
    head = Projection(ActSpec(), (dice.linear("lm_head", outer, config.vocab_size, d, 0, None),))
    return Model(config, embedding, layers, ones, head)


def kind_of_mode(mode: Mode) -> int:
    kinds = {"float32": F32, "bfloat16": BF16, "float16": F16, "int8": INT8, "int4": INT4, "fp8_e4m3": E4M3}
    return INT8_DOT if (mode.weights, mode.activations) == ("int8", "int8") else kinds[mode.weights]


def random_engine(name: str, mode: str, ops: CudaOps, batch: int, length: int, chunk: int) -> Engine:
    """An engine on random weights with room for `batch` sequences of `length` tokens, its cache random as well."""
    config, own = config_of(name), parse_mode(mode)
    model = random_model(ops.device, config, own)
    room = -(-length // 64) * 64 * batch
    limits = replace(limits_of(config, own.cache, room, batch, chunk), max_length=length)
    ones = np.full(config.num_kv_heads, CACHE_SCALE.get(own.cache, 1.0), np.float32)
    scales = [(ones, ones) if own.cache in CACHE_SCALE else None] * config.num_layers
    cache = KVCache(config, own.cache, limits.cache_tokens, list(scales))
    runner = CudaRunner(ops, model, cache, limits)
    kinds = {"float32": F32, "bfloat16": BF16, "float16": F16, "int8": INT8, "fp8_e4m3": E4M3}
    codes = own.cache.removesuffix(DYNAMIC)
    for number, layer in enumerate(runner.pages.layers):
        for side in (layer.k, layer.v):
            fill_random(ops.device, side, kinds[codes], 1.0, 1000 + number)
        for scale in layer.arrays[2:]:
            ops.device.write(scale, np.full(scale.shape, CACHE_SCALE[codes], np.float32))
    source = ModelSource(f"{name} (random weights)", Path(name), config, {}, Nothing(), _no_tokenizer)
    return Engine(source, own, runner, Scheduler(cache.pool, batch, chunk, prefix_reuse=False))


def _no_tokenizer() -> Tokenizer:
    raise ModelError("a model of random weights has no tokenizer")
