"""Measured losses against whole engines that each hold one quantized group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantbench.calibrate.apply import fold_block
from quantbench.calibrate.rotated import model_of, rotation_table
from quantbench.calibrate.sensitivity import groups_of, quantized_groups
from quantbench.calibrate.trials import Trials, float_block, measure
from quantbench.errors import CalibrationError
from quantbench.infer.checkpoint.prefix import Prefix
from quantbench.infer.checkpoint.source import LinearWeight, ModelSource, open_model
from quantbench.infer.engine import Engine
from quantbench.infer.models import block_prefix
from quantbench.infer.validate.likelihood import divergence, log_softmax
from quantbench.scales.table import ScaleTable
from quantbench.vocabulary import CachePlan, VariantPlan, parse_mode

WINDOWS = [np.random.default_rng(s).integers(1, 512, n).tolist() for s, n in ((0, 70), (1, 33))]


@dataclass
class Swapped(ModelSource):
    """A float32 model with some linears from a checkpoint and some tensors replaced."""

    linears: dict[str, LinearWeight] | None = None
    tensors: dict[str, np.ndarray] | None = None

    def read(self, name: str) -> np.ndarray:
        return (self.tensors or {}).get(name, super().read(name))

    def linear(self, name: str) -> LinearWeight:
        return (self.linears or {}).get(name, super().linear(name))


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """The tiny model stored in float32, so that an engine runs it as it is with a float32 cache."""
    folder = tmp_path_factory.mktemp("float32")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    tensors = {n: t.astype(np.float32) for n, t in load_file(tiny_model / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_model(folder)


@pytest.fixture(scope="module")
def trials(model: ModelSource) -> Trials:
    return Trials(model, WINDOWS)


def of_run(run: Path, variant: str) -> tuple[ModelSource, ScaleTable]:
    return open_model(run / "checkpoint" / variant), ScaleTable.load(run / "scales" / variant)


def brute_force(model: ModelSource, checkpoint: ModelSource, table: ScaleTable) -> dict[str, float]:
    """Per group: load a whole engine that holds it quantized, and score the windows."""
    base = Engine.load(model)
    found = {}
    for group in quantized_groups(checkpoint):
        assert group.layer is not None
        prefix = block_prefix(group.layer)
        folded = fold_block(group.layer, model.float_block(group.layer), table, model.config)
        swapped = Swapped(**{f: getattr(model, f) for f in ModelSource.__dataclass_fields__})
        swapped.tensors = {f"{prefix}.{name}": value for name, value in folded.items()}
        swapped.linears = {name: checkpoint.linear(name) for name in group.linears}
        engine = Engine.load(swapped)
        kl = [divergence(log_softmax(base.score(w)), log_softmax(engine.score(w)))[0] for w in WINDOWS]
        found[group.name] = float(np.concatenate(kl).mean())
    return found


@pytest.mark.parametrize("variant", ["weight_only_int4", "weight_only_int8", "a8w8", "a8w8-dynamic"])
def test_losses_and_ranking_are_those_of_whole_engines(
    trials: Trials, model: ModelSource, tiny_run: Path, variant: str
) -> None:
    checkpoint, table = of_run(tiny_run, variant)
    ticks: list[str] = []
    found = measure(trials, model, checkpoint, table, ticks.append)
    expected = brute_force(model, checkpoint, table)
    assert ticks == list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=0.01, atol=1e-8)
    assert sorted(found, key=found.__getitem__) == sorted(expected, key=expected.__getitem__)


def test_a_block_replaced_by_itself_costs_nothing(trials: Trials) -> None:
    assert [trials.kl(layer, trials.layer(layer)) for layer in range(3)] == [0.0, 0.0, 0.0]


def test_a_smoothed_float_block_is_the_same_function(trials: Trials, model: ModelSource, tiny_run: Path) -> None:
    table = of_run(tiny_run, "a8w8")[1]
    block = float_block(trials, model, 1, table)
    assert block is not trials.layer(1)
    assert trials.drift(1, block) < 1e-5
    assert trials.kl(1, block) < 1e-8
    assert float_block(trials, model, 1, ScaleTable()) is trials.layer(1)


def test_the_head_is_measured_too(trials: Trials, model: ModelSource) -> None:
    head = model.linear("lm_head")
    assert isinstance(head.weight, np.ndarray)
    packed = trials.ops.pack(replace(head, weight=head.weight * np.float32(1.1)))
    loss = trials.head_kl(replace(trials._model.head, packed=(packed,)))
    engine = Engine.load(model)
    logits = np.concatenate([engine.score(w) for w in WINDOWS])
    expected = divergence(log_softmax(logits), log_softmax(logits * np.float32(1.1)))[0].mean()
    assert loss == pytest.approx(float(expected), rel=1e-3)
    assert groups_of(3)[-1].linears == ("lm_head",)


def test_a_transform_that_changes_what_a_block_hands_on_is_refused(
    trials: Trials, model: ModelSource, tiny_run: Path
) -> None:
    """As a rotation would. Here it is the weights of another model that do."""
    doubled = Swapped(**{f: getattr(model, f) for f in ModelSource.__dataclass_fields__})
    name = "model.layers.2.mlp.up_proj.weight"
    doubled.tensors = {name: model.read(name) * np.float32(2)}
    with pytest.raises(CalibrationError, match=r"model\.layers\.2: its transforms change .*cannot be measured"):
        float_block(trials, doubled, 2, of_run(tiny_run, "a8w8")[1])


def test_a_rotated_model_is_the_same_function_and_its_groups_can_be_measured(
    trials: Trials, model: ModelSource, tiny_run: Path
) -> None:
    """Codes of the plain model in the place of rotated weights would be a disaster; its own rounding is a trifle."""
    checkpoint, table = of_run(tiny_run, "weight_only_int8")
    turned = model_of(model, VariantPlan("v", parse_mode("weight_only_int8"), "float32", CachePlan("float32"), {},
                                         ({"rotate": {}},)))  # fmt: skip
    rotated = Trials(turned, WINDOWS)
    np.testing.assert_allclose(rotated._base, trials._base, atol=1e-3)
    table = ScaleTable.merge(table, rotation_table(turned))
    with pytest.raises(CalibrationError, match=r"model\.rotate transforms more than one block"):
        measure(trials, model, checkpoint, table, lambda _: None)
    assert max(measure(rotated, turned, checkpoint, table, lambda _: None).values()) > 0.1


def test_a_checkpoint_with_a_prefix_is_refused(trials: Trials, model: ModelSource, tiny_run: Path) -> None:
    checkpoint, table = of_run(tiny_run, "weight_only_int8")
    keys = np.zeros((3, 1, 2, 16), np.float32)
    prefixed = replace(checkpoint, prefix=Prefix((1,), keys, keys))
    with pytest.raises(CalibrationError, match=r"weight_only_int8 has a prefix, without which its groups cannot be"):
        measure(trials, model, prefixed, table, lambda _: None)


def test_a_transform_of_the_whole_model_is_refused(trials: Trials, model: ModelSource, tiny_run: Path) -> None:
    checkpoint, table = of_run(tiny_run, "a8w8")
    entry = next(e for e in table if e.kind == "transform")
    table.add(replace(entry, name="model.embed_tokens.rotate"))
    with pytest.raises(CalibrationError, match=r"model\.embed_tokens\.rotate transforms more than one block"):
        measure(trials, model, checkpoint, table, lambda _: None)
