"""Which samples are worth learning from: pure functions, each with the count of what it dropped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from isthmus.rewards.parts.contract import Sample
from isthmus.tasks.parts.languages import language_of, share_in

Filter = Callable[[Sample], bool]
"""Whether a sample is kept."""

FILTERS = ("correct", "one-language", "not-longer-than", "no-repetition", "unlike-heldout")

_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")


@dataclass(frozen=True)
class Kept:
    """What passed, in its order, and how many samples each filter dropped; of several, the first one counts."""

    samples: list[Sample]
    dropped: dict[str, int]


def keep(samples: Iterable[Sample], filters: Mapping[str, Filter]) -> Kept:
    """The samples that pass all filters, which are asked in their order."""
    kept: list[Sample] = []
    dropped = dict.fromkeys(filters, 0)
    for sample in samples:
        reason = next((name for name, passes in filters.items() if not passes(sample)), None)
        if reason is None:
            kept.append(sample)
        else:
            dropped[reason] += 1
    return Kept(kept, dropped)


def correct() -> Filter:
    """Right as its task judges it; what could not be judged is dropped."""
    return lambda sample: sample.task.accuracy(sample.problem, sample.text) == 1.0


def one_language(share: float = 0.95) -> Filter:
    """At least this share of its words is in the language of the prompt."""
    return lambda sample: share_in(sample.text, language_of(sample.problem.prompt)) >= share


def not_longer_than(tokens: int) -> Filter:
    """It ended by itself within so many tokens."""
    return lambda sample: sample.finished and sample.tokens <= tokens


def no_repetition(length: int = 8, times: int = 3) -> Filter:
    """No run of `length` words or signs occurs more than `times` times."""
    return lambda sample: max(Counter(_ngrams(sample.text, length)).values(), default=0) <= times


def unlike_heldout(prompts: Iterable[str], length: int = 10, common_share: float = 0.05) -> Filter:
    """Neither prompt nor completion shares a run of `length` words or signs with a held-out prompt.

    A prompt that is shorter counts as a whole. A run that is in more than `common_share` of the held-out prompts, and
    in more than two, is what all of them begin or end with, and tells nothing.
    """
    whole: set[tuple[str, ...]] = set()
    counts: Counter[tuple[str, ...]] = Counter()
    asked = list(dict.fromkeys(prompts))
    for prompt in asked:
        whole.add(tuple(_tokens(prompt)))
        counts.update(set(_ngrams(prompt, length)))
    most = max(2.0, common_share * len(asked))
    telling = {run for run, count in counts.items() if count <= most}

    def passes(sample: Sample) -> bool:
        if tuple(_tokens(sample.problem.prompt)) in whole:
            return False
        texts = (sample.problem.prompt, sample.text)
        return not any(run in telling for text in texts for run in _ngrams(text, length))

    return passes


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _ngrams(text: str, length: int) -> list[tuple[str, ...]]:
    tokens = _tokens(text)
    return [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
