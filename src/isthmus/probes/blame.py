"""Who is at fault: a rank or a link, from which pairs are bad, which elements are wrong, or how a call ended."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from isthmus.launch.crew import Called
from isthmus.probes.portable.collectives import within

Pair = tuple[int, int]
MOST_TEXT = 160
NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Blame:
    """Who is at fault: ranks that are bad with their peers, and links that are bad between good ranks."""

    ranks: tuple[int, ...] = ()
    links: tuple[Pair, ...] = ()

    @property
    def everyone(self) -> list[int]:
        return sorted({*self.ranks, *(end for link in self.links for end in link)})

    def __str__(self) -> str:
        parts = [f"rank {rank}" for rank in self.ranks]
        return ", ".join(parts + [f"the link {a}-{b}" for a, b in self.links])

    def __bool__(self) -> bool:
        return bool(self.ranks or self.links)


def pair_of(a: int, b: int) -> Pair:
    return min(a, b), max(a, b)


def blamed(bad: Iterable[Pair], tested: Iterable[Pair]) -> Blame:
    """Ranks that are bad with two or more peers, and with more than half of those they were tried with; then the links
    that are left."""
    left, tried = set(bad), set(tested)
    ranks: list[int] = []
    while True:
        count = Counter(end for pair in left for end in pair)
        of = Counter(end for pair in tried | left if not set(pair) & set(ranks) for end in pair)
        ends = [rank for rank, number in count.items() if number >= 2 and number > of[rank] / 2]
        if not ends:
            return Blame(tuple(sorted(ranks)), tuple(sorted(left)))
        worst = max(ends, key=lambda rank: (count[rank] / of[rank], count[rank]))
        ranks.append(worst)
        left = {pair for pair in left if worst not in pair}


def domain_size(fastest: dict[str, float], world: int, slow: float) -> int | None:
    """How many neighbouring ranks share faster links, as in a node; None if all links are of one kind.

    `fastest` has the seconds of each link "a>b". A link is between domains where nearly all such links take longer than
    links within do, at a share `slow` of their pace: a bad rank or a few bad links do not look like that.
    """
    sizes = []
    for size in range(2, world // 2 + 1):
        if world % size:
            continue
        inner = statistics.median(seconds for link, seconds in fastest.items() if within(link, size))
        outer = [seconds for link, seconds in fastest.items() if not within(link, size)]
        if sum(seconds > inner / slow for seconds in outer) >= NEARLY_ALL * len(outer):
            sizes.append((statistics.median(outer) / inner, size))
    return max(sizes)[1] if sizes else None


def blame_of_wrong(*findings: list[dict[str, Any]]) -> Blame:
    """Whose wrong elements these are, from who saw them and where they came from, over some calls (values by rank).

    A rank that all of them left, or that alone saw them; the link if both ends are one rank each. Nobody if the
    elements do not agree.
    """
    each = [(rank, value) for values in findings for rank, value in enumerate(values)]
    seers = {rank for rank, value in each if value["failed"]}
    origins = {origin for _, value in each for origin in value["origins"]}
    unnamed = any(value["unnamed"] for _, value in each)
    if len(seers) == 1:
        if len(origins) == 1 and seers != origins and not unnamed:
            return Blame(links=(pair_of(*seers, *origins),))
        return Blame(ranks=tuple(seers))
    return Blame(ranks=tuple(origins)) if len(origins) == 1 else Blame()


def laggard(called: Called) -> int | None:
    """The one rank that began fewer collectives than every other among those that hang, if there is one."""
    begun = sorted(
        (reply.beat.collectives, reply.rank) for reply in called.replies if reply.state == "hung" and reply.beat
    )
    return begun[0][1] if len(begun) > 1 and begun[0][0] < begun[1][0] else None


def stuck_pairs(called: Called) -> set[Pair]:
    """The pairs in which both ranks are, by their last beats, and at least one has not answered."""
    members: dict[str, list[int]] = {}
    for reply in called.replies:
        if reply.state != "done" and reply.beat is not None and reply.beat.section.startswith("pair "):
            members.setdefault(reply.beat.section.removeprefix("pair "), []).append(reply.rank)
    pairs = {text: tuple(int(end) for end in text.split("-")) for text in members}
    return {pair_of(*pair) for text, pair in pairs.items() if sorted(members[text]) == sorted(pair)}


def summed_up(called: Called) -> str:
    """How a call ended, ranks that ended alike together; what ranks say that only lost a crashed one is left out."""
    states = [reply.state for reply in called.replies]
    worst = next(state for state in ("crashed", "raised", "hung") if state in states)
    alike: dict[str, list[str]] = {}
    for reply in called.replies:
        if reply.state == worst:
            where = f" in {reply.beat}" if reply.beat else ""
            alike.setdefault(f"{worst}{': ' * bool(reply.error)}{reply.error[:MOST_TEXT]}{where}", []).append(
                str(reply.rank)
            )
    return "; ".join(f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} {text}" for text, ranks in alike.items())
