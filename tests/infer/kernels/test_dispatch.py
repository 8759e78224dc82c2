"""Which instruction set runs is a function of the processor's features and of what is asked for, and is explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantbench.infer.ops.cpu import available_isas, explain_isa, load_kernels

AVX2 = ["avx2", "fma", "f16c"]
AVX512 = [*AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"]
BF16 = [*AVX512, "avx512_bf16", "avx512vbmi"]
AMX = [*BF16, "amx_tile", "amx_int8", "amx_bf16"]


def built() -> list[str]:
    return [name for name, _, _ in load_kernels().explain([])]


def chosen(features: list[str], wanted: str = "") -> str:
    return next(name for name, _, runs in load_kernels().explain(features, wanted) if runs)


def test_nothing_is_needed_for_the_generic_kernels() -> None:
    assert chosen([]) == "generic"
    assert chosen(["sse2", "popcnt"]) == "generic"


@pytest.mark.parametrize(
    ("isa", "features"),
    [
        ("avx2", AVX2), ("avxvnni", [*AVX2, "avx_vnni"]), ("avx512vnni", AVX512),
        ("avx512bf16", [*BF16, "avx_vnni", "fast_avx512_bf16"]), ("amx", AMX),
    ],
)  # fmt: skip
def test_the_best_of_what_the_features_allow(isa: str, features: list[str]) -> None:
    if isa not in built():
        pytest.skip(f"this compiler built no kernels for {isa}: runs with a newer one, and with CI's")
    assert chosen(features) == chosen(features, "auto") == chosen(features[::-1]) == isa
    assert chosen(features, "generic") == "generic"
    lacking = {name: missing for name, missing, _ in load_kernels().explain(features[:-1])}
    assert lacking[isa] == [features[-1]]


def test_bf16_where_it_is_slower_than_float32() -> None:
    if "avx512vnni" not in built():
        pytest.skip("runs on x86-64, as in CI: elsewhere there are no kernels to choose from")
    assert chosen(BF16) == "avx512vnni"


def test_what_is_missing_is_said() -> None:
    choices = {name: missing for name, missing, _ in load_kernels().explain(AVX2)}
    assert choices["generic"] == []
    if "avx512vnni" in choices:
        assert choices["avx512vnni"] == ["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"]


def test_one_that_is_not_to_be_had() -> None:
    with pytest.raises(ValueError, match="instruction set 'amx' is not one this processor has: generic"):
        load_kernels().explain([], "amx")


def test_features_are_those_that_the_system_lists() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    found = [name for name in load_kernels().features() if name != "fast_avx512_bf16"]
    assert len(set(found)) == len(found)
    if not cpuinfo.exists() or "flags" not in cpuinfo.read_text():
        pytest.skip("runs on x86-64 Linux, as in CI: there is no list of processor flags here")
    listed = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split()
    assert set(found) <= set(listed)
    assert set(found) >= {flag for flag in AMX if flag in listed and not flag.startswith("amx")}


def test_the_explanation_of_this_machine() -> None:
    text = explain_isa()
    assert f"{available_isas()[-1]}: in use" in text
    for name, missing, _ in load_kernels().explain():
        assert f"{name}: " in text
        assert not missing or f"{name}: this processor lacks {', '.join(missing)}" in text
    assert "generic: in use" in explain_isa("generic")
