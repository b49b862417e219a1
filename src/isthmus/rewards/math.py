"""1 for an answer that is mathematically equal to the expected one, by math-verify: \\frac{1}{2} is 0.5.

The library is asked in a process of its own, with our deadline: sympy may compute for hours on what a model writes.
"""

from __future__ import annotations

from isthmus.recipe.section import Seconds, Section, key
from isthmus.rewards import EachAlone, Judgement, LeftOut, Sample
from isthmus.tasks.parts.worker import Worker, WorkerFailed

FUNCTION = "isthmus.rewards.parts.equal_math:is_equal"


class Options(Section):
    """math-verify reads LaTeX and plain expressions; an answer in \\boxed{} comes first."""

    deadline: Seconds = key(5.0, "for one answer; what takes longer is left out", gt=0)


class MathReward(EachAlone):
    def __init__(self, worker: Worker):
        self.worker = worker

    def judge(self, sample: Sample) -> Judgement:
        if not sample.problem.answer:
            return LeftOut("the problem has no answer")
        if not sample.answer:
            return 0.0
        try:
            equal = self.worker.call(sample.problem.answer, sample.answer)
        except WorkerFailed as error:
            return LeftOut(str(error))
        return LeftOut("the expected answer cannot be read") if equal is None else float(equal)

    def close(self) -> None:
        self.worker.close()


def open(options: Options) -> MathReward:
    return MathReward(Worker(FUNCTION, options.deadline, first=(r"\frac{1}{2}", "$0.5$")))
