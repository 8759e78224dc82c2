"""The words of `transforms` and `method`: what happens to a block before its weights become codes, and how they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from quantbench.errors import unknown
from quantbench.recipes.sections import Section
from quantbench.recipes.values import Rows, Shown, Words
from quantbench.vocabulary import DEFAULT_TARGETS, SMOOTH_TARGETS

Target = Annotated[str, Words("smooth target", SMOOTH_TARGETS)]


def _alpha(value: Any) -> Any:
    if isinstance(value, bool) or (value != "search" and not isinstance(value, (int, float))):
        raise ValueError(f"expected a number from 0 to 1, or search, got {value!r}")
    if value != "search" and not 0 <= value <= 1:
        raise ValueError(f"{value} is not between 0 (leave activations alone) and 1 (move all of it)")
    return value if value == "search" else float(value)


def _shares(value: Any) -> Any:
    shares = value if isinstance(value, (list, tuple)) else [value]
    bad = [s for s in shares if isinstance(s, bool) or not isinstance(s, (int, float)) or s <= 0]
    if bad or not shares:
        raise ValueError(f"expected a positive number or a list of them, such as [0.01, 0.1, 1], got {value!r}")
    return tuple(float(s) for s in shares)


def _movable(value: Any) -> Any:
    if isinstance(value, str) and value in _UNMOVABLE:
        raise ValueError(f"{value} cannot be shifted: {_UNMOVABLE[value]}. Only o_in can, through v_proj's bias")
    return value


_UNMOVABLE = {
    "attn_in": "an RMS norm has no bias that could carry the shift",
    "mlp_in": "an RMS norm has no bias that could carry the shift",
    "down_in": "a constant does not pass SwiGLU's product",
}
ShiftTarget = Annotated[str, BeforeValidator(_movable), Words("shift target", ("o_in",))]


class Shift(Section):
    """Shift (cf. Outlier Suppression+, Wei et al. 2023): the middle of an input's channels moved to zero, by biases."""

    by: Annotated[str, Words("middle", ("mean", "midrange"))] = Field(
        default="mean", description="mean of a channel, or the middle of its range."
    )
    targets: Rows[ShiftTarget] = Field(
        default=("o_in",), min_length=1, description="Inputs that are moved; only o_in has a place for it."
    )


class Smooth(Section):
    """SmoothQuant (Xiao et al. 2023, eq. 4): moves the difficulty of outlier channels into the weights."""

    alpha: Annotated[float | str, BeforeValidator(_alpha), Shown("a number from 0 to 1, or search")] = Field(
        default=0.5,
        description="0: leave activations alone; 1: move all of it; search: the best of 0, 0.1 … 0.9 for each input.",
    )
    targets: Rows[Target] = Field(
        default=DEFAULT_TARGETS, min_length=1, description="Inputs that are smoothed, where they are quantized."
    )


def _ends(least: float, most: float) -> Callable[[Any], Any]:
    """A check of [low, high] within the bounds."""

    def check(value: Any) -> Any:
        ends = list(value) if isinstance(value, (list, tuple)) else []
        numbers = [e for e in ends if isinstance(e, (int, float)) and not isinstance(e, bool)]
        if len(ends) != 2 or len(numbers) != 2 or not least <= numbers[0] <= numbers[1] <= most:
            raise ValueError(f"expected [low, high] between {least:g} and {most:g}, got {value!r}")
        return tuple(float(e) for e in numbers)

    return check


class Piecewise(Section):
    """Piecewise search (PaddleNLP: adaptive smoothing): channels of like size get an alpha and scale of their own."""

    pieces: int = Field(default=3, ge=1, le=16, description="Clusters of channels by their largest value.")
    alpha: Annotated[Rows[float], BeforeValidator(_ends(0, 1)), Shown("[low, high] within 0 and 1")] = Field(
        default=(0.2, 0.8), description="Between which alphas every piece is searched."
    )
    scale: Annotated[Rows[float], BeforeValidator(_ends(0.1, 100)), Shown("[low, high] within 0.1 and 100")] = Field(
        default=(1.0, 5.0), description="Between which multiples of SmoothQuant's factors every piece is searched."
    )
    targets: Rows[Target] = Field(
        default=DEFAULT_TARGETS, min_length=1, description="Inputs that are smoothed, where they are quantized."
    )


class Rotate(Section):
    """Rotation (QuaRot, Ashkboos et al. 2024; SpinQuant's R1 and R2): outlier channels spread over all channels."""

    seed: int = Field(default=0, ge=0, description="Of the random signs. Variants with equal words share statistics.")
    r2: bool = Field(default=True, description="Turn every head's values too, and with them the V cache.")


class Awq(Section):
    """AWQ (Lin et al. 2023): the weights that large inputs meet grow before they are rounded, the inputs shrink."""

    steps: int = Field(default=20, ge=1, le=100, description="Alphas tried: 0, 1/steps, … below 1.")
    balance: bool = Field(default=True, description="Try each alpha with the weights' own magnitudes, too.")
    targets: Rows[Target] = Field(
        default=SMOOTH_TARGETS, min_length=1, description="Inputs that are scaled, where weights behind are quantized."
    )


class Clip(Section):
    """AutoClip (AWQ's weight clipping, Lin et al. 2023): each weight range by the error of the outputs."""

    max_shrink: float = Field(default=0.5, ge=0, lt=1, description="Share of a range that may be given up.")
    steps: int = Field(default=20, ge=1, le=200, description="Ranges tried are 1, 1 - 1/steps, … of the whole.")
    hessian: Annotated[str, Words("hessian", ("full", "diagonal"))] = Field(
        default="full", description="full: inputs as correlated as they are; diagonal: as if they were not (faster)."
    )
    targets: Rows[Target] = Field(
        default=SMOOTH_TARGETS, min_length=1, description="Inputs whose linears get such ranges."
    )


class KvSmooth(Section):
    """Smoothing of keys for a quantized cache: every channel of a KV head fills the head's one range."""

    alpha: float = Field(
        default=1.0, ge=0, le=1, description="1: all channels of a head get the same range; 0: K stays as it is."
    )


class BiasCorrection(Section):
    """Bias correction (Nagel et al. 2019): the mean of what quantizing adds to an output is taken back by a bias."""

    targets: Rows[Target] | None = Field(
        default=None,
        min_length=1,
        description="Inputs whose linears are corrected. Default: all whose linears can hold a bias in this family.",
    )


class Transform(Section):
    """One change of the float model before it is quantized. Exactly one key."""

    key_kind: ClassVar[str] = "transform"
    smooth: Smooth | None = Field(default=None, description="SmoothQuant, alpha fixed or searched.")
    rotate: Rotate | None = Field(default=None, description="Another basis for the same float model. Comes first.")
    shift: Shift | None = Field(default=None, description="Middles of o_proj's input moved to zero.")
    piecewise: Piecewise | None = Field(default=None, description="Smoothing searched for clusters of channels.")
    awq: Awq | None = Field(default=None, description="AWQ's scale search, for weights.")
    kv_smooth: KvSmooth | None = Field(default=None, description="Keys smoothed for a quantized KV cache.")
    clip: Clip | None = Field(default=None, description="AutoClip: weight ranges of least output error.")
    bias_correction: BiasCorrection | None = Field(default=None, description="Mean errors taken back by biases. Last.")

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return _one_key(cls, value, "one transform per list item, for example `- {smooth: {alpha: 0.5}}`")

    @property
    def name(self) -> str:
        return _name(self)

    @property
    def targets(self) -> tuple[str, ...]:
        """The taps whose channels it scales; none for a rotation."""
        return tuple(getattr(getattr(self, self.name), "targets", None) or ())


class Rtn(Section):
    """Round to nearest. It has no settings."""


class Gptq(Section):
    """GPTQ (Frantar et al. 2022): columns one at a time, the error of each moved onto those not yet rounded."""

    act_order: bool = Field(default=True, description="Columns of large inputs first.")
    damping: Annotated[Rows[float], BeforeValidator(_shares), Shown("a number, or a list to try in order")] = Field(
        default=(0.01, 0.1, 1.0),
        description="Share of the Hessian's mean diagonal that is added to it; the next where it stays singular.",
    )
    sweeps: int = Field(default=0, ge=0, le=20, description="How often every column is then decided again.")


class Method(Section):
    """How weights become codes under their scales: a plain word, or one key with settings."""

    key_kind: ClassVar[str] = "method"
    rtn: Rtn | None = Field(default=None, description="Round to nearest; needs no data.")
    gptq: Gptq | None = Field(default=None, description="Least error of the layer's output; needs Hessians.")

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return _one_key(cls, value, "one method, for example `rtn` or `{gptq: {act_order: true}}`")

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> Any:
        """A method with nothing to set is its word."""
        return {k: v for k, v in handler(self).items() if v is not None} if self.options else self.name

    @property
    def name(self) -> str:
        return _name(self)

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """The settings as LayerPlan holds them."""
        return tuple(getattr(self, self.name).model_dump().items())


def _name(section: Section) -> str:
    """The one key that is written."""
    return next(name for name in type(section).model_fields if getattr(section, name) is not None)


def _one_key(section: type[Section], value: Any, wanted: str) -> Any:
    """A word for a key with its defaults; a mapping with exactly one key. Raises ValueError."""
    if isinstance(value, str):
        if value not in section.model_fields:
            raise ValueError(unknown(section.key_kind, value, section.model_fields))
        return {value: {}}
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(wanted)
    return {k: {} if v is None else v for k, v in value.items()}
