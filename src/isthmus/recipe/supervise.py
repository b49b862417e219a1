"""What a supervised step may do by itself before a person is asked, or it ends."""

from __future__ import annotations

from typing import Annotated, Literal

from isthmus.recipe.section import Count, Number, Seconds, Section, Share, Steps, Unit, Whole, key


class SuperviseSection(Section):
    """Budgets of the ladder that a step climbs when training goes wrong; docs/revert.md tells the rules.

    Three restarts without progress are those of a published restart agent, ten minutes without a sign of life
    DLRover's; before the first update a rank gets as long as others wait for what one does alone, two hours.
    Spikes are judged as OLMo-core's skip_step_optimizer does.
    """

    retries: Whole = key(1, "times that one update is computed again before its batch is left out", ge=0)
    skips: Whole = key(2, "batches that a step may leave out", ge=0)
    restarts: Whole = key(3, "restarts of a step, or of its engine, without a newer checkpoint in between", ge=0)
    shrinks: Whole = key(1, "times that a step may go on with fewer ranks", ge=0)
    reverts: Whole = key(
        1, "times that a step may move to another pool of place.train, and its rollouts to one of place.rollout", ge=0
    )
    on_revert: Literal["go", "ask"] = key("go", "ask: end with exit code 1 and say how to go on, before a move")
    patience_s: Seconds = key(
        0.0,
        "pauses in all, each twice as long as the last, in which a step waits for its pool once restarts are spent",
        ge=0,
    )
    move_if: Share = key(0.9, "how sure it must be that moving is quicker, to move before the restarts are spent")
    beat_s: Seconds = key(600.0, "time without a sign of life of a rank within its updates", gt=0)
    start_s: Seconds = key(7200.0, "the same before its first update, and while it saves or evaluates", gt=0)
    spike_sigma: Number = key(6.0, "how far above its mean a loss or a gradient norm is a spike", gt=0)
    spike_window: Count = key(128, "updates that the mean and the deviation are of")
    spike_history: Annotated[int, Unit("1")] = key(64, "updates before which nothing is a spike", ge=2)
    repeat_every: Steps | None = key(200, "updates of which one is computed twice and compared; none if absent")
    repeat_band: Number = key(
        1e-3, "relative difference of a repeated loss or norm that is too much, on accelerators", gt=0
    )
