"""What reinforcement learning changes, and what its checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.model.model import Model
from isthmus.recipe.steps import RlSection
from isthmus.stages.steps.step import StepRun
from isthmus.trainer.checkpoint import (
    CheckpointWriter,
    SavedCheckpoint,
    TrainingState,
    resume,
    rng_state,
)
from isthmus.trainer.optimizer import Optimizer


@dataclass
class State:
    """The learner after `step` finished steps. `mismatches` has that of every update, in nats per token."""

    work: StepRun[RlSection]
    model: Model
    optimizer: Optimizer
    checkpoints: CheckpointWriter
    step: int = 0
    mismatches: list[float] = field(default_factory=list)

    @classmethod
    def open(cls, work: StepRun[RlSection], device: torch.device, say: Callable[[str], None]) -> State:
        """From the last whole checkpoint of the step, or from the weights that it starts from if there is none."""
        section = work.section
        model = Model(work.architecture).to(device)
        optimizer = Optimizer(model, section.optimizer, section.steps)
        checkpoints = CheckpointWriter(work.folder / "checkpoints", section.keep_checkpoints, None)
        state = cls(work, model, optimizer, checkpoints)
        if not state._resume(say):
            work.start.fill(model, work.recipe.seed, None, work.event)
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
        tell = self.work.event
        loaded = resume(self.checkpoints.root, self._stored({}), None, self.device, tell, say)
        if loaded is None:
            return False
        self.step = loaded.step
        seen = [event.get("mismatch_abs") for event in self.work.events("step") if event["step"] <= loaded.step]
        self.mismatches = [value for value in seen if value is not None]
        tell("resume", from_step=loaded.step)
        say(f"  continuing from the checkpoint at step {loaded.step}")
        return True

    def _stored(self, extra: dict[str, dict[str, str]]) -> TrainingState:
        return TrainingState(self.model.state_dict(), self.optimizer.state(), extra)
