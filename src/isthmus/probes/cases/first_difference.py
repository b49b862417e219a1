"""Where two runs of the same step part ways: the first operator with equal inputs and unequal outputs.

A step that does not give the same bits twice says nothing about which kernel is to blame. This names it, and keeps its
inputs, so that `isthmus case` can pack that operator alone.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.chips.rehearse.dispatch import is_distributed
from isthmus.probes.contract import environment
from isthmus.probes.portable.replay_operator import digest_of
from isthmus.records import FailureCase
from isthmus.run import write_atomic

REPLAY = "isthmus.probes.portable.replay_operator:replay_operator"
INPUTS = "inputs.pt"
UNSET = ("aten::empty", "aten::new_empty", "aten::resize_")
"""Operators whose results hold whatever memory held."""

Work = Callable[[], object]


@dataclass(frozen=True)
class Entry:
    """One call of an operator: its name, and digests of what it got and of what it left, arguments included."""

    operator: str
    inputs: str
    outputs: str


@dataclass(frozen=True)
class Difference:
    """The first difference of two runs. `number` counts the calls of a run from 0.

    `kind`: `result` (equal inputs, unequal outputs: `operator` is to blame), `collective` (what differs came out of
    the collective `operator`), `draw` (`operator` draws random numbers: the runs were not seeded alike), `input` (the
    runs began with unequal data; `operator` is the first that got it), `path` (they called different operators).
    """

    kind: str
    number: int
    operator: str
    digests: tuple[str, str]

    def __str__(self) -> str:
        said = {
            "result": "gives two results for equal inputs",
            "collective": "is a collective after which the runs differ",
            "draw": "draws random numbers that were not seeded alike",
            "input": "is the first that got unequal inputs: the runs began with unequal data",
            "path": "is called in one run alone",
        }
        return f"{self.operator} (call {self.number}) {said[self.kind]}"


class _Log(TorchDispatchMode):
    """Notes every operator as torch dispatches it, and keeps the arguments of call number `wanted`."""

    def __init__(self, wanted: int | None = None):
        super().__init__()
        self.entries: list[Entry] = []
        self.wanted, self.kept = wanted, None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_distributed(types):
            return NotImplemented  # their local parts come here again
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        inputs = digest_of([args, kwargs])
        if len(self.entries) == self.wanted:
            self.kept = (_copied(args), _copied(kwargs))
        result = func(*args, **kwargs)
        opaque = _is_collective(func.name()) or func.name().startswith(UNSET)
        outputs = "" if opaque else digest_of([result, args, kwargs])
        self.entries.append(Entry(func.name(), inputs, outputs))
        return result


def log_of(work: Work) -> list[Entry]:
    """Run `work` and return every operator that it called, those of its backward passes included."""
    with _Log() as log:
        work()
    return log.entries


def compare(one: Sequence[Entry], other: Sequence[Entry]) -> Difference | None:
    """The first difference between two logs, of two runs or of two ranks that should do the same. None: none."""
    collective: tuple[int, Entry] | None = None
    strange: tuple[int, Entry, Entry] | None = None
    for number, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine.operator != theirs.operator:
            return _blamed(collective, strange) or Difference("path", number, mine.operator, ("", ""))
        if mine.outputs != theirs.outputs and strange is None and _draws(mine.operator):
            return Difference("draw", number, mine.operator, (mine.outputs, theirs.outputs))
        if mine.inputs == theirs.inputs and mine.outputs != theirs.outputs:
            return Difference("result", number, mine.operator, (mine.outputs, theirs.outputs))
        if mine.inputs != theirs.inputs and mine.outputs != theirs.outputs and strange is None:
            strange = number, mine, theirs
        if _is_collective(mine.operator) and strange is None:
            collective = number, mine
    if len(one) != len(other) and strange is None:
        longer = one if len(one) > len(other) else other
        number = min(len(one), len(other))
        return Difference("path", number, longer[number].operator, ("", ""))
    return _blamed(collective, strange)


def _blamed(collective: tuple[int, Entry] | None, strange: tuple[int, Entry, Entry] | None) -> Difference | None:
    """For runs that differ, and no operator made them: the last collective before that, else what they began with."""
    if strange is None:
        return None
    if collective is not None:
        return Difference("collective", collective[0], collective[1].operator, ("", ""))
    return Difference("input", strange[0], strange[1].operator, (strange[1].inputs, strange[2].inputs))


def first_difference(prepare: Callable[[], Work], runs: int = 2) -> tuple[Difference, Any] | None:
    """Run a step `runs` times and return where it first differs, with (arguments, named) if an operator is to blame.

    `prepare` sets up the step from the same state each time, its random numbers included, and returns it. None if all
    runs are equal in every operator. The arguments are copied in one more run, which is equal up to that call and is
    made in any case: all ranks have to take a step with collectives equally often.
    """
    logs = [log_of(prepare()) for _ in range(runs)]
    found = [difference for log in logs[1:] if (difference := compare(logs[0], log)) is not None]
    first = min(found, key=lambda difference: difference.number, default=None)
    wanted = first.number if first is not None and first.kind == "result" else None
    work = prepare()
    with _Log(wanted) as log:
        work()
    if first is None or wanted is None:
        return None if first is None else (first, None)
    same = log.entries[wanted].inputs == logs[0][wanted].inputs
    return first, log.kept if same else None


def keep_operator(
    folder: Path,
    difference: Difference,
    kept: Any,
    *,
    device: str,
    pool: str,
    chip: str,
    rehearsed: bool,
    ranks: int = 1,
    planted: Sequence[str] = (),
) -> Path:
    """Write the operator that is to blame as a case that `isthmus case` packs. Returns its folder.

    `kept` are its arguments, as `first_difference` returns them. Raises ValueError for arguments that no file holds.
    """
    tensors: dict[str, Tensor] = {}
    arguments, named = kept
    call = {"arguments": _described(list(arguments), tensors), "named": _described(dict(named), tensors)}
    case = FailureCase(
        probe="first difference",
        title=f"{difference.operator} gives two results for equal inputs",
        function=REPLAY,
        arguments={
            "inputs": INPUTS,
            "operator": difference.operator,
            "call": call,
            "digests": list(difference.digests),
            "repeats": 20,
        },
        files=["inputs"],
        ranks=ranks,
        device=device,
        pool=pool,
        chip=chip,
        rehearsed=rehearsed,
        planted=list(planted),
        expected="the same bits each time",
        observed=str(difference),
        replies=[{"rank": 0, "state": "done", "value": {"failed": True, "detail": str(difference)}, "error": ""}],
        environment=environment(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    saved = io.BytesIO()
    torch.save(tensors, saved)
    write_atomic(folder / INPUTS, saved.getvalue())
    write_atomic(folder / "failure.json", json.dumps(case.model_dump(mode="json"), indent=1).encode())
    return folder


def _is_collective(operator: str) -> bool:
    return operator.startswith(("c10d::", "_c10d_functional::"))


def _draws(operator: str) -> bool:
    space, _, rest = operator.partition("::")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(getattr(torch.ops, space), packet), overload or "default")
    return torch.Tag.nondeterministic_seeded in found.tags


def _copied(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.detach().clone()
    if isinstance(values, dict):
        return {name: _copied(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_copied(value) for value in values]
    return values


def _described(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Arguments in JSON, as `replay_operator` reads them; the tensors among them are put into `tensors`."""
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.cpu()
        return {"tensor": name}
    if isinstance(value, list | tuple):
        return [_described(one, tensors) for one in value]
    if isinstance(value, dict):
        return {name: _described(one, tensors) for name, one in value.items()}
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": ""}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"an argument of type {type(value).__name__} cannot be stored")
