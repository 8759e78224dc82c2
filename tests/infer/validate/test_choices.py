import json

import numpy as np
import pytest

from quantbench.errors import DataError, RequestError
from quantbench.infer.validate.accuracy import AccuracyTasks, evaluate_accuracy
from quantbench.infer.validate.choices import ChoiceSet, Question, answer_questions, load_choices
from quantbench.infer.validate.likelihood import token_nll


class Letters:
    """One token per character."""

    def encode(self, text):
        return [ord(c) % 128 for c in text]


class Constant:
    """A model that always gives token t the log-probability weights[t], whatever came before."""

    def __init__(self, weights):
        self.logits = np.log(np.asarray(weights, np.float64) / np.sum(weights)).astype(np.float32)

    def score(self, ids):
        return np.tile(self.logits, (len(ids), 1))

    def likelihood(self, ids):
        return -token_nll(self.score(ids), ids)


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_questions_are_read_with_answers_by_index_or_text(tmp_path):
    rows = [{"question": "a? ", "choices": ["xy", " é"], "answer": i} for i in (1, "xy")]
    got = load_choices(write(tmp_path / "q.jsonl", rows[0], "", rows[1]), Letters())
    assert got.name == "q.jsonl"
    assert [q.answer for q in got.questions] == [1, 0]
    assert got.questions[0].context == tuple(b"a?")
    assert got.questions[0].choices[0] == tuple(b" xy")
    assert got.questions[0].lengths == (2, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON: "),
        ("[1]", "not a JSON object; write {question, choices, answer}"),
        ({"question": "a"}, "choices is missing"),
        (
            {"question": "a", "choices": ["b", "c"], "answer": 0, "hint": 1},
            "unknown key 'hint'; allowed: question, choices",
        ),
        ({"question": " ", "choices": ["b", "c"], "answer": 0}, "question must be a text that is not empty"),
        ({"question": "a", "choices": ["b"], "answer": 0}, "choices must be a list of at least 2 texts"),
        ({"question": "a", "choices": ["b", "b"], "answer": 0}, "choices must differ from each other"),
        (
            {"question": "a", "choices": ["b", "c"], "answer": 2},
            "answer 2 is neither an index 0 to 1 nor one of the choices",
        ),
        ({"question": "a", "choices": ["b", "c"], "answer": True}, "answer True is neither"),
        ({"question": "a", "choices": ["b", "c"], "answer": "d"}, "answer 'd' is neither"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "q.jsonl", {"question": "a", "choices": ["b", "c"], "answer": 0}, row)
    with pytest.raises(DataError) as error:
        load_choices(path, Letters())
    assert any(p.startswith(f"{path}:2: {message}") for p in error.value.problems), error.value.problems


def test_all_bad_lines_are_listed_at_once(tmp_path):
    with pytest.raises(DataError) as error:
        load_choices(write(tmp_path / "q.jsonl", "{", {"question": "a"}, "7"), Letters())
    assert len(error.value.problems) == 4


def test_a_missing_and_an_empty_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such file; --choices needs a JSONL file"):
        load_choices(tmp_path / "none.jsonl", Letters())
    with pytest.raises(DataError, match="no question in it; write one JSON object a line"):
        load_choices(write(tmp_path / "empty.jsonl", ""), Letters())


@pytest.mark.parametrize(("cut", "message"), [(3, "choice 'b' adds no token"), (0, "question must be a text")])
def test_a_tokenizer_that_loses_text_is_told(tmp_path, cut, message):
    class Lossy:
        def encode(self, text):
            return list(range(min(len(text), cut)))

    row = {"question": "abc", "choices": ["b", "c"], "answer": 0}
    with pytest.raises(DataError, match=message):
        load_choices(write(tmp_path / "q.jsonl", row), Lossy())


def test_sum_prefers_short_choices_and_length_normalisation_does_not():
    model = Constant([0.5, 0.3, 0.2])
    question = Question(context=(0,), choices=((2,), (1, 1)), lengths=(1, 2), answer=1)
    answers = answer_questions(model, [question])  # log 0.2 = -1.61 against 2 log 0.3 = -2.41, per byte -1.20
    assert (answers.by_sum[0], answers.by_length[0]) == (0.0, 1.0)


def test_likelihood_counts_every_token_of_the_choice_and_none_of_the_context():
    model = Constant([0.1, 0.2, 0.3, 0.4])
    answers = answer_questions(model, [Question((3, 3, 3), ((2, 2), (3, 0)), (1, 1), 0)])
    assert answers.by_sum[0] == 1.0  # 0.09 against 0.04


def test_deltas_are_paired(tmp_path):
    good, bad = Constant([0.1, 0.6, 0.3]), Constant([0.1, 0.3, 0.6])
    right = [Question((0,), ((1,), (2,)), (1, 1), 0) for _ in range(3)]
    wrong = [Question((0,), ((1,), (0,)), (1, 1), 0) for _ in range(5)]
    tasks = AccuracyTasks(choices=[ChoiceSet("q", (*right, *wrong))])
    result = evaluate_accuracy({"fp32": lambda: good, "q": lambda: bad}, "fp32", tasks, tmp_path)["choices"][0]
    assert result["questions"] == 8
    assert result["variants"]["fp32"]["accuracy"] == 1.0
    assert result["variants"]["q"]["delta"] == pytest.approx(-3 / 8)
    low, high = result["variants"]["q"]["delta_interval"]
    assert -1 < low < -3 / 8 < high < 0.0001


def test_questions_that_an_engine_refuses_are_named_with_file_and_line(tmp_path):
    class Short:
        def score(self, ids):
            if len(ids) > 12:
                raise RequestError(f"{len(ids)} tokens; at most 12")
            return np.zeros((len(ids), 128), np.float32)

        def likelihood(self, ids):
            return -token_nll(self.score(ids), ids)

    path = write(
        tmp_path / "q.jsonl",
        {"question": "short?", "choices": ["a", "b"], "answer": 0},
        {"question": "this one is long", "choices": ["a", "bcd"], "answer": 0},
        {"question": "this one is longer still", "choices": ["a", "b"], "answer": 0},
    )
    questions = load_choices(path, Letters()).questions
    with pytest.raises(DataError) as raised:
        answer_questions(Short(), questions)
    assert raised.value.problems == (
        f"{path}:2: 20 tokens with its longest choice: 18 tokens; at most 12",
        f"{path}:3: 26 tokens with its longest choice: 18 tokens; at most 12",
    )
