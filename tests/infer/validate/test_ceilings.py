import pytest

from quantbench.errors import DependencyError
from quantbench.infer.validate.ceilings import best_seconds, measure_ceilings


def test_the_numpy_column_is_measured_through_numpy():
    found = measure_ceilings("reference")
    assert 0.5 < found.read_gb_per_s < 2000
    assert 0.5 < found.float32_gop_per_s < 100_000
    assert found.int8_gop_per_s == found.float32_gop_per_s


def test_the_native_kernels_measure_themselves():
    one = measure_ceilings("cpu", threads=1)
    assert 0.5 < one.read_gb_per_s < 2000
    assert 0.5 < one.float32_gop_per_s < 100_000
    assert 0.5 < one.int8_gop_per_s < 1_000_000


def test_the_shortest_run_counts_and_the_first_does_not():
    calls = []
    assert best_seconds(lambda: calls.append(1), rounds=3) < 0.01
    assert len(calls) == 4


def test_an_unknown_op_table():
    with pytest.raises(DependencyError, match=r"unknown operations backend 'gpu'\. .*Known: cpu, cuda, reference"):
        measure_ceilings("gpu")
