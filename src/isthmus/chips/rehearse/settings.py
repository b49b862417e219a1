"""What a rehearsal in another process is told, through its environment. Loading this does not load torch."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass

SETTINGS = "ISTHMUS_REHEARSAL"


@dataclass(frozen=True)
class Settings:
    """What is rehearsed. `folder` gets a report per process; `faults` are in the notation of `parse_fault`."""

    chip: str
    folder: str
    strict: bool = False
    noise: bool = False
    seed: int = 0
    faults: tuple[str, ...] = ()

    def environment(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_environment(cls) -> Settings:
        values = json.loads(os.environ[SETTINGS])
        return cls(**{**values, "faults": tuple(values["faults"])})
