"""What every section of a recipe is: strict and frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler

from isthmus.errors import IsthmusError


@dataclass(frozen=True)
class Unit:
    """The unit of a number, beside its type; `1` for a pure number, or a count of what the description names."""

    name: str

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "unit": self.name}


Positive = Annotated[int, Field(gt=0)]
Count = Annotated[Positive, Unit("1")]
Whole = Annotated[int, Unit("1")]
Number = Annotated[float, Unit("1")]
Share = Annotated[float, Field(ge=0.0, le=1.0), Unit("1")]
Tokens = Annotated[Positive, Unit("tokens")]
Steps = Annotated[Positive, Unit("steps")]
Nats = Annotated[float, Field(gt=0), Unit("nats/token")]
Seconds = Annotated[float, Unit("s")]


def key(default: Any, about: str, **bounds: Any) -> Any:
    """A key of a section that may be left out. One that may not is a `Field` with a description."""
    return Field(default=default, description=about, **bounds)


class RecipeError(IsthmusError):
    """The recipe cannot be read, or says something it may not say."""


class Section(BaseModel):
    """Base of every recipe section: unknown keys and numbers that are none are refused, and values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)
