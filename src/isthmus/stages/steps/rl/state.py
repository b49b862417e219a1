"""What reinforcement learning changes, and what its checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from isthmus.formats.parts.assemble import unfilled
from isthmus.model.model import Model
from isthmus.recipe.architecture import ModelSection
from isthmus.recipe.schema import TrainSection
from isthmus.recipe.steps import RlSection
from isthmus.stages.steps.rl.crew import Crew
from isthmus.stages.steps.step import StepRun
from isthmus.tasks import seeded
from isthmus.trainer.checkpoint import (
    CheckpointWriter,
    SavedCheckpoint,
    TrainingState,
    resume,
    rng_state,
)
from isthmus.trainer.mesh import Ranks
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.parallel import distribute, materialise
from isthmus.trainer.parts import model_state


@dataclass
class State:
    """The learner after `step` finished steps. `mismatches` has that of every update, in nats per token; `saved_at` is
    the step of the newest checkpoint, None before there is one."""

    work: StepRun[RlSection]
    model: Model
    optimizer: Optimizer
    checkpoints: CheckpointWriter
    crew: Crew
    step: int = 0
    saved_at: int | None = None
    mismatches: list[float] = field(default_factory=list)
    is_trial: bool = False

    @classmethod
    def open(cls, work: StepRun[RlSection], crew: Crew, say: Callable[[str], None]) -> State:
        """From the last whole checkpoint of the step, or from the weights that it starts from if there is none."""
        state = cls.empty(work, crew)
        if not state._resume(say):
            work.start.fill(state.model, work.recipe.seed, crew.ranks.storage, state.tell)
        return state

    @classmethod
    def empty(cls, work: StepRun[RlSection], crew: Crew) -> State:
        """With room for weights and moments, and nothing in it yet."""
        section, ranks = work.section, crew.ranks
        model = empty_model(work.architecture, work.recipe.train, ranks)
        optimizer = Optimizer(model, section.optimizer, section.steps, ranks, work.recipe.train.replicate)
        checkpoints = CheckpointWriter(work.folder / "checkpoints", section.keep_checkpoints, ranks.storage)
        return cls(work, model, optimizer, checkpoints, crew)

    def tell(self, event: str, **fields: Any) -> None:
        """An event of the step, which the first rank writes, unless nothing of this state is kept."""
        if self.crew.ranks.is_first and not self.is_trial:
            self.work.event(event, **fields)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def weights(self) -> dict[str, Tensor]:
        """The whole model's tensors on the host, under published names; of several ranks the first one has them all."""
        self.crew.order("weights")
        if self.crew.ranks.world == 1:
            return {name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}
        return gathered_weights(self.model, self.crew.ranks)

    def whole_model(self) -> Model:
        """The model that learns, or a copy on the host of one that is spread over ranks."""
        if self.crew.ranks.world == 1:
            return self.model
        model = Model(self.work.architecture)
        model.load_state_dict(self.weights())
        return model.requires_grad_(False)

    def orders(self) -> dict[str, Callable[..., Any]]:
        """What other ranks than the first are told to do."""
        return {"weights": self.weights, "save": self._save, "finish": self.checkpoints.finish}

    def save(self) -> None:
        """Start to write a checkpoint; the state is copied before this returns."""
        self.crew.order("save", self.step)
        self._save(self.step)

    def seed(self) -> None:
        """Begin the random stream of the next update, which depends on the recipe and the number of the update alone:
        what was drawn before, by checks of an engine or in making a model, leaves no trace in it."""
        torch.manual_seed(seeded(self.work.stream, self.work.recipe.seed, "update", self.step).getrandbits(63))

    def _save(self, step: int) -> None:
        self.seed()
        self.checkpoints.save(step, self.stored({"rng": rng_state(self.device), **self.told}))
        self.saved_at = step

    def save_last(self) -> SavedCheckpoint:
        """Write a checkpoint and wait until it is on the disk."""
        self.save()
        self.crew.order("finish")
        saved = self.checkpoints.finish()
        assert saved is not None
        return saved

    def _resume(self, say: Callable[[str], None]) -> bool:
        tell, group = self.tell, self.crew.ranks.storage
        loaded = resume(self.checkpoints.root, self.stored({}), group, self.device, tell, say)
        if loaded is None:
            return False
        self.step = self.saved_at = loaded.step
        seen = [event.get("mismatch_abs") for event in self.work.events("step") if event["step"] <= loaded.step]
        self.mismatches = [value for value in seen if value is not None]
        tell("resume", from_step=loaded.step)
        say(f"  continuing from the checkpoint at step {loaded.step}")
        return True

    @property
    def told(self) -> dict[str, Any]:
        """What a checkpoint says of itself beside its tensors. Which problems an update draws, and what it samples,
        follows from the stream, the seed and the number of the update."""
        data = f"{self.work.stream} of seed {self.work.recipe.seed}, after update {self.step}"
        return {"data": data, "groups": self.optimizer.groups()}

    def stored(self, extra: dict[str, Any]) -> TrainingState:
        """What a checkpoint holds; the tensors are the state's own."""
        return TrainingState(model_state(self.model), self.optimizer.state(), extra)


def empty_model(architecture: ModelSection, train: TrainSection, ranks: Ranks) -> Model:
    """A model with room for its weights; spread over ranks as [train] says, if there are several."""
    if not ranks.grouped:
        return Model(architecture).to(ranks.device)
    model = unfilled(architecture)
    if train.activation_checkpointing:
        model.recompute_activations()
    distribute(model, ranks, train, torch.float32)
    materialise(model, ranks.device)
    return model


def gathered_weights(model: Model, ranks: Ranks) -> dict[str, Tensor]:
    """Whole tensors of a model that is spread over ranks, on the host of the first; what others return is not all."""
    stored = model_state(model)
    experts = {name: tensor.cpu() for name, tensor in stored.items() if not isinstance(tensor, DTensor)}
    shared = {name: tensor for name, tensor in stored.items() if isinstance(tensor, DTensor)}
    whole = {name: tensor.full_tensor().cpu() for name, tensor in shared.items()}
    parts: list[Any] | None = [None] * ranks.world if ranks.is_first else None
    dist.gather_object(experts, parts, dst=0, group=ranks.storage)
    found = whole | {name: tensor for part in parts or [] for name, tensor in part.items()}
    return {name: found[name] for name in _published_order(model, found)}


def _published_order(model: Model, found: dict[str, Tensor]) -> list[str]:
    """Names as the state dict of a whole model has them."""
    names = unfilled(model.architecture).state_dict()
    return [name for name in names if name in found]
