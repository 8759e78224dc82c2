import json
import sys

import pytest

from quantbench.errors import DataError, ModelError, QuantbenchError, RequestError
from quantbench.infer.engine import Engine
from quantbench.infer.validate import visit
from quantbench.infer.validate.throughput import measure_throughput, spread
from quantbench.infer.validate.timing import Load
from quantbench.infer.validate.visit import EngineSpec, Visit, checkpoint_bytes, peak_rss_bytes, visit_engine

LOAD = Load(prompt=16, output=4, batches=(1, 2))


@pytest.fixture(scope="module")
def measured(tiny_model):
    specs = {mode: EngineSpec(tiny_model, mode, "reference") for mode in ("fp32", "a8w8")}
    seen = []
    result = measure_throughput(specs, "fp32", LOAD, rounds=2, progress=lambda *step: seen.append(step))
    return result, seen


def test_rounds_go_over_the_variants_in_turn(measured):
    assert measured[1] == [("fp32", 1, 4), ("a8w8", 2, 4), ("fp32", 3, 4), ("a8w8", 4, 4)]


def test_the_result_is_what_reports_read(measured):
    result, _ = measured
    from quantbench.reports.files import Throughput

    read = Throughput.model_validate(json.loads(json.dumps(result, allow_nan=False)))
    assert (read.prompt, read.output, read.rounds) == (16, 4, 2)
    assert set(read.ceilings) == {"read_gb_per_s", "float32_gop_per_s", "int8_gop_per_s", "bf16_gop_per_s"}
    for speed in read.variants.values():
        assert speed.prefill.tokens_per_s.min <= speed.prefill.tokens_per_s.median <= speed.prefill.tokens_per_s.max
        assert set(speed.decode) == {"1", "2"}
        for row in speed.decode.values():
            assert 0 < row.itl_p50_ms <= row.itl_p95_ms
            assert row.ttft_ms > 0
            assert row.share_of_ceiling > 0
            assert row.bound in ("memory", "compute")
            assert "ceiling" in row.why


def test_speedups_are_of_pairs_and_only_of_variants(measured):
    fp32, a8w8 = (measured[0]["variants"][name] for name in ("fp32", "a8w8"))
    assert "speedup" not in fp32["decode"]["1"]
    both = [(fp32["decode"]["2"], a8w8["decode"]["2"]), (fp32["prefill"], a8w8["prefill"])]
    for base, other in both:
        pairs = other["speedup"]
        assert pairs["min"] <= pairs["median"] <= pairs["max"]
        assert other["tokens_per_s"]["min"] / base["tokens_per_s"]["max"] <= pairs["min"]
        assert other["cpu_s_per_token"] > 0
        assert "fp32" in other["why"]


def test_memory_is_that_of_the_process_and_of_the_weights(measured):
    fp32, a8w8 = (measured[0]["variants"][name] for name in ("fp32", "a8w8"))
    assert a8w8["weights_bytes"] < 0.6 * fp32["weights_bytes"]
    assert fp32["peak_rss_bytes"] > 20 << 20
    assert fp32["checkpoint_bytes"] == fp32["weights_bytes"]


def test_speeds_are_tokens_over_seconds(tiny_model, monkeypatch):
    """The arithmetic, on one visit whose times are known."""
    real = visit_engine(EngineSpec(tiny_model, "fp32", "reference"), LOAD)
    times = real.times.__dict__ | {"prefill": [0.5, 0.5, 0.5]}
    decode = {
        b: d.__dict__ | {"steps": [0.1, 0.1, 0.4], "first_token": [0.5] * b} for b, d in real.times.decode.items()
    }
    row = real.__dict__ | {"times": times | {"decode": decode}}
    fixed = Visit.from_json(json.loads(json.dumps(row, default=lambda o: o.__dict__)))
    monkeypatch.setattr("quantbench.infer.validate.throughput.visit_engine", lambda spec, load: fixed)
    got = measure_throughput({"fp32": EngineSpec(tiny_model, "fp32", "reference")}, "fp32", LOAD, 1)["variants"]["fp32"]
    assert got["prefill"]["tokens_per_s"] == {"median": 32.0, "min": 32.0, "max": 32.0}
    assert got["decode"]["2"]["tokens_per_s"]["median"] == pytest.approx(2 * 3 / 0.6)
    assert got["decode"]["2"]["itl_p50_ms"] == pytest.approx(100)
    assert got["decode"]["2"]["itl_p95_ms"] == pytest.approx(370)
    assert got["decode"]["2"]["ttft_ms"] == pytest.approx(500)


def test_a_visit_raises_what_the_engine_raised_there(tiny_model):
    with pytest.raises(ModelError):
        visit_engine(EngineSpec(tiny_model + "-none", None, "reference"), LOAD)
    with pytest.raises(RequestError, match="unknown mode 'fp33'"):
        visit_engine(EngineSpec(tiny_model, "fp33", "reference"), LOAD)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed, most likely for memory"),
        ("raise SystemExit('no luck')", "its process ended with code 1: no luck"),
        ("raise SystemExit(3)", "its process ended with code 3: no message"),
    ],
)
def test_a_process_that_dies_is_told(tmp_path, monkeypatch, code, message):
    """A stand-in interpreter that dies in the way under test."""
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n{code}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(visit.sys, "executable", str(fake))
    with pytest.raises(QuantbenchError, match=f"measuring model 'm': .*{message}"):
        visit_engine(EngineSpec("m"), LOAD)
    with pytest.raises(QuantbenchError, match=f"measuring the ceilings: .*{message}"):
        visit.visit_ceilings("cpu", None)


def test_unknown_baseline_and_no_rounds(tiny_model):
    specs = {"fp32": EngineSpec(tiny_model, "fp32", "reference")}
    with pytest.raises(DataError, match=r"unknown baseline 'fp16'\. Did you mean fp32\?"):
        measure_throughput(specs, "fp16", LOAD)
    with pytest.raises(RequestError, match="rounds: 0; measure at least once"):
        measure_throughput(specs, "fp32", LOAD, rounds=0)


def test_checkpoint_bytes_of_a_stored_and_of_a_converted_model(tiny_model):
    engine = Engine.load(tiny_model, ops="reference")
    assert checkpoint_bytes(engine, None) > engine.memory["weights_bytes"]  # the file has a header
    engine = Engine.load(tiny_model, "bf16", ops="reference")
    assert checkpoint_bytes(engine, "bf16") == engine.memory["weights_bytes"]


def test_peak_memory_is_read_from_the_kernels_file(tmp_path):
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t  2048 kB\n")
    assert peak_rss_bytes(tmp_path / "status") == 2 << 20
    (tmp_path / "status").write_text("Name:\tx\n")
    with pytest.raises(QuantbenchError, match="no VmHWM line; peak memory can only be measured on Linux"):
        peak_rss_bytes(tmp_path / "status")


def test_spread():
    assert spread([3, 1, 2]) == {"median": 2.0, "min": 1.0, "max": 3.0}
