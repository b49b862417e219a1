"""Where the processes of a pool run: children of this process, or on nodes of a Ray cluster.

A process on a node has a child here that stands for it: it takes its place in the cluster, runs the command there with
the interpreter of the pool, prints here what it prints there, passes signals on, and ends as it ends. When one of the
two is gone, so is the other. So whoever starts a process needs to know no more of a node than the words before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from isthmus.chips import resources_of
from isthmus.pools import ON_POOL, Pool

PARENT, HOST = "{parent}", "{host}"
"""Words of a command that are replaced where it runs: the process that keeps it, and the address of its machine."""
BEATS = "ISTHMUS_BEATS"
"""As `isthmus.launch.beats` has it, which is above this."""
OWN = "ISTHMUS_"
"""How the variables begin that processes are told things by. They go with a command to its node."""


class Launcher(Protocol):
    """How a process of a pool is started. `host` is what a server that it starts has to listen on."""

    @property
    def host(self) -> str: ...

    def command(self, words: Sequence[str], variables: Sequence[str] = (), *, again: bool = False) -> list[str]:
        """What is started here so that `python WORDS` runs there.

        `variables` names those of this command's environment that it needs. `again`: it ran before and was lost, and
        others go on meanwhile, so that nothing is waited for.
        """
        ...


class Here:
    """A child of this process, with its interpreter."""

    host = "127.0.0.1"

    def command(self, words: Sequence[str], variables: Sequence[str] = (), *, again: bool = False) -> list[str]:
        return [sys.executable, *(str(os.getpid()) if word == PARENT else word for word in words)]


HERE = Here()


@dataclass(frozen=True)
class Order:
    """What a child that stands for processes on nodes is told: `count` of them, which run the same command.

    `seen` is a folder that the nodes have to see. `name` tells these processes from all others: those that an earlier
    child of that name left are ended first. Several are ranks; what each prints as errors is kept under `logs`, if it
    is given. `follows_input`: they end when the input of the child ends.
    """

    pool: str
    address: str
    wait_s: float
    labels: Mapping[str, str]
    resources: Mapping[str, float]
    python: str | None
    env: Mapping[str, str]
    seen: str
    name: str
    count: int = 1
    logs: str | None = None
    follows_input: bool = False
    variables: Sequence[str] = field(default_factory=tuple)

    @classmethod
    def read(cls, text: str) -> Order:
        return cls(**json.loads(text))

    def text(self) -> str:
        return json.dumps(asdict(self))


AGAIN_S = 10.0
"""What the replacement of a lost process waits for a node."""


@dataclass(frozen=True)
class OnNodes:
    """Processes on nodes of the pool; `what` is unique among those of the run whose folder is `seen`."""

    pool: Pool
    seen: Path
    what: str
    count: int = 1
    logs: Path | None = None
    follows_input: bool = False
    host: str = HOST

    def command(self, words: Sequence[str], variables: Sequence[str] = (), *, again: bool = False) -> list[str]:
        nodes = self.pool.nodes
        assert nodes is not None
        order = Order(
            pool=self.pool.name,
            address=nodes.address,
            wait_s=min(nodes.wait_s, AGAIN_S) if again else nodes.wait_s,
            labels=nodes.labels,
            resources=resources_of(self.pool),
            python=nodes.python,
            env=nodes.env,
            seen=str(self.seen.absolute()),
            name=f"{hashlib.sha256(str(self.seen.absolute()).encode()).hexdigest()[:12]}-{self.what}",
            count=self.count,
            logs=None if self.logs is None else str(self.logs.absolute()),
            follows_input=self.follows_input,
            variables=[*variables, *(name for name in os.environ if _goes_along(name))],
        )
        return [sys.executable, "-m", "isthmus.nodes", order.text(), *words]


def _goes_along(name: str) -> bool:
    return name.startswith(OWN) and name not in (BEATS, ON_POOL)


def launcher_of(pool: Pool, seen: Path, what: str, **options: Any) -> Launcher:
    """Of one process of a pool, or of as many as the options of `OnNodes` say."""
    return HERE if pool.nodes is None else OnNodes(pool, seen, what, **options)
