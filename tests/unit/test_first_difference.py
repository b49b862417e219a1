"""Two runs of a step that part ways: the operator to blame is named, kept, and replayed from its inputs alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.launch.crew import Crew
from isthmus.probes.cases.first_difference import (
    REPLAY,
    Difference,
    Entry,
    compare,
    first_difference,
    keep_operator,
    log_of,
)
from isthmus.probes.portable.replay_operator import digest_of
from isthmus.records import FailureCase


class Damage(TorchDispatchMode):
    """Changes one element of the result of the n-th call of an operator while `armed`, below any log of the work."""

    def __init__(self, operator: str, call: int):
        super().__init__()
        self.operator, self.call, self.count, self.armed = operator, call, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.armed and func.name() == self.operator:
            self.count += 1
            if self.count == self.call:
                result.view(-1)[0] += 2.0**-10
        return result


def training(steps: int = 2) -> Callable[[], object]:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    given = torch.randn(5, 6)

    def run() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(given).square().sum().backward()
            optimizer.step()

    return run


def test_equal_runs_have_no_difference():
    assert first_difference(training) is None
    names = {entry.operator for entry in log_of(training())}
    assert {"aten::addmm", "aten::tanh_backward"} <= names


@pytest.mark.parametrize(("operator", "call"), [("aten::addmm", 1), ("aten::mm", 2), ("aten::tanh_backward", 2)])
def test_the_operator_that_was_damaged_is_named(operator: str, call: int):
    damage, runs = Damage(operator, call), iter([False, True, False])

    def prepare() -> Callable[[], object]:
        damage.armed = False
        work, damaged = training(), next(runs)

        def run() -> None:
            damage.armed = damaged
            work()

        return run

    with damage:
        found = first_difference(prepare)
    assert found is not None
    difference, kept = found
    assert difference.kind == "result" and difference.operator == operator
    calls = [entry.operator for entry in log_of(training())]
    assert calls[: difference.number + 1].count(operator) == call
    assert any(isinstance(value, torch.Tensor) for value in kept[0])


def test_random_numbers_that_are_not_seeded_alike_are_told_apart_from_a_fault():
    def prepare() -> Callable[[], object]:
        return lambda: torch.nn.functional.dropout(torch.ones(64), 0.5)

    found = first_difference(prepare)
    assert found is not None and found[0].kind == "draw" and found[1] is None


def test_unequal_data_at_the_start_is_no_operators_fault():
    starts = iter([1.0, 2.0, 3.0])

    def prepare() -> Callable[[], object]:
        given = torch.full((4,), next(starts))
        return lambda: given.exp().sum()

    found = first_difference(prepare)
    assert found is not None and found[0].kind == "input" and found[0].operator == "aten::exp"


def test_memory_that_was_never_written_is_no_difference():
    def prepare() -> Callable[[], object]:
        return lambda: torch.empty(1000).fill_(1.0).sum()

    assert first_difference(prepare) is None


def test_what_differs_after_a_collective_came_out_of_it():
    same = [Entry("aten::mm", "a", "b"), Entry("c10d::allreduce_", "b", "")]
    found = compare([*same, Entry("aten::add", "x", "p")], [*same, Entry("aten::add", "y", "q")])
    assert found is not None and (found.kind, found.operator, found.number) == ("collective", "c10d::allreduce_", 1)


def test_runs_that_call_different_operators_are_told():
    one, other = [Entry("aten::mm", "a", "b"), Entry("aten::add", "b", "c")], [Entry("aten::mm", "a", "b")]
    found = compare(one, other)
    assert found == compare(other, one) == Difference("path", 1, "aten::add", ("", ""))


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([1.0, -0.0]),
        torch.tensor([1.0, 0.0]).double(),
        torch.tensor([[1.0, 0.0]]),
        [torch.tensor([1.0, 0.0])],
    ],
)
def test_digests_are_of_bits_type_and_shape(other: Any):
    given = torch.tensor([1.0, 0.0])
    assert digest_of(given) == digest_of(given.clone()) != digest_of(other)
    assert digest_of(torch.arange(6).view(2, 3).T) == digest_of(torch.arange(6).view(2, 3).T.contiguous())


def test_the_kept_operator_is_replayed_with_its_inputs(tmp_path: Path):
    """A healthy kernel gives the same bits each time on two ranks; the digest is that of the call as it was made."""
    left, right = torch.randn(3, 4), torch.randn(4, 5)
    result = left @ right
    wrong = digest_of([result + 1, [left, right], {}])
    digests = (digest_of([result, [left, right], {}]), wrong)
    difference = Difference("result", 7, "aten::mm", digests)
    kept = ([left, right], {})
    folder = keep_operator(
        tmp_path / "mm", difference, kept, device="cpu", pool="home", chip="cpu", rehearsed=False, ranks=2
    )
    case = FailureCase.model_validate_json((folder / "failure.json").read_bytes())
    assert case.function == REPLAY and case.files == ["inputs"] and (folder / "inputs.pt").is_file()
    with Crew(2) as crew:
        arguments = {**case.arguments, "inputs": str(folder / case.arguments["inputs"]), "repeats": 3}
        values = crew.call(REPLAY, arguments, deadline_s=60).values
    assert [value["failed"] for value in values] == [False, False] and all(value["known"] for value in values)
    assert values[0]["digest"] == digests[0]


def test_arguments_of_every_kind_come_back(tmp_path: Path):
    given = torch.arange(6.0)
    kept = ([given, torch.float16], {"non_blocking": False, "copy": True})
    result = torch.ops.aten.to.dtype(given, torch.float16, copy=True)
    digest = digest_of([result, *[list(kept[0]), {**kept[1]}]])
    difference = Difference("result", 0, "aten::to.dtype", (digest, "x"))
    folder = keep_operator(tmp_path / "to", difference, kept, device="cpu", pool="p", chip="cpu", rehearsed=False)
    case = FailureCase.model_validate_json((folder / "failure.json").read_bytes())
    with Crew(1) as crew:
        arguments = {**case.arguments, "inputs": str(folder / "inputs.pt"), "repeats": 1}
        assert crew.call(REPLAY, arguments, deadline_s=60).values[0]["known"]
    with pytest.raises(ValueError, match="Generator"):
        keep_operator(
            tmp_path / "no",
            difference,
            ([torch.Generator()], {}),
            device="cpu",
            pool="p",
            chip="cpu",
            rehearsed=False,
        )
