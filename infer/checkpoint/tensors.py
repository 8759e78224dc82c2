"""How one quantized linear lies in a checkpoint: its tensors by name, and back.

Weights whose input stays float are packed into int32 words (`weight_packed`, `weight_shape`); weights that meet
quantized inputs stay one code to an element (`weight`), as a matrix multiplication takes them. docs/formats.md has
every name, dtype and shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantbench.infer.checkpoint.shard import Array
from quantbench.quantizers.formats import E4M3, FORMATS
from quantbench.quantizers.pack import pack_int32, unpack_int32
from quantbench.quantizers.weight import QuantizedWeight, scale_shape
from quantbench.vocabulary import CachePlan, LayerPlan

Kinds = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]  # name within the module -> shape, dtype
_F32, _I32, _I64 = (np.dtype(t) for t in (np.float32, np.int32, np.int64))


def packed(plan: LayerPlan) -> bool:
    """Integer weights with a float input are packed."""
    return plan.activations is None and FORMATS[plan.weights].integer


def linear_kinds(plan: LayerPlan, shape: tuple[int, int]) -> Kinds:
    """What a linear [N, K] under `plan` stores: name -> (shape, dtype), without its bias."""
    rows, columns = shape
    fmt = FORMATS[plan.weights]
    scale = scale_shape(str(plan.granularity), shape, plan.group_size)
    kinds: Kinds = {"weight_scale": (scale, _F32)}
    if packed(plan):
        kinds["weight_packed"] = ((rows, -(-columns * fmt.bits // 32)), _I32)
        kinds["weight_shape"] = ((2,), _I64)
        if not plan.symmetric:
            kinds["weight_zero_point"] = ((-(-rows * fmt.bits // 32), scale[1]), _I32)
    else:
        kinds["weight"] = (shape, fmt.storage)
    if plan.activations and not plan.dynamic:
        kinds["input_scale"] = ((1,), _F32)
    return kinds


def cache_kinds(cache: CachePlan, kv_heads: int) -> Kinds:
    """Static scales of the KV cache of one block: name within self_attn -> (shape, dtype)."""
    if not cache.calibrated:
        return {}
    shape = (kv_heads, 1, 1) if cache.granularity == "head" else (1,)
    return {"k_scale": (shape, _F32), "v_scale": (shape, _F32)}


def linear_tensors(plan: LayerPlan, weight: QuantizedWeight, input_scale: float | None = None) -> dict[str, Array]:
    """The tensors of one linear, by name within the module (`weight_packed`, `weight_scale`, `input_scale`, …)."""
    found: dict[str, Array] = {"weight_scale": np.asarray(weight.scale, np.float32)}
    bits = FORMATS[plan.weights].bits
    if packed(plan):
        found["weight_packed"] = pack_int32(weight.codes, bits)
        found["weight_shape"] = np.array(weight.codes.shape, np.int64)
        if weight.zero is not None:  # packed along the outputs: eight rows of one group to a word
            zero = np.ascontiguousarray(weight.zero.T)
            found["weight_zero_point"] = np.ascontiguousarray(pack_int32(zero, bits).T)
    else:
        found["weight"] = weight.codes
    if plan.activations and not plan.dynamic and input_scale is not None:
        found["input_scale"] = np.array([input_scale], np.float32)
    return found


def cache_tensors(k_scale: Array, v_scale: Array) -> dict[str, Array]:
    """`self_attn.k_scale` and `.v_scale` from scales per KV head [KV]: float32 [KV, 1, 1]."""
    both = {"self_attn.k_scale": k_scale, "self_attn.v_scale": v_scale}
    return {name: np.asarray(scale, np.float32).reshape(-1, 1, 1) for name, scale in both.items()}


def quantized_weight(plan: LayerPlan, shape: tuple[int, int], stored: Mapping[str, Array]) -> QuantizedWeight:
    """The inverse of `linear_tensors`. `shape` [N, K] of the linear; scales become float32."""
    fmt = FORMATS[plan.weights]
    granularity = str(plan.granularity)
    scale = np.asarray(stored["weight_scale"], np.float32).reshape(scale_shape(granularity, shape, plan.group_size))
    zero = None
    if "weight_packed" in stored:
        codes = unpack_int32(stored["weight_packed"], fmt.bits, shape[1])
        if not plan.symmetric:
            words = np.ascontiguousarray(stored["weight_zero_point"].T)
            zero = np.ascontiguousarray(unpack_int32(words, fmt.bits, shape[0]).T).astype(np.int32)
    else:
        codes = stored["weight"] if fmt.storage != E4M3 else stored["weight"].view(E4M3)
    return QuantizedWeight(plan.weights, granularity, codes, scale, zero, plan.group_size)
