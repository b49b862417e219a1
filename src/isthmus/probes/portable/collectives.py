"""Collectives and links on a rank: results checked against what they must be, and times by the rank's own clock.

Inputs are small integers made on the CPU from a seed, so that every rank knows the right result without being told. A
sum has at most as many contributors per element as keep it exact in its dtype in any order; a rank-valued fill is not
exact beyond a few dozen ranks in bf16. `numel` counts what a rank puts into an all-reduce, a broadcast, an all-to-all
or a send, all that an all-gather gives it, and all that a reduce-scatter takes from it.

`groups` cuts the ranks into disjoint groups that work at the same time; a rank in none of them only watches.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int8": torch.int8,
    "int32": torch.int32,
    "int64": torch.int64,
}
CONTRIBUTORS = {"bfloat16": 64, "float16": 512, "int8": 32}
"""Most contributors of up to +-3 whose partial sums are all exact: bf16 counts to 256, fp16 to 2,048, int8 to 127."""
MOST_CONTRIBUTORS = 512
REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
PERIOD = 65_521
"""Patterns repeat after this many elements: a prime, so that a block in the wrong place does not fit by chance."""
SMALL_MESSAGE = 8192
_SIGNED = 2**63


# -- what each rank puts in, and what must come out -------------------------------------------------------------------


def mixed(*parts: int | Tensor) -> Tensor:
    """A number from 0 to 2^31 - 1 for each combination of integers, by the mixing of splitmix64."""
    state = torch.zeros((), dtype=torch.int64)
    for part in parts:
        state = (state + part) * _signed(0x9E3779B97F4A7C15) + 1
        state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
        state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(state, 33)


def contribution(rank: int, world: int, numel: int, contributors: int, seed: int) -> Tensor:
    """int64 [numel]: what a rank gives to a reduction: +-1..3 where it is one of the contributors, else 0."""
    return _tiled(numel, lambda index: _given(index, (rank - _first(index, world, seed)) % world, contributors, seed))


def reduced(world: int, numel: int, contributors: int, seed: int, reduction: str) -> Tensor:
    """int64 [numel]: the reduction of `contribution` over all ranks, computed without any of them."""
    return _tiled(numel, lambda index: _reduced(index, world, contributors, seed, reduction))


def sole_contributors(world: int, numel: int, seed: int) -> Tensor:
    """int64 [numel]: the rank that gives an element of a fill with one contributor."""
    return _tiled(numel, lambda index: _first(index, world, seed))


def moved(sender: int, receiver: int, numel: int, seed: int) -> Tensor:
    """int64 [numel]: what one rank sends to another, from -100 to 100 and never 0."""
    return _tiled(numel, lambda index: _nonzero(mixed(seed, 3, sender, receiver, index), 100))


def _first(index: Tensor, world: int, seed: int) -> Tensor:
    """The first contributor of each element; the others are the ranks after it, in a circle."""
    return mixed(seed, 1, index) % world


def _given(index: Tensor, place: Tensor | int, contributors: int, seed: int) -> Tensor:
    values = _nonzero(mixed(seed, 2, index, place), 3)
    return torch.where(torch.as_tensor(place) < contributors, values, 0)


def _reduced(index: Tensor, world: int, contributors: int, seed: int, reduction: str) -> Tensor:
    combine = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[reduction]
    total = _given(index, 0, contributors, seed)
    for place in range(1, min(world, contributors)):
        total = combine(total, _given(index, place, contributors, seed))
    return combine(total, torch.zeros_like(total)) if contributors < world else total


def _nonzero(random: Tensor, largest: int) -> Tensor:
    return torch.where(random % 2 == 0, 1, -1) * (1 + random // 2 % largest)


def _tiled(numel: int, make: Callable[[Tensor], Tensor]) -> Tensor:
    pattern = make(torch.arange(min(numel, PERIOD)))
    return pattern if numel <= PERIOD else pattern.repeat(-(-numel // PERIOD))[:numel]


def _signed(value: int) -> int:
    return value - 2 * _SIGNED if value >= _SIGNED else value


def _shifted(value: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros."""
    return (value >> bits) & (2 ** (64 - bits) - 1)


# -- one collective in one fill ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """The ranks among which a collective runs, and this rank's place among them. `handle` None: all ranks."""

    ranks: list[int]
    place: int
    handle: Any = None

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class _Run:
    """A collective made ready: `begin` refills its buffers, `work` does it, `got` is compared with `expected`.

    `origins` names the rank that an element came from, where it came from one.
    """

    begin: Callable[[], None]
    work: Callable[[], None]
    got: Callable[[], Tensor]
    expected: Tensor
    origins: Tensor | int | None


@dataclass
class _Wrong:
    """What was not as it must be, on this rank."""

    checked: int = 0
    count: int = 0
    first: dict[str, Any] | None = None
    origins: Counter[int] = field(default_factory=Counter)

    def compare(self, got: Tensor, expected: Tensor, origins: Tensor | int | None, where: str) -> None:
        """Note elements that differ. Values that are not numbers differ from all. `origins`: of each, or of all."""
        self.checked += expected.numel()
        seen = got.cpu()
        wrong = ~(seen == expected.to(seen.dtype))
        if not wrong.any():
            return
        places = wrong.nonzero().flatten()
        self.count += len(places)
        if isinstance(origins, int):
            self.origins[origins] += len(places)
        elif origins is not None:
            self.origins.update(origins[places].tolist())
        if self.first is None:
            at = int(places[0])
            self.first = {"where": where, "index": at, "expected": expected[at].item(), "got": str(seen[at].item())}

    def reply(self, rank: Any, what: str) -> dict[str, Any]:
        return {
            "failed": self.count > 0,
            "detail": self._detail(rank.rank, what),
            "checked": self.checked,
            "wrong": self.count,
            "first": self.first,
            "origins": sorted(self.origins),
            "unnamed": self.count - self.origins.total(),
        }

    def _detail(self, rank: int, what: str) -> str:
        if self.first is None:
            return f"{what}: {self.checked} elements as they must be"
        first = self.first
        return (
            f"{what}: {self.count} of {self.checked} elements wrong on rank {rank}, the first in {first['where']} at "
            f"{first['index']}: expected {first['expected']}, got {first['got']}"
        )


def _all_reduce(rank: Any, group: _Group, dtype: str, numel: int, reduction: str, alone: bool, seed: int) -> _Run:
    most = 1 if alone else _contributors(dtype)
    given = contribution(group.place, group.size, numel, most, seed).to(DTYPES[dtype]).to(rank.device)
    buffer = torch.empty_like(given)
    return _Run(
        begin=lambda: _copy(buffer, given),
        work=lambda: _done(dist.all_reduce(buffer, op=REDUCTIONS[reduction], group=group.handle)),
        got=lambda: buffer,
        expected=reduced(group.size, numel, most, seed, reduction),
        origins=_named(group, sole_contributors(group.size, numel, seed)) if alone else None,
    )


def _reduce_scatter(rank: Any, group: _Group, dtype: str, numel: int, reduction: str, alone: bool, seed: int) -> _Run:
    most, share = 1 if alone else _contributors(dtype), max(1, numel // group.size)
    total, mine = share * group.size, slice(share * group.place, share * (group.place + 1))
    given = contribution(group.place, group.size, total, most, seed).to(DTYPES[dtype]).to(rank.device)
    out = torch.empty(share, dtype=given.dtype, device=rank.device)
    op = REDUCTIONS[reduction]
    return _Run(
        begin=lambda: _copy(out, None),
        work=lambda: _done(dist.reduce_scatter_tensor(out, given, op=op, group=group.handle)),
        got=lambda: out,
        expected=reduced(group.size, total, most, seed, reduction)[mine],
        origins=_named(group, sole_contributors(group.size, total, seed)[mine]) if alone else None,
    )


def _all_gather(rank: Any, group: _Group, dtype: str, numel: int, reduction: str, alone: bool, seed: int) -> _Run:
    share = max(1, numel // group.size)
    blocks = [moved(sender, 0, share, seed) for sender in group.ranks]
    given = blocks[group.place].to(DTYPES[dtype]).to(rank.device)
    out = torch.empty(share * group.size, dtype=given.dtype, device=rank.device)
    return _Run(
        begin=lambda: _copy(out, None),
        work=lambda: _done(dist.all_gather_into_tensor(out, given, group=group.handle)),
        got=lambda: out,
        expected=torch.cat(blocks),
        origins=torch.tensor(group.ranks).repeat_interleave(share),
    )


def _all_to_all(
    rank: Any, group: _Group, dtype: str, numel: int, alone: bool, seed: int, splits: list[list[int]] | None
) -> _Run:
    """`splits[a][b]`: elements that place a sends to place b; None: all the same."""
    share, me = max(1, numel // group.size), rank.rank
    rows = splits or [[share] * group.size for _ in group.ranks]
    send, receive = rows[group.place], [row[group.place] for row in rows]
    sent = [moved(me, peer, count, seed) for peer, count in zip(group.ranks, send, strict=True)]
    arriving = [moved(peer, me, count, seed) for peer, count in zip(group.ranks, receive, strict=True)]
    given = torch.cat(sent).to(DTYPES[dtype]).to(rank.device)
    out = torch.empty(sum(receive), dtype=given.dtype, device=rank.device)
    sizes = (receive, send) if splits else (None, None)
    return _Run(
        begin=lambda: _copy(out, None),
        work=lambda: _done(dist.all_to_all_single(out, given, *sizes, group=group.handle)),
        got=lambda: out,
        expected=torch.cat(arriving),
        origins=torch.tensor(group.ranks).repeat_interleave(torch.tensor(receive)),
    )


def _even(rank: Any, group: _Group, dtype: str, numel: int, reduction: str, alone: bool, seed: int) -> _Run:
    return _all_to_all(rank, group, dtype, numel, alone, seed, None)


def _uneven(rank: Any, group: _Group, dtype: str, numel: int, reduction: str, alone: bool, seed: int) -> _Run:
    """Shares from nothing to twice the mean, as a router gives them."""
    share, places = max(1, numel // group.size), torch.arange(group.size)
    splits = (mixed(seed, 4, places[:, None], places[None, :]) % (2 * share + 1)).tolist()
    return _all_to_all(rank, group, dtype, numel, alone, seed, splits)


def _broadcast(rank: Any, group: _Group, dtype: str, numel: int, reduction: str, alone: bool, seed: int) -> _Run:
    source = group.ranks[seed % group.size]
    expected = moved(source, 0, numel, seed)
    given = expected.to(DTYPES[dtype]).to(rank.device)
    buffer = torch.empty_like(given)
    return _Run(
        begin=lambda: _copy(buffer, given if rank.rank == source else None),
        work=lambda: _done(dist.broadcast(buffer, source, group=group.handle)),
        got=lambda: buffer,
        expected=expected,
        origins=source,
    )


def _send_recv(rank: Any, group: _Group, dtype: str, numel: int, reduction: str, alone: bool, seed: int) -> _Run:
    """Every rank sends to the one a step further and receives from the one a step back; the step changes with the seed.

    With few ranks and a few seeds all links are used.
    """
    step = 1 + seed % max(1, group.size - 1)
    target = group.ranks[(group.place + step) % group.size]
    source = group.ranks[(group.place - step) % group.size]
    given = moved(rank.rank, target, numel, seed).to(DTYPES[dtype]).to(rank.device)
    out = torch.empty_like(given)
    operations = [
        dist.P2POp(dist.isend, given, target, group=group.handle),
        dist.P2POp(dist.irecv, out, source, group=group.handle),
    ]
    return _Run(
        begin=lambda: _copy(out, None),
        work=lambda: _all_done(dist.batch_isend_irecv(operations)),
        got=lambda: out,
        expected=moved(source, rank.rank, numel, seed),
        origins=source,
    )


_PREPARE: dict[str, Callable[..., _Run]] = {
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "all_to_all": _even,
    "all_to_all_uneven": _uneven,
    "broadcast": _broadcast,
    "send_recv": _send_recv,
}
COLLECTIVES = tuple(_PREPARE)


def bus_factor(collective: str, ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth, which is the bytes of `numel` over the time.

    The bus bandwidth is what passes a rank's link, each way, in the algorithm that sends least (Patarasu and Yuan, J.
    Parallel Distrib. Comput. 69, 2009), so that it compares with the link's speed whatever the number of ranks. `numel`
    counts the shares of all ranks in an all-gather or a reduce-scatter: one rank's would make it low by that number.
    """
    if collective == "all_reduce":
        return 2.0 * (ranks - 1) / ranks
    if collective in ("all_gather", "reduce_scatter", "all_to_all", "all_to_all_uneven"):
        return (ranks - 1) / ranks
    return 1.0


def _contributors(dtype: str) -> int:
    return CONTRIBUTORS.get(dtype, MOST_CONTRIBUTORS)


def _named(group: _Group, places: Tensor) -> Tensor:
    return torch.tensor(group.ranks)[places]


def _copy(target: Tensor, source: Tensor | None) -> None:
    """Fill a buffer with its input, or with what no result holds."""
    if source is None:
        target.fill_(-128 if target.dtype == torch.int8 else 240)
    else:
        target.copy_(source)


def _done(work: Any) -> None:
    """A call that was not asked to be asynchronous returns None."""
    if work is not None:
        work.wait()


def _all_done(works: list[Any]) -> None:
    for work in works:
        work.wait()


def _finish(rank: Any) -> None:
    if rank.device.type != "cpu":
        torch.accelerator.synchronize(rank.device)


def _own_group(rank: Any, groups: list[list[int]] | None) -> _Group | None:
    """This rank's group; None if it is in none. Every rank takes part in making each."""
    if groups is None:
        return _Group(list(range(rank.world)), rank.rank)
    own = None
    for ranks in groups:
        kept = [one for one in ranks if one < rank.world]
        handle = dist.new_group(kept)
        if rank.rank in kept:
            own = _Group(kept, kept.index(rank.rank), handle)
    return own


def _leave(group: _Group | None) -> None:
    if group is not None and group.handle is not None:
        dist.destroy_process_group(group.handle)


def _check(dtype: str, collective: str) -> None:
    if dtype not in DTYPES or collective not in _PREPARE:
        raise ValueError(
            f"{collective} of {dtype} is not known; write one of {', '.join(COLLECTIVES)} and of {', '.join(DTYPES)}"
        )


# -- what a rank is asked to do ---------------------------------------------------------------------------------------


def verified(
    rank: Any,
    collective: str,
    dtype: str = "float32",
    numel: int = 65_536,
    reduction: str = "sum",
    fills: int = 4,
    seed: int = 0,
    groups: list[list[int]] | None = None,
) -> dict[str, Any]:
    """One collective with several fills, all compared exactly. In the last of several fills each element of a sum has
    one contributor, so that a wrong one names its origin.

    Returns how many elements were `checked` and `wrong`, the `first` wrong one, the ranks that are `origins` of wrong
    ones, and how many of those are `unnamed`: of several contributors.
    """
    _check(dtype, collective)
    group, wrong = _own_group(rank, groups), _Wrong()
    what = f"{collective} of {dtype}"
    for fill in range(fills if group else 0):
        assert group is not None
        rank.beat(what, fill)
        alone = fills > 1 and fill == fills - 1
        run = _PREPARE[collective](rank, group, dtype, numel, reduction, alone, seed + fill)
        run.begin()
        run.work()
        _finish(rank)
        wrong.compare(run.got(), run.expected, run.origins, f"fill {fill}")
    _leave(group)
    return wrong.reply(rank, what)


def timed(
    rank: Any,
    collective: str,
    dtype: str = "float32",
    numel: int = 1_048_576,
    repeats: int = 10,
    seed: int = 0,
    groups: list[list[int]] | None = None,
) -> dict[str, Any]:
    """Seconds of each of `repeats` runs (at least one) of a collective, after one to warm up; the last is compared.

    `bytes` are those of `numel`; `bus_gbs` is the bus bandwidth of the median run, GB/s (`bus_factor`).
    """
    _check(dtype, collective)
    group, wrong, seconds = _own_group(rank, groups), _Wrong(), []
    what = f"{collective} of {numel} {dtype}"
    if group is None:
        return {**wrong.reply(rank, what), "seconds": [], "bytes": 0, "ranks": 0, "bus_gbs": None}
    run = _PREPARE[collective](rank, group, dtype, numel, "sum", False, seed)
    for repeat in range(max(1, repeats) + 1):
        rank.beat(what, repeat)
        run.begin()
        _finish(rank)
        began = time.perf_counter()
        run.work()
        _finish(rank)
        seconds.append(time.perf_counter() - began)
    wrong.compare(run.got(), run.expected, run.origins, f"repeat {repeats}")
    _leave(group)
    size = numel * torch.empty(0, dtype=DTYPES[dtype]).element_size()
    factor = bus_factor(collective, group.size)
    return {
        **wrong.reply(rank, what),
        "seconds": seconds[1:],
        "bytes": size,
        "ranks": group.size,
        "bus_gbs": size / statistics.median(seconds[1:]) * factor / 1e9,
    }


def pairs(
    rank: Any,
    bytes: int = 262_144,
    repeats: int = 16,
    latency_repeats: int = 100,
    seed: int = 0,
    only: list[list[int]] | None = None,
    alone: bool = False,
    step: int | None = None,
    domain: int | None = None,
    slower_than: float | None = None,
) -> dict[str, Any]:
    """Point-to-point transfers in both directions of every pair, or of `only` these, in rounds of disjoint pairs.

    With `alone` one pair works at a time. `seconds["a>b"]` are those of `bytes` from a to b and a short answer, by a's
    clock; `latency_s["a>b"]` half the round trips of 8 KB that a started. Every payload is compared. `step` is what all
    beats say; None: the number of the round. With `slower_than` a link fails if its fastest transfer takes more than
    that many times what `reference` says of its tier: links within a domain of neighbours, and links between domains.
    """
    wrong, found = _Wrong(), _Times()
    for number, chosen in enumerate(_schedule(rank.world, only, alone)):
        for a, b in chosen:
            if rank.rank in (a, b):
                beat = partial(rank.beat, f"pair {a}-{b}", number if step is None else step)
                _exchange(rank, (a, b), (bytes, repeats, latency_repeats, seed), beat, wrong, found)
        if alone and only is not None:
            dist.barrier()
    reply = {**wrong.reply(rank, "point-to-point"), "seconds": found.seconds, "latency_s": found.latency}
    if slower_than is not None:
        _judge_pace(rank, found, slower_than, domain or rank.world, reply)
    return reply


def reference(fastest: dict[str, float]) -> float:
    """What a healthy link takes: the median over ranks of the fastest transfer of each rank, in seconds.

    So one bad rank, which slows n - 1 of n (n - 1) / 2 pairs, does not move it. `fastest` has a key "a>b" per link.
    """
    best: dict[str, float] = {}
    for link, seconds in fastest.items():
        for end in link.split(">"):
            best[end] = min(best.get(end, seconds), seconds)
    return statistics.median(best.values())


def tournament(world: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs in which each pair meets once, by the circle method."""
    seats = list(range(world + world % 2))
    rounds = []
    for _ in range(len(seats) - 1):
        meetings = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in meetings if max(a, b) < world])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def chain(world: int) -> list[tuple[int, int]]:
    """All pairs in an order in which each shares a rank with the next, so that no two can work at the same time."""
    return [(a, b) for a in range(world) for b in range(world - 1, a, -1)]


@dataclass
class _Times:
    seconds: dict[str, list[float]] = field(default_factory=dict)
    latency: dict[str, list[float]] = field(default_factory=dict)


def _schedule(world: int, only: list[list[int]] | None, alone: bool) -> Iterator[list[tuple[int, int]]]:
    """Rounds of pairs. Pairs that are asked for come in the order in which they were asked for."""
    if only is None:
        rounds = [[pair] for pair in chain(world)] if alone else tournament(world)
    else:
        rounds = _packed([(min(pair), max(pair)) for pair in only if max(pair) < world and len(set(pair)) == 2])
    for chosen in rounds:
        if alone:
            yield from ([pair] for pair in chosen)
        else:
            yield chosen


def _packed(wanted: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Pairs one after another into rounds; a rank keeps the order of its own pairs."""
    rounds: list[list[tuple[int, int]]] = []
    busy: Counter[int] = Counter()
    for a, b in wanted:
        number = max(busy[a], busy[b])
        rounds += [[] for _ in range(number + 1 - len(rounds))]
        rounds[number].append((a, b))
        busy[a] = busy[b] = number + 1
    return rounds


def _exchange(
    rank: Any,
    pair: tuple[int, int],
    size: tuple[int, int, int, int],
    beat: Callable[[], None],
    wrong: _Wrong,
    found: _Times,
) -> None:
    """All transfers of one pair: large ones in both directions, then small ones. Each begins with a beat."""
    bytes, repeats, latency_repeats, seed = size
    for sender, receiver in (pair, pair[::-1]):
        key = f"{sender}>{receiver}"
        large = moved(sender, receiver, max(1, bytes // 4), seed).to(torch.int32)
        small = moved(sender, receiver, SMALL_MESSAGE // 4, seed).to(torch.int32)
        payload, ball = large.to(rank.device), small.to(rank.device)
        if rank.rank == sender:
            times = [_send(rank, payload, receiver, beat) for _ in range(repeats + 1)]
            found.seconds.setdefault(key, []).extend(times[1:])
            trips = [_round_trip(rank, ball, receiver, beat) for _ in range(latency_repeats)]
            found.latency.setdefault(key, []).extend(trips)
            continue
        for repeat in range(repeats + 1):
            beat()
            wrong.compare(_receive(rank, payload, sender), large, sender, f"{key}, transfer {repeat}")
        for repeat in range(latency_repeats):
            beat()
            got = torch.zeros_like(ball)
            dist.recv(got, sender)
            dist.send(got, sender)
            if repeat == latency_repeats - 1:
                wrong.compare(got, small, sender, f"{key}, {SMALL_MESSAGE} bytes")


def _send(rank: Any, payload: Tensor, receiver: int, beat: Callable[[], None]) -> float:
    """One transfer, begun when the receiver is ready. Seconds until its answer is here."""
    beat()
    answer = torch.zeros(1, dtype=torch.int32, device=rank.device)
    dist.recv(answer, receiver)
    _finish(rank)
    began = time.perf_counter()
    dist.send(payload, receiver)
    dist.recv(answer, receiver)
    _finish(rank)
    return time.perf_counter() - began


def _receive(rank: Any, like: Tensor, sender: int) -> Tensor:
    got, answer = torch.zeros_like(like), torch.ones(1, dtype=torch.int32, device=rank.device)
    _finish(rank)
    dist.send(answer, sender)
    dist.recv(got, sender)
    dist.send(answer, sender)
    return got


def _round_trip(rank: Any, ball: Tensor, receiver: int, beat: Callable[[], None]) -> float:
    """Half the seconds of a small message there and back."""
    beat()
    back = torch.zeros_like(ball)
    _finish(rank)
    began = time.perf_counter()
    dist.send(ball, receiver)
    dist.recv(back, receiver)
    _finish(rank)
    return (time.perf_counter() - began) / 2


def within(link: str, domain: int) -> bool:
    """Whether both ends of a link "a>b" are in the same domain of neighbouring ranks."""
    a, b = map(int, link.split(">"))
    return a // domain == b // domain


def _judge_pace(rank: Any, found: _Times, slower_than: float, domain: int, reply: dict[str, Any]) -> None:
    """Every rank learns the fastest transfer of each link, and says which of its own are slow."""
    table = torch.zeros(rank.world, rank.world)
    for key, seconds in found.seconds.items():
        a, b = map(int, key.split(">"))
        table[a, b] = min(seconds, default=0.0)
    shared = table.to(rank.device)
    dist.all_reduce(shared)
    fastest = {f"{a}>{b}": value for a, row in enumerate(shared.tolist()) for b, value in enumerate(row) if value}
    slow = []
    for same in (True, False):
        tier = {link: value for link, value in fastest.items() if within(link, domain) == same}
        limit = slower_than * reference(tier) if tier else 0.0
        own = [link for link in tier if link in found.seconds and tier[link] > limit]
        slow += [f"{link} {tier[link] * 1e3:.3g} ms, where {limit * 1e3:.3g} ms is the limit" for link in own]
    if slow:
        reply |= {"failed": True, "detail": f"slow links: {'; '.join(slow)}"}


def set_up(rank: Any, times: int = 8, limit_s: float | None = None) -> dict[str, Any]:
    """Seconds to make a communicator of all ranks and to use it once, `times` times; none is given back in between.

    With `limit_s` it fails if one took longer.
    """
    groups, seconds = [], []
    for number in range(times):
        rank.beat("communicators", number)
        began = time.perf_counter()
        groups.append(dist.new_group())
        dist.all_reduce(torch.zeros(1, device=rank.device), group=groups[-1])
        _finish(rank)
        seconds.append(time.perf_counter() - began)
    for group in groups:
        dist.destroy_process_group(group)
    late = limit_s is not None and max(seconds, default=0.0) > limit_s
    detail = f"{times} communicators, {max(seconds, default=0.0):.3g} s at most on rank {rank.rank}"
    return {"failed": late, "detail": detail, "seconds": seconds}


def alternating(rank: Any, numel: int = 16_384, rounds: int = 8, seed: int = 0) -> dict[str, Any]:
    """Two communicators of the same ranks, both in use at the same time, round after round; results are compared."""
    whole, wrong = list(range(rank.world)), _Wrong()
    groups = [_Group(whole, rank.rank, dist.new_group()) for _ in range(2)]
    for number in range(rounds):
        rank.beat("two communicators", number)
        runs = []
        for which, group in enumerate(groups):
            given = contribution(rank.rank, rank.world, numel, MOST_CONTRIBUTORS, seed + 2 * number + which)
            buffer = given.to(torch.float32).to(rank.device)
            runs.append((buffer, dist.all_reduce(buffer, group=group.handle, async_op=True)))
        for which, (buffer, work) in enumerate(runs):
            _done(work)
            _finish(rank)
            expected = reduced(rank.world, numel, MOST_CONTRIBUTORS, seed + 2 * number + which, "sum")
            wrong.compare(buffer, expected, None, f"round {number}, communicator {which}")
    for group in groups:
        _leave(group)
    return wrong.reply(rank, "all_reduce on two communicators in turn")


def overlapped(
    rank: Any, numel: int = 65_536, size: int = 96, products: int = 4, rounds: int = 6, seed: int = 0
) -> dict[str, Any]:
    """An all-reduce that runs while matrices are multiplied: both results must be what they are without the other.

    The products are of [size, size] matrices of odd integers up to 401, which have more digits than bf16; for `size` up
    to 104 they are exact in fp32 for any order of summation.
    """
    if size > 104:
        raise ValueError(f"products of {size} x {size} matrices are not exact in fp32; give a size of at most 104")
    wrong = _Wrong()
    left, right = (4 * moved(which, rank.rank, size * size, seed).view(size, size) + 1 for which in (0, 1))
    exact = (left @ right).flatten()
    a, b = (matrix.to(torch.float32).to(rank.device) for matrix in (left, right))
    expected = reduced(rank.world, numel, MOST_CONTRIBUTORS, seed, "sum")
    given = contribution(rank.rank, rank.world, numel, MOST_CONTRIBUTORS, seed).to(torch.float32).to(rank.device)
    for number in range(rounds):
        rank.beat("overlap", number)
        buffer = given.clone()
        work = dist.all_reduce(buffer, async_op=True)
        results = [a @ b for _ in range(products)]
        _done(work)
        _finish(rank)
        wrong.compare(buffer, expected, None, f"round {number}, all_reduce")
        for result in results:
            wrong.compare(result.flatten(), exact, rank.rank, f"round {number}, product")
    return wrong.reply(rank, "all_reduce beside matrix products")
