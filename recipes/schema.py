"""A recipe: everything one run is asked to do. The words are explained in docs/recipes.md, generated from here."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, PrivateAttr, field_validator, model_validator

from quantbench.errors import unknown
from quantbench.recipes.sections import (
    Accuracy,
    Activations,
    ActivationsPatch,
    CacheKV,
    CacheKVPatch,
    Calibration,
    Gates,
    Parity,
    Section,
    Throughput,
    Weights,
    WeightsPatch,
)
from quantbench.recipes.source import Source
from quantbench.recipes.transforms import Method, Rtn, Transform
from quantbench.recipes.values import Off, Prefix, Rows, Shown, Words
from quantbench.vocabulary import FLOAT_DTYPES, MODES

S = TypeVar("S", bound=Section)


def _mode(value: str) -> str:
    if value not in MODES:
        raise ValueError(unknown("mode", value, MODES))
    return value


def _rule_mode(value: str) -> str:
    if value != "float":
        if value not in MODES:
            raise ValueError(unknown("mode", value, ["float", *MODES]))
        if MODES[value].quantizes_cache:
            raise ValueError(f"{value!r} also sets the KV cache, which is not per layer: write the part before c8")
    return value


Mode = Annotated[str, AfterValidator(_mode), Shown("a mode")]
RuleMode = Annotated[str, AfterValidator(_rule_mode), Shown("a mode without c8, or float")]
Dtype = Annotated[str, Words("dtype", ("auto", *FLOAT_DTYPES))]


def merged(section: S, patch: Section | None) -> S:
    """`section` with the words that `patch` writes."""
    return section if patch is None else section.model_copy(update=patch.model_dump(exclude_none=True))


class Variant(Section):
    """One column of the report: a mode, with settings of its own where it has any."""

    name: str = Field(default="", description="Unique, a safe file name. Default: the mode.")
    mode: Mode = Field(description="What is quantized, and to what.")
    weights: WeightsPatch | None = Field(default=None, description="Changes to `weights` for this variant.")
    activations: ActivationsPatch | None = Field(default=None, description="Changes to `activations` for this variant.")
    cache_kv: CacheKVPatch | None = Field(default=None, description="Changes to `cache_kv` for this variant.")
    transforms: Rows[Transform] | None = Field(default=None, description="Replaces `transforms` for this variant.")
    method: Method | None = Field(default=None, description="Replaces `method` for this variant.")
    prefix: Prefix | None = Field(default=None, description="Replaces `prefix` for this variant.")

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value, "mode": value}
        if isinstance(value, dict) and "name" not in value and isinstance(value.get("mode"), str):
            return {"name": value["mode"], **value}
        return value

    @field_validator("name")
    @classmethod
    def _file_safe(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", name):
            raise ValueError(f"{name!r} names a folder: letters, digits, '.', '_', '+' and '-' only, 64 at most")
        return name


class Rule(Section):
    """A decision about the layers whose full name matches a glob. The first rule that matches a layer wins."""

    match: str = Field(min_length=1, description='Glob over full layer names: "*.layers.11.mlp.down_proj". Required.')
    mode: RuleMode | None = Field(
        default=None,
        description="The mode of these layers; float (or any float mode) leaves them in the checkpoint's float dtype.",
    )
    weights: WeightsPatch | None = Field(default=None, description="Changes to `weights` for these layers.")
    activations: ActivationsPatch | None = Field(default=None, description="Changes to `activations` for these layers.")
    method: Method | None = Field(default=None, description="Replaces `method` for these layers.")
    variants: Rows[str] | None = Field(
        default=None, description="Only in these variants. Default: in every variant whose mode quantizes weights."
    )


class Recipe(Section):
    """What one run is asked to do."""

    model: str = Field(
        min_length=1, description="HF directory, hub name, GGUF file, checkpoint, or demo name. Required."
    )
    modes: Rows[Variant] = Field(
        default=(Variant(name="a8w8", mode="a8w8"),),
        min_length=1,
        description="What stands side by side: mode names, or mappings (see Variant).",
    )
    calibration: Calibration = Field(default=Calibration(), description="The text that ranges are recorded on.")
    weights: Weights = Field(default=Weights(), description="How weights are quantized.")
    activations: Activations = Field(default=Activations(), description="How inputs of linears are quantized.")
    cache_kv: CacheKV = Field(default=CacheKV(), description="How the KV cache is quantized.")
    transforms: Rows[Transform] = Field(
        default=(), description="Changes of the float model before quantization, in order."
    )
    method: Method = Field(
        default=Method(rtn=Rtn()), description="How codes are found under their scales: `rtn` unless it says otherwise."
    )
    prefix: Prefix = Field(
        default="off",
        description="Tokens whose float keys and values stand in front of every sequence, so that no input is giant.",
    )
    rules: Rows[Rule] = Field(default=(), description="Decisions per layer; the first match wins.")
    accuracy: Accuracy = Field(default=Accuracy(), description="What is measured.")
    throughput: Off[Throughput] = Field(default=Throughput(), description="What is timed, or off.")
    parity: Off[Parity] = Field(default=Parity(), description="Served against simulated, or off.")
    gates: Gates = Field(default=Gates(), description="Limits that decide the exit code.")
    dtype: Dtype = Field(
        default="auto", description="Storage of what stays float in quantized checkpoints; auto: the model's."
    )
    output: str = Field(
        default="runs/recipe", min_length=1, description="The run folder. Default: runs/<name of the recipe>."
    )
    _source: Source = PrivateAttr(default_factory=Source)

    @field_validator("modes")
    @classmethod
    def _unique(cls, modes: tuple[Variant, ...]) -> tuple[Variant, ...]:
        names = [m.name.lower() for m in modes]  # folders: some file systems do not tell a8w8 from A8W8
        twice = sorted({m.name for m in modes if names.count(m.name.lower()) > 1})
        if twice:
            raise ValueError(
                f"the name {', '.join(twice)} is listed more than once. "
                "Give one of them a name of its own: {name: a8w8-dynamic, mode: a8w8, activations: {dynamic: true}}"
            )
        return modes

    @property
    def source(self) -> Source:
        """Where its words were written, for later complaints."""
        return self._source

    def written_at(self, source: Source) -> Recipe:
        """This recipe, remembering where it was written."""
        self._source = source
        return self

    def variant_weights(self, variant: Variant) -> Weights:
        return merged(self.weights, variant.weights)

    def variant_activations(self, variant: Variant) -> Activations:
        return merged(self.activations, variant.activations)

    def variant_cache(self, variant: Variant) -> CacheKV:
        return merged(self.cache_kv, variant.cache_kv)

    def variant_prefix(self, variant: Variant) -> str | tuple[int, ...]:
        """The recipe's word is for variants that quantize weights; a variant's own is for any."""
        if variant.prefix is not None:
            return variant.prefix
        return "off" if MODES[variant.mode].weights in FLOAT_DTYPES else self.prefix

    def gate_limits(self) -> dict[str, dict[str, float]]:
        """Variant -> {gate: limit}. Gates without a variant's name hold for every quantized variant."""
        limits = {
            v.name: self.gates.of(v.name) if MODES[v.mode].quantized else self.gates.own(v.name) for v in self.modes
        }
        return {name: gates for name, gates in limits.items() if gates}
