from __future__ import annotations

import pytest

from quantbench.errors import DependencyError, ModelError
from quantbench.infer.cuda.device import Device
from quantbench.infer.cuda.ops import CudaOps, packed
from quantbench.infer.cuda.random import CONFIGS, Nothing, _no_tokenizer, config_of, random_engine, random_model
from quantbench.infer.cuda.report import Notes
from quantbench.infer.engine import SamplingParams
from quantbench.infer.engine.cost import packed_linears
from quantbench.infer.ops.reference import ReferencePacked
from quantbench.vocabulary import parse_mode


def test_an_unknown_config_is_named() -> None:
    with pytest.raises(ModelError, match=r"unknown --config 'llama-3-80b'\. Did you mean llama-3-8b"):
        config_of("llama-3-80b")


def test_there_is_nothing_to_read() -> None:
    store = Nothing()
    assert store.names() == []
    for call in (store.shape, store.dtype, store.read):
        with pytest.raises(ModelError, match=r"model\.norm\.weight: a model of random weights has no stored tensors"):
            call("model.norm.weight")
    with pytest.raises(ModelError, match="a model of random weights has no tokenizer"):
        _no_tokenizer()


def test_weights_of_another_backend_are_refused() -> None:
    with pytest.raises(DependencyError, match="a, b: packed by another backend"):
        packed(ReferencePacked(("a", "b"), (1, 1), 0))


@pytest.mark.parametrize(("mode", "bytes_per_weight"), [("bf16", 2.0), ("a8w8", 1.0), ("weight_only_int4", 0.53)])
def test_a_mode_takes_the_bytes_it_should(mode: str, bytes_per_weight: float) -> None:
    config = config_of("llama-3-8b")
    model = random_model(Notes("sm_90a", "bfloat16"), config, parse_mode(mode))
    linears = packed_linears(model)[:-1]
    weights = sum(p.shape[0] * p.shape[1] for p in linears)
    assert weights == 32 * (4096 * (6144 + 4096 + 28672) + 14336 * 4096)
    assert sum(p.nbytes for p in linears) == pytest.approx(bytes_per_weight * weights, rel=0.01)


def test_every_config_can_be_read() -> None:
    for name in CONFIGS:
        assert config_of(name).num_layers in (16, 32)


@pytest.mark.parametrize("mode", ["bf16", "a8w8c8", "weight_only_int4c8_fp8", "a8w8c8_dynamic", "bf16c8_fp8_dynamic"])
def test_a_random_model_runs(mode: str, gpu: Device) -> None:
    ops = CudaOps("bfloat16")
    engine = random_engine("llama-3.2-1b", mode, ops, batch=2, length=128, chunk=256)
    params = SamplingParams(max_tokens=5, ignore_eos=True, detokenize=False)
    found = engine.generate([[1, 2, 3], [4]], params)
    assert [len(c.ids) for c in found] == [5, 5]
    ops.device.release()
