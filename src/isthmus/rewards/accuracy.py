"""How right the answer is, as its task judges it."""

from __future__ import annotations

from isthmus.recipe.section import Section
from isthmus.rewards import EachAlone, Judgement, Sample


class Options(Section):
    """The task knows what is right."""


class Accuracy(EachAlone):
    def judge(self, sample: Sample) -> Judgement:
        return sample.task.accuracy(sample.problem, sample.text)


def open(options: Options) -> Accuracy:
    return Accuracy()
