"""Models beside the one that learns."""

from __future__ import annotations

from isthmus.model.model import Model
from isthmus.stages.steps.rl.state import State, empty_model


def reference_model(state: State) -> Model | None:
    """A model with the weights that the step began with, if the loss has a KL to them."""
    work = state.work
    if not work.section.loss.kl_weight:
        return None
    ranks = state.crew.ranks
    model = empty_model(work, ranks)
    work.start.fill(model, work.recipe.seed, ranks.storage, state.tell)
    return model.requires_grad_(False)
