"""Tasks, rewards and the tokenizer."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import IsthmusError
from isthmus.tasks import Problem, completion_text, countdown, jsonl, split_completion
from isthmus.tasks.countdown import NO_ANSWER, Options
from isthmus.tasks.jsonl import read_file

TASK = countdown.open(Options())
TEXTS = [p.prompt + completion_text(*TASK.worked_example(p, random.Random(i))) for i, p in enumerate(TASK.train)]
TOKENIZER = Tokenizer.train(TEXTS, 512)


def reachable(hand: tuple[int, ...]) -> set[int]:
    """Every target of a hand, by brute force over Python expressions with all steps natural."""
    values = set()
    for a, b, c in itertools.permutations(hand):
        for part in {a + b, a * b, abs(a - b)}:
            values |= {part + c, part * c, abs(part - c)}
    return values


def test_every_solvable_problem_is_there_once_and_split_for_good():
    problems = TASK.train + TASK.heldout
    assert len({problem.id for problem in problems}) == len(problems)
    hands = {problem.facts[:3] for problem in problems}
    for hand in sorted(hands)[::7]:
        targets = {problem.facts[3] for problem in problems if problem.facts[:3] == hand}
        assert targets == {value for value in reachable(hand) if 1 <= value <= TASK.options.largest_target}
    assert len(TASK.heldout) >= 500
    again = countdown.open(Options(largest=7))
    assert {p.id for p in again.heldout} <= {p.id for p in TASK.heldout}


@pytest.mark.parametrize("problem", TASK.train[::40], ids=lambda p: p.id)
def test_the_teacher_works_out_every_line_and_marks_only_hits(problem):
    thought, answer = TASK.worked_example(problem, random.Random(problem.id))
    target = problem.facts[-1]
    for line in thought.strip().splitlines():
        if line == "give up":
            assert answer == NO_ANSWER and line == thought.strip().splitlines()[-1]
            continue
        steps, _, mark = line.partition(f" vs {target} ")
        first, second = steps.split(", ")
        for step in (first, second):
            left, _, right = step.partition(" = ")
            assert eval(left) == int(right)
        assert (mark == "✓") == (int(second.partition(" = ")[2]) == target)
    assert TASK.accuracy(problem, completion_text(thought, answer)) == float(answer != NO_ANSWER)
    assert TASK.accuracy(problem, completion_text("", problem.answer)) == 1.0


def test_the_teacher_is_as_impatient_as_the_recipe_says():
    task = countdown.open(Options(teacher_patient=0.0, teacher_hit=0.0, teacher_give_up=0.3))
    gives_up = misses = 0
    for index, problem in enumerate(task.train * 3):
        thought, _ = task.worked_example(problem, random.Random(index))
        misses += thought.count("✗")
        gives_up += thought.count("give up")
    assert gives_up / misses == pytest.approx(0.3, abs=0.03)
    on_purpose = countdown.open(Options(teacher_patient=0.0, teacher_hit=1.0))
    assert all("✗" not in on_purpose.worked_example(p, random.Random(0))[0] for p in on_purpose.train[::20])
    patient = countdown.open(Options(teacher_patient=1.0))
    assert all("give up" not in patient.worked_example(p, random.Random(0))[0] for p in patient.train[::20])


@pytest.mark.parametrize(
    ("answer", "accuracy", "form"),
    [
        ("(3*7)+1", 1.0, 1.0),
        ("1+7*3", 1.0, 1.0),
        ("22", 0.0, 1.0),
        ("3*7+1+0", 0.0, 1.0),
        ("7*3*1", 0.0, 1.0),
        ("(1-7)*3", 0.0, 1.0),
        ("none", 0.0, 1.0),
        ("__import__('os')", 0.0, 0.0),
        ("3**7", 0.0, 0.0),
        ("22/1", 0.0, 0.0),
        ("True*22", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("(" * 40 + "1", 0.0, 0.0),
        ("3*7+0x1", 0.0, 0.0),
        ("3*7+0_1", 0.0, 0.0),
    ],
)
def test_countdown_reward(answer, accuracy, form):
    problem = Problem("p", "Make 22 from 1 3 7.", "(3*7)+1", (1, 3, 7, 22))
    completion = completion_text("3*7=21 21+1=22 ✓\n", answer)
    assert (TASK.accuracy(problem, completion), TASK.well_formed(problem, completion)) == (accuracy, bool(form))


def test_a_completion_that_never_closes_its_thinking_earns_nothing():
    problem = Problem("p", "", "", (1, 3, 7, 22))
    for text in ("(3*7)+1", "a</think>b</think>(3*7)+1", "a</think><think>(3*7)+1"):
        assert (TASK.accuracy(problem, text), TASK.well_formed(problem, text)) == (0.0, False)
    assert split_completion("why\n</think>\n\n 42 ") == ("why\n", "42")


@given(st.text(max_size=80))
def test_tokenizer_round_trips_any_text(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special=False) == text


def test_tokenizer_template_and_numbers(tmp_path):
    ids = TOKENIZER.chat([{"role": "user", "content": "Make 22 from 1 3 7."}])
    assert (
        TOKENIZER.decode(ids, skip_special=False)
        == "<｜begin▁of▁sentence｜><｜User｜>Make 22 from 1 3 7.<｜Assistant｜><think>\n"
    )
    assert ids[0] == TOKENIZER.bos_id
    assert len(TOKENIZER.encode(" 22")) == len(TOKENIZER.encode(" 36")) == 1
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "secret</think>\n\nshown"},
        {"role": "user", "content": "b"},
    ]
    text = TOKENIZER.decode(TOKENIZER.chat(history), skip_special=False)
    assert "secret" not in text and "shown<｜end▁of▁sentence｜>" in text
    with pytest.raises(IsthmusError, match="unknown role tool"):
        TOKENIZER.chat([{"role": "tool", "content": ""}])


def test_saved_tokenizer_is_the_one_transformers_loads(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save(tmp_path)
    messages = [{"role": "user", "content": "Make 22 from 1 3 7."}]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, add_generation_prompt=True)
    theirs = theirs["input_ids"] if not isinstance(theirs, list) else theirs
    assert list(theirs) == TOKENIZER.chat(messages) == Tokenizer.load(tmp_path).chat(messages)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be an object"),
        ('{"prompt": "a"}', "'answer' must be"),
        ('{"prompt": "a", "answer": 3}', "'answer' must be"),
        ('{"prompt": "a", "answer": "b", "thougth": ""}', "unknown key 'thougth'"),
        ('{"prompt": "a", "answer": "b", "thought": 1}', "'thought' must be a text"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n\n" + line + "\n")
    with pytest.raises(IsthmusError, match="mine.jsonl:3: .*" + message):
        read_file(path)


def test_jsonl_refuses_held_out_prompts_that_are_trained_on(tmp_path):
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    options = jsonl.Options(train_file=tmp_path / "train.jsonl", heldout_file=tmp_path / "heldout.jsonl")
    with pytest.raises(IsthmusError, match="also in"):
        jsonl.open(options)
