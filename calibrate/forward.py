"""The forward pass that calibration asks for: run one decoder block and report what reaches its named taps.

Everything above this interface is numpy, so that another implementer (the runtime itself, one day) can replace
PaddlePaddle without any change to statistics, choices or simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from quantbench.infer.checkpoint.prefix import Prefix
from quantbench.infer.models import CACHE_TAPS, LINEARS, TAPS, ModelConfig

T = TypeVar("T")
R = TypeVar("R")
Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.int32]
TapHook = Callable[[str, Float], "Float | None"]
"""Called with a tap's name and its values f32[tokens, channels] (`k`, `v`: f32[tokens, kv_heads, head_dim]), real
tokens only. The array may share memory with the forward and is valid during the call: copy what must stay.
Returning an array of the same shape replaces the tap: that is how fake quantization is simulated."""

ALL_TAPS: tuple[str, ...] = TAPS + CACHE_TAPS
# The input of one linear alone, behind its shared tap: for linears of one fused group that are quantized differently.
LINEAR_TAPS: tuple[str, ...] = tuple(line.name for line in LINEARS)
HEAD_TAP = "lm_head"


class BlockForward(Protocol):
    """One decoder, one block in memory at a time. Hidden states are f32[S, L, D], right-padded."""

    config: ModelConfig

    def behind(self, prefix: Prefix | None) -> BlockForward:
        """The same forward on text that stands behind `prefix`: it begins at position p and attends to its K and V."""

    def embed(self, ids: Int) -> Float:
        """Hidden states f32[S, L, D] before block 0, of token ids i32[S, L]."""

    def load(self, layer: int, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        """Make block `layer` the one that `run` computes; `weights` by name within the block, as HF stores them."""

    def run(
        self, hidden: Float, lengths: Int, tap_hook: TapHook | None = None, taps: Collection[str] = ALL_TAPS
    ) -> Float:
        """Hidden states f32[S, L, D] after the loaded block. Rows at and beyond `lengths` i32[S] become zero.

        `tap_hook` is called for `taps` only, in the order attn_in, k, v, o_in, mlp_in, down_in (and, where `taps` has
        names of linears, for these linears' inputs too).
        """

    def each(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`work(item)` for every item, in order; an implementer may work on several at once (`run` allows it)."""

    def head(self, hidden: Float, tap_hook: TapHook | None = None) -> Float:
        """Logits f32[..., V] of hidden states f32[..., D] after the last block (final norm included).

        `tap_hook` sees the head's input as the tap `lm_head`.
        """
