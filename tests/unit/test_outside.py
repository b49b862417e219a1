"""What ends a process from outside is no evidence about its chip: the probe is repeated, or found nothing out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from isthmus.launch.crew import Called, Reply
from isthmus.launch.outside import from_outside
from isthmus.probes.asking import ask
from isthmus.probes.findings import finding
from isthmus.records import Evidence, QualifyRecord
from isthmus.stages.plan import objection
from isthmus.verdict import deciding, judge

PASSES = finding("sums", "pass", "all right", aspect="links", needed_for="both")
FAILS = finding("sums", "fail", "a rank crashed", ranks=[1], aspect="links", needed_for="both")


@pytest.mark.parametrize(
    ("words", "outside"),
    [
        ("killed by signal 9", True),
        ("killed by signal 15", True),
        ("the engine could not start (exit code -9).", True),
        ("OSError: [Errno 28] No space left on device: '/tmp/x'", True),
        ("DistNetworkError: EADDRINUSE, address already in use", True),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'tokens.bin'", True),
        ("killed by signal 11", False),
        ("killed by signal 6", False),
        ("killed by signal 7", False),
        ("exit code 1", False),
        ("RuntimeError: NCCL error: unhandled system error", False),
        ("OSError: libascendcl.so: cannot open shared object file: No such file or directory", False),
        ("RuntimeError: the sum is 28 where 29 was due", False),
    ],
)
def test_what_the_chip_has_no_part_in(words, outside):
    assert (from_outside(words) is not None) == outside
    called = Called([Reply(0, "done"), Reply(1, "crashed", error=words)], 1.0)
    assert (called.disturbance is not None) == outside


def asked(*attempts: tuple[str | None, Evidence]) -> tuple[list, int, int]:
    """What is asked of a probe whose runs end so: (answers, runs, failures that were dropped)."""
    crew = SimpleNamespace(failed_calls=0, disturbances=[])
    left, runs, dropped = list(attempts), [], []
    setting = SimpleNamespace(failures=[], say=lambda _: None, drop_failures=dropped.append)

    def run(crew, _setting):
        runs.append(1)
        error, found = left.pop(0)
        if error is not None:
            crew.failed_calls += 1
            called = Called([Reply(1, "crashed", error=error)], 0.0)
            crew.disturbances += [called.disturbance] if called.disturbance else []
        return [found]

    return ask(crew, setting, [SimpleNamespace(name="links", run=run)]), len(runs), len(dropped)  # type: ignore[arg-type]


def test_a_probe_whose_rank_is_killed_once_is_repeated_and_its_answer_counts():
    (answer,), runs, dropped = asked(("killed by signal 9", FAILS), (None, PASSES))
    assert (answer.evidence, answer.broken, answer.disturbed) == ([PASSES], False, None)
    assert runs == 2 and dropped == 1


def test_a_disk_that_stays_full_is_not_enough_evidence():
    full = "OSError: [Errno 28] No space left on device"
    (answer,), runs, _ = asked((full, FAILS), (full, FAILS))
    assert runs == 2 and not answer.broken and "disk is full" in answer.disturbed
    (item,) = answer.evidence
    assert item.outcome == "unknown" and item.ranks == [] and "says nothing about the chip" in item.detail
    assert judge([item]) == "not enough evidence"


@pytest.mark.parametrize("error", ["killed by signal 11", "exit code 3"])
def test_a_chip_that_crashes_by_itself_is_not_asked_twice(error):
    (answer,), runs, _ = asked((error, FAILS))
    assert runs == 1 and answer.broken and answer.evidence == [FAILS]


def test_who_is_killed_each_time_at_the_same_place_has_failed():
    (answer,), runs, _ = asked(*2 * [("killed by signal 9", FAILS)])
    assert runs == 2 and answer.broken and answer.evidence == [FAILS] and answer.disturbed is None


def one(name: str, needed_for: str, outcome: str) -> Evidence:
    return finding(name, outcome, f"says {name}", aspect="software", needed_for=needed_for)  # type: ignore[arg-type]


def test_the_reason_that_is_shown_is_the_one_that_decided():
    evidence = [
        one("speed", "training", "unknown"),
        one("soak", "training", "fail"),
        one("formats", "serving", "unknown"),
        one("engine", "serving", "fail"),
    ]
    assert judge(evidence) == "unfit" and deciding(evidence) == evidence[3]
    assert judge(evidence[:3]) == "not enough evidence" and deciding(evidence[:3]) == evidence[2]
    assert judge([*evidence[:2], one("engine", "serving", "pass")]) == "serve-only"
    assert deciding(evidence[:2]) == evidence[1]
    record = QualifyRecord(
        recipe_sha256="",
        started=0.0,
        ended=1.0,
        pool="home",
        chip="cpu",
        present=True,
        rehearsed=False,
        verdict="unfit",
        title="home",
        reasons=["speed: says speed"],
        evidence=evidence,
    )
    recipe = SimpleNamespace(pools={"home": SimpleNamespace(engines=[])})
    said = objection("rollout", record, recipe)  # type: ignore[arg-type]
    assert said == "its verdict is `unfit`: engine: says engine"
