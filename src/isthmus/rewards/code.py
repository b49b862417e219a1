"""1 for an answer whose program passes the problem's tests. Programs of a model run in a sandbox behind a URL, which
speaks SandboxFusion's `POST /run_code`; on this machine only with `unsafe_local = true`, and that is no sandbox."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import model_validator

from isthmus.recipe.section import Count, Positive, Seconds, Section, Unit, Whole, key
from isthmus.rewards import EachAlone, Judgement, LeftOut, Sample
from isthmus.rewards.parts.http import Unanswered
from isthmus.rewards.parts.programs import Case, prints_the_same, program_in, tests_of
from isthmus.rewards.parts.runners import Here, Runner, Sandbox

Mebibytes = Annotated[Positive, Unit("MiB")]


class Options(Section):
    """The last block of code in the answer is the program; the tests are in the data."""

    url: str | None = key(None, "of the sandbox, such as http://localhost:8080", pattern="^https?://")
    unsafe_local: bool = key(False, "run programs here, with limits, but with the rights of this user: no sandbox")
    language: str = key("python", "the language of the programs, as the sandbox calls it")
    partial: bool = key(False, "the reward is the share of the tests that pass, and not all or nothing")
    timeout: Seconds = key(10.0, "for a program on one test; what takes longer fails it", gt=0)
    memory: Mebibytes = key(512, "that a program may take")
    retries: Whole = key(3, "further tries where the sandbox is busy or does not answer", ge=0)
    retry_wait: Seconds = key(1.0, "before the first retry; it doubles", ge=0)
    at_once: Count = key(4, "samples that are tried at the same time")

    @model_validator(mode="after")
    def _runs_somewhere(self) -> Self:
        if (self.url is None) != self.unsafe_local:
            raise ValueError(
                "give the url of a sandbox, or unsafe_local = true, which runs what a model writes with your own rights"
            )
        if self.unsafe_local and self.language != "python":
            raise ValueError(f"unsafe_local runs python alone, and not {self.language}")
        return self


class Code(EachAlone):
    def __init__(self, options: Options, runner: Runner):
        self.options, self.runner, self.at_once = options, runner, options.at_once

    def judge(self, sample: Sample) -> Judgement:
        tests = tests_of(sample.problem)
        if not tests:
            return LeftOut("the problem has no tests")
        program = program_in(sample.answer or "")
        if program is None:
            return 0.0
        passed = 0
        for test in tests:
            try:
                passes = self._passes(program, test)
            except Unanswered as error:
                return LeftOut(str(error))
            if not passes and not self.options.partial:
                return 0.0
            passed += passes
        return passed / len(tests)

    def _passes(self, program: str, test: Case) -> bool:
        outcome = self.runner.run(f"{program}\n{test.code}", test.stdin)
        return outcome.is_good and (test.stdout is None or prints_the_same(outcome.stdout, test.stdout))


def open(options: Options) -> Code:
    if options.url is None:
        return Code(options, Here(options.timeout, options.memory))
    runner = Sandbox(
        options.url, options.language, options.timeout, options.memory, options.retries, options.retry_wait
    )
    return Code(options, runner)
