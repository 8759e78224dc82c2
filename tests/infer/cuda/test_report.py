from __future__ import annotations

import pytest

from quantbench.infer.cuda import report
from quantbench.infer.cuda.compile import KERNELS
from quantbench.infer.cuda.report import Report, Special, compile_all, lines, specials


def test_every_source_is_asked_for_by_some_step() -> None:
    asked = {special.file for special in specials("sm_90a") + specials("sm_80")}
    assert asked == {path.name for path in KERNELS.glob("*.cu")}


def test_hoppers_own_kernels_are_asked_for_on_hopper_alone() -> None:
    assert "wgmma.cu" in {special.file for special in specials("sm_90a")}
    assert "wgmma.cu" not in {special.file for special in specials("sm_80") + specials("sm_120")}


def test_a_report_tells_registers_spills_and_what_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Special("step.cu", (("advance", 42),))
    monkeypatch.setattr(report, "specials", lambda arch: [Special("step.cu", ()), wrong])
    found = compile_all(("sm_80", "sm_90a"))
    assert set(found.usages["advance step.cu"]) == {"sm_80", "sm_90a"}
    assert len(found.problems) == 2
    text = "\n".join(lines(found))
    assert "advance step.cu" in text
    assert "step.cu does not compile for sm_80" in text


def test_spilled_bytes_stand_behind_a_plus() -> None:
    shown = list(lines(Report({"k k.cu": {"sm_80": [255, 16], "sm_90a": [40, 0]}}, [])))
    assert shown[1].split() == ["255+16", "-", "-", "40", "-", "-", "k", "k.cu"]
