"""Links between the chips of a pool: every pair, collectives with known results, their pace in the run's own shapes.

One slow pair proves nothing on a busy machine: a suspected link is measured again, in turn with a link that is known to
be good, until it recovers or was slow every time. The other pairs of its ends tell a bad link from a bad end.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.table import Table

from isthmus.launch.crew import Called, Crew
from isthmus.probes.blame import (
    Blame,
    Pair,
    blame_of_wrong,
    blamed,
    domain_size,
    laggard,
    pair_of,
    stuck_pairs,
    summed_up,
)
from isthmus.probes.contract import Probe, Setting
from isthmus.probes.findings import finding, without_ranks
from isthmus.probes.portable.collectives import SMALL_MESSAGE, bus_factor, reference, tournament, within
from isthmus.probes.portable.training import quantile
from isthmus.probes.shapes import Shape, capped, compute_dtype, exchange_numel, shapes_of
from isthmus.recipe.architecture import MixtureSection
from isthmus.records import Evidence, Limit
from isthmus.run import Figure
from isthmus.verdict import PAIR_OF_RANKS

WORK = "isthmus.probes.portable.collectives"
SLOW = 0.75
"""A link below this share of the pace of good ones is slow (the share at which NVRx calls a rank a straggler)."""
RETESTS, TURNS, TRANSFERS = 4, 3, 4
"""How often suspects are measured again, and in how many turns of how many transfers each time."""
CLEAR, CLEAR_RETESTS = 0.375, 3
"""A pace that needs no more than so many retests: half of what is slow."""
GOOD_SHARE = 0.1
"""What a good link takes, in a retest: this quantile of its transfers, since noise makes them slow and never fast."""
MOST_SUSPECTS = 24
LOOKS = 4
"""Calls that look for links which do not answer."""
FALL = 0.1
"""Share of the bus bandwidth in small groups below which an exchange has broken down in a large one.

Healthy pools fall as well: to 0.28 from EP 8 to EP 16, where it leaves the node (153 to 43 GB/s, deepseek-ai/DeepEP,
docs/legacy.md), to 0.39 from EP 8 to EP 128 within one domain (146 to 57 GB/s; docs/qualification.md has the sources).
"""
LATE = 0.5
"""Share of the connect timeout that making a communicator may take: ranks do not start at the same moment."""
COMMUNICATORS = 8
JOINING = "communicator"
"""What ranks of a crew do before their first call: without a communicator no pair can be tried."""
MATRIX_RANKS = 16
_finding = partial(finding, aspect="links", needed_for="training")


@dataclass(frozen=True)
class Effort:
    """How much is sent, and how long a link may stay silent in a search, by where the ranks compute.

    With `alone` one pair sends at a time: ranks that share a processor slow each other down, which is not the link's.
    """

    alone: bool
    pair_bytes: int
    pair_repeats: int
    trips: int
    numel: int
    most_bytes: int
    repeats: int
    silence_s: float
    call_s: float


ON_CPU = Effort(True, 2**20, 12, 60, 8_192, 2**20, 6, 4.0, 0.15)
ON_ACCELERATOR = Effort(False, 2**26, 20, 200, 2**20, 2**28, 20, 20.0, 1.0)


def effort_of(setting: Setting) -> Effort:
    return ON_CPU if setting.device == "cpu" else ON_ACCELERATOR


# -- pairs ------------------------------------------------------------------------------------------------------------


def look_at_pairs(crew: Crew, setting: Setting) -> list[Evidence]:
    """The matrix of all pairs: transfers in both directions, the latency of 8 KB, and links that are slow."""
    effort, name = effort_of(setting), "pairs of ranks"
    arguments: dict[str, Any] = {
        "bytes": effort.pair_bytes,
        "repeats": effort.pair_repeats,
        "latency_repeats": effort.trips,
        "seed": setting.recipe.seed,
        "alone": effort.alone,
    }
    called = _call(crew, setting, "pairs", arguments)
    if (bad := _bad_call(crew, setting, called, name, "pairs", arguments)) is not None:
        return [bad]
    seconds, latency = _merged(called, "seconds"), _merged(called, "latency_s")
    domain = domain_size({link: min(times) for link, times in seconds.items()}, crew.world, SLOW) or crew.world
    figures, slow = _pace(setting, seconds, effort.pair_bytes, domain), _slow_links(crew, setting, seconds, domain)
    if isinstance(slow, Evidence):
        return [slow, _latency(setting, latency)]
    summary = f"{len(seconds)} directed links"
    for tier, prefix in (("within" if domain < crew.world else "", "p2p"), ("between", "p2p_between")):
        if f"{prefix}_slowest_gbs" in figures:
            pace = [figures[f"{prefix}_{which}_gbs"].value for which in ("slowest", "median")]
            where = f" {tier} domains of {domain}" if tier else ""
            summary += f", slowest{where} {pace[0]:.3g} GB/s, median {pace[1]:.3g} GB/s"
    if slow:
        found = _slow_evidence(crew, setting, summary, figures, slow, domain)
    else:
        found = _finding("pairs of ranks", "pass", summary, sum(map(len, seconds.values())), figures)
    return [found, _latency(setting, latency)]


def _pace(setting: Setting, seconds: dict[str, list[float]], bytes: int, domain: int) -> dict[str, Figure]:
    """GB/s from the median transfer of each directed link; links between domains, if there are any, by themselves."""
    pace = {link: bytes / statistics.median(times) / 1e9 for link, times in seconds.items()}
    source = f"transfers of {bytes} bytes between two ranks, answer included, by the sender's clock"
    figures: dict[str, Figure] = {}
    for prefix, same in (("p2p", True), ("p2p_between", False)):
        tier = [value for link, value in pace.items() if within(link, domain) == same]
        if tier:
            figures[f"{prefix}_slowest_gbs"] = setting.measured(
                min(tier), "GB/s", f"slowest of {len(tier)} links; {source}"
            )
            figures[f"{prefix}_median_gbs"] = setting.measured(
                statistics.median(tier), "GB/s", f"median of {len(tier)} links; {source}"
            )
    if len({end for link in pace for end in link.split(">")}) <= MATRIX_RANKS:
        for link, value in pace.items():
            figures[f"p2p_{link.replace('>', '_')}_gbs"] = setting.measured(value, "GB/s", f"link {link}; {source}")
    return figures


def _latency(setting: Setting, latency: dict[str, list[float]]) -> Evidence:
    """p50 and p99 of half a round trip of 8 KB, over all links."""
    trips = sorted(one * 1e6 for times in latency.values() for one in times)
    p50, p99 = (trips[min(len(trips) - 1, math.ceil(share * len(trips)) - 1)] for share in (0.5, 0.99))
    source = f"half a round trip of {SMALL_MESSAGE} bytes, {len(trips)} trips over {len(latency)} links"
    figures = {
        "latency_8k_p50_us": setting.measured(p50, "us", source),
        "latency_8k_p99_us": setting.measured(p99, "us", source),
    }
    return _finding("latency", "pass", f"8 KB: p50 {p50:.3g} us, p99 {p99:.3g} us", len(trips), figures)


def _slow_links(
    crew: Crew, setting: Setting, seconds: dict[str, list[float]], domain: int
) -> dict[str, float] | Evidence:
    """The directed links that stay slow when they are measured again, with their pace as a share of a good link's.

    A first look gives suspects and good links, among those of one tier. Each retest measures the suspects that are left
    in turn with good links, one pair at a time. A suspect is cleared as soon as its fastest transfer so far is near the
    fastest of the good link beside it, or near what is usual: noise makes transfers slow, never fast, so it can clear a
    link but not convict one.
    """
    fastest = {link: min(times) for link, times in seconds.items()}
    tiers = [{link for link in fastest if within(link, domain) == same} for same in (True, False)]
    usual = {link: reference({one: fastest[one] for one in tier}) for tier in tiers for link in tier}
    suspects = _worst({link: value / usual[link] for link, value in fastest.items() if value > usual[link] / SLOW})
    good = [link for link in sorted(fastest, key=fastest.__getitem__) if link not in suspects]
    best = dict.fromkeys(suspects, math.inf)
    share: dict[str, float] = {}
    for retest in range(RETESTS):
        partners = {link: partner for link in suspects if (partner := _partner(link, good, domain, retest)) is not None}
        if not partners:
            return {}
        arguments = _retest_arguments(setting, partners, retest)
        called = _call(crew, setting, "pairs", arguments)
        if (bad := _bad_call(crew, setting, called, "pairs of ranks", "pairs", arguments)) is not None:
            return bad
        times = _merged(called, "seconds")
        for link, partner in partners.items():
            best[link] = min(best[link], *times[link])
            share[link] = max(quantile(times[partner], GOOD_SHARE), usual[link]) / best[link]
        suspects = {link: value for link, value in suspects.items() if link in partners and share[link] < SLOW}
        if retest + 1 >= CLEAR_RETESTS and all(share[link] < CLEAR for link in suspects):
            break
    return {link: share[link] for link in suspects}


def _retest_arguments(setting: Setting, partners: dict[str, str], retest: int) -> dict[str, Any]:
    """Each suspected pair in turn with its partner, a few transfers at a time, several times over."""
    together = {_ends(link): _ends(partner) for link, partner in partners.items()}
    turns = [list(pair) for suspect, partner in together.items() for pair in (suspect, partner)]
    return {
        "bytes": effort_of(setting).pair_bytes,
        "repeats": TRANSFERS,
        "latency_repeats": 0,
        "seed": setting.recipe.seed + retest,
        "only": turns * TURNS,
        "alone": True,
    }


def _worst(suspects: dict[str, float]) -> dict[str, float]:
    """The slowest suspects, at most three of a rank as the sender, so that one bad rank does not hide another."""
    chosen: dict[str, float] = {}
    of: Counter[str] = Counter()
    for link in sorted(suspects, key=suspects.__getitem__, reverse=True):
        sender = link.split(">")[0]
        if of[sender] < 3 and len(chosen) < MOST_SUSPECTS:
            of[sender] += 1
            chosen[link] = suspects[link]
    return chosen


def _ends(link: str) -> Pair:
    return pair_of(*map(int, link.split(">")))


def _partner(link: str, good: list[str], domain: int, turn: int) -> str | None:
    """A good link of the same tier to compare with, another at each turn; one without a common end if there is any."""
    others = [one for one in good if _ends(one) != _ends(link) and within(one, domain) == within(link, domain)]
    apart = [other for other in others if not {*_ends(other)} & {*_ends(link)}]
    choice = apart or others
    return choice[turn % len(choice)] if choice else None


def _slow_evidence(
    crew: Crew, setting: Setting, summary: str, figures: dict[str, Figure], slow: dict[str, float], domain: int
) -> Evidence:
    name = "pairs of ranks"
    pairs = {_ends(link) for link in slow}
    everyone = [pair for chosen in tournament(crew.world) for pair in chosen]
    blame = blamed(pairs, everyone)
    listed = ", ".join(f"{link} at {share:.0%}" for link, share in sorted(slow.items(), key=lambda item: item[1]))
    detail = f"{summary}; slow in every retest beside good links: {listed} of their pace; at fault: {blame}"
    arguments = {
        "bytes": effort_of(setting).pair_bytes,
        "repeats": TRANSFERS,
        "latency_repeats": 0,
        "alone": True,
        "domain": domain,
        "slower_than": 1 / SLOW,
    }
    called = _call(crew, setting, "pairs", arguments)
    expected = f"every link at {SLOW:.0%} of the pace of the others or more"
    failure = _keep(crew, setting, called, name, f"slow: {blame}", "pairs", arguments, expected, listed)
    samples = RETESTS * TURNS * TRANSFERS * len(slow)
    return _finding(name, "fail", detail, samples, figures, _without(crew, blame, "slow"), blame.everyone, failure)


# -- collectives ------------------------------------------------------------------------------------------------------


def look_at_results(crew: Crew, setting: Setting) -> list[Evidence]:
    """Every kind of collective with several fills, in the dtypes that training sends; results compared exactly."""
    name, checked = "results of collectives", 0
    wrong: dict[str, list[dict[str, Any]]] = {}
    failure: str | None = None
    for collective, dtype, reduction in _checks():
        arguments: dict[str, Any] = {
            "collective": collective,
            "dtype": dtype,
            "numel": effort_of(setting).numel,
            "reduction": reduction,
            "fills": 4,
            "seed": setting.recipe.seed,
        }
        called = _call(crew, setting, "verified", arguments)
        if not called.ok:
            before = [_wrong_results(crew, name, wrong, checked, failure)] if wrong else []
            return [*before, _broken(crew, setting, called, name, "verified", arguments)]
        checked += sum(value["checked"] for value in called.values)
        if any(value["failed"] for value in called.values):
            wrong[f"{collective} of {dtype}"] = called.values
            failure = failure or _keep_wrong(crew, setting, called, name, "verified", arguments)
    if wrong:
        return [_wrong_results(crew, name, wrong, checked, failure)]
    return [_finding(name, "pass", f"{checked} elements of {len(_checks())} kinds of collectives, all exact", checked)]


def _wrong_results(
    crew: Crew, name: str, wrong: dict[str, list[dict[str, Any]]], checked: int, failure: str | None
) -> Evidence:
    blame = blame_of_wrong(*wrong.values())
    detail = _wrong_detail(next(iter(wrong.values()))) + f"; wrong: {', '.join(wrong)}"
    limits = _without(crew, blame, "wrong results")
    if not limits and all(kind.startswith("all_to_all") for kind in wrong):
        limits = [_experts(1, "the results of an all-to-all are wrong")]
    detail += f"; at fault: {blame}" if blame else ""
    return _finding(name, "fail", detail, checked, {}, limits, blame.everyone, failure)


def _checks() -> list[tuple[str, str, str]]:
    """(collective, dtype, reduction): sums and moves in fp32 and bf16, counts of tokens in int64."""
    kinds = ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "send_recv", "all_to_all", "all_to_all_uneven"]
    floats = [(kind, dtype, "sum") for kind in kinds for dtype in ("float32", "bfloat16")]
    return [*floats, ("all_to_all", "int64", "sum"), ("all_reduce", "int64", "sum"), ("all_reduce", "float32", "max")]


def look_at_shapes(crew: Crew, setting: Setting) -> list[Evidence]:
    """The pace of the collectives that this run will issue, each at its largest, as bus bandwidth."""
    effort, name = effort_of(setting), "collectives in run shapes"
    shapes = shapes_of(setting.recipe, crew.world, setting.device, effort.most_bytes)
    chosen = {shape.collective: shape for shape in reversed(shapes) if shape.collective != "all_to_all"}
    largest = next(shape for shape in shapes if shape.collective == "reduce_scatter")
    chosen.setdefault("all_reduce", Shape("a sum over all ranks", "all_reduce", "float32", largest.numel, crew.world))
    figures: dict[str, Figure] = {}
    samples = 0
    for shape in chosen.values():
        arguments = _timed_arguments(setting, crew, shape)
        called = _call(crew, setting, "timed", arguments)
        if (bad := _bad_call(crew, setting, called, name, "timed", arguments)) is not None:
            return [bad]
        figures[f"{shape.collective}_bus_gbs"] = _bus(setting, called, shape)
        samples += effort.repeats
    pace = ", ".join(f"{key.removesuffix('_bus_gbs')} {figure.value:.3g} GB/s" for key, figure in figures.items())
    cut = [shape.cut for shape in chosen.values() if shape.cut]
    detail = f"bus bandwidth: {pace}" + (f"; {', '.join(cut)}" if cut else "")
    return [_finding(name, "pass", detail, samples, figures)]


def _timed_arguments(setting: Setting, crew: Crew, shape: Shape) -> dict[str, Any]:
    return {
        "collective": shape.collective,
        "dtype": shape.dtype,
        "numel": shape.numel,
        "repeats": effort_of(setting).repeats,
        "seed": setting.recipe.seed,
        "groups": shape.groups(crew.world),
    }


def _bus(setting: Setting, called: Called, shape: Shape) -> Figure:
    """Bus bandwidth of the slowest rank's median."""
    slowest = min(value["bus_gbs"] for value in called.values if value["bus_gbs"] is not None)
    size, factor = called.values[0]["bytes"], bus_factor(shape.collective, shape.ranks)
    source = f"{shape.name}: {size} bytes of {shape.dtype} among {shape.ranks} ranks / median time on the slowest rank"
    return setting.measured(slowest, "GB/s", f"{source} x {factor:.3g}: bus bandwidth")


# -- groups of experts ------------------------------------------------------------------------------------------------


def look_at_exchange(crew: Crew, setting: Setting) -> list[Evidence]:
    """The exchange of tokens between experts in groups of 2, 4, 8 ... ranks, all at once: where it breaks down."""
    name, figures, reached = "exchange of tokens by group size", dict[str, Figure](), 1
    pace: dict[int, float] = {}
    for size in group_sizes(setting, crew.world):
        shape = exchange_shape(setting, crew.world, size)
        arguments = _timed_arguments(setting, crew, shape)
        called = _call(crew, setting, "timed", arguments)
        if (bad := _bad_call(crew, setting, called, name, "timed", arguments)) is not None:
            limits = bad.limits or [_experts(reached, f"the exchange among {size} ranks fails")]
            return [bad.model_copy(update={"limits": limits, "figures": figures})]
        figure = figures[f"all_to_all_{size}_bus_gbs"] = _bus(setting, called, shape)
        if size == crew.world:
            figures["all_to_all_bus_gbs"] = figure
        pace[size] = _fastest(called)
        if pace[size] < FALL * max(pace.values()) and _stays_slow(crew, setting, arguments, pace, size):
            detail = f"bus bandwidth falls from {max(pace.values()):.3g} GB/s to {pace[size]:.3g} among {size} ranks"
            limit = _experts(reached, detail)
            return [_finding(name, "fail", f"{detail}; fit for EP <= {reached}", len(pace), figures, [limit])]
        reached = size
    listed = ", ".join(f"{size} ranks {value:.3g}" for size, value in pace.items())
    repeats = effort_of(setting).repeats
    return [_finding(name, "pass", f"bus bandwidth in GB/s: {listed}", repeats * len(pace), figures)]


def group_sizes(setting: Setting, world: int) -> list[int]:
    """2, 4, 8 ... as far as they divide the ranks, and all ranks. A dense model exchanges nothing: all ranks only."""
    powers = [2**power for power in range(1, world.bit_length()) if world % 2**power == 0]
    return sorted({*powers, world}) if isinstance(setting.recipe.model, MixtureSection) else [world]


def exchange_shape(setting: Setting, world: int, ranks: int) -> Shape:
    """What a rank sends when `ranks` share the experts, cut to what this pool can send in the time there is."""
    dtype = compute_dtype(setting.recipe, setting.device)
    shape = Shape("tokens to experts and back", "all_to_all", dtype, exchange_numel(setting.recipe, world), ranks)
    return capped(shape, effort_of(setting).most_bytes)


def _fastest(called: Called) -> float:
    """Bus bandwidth of the fastest repeat on the slowest rank, GB/s: what noise disturbs least."""
    return min(
        value["bytes"] / min(value["seconds"]) * bus_factor("all_to_all", value["ranks"]) / 1e9
        for value in called.values
        if value["seconds"]
    )


def _stays_slow(crew: Crew, setting: Setting, arguments: dict[str, Any], pace: dict[int, float], size: int) -> bool:
    """Whether it is slow in every one of some more tries. The best one counts."""
    for _ in range(RETESTS):
        called = _call(crew, setting, "timed", arguments)
        if not called.ok:
            return True
        pace[size] = max(pace[size], _fastest(called))
        if pace[size] >= FALL * max(pace.values()):
            return False
    return True


# -- communicators ----------------------------------------------------------------------------------------------------


def look_at_set_up(crew: Crew, setting: Setting) -> list[Evidence]:
    """The time to make a communicator, against the time after which ranks give up on each other."""
    name, timeout = "set-up of communicators", crew.connect_timeout_s
    arguments: dict[str, Any] = {"times": COMMUNICATORS, "limit_s": LATE * timeout}
    called = _call(crew, setting, "set_up", arguments)
    if not called.ok:
        return [_broken(crew, setting, called, name, "set_up", arguments)]
    seconds = [one for value in called.values for one in value["seconds"]]
    joined = [one for start in crew.starts for one in start]
    median, longest = statistics.median(seconds), max(seconds + joined)
    source = f"{COMMUNICATORS} communicators of {crew.world} ranks, made and used once; {len(joined)} first joins"
    figures = {"communicator_s": setting.measured(median, "s", source, low=min(seconds), high=longest)}
    detail = f"median {median:.3g} s, longest {longest:.3g} s; ranks wait {timeout:g} s for each other"
    if longest <= LATE * timeout:
        return [_finding(name, "pass", detail, len(seconds), figures)]
    detail += f": more than {LATE:.0%} of that leaves too little for ranks that start at different times"
    failure = _keep(crew, setting, called, name, "slow set-up", "set_up", arguments, f"<= {LATE * timeout} s", detail)
    return [_finding(name, "fail", detail, len(seconds), figures, failure=failure)]


def look_at_concurrency(crew: Crew, setting: Setting) -> list[Evidence]:
    """Two communicators in use at once, and a collective beside matrix products: the same results as alone."""
    name, checked = "collectives at the same time", 0
    for function in ("alternating", "overlapped"):
        arguments = {"numel": effort_of(setting).numel, "rounds": 8, "seed": setting.recipe.seed}
        called = _call(crew, setting, function, arguments)
        if (bad := _bad_call(crew, setting, called, name, function, arguments)) is not None:
            return [bad]
        checked += sum(value["checked"] for value in called.values)
    detail = f"{checked} elements exact with two communicators in turn, and with sums beside matrix products"
    return [_finding(name, "pass", detail, checked)]


# -- what went wrong --------------------------------------------------------------------------------------------------


def locate(crew: Crew, setting: Setting, called: Called) -> Blame:
    """Which link or rank does not answer after a call that did not end well.

    A rank that began fewer collectives than all others is the one that hangs. Else all pairs are tried at the step at
    which the call ended, and again without those that are stuck, until the rest answers: ranks that only wait for a
    partner are in another pair than it is, so a pair is stuck if both of its ends are in it.
    """
    if (rank := laggard(called)) is not None:
        return Blame(ranks=(rank,))
    pending = [pair for chosen in tournament(crew.world) for pair in chosen]
    bad: set[Pair] = set()
    step = max((reply.beat.step for reply in called.replies if reply.beat and reply.state != "done"), default=0)
    for _ in range(LOOKS):
        wanted = [list(pair) for pair in pending]
        arguments = {"bytes": SMALL_MESSAGE, "repeats": 0, "latency_repeats": 0, "only": wanted, "step": step}
        again = _call(crew, setting, "pairs", arguments, stall_s=min(setting.stall_s, effort_of(setting).silence_s))
        stuck = stuck_pairs(again)
        if again.ok or not stuck:
            break
        bad |= stuck
        count = Counter(end for pair in bad for end in pair)
        pending = [pair for pair in pending if pair not in bad and all(count[end] < 2 for end in pair)]
    return blamed(bad, [*pending, *bad])


def _bad_call(
    crew: Crew, setting: Setting, called: Called, name: str, function: str, arguments: dict[str, Any]
) -> Evidence | None:
    """A failing finding if a call did not end well or its results are wrong, else None."""
    if not called.ok:
        return _broken(crew, setting, called, name, function, arguments)
    if not any(value["failed"] for value in called.values):
        return None
    blame = blame_of_wrong(called.values)
    failure = _keep_wrong(crew, setting, called, name, function, arguments)
    detail = _wrong_detail(called.values) + (f"; at fault: {blame}" if blame else "")
    checked = sum(value["checked"] for value in called.values)
    limits = _without(crew, blame, "wrong results")
    return _finding(name, "fail", detail, checked, {}, limits, blame.everyone, failure)


def _broken(
    crew: Crew, setting: Setting, called: Called, name: str, function: str, arguments: dict[str, Any]
) -> Evidence:
    """A call that crashed, raised or hangs, with who is to blame for it."""
    what, states = summed_up(called), {reply.state for reply in called.replies}
    failure = _keep(crew, setting, called, name, what[:80], function, arguments, "an answer of every rank", what)
    blame = _who(crew, setting, called)
    how = "crashed" if "crashed" in states else "hangs" if "hung" in states else "failed"
    detail = f"{function} {how}: {what}" + (f"; at fault: {blame}" if blame else "")
    return _finding(name, "fail", detail, 0, {}, _without(crew, blame, how), blame.everyone, failure)


def _who(crew: Crew, setting: Setting, called: Called) -> Blame:
    """Nobody if all ranks raised: then it is what they were asked for that is refused."""
    states = [reply.state for reply in called.replies]
    if called.raised_alike:
        return Blame()
    suspected = Blame(ranks=tuple(called.culprits()))
    if "crashed" in states or any(reply.beat and reply.beat.section == JOINING for reply in called.replies):
        return suspected if len(suspected.ranks) < crew.world else Blame()
    return locate(crew, setting, called) or (suspected if len(suspected.ranks) < crew.world else Blame())


def _without(crew: Crew, blame: Blame, why: str) -> list[Limit]:
    """The ranks to leave out, one end of a bad link; none if fewer than two would be left or nobody is blamed."""
    out = set(blame.ranks)
    left = [link for link in blame.links if not out & set(link)]
    while left:
        count = Counter(end for link in left for end in link)
        out.add(max(count, key=lambda rank: (count[rank], rank)))
        left = [link for link in left if not out & set(link)]
    if not out or crew.world - len(out) < 2:
        return []
    return [without_ranks(sorted(out), f"{blame}: {why}")]


def _experts(most: int, reason: str) -> Limit:
    return Limit(setting="train.expert", most=most, reason=reason)


def _wrong_detail(values: list[dict[str, Any]]) -> str:
    return next(value["detail"] for value in values if value["failed"])


def _keep_wrong(
    crew: Crew, setting: Setting, called: Called, name: str, function: str, arguments: dict[str, Any]
) -> str:
    what = _wrong_detail(called.values)
    title = what.partition(":")[0]
    return _keep(crew, setting, called, name, f"wrong results: {title}", function, arguments, "exact results", what)


def _keep(
    crew: Crew,
    setting: Setting,
    called: Called,
    name: str,
    title: str,
    function: str,
    arguments: dict[str, Any],
    expected: str,
    observed: str,
) -> str:
    return setting.keep_failure(
        crew,
        called,
        probe=name,
        title=title,
        function=f"{WORK}:{function}",
        arguments=arguments,
        expected=expected,
        observed=observed,
    )


def _call(
    crew: Crew, setting: Setting, function: str, arguments: dict[str, Any], stall_s: float | None = None
) -> Called:
    """A call that may take its time as long as ranks show signs of life; less patience once something has failed."""
    patience = setting.stall_s if not setting.failures else min(setting.stall_s, 2 * effort_of(setting).silence_s)
    return crew.call(f"{WORK}:{function}", arguments, deadline_s=600.0, stall_s=stall_s or patience)


def _merged(called: Called, key: str) -> dict[str, list[float]]:
    return {link: times for value in called.values for link, times in value[key].items()}


def render_matrix(evidence: Evidence) -> Table | None:
    """The pairs of ranks as a table, GB/s from row to column; None if the finding has none."""
    found = [(PAIR_OF_RANKS.fullmatch(key), figure) for key, figure in evidence.figures.items()]
    pace = {(int(match[1]), int(match[2])): figure for match, figure in found if match}
    if not pace:
        return None
    ranks = sorted({end for pair in pace for end in pair})
    median = statistics.median(figure.value for figure in pace.values() if figure.value is not None)
    table = Table(title=f"GB/s from row to column ({next(iter(pace.values())).kind})", box=None)
    table.add_column("rank", justify="right")
    for rank in ranks:
        table.add_column(str(rank), justify="right")
    for a in ranks:
        table.add_row(str(a), *(_cell(pace.get((a, b)), median) for b in ranks))
    return table


def _cell(figure: Figure | None, median: float) -> str:
    if figure is None or figure.value is None:
        return "-"
    text = f"{figure.value:.3g}"
    return f"[red]{text}[/red]" if figure.value < SLOW * median else text


def _price(calls: Callable[[int], float]) -> Callable[[Setting], float]:
    """Seconds, as a number of calls of a rank's work on this kind of device."""
    return lambda setting: round(calls(setting.pool.ranks) * effort_of(setting).call_s, 2)


PROBES: tuple[Probe, ...] = (
    Probe(
        name="pairs of ranks",
        aspect="links",
        needed_for="training",
        finds=("slow-link", "link-cut", "hang", "crash"),
        price=_price(lambda ranks: 2.0 * ranks),
        run=look_at_pairs,
        min_ranks=2,
    ),
    Probe(
        name="results of collectives",
        aspect="links",
        needed_for="training",
        finds=("wrong-sum", "nan", "flipped-bit", "link-cut", "hang", "crash"),
        price=_price(lambda ranks: 17.0),
        run=look_at_results,
        min_ranks=2,
    ),
    Probe(
        name="collectives in run shapes",
        aspect="links",
        needed_for="training",
        finds=("wrong-sum", "nan", "link-cut", "hang", "crash"),
        price=_price(lambda ranks: 8.0),
        run=look_at_shapes,
        min_ranks=2,
    ),
    Probe(
        name="exchange of tokens by group size",
        aspect="links",
        needed_for="training",
        finds=("link-cut", "hang", "crash", "nan"),
        price=_price(lambda ranks: 3.0 * math.log2(max(2, ranks))),
        run=look_at_exchange,
        min_ranks=2,
    ),
    Probe(
        name="set-up of communicators",
        aspect="links",
        needed_for="training",
        finds=("hang", "crash", "link-cut"),
        price=_price(lambda ranks: 3.0),
        run=look_at_set_up,
        min_ranks=2,
    ),
    Probe(
        name="collectives at the same time",
        aspect="links",
        needed_for="training",
        finds=("wrong-sum", "nan", "flipped-bit", "small-error", "dtype-swap", "link-cut", "hang", "crash"),
        price=_price(lambda ranks: 5.0),
        run=look_at_concurrency,
        min_ranks=2,
    ),
)
