import pytest

from quantbench.errors import RecipeError
from quantbench.infer.validate.gates import GATES, evaluate_gates

ACCURACY = {
    "baseline": "fp32",
    "perplexity": [
        {"data": "a", "variants": {"q": {"increase": 0.01, "increase_interval": [0.005, 0.015]}}},
        {"data": "b", "variants": {"q": {"increase": 0.03, "increase_interval": [0.018, 0.04]}}},
    ],
    "divergence": [
        {"data": "a", "variants": {"q": {"kl": 0.02, "kl_interval": None, "top1": 0.9, "top1_interval": [0.88, 0.92]}}}
    ],
    "choices": [
        {"data": "x", "variants": {"q": {"delta": -0.02, "delta_interval": [-0.05, 0.01]}}},
        {"data": "y", "variants": {"q": {"delta": 0.01, "delta_interval": [0.0, 0.02]}}},
    ],
}
SPEEDUP = {"median": 1.3, "min": 1.1, "max": 1.4}
THROUGHPUT = {
    "baseline": "fp32",
    "variants": {
        "fp32": {"checkpoint_bytes": 800},
        "q": {
            "prefill": {"speedup": SPEEDUP | {"median": 2.0}},
            "decode": {"8": {"speedup": SPEEDUP | {"median": 0.5}}, "2": {"speedup": SPEEDUP}},
        },
    },
}
PARITY = {"variants": {"q": {"top1_served_simulated": 0.999, "kl_served_simulated": 1e-5}}}
SIZES = {"fp32": 1000, "q": 250}


def judge(gate, limit, variant="q", sizes=SIZES):
    return evaluate_gates({variant: {gate: limit}}, ACCURACY, THROUGHPUT, PARITY, sizes)


@pytest.mark.parametrize(
    ("gate", "value", "good", "bad"),
    [
        ("perplexity_increase", 0.03, 0.03, 0.0299),
        ("kl", 0.02, 0.02, 0.01),
        ("top1_agreement", 0.9, 0.9, 0.91),
        ("choices_drop", 0.02, 0.02, 0.01),
        ("decode_speedup", 1.3, 1.3, 1.31),
        ("prefill_speedup", 2.0, 1.5, 2.01),
        ("checkpoint_ratio", 0.25, 0.25, 0.24),
        ("parity_top1", 0.999, 0.998, 0.9999),
        ("parity_kl", 1e-5, 1e-4, 1e-6),
    ],
)
def test_every_gate_reads_its_value_and_knows_its_good_side(gate, value, good, bad):
    (passed,), (failed,) = judge(gate, good), judge(gate, bad)
    assert (passed.value, passed.passed) == (pytest.approx(value), True)
    assert (failed.value, failed.passed) == (pytest.approx(value), False)
    assert "meets the limit" in passed.sentence
    assert "misses the limit" in failed.sentence


def test_all_gates_are_tested_here():
    assert len(GATES) == 9


def test_sentences_say_what_where_and_how_sure():
    assert [r.sentence for r in judge("perplexity_increase", 0.02)] == [
        "q: perplexity_increase +3.00% on b [+1.80%, +4.00%] misses the limit of at most +2.00%; "
        "the interval holds the limit, so more data could turn it"
    ]
    assert judge("decode_speedup", 1.5)[0].sentence == (
        "q: decode_speedup 1.30 at batch 2 [1.10, 1.40] misses the limit of at least 1.50"
    )
    assert judge("kl", 0.1)[0].sentence == "q: kl 0.02000 on a meets the limit of at most 0.10000"
    assert judge("choices_drop", 0.03)[0].interval == (-0.01, 0.05)


def test_a_size_is_held_against_the_given_float_size_or_the_measured_one():
    assert judge("checkpoint_ratio", 1, sizes={"q": 400})[0].value == 0.5
    with pytest.raises(RecipeError, match="checkpoint_ratio of q was not measured"):
        evaluate_gates({"q": {"checkpoint_ratio": 1}}, ACCURACY, sizes={"q": 400})


def test_the_baseline_is_held_against_nothing():
    assert judge("perplexity_increase", 0.0, variant="fp32") == []


def test_unmeasured_and_unknown_gates_are_all_listed_at_once():
    with pytest.raises(RecipeError) as error:
        evaluate_gates({"q": {"kl": 0.1, "parity_kl": 1, "perplexity_rise": 1, "decode_speedup": 1}}, ACCURACY)
    assert error.value.problems == (
        "gates: parity_kl of q was not measured; it needs parity for q and the baseline. Measure it or remove the gate",
        f"gates: unknown gate 'perplexity_rise'. Did you mean perplexity_increase? Known: {', '.join(sorted(GATES))}",
        "gates: decode_speedup of q was not measured; it needs throughput for q and the baseline. "
        "Measure it or remove the gate",
    )
