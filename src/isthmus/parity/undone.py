"""Updates that rounding undoes: what training changed in fp32, and is what it was before once it is bf16 again.

bf16 keeps 8 significant bits. A run that starts from bf16 weights and moves most of them by less than half a step, as
reinforcement learning with small rates does, loses these moves to a rounding to the nearest: the bundle is nearer to
the checkpoint that it started from than to what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isthmus.formats.files.published import Checkpoint, StoredTensors
from isthmus.parity.gate import declared, finite, refuses
from isthmus.recipe.architecture import ModelSection
from isthmus.records import Check, CheckOutcome

NAME = "updates that rounding undoes"
LIMIT = 0.1
"""Share of the changed elements from which on a person should know. Weights that a run moves by many steps of bf16
return to where they were in less than one of a hundred; the KL says what it costs."""
WAYS_OUT = 'export = "fp32" in [handoff] keeps the masters, export = "bf16-stochastic" keeps the moves on average'


@dataclass(frozen=True)
class Updates:
    """Of the elements of the tensors that were bf16 at the start: how many training changed, and how many of these are
    stored as they were at the start."""

    elements: int
    changed: int
    undone: int

    @property
    def share(self) -> float:
        """Of what was changed; 0 if nothing was."""
        return self.undone / self.changed if self.changed else 0.0


@contextmanager
def start_of(folder: Path, architecture: ModelSection) -> Iterator[Mapping[str, Tensor]]:
    """The weights of a published checkpoint, each read when it is asked for."""
    with StoredTensors(folder) as stored:
        yield Checkpoint(stored, architecture).state()


def measure_updates(
    start: Mapping[str, Tensor], masters: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> Updates:
    """Compare fp32 `masters` with what a run started from, and both with what is `stored`, tensor by tensor.

    Tensors that the start did not hold as numbers of bf16, or that are stored under another name, are left out.
    """
    elements = changed = undone = 0
    for name, master in masters.items():
        if name not in start or name not in stored:
            continue
        before = start[name].float()
        if before.shape != master.shape or not torch.equal(before, before.bfloat16().float()):
            continue
        moved = master.float() != before
        elements += before.numel()
        changed += int(moved.sum())
        undone += int((moved & (stored[name].float() == before)).sum())
    return Updates(elements, changed, undone)


def check_updates(found: Updates, stored_format: str, kl: Check, start: Path, *, stochastic: bool = False) -> Check:
    """What rounding undid, beside what it cost: a caution where it undid much, a fault where the KL refuses as well.

    What is rounded at random is held against the KL alone: elements that stay where they were are made up for by others
    that move a whole step.
    """
    few = found.share <= LIMIT or (stochastic and not refuses(kl))
    outcome: CheckOutcome = "pass" if few else "fail" if refuses(kl) else "caution"
    cost = f"the mean KL to what was trained is {kl.figure}" if kl.figure else "what it costs was not measured"
    detail = (
        f"{found.changed:,} of {found.elements:,} elements were changed since {start.name}, and {found.undone:,} of "
        f"these are stored in {stored_format} as they were there{', rounded at random' * stochastic}; {cost}"
    )
    return Check(
        layer="tokens",
        name=NAME,
        outcome=outcome,
        figure=finite(100 * found.share, "% of the changed", f"masters, {stored_format} and {start}", rehearsed=False),
        limit=None if stochastic else declared(100 * LIMIT, "% of the changed", "isthmus.parity.undone.LIMIT"),
        detail=detail if outcome == "pass" else f"{detail}. {WAYS_OUT}",
    )
