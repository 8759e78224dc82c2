"""The words every stage shares: what a mode means, and what the plan decided for one layer.

A mode is `<base>[c8|c8_fp8][_dynamic]`. The base says how weights and activations of the linears are held, the suffix
how the KV cache is. A plan holds, per variant (a mode with its settings), one `LayerPlan` per linear: calibration
decides within it, the scale table carries the decision, quantizers apply it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quantbench.errors import RecipeError, unknown

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
WEIGHT_FORMATS = ("int8", "int4", "fp8_e4m3")
ACTIVATION_FORMATS = ("int8", "fp8_e4m3")
DYNAMIC = "_dynamic"  # behind a cache format: one scale per token and KV head, found when it is written
CACHE_FORMATS = (*FLOAT_DTYPES, "int8", "fp8_e4m3", f"int8{DYNAMIC}", f"fp8_e4m3{DYNAMIC}")
OBSERVERS = ("absmax", "avg", "percentile", "mse", "kl", "ema")
WEIGHT_OBSERVERS = ("absmax", "mse")
GRANULARITIES = {
    "int8": ("tensor", "channel"),
    "int4": ("channel", "group"),
    "fp8_e4m3": ("tensor", "channel", "block"),
}
DEFAULT_GRANULARITY = {"int8": "channel", "int4": "group", "fp8_e4m3": "tensor"}
GROUP_SIZES = (32, 64, 128)
BLOCK_SHAPE = (128, 128)
SMOOTH_TARGETS = ("attn_in", "o_in", "mlp_in", "down_in")  # the taps whose channels a transform may scale
DEFAULT_TARGETS = ("attn_in", "mlp_in", "down_in")  # o_in would also change the V cache; see docs/numerics.md


@dataclass(frozen=True)
class Mode:
    """What a mode name means. `weights` is a float dtype or a weight format; `activations` None = left in float."""

    name: str
    weights: str
    activations: str | None
    cache: str  # of CACHE_FORMATS

    @property
    def quantized(self) -> bool:
        return self.weights not in FLOAT_DTYPES or self.quantizes_cache

    @property
    def quantizes_cache(self) -> bool:
        return self.cache not in FLOAT_DTYPES

    @property
    def calibrates_cache(self) -> bool:
        """Whether its cache has scales that are known before anything is served."""
        return self.quantizes_cache and not self.cache.endswith(DYNAMIC)


_BASES: dict[str, tuple[str, str | None, str]] = {  # base -> weights, activations, cache without a suffix
    "fp32": ("float32", None, "float32"),
    "bf16": ("bfloat16", None, "bfloat16"),
    "fp16": ("float16", None, "float16"),
    "weight_only_int8": ("int8", None, "bfloat16"),
    "weight_only_int4": ("int4", None, "bfloat16"),
    "a8w8": ("int8", "int8", "bfloat16"),
    "a8w8_fp8": ("fp8_e4m3", "fp8_e4m3", "bfloat16"),
}
_CACHES = {
    "": None,
    "c8": "int8",
    "c8_fp8": "fp8_e4m3",
    f"c8{DYNAMIC}": f"int8{DYNAMIC}",
    f"c8_fp8{DYNAMIC}": f"fp8_e4m3{DYNAMIC}",
}
MODES: dict[str, Mode] = {
    base + suffix: Mode(base + suffix, weights, activations, cache or float_cache)
    for base, (weights, activations, float_cache) in _BASES.items()
    for suffix, cache in _CACHES.items()
}


def parse_mode(name: str) -> Mode:
    """The mode called `name`. Raises RecipeError naming the known modes."""
    if name not in MODES:
        raise RecipeError(unknown("mode", name, MODES))
    return MODES[name]


@dataclass(frozen=True)
class LayerPlan:
    """What is to be done with one linear. `weights` is a float dtype (left as it is) or a format name."""

    name: str  # "model.layers.0.self_attn.q_proj" or "lm_head"
    weights: str
    granularity: str | None = None  # of the weight scale; None where weights stay float
    group_size: int | None = None
    symmetric: bool = True
    weight_observer: str = "absmax"
    activations: str | None = None  # None: the input stays float
    dynamic: bool = False  # True: one scale per token at run time; False: one calibrated scale per tensor
    activation_observer: str = "absmax"
    method: str = "rtn"
    options: tuple[tuple[str, Any], ...] = ()  # the method's settings by name
    rule: str = "default"  # which rule of the recipe chose this, for people

    @property
    def quantized(self) -> bool:
        return self.weights not in FLOAT_DTYPES


@dataclass(frozen=True)
class CachePlan:
    """How the KV cache is held: where `format` is int8 or fp8_e4m3, with static scales per KV head; behind either may
    stand `_dynamic`, for a scale per token and KV head that is found when the token is written."""

    format: str  # of CACHE_FORMATS
    granularity: str = "head"  # of static scales
    observer: str = "absmax"  # of static scales

    @property
    def quantized(self) -> bool:
        return self.format not in FLOAT_DTYPES

    @property
    def dynamic(self) -> bool:
        return self.format.endswith(DYNAMIC)

    @property
    def calibrated(self) -> bool:
        """Whether it has scales that are known before anything is served."""
        return self.quantized and not self.dynamic

    @property
    def codes(self) -> str:
        """The format of its elements."""
        return self.format.removesuffix(DYNAMIC)


@dataclass(frozen=True)
class VariantPlan:
    """One column of the report: a mode with its settings, decided for every linear of the model."""

    name: str  # unique in the recipe, a safe file name; the mode's name unless the recipe gives another
    mode: Mode
    dtype: str  # storage dtype of what stays float: "float32" | "bfloat16" | "float16"
    cache: CachePlan
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    transforms: tuple[dict[str, Any], ...] = ()  # e.g. ({"smooth": {"alpha": 0.5}},), in recipe order
    prefix: str | tuple[int, ...] = "off"  # "auto", or the ids of tokens that stand in front of every sequence
