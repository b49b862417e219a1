"""Kinds of rewards, their blend, and what becomes of samples that could not be judged."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import TypeAdapter

from isthmus.errors import IsthmusError
from isthmus.rewards import (
    EachAlone,
    LeftOut,
    Reward,
    Rewards,
    Sample,
    Scores,
    open_reward,
    reward_kinds,
    reward_options,
    reward_options_class,
)
from isthmus.tasks import Problem, completion_text, jsonl

TASK = jsonl.JsonlTask([], [])


def sample(answer="5", expected="5", thought="", tokens=10, limit=100, prompt="What is 2 + 3?", **metadata) -> Sample:
    problem = Problem(prompt, prompt, expected, metadata=metadata)
    return Sample(problem, TASK, completion_text(thought, answer), tokens, limit, tokens < limit)


def opened(kind: str, **options) -> Reward:
    return open_reward(kind, reward_options(kind, options))


class Told(Reward):
    """A reward that gives what it is told."""

    def __init__(self, *values):
        self.values = values

    def score(self, samples):
        return self.values


class Raising(EachAlone):
    def judge(self, sample):
        return 1 / (sample.tokens - 10)


class Broken(Reward):
    def score(self, samples):
        raise KeyError("all of them")


def test_rewards_add_up_by_their_weights_and_what_was_not_judged_is_left_out():
    samples = [sample(tokens=tokens) for tokens in (11, 10, 12, 14)]
    rewards = {"told": Told(1.0, 1, None, float("nan")), "raising": Raising(), "watched": Told(2.0, None, 0.0, 1.0)}
    scores = Rewards(rewards, {"told": 2.0, "raising": 0.5, "watched": 0.0}).score(samples)
    assert scores.totals == [2.5, None, None, None]
    assert scores.values["raising"] == [1.0, None, 0.5, 0.25]
    assert [math.isnan(one) for one in scores.numbers] == [False, True, True, True]
    assert scores.left_out == {
        "told: no answer": 1,
        "told: not a finite number": 1,
        "raising: ZeroDivisionError": 1,
        "watched: no answer": 1,
    }
    assert scores.means == {"told": 1.0, "raising": pytest.approx(1.75 / 3), "watched": 1.0}
    assert scores.shown()["samples_left_out"] == 3
    stored = TypeAdapter(Scores)
    assert stored.validate_json(stored.dump_json(scores)) == scores


def test_a_reward_that_fails_as_a_whole_leaves_all_out_and_one_that_miscounts_is_an_error():
    both = Rewards({"accuracy": opened("accuracy"), "broken": Broken()}, {"accuracy": 1.0, "broken": 0.1})
    scores = both.score([sample(), sample("6")])
    assert scores.totals == [None, None] and scores.values["accuracy"] == [1.0, 0.0]
    assert scores.left_out == {"broken: KeyError": 2} and scores.means["broken"] is None
    with pytest.raises(IsthmusError, match="'told' gave 1 values for 2 samples"):
        Rewards({"told": Told(1.0)}, {"told": 1.0}).score([sample(), sample()])
    with pytest.raises(IsthmusError, match="'told' must be a finite number"):
        Rewards({"told": Told(1.0)}, {"told": math.inf})
    with pytest.raises(IsthmusError, match=r"unknown kind of reward 'acuracy'; did you mean 'accuracy'"):
        reward_options("acuracy", {})


def test_accuracy_and_format_are_the_tasks():
    samples = [sample(), sample("6"), Sample(Problem("x", "x", "5"), TASK, "never closed", 1, 2, False)]
    assert list(opened("accuracy").score(samples)) == [1.0, 0.0, 0.0]
    assert list(opened("format").score(samples)) == [1.0, 1.0, 0.0]
    assert list(opened("accuracy").score([sample(expected="")])) == [None]


@pytest.mark.parametrize(
    ("tokens", "options", "expected"),
    [
        (16384, {"buffer": 4096}, 0.0),
        (18432, {"buffer": 4096}, -0.5),
        (20480, {"buffer": 4096}, -1.0),
        (17408, {}, -0.25),
        (1, {}, 0.0),
        (20480, {"buffer_share": 1.0}, -1.0),
    ],
)
def test_what_is_too_long_is_punished_as_in_dapo(tokens, options, expected):
    """Equation 13 of arXiv 2503.14476 at its own limits: 20,480 tokens, of which 4,096 are the buffer."""
    assert list(opened("length", **options).score([sample(tokens=tokens, limit=20480)])) == [expected]


def test_language_consistency_is_the_share_of_the_thought_in_the_prompts_language():
    reward = opened("language")
    thoughts = ["We add both numbers.", "We add 两个数字.", "", "2 + 3 = 5", "Мы складываем числа."]
    assert list(reward.score([sample(thought=thought) for thought in thoughts])) == [
        1.0,
        pytest.approx(2 / 6),
        1.0,
        1.0,
        0.0,
    ]
    russian = sample(thought="Мы складываем числа.", prompt="Сколько будет 2 + 3?")
    assert list(reward.score([russian])) == [1.0]
    assert list(opened("language", language="en").score([russian])) == [0.0]
    with pytest.raises(IsthmusError, match="unknown language 'english'"):
        opened("language", language="english")


def test_math_answers_are_equal_as_math_verify_says_and_one_that_hangs_is_left_out():
    with contextlib.closing(opened("math", deadline=20.0)) as reward:
        pairs = [(r"\frac{1}{2}", "0.5"), ("1/2", r"so \boxed{\frac{2}{4}}"), ("x+1", "$1+x$"), ("3", "4"), ("3", "no")]
        assert reward.score([sample(answer, expected) for expected, answer in pairs]) == [1.0, 1.0, 1.0, 0.0, 0.0]
        reward.worker.deadline_s = 1.0
        began = time.monotonic()
        assert reward.score([sample("9**9**9**9**9", "3")]) == [LeftOut("timed out")]
        assert time.monotonic() - began < 10
        assert reward.score([sample("3", "")]) == [LeftOut("the problem has no answer")]


class Service:
    """A service that answers what a test tells it, and keeps what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, self.headers.get("Authorization"), body))
                status, said = outer.answer(body, len(outer.asked))
                content = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def judged(content: str):
    usage = {"prompt_tokens": 200, "completion_tokens": 10}
    return {"choices": [{"message": {"role": "assistant", "content": content}}], "usage": usage}


def judge(url: str, **options) -> Reward:
    given = {"url": f"{url}/v1", "model": "m", "rubric": "Is it kind?", "retry_wait": 0.0, "retries": 2}
    return opened("judge", **{**given, **options})


def test_a_judge_is_asked_once_and_what_it_cost_is_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    options = {"folder": tmp_path, "input_price": 5.0, "output_price": 10.0, "key_variable": "JUDGE_KEY"}
    with Service(lambda body, _: (200, judged('Kind enough. {"score": 7.5}'))) as service:
        reward = judge(service.url, **options)
        assert list(reward.score([sample("a"), sample("b")])) == [0.75, 0.75]
        assert list(reward.score([sample("a")])) == [0.75]
        assert list(judge(service.url, **options).score([sample("b")])) == [0.75], "also in another run"
        path, key, body = service.asked[0]
    assert len(service.asked) == 2 and path == "/v1/chat/completions" and key == "Bearer secret"
    assert [one["role"] for one in body["messages"]] == ["system", "user"] and body["model"] == "m"
    assert "Is it kind?" in body["messages"][0]["content"] and "What is 2 + 3?" in body["messages"][1]["content"]
    assert reward.measures() == {
        "judge_calls": 2,
        "judge_cached": 1,
        "judge_prompt_tokens": 400,
        "judge_completion_tokens": 20,
        "judge_cost": pytest.approx((400 * 5 + 20 * 10) / 1e6),
    }


@pytest.mark.parametrize(
    ("answer", "outcome", "asked"),
    [
        (lambda _, count: (200, judged('{"score": 10}')) if count > 2 else (503, {}), 1.0, 3),
        (lambda _, count: (429, {}), LeftOut("HTTP 429"), 3),
        (lambda _, count: (200, b"<html>"), LeftOut("the answer is no JSON"), 3),
        (lambda _, count: (200, judged("I cannot say.")), LeftOut("no score in the answer"), 1),
        (lambda _, count: (200, judged('{"score": 11}')), LeftOut("a score outside of the scale"), 1),
        (lambda _, count: (200, {"choices": []}), LeftOut("IndexError"), 1),
        (lambda _, count: (time.sleep(0.3), (200, {}))[1], LeftOut("timed out"), 3),
    ],
    ids=["busy twice", "busy", "no JSON", "no score", "out of scale", "no choices", "slow"],
)
def test_a_judge_that_does_not_judge_leaves_the_sample_out(answer, outcome, asked):
    with Service(answer) as service:
        assert list(judge(service.url, timeout=0.1 if "timed out" in str(outcome) else 5.0).score([sample()])) == [
            outcome
        ]
        assert len(service.asked) == asked


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"score": "7"}', '{"score": NaN}', "{}"])
def test_a_kept_judgement_that_is_damaged_is_named_and_not_believed(tmp_path, content: str):
    with Service(lambda body, _: (200, judged('{"score": 5}'))) as service:
        judge(service.url, folder=tmp_path).score([sample()])
        (kept,) = tmp_path.rglob("*.json")
        kept.write_text(content)
        with pytest.raises(IsthmusError, match=kept.name):
            judge(service.url, folder=tmp_path).score([sample()])


def test_a_judge_that_refuses_to_be_asked_stops_the_run(monkeypatch):
    with Service(lambda *_: (401, {"error": "wrong key"})) as service:
        with pytest.raises(IsthmusError, match=r"HTTP 401: .*wrong key"):
            judge(service.url).score([sample()])
        assert len(service.asked) == 1
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(IsthmusError, match=r"JUDGE_KEY.* is not set"):
        judge("http://127.0.0.1:1", key_variable="JUDGE_KEY")
    with pytest.raises(IsthmusError, match="give rubric or rubric_file"):
        reward_options("judge", {"url": "http://x", "model": "m"})
    assert list(judge("http://127.0.0.1:1", retries=0).score([sample()])) == [
        LeftOut("no connection: ConnectionRefusedError")
    ]


ADDS = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
PAIRS = [{"input": "2 3", "output": "5\n"}, {"input": "1 1", "output": "2"}]


def test_programs_are_run_here_only_if_that_is_said_and_with_limits():
    with pytest.raises(IsthmusError, match="unsafe_local = true"):
        reward_options("code", {})
    with pytest.raises(IsthmusError, match="unsafe_local = true"):
        reward_options("code", {"url": "http://x", "unsafe_local": True})
    fives, forever, huge = (f"```python\n{code}\n```" for code in ("print(5)", "while True: pass", "'a' * 10**10"))
    verl = json.dumps({"inputs": ["2 3"], "outputs": ["5"]})
    samples = [
        sample(f"First\n```\nno\n```\nthen\n{ADDS}", tests=PAIRS),
        sample(fives, tests=PAIRS),
        sample(forever, tests=PAIRS),
        sample(huge, tests=PAIRS),
        sample("no program", tests=PAIRS),
        sample(ADDS, expected=verl),
        sample("```python\ndef f(x):\n    return x + 1\n```", test_code="assert f(1) == 2"),
        sample(ADDS),
    ]
    reward = opened("code", unsafe_local=True, timeout=1.0, at_once=2)
    found = list(reward.score(samples))
    assert found == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, LeftOut("the problem has no tests")]
    assert list(opened("code", unsafe_local=True, partial=True).score(samples[1:2])) == [0.5]


def test_programs_are_run_by_a_sandbox_that_speaks_sandbox_fusions_language():
    def answer(body, _):
        if "crash" in body["code"]:
            return 200, {"status": "SandboxError", "message": "no more machines"}
        if "forever" in body["code"]:
            return 200, {"status": "Failed", "run_result": {"status": "TimeLimitExceeded", "return_code": None}}
        printed = str(sum(map(int, body["stdin"].split())))
        result = {"status": "Finished", "execution_time": 0.1, "return_code": 0, "stdout": f"{printed}\n", "stderr": ""}
        return 200, {"status": "Success", "compile_result": None, "run_result": result, "files": {}}

    with Service(answer) as service:
        reward = opened("code", url=service.url, memory=64, retries=0)
        samples = [
            sample(ADDS, tests=PAIRS),
            sample("```\nforever\n```", tests=PAIRS),
            sample("```\ncrash\n```", tests=PAIRS),
        ]
        assert list(reward.score(samples)) == [1.0, 0.0, LeftOut("the sandbox answers SandboxError")]
        path, _, body = service.asked[0]
        assert path == "/run_code" and body["language"] == "python" and body["memory_limit_MB"] == 64


@pytest.mark.parametrize("kind", reward_kinds())
def test_every_kind_of_reward_describes_its_options(kind):
    options = reward_options_class(kind)
    assert options.__doc__ and all(field.description for field in options.model_fields.values())
