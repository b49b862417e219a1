"""Language consistency, as in R1 (arXiv 2501.12948, 2.3.2): the share of the words of the thought that are in the
language of the prompt."""

from __future__ import annotations

from typing import Literal

from isthmus.recipe.section import Section, key
from isthmus.rewards import EachAlone, Judgement, Sample
from isthmus.tasks.parts.languages import language_named, language_of, share_in

PROMPT = "prompt"


class Options(Section):
    """R1 adds this reward to that of the accuracy."""

    language: str = key(PROMPT, "the language to think in: that of the `prompt`, or a code such as en, zh, ru")
    part: Literal["thought", "all"] = key("thought", "what has to be in it: the thought, or the answer as well")


class LanguageConsistency(EachAlone):
    """A thought without words, of numbers and formulas alone, is in no other language: 1."""

    def __init__(self, options: Options):
        self.options = options
        self.language = None if options.language == PROMPT else language_named(options.language)

    def judge(self, sample: Sample) -> Judgement:
        text = sample.thought if self.options.part == "thought" else sample.text
        return share_in(text, self.language or language_of(sample.problem.prompt))


def open(options: Options) -> LanguageConsistency:
    return LanguageConsistency(options)
