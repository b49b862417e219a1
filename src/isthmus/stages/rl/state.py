"""What reinforcement learning changes, and what its checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from isthmus.model.model import Model
from isthmus.records import TrainRecord
from isthmus.run import RunFolder
from isthmus.trainer.checkpoint import (
    CheckpointWriter,
    SavedCheckpoint,
    TrainingState,
    load_model_state,
    resume,
    rng_state,
)
from isthmus.trainer.optimizer import Optimizer

NAME = "rl"


@dataclass
class State:
    """The learner after `step` finished steps. `mismatches` has that of every update, in nats per token."""

    run: RunFolder
    model: Model
    optimizer: Optimizer
    checkpoints: CheckpointWriter
    step: int = 0
    mismatches: list[float] = field(default_factory=list)

    @classmethod
    def open(cls, run: RunFolder, train: TrainRecord, device: torch.device, say: Callable[[str], None]) -> State:
        """From the last whole checkpoint of this stage, or from the supervised one if there is none."""
        recipe = run.recipe
        model = Model(recipe.model).to(device)
        optimizer = Optimizer(model, recipe.rl.optimizer, recipe.rl.steps)
        checkpoints = CheckpointWriter(run.path / "checkpoints" / NAME, recipe.rl.keep_checkpoints, None)
        state = cls(run, model, optimizer, checkpoints)
        if not state._resume(say):
            model.load_state_dict(load_model_state(run.path / train.checkpoint, train.checkpoint_sha256))
        return state

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors on the host, under published names."""
        return {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}

    def save(self) -> None:
        """Start to write a checkpoint; the state is copied before this returns."""
        self.checkpoints.save(self.step, self._stored({"rng": rng_state(self.device)}))

    def save_last(self) -> SavedCheckpoint:
        """Write a checkpoint and wait until it is on the disk."""
        self.save()
        saved = self.checkpoints.finish()
        assert saved is not None
        return saved

    def _resume(self, say: Callable[[str], None]) -> bool:
        tell = partial(self.run.event, NAME)
        loaded = resume(self.checkpoints.root, self._stored({}), None, self.device, tell, say)
        if loaded is None:
            return False
        self.step = loaded.step
        seen = [event.get("mismatch_abs") for event in self.run.events(NAME, "step") if event["step"] <= loaded.step]
        self.mismatches = [value for value in seen if value is not None]
        tell("resume", from_step=loaded.step)
        say(f"  continuing from the checkpoint at step {loaded.step}")
        return True

    def _stored(self, extra: dict[str, dict[str, str]]) -> TrainingState:
        return TrainingState(self.model.state_dict(), self.optimizer.state(), extra)
