"""What engines that someone else started do not do for a recipe."""

from __future__ import annotations

from isthmus.recipe.schema import Recipe
from isthmus.recipe.steps import RlSection, SampleSection


def elsewhere_problem(recipe: Recipe) -> str | None:
    """Why the steps of a recipe cannot generate with engines elsewhere, and what to write instead; None if they can."""
    forms: dict[str, str] = {}
    for step in recipe.step:
        own = step.rollout_format if isinstance(step, RlSection | SampleSection) else None
        answers = step.name in recipe.evaluation.after
        if (own or answers) and recipe.architecture_of(step) != recipe.model:
            return (
                f"step.{step.name} generates with a model of its own, and engines elsewhere serve [model]; let the "
                "step start from [model], or name a pool that is here"
            )
        forms |= {own: f"step.{step.name}.rollout_format"} if own else {}
        forms |= {recipe.evaluation.format: "evaluation.format"} if answers else {}
    if len(forms) > 1:
        told = ", ".join(f"{key} = {form!r}" for form, key in forms.items())
        return f"engines elsewhere serve one format, and {told}; write the same format in each"
    return None
