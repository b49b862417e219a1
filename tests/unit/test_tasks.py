"""Kinds of tasks: data in the shapes that people have, mixtures, libraries of problems, and workers that may hang."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import reasoning_gym
from pyarrow import Table, parquet
from pydantic import TypeAdapter

from isthmus.errors import IsthmusError
from isthmus.rewards import reward_kinds
from isthmus.tasks import (
    Mixture,
    Problem,
    completion_text,
    countdown,
    jsonl,
    open_task,
    seeded,
    task_kinds,
    task_options,
    task_options_class,
)
from isthmus.tasks.parts.languages import language_of, share_in
from isthmus.tasks.parts.worker import Worker, WorkerFailed
from tests.support import slow_work

VERIFIERS_LIKE = Path(__file__).parents[1] / "support" / "verifiers_like"
USER = {"role": "user", "content": "What is 2 + 3?"}
PARTS = ("train", "heldout")
SYSTEM = {"role": "system", "content": "Be short."}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [USER],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "5"},
    "extra_info": {"split": "train", "index": 0},
}


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "shape", "expected"),
    [
        ({"prompt": "a", "answer": "b"}, "ours", ("a", "b", "", [{"role": "user", "content": "a"}])),
        ({"prompt": "a", "answer": "b", "thought": "t"}, "ours", ("a", "b", "t", None)),
        (VERL, "verl", ("What is 2 + 3?", "5", "", [USER])),
        ({**VERL, "prompt": [SYSTEM, USER]}, "verl", ("What is 2 + 3?", "5", "", [SYSTEM, USER])),
        ({"prompt": [USER], "solution": 5}, "TRL", ("What is 2 + 3?", "5", "", [USER])),
        ({"prompt": "What?", "ground_truth": "x", "level": 3}, "TRL", ("What?", "x", "", None)),
        ({"prompt": "What?", "completion": "t</think>\n\nx"}, "TRL", ("What?", "x", "t", None)),
        ({"prompt": [USER]}, "TRL", (USER["content"], "", "", [USER])),
        ({"messages": [USER, {"role": "assistant", "content": "5"}]}, "messages", (USER["content"], "5", "", [USER])),
        (
            {"messages": [SYSTEM, USER, {"role": "assistant", "content": "<think>\nadd\n</think>\n\n5"}]},
            "messages",
            (USER["content"], "5", "add\n", [SYSTEM, USER]),
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "five", "reasoning_content": "add"}], "answer": "5"},
            "messages",
            (USER["content"], "5", "add", [USER]),
        ),
    ],
)
def test_rows_are_read_in_the_shapes_that_people_have(tmp_path, row, shape, expected):
    read = jsonl.read_file(written(tmp_path / "mine.jsonl", row))
    (problem,) = read.problems
    prompt, answer, thought, conversation = expected
    assert read.shape == shape and f"mine.jsonl: 1 problems in the shape of {shape}" == read.about
    assert (problem.prompt, problem.answer, problem.thought) == (prompt, answer, thought)
    assert conversation is None or problem.conversation == conversation
    stored = TypeAdapter(Problem)
    assert stored.validate_json(stored.dump_json(problem)) == problem


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], r":1: its columns are 'text'; known are `prompt` with `answer`"),
        ([{"prompt": "a", "answer": "b"}, {"prompt": "a", "reward_model": {}}], r":2: 'answer' must be"),
        ([{"prompt": "a", "thougth": "b"}], r":1: unknown key 'thougth'; did you mean 'thought'"),
        ([VERL, {**VERL, "reward_model": {"style": "model"}}], r":2: reward_model.style is 'model'"),
        ([{**VERL, "reward_model": {"ground_truth": {"a": 1}}}], r":1: 'reward_model.ground_truth' must be a text"),
        ([{**VERL, "prompt": "a text"}], r":1: 'prompt' must be a list of messages"),
        ([{**VERL, "prompt": [{"role": "tool", "content": "x"}]}], r":1: 'prompt' calls tools"),
        ([{"messages": [USER, {"role": "assistant", "content": "5</think>a</think>b"}]}], r":1: the thinking"),
        ([{"messages": [{"role": "assistant", "content": "5"}]}], r":1: 'messages' has an answer and no question"),
        ([{"messages": [SYSTEM]}], r":1: the conversation ends with 'system'"),
        ([{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}], r":1: .*content is no text"),
    ],
)
def test_a_row_of_no_shape_is_refused_with_its_line(tmp_path, rows, message):
    with pytest.raises(IsthmusError, match=rf"mine\.jsonl{message}"):
        jsonl.read_file(written(tmp_path / "mine.jsonl", *rows))


def test_parquet_says_what_json_lines_say(tmp_path):
    rows = [
        {**VERL, "prompt": [{"role": "user", "content": f"What is {n} + 3?"}], "extra_info": {"index": n}}
        for n in range(30)
    ]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "mine.parquet")
    lines = jsonl.read_file(written(tmp_path / "mine.jsonl", *rows))
    assert jsonl.read_file(tmp_path / "mine.parquet").problems == lines.problems
    parquet.write_table(
        Table.from_pylist([{"prompt": "a", "answer": "b"}, {"prompt": "a"}]), tmp_path / "short.parquet"
    )
    with pytest.raises(IsthmusError, match=r"short\.parquet: row 2: 'answer' must be a text"):
        jsonl.read_file(tmp_path / "short.parquet")
    (tmp_path / "no.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(IsthmusError, match=r"no\.parquet cannot be read"):
        jsonl.read_file(tmp_path / "no.parquet")


@pytest.mark.parametrize(
    ("place", "expected", "said", "accuracy"),
    [
        ("boxed", "1/2", r"so it is \boxed{\frac{1}{2}} or \boxed{0.5}", 1.0),
        ("boxed", "1/2", "0.5", 0.0),
        ("tag", "5", "I say <answer>6</answer>, no: <answer> 5 </answer>", 1.0),
        ("hashes", "2 + 3 is five #### 5", "#### 5", 1.0),
        ("hashes", "5", "5", 0.0),
        ("whole", "5", " 5.0 ", 1.0),
    ],
)
def test_an_answer_counts_in_its_place(place, expected, said, accuracy):
    task = jsonl.JsonlTask([], [], place)
    completion = completion_text("", said)
    assert task.accuracy(Problem("x", "x", expected), completion) == accuracy
    assert task.well_formed(Problem("x", "x", expected), completion) == (accuracy == 1.0)
    assert task.accuracy(Problem("x", "x", ""), completion) is None


def test_a_share_of_one_file_is_held_out_and_the_system_message_is_the_recipes(tmp_path):
    path = written(tmp_path / "mine.jsonl", *({"prompt": f"Is {n} even?", "answer": "yes"} for n in range(200)))
    given = {"train_file": path, "heldout_share": 0.3, "system": "Be sure."}
    task = open_task("jsonl", task_options("jsonl", given), "even")
    assert 40 < len(task.heldout) < 80 and len(task.train) + len(task.heldout) == 200
    assert not {one.id for one in task.train} & {one.id for one in task.heldout}
    assert {one.task for one in [*task.train, *task.heldout]} == {"even"}
    assert [one["role"] for one in task.train[0].conversation] == ["system", "user"]
    assert task.train[2:4] == [task.train[2], task.train[3]]
    for wrong in ({"train_file": path}, {**given, "heldout_file": path}):
        with pytest.raises(IsthmusError, match="give heldout_file or heldout_share"):
            task_options("jsonl", wrong, ("tasks", "even"))
    with pytest.raises(IsthmusError, match=r"unknown key tasks\.even\.sytem; did you mean 'system'"):
        task_options("jsonl", {**given, "sytem": ""}, ("tasks", "even"))
    with pytest.raises(IsthmusError, match=r"unknown kind of task 'contdown'; did you mean 'countdown'"):
        task_options("contdown", {})


def test_the_files_of_data_are_the_task_of_a_run(tmp_path):
    files = {f"{part}_file": written(tmp_path / f"{part}.jsonl", {"prompt": part, "answer": "b"}) for part in PARTS}
    task = open_task("jsonl", task_options("jsonl", files), "mine")
    assert [task.train[0].prompt, task.heldout[0].prompt] == list(PARTS)


class Numbered:
    """A task of which only the problems matter."""

    about, heldout = "numbered", ()

    def __init__(self, name: str, count: int):
        self.train = [Problem(f"{name}{n}", "", "", task=name) for n in range(count)]


def test_a_mixture_draws_by_weight_and_one_task_as_if_it_were_alone():
    tasks = {"a": Numbered("a", 50), "b": Numbered("b", 50), "c": Numbered("c", 3)}
    alone = Mixture(tasks, {"a": 1.0, "c": 0.0})
    assert alone.draw(seeded("rl", 7, 3), 40) == seeded("rl", 7, 3).choices(tasks["a"].train, k=40)
    assert list(alone.heldout) == ["a", "c"]
    mixed = Mixture(tasks, {"a": 3.0, "b": 1.0})
    drawn = mixed.draw(seeded("rl", 7, 3), 4000)
    assert drawn == mixed.draw(seeded("rl", 7, 3), 4000) != mixed.draw(seeded("rl", 7, 4), 4000)
    counts = Counter(problem.task for problem in drawn)
    assert counts["a"] / 4000 == pytest.approx(0.75, abs=0.03) and set(counts) == {"a", "b"}
    assert all(mixed.of(problem) is tasks[problem.task] for problem in drawn)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"d": 1.0}, "unknown task 'd'"),
        ({"a": -1.0}, "must be a number that is not negative"),
        ({"a": float("nan")}, "must be a number that is not negative"),
        ({"a": 0.0}, "no task has a weight above 0"),
        ({"empty": 1.0}, "'empty' has no problems to train on"),
    ],
)
def test_weights_that_are_none_are_refused(weights, message):
    with pytest.raises(IsthmusError, match=message):
        Mixture({"a": Numbered("a", 2), "empty": Numbered("empty", 0)}, weights)


def test_a_teacher_that_mixes_writes_some_lines_in_another_script():
    plain, mixing = (countdown.open(countdown.Options(teacher_mixes=share)) for share in (0.0, 0.4))
    problems = mixing.train[::7]
    thoughts = [mixing.worked_example(problem, random.Random(problem.id))[0] for problem in problems]
    shares = [share_in(text, language_of(one.prompt)) for one, text in zip(problems, thoughts, strict=True)]
    assert 0.5 < sum(shares) / len(shares) < 0.75
    for problem in plain.train[::40]:
        thought, answer = plain.worked_example(problem, random.Random(problem.id))
        assert share_in(thought, language_of(problem.prompt)) == 1.0
        assert plain.accuracy(problem, completion_text(thought, answer)) == float(answer != countdown.NO_ANSWER)


def test_reasoning_gym_is_what_the_library_makes_of_seed_and_index():
    given = {"dataset": "basic_arithmetic", "problems": 40, "heldout_problems": 30, "options": {"max_terms": 2}}
    task = open_task("reasoning-gym", task_options("reasoning-gym", given), "sums")
    theirs = reasoning_gym.create_dataset("basic_arithmetic", seed=0, size=40, max_terms=2)
    asked = {one["question"]: one["answer"] for one in (theirs[index] for index in range(40))}
    assert {problem.prompt: problem.answer for problem in task.train}.items() <= asked.items() and len(task.train) > 30
    assert not {problem.prompt for problem in task.train} & {problem.prompt for problem in task.heldout}
    again = open_task("reasoning-gym", task_options("reasoning-gym", given), "sums")
    assert list(again.train) == list(task.train)
    for problem in (task.train[3], task.heldout[4]):
        assert task.accuracy(problem, completion_text("hm", problem.answer)) == 1.0
        assert task.accuracy(problem, completion_text("hm", "no idea")) < 1.0
    assert task.accuracy(task.train[0], "never closed") == 0.0
    for wrong, message in (({"dataset": "basic_arithmetics"}, "did you mean"), ({"options": {"terms": 2}}, "refuses")):
        with pytest.raises(IsthmusError, match=message):
            open_task("reasoning-gym", task_options("reasoning-gym", {**given, **wrong}), "sums")


@pytest.fixture
def verifiers_like(monkeypatch):
    """What this process imports of it is forgotten."""
    for name in ("verifiers", "verifiers.v1", "adder", "machinist", "isthmus.tasks.parts.taskset"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(VERIFIERS_LIKE)


def test_a_taskset_of_single_answers_has_the_rewards_of_its_package(verifiers_like):
    given = {"taskset": "adder", "options": {"largest": 6}, "heldout_share": 0.2}
    task = open_task("verifiers", task_options("verifiers", given), "add")
    assert len(task.train) + len(task.heldout) == 36 and "adder, 36 tasks" in task.about
    problem = task.train[3]
    right = str(eval(problem.prompt.removesuffix(" = ?")))
    assert problem.conversation[0] == {"role": "system", "content": "Add."}
    for answer, expected in ((right, 1.0), ("12345678", 0.0), ("x", 0.25)):
        assert task.accuracy(problem, completion_text("a thought", answer)) == expected
    options = task_options("verifiers", {"taskset": "machinist", "options": {"what": "tooled"}})
    with pytest.raises(IsthmusError, match=r"'machinist' is not for single answers: it gives the model tools"):
        open_task("verifiers", options, "none")


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("prepared", "prepare a machine"),
        ("tooled", "gives the model tools"),
        ("inspected", "its reward files looks into a machine"),
        ("stopped", "several turns"),
        ("opened", "the user opens the conversation"),
    ],
)
def test_a_taskset_of_several_turns_or_tools_is_refused_by_name(verifiers_like, what, reason):
    taskset = importlib.import_module("isthmus.tasks.parts.taskset")
    assert reason in taskset.problems("machinist", json.dumps({"id": "machinist", "what": what}), 10)["refused"]
    assert "problems" in taskset.problems("adder", json.dumps({"id": "adder"}), 10)


def test_a_worker_that_hangs_or_dies_is_started_again():
    worker = Worker(f"{slow_work.__name__}:work", deadline_s=0.5)
    outcomes = []
    for what in ("a", "hang", "b", "die", "raise", "c"):
        try:
            outcomes.append(worker.call(what))
        except WorkerFailed as error:
            outcomes.append((str(error), error.said))
    worker.close()
    ended = ("its process ended", "its process ended")
    assert outcomes == ["A", ("timed out", "timed out"), "B", ended, ("ValueError", "what it said"), "C"]
    with pytest.raises(WorkerFailed, match="ModuleNotFoundError"):
        Worker("no_such_module:work", deadline_s=1.0).call("a")


@pytest.mark.parametrize("kind", task_kinds())
def test_every_kind_of_task_describes_its_options(kind):
    options = task_options_class(kind)
    assert options.__doc__ and all(field.description for field in options.model_fields.values())


def test_no_task_and_no_reward_loads_torch():
    """The desk reads their options."""
    folders = [("isthmus.tasks", task_kinds()), ("isthmus.rewards", reward_kinds())]
    modules = [f"{package}.{kind.replace('-', '_')}" for package, kinds in folders for kind in kinds]
    code = f"import sys, {', '.join(modules)}; sys.exit(3 if {{'torch', 'scipy', 'sympy'}} & set(sys.modules) else 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
