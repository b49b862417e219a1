"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): prompts whose samples all earn the same are replaced.

The paper draws until the step has as many prompts as it wants; here rollouts are bounded, and the last ones may stay
short of it.
"""

from __future__ import annotations

from isthmus.rewards import Scores
from isthmus.stages.steps.rl.rollout import Rollout


def telling_groups(rollout: Rollout) -> list[int]:
    """Numbers of the prompts whose samples, as far as they could be judged, earned not all the same."""
    return [
        number
        for number, rewards in enumerate(rollout.totals.tolist())
        if len({reward for reward in rewards if reward == reward}) > 1
    ]


def telling(rollouts: list[Rollout], wanted: int) -> Rollout:
    """The first `wanted` prompts of several rollouts that tell anything; the last rollout if none does.

    Its seconds are those of all, and so are the samples that it says could not be judged.
    """
    if len(rollouts) == 1 and len(rollouts[0].prompts) == wanted == len(telling_groups(rollouts[0])):
        return rollouts[0]
    seconds = sum(rollout.seconds for rollout in rollouts)
    chosen = [(rollout, number) for rollout in rollouts for number in telling_groups(rollout)][:wanted]
    if not chosen:
        chosen = [(rollouts[-1], number) for number in range(len(rollouts[-1].prompts))]
    return Rollout(
        [rollout.problems[number] for rollout, number in chosen],
        [rollout.prompts[number] for rollout, number in chosen],
        [rollout.completions[number] for rollout, number in chosen],
        _scores(rollouts, chosen),
        seconds,
        rolled_prompts=sum(len(rollout.prompts) for rollout in rollouts),
        pool=rollouts[-1].pool,
    )


def _scores(rollouts: list[Rollout], chosen: list[tuple[Rollout, int]]) -> Scores:
    def of(rollout: Rollout, number: int) -> slice:
        first = sum(len(group) for group in rollout.completions[:number])
        return slice(first, first + len(rollout.completions[number]))

    names = rollouts[-1].scores.values
    left_out: dict[str, int] = {}
    for rollout in rollouts:
        for reason, count in rollout.scores.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + count
    return Scores(
        {name: [one for r, n in chosen for one in r.scores.values[name][of(r, n)]] for name in names},
        [one for r, n in chosen for one in r.scores.totals[of(r, n)]],
        left_out,
        rollouts[-1].scores.measures,
    )
