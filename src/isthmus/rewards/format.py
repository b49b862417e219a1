"""1 for a completion in the form that its task asks for, else 0."""

from __future__ import annotations

from isthmus.recipe.section import Section
from isthmus.rewards import EachAlone, Judgement, Sample


class Options(Section):
    """The task knows the form."""


class Format(EachAlone):
    def judge(self, sample: Sample) -> Judgement:
        return float(sample.task.well_formed(sample.problem, sample.text))


def open(options: Options) -> Format:
    return Format()
