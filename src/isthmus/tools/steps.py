"""The steps of a run as a picture: whose weights and data each takes, and how far it is."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.tree import Tree

from isthmus.algos import algorithm_config
from isthmus.errors import IsthmusError, suggestion
from isthmus.pools import get_pool, placed_pools
from isthmus.recipe.elsewhere import elsewhere_problem
from isthmus.recipe.schema import Recipe
from isthmus.recipe.steps import MODEL, PretrainSection, RlSection, SampleSection, SftSection, StepSection, TextSection
from isthmus.records import (
    HandoffRecord,
    PlanRecord,
    QualifyRecord,
    SampleRecord,
    WeightsRecord,
    rollout_pool,
    step_is_done,
    step_record,
    train_place,
)
from isthmus.rewards import checked_reward
from isthmus.rewards.parts.filters import FILTERS
from isthmus.run import RunFolder
from isthmus.tasks import check_task, checked_task

COLOURS = {"done": "green", "running": "yellow", "waiting": "dim"}


def check(recipe: Recipe) -> None:
    """Raise IsthmusError for options of a step, a task or a reward that nothing has."""
    for step in recipe.step:
        if isinstance(step, RlSection):
            algorithm_config(step, recipe.architecture_of(step))
            for name in step.rewards:
                checked_reward(name, recipe.rewards.get(name, {}))
        if isinstance(step, SampleSection):
            for name in step.keep:
                if name not in FILTERS:
                    raise IsthmusError(f"step.{step.name}.keep: unknown filter {name!r}{suggestion(name, FILTERS)}")
    for name, given in recipe.tasks.items():
        check_task(name, given)
    if all(recipe.pools[name].engines for name in recipe.place.rollout) and (why := elsewhere_problem(recipe)):
        raise IsthmusError(f"place.rollout has engines elsewhere alone ({', '.join(recipe.place.rollout)}): {why}")


def check_files(recipe: Recipe, run: RunFolder | None, acts: Collection[str]) -> None:
    """Raise IsthmusError for what a step of `acts` that is not done yet would look for in vain."""
    steps = [step for step in recipe.step if step.name in acts and not (run and step_is_done(run, step.name))]
    for step in steps:
        if isinstance(step, PretrainSection) and not step.folder.is_dir():
            raise IsthmusError(f"step.{step.name}.folder: there is no folder {step.folder}")
    for name, given in recipe.tasks.items() if steps else ():
        for option, value in checked_task(name, given)[1]:
            if isinstance(value, Path) and not value.is_file():
                raise IsthmusError(f"tasks.{name}.{option}: there is no file {value}")


def wanted(run: RunFolder, acts: Collection[str]) -> set[str]:
    """The pools that `acts` of a run still need, as far as is known: without a plan, those that lack their record."""
    recipe = run.recipe
    plan = run.read_record("plan", PlanRecord)
    found = {pool.name for pool in placed_pools(recipe) if "qualify" in acts and not _is_qualified(run, pool.name)}
    if plan is None:
        return found
    for step in recipe.step:
        if step.name not in acts or step_is_done(run, step.name):
            continue
        if isinstance(step, RlSection | SampleSection) or step.name in recipe.evaluation.after:
            found.add(rollout_pool(run, step.name, plan.pool_of("rollout")))
        if not isinstance(step, SampleSection):
            found.add(train_place(run, step.name, lambda name: get_pool(recipe, name).ranks).pool)
    if "handoff" in acts:
        record = run.read_record("parity", HandoffRecord)
        found |= set() if record is not None and record.verdict == "pass" else {plan.pool_of("serve")}
    return found


def _is_qualified(run: RunFolder, pool: str) -> bool:
    record = run.read_record(f"qualify/{pool}", QualifyRecord)
    return record is not None and not record.disturbed


def execute(recipe: Recipe, run: RunFolder | None) -> RenderableType:
    """A tree for each model, the weights that come from others under those; warnings below."""
    roots: dict[str | None, Tree] = {}
    nodes: dict[str, Tree] = {}
    for step in recipe.step:
        start = recipe.start_of(step)
        if start == MODEL:
            title = f"[bold]{MODEL if step.model is None else f'models.{escape(step.model)}'}[/]"
            above = roots.setdefault(step.model, Tree(title))
        else:
            above = nodes[start]
        nodes[step.name] = above.add(_told(step, recipe, run))
    return Group(*roots.values(), *(f"[yellow]{escape(one)}[/]" for one in recipe.unused_steps))


def _told(step: StepSection, recipe: Recipe, run: RunFolder | None) -> str:
    told = f"[bold]{escape(step.name)}[/]  {step.kind}"  # type: ignore[attr-defined]
    data = _data(step)
    told += f"  [cyan]<- {escape(', '.join(data))}[/]" if data else ""
    if run is not None:
        state, words = _state(step, run)
        told += f"  [{COLOURS[state]}]{state}[/]{f'  [dim]{escape(words)}[/]' if words else ''}"
    return told + ("  [magenta]=> hand-off[/]" if step.name == recipe.handed_off.name else "")


def _data(step: StepSection) -> list[str]:
    if isinstance(step, SftSection):
        return list(step.data)
    return list(step.tasks) if isinstance(step, RlSection | SampleSection) else []


def _state(step: StepSection, run: RunFolder) -> tuple[str, str]:
    record = step_record(run, step.name)
    if isinstance(record, WeightsRecord):
        return "done", f"{record.steps} updates on {record.pool}, checkpoint {record.checkpoint_sha256[:8]}"
    if isinstance(record, SampleRecord):
        return "done", f"{record.kept} of {record.generated} answers kept, on {record.pool}"
    seen = [event["step"] for event in run.events(step.name, "step")]
    if not run.events(step.name, "start"):
        return "waiting", ""
    of = step.steps if isinstance(step, TextSection | RlSection) else None
    return "running", f"{max(seen, default=0)} of {of} updates" if of else ""
