"""What one token costs: bytes that must be read and operations that must be done, for comparison with ceilings."""

from __future__ import annotations

from quantbench.infer.engine.cache import token_bytes
from quantbench.infer.engine.forward import Model
from quantbench.infer.ops import Packed


def packed_linears(model: Model) -> list[Packed]:
    """Every weight that a token is multiplied with, the head included."""
    groups = [g for layer in model.layers for g in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return [packed for group in [*groups, model.head] for packed in group.packed]


def weight_bytes(model: Model) -> int:
    """Bytes of all weights in memory; a tied embedding counts once."""
    norms = [n for layer in model.layers for n in (layer.attn_norm, layer.mlp_norm, *(layer.qk_norms or ()))]
    packed = {id(p): p.nbytes for p in [*packed_linears(model), model.embedding]}
    return sum(packed.values()) + sum(int(n.nbytes) for n in [*norms, model.norm])


def bytes_per_token(model: Model, cache_format: str, batch: int, context: int) -> float:
    """Bytes read from memory per generated token: the linears once per step of `batch` sequences, the cache of
    `context` tokens once per sequence (layers with a window: of the window)."""
    c = model.config
    per_layer = token_bytes(c, cache_format) / c.num_layers
    seen = sum(_seen(layer.window, context) for layer in model.layers)
    return sum(p.nbytes for p in packed_linears(model)) / batch + per_layer * seen


def operations_per_token(model: Model, context: int) -> float:
    """Multiplications and additions of one token that attends to `context` tokens, the head included."""
    c = model.config
    linears = sum(2 * p.shape[0] * p.shape[1] for p in packed_linears(model))
    attention = sum(4 * _seen(layer.window, context) * c.num_heads * c.head_dim for layer in model.layers)
    return float(linears + attention)


def _seen(window: int | None, context: int) -> int:
    return context if window is None else min(window, context)
