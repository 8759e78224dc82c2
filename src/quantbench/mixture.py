"""Mixed precision from a finished run: what each group of linears may be, what that takes and costs, and the recipe.

The candidates are variants of the run. A group's options are what the candidates' plans say of it, its bytes are those
of the plan's forecast, its losses come from `calibrate.sensitivity` or `calibrate.trials`; `calibrate.budget` chooses.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from quantbench.calibrate.budget import Option, Selection
from quantbench.calibrate.sensitivity import HEAD, Group, groups_of
from quantbench.errors import RecipeError, unknown
from quantbench.infer.checkpoint.quantized import linear_shape
from quantbench.pipeline import Options, Run, facts_of, load
from quantbench.recipes.facts import Shape
from quantbench.recipes.forecast import checkpoint_bytes, layer_bytes, rotates
from quantbench.recipes.order import ORDER
from quantbench.recipes.rules import first_match
from quantbench.recipes.schema import Recipe
from quantbench.recipes.sections import Section
from quantbench.recipes.source import Dumper
from quantbench.vocabulary import FLOAT_DTYPES, MODES, LayerPlan, VariantPlan

NAME = "mixed"  # of the variant in the written recipe
LOCK = "recipe.lock.yaml"
_GLOBS = {
    "qkv": "self_attn.[qkv]_proj",
    "o": "self_attn.o_proj",
    "gate_up": "mlp.[gu]*_proj",
    "down": "mlp.down_proj",
}
Words = dict[str, Any]  # of a rule, without `match`
Losses = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Mixture:
    """A run and those of its variants that may be mixed. `folder` is where it lies now."""

    folder: Path
    run: Run
    variants: dict[str, VariantPlan]

    @cached_property
    def groups(self) -> list[Group]:
        return groups_of(self.run.source.config.num_layers)

    @cached_property
    def dtype(self) -> str:
        """Of what stays float: that of a float candidate, else what the quantized ones store."""
        floats = [v for v in self.variants.values() if v.mode.weights in FLOAT_DTYPES]
        return (floats or list(self.variants.values()))[0].dtype

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """[out, in] of every linear."""
        return {name: linear_shape(name, self.run.source.config) for g in self.groups for name in g.linears}

    @cached_property
    def shares_head(self) -> bool:
        """Whether a float head is the embedding; a rotated model has one of its own."""
        return self.run.source.config.tie_word_embeddings and not any(map(rotates, self.variants.values()))

    def plan(self, variant: str, linear: str) -> LayerPlan:
        """What a candidate does with a linear; where it leaves it float, in the one float dtype of the mixture."""
        plan = self.variants[variant].layers[linear]
        return plan if plan.quantized else replace(plan, weights=self.dtype)

    def bytes_of(self, variant: str, group: Group) -> int:
        """Bytes a group adds to the checkpoint. A float head that is the embedding adds none."""
        plans = [self.plan(variant, name) for name in group.linears]
        if group.name == HEAD and self.shares_head and not plans[0].quantized:
            return 0
        return sum(layer_bytes(p, self.shapes[p.name]) for p in plans)

    def float_bytes(self, group: Group) -> int:
        """The same of the group left float."""
        if group.name == HEAD and self.shares_head:
            return 0
        return sum(layer_bytes(LayerPlan(name, self.dtype), self.shapes[name]) for name in group.linears)

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of the checkpoint that no choice changes: embedding, norms, biases."""
        name, variant = next(iter(self.variants.items()))
        layers = {linear: self.plan(name, linear) for linear in self.shapes}
        plan = replace(variant, dtype=self.dtype, layers=layers)
        total = checkpoint_bytes(plan, self.shapes, facts_of(self.run.source))
        return total - sum(self.bytes_of(name, group) for group in self.groups)

    @property
    def whole_bytes(self) -> int:
        """Bytes of the checkpoint with every linear float."""
        return self.fixed_bytes + sum(map(self.float_bytes, self.groups))

    def options(self, losses: Losses, cost: Callable[[str, Group], int] | None = None) -> dict[str, list[Option]]:
        """Group -> one option per candidate. `losses`: variant -> group -> loss; a group that is absent loses nothing.
        `cost` of a candidate's group: its bytes unless told otherwise."""
        cost = cost or self.bytes_of
        return {
            g.name: [Option(v, cost(v, g), losses.get(v, {}).get(g.name, 0.0)) for v in self.variants]
            for g in self.groups
        }

    def bytes_with(self, selection: Selection) -> int:
        """Bytes of the checkpoint that a selection makes."""
        return self.fixed_bytes + sum(self.bytes_of(selection.labels[g.name], g) for g in self.groups)

    def treated_alike(self, a: str, b: str, group: Group) -> bool:
        """Whether two candidates hold a group in the same formats, whatever its codes."""
        return [_treatment(self.plan(a, n)) for n in group.linears] == [
            _treatment(self.plan(b, n)) for n in group.linears
        ]


def _treatment(plan: LayerPlan) -> tuple[object, ...]:
    return (plan.weights, plan.granularity, plan.group_size, plan.symmetric, plan.activations, plan.dynamic)


def open_run(folder: Path) -> Run:
    """The recipe, model and plan of a finished run. Raises RecipeError where `folder` holds none."""
    if not (folder / LOCK).is_file():
        raise RecipeError(f"{folder}: no {LOCK}: give the folder of a run that `quantbench calibrate` has finished")
    return load(str(folder / LOCK), Options())


def quantized_variants(run: Run, names: Sequence[str] = ()) -> dict[str, VariantPlan]:
    """The named variants of a run (none: all) that quantize linears. Raises RecipeError for an unknown name, or where
    there is none."""
    if problems := [unknown("variant", n, run.plan.variants) for n in names if n not in run.plan.variants]:
        raise RecipeError(*problems)
    found = {
        name: plan
        for name, plan in run.plan.variants.items()
        if (not names or name in names) and any(p.quantized for p in plan.layers.values())
    }
    if not found:
        raise RecipeError(f"no quantized linears in {', '.join(names or run.plan.variants)}: nothing to rank")
    return found


def saved_bytes(run: Run, variant: str, group: str) -> int:
    """Bytes that a variant saves on a group, over leaving it in the variant's float dtype."""
    plan = run.plan.variants[variant]
    mixture = Mixture(Path(), run, {variant: plan})
    found = next(g for g in mixture.groups if g.name == group)
    return mixture.float_bytes(found) - mixture.bytes_of(variant, found)


def open_mixture(folder: Path, names: Sequence[str] = (), inputs: bool = False) -> Mixture:
    """A run with its candidates: the named variants, or else its float and weight-only ones, and with `inputs` those of
    quantized inputs too (they save time, but no bytes). Raises RecipeError with all reasons why they cannot be mixed in
    one checkpoint."""
    run = open_run(folder)
    quantized_variants(run, names)
    plain = [
        v
        for v in run.plan.variants.values()
        if (inputs or v.mode.activations is None) and not v.cache.quantized and v.mode.weights != "float32"
    ]
    chosen = [run.plan.variants[n] for n in dict.fromkeys(names)] or plain
    if problems := _unmixable(chosen):
        raise RecipeError(*problems)
    return Mixture(folder, run, {v.name: v for v in chosen})


def _unmixable(variants: Sequence[VariantPlan]) -> list[str]:
    names = ", ".join(v.name for v in variants) or "none"
    quantized = [v for v in variants if v.mode.weights not in FLOAT_DTYPES]
    floats = {v.dtype for v in variants if v not in quantized}
    problems = [
        f"{v.name}: its KV cache is quantized, which is not chosen per layer. Search among variants without c8, then "
        "write the c8 mode into the recipe"
        for v in variants
        if v.cache.quantized
    ]
    if len(variants) < 2 or not quantized:
        problems.append(f"nothing to choose among: {names}. Name two variants of the run or more with --modes")
    if len({repr(v.transforms) for v in quantized}) > 1:
        problems.append(f"{names}: their transforms differ, and one checkpoint has one list. Calibrate them with one")
    if len(floats) > 1:
        problems.append(f"{', '.join(sorted(floats))}: a checkpoint has one float dtype. Name one float variant")
    return problems


def mixed_recipe(mixture: Mixture, selection: Selection, comment: str) -> str:
    """A plain recipe that makes the selection: the run's own sections, one variant, a rule per kind of group."""
    recipe = mixture.run.recipe
    words = yaml.safe_load((mixture.folder / LOCK).read_text(encoding="utf-8"))
    for section in ("lock", "gates", "output"):
        words.pop(section, None)
    rules = mixed_rules(mixture, selection)
    chosen = Counter(rule["mode"] for rule in rules if rule["mode"] != "float")
    modes = [v.mode.name for v in mixture.variants.values() if v.mode.weights not in FLOAT_DTYPES]
    mode = chosen.most_common(1)[0][0] if chosen else modes[0]
    first = next(v for v in recipe.modes if v.name in mixture.variants and MODES[v.mode].weights not in FLOAT_DTYPES)
    transforms = recipe.transforms if first.transforms is None else first.transforms
    words |= {
        "modes": [{"name": NAME, "mode": mode}],
        "transforms": [
            t.model_dump(mode="json", exclude_none=True) for t in transforms if _used(t.name, {mode, *chosen})
        ],
        "dtype": mixture.dtype,
        "rules": rules,
    }
    header = "".join(f"# {line}\n" for line in comment.splitlines())
    return header + yaml.dump(json.loads(json.dumps(words)), Dumper=Dumper, sort_keys=False)  # copies, no YAML aliases


def _used(word: str, modes: Collection[str]) -> bool:
    """Whether a transform has something to do in one of these modes; a recipe is refused where it has not."""
    needs = ORDER[word].needs
    return needs == "weights" or (needs == "inputs" and any(MODES[m].activations for m in modes))


def mixed_rules(mixture: Mixture, selection: Selection) -> list[Words]:
    """Rules that give every group what was selected: the exceptions, by kind and block, then what most blocks have."""
    words = {n: _words(mixture.run.recipe, selection.labels[g.name], n) for g in mixture.groups for n in g.linears}
    head = words.pop(HEAD)
    common = Counter(repr(words[g.linears[0]]) for g in mixture.groups if g.layer is not None).most_common(1)[0][0]
    blocks: dict[tuple[str, str], list[int]] = {}  # glob of the linears, their words -> blocks
    for group in mixture.groups:
        if group.layer is not None:
            alike = len({repr(words[n]) for n in group.linears}) == 1
            for glob, name in [(_GLOBS[group.fused], group.linears[0])] if alike else _single(group):
                blocks.setdefault((glob, repr(words[name])), []).append(group.layer)
    named = {repr(w): w for w in words.values()}
    total = mixture.run.source.config.num_layers
    rules = [{"match": HEAD, **head}] if head["mode"] != "float" else []
    for (glob, key), layers in blocks.items():
        if key != common:
            rules += [{"match": f"model.layers.{part}.{glob}", **named[key]} for part in _layer_globs(layers, total)]
    return [*rules, {"match": "model.layers.*", **named[common]}]


def _single(group: Group) -> list[tuple[str, str]]:
    return [(name.split(".", 3)[3], name) for name in group.linears]


def _words(recipe: Recipe, variant: str, linear: str) -> Words:
    """The words that decided a linear in a variant: those of the rule, over those of the variant."""
    own = next(v for v in recipe.modes if v.name == variant)
    index = first_match(recipe, own, linear)
    rule = None if index is None else recipe.rules[index]
    mode = (rule.mode if rule else None) or ("float" if linear == HEAD else own.mode)
    if mode == "float" or MODES[mode].weights in FLOAT_DTYPES:
        return {"mode": "float"}
    patches = {
        "weights": _patched(own.weights, rule.weights if rule else None),
        "activations": _patched(own.activations, rule.activations if rule else None),
        "method": _written(rule, "method") or _written(own, "method"),
    }
    return {"mode": mode} | {name: patch for name, patch in patches.items() if patch}


def _patched(*patches: Section | None) -> Words:
    """The words of several patches of one section, the later over the earlier."""
    return {k: v for p in patches if p is not None for k, v in p.model_dump(mode="json", exclude_none=True).items()}


def _written(section: Section | None, name: str) -> Any:
    """A word as it would be written in a recipe; None where it is not."""
    return None if section is None else section.model_dump(mode="json", include={name}).get(name)


def _layer_globs(layers: Sequence[int], total: int) -> list[str]:
    """Globs over block numbers: [3, 7, 12] -> "[37]", "12"; all blocks -> "*"."""
    if len(layers) == total:
        return ["*"]
    tens: dict[str, list[str]] = {}
    for layer in sorted(layers):
        tens.setdefault(str(layer)[:-1], []).append(str(layer)[-1])
    return [ten + (digits[0] if len(digits) == 1 else f"[{''.join(digits)}]") for ten, digits in tens.items()]
