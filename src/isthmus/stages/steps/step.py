"""A step of a run under way: its section of the recipe, its folder, and the weights that it starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.distributed import ProcessGroup

from isthmus.model.model import Model
from isthmus.pools import Pool, get_pool
from isthmus.recipe.architecture import ModelSection
from isthmus.recipe.lineage import line
from isthmus.recipe.practice import stream
from isthmus.recipe.schema import Recipe
from isthmus.recipe.steps import MODEL, StepSection
from isthmus.records import PlanRecord, TrainPlace, read_weights, rollout_pool
from isthmus.run import RunFolder
from isthmus.supervise.situation import place_of
from isthmus.trainer.checkpoint import load_weights
from isthmus.trainer.parts import initialise, load_published, model_state

S = TypeVar("S", bound=StepSection, covariant=True)


@dataclass(frozen=True)
class StepRun(Generic[S]):
    """One step of a run. Its events bear its name, and all that it leaves is in its `folder`."""

    run: RunFolder
    section: S
    moved: TrainPlace | None = None
    """Where to train in place of what plan and incidents say."""
    agreed: bool = False
    """A person said that its rollouts may move."""

    @classmethod
    def of(cls, run: RunFolder, name: str) -> StepRun[Any]:
        return cls(run, run.recipe.named(name))  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        return self.section.name

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def folder(self) -> Path:
        return self.run.step_folder(self.name)

    @property
    def architecture(self) -> ModelSection:
        return self.recipe.architecture_of(self.section)

    @property
    def model_name(self) -> str | None:
        """Which of [models.*] the step trains; None is [model]."""
        return line(self.recipe.step, self.name)[0].model

    @property
    def stream(self) -> str:
        """What random choices of this step are drawn by, beside the recipe's seed."""
        return stream(self.recipe, self.name)

    @property
    def plan(self) -> PlanRecord:
        return self.run.require_record("plan", PlanRecord, "plan")

    @property
    def place(self) -> TrainPlace:
        """Where it trains: where the plan put it, or an incident moved it since."""
        return self.moved or place_of(self.run, self.name)

    @property
    def home(self) -> Pool:
        """The pool that trains it, with the ranks that are left."""
        place = self.place
        return replace(get_pool(self.recipe, place.pool), ranks=place.ranks)

    @property
    def away(self) -> Pool:
        """The pool that generates for it: where the plan put rollouts, or an incident moved them since."""
        return get_pool(self.recipe, rollout_pool(self.run, self.name, self.plan.pool_of("rollout")))

    def event(self, event: str, **fields: Any) -> None:
        self.run.event(self.name, event, **fields)

    def events(self, event: str) -> list[dict[str, Any]]:
        return self.run.events(self.name, event)

    @property
    def start(self) -> Start:
        """The weights that it starts from. Raises IsthmusError if the step that makes them is not done."""
        name = self.recipe.start_of(self.section)
        return Start(MODEL) if name == MODEL else Start.after(self.run, name)

    @property
    def left(self) -> Start:
        """The weights that it left. Raises IsthmusError if it is not done."""
        return Start.after(self.run, self.name)


@dataclass(frozen=True)
class Start:
    """Weights that a step starts from: those of a checkpoint of the step `name`, or what a model begins with."""

    name: str
    checkpoint: Path | None = None
    sha256: str | None = None

    @classmethod
    def after(cls, run: RunFolder, step: str) -> Start:
        """The weights that a step left. Raises IsthmusError if it is not done."""
        record = read_weights(run, step)
        return cls(step, run.path / record.checkpoint, record.checkpoint_sha256)

    def fill(self, model: Model, seed: int, group: ProcessGroup | None, tell: Callable[..., None]) -> None:
        """Put the weights into a model, or into what this rank holds of it. `tell` gets what is left out as events.

        Raises DamagedFile if a checkpoint is not what its record says.
        """
        if self.checkpoint is not None and self.sha256 is not None:
            load_weights(self.checkpoint, self.sha256, model_state(model), group)
        elif model.architecture.from_ is None:
            initialise(model, seed)
        else:
            for left_out in load_published(model, model.architecture.from_):
                tell("fallback", what=left_out, why="the recipe's model does without it")

    def weights(self, architecture: ModelSection, seed: int, tell: Callable[..., None]) -> dict[str, Tensor]:
        """All of them on the host, under published names; arguments and errors are those of `fill`."""
        model = Model(architecture)
        self.fill(model, seed, None, tell)
        return {name: tensor.detach() for name, tensor in model.state_dict().items()}
