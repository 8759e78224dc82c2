"""The sections of a recipe: what to calibrate on, how to quantize, what to measure, what must hold.

A `…Patch` is the same section with every field optional: a variant or a rule changes only the words it writes.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from quantbench.recipes.values import Auto, Bytes, Fraction, Observer, Off, Rows, Shown, Words
from quantbench.vocabulary import GRANULARITIES, GROUP_SIZES, WEIGHT_OBSERVERS

_ALL_GRANULARITIES = tuple(dict.fromkeys(g for words in GRANULARITIES.values() for g in words))
Granularity = Annotated[str, Words("granularity", ("auto", *_ALL_GRANULARITIES))]
WeightObserver = Annotated[str, Words("weight observer", WEIGHT_OBSERVERS)]
CacheGranularity = Annotated[str, Words("granularity", ("head",))]


def _group_size(value: Any) -> Any:
    if isinstance(value, int) and value not in GROUP_SIZES:
        raise ValueError(f"{value} is not a group size. Allowed: {', '.join(map(str, GROUP_SIZES))}")
    return value


GroupSize = Annotated[int, BeforeValidator(_group_size), Shown(", ".join(map(str, GROUP_SIZES)))]


class Section(BaseModel):
    """Base: unknown keys are refused, values are never changed after loading, "64" is not a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    key_kind: ClassVar[str] = "key"  # what an unknown key is called in a message


class Calibration(Section):
    """The text that is run through the float model while ranges are recorded."""

    data: str = Field(
        default="demo:wikipedia",
        description="Text to calibrate on: a demo text, a .txt, .jsonl, .json or .parquet file, or a hub data set.",
    )
    samples: int = Field(default=64, ge=1, description="Number of sequences.")
    length: int = Field(default=256, ge=2, description="Tokens per sequence.")
    seed: int = Field(default=0, ge=0, description="Seed of the choice and order of the sequences.")
    batch: int = Field(
        default=8, ge=1, description="Sequences per forward pass; `avg` and `ema` average over these batches."
    )
    packing: bool = Field(
        default=True,
        description="Join documents and cut them to `length`; false: one document each, padding is not counted.",
    )
    chat_template: Annotated[str, Words("chat_template", ("auto", "on", "off"))] = Field(
        default="auto",
        description="Apply the tokenizer's chat template; auto: where the data are question and answer pairs.",
    )
    text_field: str = Field(
        default="text", description="Field of .jsonl, .json, .parquet or hub rows that holds the text."
    )
    split: str = Field(default="train", description="Split of a hub data set.")
    inputs: Annotated[str, Words("inputs", ("float", "quantized"))] = Field(
        default="float",
        description="What a block is shown: the float model's hidden states, or those of the quantized blocks.",
    )
    spill_above: Bytes = Field(default=2**30, ge=0, description="Hidden states larger than this go to disk.")


class Weights(Section):
    """How the weights of the linears are quantized."""

    granularity: Granularity = Field(
        default="auto", description="What shares one scale; auto: channel for int8, group for int4, tensor for fp8."
    )
    group_size: GroupSize = Field(default=64, description="Input channels per scale where the granularity is group.")
    symmetric: bool = Field(default=True, description="No zero points. Only int4 can be asymmetric.")
    observer: WeightObserver = Field(default="absmax", description="How the range of a weight is chosen.")


class WeightsPatch(Section):
    """Changes to `weights`; what is not written is inherited."""

    granularity: Granularity | None = Field(default=None, description="As weights.granularity.")
    group_size: GroupSize | None = Field(default=None, description="As weights.group_size.")
    symmetric: bool | None = Field(default=None, description="As weights.symmetric.")
    observer: WeightObserver | None = Field(default=None, description="As weights.observer.")


class Activations(Section):
    """How the inputs of the linears are quantized, where the mode quantizes them."""

    dynamic: bool = Field(
        default=False,
        description="true: one scale per token, found at run time; false: one calibrated scale per tensor.",
    )
    observer: Observer = Field(default="absmax", description="How the range of a static scale is chosen.")


class ActivationsPatch(Section):
    """Changes to `activations`; what is not written is inherited."""

    dynamic: bool | None = Field(default=None, description="As activations.dynamic.")
    observer: Observer | None = Field(default=None, description="As activations.observer.")


class CacheKV(Section):
    """How the KV cache is quantized, where the mode ends in c8 or c8_fp8 (_dynamic leaves nothing to choose)."""

    granularity: CacheGranularity = Field(
        default="head", description="One static scale per KV head, for keys and for values."
    )
    observer: Observer = Field(default="absmax", description="How the range of a head is chosen.")


class CacheKVPatch(Section):
    """Changes to `cache_kv`; what is not written is inherited."""

    granularity: CacheGranularity | None = Field(default=None, description="As cache_kv.granularity.")
    observer: Observer | None = Field(default=None, description="As cache_kv.observer.")


class Perplexity(Section):
    """One text whose perplexity is measured."""

    data: str = Field(
        default="demo:wikipedia-heldout", description="As calibration.data; never the calibration text itself."
    )
    tokens: int = Field(
        default=4088, ge=2, description="Predictions made; a window of `context` tokens makes one less."
    )
    context: int = Field(default=512, ge=2, description="Tokens per window; every window starts afresh.")


class Divergence(Section):
    """Mean KL divergence and top-1 agreement against the float model."""

    data: str = Field(default="demo:wikipedia-heldout", description="Default: the first perplexity text.")
    tokens: int = Field(default=4088, ge=2, description="Tokens compared.")
    context: int = Field(
        default=512, ge=2, description="Tokens per window. Default: that of the first perplexity text."
    )


class Choices(Section):
    """Multiple-choice questions, answered by log-likelihood."""

    data: str = Field(description='A .jsonl file of {"question", "choices", "answer"}. Required.')
    limit: Annotated[Auto[int], Shown("a whole number or auto (all)")] = Field(
        default=None, ge=1, description="Number of questions asked; auto: all of them."
    )


class Accuracy(Section):
    """What is measured of every variant, on the exported checkpoint, by the runtime."""

    baseline: Annotated[str, Words("baseline", ("fp32", "bf16", "fp16"))] = Field(
        default="fp32", description="The float mode that every variant is compared with."
    )
    perplexity: Rows[Perplexity] = Field(default=(Perplexity(),), description="Texts whose perplexity is measured.")
    divergence: Off[Divergence] = Field(default=Divergence(), description="KL divergence and top-1 agreement, or off.")
    choices: Rows[Choices] = Field(default=(), description="Multiple-choice questions.")

    @model_validator(mode="before")
    @classmethod
    def _same_text(cls, value: Any) -> Any:
        """The divergence is measured on the first perplexity text unless the recipe says otherwise."""
        texts = value.get("perplexity") if isinstance(value, dict) else None
        asked = value.get("divergence", {}) if isinstance(value, dict) else None
        if not isinstance(asked, dict) or not isinstance(texts, list) or not texts or not isinstance(texts[0], dict):
            return value
        inherited = {k: texts[0][k] for k in ("data", "context") if k in texts[0]}
        return value | {"divergence": inherited | asked}


class Throughput(Section):
    """What is timed of every variant."""

    batches: Rows[Annotated[int, Field(ge=1)]] = Field(
        default=(1, 8), min_length=1, description="Sequences decoded at once."
    )
    prompt: int = Field(default=128, ge=1, description="Prompt tokens per sequence.")
    output: int = Field(default=64, ge=1, description="Tokens generated per sequence.")
    rounds: int = Field(default=3, ge=1, description="Repetitions; the median, least and greatest are reported.")
    threads: Annotated[Auto[int], Shown("a whole number or auto")] = Field(
        default=None, ge=1, description="Threads of the runtime; auto: the physical cores."
    )


class Parity(Section):
    """Served against simulated: the same tokens through the runtime and through Paddle with fake quantization."""

    tokens: int = Field(default=512, ge=2, description="Tokens compared.")


class GateSet(Section):
    """Limits; `quantbench calibrate` exits 1 where one is not met. Percentages or plain numbers."""

    key_kind: ClassVar[str] = "gate"
    perplexity_increase: Fraction | None = Field(
        default=None, description="At most this relative increase (5% = 0.05)."
    )
    kl: Fraction | None = Field(default=None, ge=0, description="At most this mean KL divergence, in nats.")
    top1_agreement: Fraction | None = Field(default=None, ge=0, le=1, description="At least this top-1 agreement.")
    choices_drop: Fraction | None = Field(default=None, description="At most this loss of accuracy on the choices.")
    decode_speedup: Fraction | None = Field(
        default=None, ge=0, description="At least this decode speed over the baseline."
    )
    prefill_speedup: Fraction | None = Field(
        default=None, ge=0, description="At least this prefill speed over the baseline."
    )
    checkpoint_ratio: Fraction | None = Field(
        default=None, ge=0, description="At most this size over the float checkpoint."
    )
    parity_top1: Fraction | None = Field(
        default=None, ge=0, le=1, description="At least this served/simulated agreement."
    )
    parity_kl: Fraction | None = Field(default=None, ge=0, description="At most this served/simulated KL divergence.")

    def limits(self) -> dict[str, float]:
        """Gate -> limit, only those that are set."""
        return {k: v for k in GateSet.model_fields if (v := getattr(self, k)) is not None}


class Gates(GateSet):
    """Limits for every quantized variant, and for some by name; exit code 1 where one is not met."""

    variants: dict[str, GateSet] = Field(
        default={},
        description="Variant name -> its own gates, which win. May be written directly: `gates: {a8w8: {kl: 0.1}}`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        named = {k: v for k, v in value.items() if isinstance(v, dict) and k not in cls.model_fields}
        if not named or not isinstance(value.get("variants", {}), dict):
            return value
        rest = {k: v for k, v in value.items() if k not in named}
        return rest | {"variants": {**value.get("variants", {}), **named}}

    def own(self, variant: str) -> dict[str, float]:
        """The limits written under a variant's name."""
        return self.variants[variant].limits() if variant in self.variants else {}

    def of(self, variant: str) -> dict[str, float]:
        """The limits that hold for one variant."""
        return self.limits() | self.own(variant)
