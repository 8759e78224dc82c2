"""Plans to and from `quantization_config` of compressed-tensors 0.19 (docs/formats.md has every key).

Linears with the same scheme form a group. Reading refuses whatever would be served differently from how it says: an
unknown key, a scheme no kernel of ours computes, asymmetric activations, activation order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from quantbench.errors import CheckpointError
from quantbench.infer.checkpoint.tensors import packed
from quantbench.quantizers.formats import FORMATS
from quantbench.vocabulary import BLOCK_SHAPE, DYNAMIC, CachePlan, LayerPlan, VariantPlan

VERSION = "0.19.0"  # of the layout, not of a library that we use
_ARGS: dict[str, Any] = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False, "group_size": None,
    "block_structure": None, "actorder": None, "scale_dtype": None, "zp_dtype": None, "observer": None,
    "observer_kwargs": {},
}  # fmt: skip
_FORMAT_OF = {(FORMATS[n].bits, "int" if FORMATS[n].integer else "float"): n for n in FORMATS}
_STRATEGIES = ("tensor", "channel", "group", "block")
_LAYOUTS = ("int-quantized", "float-quantized", "pack-quantized", "naive-quantized")


def _args(format_name: str, **changes: Any) -> dict[str, Any]:
    fmt = FORMATS[format_name]
    return _ARGS | {"num_bits": fmt.bits, "type": "int" if fmt.integer else "float"} | changes


def layout_of(plan: LayerPlan) -> str:
    """compressed-tensors' name of how the codes of one linear are stored."""
    if packed(plan):
        return "pack-quantized"
    return "int-quantized" if FORMATS[plan.weights].integer else "float-quantized"


def quantization_config(variant: VariantPlan) -> dict[str, Any] | None:
    """The `quantization_config` of a variant, or None where nothing in it is quantized."""
    groups: dict[str, dict[str, Any]] = {}
    members: dict[str, list[str]] = {}
    for plan in variant.layers.values():
        if plan.quantized:
            group = _group(plan)
            key = repr(group)
            groups[key] = group
            members.setdefault(key, []).append(plan.name)
    if not groups and not variant.cache.quantized:
        return None
    layouts = {group["format"] for group in groups.values()}
    single = len(groups) == 1
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": layouts.pop() if len(layouts) == 1 else ("mixed-precision" if layouts else "dense"),
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": [plan.name for plan in variant.layers.values() if not plan.quantized],
        "kv_cache_scheme": _cache_args(variant.cache) if variant.cache.quantized else None,
        "sparsity_config": {},
        "transform_config": {},
        "config_groups": {
            f"group_{i}": {"targets": ["Linear"] if single else members[key], **group}
            for i, (key, group) in enumerate(groups.items())
        },
    }


def _group(plan: LayerPlan) -> dict[str, Any]:
    weights = _args(
        plan.weights,
        symmetric=plan.symmetric,
        strategy=plan.granularity,
        group_size=plan.group_size if plan.granularity == "group" else None,
        block_structure=list(BLOCK_SHAPE) if plan.granularity == "block" else None,
        zp_dtype=None if plan.symmetric else "torch.int8",
        observer="memoryless_minmax",
    )
    inputs = None
    if plan.activations:
        strategy = "token" if plan.dynamic else "tensor"
        observer = None if plan.dynamic else "static_minmax"
        inputs = _args(plan.activations, strategy=strategy, dynamic=plan.dynamic, observer=observer)
    return {"format": layout_of(plan), "weights": weights, "input_activations": inputs, "output_activations": None}


def _cache_args(cache: CachePlan) -> dict[str, Any]:
    if cache.dynamic:
        return _args(cache.codes, strategy="token", dynamic=True, observer=None)
    strategy = "attn_head" if cache.granularity == "head" else "tensor"
    return _args(cache.format, strategy=strategy, observer="static_minmax")


def parse_config(config: Mapping[str, Any], linears: Iterable[str]) -> tuple[dict[str, LayerPlan], CachePlan | None]:
    """Plan of every quantized linear, and of the cache. Raises CheckpointError listing every key that is refused."""
    problems = _top_problems(config)
    cache = _parse_cache(config.get("kv_cache_scheme"), problems)
    plans: list[tuple[list[str], LayerPlan]] = []
    for name, group in (config.get("config_groups") or {}).items():
        plan = _parse_group(f"config_groups.{name}", group, problems)
        if plan:
            plans.append((list(group.get("targets") or []), plan))
    if problems:
        raise CheckpointError(*(f"quantization_config.{problem}" for problem in problems))
    ignored = list(config.get("ignore") or [])
    layers: dict[str, LayerPlan] = {}
    for linear in linears:
        plan = None if _rank(linear, ignored) else _best(linear, plans)
        if plan:
            layers[linear] = replace(plan, name=linear)
    return layers, cache


def _best(linear: str, plans: list[tuple[list[str], LayerPlan]]) -> LayerPlan | None:
    ranked = [(_rank(linear, targets), plan) for targets, plan in plans]
    rank, plan = max(ranked, key=lambda pair: pair[0], default=(0, None))
    return plan if rank else None


def _rank(linear: str, targets: list[str]) -> int:
    """How closely a list of targets names a linear: 3 by name, 2 by `re:` pattern, 1 by class, 0 not at all."""
    if linear in targets:
        return 3
    if any(re.match(target[3:], linear) for target in targets if target.startswith("re:")):
        return 2
    return int("Linear" in targets)


def _top_problems(config: Mapping[str, Any]) -> list[str]:
    problems = []
    method = config.get("quant_method")
    if method != "compressed-tensors":
        problems.append(f"quant_method: {method!r} is not supported; only compressed-tensors is")
    for key in ("sparsity_config", "transform_config"):
        value = config.get(key) or {}
        if value and value.get("format") != "dense":
            problems.append(f"{key}: not supported; it must be empty")
    return problems


def _parse_cache(args: Mapping[str, Any] | None, problems: list[str]) -> CachePlan | None:
    if not args:
        return None
    key = "kv_cache_scheme"
    known = {"tensor": "tensor", "attn_head": "head"}
    fmt = _format(key, args, problems)
    strategy = args.get("strategy") or "tensor"
    dynamic = args.get("dynamic", False)
    if (strategy, dynamic) not in (*((word, False) for word in known), ("token", True)):
        problems.append(
            f"{key}.strategy: {strategy!r} with dynamic {dynamic} is not supported; "
            f"allowed: {', '.join(known)} with dynamic false, token with dynamic true"
        )
    if not args.get("symmetric", True):
        problems.append(f"{key}.symmetric: false is not supported; keys and values have no zero point")
    if fmt == "int4":
        problems.append(f"{key}.num_bits: 4 is not supported; allowed: 8")
    if dynamic:
        return CachePlan(f"{fmt or 'int8'}{DYNAMIC}")
    return CachePlan(fmt or "int8", known.get(strategy, "head"))


def _parse_group(key: str, group: Mapping[str, Any], problems: list[str]) -> LayerPlan | None:
    before = len(problems)
    if group.get("format") not in (None, *_LAYOUTS):
        problems.append(f"{key}.format: {group['format']!r} is not supported; allowed: {', '.join(_LAYOUTS)}")
    if group.get("output_activations"):
        problems.append(f"{key}.output_activations: not supported; it must be null")
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not weights:
        problems.append(f"{key}.weights: absent; only groups that quantize weights are supported")
        return None
    fmt = _format(f"{key}.weights", weights, problems)
    strategy = weights.get("strategy") or ("group" if (weights.get("group_size") or -1) > 0 else "tensor")
    problems += _weight_problems(f"{key}.weights", weights, strategy)
    activations = _parse_inputs(f"{key}.input_activations", inputs, fmt, problems) if inputs else None
    if activations and not weights.get("symmetric", True):
        problems.append(f"{key}.weights.symmetric: false is supported only where the input stays float")
    if len(problems) > before or fmt is None:
        return None
    return LayerPlan(
        name="",
        weights=fmt,
        granularity=strategy,
        group_size=weights.get("group_size") if strategy == "group" else None,
        symmetric=bool(weights.get("symmetric", True)),
        activations=activations,
        dynamic=bool(inputs and inputs.get("dynamic")),
        rule=key,
    )


def _weight_problems(key: str, weights: Mapping[str, Any], strategy: str) -> list[str]:
    problems = []
    if strategy not in _STRATEGIES:
        problems.append(f"{key}.strategy: {strategy!r} is not supported; allowed: {', '.join(_STRATEGIES)}")
    if weights.get("dynamic"):
        problems.append(f"{key}.dynamic: weights have static scales; it must be false")
    if weights.get("actorder") not in (None, False, "static", "weight"):
        problems.append(f"{key}.actorder: {weights['actorder']!r} is not supported; allowed: null, static, weight")
    if strategy == "block" and list(weights.get("block_structure") or []) != list(BLOCK_SHAPE):
        problems.append(
            f"{key}.block_structure: {weights.get('block_structure')} is not supported; allowed: [128, 128]"
        )
    if strategy == "group" and not (weights.get("group_size") or 0) > 0:
        problems.append(f"{key}.group_size: {weights.get('group_size')} is not a number of inputs")
    return problems


def _parse_inputs(key: str, inputs: Mapping[str, Any], weights: str | None, problems: list[str]) -> str | None:
    fmt = _format(key, inputs, problems)
    dynamic = inputs.get("dynamic", False)
    strategy = inputs.get("strategy") or "tensor"
    if fmt and weights and fmt != weights:
        problems.append(
            f"{key}: {fmt} inputs of {weights} weights are not supported; both must be int8 or both fp8_e4m3"
        )
    if not inputs.get("symmetric", True):
        problems.append(f"{key}.symmetric: false is not supported; inputs have no zero point")
    if (strategy, dynamic) not in (("tensor", False), ("token", True)):
        problems.append(
            f"{key}.strategy: {strategy!r} with dynamic {dynamic} is not supported; "
            "allowed: tensor with dynamic false, token with dynamic true"
        )
    return fmt


def _format(key: str, args: Mapping[str, Any], problems: list[str]) -> str | None:
    problems += [f"{key}.{extra}: unknown key. Known: {', '.join(_ARGS)}" for extra in sorted(set(args) - set(_ARGS))]
    found = _FORMAT_OF.get((args.get("num_bits", 8), str(args.get("type", "int"))))
    if found is None:
        known = ", ".join(f"{bits} {kind}" for bits, kind in sorted(_FORMAT_OF))
        problems.append(f"{key}: {args.get('num_bits')} {args.get('type')} is not supported; allowed: {known}")
    return found
