"""The steps of a run. Each kind is a file or a folder of its name here, with an `execute`."""

from __future__ import annotations

import importlib

from isthmus.progress import Watch
from isthmus.records import AnyStepRecord
from isthmus.run import RunFolder
from isthmus.stages.steps.step import StepRun


def execute(run: RunFolder, watch: Watch, *, name: str, profile: bool = False) -> AnyStepRecord:
    """Train one step of the recipe to its end, from where it stopped if it was begun."""
    step = StepRun.of(run, name)
    module = importlib.import_module(f"{__name__}.{step.section.kind}")
    options = {"profile": True} if profile else {}
    record: AnyStepRecord = module.execute(step, watch, **options)
    return record
