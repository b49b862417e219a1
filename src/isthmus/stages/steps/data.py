"""What a step learns from: the recipe's tasks, and the answers that earlier steps sampled and kept."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.data.corpus import run_tokenizer
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import DamagedFile, IsthmusError
from isthmus.lines import read_objects
from isthmus.recipe.steps import SampleSection, SftSection
from isthmus.records import SampleRecord, step_record
from isthmus.run import RunFolder, sha256_file
from isthmus.stages.steps.step import StepRun
from isthmus.tasks import Mixture, Problem, Task, interleaved, load_tasks
from isthmus.trainer.mesh import Ranks


@dataclass(frozen=True)
class Kept:
    """Answers that a `sample` step kept, as worked examples."""

    train: Sequence[Problem]
    heldout: Sequence[Problem] = ()
    about: str = "answers that a step of this run kept"

    def worked_example(self, problem: Problem, chance: random.Random) -> tuple[str, str]:
        return problem.thought, problem.answer

    def accuracy(self, problem: Problem, completion: str) -> float | None:
        """Nothing is known of what is right here but one answer that was."""
        return None

    def well_formed(self, problem: Problem, completion: str) -> bool:
        return True


def learnt(step: StepRun[SftSection]) -> Mixture:
    """What supervised fine-tuning draws its worked examples from. Raises IsthmusError if a step that makes data for it
    is not done, DamagedFile if its data are not what its record says."""
    tasks = load_tasks(step.recipe)
    weights: Mapping[str, float] = step.section.data or dict.fromkeys(tasks, 1.0)
    made = _sampled(step)
    return Mixture({name: kept_of(step.run, name) if name in made else tasks[name] for name in weights}, weights)


def kept_of(run: RunFolder, name: str) -> Task:
    """The data of a `sample` step."""
    record = step_record(run, name)
    if not isinstance(record, SampleRecord):
        raise IsthmusError(f"step {name!r} is not done yet; first run: isthmus run {run.path} --until {name}")
    path = run.path / record.samples
    if not path.is_file() or sha256_file(path) != record.samples_sha256:
        raise DamagedFile(
            f"{path} is not what the record of {name} says. Restore it, or delete steps/{name} and sample again."
        )
    return Kept([_problem(row, name) for _, row in read_objects(path, "samples")])


def _problem(row: Mapping[str, Any], name: str) -> Problem:
    return Problem(
        id=row["id"],
        prompt=row["prompt"],
        answer=row["answer"],
        thought=row["thought"],
        messages=tuple(row["messages"]),
        task=name,
    )


def data_identity(step: StepRun[SftSection]) -> str:
    """Identifies the order in which worked examples come: the seed, and the hashes of what was sampled."""
    found = [step_record(step.run, name) for name in step.section.data if name in _sampled(step)]
    made = [f"{one.step} {one.samples_sha256}" for one in found if isinstance(one, SampleRecord)]
    return " ".join([f"seed {step.recipe.seed}", *made])


def _sampled(step: StepRun[SftSection]) -> set[str]:
    """The steps of its recipe that make data."""
    return {one.name for one in step.recipe.step if isinstance(one, SampleSection)}


def tokenizer_of(step: StepRun[Any], ranks: Ranks | None = None) -> Tokenizer:
    """The tokenizer of the model that a step trains; of several ranks the first one makes it."""
    tasks, model = list(load_tasks(step.recipe).values()), step.model_name
    if ranks is not None:
        if ranks.is_first:
            run_tokenizer(step.run, tasks, model)
        ranks.wait()
    return run_tokenizer(step.run, tasks, model)


def some_problems(tasks: Mixture, count: int) -> list[Problem]:
    """A few problems, held-out ones first."""
    trained = {name: task.train[:count] for name, task in tasks.tasks.items()}
    return [*interleaved(tasks.heldout, count), *interleaved(trained, count)][:count]
