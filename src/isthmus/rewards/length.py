"""Soft overlong punishment, DAPO's (arXiv 2503.14476, eq. 13): 0 up to the limit less a buffer, then falling linearly
to -1 at the limit."""

from __future__ import annotations

from isthmus.recipe.section import Section, Share, Tokens, key
from isthmus.rewards import EachAlone, Judgement, Sample


class Options(Section):
    """DAPO has a buffer of 4,096 tokens below a limit of 20,480."""

    buffer: Tokens | None = key(None, "tokens below the limit in which the reward falls; a share of it if absent")
    buffer_share: Share = key(0.2, "of the limit, where buffer is absent", gt=0)


class Length(EachAlone):
    def __init__(self, options: Options):
        self.options = options

    def judge(self, sample: Sample) -> Judgement:
        buffer = self.options.buffer or self.options.buffer_share * sample.limit
        over = sample.tokens - (sample.limit - buffer)
        return -min(max(over / buffer, 0.0), 1.0)


def open(options: Options) -> Length:
    return Length(options)
