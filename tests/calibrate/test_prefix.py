"""A planted sink is found, its prefix takes the giants away, and what is served is what was simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from quantbench.calibrate.apply import fold_block
from quantbench.calibrate.blocks import finish_checkpoints, quantize_blocks
from quantbench.calibrate.choose import choose_block
from quantbench.calibrate.data import TokenBatches
from quantbench.calibrate.job import BlockJob, checkpoint_path
from quantbench.calibrate.paddle_forward import PaddleForward
from quantbench.calibrate.prefix import (
    FOLDER,
    LENGTH,
    WINDOWS,
    Look,
    Search,
    find_prefix,
    folded,
    load_prefix,
    prefix_for,
    searched,
    singles,
)
from quantbench.calibrate.simulate import simulate
from quantbench.errors import CalibrationError, CheckpointError
from quantbench.infer.checkpoint.prefix import FILE, Prefix
from quantbench.infer.checkpoint.source import ModelSource, open_model
from quantbench.infer.engine import Engine
from quantbench.infer.models import block_prefix
from quantbench.infer.validate.likelihood import token_nll
from quantbench.infer.validate.parity import Parity
from quantbench.scales.statistics import load
from quantbench.scales.table import ScaleTable
from quantbench.vocabulary import VariantPlan
from tests.calibrate.job import plan
from tests.sink import SINK, write_sink_model
from tests.tiny import write_tiny_model

TEXT = np.random.default_rng(0).integers(1, 512, (6, 40)).astype(np.int32)


def batches(ids: np.ndarray = TEXT) -> TokenBatches:
    return TokenBatches(ids, np.full(len(ids), ids.shape[1], np.int32), "0" * 64, "random")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_model(write_sink_model(tmp_path_factory.mktemp("sink") / "model"))


@pytest.fixture(scope="module")
def search(model: ModelSource) -> Search:
    return Search(PaddleForward.of(model), model, batches())


@pytest.fixture(scope="module")
def found(search: Search) -> Prefix:
    return find_prefix(search, "auto", search.source.tokenizer())


def run(folder: Path, source: ModelSource, *variants: VariantPlan, **options: object) -> BlockJob:
    job = BlockJob(folder, source, PaddleForward.of(source), batches(), {v.name: v for v in variants}, **options)  # type: ignore[arg-type]
    quantize_blocks(job, lambda _: None)
    finish_checkpoints(job, lambda _: None)
    return job


def behind(source: ModelSource, name: str, mode: str, *transforms: dict[str, object]) -> VariantPlan:
    return replace(plan(source, name, mode, *transforms), prefix="auto")


def test_the_sink_is_found_and_the_reason_has_the_figures(found: Prefix) -> None:
    assert found.ids == (SINK,)
    assert found.reason.startswith("'<|end|>', the best of ")
    assert "times the median token's (model.layers.0 down_in;" in found.reason


def test_its_keys_and_values_are_the_float_models(found: Prefix, model: ModelSource) -> None:
    taps = Engine.load(model, "fp32", ops="reference").trace([SINK, 5, 6]).taps
    for layer in range(model.config.num_layers):
        for side, values in (("k", found.k), ("v", found.v)):
            expected = taps[f"{block_prefix(layer)}.{side}"].values[:1].transpose(1, 0, 2)
            np.testing.assert_allclose(values[layer], expected, rtol=1e-4, atol=1e-5)


def test_giants_are_gone_behind_it(search: Search, found: Prefix) -> None:
    plain, after = search.look([(), found.ids])
    name = "model.layers.0 down_in"
    assert plain.ratios[name].max() > 100 > 10 > after.ratios[name].max()
    assert after.spread < 0.2 * plain.spread
    assert len(plain.ids) == len(plain.ratios[name]) == search.windows(WINDOWS, LENGTH).size


class Table(Search):
    """A search whose looks are known: candidate -> largest ratio of its text, in which token 9 is the giant."""

    known: ClassVar[dict[tuple[int, ...], float]] = {}

    def look(self, candidates: Sequence[tuple[int, ...]]) -> list[Look]:
        ids, none = np.array([9, 8], np.int32), np.zeros((0, 0, 0), np.float32)
        return [Look(c, ids, none, {"x": np.array([self.known.get(c, 900), 1], np.float32)}) for c in candidates]

    def likelihoods(self, candidates: Sequence[tuple[int, ...]]) -> list[float]:
        return [3.0 - (c == (7,)) for c in candidates]


@pytest.mark.parametrize(
    ("known", "best"),
    [
        ({(0,): 70, (0, 9): 50, (0, 7): 300}, (0, 9)),  # a giant token in front is giant no more
        ({(0,): 70, (0, 9): 65, (0, 9, 9): 1}, (0, 9)),  # so little is not worth a third token
        ({(0,): 60, (0, 9): 2}, (0,)),  # no giants left: nothing more is tried
        ({(0,): 83, (7,): 90, (0, 7): 70, (0, 7, 7): 20}, (0, 7, 7)),
        ({(0,): 80, (9, 0): 50, (0, 9): 90}, (9, 0)),  # a second token also goes before the first
        ({(0,): 60, (7,): 62}, (7,)),  # as good, and likelier
        ({(0,): 30, (7,): 62}, (0,)),
        ({(0,): 800, (0, 0): 700, (0, 0, 0): 600, (0, 0, 0, 0): 500, (0, 0, 0, 0, 0): 1}, (0, 0, 0, 0)),  # four at most
    ],
)
def test_tokens_are_added_while_giants_remain(
    known: dict[tuple[int, ...], float], best: tuple[int, ...], model: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Table, "known", known)
    text = batches(np.full((1, 4), 7, np.int32))
    table = Table(PaddleForward.of(model), model, text)
    assert searched(table, model.tokenizer())[1].prefix == best


def test_likelihoods_are_the_float_models(search: Search, model: ModelSource) -> None:
    engine, windows = Engine.load(model, "fp32", ops="reference"), search.windows(8, 96)
    assert windows.shape == (8, 96)
    nll = [token_nll(engine.score([5, *w.tolist()])[1:], w) for w in windows]
    plain, behind_five = search.likelihoods([(), (5,)])
    np.testing.assert_allclose(behind_five, np.concatenate(nll).mean(), rtol=1e-5)
    assert plain != behind_five


def test_tokens_that_are_tried(model: ModelSource) -> None:
    words = model.tokenizer()
    newline, stop = (words.encode(mark, add_special_tokens=False)[0] for mark in ("\n", "."))
    assert singles(batches(np.array([[7, 7, 9]], np.int32)), words, model.config) == [0, newline, stop, 7]


def test_ids_are_taken_as_they_are_and_refused_where_they_do_nothing(search: Search) -> None:
    words = search.source.tokenizer()
    assert find_prefix(search, [5, SINK], words).ids == (5, SINK)
    with pytest.raises(CalibrationError) as caught:
        find_prefix(search, [4], words)  # marked, and giant itself
    says = str(caught.value)
    assert says.startswith("prefix: these tokens, [4] (")
    assert "This model has no use for it: prefix: off" in says


def test_a_model_without_sinks_has_no_use_for_it(tmp_path: Path) -> None:
    source = open_model(write_tiny_model(tmp_path / "tiny"))
    with pytest.raises(
        CalibrationError, match=r"prefix: auto: the best of \d+ candidates, .* leaves the largest inputs"
    ):
        find_prefix(Search(PaddleForward.of(source), source, batches()), "auto", source.tokenizer())


def test_statistics_and_scales_are_those_of_the_text_behind_it(model: ModelSource, tmp_path: Path) -> None:
    job = run(tmp_path, model, plan(model, "plain", "a8w8"), behind(model, "a", "a8w8"), behind(model, "b", "a8w8"))
    seen = {n: load(tmp_path / "statistics" / n / "block_00000.safetensors")["down_in"] for n in ("", "a", "b")}
    assert seen["a"].tokens == seen[""].tokens == TEXT.size
    cached = load(tmp_path / "statistics" / "a" / "block_00000.safetensors")["v"]
    assert cached.tokens == TEXT.size + 1
    assert cached.absmax.max() > 4  # the sink's own value, which the cache must hold
    assert seen["a"].absmax[0] < 0.05 * seen[""].absmax[0]
    assert (tmp_path / "statistics" / "b").is_symlink()
    assert open_model(checkpoint_path(tmp_path, "plain")).prefix is None
    stored = open_model(checkpoint_path(job.folder, "a")).prefix
    assert stored is not None
    assert stored.ids == (SINK,)
    errors = {}
    for name in ("plain", "a"):
        engine = Engine.load(checkpoint_path(tmp_path, name), ops="reference")
        exact = Engine.load(model, "fp32", ops="reference", prefix=engine.source.prefix)
        errors[name] = np.linalg.norm(engine.score(TEXT[0]) - exact.score(TEXT[0]))
    assert errors["a"] < 0.5 * errors["plain"]


@pytest.mark.parametrize("mode", ["a8w8", "a8w8c8", "a8w8_fp8c8_fp8", "weight_only_int8"])
def test_what_is_served_is_what_was_simulated(mode: str, model: ModelSource, tmp_path: Path) -> None:
    smooth = {"smooth": {"alpha": 0.5, "targets": ["attn_in", "o_in", "down_in"]}}
    run(tmp_path, model, behind(model, "p", mode, smooth))
    checkpoint = open_model(checkpoint_path(tmp_path, "p"))
    engine, judged = Engine.load(checkpoint), Parity()
    exact = Engine.load(model, "fp32", prefix=load_prefix(tmp_path / FOLDER / "auto", model.config))
    for window in TEXT[:3].tolist():
        served = engine.trace(window)
        followed, free = simulate(checkpoint, window, followed=served.hidden), simulate(checkpoint, window, taps=False)
        judged.add(exact.trace(window), followed, served, free.logits)
    result = judged.result()
    assert result["codes_different"] == 0
    assert result["first_departure"] is None
    assert result["kl_served_simulated"] < 1e-4
    assert result["layers"][-1]["sqnr_served_db"] > 15


def test_with_quantized_inputs_blocks_see_what_quantized_blocks_put_out(model: ModelSource, tmp_path: Path) -> None:
    smooth = {"smooth": {"alpha": 0.5, "targets": ["o_in"]}}
    run(tmp_path, model, behind(model, "p", "a8w8", smooth), quantized_inputs=True)
    checkpoint = open_model(checkpoint_path(tmp_path, "p"))
    hidden = simulate(checkpoint, TEXT[0], taps=True)
    seen = load(tmp_path / "statistics" / "p" / "block_00001.safetensors")["down_in"]
    assert np.abs(hidden.taps["model.layers.1.down_in"].values).max() <= seen.absmax[0] * 1.001


@pytest.mark.parametrize(
    "transforms",
    [
        [{"smooth": {"alpha": 0.7, "targets": ["attn_in", "o_in", "mlp_in", "down_in"]}}],
        [{"kv_smooth": {}}],
        [{"smooth": {"targets": ["o_in"]}}, {"kv_smooth": {"alpha": 1.0}}],
    ],
)
def test_behind_transforms_it_is_what_the_folded_weights_make(
    transforms: list[dict[str, object]], model: ModelSource, found: Prefix, tmp_path: Path
) -> None:
    variant = behind(model, "p", "a8w8c8", *transforms)
    run(tmp_path, model, variant)
    table, forward = ScaleTable.load(tmp_path / "scales" / "p"), PaddleForward.of(model)
    made = folded(found, table, model.config)
    assert made is not None
    assert not (np.array_equal(made.k, found.k) and np.array_equal(made.v, found.v))
    hidden = forward.embed(np.array([found.ids], np.int32))
    for layer in range(model.config.num_layers):
        seen: dict[str, np.ndarray] = {}
        forward.load(layer, fold_block(layer, model.float_block(layer), table, model.config))
        hidden = forward.run(hidden, np.array([1], np.int32), lambda tap, x, s=seen: s.update({tap: x.copy()}))
        for side, arrays in (("k", made.k), ("v", made.v)):
            np.testing.assert_allclose(arrays[layer], seen[side].transpose(1, 0, 2), rtol=1e-3, atol=1e-4)


def test_a_rotated_model_has_it_turned(model: ModelSource, found: Prefix, tmp_path: Path) -> None:
    run(tmp_path, model, behind(model, "p", "a8w8", {"rotate": {}}))
    checkpoint = open_model(checkpoint_path(tmp_path, "p"))
    assert checkpoint.prefix is not None
    np.testing.assert_array_equal(checkpoint.prefix.k, found.k)
    assert not np.allclose(checkpoint.prefix.v, found.v, atol=0.1)
    served = Engine.load(checkpoint, ops="reference").score(TEXT[0])
    exact = Engine.load(model, "fp32", ops="reference", prefix=found).score(TEXT[0])
    assert np.linalg.norm(served - exact) < 0.2 * np.linalg.norm(exact)


def test_it_is_found_once_and_kept(model: ModelSource, search: Search, found: Prefix, tmp_path: Path) -> None:
    assert prefix_for(tmp_path, search, "off") is None
    assert not (tmp_path / FOLDER).exists()
    kept = prefix_for(tmp_path, search, "auto")
    assert kept is not None
    np.testing.assert_array_equal(kept.k, found.k)
    silent = replace(search, tokens=batches(np.zeros((1, 1), np.int32)))  # nothing could be found on this
    again = prefix_for(tmp_path, silent, "auto")
    assert again is not None
    assert (again.ids, again.reason) == (found.ids, found.reason)
    np.testing.assert_array_equal(again.v, found.v)
    (tmp_path / FOLDER / "auto" / FILE).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        prefix_for(tmp_path, search, "auto")
    assert load_prefix(tmp_path, model.config) is None


def test_choosing_again_needs_no_model(model: ModelSource, tmp_path: Path) -> None:
    first, second = behind(model, "p", "a8w8"), behind(model, "q", "a8w8")
    run(tmp_path, model, first)
    before = (checkpoint_path(tmp_path, "p") / FILE).read_bytes()
    (tmp_path / "statistics" / "q").symlink_to("p")
    run(tmp_path, model, second, reuse_statistics=True)
    assert (checkpoint_path(tmp_path, "q") / FILE).read_bytes() == before


def test_the_same_bytes_again(model: ModelSource, tmp_path: Path) -> None:
    for name in "ab":
        run(tmp_path / name, model, behind(model, "p", "a8w8"))
    first, second = (checkpoint_path(tmp_path / name, "p") for name in "ab")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_tables_name_no_prefix(model: ModelSource) -> None:
    table = choose_block(0, model.float_block(0), {}, plan(model, "w", "weight_only_int8"), model.config)
    assert folded(None, table, model.config) is None
