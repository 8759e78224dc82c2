from dataclasses import replace

import pytest

from quantbench.infer.engine import Engine
from quantbench.infer.validate.roofline import Achieved, Ceilings, Work, prefill_work, step_work, why

CEILINGS = Ceilings(read_gb_per_s=20, float32_gop_per_s=100, int8_gop_per_s=400)
WORK = Work(weight_bytes=400_000_000, head_bytes=100_000_000, cache_bytes=0, int8_operations=0, float_operations=2e8)
BASE = Achieved("fp32", seconds=0.025, cpu_s=0.025, threads=1, work=WORK, ceilings=CEILINGS)
QUANTIZED = replace(WORK, weight_bytes=200_000_000, int8_operations=1.5e8, float_operations=5e7)


def test_the_larger_of_the_two_times_is_the_bound():
    assert (BASE.bound, BASE.floor_s, BASE.share) == ("memory", pytest.approx(0.02), pytest.approx(0.8))
    busy = replace(BASE, work=replace(WORK, float_operations=4e9), seconds=0.1)
    assert (busy.bound, busy.floor_s, busy.share) == ("compute", pytest.approx(0.04), pytest.approx(0.4))
    assert busy.json() == {
        "gb_per_s": pytest.approx(4),
        "gop_per_s": pytest.approx(40),
        "share_of_ceiling": pytest.approx(0.4),
        "bound": "compute",
    }


def test_int8_and_float_operations_have_their_own_ceilings():
    assert QUANTIZED.compute_s(CEILINGS) == pytest.approx(1.5e8 / 400e9 + 5e7 / 100e9)
    assert QUANTIZED.operations == 2e8


def test_alone_it_says_how_near_the_ceiling_it_is():
    assert why(BASE) == "reads 400 MB per step at 16 GB/s, 80% of the read ceiling"
    busy = replace(BASE, work=replace(WORK, float_operations=4e9), seconds=0.1)
    assert why(busy) == "does 4 GOP per step at 40 GOP/s, 40% of the compute ceiling"


def test_a_gain_is_held_against_what_the_ceilings_allow():
    full = replace(BASE, name="q", work=QUANTIZED, seconds=0.0125)
    assert why(full, BASE).endswith("80% of the read ceiling; 2.00x fp32, and the ceilings allow 2.00x")
    assert why(full, BASE, speedup=1.9).endswith("; 1.90x fp32, and the ceilings allow 2.00x")


def test_a_gain_that_falls_short_tells_where_the_time_goes():
    profile = {"linears": 0.004, "attention": 0.005, "output head": 0.0005, "embedding": 0.0005}
    short = replace(BASE, name="q", work=QUANTIZED, seconds=0.02, profile=profile)
    assert why(short, BASE).endswith(
        "; 1.25x fp32, and the ceilings allow 2.00x: it comes less near to them than fp32 (80%); "
        "of 20 ms per step: attention 10, linears 8, output head 1"
    )


def test_no_gain_where_as_many_bytes_are_read():
    assert why(replace(BASE, name="q", seconds=0.0245), BASE).endswith(
        "; not faster than fp32 (1.02x) because it reads as many bytes (100%; 25% are the output head)"
    )


def test_no_gain_where_weights_are_decoded_for_float_products():
    heavy = replace(WORK, float_operations=1e10)
    base = replace(BASE, work=heavy, seconds=0.2)
    assert why(replace(base, work=replace(heavy, weight_bytes=10**8), seconds=0.25), base).endswith(
        "; not faster than fp32 (0.80x) because its products take as many float operations: "
        "its weights are decoded, not multiplied in int8"
    )


def test_no_gain_where_the_time_goes_elsewhere():
    slow = Achieved("q", 0.03, 0.033, 2, QUANTIZED, CEILINGS, {"attention": 0.02, "linears": 0.01}, disturbed=0.3)
    assert why(slow, BASE).endswith(
        "; not faster than fp32 (0.83x) because 67% of its step lie outside the memory ceiling; of 30 ms per step: "
        "attention 20, linears 10; on average 1.1 of 2 threads are busy; "
        "other processes held the processor 30% of the time"
    )


def test_work_of_a_real_engine_is_counted_from_its_weights(tiny_model):
    block = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128
    head, attention = 256 * 64, 4 * 100 * 64 * 3
    engines = {mode: Engine.load(tiny_model, mode, ops="reference") for mode in ("fp32", "a8w8")}
    work = {mode: step_work(engine, batch=4, context=100) for mode, engine in engines.items()}
    assert (work["fp32"].head_bytes, work["fp32"].weight_bytes) == (head * 4, (3 * block + head) * 4)
    assert work["fp32"].cache_bytes == 4 * 100 * 3 * 2 * 32 * 4
    assert work["fp32"].int8_operations == 0
    assert work["fp32"].float_operations == 4 * (2 * (3 * block + head) + attention)
    assert work["a8w8"].int8_operations == 4 * 2 * 3 * block
    assert work["a8w8"].operations == work["fp32"].operations
    assert 3 * block <= work["a8w8"].weight_bytes - work["a8w8"].head_bytes < 1.1 * 3 * block


def test_prefill_runs_the_head_once(tiny_model):
    engine = Engine.load(tiny_model, "fp32", ops="reference")
    one, many = prefill_work(engine, 1), prefill_work(engine, 100)
    assert many.operations == pytest.approx(100 * one.operations - 99 * 2 * 256 * 64, rel=0.25)
    assert many.weight_bytes == one.weight_bytes


def test_bf16_products_count_against_their_own_ceiling() -> None:
    work = replace(WORK, bf16_operations=1.5e8)
    assert work.compute_s(CEILINGS) == WORK.compute_s(CEILINGS)  # none was measured: as float32
    faster = replace(CEILINGS, bf16_gop_per_s=300)
    assert work.compute_s(faster) == pytest.approx(0.5e8 / 100e9 + 1.5e8 / 300e9)


def test_floats_as_digits_count_three_times_against_the_int8_ceiling() -> None:
    work = replace(WORK, digit_operations=1.5e8)
    threefold = 3 * 1.5e8 / (CEILINGS.int8_gop_per_s * 1e9)
    assert work.compute_s(CEILINGS) == pytest.approx(WORK.compute_s(CEILINGS) - 1.5e8 / 100e9 + threefold)


def test_weight_only_int8_multiplies_digits(tiny_model):
    work = step_work(Engine.load(tiny_model, "weight_only_int8"), 2, 8)
    assert work.digit_operations == step_work(Engine.load(tiny_model, "a8w8"), 2, 8).int8_operations > 0
