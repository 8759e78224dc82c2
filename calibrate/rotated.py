"""The float model that a variant is made from: the source itself, or the source behind a rotation.

A rotated model is another set of weights for the same function (quantizers/rotation.py): norms of ones, a head of its
own. Everything behind it (hidden states, statistics, Hessians, scales, the checkpoint) is made as for any other model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from quantbench.calibrate.forward import Float
from quantbench.errors import RecipeError
from quantbench.infer.checkpoint.shard import Array
from quantbench.infer.checkpoint.source import EMBEDDING, LinearWeight, ModelSource
from quantbench.infer.models import ModelConfig, model_tensors
from quantbench.quantizers.finite import require_finite
from quantbench.quantizers.rotation import Rotation, rotate_block, rotate_rows, rotation
from quantbench.scales.table import Entry, ScaleTable
from quantbench.vocabulary import VariantPlan

NORM, HEAD = "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Turn:
    """The recipe's word `rotate`. Variants with equal turns are made from one model. r2: values within heads too."""

    seed: int = 0
    r2: bool = True

    @classmethod
    def of(cls, variant: VariantPlan) -> Turn | None:
        """The turn that a variant's transforms ask for, or None."""
        found = [t["rotate"] or {} for t in variant.transforms if "rotate" in t]
        return cls(**found[0]) if found else None

    def residual(self, config: ModelConfig) -> Rotation:
        """R1, of the residual stream. Raises RecipeError where no matrix of that order is known."""
        return rotation(config.hidden_size, self.seed)

    def values(self, config: ModelConfig) -> Rotation | None:
        """R2, of every head's values; None where it is not asked for. Raises as `residual` does."""
        return rotation(config.head_dim, self.seed + 1) if self.r2 else None


@dataclass
class RotatedSource(ModelSource):
    """`plain` behind a turn, float32. Its head is never tied: the final norm is folded into it."""

    plain: ModelSource = field(kw_only=True)
    turn: Turn = field(kw_only=True)
    _last: tuple[int, dict[str, Float]] = field(default=(-1, {}), init=False, repr=False)  # one block, as it was turned

    def names(self) -> list[str]:
        return list(model_tensors(self.config))

    def read(self, name: str) -> Array:
        return self.float_tensor(name)

    def float_tensor(self, name: str) -> Float:
        if name == NORM:
            return np.ones(self.config.hidden_size, np.float32)
        if name in (EMBEDDING, HEAD):
            rows = self.plain.float_tensor(name)
            require_finite(rows, name)
            return rotate_rows(rows, self.residual.matrix, self.plain.float_tensor(NORM) if name == HEAD else None)
        _, _, layer, within = name.split(".", 3)
        return self.float_block(int(layer))[within]

    def float_block(self, layer: int) -> dict[str, Float]:
        if self._last[0] != layer:
            self._last = (-1, {})  # never two blocks
            values = self.values.matrix if self.values else None
            self._last = (layer, rotate_block(self.plain.float_block(layer), self.residual.matrix, values))
        return dict(self._last[1])

    def linear(self, name: str) -> LinearWeight:
        return LinearWeight(name, self.float_tensor(f"{name}.weight"), self._bias(name))

    def sha256(self) -> str:
        """Of the plain model: the plan says how it is turned."""
        return self.plain.sha256()

    @cached_property
    def residual(self) -> Rotation:
        return self.turn.residual(self.config)

    @cached_property
    def values(self) -> Rotation | None:
        return self.turn.values(self.config)


def model_of(source: ModelSource, variant: VariantPlan) -> ModelSource:
    """The float model of a variant: `source`, or a RotatedSource over it."""
    turn = Turn.of(variant)
    if turn is None:
        return source
    untied = replace(source.config, tie_word_embeddings=False)
    return RotatedSource(
        source.name, source.path, untied, source.hf_config, source.store, source.load_tokenizer, plain=source, turn=turn
    )


def first_hidden(model: ModelSource, embedded: Float) -> Float:
    """Hidden states f32[S, L, D] before block 0 of `model`, from those of the model as it is stored."""
    if not isinstance(model, RotatedSource):
        return embedded
    turned = rotate_rows(embedded.reshape(-1, embedded.shape[-1]), model.residual.matrix)
    return turned.reshape(embedded.shape)


def rotation_table(model: ModelSource) -> ScaleTable:
    """One entry that tells of the rotation; empty for a model that is not turned.

    Its scale, [1], is the largest |entry| of R1: what any channel keeps of one of the old ones at most.
    """
    table = ScaleTable()
    if isinstance(model, RotatedSource):
        largest = np.abs(model.residual.matrix).max(keepdims=True).reshape(1).astype(np.float32)
        heads = f", every head's values by {model.values.construction}" if model.values else ""
        table.add(
            Entry(
                name="model.rotate",
                kind="transform",
                format="float32",
                granularity="tensor",
                scale=largest,
                zero=None,
                absmax=largest,
                group_size=None,
                observer="rotate",
                reason=f"residual stream turned by {model.residual.construction}{heads}, seed {model.turn.seed}",
                loss=None,
            )
        )
    return table


def require_rotatable(config: ModelConfig, variants: Iterable[VariantPlan]) -> None:
    """Raises RecipeError for every variant that asks for a matrix that does not exist in this model's sizes."""
    problems = dict.fromkeys(p for v in variants for p in _unknown_orders(config, v))
    if problems:
        raise RecipeError(*problems)


def _unknown_orders(config: ModelConfig, variant: VariantPlan) -> Iterator[str]:
    turn = Turn.of(variant)
    makers = {} if turn is None else {"hidden_size": turn.residual, "head_dim": turn.values}
    for size, make in makers.items():
        try:
            make(config)
        except RecipeError as error:
            hint = "; or keep R1 alone, with rotate: {r2: false}" if size == "head_dim" else ""
            yield from (f"{variant.name}: {size} {getattr(config, size)}: {p}{hint}" for p in error.problems)
