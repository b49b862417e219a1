"""What every section of a recipe is: strict and frozen."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
)

from isthmus.errors import IsthmusError

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class RecipeError(IsthmusError):
    """The recipe cannot be read, or says something it may not say."""


class Section(BaseModel):
    """Base of every recipe section: unknown keys are refused, values cannot change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
