"""Silent small errors of a chip, and healthy steps, for benchmarks/revert.py."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.revert_steps import STEP, Plant, carry_out, new_run, replaced
from isthmus.model.model import Model
from isthmus.records import incidents
from isthmus.stages.steps import text

SIZES = (1e-7, 1e-5, 1e-3, 1e-1, 1e3)
"""By how much one number of the gradient is off, relative to itself."""
SHARES = (0.05, 0.3)
"""Of the computations of a gradient."""
UPDATES, HEALTHY_UPDATES, CHECKED = 30, 100, 20


@contextmanager
def wrong_gradients(
    size: float, share: float, chance: random.Random, always_alike: bool = False
) -> Iterator[list[int]]:
    """In a share of the computations the largest number of one parameter's gradient is off; `always_alike`: in all of
    them, by the same. Yields a list with the number of computations and of those that were wrong."""
    sound, counted = text.accumulate_gradients, [0, 0]

    def accumulate(model: Model, *rest: Any) -> Any:
        found = sound(model, *rest)
        counted[0] += 1
        if not always_alike and chance.random() >= share:
            return found
        counted[1] += 1
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        flat = (grads[0] if always_alike else chance.choice(grads)).view(-1)
        flat[flat.abs().argmax()] *= 1.0 + size
        return found

    with replaced((text, "accumulate_gradients", accumulate)):
        yield counted


def one_error(size: float, share: float | None, folder: Path, shared: Path, chance: random.Random) -> dict[str, Any]:
    """A step of 30 updates, each third of which is computed twice, on a chip that errs in silence; `share` None: each
    computation errs alike. It is watched until the first incident."""
    run = new_run(folder, "sft", shared, updates=UPDATES)
    with wrong_gradients(size, share or 1.0, chance, always_alike=share is None) as counted:
        carry_out(run, Plant())
    met = incidents(run, STEP)
    shutil.rmtree(folder)
    seen = met[0].update if met else None
    return {"size": size, "share": share, "computed": counted[0], "wrong": counted[1], "found_at": seen}


def healthy(kind: str, seed: int, folder: Path, shared: Path) -> dict[str, Any]:
    """A step of 100 updates under the default rules, every 20th of which is computed twice."""
    run = new_run(folder, kind, shared, seed, HEALTHY_UPDATES, repeat_every=CHECKED)
    ended = carry_out(run, Plant())
    met = incidents(run, STEP)
    alarms = [f"{one.signal}: {one.detail}" for one in met] + ([f"{ended}"] if ended is not None else [])
    shutil.rmtree(folder)
    return {"step": kind, "seed": seed, "alarms": alarms}
