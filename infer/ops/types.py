"""What the operations of a decoder take and return. One table of operations, one column per backend.

A backend is an object that satisfies `Ops`. The engine is written against this file only, so baseline and quantized
runs, reference and native kernels, all share every line above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

PAGE = 64  # tokens per page of the KV cache


@dataclass
class Activation:
    """The input of a linear: floats, codes, or both. `scale` is f32[1] (static) or f32[T] (one per token)."""

    values: Floats | None = None  # [T, K]
    codes: Array | None = None  # int8 or e4m3 [T, K]
    scale: Floats | None = None
    format: str | None = None  # "int8" | "fp8_e4m3" where codes are set

    @property
    def tokens(self) -> int:
        array = self.values if self.codes is None else self.codes
        return 0 if array is None else int(array.shape[0])


@dataclass(frozen=True)
class ActSpec:
    """How an activation leaves the operation that makes it. `format` None: it stays float."""

    format: str | None = None  # "int8" | "fp8_e4m3"
    scale: float | None = None  # None with a format: dynamic, one scale per token
    keep_float: bool = False  # True: the floats are handed on beside the codes


FLOAT = ActSpec()


@dataclass
class Batch:
    """The tokens of one step, of S sequences one after the other."""

    ids: Ints  # [T]
    positions: Ints  # [T]
    slots: npt.NDArray[np.int64]  # [T] where each token's K and V go: page * 64 + offset in the page
    starts: Ints  # [S + 1] first row of each sequence
    context: Ints  # [S] tokens in the cache, those of this step included
    tables: Ints  # [S, P] page numbers of each sequence, in order


@dataclass
class LayerCache:
    """The paged K and V of one layer: [pages, kv_heads, 64, head_dim] in f32 | bf16 | f16 | int8 | e4m3.

    Scales of codes are static, [kv_heads], or dynamic, [pages, kv_heads, 64]: one per token and head, which
    `rope_write` finds and stores. A float cache has static ones.
    """

    k: Array
    v: Array
    k_scale: Floats
    v_scale: Floats

    @property
    def dynamic(self) -> bool:
        return self.k_scale.ndim == 3

    @property
    def arrays(self) -> list[Array]:
        """Everything that is kept per page, pages first."""
        return [self.k, self.v, self.k_scale, self.v_scale] if self.dynamic else [self.k, self.v]


@dataclass(frozen=True)
class Packed:
    """What a backend made of one linear, or of several whose rows are concatenated. Opaque to the engine."""

    names: tuple[str, ...]
    shape: tuple[int, int]  # [N, K]
    nbytes: int  # bytes held: codes, scales, bias

    @property
    def bf16_operations(self) -> float:
        """Of one token: those that the backend does on bf16 at its rate for bf16, where that differs from float32's."""
        return 0.0

    @property
    def digit_operations(self) -> float:
        """Of one token: those of float inputs that are multiplied as three int8 digits, three int8 operations each."""
        return 0.0


class LinearWeightLike(Protocol):
    """Structure of infer.checkpoint.source.LinearWeight, which operations only read."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> Any: ...  # f32 | bf16 | f16 array [N, K], or a quantized weight
    @property
    def bias(self) -> Array | None: ...
    @property
    def activations(self) -> str | None: ...
    @property
    def input_scale(self) -> float | None: ...


Weights = LinearWeightLike | Sequence[LinearWeightLike]


class Ops(Protocol):
    """The operations of a pre-norm decoder. Arrays are C-contiguous; T = rows of the step."""

    name: str

    def set_threads(self, threads: int | None) -> int:
        """Threads of native operations, None for one per processor; the number in use. numpy decides its own."""
        ...

    def pack(self, weight: Weights) -> Packed:
        """Prepare weights once, at load. A list is a fused group: rows are concatenated in order."""
        ...

    def embed(self, table: Packed, ids: Ints) -> Floats:
        """Rows `ids` of a float table, as f32[T, D]."""
        ...

    def add_norm(
        self, x: Floats, delta: Floats | None, weight: Floats, eps: float, spec: ActSpec = FLOAT
    ) -> Activation:
        """x += delta in place; RMS norm (Zhang & Sennrich 2019) of x times weight; quantize as `spec` says."""
        ...

    def linear(self, a: Activation, w: Packed) -> Floats:
        """a @ w.T + bias as f32[T, N]. int8 codes times int8 weights accumulate exactly in int32."""
        ...

    def quantize(self, x: Floats, spec: ActSpec) -> Activation:
        """x as `spec` says: codes = clip(round_half_even(x / scale)), the division in float32."""
        ...

    def silu_mul(self, gate_up: Floats, spec: ActSpec = FLOAT) -> Activation:
        """SwiGLU (Shazeer 2020): silu(first half) * second half of f32[T, 2I], quantized as `spec` says."""
        ...

    def rope_write(
        self,
        qkv: Floats,
        batch: Batch,
        rope: tuple[Floats, Floats],
        norms: tuple[Floats, Floats] | None,
        eps: float,
        cache: LayerCache,
    ) -> Floats:
        """Per-head RMS norm of q and k (where `norms`), RoPE (Su et al. 2021, halves as in HF), K and V into pages.

        qkv f32[T, (H + 2 KV) d]; rope = cos, sin of f32[positions, d/2]. Returns the rotated q, f32[T, H d].
        """
        ...

    def attention(self, q: Floats, batch: Batch, cache: LayerCache, window: int | None = None) -> Floats:
        """Causal softmax attention over the pages, as stored. A token sees itself and `window - 1` tokens before it."""
        ...
