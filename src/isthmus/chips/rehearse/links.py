"""Links of a rehearsed pool: how much later than over this host's own links data arrives over each pair of ranks."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from isthmus.chips.rehearse.faults import Fault

SLOWER = 10.0
"""How many times slower a slow link is whose fault does not say."""


@dataclass(frozen=True)
class LinkShape:
    """One way over a link: bandwidth in GB/s (1e9 bytes), latency in microseconds."""

    bandwidth_gbs: float
    latency_us: float

    def seconds(self, size: float, messages: int = 1) -> float:
        """What `size` bytes in so many messages, one after another, take."""
        return messages * self.latency_us * 1e-6 + size / (self.bandwidth_gbs * 1e9)

    def slower(self, factor: float) -> LinkShape:
        return LinkShape(self.bandwidth_gbs / factor, self.latency_us * factor)

    def slowest(self, other: LinkShape) -> LinkShape:
        return LinkShape(min(self.bandwidth_gbs, other.bandwidth_gbs), max(self.latency_us, other.latency_us))


HOST = LinkShape(bandwidth_gbs=1.0, latency_us=150.0)
"""gloo over the loopback interface of a small host whose links are all in use, rounded down from what
benchmarks/host_links.py measured (benchmarks/results): 1.4 GB/s and 160 us."""


@dataclass(frozen=True)
class Route:
    """What one collective moves over each of some pairs of ranks: bytes one way, in so many messages in turn.

    With `together` the slowest pair sets the pace, as in a ring; else one pair waits for another.
    """

    pairs: tuple[tuple[int, int], ...]
    size: float
    messages: int
    together: bool = True


@dataclass(frozen=True)
class Passage:
    """What becomes of a collective: how much later it is, in seconds, and the pair whose link is cut, if one is."""

    late_s: float
    cut: tuple[int, int] | None
    slowed: tuple[Fault, ...] = ()


class Links:
    """The links of a world. `shape` gives that of a pair of ranks, None where nothing is known; faults come on top.

    Both ends and all who wait for them draw the same: what happens depends on the fault's seed, the pair, the group and
    the number of the message. Nothing is faster than the host, so a slow link is slower than the slower of the two.
    """

    def __init__(self, faults: Sequence[Fault], shape: Callable[[int, int], LinkShape | None] | None = None):
        self._faults, self._shape = list(faults), shape
        self._sent: Counter[tuple[str, Route]] = Counter()

    @property
    def shaped(self) -> bool:
        return bool(self._faults) or self._shape is not None

    def passage(self, route: Route, group: str, step: int) -> Passage:
        """How a collective of `group` gets through at `step`."""
        self._sent[group, route] += 1
        number = self._sent[group, route]
        late, slowed = [0.0], []
        for pair in route.pairs:
            shape = self._shape(*pair) if self._shape else None
            shape = HOST.slowest(shape) if shape else HOST
            for fault in self._striking(pair, group, number, step):
                if fault.kind == "link-cut":
                    return Passage(0.0, pair, (fault,))
                shape = shape.slower(SLOWER if fault.size is None else fault.size)
                slowed.append(fault)
            late.append(shape.seconds(route.size, route.messages) - HOST.seconds(route.size, route.messages))
        return Passage(max(late) if route.together else sum(late), None, tuple(dict.fromkeys(slowed)))

    def _striking(self, pair: tuple[int, int], group: str, number: int, step: int) -> Iterable[Fault]:
        for fault in self._faults:
            if _concerns(fault, pair, step):
                draw = random.Random(f"{fault.seed}/{fault.kind}/{min(pair)}-{max(pair)}/{group}/{number}")
                if fault.rate >= 1.0 or draw.random() < fault.rate:
                    yield fault


def _concerns(fault: Fault, pair: tuple[int, int], step: int) -> bool:
    """A link that is cut stays cut; one that is slow at a step is so at that step alone."""
    if fault.rank not in pair or (fault.peer is not None and fault.peer not in pair):
        return False
    if fault.step is None:
        return True
    return step >= fault.step if fault.kind == "link-cut" else step == fault.step


def route_of(pattern: str, ranks: Sequence[int], me: int, root: int, size: float) -> Route:
    """What rank `ranks[me]` waits for in a collective of `ranks` whose input or output, the larger, has `size` bytes.

    In a star, that is a gather or a scatter, `size` is that of one rank's part.

    Rings and pairwise exchanges as in Thakur, Rabenseifner and Gropp (Int. J. High Perform. Comput. Appl. 19, 2005): an
    all-reduce sends 2(n - 1) parts of 1/n around a ring, an all-gather or a reduce-scatter n - 1, a barrier takes
    ceil(log2 n) rounds, a broadcast or a reduction passes all of it on in a chain. Any pair of the group may lie on the
    ring, so the slowest of all its pairs counts. `root` is a place in the group.
    """
    n = len(ranks)
    ring = tuple(combinations(sorted(ranks), 2))
    if pattern == "all-reduce":
        return Route(ring, 2 * (n - 1) / n * size, 2 * (n - 1))
    if pattern in ("all-gather", "reduce-scatter"):
        return Route(ring, (n - 1) / n * size, n - 1)
    if pattern == "chain":
        return Route(ring, size, n - 1)
    if pattern == "barrier":
        return Route(ring, 0.0, math.ceil(math.log2(n)) if n > 1 else 0)
    if pattern == "all-to-all":
        mine = tuple((min(ranks[me], other), max(ranks[me], other)) for other in ranks if other != ranks[me])
        return Route(mine, size / n, 1, together=False)
    assert pattern in ("star", "pair"), pattern
    if pattern == "pair" or me != root:
        ends = (ranks[me], ranks[root])
        return Route(((min(ends), max(ends)),) if ends[0] != ends[1] else (), size, 1)
    spokes = tuple((min(ranks[root], other), max(ranks[root], other)) for other in ranks if other != ranks[root])
    return Route(spokes, size, 1, together=False)
