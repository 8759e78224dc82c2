"""A recipe's mistakes: each message, its line, and that all come at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantbench.errors import RecipeError
from quantbench.recipes.load import load_recipe

EXAMPLE = """\
model: demo:smollm2                 # a HF directory, a hub name, a GGUF file, or a demo name
modes: [bf16, a8w8, a8w8c8]         # one pass of statistics, every mode side by side
calibration: {data: demo:wikipedia, samples: 64, length: 256, seed: 0}
weights: {granularity: channel, observer: absmax}
activations: {dynamic: false, observer: absmax}
cache_kv: {granularity: head, observer: absmax}
transforms: [{smooth: {alpha: 0.5}}]
method: rtn
rules:
  - {match: "lm_head", mode: bf16}
  - {match: "*.layers.11.mlp.down_proj", activations: {dynamic: true}}
accuracy:
  perplexity: [{data: demo:wikipedia-heldout, tokens: 20440, context: 512}]
throughput: {batches: [1, 8, 32], prompt: 128, output: 64}
gates: {perplexity_increase: 5%, decode_speedup: 1.2}
output: runs/demo
"""

Problems = Callable[..., tuple[str, ...]]


def test_the_example_of_the_design_loads() -> None:
    recipe = load_recipe(EXAMPLE)
    assert [v.name for v in recipe.modes] == ["bf16", "a8w8", "a8w8c8"]
    assert recipe.transforms[0].smooth is not None
    assert recipe.transforms[0].smooth.alpha == 0.5
    assert recipe.rules[1].activations is not None
    assert recipe.rules[1].activations.dynamic is True
    assert recipe.gate_limits()["a8w8"] == {"perplexity_increase": 0.05, "decode_speedup": 1.2}
    assert "bf16" not in recipe.gate_limits()
    assert recipe.accuracy.divergence is not None
    assert recipe.accuracy.divergence.data == "demo:wikipedia-heldout"


def test_a_model_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\n")
    recipe = load_recipe(path)
    assert recipe.output == "runs/mine"
    assert [v.mode for v in recipe.modes] == ["a8w8"]
    assert recipe == load_recipe("model: m\n", ["output=runs/mine"])


def test_three_mistakes_are_three_lines(tmp_path: Path) -> None:
    path = tmp_path / "w4.yaml"
    path.write_text("model: m\nweights:\n  format: int5\nmodes: [a8w9]\ncalibration: {samples: 0}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.exit_code == 2
    first, second, third = str(caught.value).splitlines()
    assert first.startswith(f"{path}:3: weights.format: unknown key 'format'. ")
    assert second.startswith(f"{path}:4: modes[0].mode: unknown mode 'a8w9'. Did you mean a8w8? Known: a8w8, ")
    assert third == f"{path}:5: calibration.samples: must be at least 1, got 0"


def test_contradictions_join_the_mistakes_of_other_sections(problems_of: Problems) -> None:
    found = problems_of("rules: [{match: x, mode: float, variants: [a8w9]}]\nthroughput: {rounds: 0}")
    assert len(found) == 2
    assert found[0].startswith("recipe:2: rules[0].variants[0]: unknown variant 'a8w9'. Did you mean a8w8?")
    assert found[1] == "recipe:3: throughput.rounds: must be at least 1, got 0"


CASES = {
    "modell: x": "recipe:2: modell: unknown key 'modell'. Did you mean model? Known: accuracy, ",
    "weights: {granularity: chanel}": (
        "recipe:2: weights.granularity: unknown granularity 'chanel'. Did you mean channel? "
        "Known: auto, block, channel, group, tensor"
    ),
    "weights: {observer: absmx}": (
        "recipe:2: weights.observer: unknown weight observer 'absmx'. Did you mean absmax? Known: absmax, mse"
    ),
    "weights: {group_size: 48}": "recipe:2: weights.group_size: 48 is not a group size. Allowed: 32, 64, 128",
    "weights: {group_size: '64'}": "recipe:2: weights.group_size: expected a whole number, got '64'",
    "weights: {symmetric: 1}": "recipe:2: weights.symmetric: expected true or false, got 1",
    "weights: 3": ("recipe:2: weights: expected a mapping, got 3. Keys: granularity, group_size, symmetric, observer"),
    "weights:": "recipe:2: weights: expected a mapping, got nothing. Keys: granularity, ",
    "activations: {observer: kll}": (
        "recipe:2: activations.observer: unknown observer 'kll'. Did you mean kl? "
        "Known: absmax, avg, ema, kl, mse, paddleslim:<name>, percentile"
    ),
    "activations: {observer: {percentile: 40}}": (
        "recipe:2: activations.observer: a percentile lies between 50 and 100, got 40"
    ),
    "activations: {observer: {percentile: high}}": (
        "recipe:2: activations.observer: a percentile lies between 50 and 100, got high"
    ),
    "activations: {observer: {mse: 3}}": (
        "recipe:2: activations.observer: only `{percentile: 99.99}` takes a number; the others are plain words"
    ),
    "activations: {observer: 'paddleslim:'}": (
        "recipe:2: activations.observer: 'paddleslim:' lacks PaddleSlim's observer. Write for example paddleslim:hist"
    ),
    "activations: {observer: 3}": "recipe:2: activations.observer: expected text, got 3",
    "cache_kv: {granularity: tensor}": "recipe:2: cache_kv.granularity: unknown granularity 'tensor'. Known: head",
    "calibration: {length: 1.5}": "recipe:2: calibration.length: expected a whole number, got 1.5",
    "calibration: {packing: off}": "recipe:2: calibration.packing: expected true or false, got 'off'",
    "calibration: {data: [a]}": "recipe:2: calibration.data: expected text, got a list",
    "calibration: {chat_template: yes}": (
        "recipe:2: calibration.chat_template: unknown chat_template 'yes'. Known: auto, off, on"
    ),
    "calibration: {inputs: quantised}": (
        "recipe:2: calibration.inputs: unknown inputs 'quantised'. Did you mean quantized? Known: float, quantized"
    ),
    "calibration: {spill_above: 3 parsecs}": (
        "recipe:2: calibration.spill_above: expected a size such as 512MiB or 1GiB, got '3 parsecs'. Units: B, KiB,"
    ),
    "calibration: {seed: true}": "recipe:2: calibration.seed: expected a whole number, got true",
    "transforms: [{smoth: {}}]": (
        "recipe:2: transforms[0].smoth: unknown transform 'smoth'. Did you mean smooth? Known: "
    ),
    "transforms: [{shift: {targets: [mlp_in]}}]": (
        "recipe:2: transforms[0].shift.targets[0]: mlp_in cannot be shifted: an RMS norm has no bias that could carry "
        "the shift. Only o_in can, through v_proj's bias"
    ),
    "transforms: [{shift: {targets: [down_in]}}]": (
        "recipe:2: transforms[0].shift.targets[0]: down_in cannot be shifted: a constant does not pass SwiGLU's product"
    ),
    "transforms: [{shift: {by: ema}}]": "recipe:2: transforms[0].shift.by: unknown middle 'ema'. Did you mean mean?",
    "transforms: [slide]": "recipe:2: transforms[0]: unknown transform 'slide'. Known: ",
    "transforms: [{smooth: {}, awq: {}}]": "recipe:2: transforms[0]: one transform per list item, for example ",
    "transforms: [{smooth: {alpha: 1.5}}]": (
        "recipe:2: transforms[0].smooth.alpha: 1.5 is not between 0 (leave activations alone) and 1 (move all of it)"
    ),
    "transforms: [{smooth: {alpha: .nan}}]": "recipe:2: transforms[0].smooth.alpha: nan is not between 0 (leave",
    "transforms: [{smooth: {alpha: searched}}]": (
        "recipe:2: transforms[0].smooth.alpha: expected a number from 0 to 1, or search, got 'searched'"
    ),
    "transforms: [{smooth: {targets: [qkv]}}]": (
        "recipe:2: transforms[0].smooth.targets[0]: unknown smooth target 'qkv'. Known: attn_in, down_in, mlp_in, o_in"
    ),
    "transforms: [{smooth: {targets: []}}]": "recipe:2: transforms[0].smooth.targets: must not be empty",
    "transforms: [{piecewise: {alpha: [0.8, 0.2]}}]": (
        "recipe:2: transforms[0].piecewise.alpha: expected [low, high] between 0 and 1, got [0.8, 0.2]"
    ),
    "transforms: [{piecewise: {scale: 3}}]": (
        "recipe:2: transforms[0].piecewise.scale: expected [low, high] between 0.1 and 100, got 3"
    ),
    "transforms: smooth": "recipe:2: transforms: expected a list, got 'smooth'",
    "method: {gptq: {group: 64}}": "recipe:2: method.gptq.group: unknown key 'group'. Known: act_order, damping",
    "method: {gptq: {damping: -1}}": (
        "recipe:2: method.gptq.damping: expected a positive number or a list of them, such as [0.01, 0.1, 1], got -1"
    ),
    "method: {gptq: {}, rtn: {}}": ("recipe:2: method: one method, for example `rtn` or `{gptq: {act_order: true}}`"),
    "method: rtm": "recipe:2: method: unknown method 'rtm'. Did you mean rtn? Known: gptq, rtn",
    "method: {rtm: {}}": "recipe:2: method.rtm: unknown method 'rtm'. Did you mean rtn? Known: gptq, rtn",
    "method: 3": "recipe:2: method: expected a mapping, got 3. Keys: rtn, gptq",
    "modes: []": "recipe:2: modes: must not be empty",
    "modes: [{name: x}]": "recipe:2: modes[0].mode: required: What is quantized, and to what.",
    "modes: [{name: ../x, mode: a8w8}]": (
        "recipe:2: modes[0].name: '../x' names a folder: letters, digits, '.', '_', '+' and '-' only, 64 at most"
    ),
    "modes: [a8w8, {name: A8W8, mode: a8w8}]": "recipe:2: modes: the name A8W8, a8w8 is listed more than once. Give ",
    "modes: [a8w8, a8w8]": "recipe:2: modes: the name a8w8 is listed more than once. Give one of them",
    "rules: [{mode: float}]": 'recipe:2: rules[0].match: required: Glob over full layer names: "*.layers.11',
    "rules: [{match: '', mode: float}]": "recipe:2: rules[0].match: must not be empty",
    "rules: [{match: x, mode: flaot}]": "recipe:2: rules[0].mode: unknown mode 'flaot'. Did you mean float? Known: ",
    "rules: [{match: x, mode: a8w8c8_dynamic}]": (
        "recipe:2: rules[0].mode: 'a8w8c8_dynamic' also sets the KV cache, which is not per layer: write the part "
        "before c8"
    ),
    "rules: [{match: x, mode: a8w8c8}]": (
        "recipe:2: rules[0].mode: 'a8w8c8' also sets the KV cache, which is not per layer: write the part before c8"
    ),
    "accuracy: {baseline: a8w8}": "recipe:2: accuracy.baseline: unknown baseline 'a8w8'. Known: bf16, fp16, fp32",
    "accuracy: {choices: [{limit: 3}]}": 'recipe:2: accuracy.choices[0].data: required: A .jsonl file of {"question"',
    "accuracy: {choices: [{data: x, limit: some}]}": (
        "recipe:2: accuracy.choices[0].limit: expected a whole number, got 'some'"
    ),
    "throughput: {batches: []}": "recipe:2: throughput.batches: must not be empty",
    "throughput: {batches: [1, 0]}": "recipe:2: throughput.batches[1]: must be at least 1, got 0",
    "throughput: {threads: all}": "recipe:2: throughput.threads: expected a whole number, got 'all'",
    "gates: {perplexity_increas: 5%}": (
        "recipe:2: gates.perplexity_increas: unknown gate 'perplexity_increas'. Did you mean perplexity_increase?"
    ),
    "gates: {kl: 5 %%}": "recipe:2: gates.kl: expected a number or a percentage such as 5%, got '5 %%'",
    "gates: {a8w8: {kll: 1}}": "recipe:2: gates.a8w8.kll: unknown gate 'kll'. Did you mean kl?",
    "gates: {variants: 3}": "recipe:2: gates.variants: expected a mapping, got 3",
    "gates: {top1_agreement: 99}": "recipe:2: gates.top1_agreement: must be at most 1, got 99",
    "dtype: bf16": "recipe:2: dtype: unknown dtype 'bf16'. Did you mean bfloat16? Known: auto, bfloat16, ",
    "output: ''": "recipe:2: output: must not be empty",
}


@pytest.mark.parametrize("text", CASES, ids=lambda t: t[:50])
def test_each_mistake_says_what_where_and_what_is_allowed(text: str, problems_of: Problems) -> None:
    found = problems_of(text)
    assert found[0].startswith(CASES[text])
    assert len(found) == 1


def test_a_recipe_without_a_model_says_what_a_model_is() -> None:
    with pytest.raises(RecipeError, match=r"^recipe:1: model: required: HF directory, hub name, GGUF file,"):
        load_recipe("modes: [a8w8]\n")


def test_words_that_need_no_mapping() -> None:
    recipe = load_recipe("model: m\nmodes: [{mode: a8w8}]\ntransforms: [smooth]\nthroughput: off\nparity: false\n")
    assert recipe.modes[0].name == "a8w8"
    assert recipe.transforms[0].smooth is not None
    assert recipe.throughput is None
    assert recipe.parity is None
    recipe = load_recipe(
        "model: m\naccuracy: {divergence: off}\ncalibration: {chat_template: on, spill_above: 1.5KiB}\n"
    )
    assert recipe.accuracy.divergence is None
    assert recipe.calibration.chat_template == "on"
    assert recipe.calibration.spill_above == 1536


def test_a_percentile_is_kept_as_one_word() -> None:
    recipe = load_recipe("model: m\nactivations: {observer: {percentile: 99.9}}\ncache_kv: {observer: percentile}\n")
    assert recipe.activations.observer == "percentile=99.9"
    assert recipe.cache_kv.observer == "percentile"


def test_divergence_is_measured_on_the_first_text_unless_told_otherwise() -> None:
    recipe = load_recipe("model: m\naccuracy: {perplexity: [{data: a.txt, context: 64}], divergence: {tokens: 100}}\n")
    assert recipe.accuracy.divergence is not None
    assert recipe.accuracy.divergence.model_dump() == {"data": "a.txt", "tokens": 100, "context": 64}
    recipe = load_recipe("model: m\naccuracy: {perplexity: [{data: a.txt}], divergence: {data: b.txt}}\n")
    assert recipe.accuracy.divergence is not None
    assert recipe.accuracy.divergence.data == "b.txt"


def test_gates_of_a_variant_win_over_the_general_ones() -> None:
    recipe = load_recipe("model: m\nmodes: [bf16, a8w8, a8w8c8]\ngates: {kl: 0.1, a8w8: {kl: 20%}, bf16: {kl: 1e-3}}\n")
    assert recipe.gate_limits() == {"bf16": {"kl": 0.001}, "a8w8": {"kl": 0.2}, "a8w8c8": {"kl": 0.1}}


def test_a_missing_file_lists_the_bundled_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"dmo: no such file, and unknown bundled recipe 'dmo'. Did you mean demo\?"):
        load_recipe("dmo")
    (tmp_path / "x.yaml").write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(RecipeError, match=r"x.yaml: cannot be read as a recipe: it is not UTF-8 text"):
        load_recipe(tmp_path / "x.yaml")
    with pytest.raises(RecipeError, match=r"cannot be read as a recipe: Is a directory"):
        load_recipe(tmp_path)
