"""Going on from a stage's last whole checkpoint, and saying what is not as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from rich.markup import escape
from torch.distributed import ProcessGroup

from isthmus.trainer.checkpoint import LoadedCheckpoint, TrainingState, load_latest, restore_rng


def resume(
    root: Path,
    state: TrainingState,
    group: ProcessGroup | None,
    device: torch.device,
    event: Callable[..., None],
    say: Callable[[str], None],
) -> LoadedCheckpoint | None:
    """Fill `state` and the random generators as `load_latest` does; None if there is no checkpoint.

    `event` takes the name of an event and its fields, `say` a line for the user. Raises as `load_latest`.
    """

    def damaged(message: str) -> None:
        event("fallback", what=f"the checkpoint before a damaged one: {message}", why="the newest is damaged")
        say(f"  [yellow]{escape(message)}[/]; trying the one before it")

    loaded = load_latest(root, state, group, damaged)
    if loaded is None:
        return None
    if not restore_rng(loaded.extra["rng"], device):
        event("fallback", what="a new random state", why=f"{loaded.folder} was written on another kind of chip")
    if loaded.torch != torch.__version__:
        event("torch-changed", before=loaded.torch, now=torch.__version__)
    return loaded
