from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbench.errors import CalibrationError, ModelError, RecipeError
from quantbench.quantizers.activation import quantize_activation
from quantbench.quantizers.output_loss import round_trip
from quantbench.quantizers.rotation import hadamard, paley, rotate_block, rotate_outer, rotation, sylvester
from quantbench.vocabulary import LayerPlan

F32 = np.float32
D, HEADS, KV, HEAD, WIDE, VOCAB = 48, 4, 2, 8, 40, 30  # 48 = 4 x Paley 12
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD, D),
    "self_attn.k_proj": (KV * HEAD, D),
    "self_attn.v_proj": (KV * HEAD, D),
    "self_attn.o_proj": (D, HEADS * HEAD),
    "mlp.gate_proj": (WIDE, D),
    "mlp.up_proj": (WIDE, D),
    "mlp.down_proj": (D, WIDE),
}
Tensors = dict[str, np.ndarray]


def block(seed: int = 0, biases: bool = True) -> Tensors:
    rng = np.random.default_rng(seed)
    made = {f"{n}.weight": 0.2 * rng.standard_normal(s) for n, s in SHAPES.items()}
    made |= {f"{n}.bias": 0.2 * rng.standard_normal(s[0]) for n, s in SHAPES.items() if biases}
    made |= {f"{n}.weight": 1 + 0.5 * rng.standard_normal(D) for n in ("input_layernorm", "post_attention_layernorm")}
    made |= {f"self_attn.{n}_norm.weight": 1 + 0.5 * rng.standard_normal(HEAD) for n in "qk"}
    return {name: value.astype(F32) for name, value in made.items()}


def outer(tied: bool) -> Tensors:
    rng = np.random.default_rng(9)
    made = {"model.embed_tokens.weight": rng.standard_normal((VOCAB, D)), "model.norm.weight": rng.standard_normal(D)}
    if not tied:
        made["lm_head.weight"] = rng.standard_normal((VOCAB, D))
    return {name: value.astype(F32) for name, value in made.items()}


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6) * weight


def linear(b: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    return x @ b[f"{name}.weight"].astype(np.float64).T + b.get(f"{name}.bias", F32(0))


def turn(x: np.ndarray) -> np.ndarray:
    """RoPE of x [T, H, d]."""
    angle = np.arange(len(x))[:, None, None] * 100.0 ** (-np.arange(HEAD // 2) / (HEAD // 2))
    a, b = x[..., : HEAD // 2], x[..., HEAD // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def attention(b: Tensors, x: np.ndarray) -> np.ndarray:
    q, k, v = (linear(b, f"self_attn.{n}_proj", x).reshape(len(x), -1, HEAD) for n in "qkv")
    q, k = (turn(norm(a, b[f"self_attn.{n}_norm.weight"])) for n, a in (("q", q), ("k", k)))
    k, v = (np.repeat(a, HEADS // KV, axis=1) for a in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(HEAD) + np.triu(np.full((len(x), len(x)), -np.inf), 1)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = np.einsum("hts,shd->thd", p / p.sum(axis=-1, keepdims=True), v)
    return linear(b, "self_attn.o_proj", mixed.reshape(len(x), -1))


def logits(blocks: list[Tensors], out: Tensors, ids: np.ndarray) -> np.ndarray:
    x = out["model.embed_tokens.weight"][ids].astype(np.float64)
    for b in blocks:
        x = x + attention(b, norm(x, b["input_layernorm.weight"]))
        h = norm(x, b["post_attention_layernorm.weight"])
        gate = linear(b, "mlp.gate_proj", h)
        x = x + linear(b, "mlp.down_proj", gate / (1 + np.exp(-gate)) * linear(b, "mlp.up_proj", h))
    return norm(x, out["model.norm.weight"]) @ out.get("lm_head.weight", out["model.embed_tokens.weight"]).T


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
def test_the_float_models_logits_do_not_change(tied: bool, biases: bool) -> None:
    blocks, out, ids = [block(0, biases), block(1, biases)], outer(tied), np.arange(12) * 7 % VOCAB
    r1, r2 = rotation(D).matrix, rotation(HEAD, seed=3).matrix
    turned = [rotate_block(b, r1, r2) for b in blocks], rotate_outer(out, r1)
    assert logits(*turned, ids) == pytest.approx(logits(blocks, out, ids), rel=1e-4, abs=1e-4)
    assert set(turned[0][0]) == set(blocks[0])
    assert all(a.dtype == F32 and a.shape == blocks[0][n].shape for n, a in turned[0][0].items())
    assert np.array_equal(turned[1]["model.norm.weight"], np.ones(D, F32))


@pytest.mark.parametrize(("residual", "values"), [(D, None), (None, HEAD), (None, None)])
def test_each_rotation_alone(residual: int | None, values: int | None) -> None:
    b, out, ids = block(), outer(tied=False), np.arange(12)
    r1 = rotation(residual).matrix if residual else None
    turned = rotate_block(b, r1, rotation(values).matrix if values else None)
    ends = rotate_outer(out, r1) if r1 is not None else out
    assert logits([turned], ends, ids) == pytest.approx(logits([b], out, ids), rel=1e-4, abs=1e-4)
    changed = {n.split(".")[1] for n, a in turned.items() if not np.array_equal(a, b[n]) and "proj" in n}
    assert ("o_proj" in changed, "q_proj" in changed) == (bool(residual or values), bool(residual))


def test_turning_by_the_matrix_itself() -> None:
    b, r1, r2 = block(), rotation(D).matrix, rotation(HEAD).matrix
    turned, values = rotate_block(b, r1), rotate_block(b, None, r2)
    gain = np.diag(b["input_layernorm.weight"].astype(np.float64))
    assert turned["self_attn.q_proj.weight"] == pytest.approx(b["self_attn.q_proj.weight"] @ gain @ r1, abs=1e-5)
    assert turned["mlp.down_proj.weight"] == pytest.approx(r1.T @ b["mlp.down_proj.weight"], abs=1e-5)
    assert turned["mlp.down_proj.bias"] == pytest.approx(r1.T @ b["mlp.down_proj.bias"], abs=1e-5)
    big = np.kron(np.eye(KV), r2)
    assert values["self_attn.v_proj.weight"] == pytest.approx(big.T @ b["self_attn.v_proj.weight"], abs=1e-5)
    assert values["self_attn.v_proj.bias"] == pytest.approx(big.T @ b["self_attn.v_proj.bias"], abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 64, 76, 96, 576, 896, 1536])
def test_hadamard_matrices_are_hadamard_matrices(n: int) -> None:
    matrix, name = hadamard(n)
    assert matrix is not None
    assert set(np.unique(matrix)) <= {-1, 1}
    assert np.array_equal(matrix.astype(F32) @ matrix.T.astype(F32), n * np.eye(n))
    assert str(n) in name or " x " in name


def test_constructions_by_hand() -> None:
    expected = [[(-1) ** bin(i & j).count("1") for j in range(16)] for i in range(16)]
    assert sylvester(16).tolist() == expected
    assert [n for n in range(1, 65) if paley(n) is not None] == [4, 8, 12, 20, 24, 28, 32, 36, 44, 48, 60]
    assert hadamard(576)[1] == "Sylvester 16 x Paley 36"


@pytest.mark.parametrize("n", [64, 576, 896, 688])
def test_rotations_are_orthogonal_even_and_repeatable(n: int) -> None:
    made = rotation(n)
    np.testing.assert_allclose(made.matrix @ made.matrix.T, np.eye(n), atol=1e-12)
    assert np.abs(made.matrix).max() <= np.sqrt((2 if "DCT" in made.construction else 1) / n) + 1e-12
    assert np.array_equal(made.matrix, rotation(n).matrix)
    assert not np.array_equal(made.matrix, rotation(n, seed=1).matrix)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(0, 5))
def test_every_size_is_rotated_or_refused(n: int, seed: int) -> None:
    try:
        made = rotation(n, seed).matrix
    except RecipeError:
        assert n % 16
        assert hadamard(n)[0] is None
        return
    np.testing.assert_allclose(made.T @ made, np.eye(n), atol=1e-12)
    assert np.abs(made).max() <= np.sqrt(2 / n) + 1e-12


def test_the_construction_without_a_hadamard_matrix_says_so() -> None:
    assert rotation(688).construction == "DCT 43 x Sylvester 16"


@pytest.mark.parametrize("n", [3, 6, 7, 18, 50, 100])
def test_sizes_without_a_factorization_are_refused(n: int) -> None:
    with pytest.raises(RecipeError, match=rf"rotation: no matrix for {n} channels: .* and no 16 divides it"):
        rotation(n)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rotating_beats_plain_on_an_input_with_outlier_channels(weights: str) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((200, 8)) @ rng.standard_normal((8, 576)) + rng.standard_normal((200, 576))).astype(F32)
    x[:, [3, 200, 500]] *= 60
    w = rng.standard_normal((32, 576)).astype(F32)
    plan = LayerPlan("w", weights, "channel")

    def error(x_: np.ndarray, w_: np.ndarray) -> float:
        codes, scale = quantize_activation(x_, "int8", float(np.abs(x_).max() / 127))
        return float(np.square(codes.astype(F32) * scale @ round_trip(w_, plan).T - x @ w.T).sum())

    r = rotation(576).matrix.astype(F32)
    assert error(x @ r, w @ r) < 0.5 * error(x, w)


def test_a_dead_channel_zeros_and_one_giant_weight() -> None:
    b, r1 = block(), rotation(D).matrix
    b["self_attn.q_proj.weight"][:, 3] = 0
    b["input_layernorm.weight"][5] = 0
    b["mlp.up_proj.weight"][:] = 0
    b["mlp.down_proj.weight"][2, 2] = 1e4
    turned, out, ids = rotate_block(b, r1), outer(tied=True), np.arange(8)
    assert not turned["mlp.up_proj.weight"].any()
    plain = logits([b], out, ids)
    assert logits([turned], rotate_outer(out, r1), ids) == pytest.approx(plain, rel=1e-4, abs=1e-4)


def test_what_cannot_be_turned_is_refused_all_at_once() -> None:
    b = block()
    b["pre_feedforward_layernorm.weight"] = b["input_layernorm.weight"]
    del b["mlp.up_proj.weight"]
    with pytest.raises(ModelError) as found:
        rotate_block(b, rotation(64).matrix)
    assert "rotation: does not know the tensor pre_feedforward_layernorm.weight, so" in str(found.value)
    assert "rotation: the tensor mlp.up_proj.weight is missing" in str(found.value)
    assert "rotation: a matrix of order 64 does not fit self_attn.o_proj.weight (48, 32)" in str(found.value)
    with pytest.raises(ModelError, match=r"a matrix of order 12 does not fit self_attn.v_proj.weight \(16, 48\)"):
        rotate_block(block(), None, rotation(12).matrix)
    with pytest.raises(ModelError, match=r"the tensor model.norm.weight is missing"):
        rotate_outer({"model.embed_tokens.weight": np.ones((3, D), F32)}, rotation(D).matrix)
    bad = block()
    bad["mlp.gate_proj.weight"][1, 1] = np.inf
    with pytest.raises(CalibrationError, match=r"mlp.gate_proj.weight: 1 of 1920 values are NaN or Inf"):
        rotate_block(bad, rotation(D).matrix)
