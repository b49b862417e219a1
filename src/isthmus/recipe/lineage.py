"""How the steps of a recipe hang together: who starts from whom, and who makes whose data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from isthmus.errors import suggestion
from isthmus.recipe.steps import MODEL, RESERVED, PretrainSection, RlSection, SampleSection, SftSection, StepSection


def problem(
    steps: Sequence[StepSection], tasks: Mapping[str, Any], models: Mapping[str, Any], handed_off: str | None
) -> str | None:
    """The first thing that keeps the steps from being trained one after another, or None."""
    names = [step.name for step in steps]
    for step in steps:
        if step.name in RESERVED:
            return f"a step cannot be named {step.name!r}: that is the name of something else in a run"
        if names.count(step.name) > 1:
            return f"two steps are named {step.name!r}; a name is a folder of the run"
        if step.name in tasks:
            return f"{step.name!r} names a step and a task, and `data` could mean either; rename one"
    if cycle := _cycle(steps):
        return f"the steps start from each other in a circle: {' -> '.join(cycle)}; one of them starts from {MODEL!r}"
    for place, step in enumerate(steps):
        if (
            found := _start_problem(step, steps, place, models)
            or _data_problem(step, steps, place, tasks)
            or _teacher_problem(step, steps, place)
        ):
            return f"step {step.name!r}: {found}"
    trained = [step.name for step in steps if not isinstance(step, SampleSection)]
    if handed_off is not None and handed_off not in trained:
        known = f"steps with weights: {_list(trained)}"
        return f"handoff.step names {handed_off!r}{suggestion(handed_off, trained, known)}"
    if handed_off is None and last_of_model(steps) is None:
        return "no step trains [model], so nothing can be handed off; name a step with handoff.step"
    return None


def asked_problem(
    steps: Sequence[StepSection],
    tasks: Mapping[str, Any],
    after: Sequence[str],
    asked: Mapping[str, float],
    compared: Sequence[tuple[str, str]],
) -> str | None:
    """What keeps [evaluation] from being done, or None."""
    trained = [step.name for step in steps if not isinstance(step, SampleSection)]
    for name in after:
        if name not in trained:
            return f"evaluation.after names {name!r}{suggestion(name, trained)}; steps with weights: {_list(trained)}"
    for name in asked:
        if name not in tasks:
            return f"evaluation.tasks names {name!r}{suggestion(name, tasks)}"
    for name in (name for pair in compared for name in pair):
        if name not in after:
            return f"evaluation.compare names {name!r}, which is not in evaluation.after"
    return None


def line(steps: Sequence[StepSection], name: str) -> list[StepSection]:
    """A step and those whose weights it goes on with, the first one first."""
    by_name = {step.name: step for step in steps}
    found = [by_name[name]]
    while found[0].from_ not in (None, MODEL):
        found.insert(0, by_name[str(found[0].from_)])
    return found


def needs(step: StepSection, steps: Sequence[StepSection]) -> list[str]:
    """The steps that have to be done before a step: whose weights or data it takes."""
    start = [] if step.from_ in (None, MODEL) else [str(step.from_)]
    made = {other.name for other in steps if isinstance(other, SampleSection)}
    data = step.data if isinstance(step, SftSection) else {}
    taught = [teacher for teacher in (teacher_of(step),) if teacher is not None]
    return [*start, *(name for name in [*data, *taught] if (name in made or name in taught) and name not in start)]


def teacher_of(step: StepSection) -> str | None:
    """The step whose weights a step learns from, if there is one."""
    return step.teacher.step if isinstance(step, RlSection) and step.teacher is not None else None


def _teacher_problem(step: StepSection, steps: Sequence[StepSection], place: int) -> str | None:
    """A teacher's weights must be there when the step begins."""
    before, teacher = [one.name for one in steps[:place] if not isinstance(one, SampleSection)], teacher_of(step)
    if teacher is None or teacher in before:
        return None
    known = f"steps with weights before it: {_list(before)}" if before else "no step with weights comes before it"
    return f"teacher.step names {teacher!r}{suggestion(teacher, before, known)}"


def last_of_model(steps: Sequence[StepSection]) -> str | None:
    """The name of the last step that trains the recipe's own model; None if there is none."""
    trained = [step for step in steps if not isinstance(step, SampleSection)]
    own = [step.name for step in trained if line(steps, step.name)[0].model is None]
    return own[-1] if own else None


def unused(steps: Sequence[StepSection], handed_off: str, compared: Iterable[str] = ()) -> list[str]:
    """Steps whose weights or data nothing takes, and that are not `compared`."""
    taken = {handed_off, *compared}
    for step in reversed(steps):
        if step.name in taken:
            taken |= set(needs(step, steps))
    return [step.name for step in steps if step.name not in taken]


def unused_steps(steps: Sequence[StepSection], handed_off: str, compared: Iterable[str] = ()) -> list[str]:
    """In words, each step at which a line ends for nothing, and what to do about it."""
    needed = {name for step in steps for name in needs(step, steps)}
    ends = set(unused(steps, handed_off, compared)) - needed
    return [_nothing_comes_of(step) for step in steps if step.name in ends]


def _nothing_comes_of(step: StepSection) -> str:
    if isinstance(step, SampleSection):
        return f"nothing takes the data of {step.name!r}: name it in `data` of an `sft` step, or leave it out"
    return (
        f"nothing goes on from {step.name!r}: start a step from it, hand it off with handoff.step, compare it in "
        f"[evaluation], or leave it out; its weights stay in steps/{step.name}"
    )


def _cycle(steps: Sequence[StepSection]) -> list[str] | None:
    following = {step.name: step.from_ for step in steps}
    for name in following:
        seen = [name]
        while (after := following.get(seen[-1])) is not None and after != MODEL:
            if after in seen:
                return [*seen[seen.index(after) :], after]
            seen.append(after)
    return None


def _start_problem(
    step: StepSection, steps: Sequence[StepSection], place: int, models: Mapping[str, Any]
) -> str | None:
    start, names = step.from_, [one.name for one in steps if not isinstance(one, SampleSection)]
    before = [one.name for one in steps[:place] if not isinstance(one, SampleSection)]
    if start is None and place and step.model is None:
        last = before[-1] if before else MODEL
        return f'it has to say whose weights it starts from: from = "{last}", or from = "{MODEL}"'
    if start not in (None, MODEL):
        known = [MODEL, *before]
        if any(one.name == start for one in steps) and start not in names:
            return f"it starts from {start!r}, which makes data, not weights; an `sft` step can name it in `data`"
        if start not in names:
            return f"from = {start!r} is no step{suggestion(str(start), known, f'there are {_list(known)}')}"
        if start not in before:
            return f"it starts from {start!r}, which comes after it; steps are trained in the order of the recipe"
        if step.model is not None:
            return f"it starts from {start!r}, so it trains that one's model; leave out model = {step.model!r}"
    if step.model is not None and step.model not in models:
        return f"model = {step.model!r} is none of [models.*]{suggestion(step.model, models)}"
    return None


def _data_problem(step: StepSection, steps: Sequence[StepSection], place: int, tasks: Mapping[str, Any]) -> str | None:
    if isinstance(step, PretrainSection):
        return None
    made = [other.name for other in steps[:place] if isinstance(other, SampleSection)]
    is_sft = isinstance(step, SftSection)
    wanted, where = (step.data, "data") if is_sft else (getattr(step, "tasks", {}), "tasks")
    known = [*tasks, *made] if is_sft else [*tasks]
    for name in wanted:
        if name in known:
            continue
        other = next((one for one in steps if one.name == name), None)
        if other is None:
            return f"{where} names {name!r}{suggestion(name, known, f'there are {_list(known)}')}"
        if not isinstance(other, SampleSection):
            return f"{where} names the step {name!r}, which makes weights, not data; start from it with `from`"
        if is_sft:
            return f"{where} names {name!r}, which comes after it; steps are trained in the order of the recipe"
        return f"{where} names the step {name!r}; its answers can only be taught, by an `sft` step"
    return None


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
