"""The ranks that learn together: the first one leads, and the others do with it what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from isthmus.trainer.mesh import Ranks, own_group

END = "end"


class Crew:
    """All ranks must make one. Orders travel in a group of their own, for a checkpoint may be on its way in another."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._orders = own_group() if ranks.world > 1 else None

    def order(self, name: str, *facts: Any) -> None:
        """Tell the others what is done now; they call what they have under this name with these facts."""
        if self._orders is not None and self.ranks.is_first:
            dist.broadcast_object_list([(name, facts)], src=0, group=self._orders)

    def follow(self, orders: dict[str, Callable[..., Any]]) -> None:
        """Carry out the orders of the first rank, until it says that there are no more."""
        name = ""
        while name != END:
            heard: list[Any] = [None]
            dist.broadcast_object_list(heard, src=0, group=self._orders)
            name, facts = heard[0]
            if name != END:
                orders[name](*facts)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """The first rank's work; the others may leave when it is done. They end with it if it fails."""
        yield
        self.order(END)
