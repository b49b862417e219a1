"""The steps of a run. Each kind is a file or a folder of its name here, with an `execute`."""

from __future__ import annotations

import importlib

from isthmus.progress import Watch
from isthmus.records import AnyStepRecord, evaluation_of, step_record
from isthmus.run import RunFolder
from isthmus.stages.steps.heldout import evaluate
from isthmus.stages.steps.step import StepRun
from isthmus.trainer.mesh import launched_world


def execute(run: RunFolder, watch: Watch, *, name: str, profile: bool = False, agreed: bool = False) -> AnyStepRecord:
    """Train one step of the recipe to its end, from where it stopped if it was begun.

    `agreed`: a person said that its rollouts may move.
    """
    step = StepRun(run, run.recipe.named(name), agreed=agreed)
    module = importlib.import_module(f"{__name__}.{step.section.kind}")
    options = {"profile": True} if profile else {}
    record: AnyStepRecord = step_record(run, name) or module.execute(step, watch, **options)
    if name in run.recipe.evaluation.after and launched_world() is None and evaluation_of(run, name) is None:
        evaluate(step, watch)
    return record
