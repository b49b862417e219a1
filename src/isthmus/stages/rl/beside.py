"""Models beside the one that learns."""

from __future__ import annotations

from isthmus.model.model import Model
from isthmus.records import TrainRecord
from isthmus.stages.rl.state import State
from isthmus.trainer.checkpoint import load_model_state


def reference_model(state: State, train: TrainRecord) -> Model | None:
    """A model with the weights that the step began with, if the loss has a KL to them."""
    recipe = state.run.recipe
    if not recipe.rl.loss.kl_weight:
        return None
    model = Model(recipe.model).to(state.device)
    model.load_state_dict(load_model_state(state.run.path / train.checkpoint, train.checkpoint_sha256))
    return model.requires_grad_(False)
