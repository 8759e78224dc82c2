"""Rotation (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, section 4; R1 and R2 of SpinQuant, Liu et al. 2024, arXiv
2405.16406, section 3): an orthogonal matrix between a writer and its readers spreads outlier channels over all.

R1 turns the residual stream x into x R: the embedding, every linear that writes to the stream and every linear that
reads from it absorb it, once the norms' weights are folded into the readers (an RMS norm without weight commutes with
rotations). R2 turns every head's values: v_proj's rows and o_proj's columns absorb it, and the V cache holds the turned
values. The float model is unchanged; nothing is computed at run time. A tied head must be untied: the final norm is
folded into the head and not into the embedding. What lies behind SwiGLU (down_proj's input) and K stay as they are.

The matrix is D S / sqrt(n), S a Hadamard matrix (all entries 1 or -1: no channel keeps more than 1/sqrt(n) of itself)
and D random signs. Orders: 2^a (Sylvester 1867) times 1 or a Paley order, q + 1 for primes q = 3 mod 4, or 2(q + 1) for
primes q = 1 mod 4 (Paley 1933). 576 = 16 * 36, 896 = 32 * 28, 1536 = 128 * 12, 3584 = 128 * 28, 5120 = 256 * 20. Where
there is none, but 16 or more divides n: blocks of the largest power of two, mixed by an orthogonal DCT of the odd rest;
entries are then at most sqrt(2/n). Other sizes are refused.

Cost: 2 K operations per weight, in float64. Use it where inputs have outlier channels and per-tensor or int4 inputs;
compare with smoothing, which moves outliers into the weights instead of spreading them. After it Hessians and K, V
ranges must be collected again (H becomes R^T H R; per-channel ranges do not follow).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantbench.errors import ModelError, RecipeError
from quantbench.quantizers.finite import require_finite
from quantbench.scales.arrays import F32, F64, I32

_CHUNK = 4096  # rows of a matrix that are in float64 at a time: an embedding is large
_LEAST_BLOCK = 16  # smaller Hadamard blocks leave the DCT, which spreads less evenly, most of the work

READERS = {
    "input_layernorm.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "post_attention_layernorm.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_UNTOUCHED = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")  # of one head, behind q_proj and k_proj


@dataclass(frozen=True)
class Rotation:
    """matrix: float64 [n, n], orthogonal. construction: how it was made, for people ("Sylvester 16 x Paley 36")."""

    matrix: F64
    construction: str


def rotation(n: int, seed: int = 0) -> Rotation:
    """A randomized orthogonal matrix of order n that spreads every channel. Raises RecipeError where none is known."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], n)
    found, name = hadamard(n)
    if found is not None:
        return Rotation(signs[:, None] * found / np.sqrt(n), name)
    block = n & -n
    if block < _LEAST_BLOCK:
        raise RecipeError(
            f"rotation: no matrix for {n} channels: it is neither 2^a nor 2^a times a Paley order "
            f"(12, 20, 28, 36, 44, ...), and no {_LEAST_BLOCK} divides it; leave rotate out for this model"
        )
    mixed = np.kron(_dct(n // block), sylvester(block) / np.sqrt(block))
    return Rotation(signs[:, None] * mixed, f"DCT {n // block} x Sylvester {block}")


def hadamard(n: int) -> tuple[I32 | None, str]:
    """A Hadamard matrix of order n, entries 1 and -1, and its construction; None where this module knows none."""
    twos = (n & -n).bit_length() - 1
    for exponent in range(twos, -1, -1):
        power, rest = 1 << exponent, n >> exponent
        if rest == 1:
            return sylvester(n), f"Sylvester {n}"
        core = paley(rest)
        if core is not None:
            return np.kron(sylvester(power), core), f"Sylvester {power} x Paley {rest}"
    return None, ""


def sylvester(n: int) -> I32:
    """The Hadamard matrix of order n = 2^a: entry (i, j) is -1 to the number of bits that i and j share."""
    matrix = np.ones((1, 1), np.int32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def paley(n: int) -> I32 | None:
    """Paley's Hadamard matrix of order n, or None where neither of his constructions over a prime field gives one."""
    if n % 4 == 0 and _is_prime(n - 1):
        return _bordered(n - 1, -1) + np.eye(n, dtype=np.int32)
    if n % 4 == 0 and (n // 2 - 1) % 4 == 1 and _is_prime(n // 2 - 1):
        conference = _bordered(n // 2 - 1, 1)
        unit = np.eye(n // 2, dtype=np.int32)
        return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(unit, [[1, -1], [-1, -1]])
    return None


def rotate_block(block: Mapping[str, F32], residual: F64 | None, values: F64 | None = None) -> dict[str, F32]:
    """One decoder block behind R1 = `residual` [D, D] and R2 = `values` [head_dim, head_dim]; None leaves one out.

    block: name within the block -> float32 ([out, in] weights, biases, norms), all of it; the result has the same
    names, the two norms' weights being 1 where R1 is applied. Raises ModelError for tensors it does not know, that are
    missing, or that a matrix does not fit, CalibrationError for NaN or Inf.
    """
    _check_block(block, residual, values)
    turned = dict(block)
    if residual is not None:
        for norm, readers in READERS.items():
            turned[norm] = np.ones_like(block[norm])
            for name in readers:
                turned[name] = _times(block[name], block[norm], residual)
        for writer in WRITERS:
            for name in (f"{writer}.weight", f"{writer}.bias"):
                if name in block:
                    turned[name] = _turn_rows(block[name], residual)
    if values is not None:
        for name in ("self_attn.v_proj.weight", "self_attn.v_proj.bias"):
            if name in turned:
                turned[name] = _turn_rows(turned[name], values)
        o = turned["self_attn.o_proj.weight"]
        by_head = o.reshape(-1, len(values))
        turned["self_attn.o_proj.weight"] = _times(by_head, None, values).reshape(o.shape)
    return turned


def rotate_outer(outer: Mapping[str, F32], residual: F64) -> dict[str, F32]:
    """Embedding [V, D], final norm [D] and head [V, D] behind R1 = `residual` [D, D], by full name.

    A tied model has no lm_head.weight: the result has one, and the model must be written untied. Raises as
    rotate_block does.
    """
    known = (_EMBEDDING, _NORM, _HEAD)
    _check(outer, known, known[:2], dict.fromkeys(known, (-1, len(residual))))
    return {
        _EMBEDDING: rotate_rows(outer[_EMBEDDING], residual),
        _NORM: np.ones_like(outer[_NORM]),
        _HEAD: rotate_rows(outer.get(_HEAD, outer[_EMBEDDING]), residual, outer[_NORM]),
    }


def rotate_rows(rows: F32, residual: F64, norm: F32 | None = None) -> F32:
    """Rows [N, D] of an embedding, a head or hidden states behind R1 = `residual`; `norm` [D] is folded in first."""
    return _times(rows, norm, residual)


def _times(w: F32, columns: F32 | None, matrix: F64) -> F32:
    """(w * columns) @ matrix for w [N, K], float64 inside, a few rows at a time."""
    result = np.empty_like(w)
    for start in range(0, len(w), _CHUNK):
        rows = w[start : start + _CHUNK].astype(np.float64)
        result[start : start + _CHUNK] = (rows if columns is None else rows * columns) @ matrix
    return result


def _turn_rows(w: F32, matrix: F64) -> F32:
    """matrix^T w for every run of len(matrix) rows of a weight [N, K], or of a bias [N]."""
    turned = _times(np.ascontiguousarray(w.T).reshape(-1, len(matrix)), None, matrix)
    return np.ascontiguousarray(turned.reshape(w.T.shape).T)


def _check_block(block: Mapping[str, F32], residual: F64 | None, values: F64 | None) -> None:
    readers = [name for names in READERS.values() for name in names]
    needed = (*READERS, *readers, *(f"{writer}.weight" for writer in WRITERS))
    biases = [name.replace(".weight", ".bias") for name in needed if "_proj" in name]
    sides: dict[str, tuple[int, int]] = {}
    if residual is not None:
        sides |= dict.fromkeys((*READERS, *readers), (-1, len(residual)))
        sides |= {f"{writer}.{part}": (0, len(residual)) for writer in WRITERS for part in ("weight", "bias")}
    _check(block, (*needed, *biases, *_UNTOUCHED), needed, sides)
    if values is not None:
        heads = {"self_attn.v_proj.weight": 0, "self_attn.v_proj.bias": 0, "self_attn.o_proj.weight": -1}
        _refuse([_misfit(n, block[n], len(values)) for n, axis in heads.items()
                 if n in block and block[n].shape[axis] % len(values)])  # fmt: skip


def _check(
    tensors: Mapping[str, F32], known: Sequence[str], needed: Sequence[str], sides: Mapping[str, tuple[int, int]]
) -> None:
    """sides: name -> axis that is turned, and the order of the matrix that turns it."""
    unknown = [
        f"rotation: does not know the tensor {n}, so it cannot tell what to turn" for n in tensors if n not in known
    ]
    missing = [f"rotation: the tensor {n} is missing" for n in needed if n not in tensors]
    misfit = [_misfit(n, tensors[n], length) for n, (axis, length) in sides.items()
              if n in tensors and tensors[n].shape[axis] != length]  # fmt: skip
    _refuse([*unknown, *missing, *misfit])
    for name, values in tensors.items():
        require_finite(values, name)


def _misfit(name: str, tensor: F32, order: int) -> str:
    return f"rotation: a matrix of order {order} does not fit {name} {tensor.shape}"


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ModelError(*problems)


def _bordered(q: int, side: int) -> I32:
    """[[0, 1], [side, Q]] of order q + 1, Q[i, j] = 1 or -1 as i - j is a square modulo q or not, 0 where i = j."""
    symbol = np.full(q, -1, np.int32)
    symbol[np.arange(1, q, dtype=np.int64) ** 2 % q] = 1
    symbol[0] = 0
    matrix = np.zeros((q + 1, q + 1), np.int32)
    matrix[0, 1:], matrix[1:, 0] = 1, side
    matrix[1:, 1:] = symbol[(np.arange(q)[:, None] - np.arange(q)) % q]
    return matrix


def _dct(n: int) -> F64:
    """The orthogonal cosine transform of type II (Ahmed et al. 1974), [n, n]."""
    matrix = np.cos(np.pi / n * np.outer(np.arange(n), np.arange(n) + 0.5)) * np.sqrt(2 / n)
    matrix[0] /= np.sqrt(2)
    return np.asarray(matrix, np.float64)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
