"""A rollout: what the engine wrote for the prompts of a step, and what it earned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from isthmus.engines import Completion
from isthmus.rewards import Scores
from isthmus.tasks import Problem


@dataclass
class Rollout:
    """Samples of one step: G completions for each of P prompts, with the scores of all P * G. `rolled_prompts` counts
    those that were drawn for it, where some were replaced; `pool` wrote it."""

    problems: list[Problem]
    prompts: list[list[int]]
    completions: list[list[Completion]]
    scores: Scores
    seconds: float
    rolled_prompts: int | None = None
    pool: str = ""

    @property
    def flat(self) -> list[tuple[int, Completion]]:
        """(prompt index, completion), sample by sample."""
        return [(index, one) for index, group in enumerate(self.completions) for one in group]

    @property
    def version(self) -> int:
        """The oldest of the weights that wrote it."""
        return min(completion.version for _, completion in self.flat)

    def lags(self, version: int) -> dict[str, float]:
        """How old it is for a trainer of that version, for an event: `staleness` of its oldest token, `staleness_mean`
        over tokens, and the share of samples that new weights reached while they were written."""
        runs = [run for _, one in self.flat for run in one.versions or [(one.version, len(one.tokens))]]
        tokens = sum(count for _, count in runs)
        crossed = sum(one.version != one.last_version for _, one in self.flat) / len(self.flat)
        mean = sum((version - written) * count for written, count in runs) / max(tokens, 1)
        return {"staleness": version - self.version, "staleness_mean": round(mean, 5), "written_across": crossed}

    @property
    def totals(self) -> Tensor:
        """[P, G], what is maximised; NaN for a sample that could not be judged."""
        return torch.tensor(self.scores.numbers).reshape(len(self.prompts), -1)

    def shown(self) -> dict[str, Any]:
        """For an event."""
        samples, tokens = len(self.flat), sum(len(one.tokens) for _, one in self.flat)
        drawn = {} if self.rolled_prompts is None else {"rolled_prompts": self.rolled_prompts}
        return {
            **self.scores.shown(),
            **drawn,
            "rollout_pool": self.pool,
            "completion_tokens": round(tokens / samples, 3),
            "truncated": sum(one.finish_reason == "length" for _, one in self.flat) / samples,
            "tokens": tokens,
            "tokens_per_s": round(tokens / self.seconds, 1),
            "rollout_s": round(self.seconds, 4),
        }
