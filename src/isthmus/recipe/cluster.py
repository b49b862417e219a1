"""A Ray cluster, and what a pool wants of its nodes."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import Field, model_validator

from isthmus.recipe.section import Seconds, Section, Unit, key

Amount = Annotated[float, Field(gt=0), Unit("1")]
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
"""A value of a label, as Kubernetes and Ray have it; signs of Ray's selectors, such as `!` or `in(`, are not in it."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class ClusterSection(Section):
    """The Ray cluster that has the nodes of pools with `ray`; docs/cluster.md tells how a run uses it."""

    address: str = key("auto", "host:port of its head; auto: that of $RAY_ADDRESS, or the cluster of this machine")
    wait_s: Seconds = key(300.0, "time for nodes to come, to come back or to be free when processes start", gt=0)


class RaySection(Section):
    """The nodes of a pool, and what each of its processes, a rank or an engine, gets there."""

    labels: dict[str, str] = key({}, 'labels that its nodes have, such as { vendor = "one" }')
    resources: dict[str, Amount] | None = key(
        None, "what a process takes of its node, by Ray's names, such as { CPU = 8 }; one chip if absent"
    )
    python: str | None = key(None, "path of the interpreter on its nodes; the one that Ray runs there if absent")
    env: dict[str, str] = key({}, "variables of its processes; they stand in recipe.json")

    @model_validator(mode="after")
    def _names_are_names(self) -> Self:
        for name, value in self.labels.items():
            if not _LABEL.fullmatch(name.rpartition("/")[2]) or not _LABEL.fullmatch(value):
                raise ValueError(f"{name} = {value!r} is no label: letters, digits, `-`, `_` and `.`, 63 at most")
        for name in self.env:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"env has {name!r}, which is no name of a variable")
        return self
