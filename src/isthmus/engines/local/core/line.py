"""The waiting line: whoever runs least comes first, among keys and then among requests of a key, and then by age.

So a short request is not behind the hundreds of samples of one that came before it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar


class Owned(Protocol):
    """A request, by whose key it came."""

    @property
    def owner(self) -> str: ...


class Waiting(Protocol):
    """A sample of a request; `order` counts arrivals."""

    @property
    def request(self) -> Owned: ...

    @property
    def order(self) -> int: ...


SampleType = TypeVar("SampleType", bound=Waiting)


class Shares:
    """How many samples of each owner and of each request run."""

    def __init__(self, running: Iterable[Waiting]):
        self._owners: Counter[str] = Counter()
        self._requests: Counter[Owned] = Counter()
        for sample in running:
            self.add(sample.request)

    def add(self, request: Owned) -> None:
        self._owners[request.owner] += 1
        self._requests[request] += 1

    def of_owner(self, owner: str) -> int:
        return self._owners[owner]

    def of_request(self, request: Owned) -> int:
        return self._requests[request]

    def weight(self, request: Owned) -> tuple[int, int]:
        """What the owner and the request have: the heaviest is the first to give up a place."""
        return self._owners[request.owner], self._requests[request]

    def is_short(self, request: Owned, other: Owned) -> bool:
        """Whether `request` would still have no more than `other` after taking a place of it."""
        if request.owner != other.owner:
            return self._owners[request.owner] + 1 < self._owners[other.owner]
        return self._requests[request] + 1 < self._requests[other]


class Line(Generic[SampleType]):
    """The samples that wait, by request. Samples of one request keep their order; those of a held one do not move."""

    def __init__(self) -> None:
        self._waiting: dict[Owned, deque[SampleType]] = {}
        self._held: set[Owned] = set()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[SampleType]:
        for samples in self._waiting.values():
            yield from samples

    @property
    def moving(self) -> int:
        """Requests in it that may run."""
        return len(self._waiting) - len(self._held & self._waiting.keys())

    @property
    def is_moving(self) -> bool:
        """Whether anyone in it may run."""
        return self.moving > 0

    def append(self, sample: SampleType) -> None:
        self._waiting.setdefault(sample.request, deque()).append(sample)

    def return_(self, samples: list[SampleType]) -> None:
        """Put samples of one request back to its front."""
        if samples:
            self._waiting.setdefault(samples[0].request, deque()).extendleft(reversed(samples))

    def first(self, shares: Shares) -> SampleType | None:
        """Who comes next."""
        moving = [request for request in self._waiting if request not in self._held]
        least = min((shares.of_owner(owner) for owner in {request.owner for request in moving}), default=0)
        best: tuple[int, int] | None = None
        found: SampleType | None = None
        for request in moving:
            if shares.of_owner(request.owner) > least:
                continue
            rank = shares.of_request(request), self._waiting[request][0].order
            if best is None or rank < best:
                best, found = rank, self._waiting[request][0]
            if not rank[0]:
                break
        return found

    def take(self, first: SampleType, most: int, goes_along: Callable[[SampleType], bool]) -> list[SampleType]:
        """`first` and up to `most` - 1 samples behind it in its request that go along with it."""
        waiting = self._waiting[first.request]
        taken = [waiting.popleft()]
        while waiting and len(taken) < most and goes_along(waiting[0]):
            taken.append(waiting.popleft())
        if not waiting:
            del self._waiting[first.request]
        return taken

    def withdraw(self, request: Owned, meant: Callable[[SampleType], bool]) -> list[SampleType]:
        """Take samples of a request out."""
        waiting = self._waiting.pop(request, deque())
        kept = deque(sample for sample in waiting if not meant(sample))
        if kept:
            self._waiting[request] = kept
        return [sample for sample in waiting if meant(sample)]

    def hold(self, request: Owned) -> None:
        """Let none of its samples run until `release`."""
        self._held.add(request)

    def release(self, request: Owned) -> None:
        self._held.discard(request)
