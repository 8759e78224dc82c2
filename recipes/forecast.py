"""What a run will take, from shapes alone. Checkpoint sizes are exact; memory, disk and time are estimates.

hidden     samples · length · hidden_size · 4 bytes: the calibration set between two blocks, kept twice (in, out)
calibrate  libraries + embedding and head in float32 + 3 · block in float32 (weights, folded weights, codes) +
           hidden (or one batch of it, when spilled) + 6 taps of one batch
validate   libraries + 2 · the largest checkpoint or the float32 baseline (as read, as packed) + logits of a window
disk       checkpoints + the larger of hidden (where spilled) and 4 · divergence tokens · vocabulary (the baseline's
           log-probabilities)
seconds    2 operations per weight and token, over every pass of calibration, accuracy, parity and prefill, at
           `gflops`; weights read once per decoded token at `gb_per_s`; 30 ns per weight and variant to quantize
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantbench.recipes.facts import ModelFacts, Shape
from quantbench.recipes.rules import HEAD
from quantbench.recipes.schema import Recipe
from quantbench.vocabulary import BLOCK_SHAPE, LayerPlan, VariantPlan

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BITS = {"int8": 8, "int4": 4, "fp8_e4m3": 8}
_BASELINES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_LIBRARIES = 500 * 2**20  # resident after importing Paddle, tokenizers and datasets
_QUANTIZE_NS = 30


@dataclass(frozen=True)
class Machine:
    """Speeds assumed until measured: float32 matrix products and reading of memory, of a two-core CPU."""

    gflops: float = 60.0
    gb_per_s: float = 10.0


@dataclass(frozen=True)
class Forecast:
    """Bytes and seconds. `memory` and `seconds_of` say per stage what `memory_bytes` and `seconds` are made of."""

    memory_bytes: int
    disk_bytes: int
    seconds: float
    checkpoint_bytes: dict[str, int]  # of tensors, without the files' headers
    memory: dict[str, int]
    seconds_of: dict[str, float]
    spilled: bool  # hidden states go to disk


def forecast(
    recipe: Recipe,
    variants: Mapping[str, VariantPlan],
    layers: Mapping[str, Shape],
    facts: ModelFacts,
    machine: Machine | None = None,
) -> Forecast:
    """The numbers for one plan."""
    sizes = {name: checkpoint_bytes(v, layers, facts) for name, v in variants.items()}
    hidden = recipe.calibration.samples * recipe.calibration.length * facts.hidden_size * 4
    spilled = hidden > recipe.calibration.spill_above
    memory = {
        "calibrate": _calibrate_bytes(recipe, layers, facts, 0 if spilled else 2 * hidden),
        "validate": _validate_bytes(recipe, layers, facts, max(sizes.values(), default=0)),
    }
    seconds = _seconds(recipe, variants, layers, sizes, machine or Machine())
    divergence = recipe.accuracy.divergence
    logits = 4 * divergence.tokens * facts.vocab_size if divergence else 0
    disk = sum(sizes.values()) + max(logits, 2 * hidden if spilled else 0)
    return Forecast(max(memory.values()), disk, sum(seconds.values()), sizes, memory, seconds, spilled)


def checkpoint_bytes(variant: VariantPlan, layers: Mapping[str, Shape], facts: ModelFacts) -> int:
    """Bytes of every tensor of a variant's checkpoint (compressed-tensors layout, scales in float32).

    A rotated model's head is never the embedding: the final norm is folded into it.
    """
    shares_head = facts.tied_head and not rotates(variant)
    total = facts.float_elements * _BYTES[variant.dtype]
    for name, shape in layers.items():
        plan = variant.layers[name]
        if not (name == HEAD and shares_head and not plan.quantized):
            total += layer_bytes(plan, shape)
    scales = 2 * facts.num_kv_heads * facts.num_layers * 4 if variant.cache.calibrated else 0  # k_scale, v_scale
    return total + scales


def rotates(variant: VariantPlan) -> bool:
    """Whether the variant is made from a rotated model, which has hidden states of its own."""
    return any("rotate" in transform for transform in variant.transforms)


def layer_bytes(plan: LayerPlan, shape: Shape) -> int:
    """Bytes of one linear's weight with its scales, zero points, shape and static input scale."""
    out, inputs = shape
    if not plan.quantized:
        return out * inputs * _BYTES[plan.weights]
    packed = plan.activations is None and plan.weights != "fp8_e4m3"  # codes in int32 words, weight_shape i64[2]
    codes = out * -(-inputs * _BITS[plan.weights] // 32) * 4 + 16 if packed else out * inputs
    rows, columns = _scales(plan, shape)
    zeros = 0 if plan.symmetric else -(-rows // 8) * columns * 4  # packed along the outputs, eight to a word
    static_input = 4 if plan.activations is not None and not plan.dynamic else 0
    return codes + rows * columns * 4 + zeros + static_input


def _scales(plan: LayerPlan, shape: Shape) -> Shape:
    out, inputs = shape
    return {
        "tensor": (1, 1),
        "channel": (out, 1),
        "group": (out, inputs // (plan.group_size or inputs)),
        "block": (-(-out // BLOCK_SHAPE[0]), -(-inputs // BLOCK_SHAPE[1])),
    }[plan.granularity or "channel"]


def _elements(layers: Mapping[str, Shape], head: bool) -> int:
    return sum(out * inputs for name, (out, inputs) in layers.items() if head or name != HEAD)


def _calibrate_bytes(recipe: Recipe, layers: Mapping[str, Shape], facts: ModelFacts, hidden: int) -> int:
    tables = facts.vocab_size * facts.hidden_size * 4 * (1 if facts.tied_head else 2)
    block = 3 * 4 * _elements(layers, head=False) // max(facts.num_layers, 1)
    batch = recipe.calibration.batch * recipe.calibration.length * 4
    return _LIBRARIES + tables + block + hidden + batch * (2 * facts.hidden_size + 6 * facts.intermediate_size)


def _validate_bytes(recipe: Recipe, layers: Mapping[str, Shape], facts: ModelFacts, largest: int) -> int:
    own_head = not facts.tied_head
    baseline = (_elements(layers, own_head) + facts.float_elements) * _BYTES[_BASELINES[recipe.accuracy.baseline]]
    context = max((text.context for text in recipe.accuracy.perplexity), default=512)
    return _LIBRARIES + 2 * max(baseline, largest) + 3 * context * facts.vocab_size * 4


def _seconds(
    recipe: Recipe,
    variants: Mapping[str, VariantPlan],
    layers: Mapping[str, Shape],
    sizes: Mapping[str, int],
    machine: Machine,
) -> dict[str, float]:
    """Per stage."""
    quantized = [v for v in variants.values() if v.mode.quantized]
    own_inputs = recipe.calibration.inputs == "quantized"
    own_pass = sum(own_inputs or any(word != "rotate" for t in v.transforms for word in t) for v in quantized)
    turns = {name: str(next((t for t in v.transforms if "rotate" in t), "")) for name, v in variants.items()}
    models = len({(turns[name], v.prefix) for name, v in variants.items()})
    calibrated = recipe.calibration.samples * recipe.calibration.length
    blocks, whole = _elements(layers, head=False), _elements(layers, head=True)
    tested = len({recipe.accuracy.baseline, *variants})
    operations = {
        "collect": 2 * blocks * calibrated * (models + own_pass),
        "accuracy": 2 * whole * _scored_tokens(recipe) * tested,
        "parity": 2 * whole * recipe.parity.tokens * 3 * len(quantized) if recipe.parity else 0,
    }
    seconds = {stage: count / machine.gflops / 1e9 for stage, count in operations.items()}
    seconds["quantize"] = blocks * len(quantized) * _QUANTIZE_NS * 1e-9
    seconds["throughput"] = _throughput_seconds(recipe, whole, sizes, machine)
    return seconds


def _scored_tokens(recipe: Recipe) -> int:
    """Tokens run for accuracy; a text asked for twice at one context is run once."""
    accuracy = recipe.accuracy
    longest: dict[tuple[str, int], int] = {}
    for text in (*accuracy.perplexity, *((accuracy.divergence,) if accuracy.divergence else ())):
        key = (text.data, text.context)
        longest[key] = max(longest.get(key, 0), text.tokens)
    return sum(longest.values())


def _throughput_seconds(recipe: Recipe, weights: int, sizes: Mapping[str, int], machine: Machine) -> float:
    t = recipe.throughput
    if t is None:
        return 0.0
    prefill = 2 * weights * t.prompt * sum(t.batches) / machine.gflops / 1e9
    baseline = 4 * weights
    return sum(
        t.rounds * (prefill + len(t.batches) * t.output * size / machine.gb_per_s / 1e9)
        for size in (baseline, *sizes.values())
    )
