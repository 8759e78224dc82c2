"""`BlockForward` in PaddlePaddle, float32, on whatever device Paddle has.

Padding costs nothing and is never seen: linears and norms work on the real tokens only, laid out as [tokens, D];
attention alone needs the [S, L] frame. Right padding with a causal mask needs no padding mask, because no real token
attends to a later one. Arrays go in by copy (Paddle's own buffers are aligned, so the same input gives the same
bits) and come out without one where Paddle's device is the CPU. There the linears' products are those of the runtime's
own float32 kernel where it is built: Paddle's MKL is slower on AMD (docs/measuring.md).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from quantbench.calibrate.forward import ALL_TAPS, HEAD_TAP, Float, Int, TapHook
from quantbench.calibrate.observe import native_ops
from quantbench.calibrate.paddle_device import default_threads, each, import_paddle, select_device
from quantbench.errors import CalibrationError
from quantbench.infer.checkpoint.prefix import Prefix
from quantbench.infer.checkpoint.source import LinearWeight, ModelSource
from quantbench.infer.models import ModelConfig, block_prefix, block_tensors
from quantbench.infer.ops.types import Packed

Tensor = Any  # a paddle.Tensor; never leaves this file
T = TypeVar("T")
R = TypeVar("R")
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
QUERY_CHUNK = 128  # queries per attention step: bounds the scores and skips keys that come after the chunk
HEAD_ROWS = 128  # tokens whose logits are computed at once


@dataclass(frozen=True)
class _Taps:
    """Who wants to see which taps of one call. It travels with the call, because several may run at once."""

    hook: TapHook | None
    wanted: Collection[str]


@dataclass(frozen=True)
class _Frame:
    """Where the real tokens are. `rows` i64[T] indexes them in the flat [S*L] frame; None = all of them are real."""

    samples: int
    length: int
    positions: npt.NDArray[np.int64]  # [T]
    rows: Tensor | None


class PaddleForward:
    """One model's blocks, one at a time. `read(name)` gives the embedding, the final norm and `lm_head.weight` (also
    where it is tied to the embedding) as float arrays; `of(source)` makes it of an opened model.

    Raises DependencyError without Paddle, CalibrationError for a device Paddle does not know.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: Callable[[str], npt.NDArray[Any]],
        *,
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.config = config
        self._read = read
        self._paddle = import_paddle()
        if device is not None:
            select_device(self._paddle, device)
        # A GPU works on one batch at a time; a CPU on one per core.
        self._threads = (threads or default_threads()) if str(self._paddle.get_device()) == "cpu" else 1
        self._ops = native_ops() if str(self._paddle.get_device()) == "cpu" else None
        self._side_by_side = False
        self._layer = -1
        self._weights: dict[str, Tensor] = {}
        self._packed: dict[str, Packed] = {}  # the linears' weights, where the runtime's kernel multiplies
        self._outer: dict[str, Tensor] = {}  # final norm and head, while `head` is in use
        self._prefix: Prefix | None = None
        self._before = 0  # positions that the prefix takes

    @classmethod
    def of(cls, source: ModelSource, *, device: str | None = None, threads: int | None = None) -> PaddleForward:
        def read(name: str) -> npt.NDArray[Any]:
            return source.read(name) if name == EMBEDDING else source.float_tensor(name)

        return cls(source.config, read, device=device, threads=threads)

    def behind(self, prefix: Prefix | None) -> PaddleForward:
        """What this forward had loaded is let go: never two blocks in memory."""
        self._weights, self._packed, self._outer = {}, {}, {}
        other = copy(self)
        other._prefix, other._before = prefix, len(prefix) if prefix else 0
        return other

    def embed(self, ids: Int) -> Float:
        return np.asarray(self._read(EMBEDDING)[ids], np.float32)

    def load(self, layer: int, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        missing = sorted(set(block_tensors(self.config)) - set(weights))
        if missing:
            raise CalibrationError(
                *(f"{block_prefix(layer)}.{name}: needed by the forward, not given" for name in missing)
            )
        self._outer = {}
        self._weights, self._packed = {}, {}  # before the next block is read: one block in memory
        self._layer = layer
        for name, array in weights.items():
            if self._ops is not None and array.ndim == 2:
                linear = LinearWeight(name, np.ascontiguousarray(array, np.float32), None)
                self._packed[name] = self._ops.pack(linear)
            else:
                self._weights[name] = self._tensor(array)

    def run(
        self, hidden: Float, lengths: Int, tap_hook: TapHook | None = None, taps: Collection[str] = ALL_TAPS
    ) -> Float:
        seen = _Taps(tap_hook, taps)
        self._paddle.base.core.set_num_threads(1 if self._side_by_side else self._threads)
        with self._paddle.no_grad():
            frame = self._frame(hidden, lengths)
            x = self._flat(self._tensor(hidden).reshape([-1, hidden.shape[-1]]), frame)
            x = x + self._attention_part(x, frame, seen)
            x = x + self._mlp_part(x, seen)
            return self._array(self._framed(x, frame)).reshape(hidden.shape)

    def each(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`work(item)` for every item, one on each core, in order.

        Meanwhile a matrix product has one thread: its last bits depend on how many share it, and calibration must give
        the same bytes whatever the number of cores. Element-wise operators never use more than one anyway.
        """
        self._paddle.base.core.set_num_threads(1)
        self._side_by_side = True
        try:
            yield from each(self._threads, work, items)
        finally:
            self._side_by_side = False

    def head(self, hidden: Float, tap_hook: TapHook | None = None) -> Float:
        if not self._outer:
            self._weights, self._packed = {}, {}  # the head is often larger than a block: never both
            self._outer = {name: self._tensor(self._read(name)) for name in (NORM, HEAD)}
        with self._paddle.no_grad():
            x = self._rms(self._tensor(hidden).reshape([-1, hidden.shape[-1]]), self._outer[NORM])
            x = self._tap(HEAD_TAP, x, _Taps(tap_hook, (HEAD_TAP,)))
        logits = np.empty((x.shape[0], self._outer[HEAD].shape[0]), np.float32)

        def project(start: int) -> None:
            with self._paddle.no_grad():
                rows = self._paddle.matmul(x[start : start + HEAD_ROWS], self._outer[HEAD], transpose_y=True)
                logits[start : start + HEAD_ROWS] = self._array(rows)

        for _ in self.each(project, range(0, len(logits), HEAD_ROWS)):
            pass
        return logits.reshape(*hidden.shape[:-1], -1)

    # Between numpy and Paddle

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return self._paddle.to_tensor(np.ascontiguousarray(array, np.float32))

    def _array(self, x: Tensor) -> Float:
        return np.asarray(np.from_dlpack(x) if x.place.is_cpu_place() else x.numpy(), np.float32)

    def _frame(self, hidden: Float, lengths: Int) -> _Frame:
        samples, length = hidden.shape[:2]
        real = np.arange(length)[None, :] < np.asarray(lengths)[:, None]
        rows = None if real.all() else self._paddle.to_tensor(np.flatnonzero(real))
        return _Frame(samples, length, np.nonzero(real)[1], rows)

    def _flat(self, x: Tensor, frame: _Frame) -> Tensor:
        return x if frame.rows is None else self._paddle.gather(x, frame.rows)

    def _framed(self, x: Tensor, frame: _Frame) -> Tensor:
        """[T, C] -> [S*L, C], padded rows zero."""
        if frame.rows is None:
            return x
        empty = self._paddle.zeros([frame.samples * frame.length, x.shape[-1]], dtype=x.dtype)
        return self._paddle.scatter(empty, frame.rows, x)

    def _tap(self, name: str, x: Tensor, seen: _Taps) -> Tensor:
        if seen.hook is None or name not in seen.wanted:
            return x
        replaced = seen.hook(name, self._array(x))
        return x if replaced is None else self._tensor(replaced)

    # The block

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * self._paddle.rsqrt((x * x).mean(-1, keepdim=True) + self.config.norm_eps) * weight

    def _linear(self, x: Tensor, name: str, seen: _Taps) -> Tensor:
        x = self._tap(name, x, seen)
        y = self._product(x, f"{name}.weight")
        bias = self._weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _product(self, x: Tensor, name: str) -> Tensor:
        """x [T, K] times the transposed weight [N, K]."""
        if self._ops is None:
            return self._paddle.matmul(x, self._weights[name], transpose_y=True)
        packed = self._packed[name]
        y = self._paddle.empty([x.shape[0], packed.shape[0]], dtype="float32")
        self._ops.multiply(self._array(x), packed, self._array(y))
        return y

    def _attention_part(self, x: Tensor, frame: _Frame, seen: _Taps) -> Tensor:
        c = self.config
        x = self._tap("attn_in", self._rms(x, self._weights["input_layernorm.weight"]), seen)
        q = self._linear(x, "self_attn.q_proj", seen).reshape([-1, c.num_heads, c.head_dim])
        k = self._linear(x, "self_attn.k_proj", seen).reshape([-1, c.num_kv_heads, c.head_dim])
        v = self._linear(x, "self_attn.v_proj", seen).reshape([-1, c.num_kv_heads, c.head_dim])
        if c.qk_norm:
            q = self._rms(q, self._weights["self_attn.q_norm.weight"])
            k = self._rms(k, self._weights["self_attn.k_norm.weight"])
        cos, sin = self._rotation(frame)
        q = _rotate(self._paddle, q, cos, sin)
        k = self._tap("k", _rotate(self._paddle, k, cos[:, : c.num_kv_heads], sin[:, : c.num_kv_heads]), seen)
        o = self._attention(q, k, self._tap("v", v, seen), frame)
        return self._linear(self._tap("o_in", o, seen), "self_attn.o_proj", seen)

    def _mlp_part(self, x: Tensor, seen: _Taps) -> Tensor:
        x = self._tap("mlp_in", self._rms(x, self._weights["post_attention_layernorm.weight"]), seen)
        return self._linear(self._tap("down_in", self._gated(x, seen), seen), "mlp.down_proj", seen)

    def _gated(self, x: Tensor, seen: _Taps) -> Tensor:
        """silu(gate) * up. Its own function, so that both are let go before the widest tap is seen."""
        gate, up = self._linear(x, "mlp.gate_proj", seen), self._linear(x, "mlp.up_proj", seen)
        return self._paddle.nn.functional.swiglu(gate, up)

    def _rotation(self, frame: _Frame) -> tuple[Tensor, Tensor]:
        """cos and sin f32[T, H, head_dim/2] of each real token's position, repeated for every head: Paddle multiplies
        by a middle axis of one seven times slower than by a whole array.
        """
        length = self._before + frame.length
        inverse = self.config.rope.inverse_frequencies(self.config.head_dim, length)
        angles = np.arange(self._before, length, dtype=np.float32)[:, None] * inverse
        shape = (len(frame.positions), self.config.num_heads, angles.shape[1])
        cos, sin = (f(angles)[frame.positions][:, None, :] for f in (np.cos, np.sin))
        return self._tensor(np.broadcast_to(cos, shape)), self._tensor(np.broadcast_to(sin, shape))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, frame: _Frame) -> Tensor:
        """Causal grouped-query attention of [T, heads, d]; -> [T, H*d]."""
        c = self.config
        groups = c.num_heads // c.num_kv_heads
        q, k, v = (self._framed(x.reshape([x.shape[0], -1]), frame) for x in (q, k, v))
        q = (
            (q * c.head_dim**-0.5)
            .reshape([frame.samples, frame.length, c.num_kv_heads, groups, c.head_dim])
            .transpose([0, 2, 3, 1, 4])
        )
        k, v = (
            x.reshape([frame.samples, frame.length, c.num_kv_heads, c.head_dim]).transpose([0, 2, 1, 3]) for x in (k, v)
        )
        if self._prefix is not None:
            k, v = self._behind_prefix(k, self._prefix.k), self._behind_prefix(v, self._prefix.v)
        steps = [
            self._attention_step(q[:, :, :, start : start + QUERY_CHUNK], k, v, self._before + start)
            for start in range(0, frame.length, QUERY_CHUNK)
        ]
        o = steps[0] if len(steps) == 1 else self._paddle.concat(steps, axis=3)
        o = o.transpose([0, 3, 1, 2, 4]).reshape([frame.samples * frame.length, -1])
        return self._flat(o, frame)

    def _behind_prefix(self, heads: Tensor, prefix: Float) -> Tensor:
        """[S, KV, L, d] with the layer's keys or values of the prefix in front: [S, KV, p + L, d]."""
        first = self._tensor(prefix[self._layer][None])
        return self._paddle.concat([first.expand([heads.shape[0], -1, -1, -1]), heads], axis=2)

    def _attention_step(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        """Attention of the queries [S, KV, G, n, d] at positions start .. start+n to all keys they may see."""
        samples, heads, groups, n, d = q.shape
        window = self.config.window_of(self._layer)
        first = 0 if window is None else max(0, start - window + 1)
        k, v = k[:, :, first : start + n], v[:, :, first : start + n]
        scores = self._paddle.matmul(q.reshape([samples, heads, groups * n, d]), k, transpose_y=True)
        scores.reshape_([samples, heads, groups, n, -1])
        scores.add_(self._tensor(_mask(start, n, first, window)))  # in place: fresh pages cost as much as the sums
        self._paddle.nn.functional.softmax_(scores)
        o = self._paddle.matmul(scores.reshape_([samples, heads, groups * n, -1]), v)
        return o.reshape_([samples, heads, groups, n, d])


def _mask(start: int, n: int, first: int, window: int | None) -> Float:
    """f32[n, keys]: 0 where query start+i may see key first+j, else -inf. A window of w sees itself and w-1 before."""
    distance = np.arange(start, start + n)[:, None] - np.arange(first, start + n)[None, :]
    seen = (distance >= 0) & (distance < window if window is not None else True)
    return np.where(seen, 0.0, -np.inf).astype(np.float32)


def _rotate(paddle: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in HF's layout: channel i is paired with channel i + head_dim/2."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return paddle.concat([a * cos - b * sin, b * cos + a * sin], axis=-1)
