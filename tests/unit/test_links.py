"""Links: fills that are exact in any order, collectives that are found wrong, links and ends that are told apart."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from isthmus.chips import get_chip
from isthmus.chips.rehearse.faults import parse_fault
from isthmus.forecast.count import count_parameters
from isthmus.launch.beats import Beat
from isthmus.launch.crew import Called, Crew, Reply
from isthmus.pools import get_pool
from isthmus.probes import blame, links
from isthmus.probes.contract import Setting
from isthmus.probes.portable import collectives
from isthmus.probes.shapes import shapes_of
from isthmus.recipe.read import load_recipe
from isthmus.recipe.schema import Recipe
from isthmus.records import Evidence, FailureCase
from tests.support.flow_recipe import RECIPE, REINFORCED, SMALL, TAUGHT

WORK = "isthmus.probes.portable.collectives"


def recipe_for(ranks: int, *overrides: str) -> Recipe:
    small = tuple(f"{key}={value}" for key, value in SMALL.items())
    return load_recipe(RECIPE, (*small, f"pools.home.count={ranks}", 'place.train=["home"]', *overrides))


def setting_for(path: Path, ranks: int, *overrides: str) -> Setting:
    chosen = recipe_for(ranks, *overrides)
    folder = path / "qualify" / "home"
    folder.mkdir(parents=True, exist_ok=True)
    return Setting(chosen, get_pool(chosen, "home"), get_chip("cpu"), None, "cpu", path, folder, stall_s=4.0)


@pytest.fixture(scope="module")
def crew():
    with Crew(4) as crew:
        yield crew


# -- fills ------------------------------------------------------------------------------------------------------------


def summed_in_order(values: list[torch.Tensor], order: list[int], dtype: torch.dtype) -> torch.Tensor:
    total = torch.zeros(len(values[0]), dtype=dtype)
    for rank in order:
        total = total + values[rank].to(dtype)
    return total


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_of_sparse_fills_are_exact_for_512_ranks_in_any_order(dtype: str):
    world, numel, most = 512, 97, collectives.CONTRIBUTORS[dtype]
    values = [collectives.contribution(rank, world, numel, most, seed=5) for rank in range(world)]
    exact = torch.stack(values).sum(0)
    assert torch.equal(collectives.reduced(world, numel, most, 5, "sum"), exact)
    draw = random.Random(0)
    for _ in range(4):
        order = draw.sample(range(world), world)
        total = summed_in_order(values, order, collectives.DTYPES[dtype])
        assert torch.equal(total.long(), exact)


def test_sums_of_rank_valued_fills_are_not():
    """As a vendor's collective test fills; 1 + 2 + ... + 512 is 131,328."""
    values = [torch.full((1,), rank + 1) for rank in range(512)]
    assert summed_in_order(values, list(range(512)), torch.bfloat16).item() != 131_328
    assert summed_in_order(values, list(range(512)), torch.float16).isinf().all()


@given(world=st.integers(1, 90), seed=st.integers(0, 2**31), reduction=st.sampled_from(["sum", "max", "min"]))
@settings(max_examples=30, deadline=None)
def test_the_expected_reduction_is_that_of_the_contributions(world: int, seed: int, reduction: str):
    values = torch.stack([collectives.contribution(rank, world, 33, 64, seed) for rank in range(world)])
    direct = {"sum": values.sum(0), "max": values.amax(0), "min": values.amin(0)}[reduction]
    assert torch.equal(collectives.reduced(world, 33, 64, seed, reduction), direct)
    assert ((values != 0).sum(0) == min(world, 64)).all() and values.abs().max() <= 3


@given(world=st.integers(1, 40), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_a_fill_with_one_contributor_names_it(world: int, seed: int):
    values = torch.stack([collectives.contribution(rank, world, 50, 1, seed) for rank in range(world)])
    assert torch.equal(values.abs().argmax(0), collectives.sole_contributors(world, 50, seed))


def test_what_ranks_send_differs_and_repeats_only_with_a_prime_period():
    sent = {(a, b): collectives.moved(a, b, 400, seed=1) for a, b in itertools.permutations(range(4), 2)}
    assert all((one != other).any() for one, other in itertools.combinations(sent.values(), 2))
    assert all(value.abs().max() <= 100 and (value != 0).all() for value in sent.values())
    long = collectives.moved(0, 1, collectives.PERIOD + 50, seed=1)
    assert torch.equal(long[:50], long[-50:]) and (long[:5] != long[65_536:65_541]).any()


# -- what is computed from times --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collective", "factor"),
    [("all_reduce", 1.75), ("all_gather", 0.875), ("reduce_scatter", 0.875), ("all_to_all", 0.875), ("broadcast", 1.0)],
)
def test_bus_bandwidth_is_as_published_for_eight_ranks(collective: str, factor: float):
    """The factors of nccl-tests, doc/PERFORMANCE.md."""
    assert collectives.bus_factor(collective, 8) == factor


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 16])
def test_in_a_chain_every_pair_comes_once_and_waits_for_the_one_before(world: int):
    pairs = collectives.chain(world)
    assert sorted(pairs) == sorted(pair for chosen in collectives.tournament(world) for pair in chosen)
    assert all({*one} & {*following} for one, following in itertools.pairwise(pairs))


@pytest.mark.parametrize("world", [2, 3, 4, 7, 8, 16])
def test_in_a_tournament_every_pair_meets_once_and_nobody_twice_in_a_round(world: int):
    rounds = collectives.tournament(world)
    assert sorted(pair for chosen in rounds for pair in chosen) == list(itertools.combinations(range(world), 2))
    assert all(len({end for pair in chosen for end in pair}) == 2 * len(chosen) for chosen in rounds)
    assert len(rounds) == world - 1 + world % 2


@pytest.mark.parametrize("world", [3, 4, 8])
def test_a_bad_rank_does_not_move_the_reference(world: int):
    fastest = {f"{a}>{b}": 9.0 if 1 in (a, b) else 1.0 for a, b in itertools.permutations(range(world), 2)}
    assert collectives.reference(fastest) == 1.0


def pairs_of(world: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(world), 2))


@given(world=st.integers(4, 9), data=st.data())
def test_bad_ends_and_bad_links_are_told_apart(world: int, data: st.DataObject):
    end = data.draw(st.integers(0, world - 1))
    link = data.draw(st.sampled_from(pairs_of(world)))
    of_end = {pair for pair in pairs_of(world) if end in pair}
    assert blame.blamed(of_end, pairs_of(world)) == blame.Blame(ranks=(end,))
    assert blame.blamed({link}, pairs_of(world)) == blame.Blame(links=(link,))
    if end not in link:
        assert blame.blamed(of_end | {link}, pairs_of(world)) == blame.Blame((end,), (link,))


@given(world=st.integers(6, 9), data=st.data())
def test_two_bad_ends_are_both_found(world: int, data: st.DataObject):
    ends = data.draw(st.sets(st.integers(0, world - 1), min_size=2, max_size=2))
    bad = {pair for pair in pairs_of(world) if ends & set(pair)}
    assert set(blame.blamed(bad, pairs_of(world)).ranks) == ends


def times_of(world: int, domain: int, slow: set[tuple[int, int]], draw: random.Random) -> dict[str, float]:
    """Transfers that take 1 within a domain and 3 between domains, with noise, and 9 times that over slow pairs."""
    times = {}
    for a, b in itertools.permutations(range(world), 2):
        usual = 1 if a // domain == b // domain else 3
        times[f"{a}>{b}"] = usual * (9 if {(a, b), (b, a)} & slow else 1) * draw.uniform(1, 1.2)
    return times


@given(shape=st.sampled_from([(4, 2), (8, 4), (8, 2), (12, 4), (6, 3)]), draw=st.randoms(use_true_random=False))
def test_links_between_nodes_are_a_tier_and_not_a_fault(shape: tuple[int, int], draw: random.Random):
    world, domain = shape
    assert blame.domain_size(times_of(world, domain, set(), draw), world, links.SLOW) == domain
    assert blame.domain_size(times_of(world, world, set(), draw), world, links.SLOW) is None


@given(world=st.integers(4, 9), end=st.integers(0, 3), draw=st.randoms(use_true_random=False))
def test_a_bad_rank_or_link_is_not_taken_for_a_tier(world: int, end: int, draw: random.Random):
    of_end = {pair for pair in pairs_of(world) if end in pair}
    for slow in (of_end, {draw.choice(pairs_of(world))}):
        assert blame.domain_size(times_of(world, world, slow, draw), world, links.SLOW) is None


def seen(*origins: set[int], unnamed: int = 0) -> list[dict]:
    return [{"origins": sorted(one), "failed": bool(one), "unnamed": unnamed * bool(one)} for one in origins]


def test_wrong_elements_are_blamed_on_who_sent_them_or_who_alone_sees_them():
    assert blame.blame_of_wrong(seen({2}, {2}, set(), {2})) == blame.Blame(ranks=(2,))
    assert blame.blame_of_wrong(seen(set(), {0, 2, 3}, set(), set())) == blame.Blame(ranks=(1,))
    assert blame.blame_of_wrong(seen(set(), {3}, set(), set())) == blame.Blame(links=((1, 3),))
    assert blame.blame_of_wrong(seen(set(), {3}, set(), set(), unnamed=5)) == blame.Blame(ranks=(1,))
    assert not blame.blame_of_wrong(seen({1}, {2}, {0}, {1}))
    one_link, another = seen(set(), {3}, set(), set()), seen(set(), {2}, set(), set())
    assert blame.blame_of_wrong(one_link, another) == blame.Blame(ranks=(1,))


def test_a_pair_is_stuck_if_both_ends_are_in_it():
    def reply(rank: int, state: str, section: str) -> Reply:
        return Reply(rank, state, beat=Beat(1.0, 0, 1, 0, section))  # pyright: ignore[reportArgumentType]

    waiting = Called([reply(0, "hung", "pair 0-2"), reply(1, "hung", "pair 1-3"), reply(2, "hung", "pair 0-2")], 1.0)
    done = reply(3, "done", "pair 1-3")
    assert blame.stuck_pairs(Called([*waiting.replies, done], 1.0)) == {(0, 2)}


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_the_units_that_are_gathered_are_the_whole_model():
    chosen = recipe_for(4)
    shapes = shapes_of(chosen, 4, "cpu")
    gathered = [shape for shape in shapes if shape.collective == "all_gather"]
    total = count_parameters(chosen.model).total
    assert 0 <= total - sum(shape.numel * (shape.times or 0) // 2 for shape in gathered) < 4 * len(gathered) * 4
    assert next(shape for shape in shapes if shape.collective == "broadcast").numel == total // 4 * 4
    assert {shape.collective for shape in shapes} == {"all_gather", "reduce_scatter", "broadcast"}


def test_replicas_sum_their_shards_and_experts_exchange_tokens():
    chosen = recipe_for(4, "train.replicate=2", "train.expert=2", "train.precision=bf16")
    shapes = shapes_of(chosen, 4, "cpu")
    sums = [shape for shape in shapes if shape.collective == "all_reduce"]
    assert {shape.ranks for shape in sums} == {2} and all(shape.groups(4) == [[0, 2], [1, 3]] for shape in sums)
    exchange = next(shape for shape in shapes if shape.collective == "all_to_all")
    assert exchange.groups(4) == [[0, 1], [2, 3]] and exchange.dtype == "bfloat16"
    tokens = chosen.named(TAUGHT).batch_size * chosen.named(REINFORCED).max_new_tokens // 4
    assert exchange.numel == tokens * chosen.model.num_experts_per_tok * chosen.model.hidden_size
    assert {shape.dtype for shape in shapes if shape.collective == "reduce_scatter"} == {"float32"}


def test_what_is_too_large_is_cut_and_says_so():
    shapes = shapes_of(recipe_for(4), 4, "cpu", most_bytes=4096)
    assert all(shape.bytes <= 4096 and shape.numel % shape.ranks == 0 for shape in shapes)
    assert all(("MiB" in shape.cut) == (shape.asked is not None) for shape in shapes) and any(s.cut for s in shapes)


# -- healthy ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collective", collectives.COLLECTIVES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_collectives_of_healthy_ranks_are_exact(crew: Crew, collective: str, dtype: str):
    for extra in ({"numel": 1000}, {"numel": 3, "fills": 1}, {"numel": 64, "groups": [[0, 2], [1, 3]]}):
        called = crew.call(f"{WORK}:verified", {"collective": collective, "dtype": dtype, **extra}, deadline_s=60)
        assert all(not value["failed"] and value["checked"] for value in called.values), called.values


def test_a_group_that_a_rank_is_not_in_leaves_it_out(crew: Crew):
    asked = {"collective": "all_reduce", "numel": 100, "groups": [[1, 3]]}
    checked = [value["checked"] for value in crew.call(f"{WORK}:verified", asked, deadline_s=60).values]
    assert checked == [0, 400, 0, 400]
    timed = crew.call(f"{WORK}:timed", {**asked, "repeats": 2}, deadline_s=60).values
    assert [value["ranks"] for value in timed] == [0, 2, 0, 2] and timed[0]["bus_gbs"] is None


def test_the_bus_bandwidth_counts_all_shares(crew: Crew):
    asked = {"collective": "all_gather", "numel": 4096, "repeats": 3}
    for value in crew.call(f"{WORK}:timed", asked, deadline_s=60).values:
        assert value["bytes"] == 4 * 4096 and not value["failed"]
        assert value["bus_gbs"] == pytest.approx(4 * 4096 * 0.75 / sorted(value["seconds"])[1] / 1e9)


def test_every_link_is_measured_both_ways(crew: Crew):
    asked = {"bytes": 4096, "repeats": 2, "latency_repeats": 3}
    for alone in (False, True):
        values = crew.call(f"{WORK}:pairs", {**asked, "alone": alone}, deadline_s=60).values
        times = {link: seconds for value in values for link, seconds in value["seconds"].items()}
        assert set(times) == {f"{a}>{b}" for a, b in itertools.permutations(range(4), 2)}
        assert all(len(seconds) == 2 for seconds in times.values())
        assert all(len(value["latency_s"]) == 3 and not value["failed"] for value in values)


def test_healthy_ranks_pass_every_probe(crew: Crew, tmp_path: Path):
    setting = setting_for(tmp_path, 4)
    evidence = [item for probe in links.PROBES for item in probe.run(crew, setting)]
    assert [item.detail for item in evidence if item.outcome != "pass"] == []
    figures = {name: figure for item in evidence for name, figure in item.figures.items()}
    asked = ("p2p_slowest_gbs", "p2p_median_gbs", "latency_8k_p50_us", "latency_8k_p99_us", "communicator_s")
    buses = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    assert {*asked, *(f"{kind}_bus_gbs" for kind in buses)} <= set(figures)
    assert all(figure.kind == "measured" and figure.value > 0 for figure in figures.values())
    assert figures["p2p_slowest_gbs"].value <= figures["p2p_median_gbs"].value
    assert not setting.failures and all(item.aspect == "links" for item in evidence)


def test_the_matrix_as_a_person_reads_it(crew: Crew, tmp_path: Path):
    pairs, latency = links.look_at_pairs(crew, setting_for(tmp_path, 4))
    console = Console(width=100)
    with console.capture() as capture:
        console.print(links.render_matrix(pairs))
    text = " ".join(capture.get().split())
    assert "GB/s from row to column (measured) rank 0 1 2 3" in text and text.split().count("-") == 4
    assert links.render_matrix(latency) is None


def test_the_price_grows_with_the_ranks_and_none_is_dear(tmp_path: Path):
    small, large = (setting_for(tmp_path, ranks) for ranks in (2, 8))
    for probe in links.PROBES:
        assert 0 < probe.price(small) <= probe.price(large) < 15


# -- planted faults ---------------------------------------------------------------------------------------------------


def look(path: Path, probe: str, *faults: str, ranks: int = 4, **overrides: float) -> tuple[Evidence, Setting]:
    """The first finding of one probe on ranks with these faults."""
    setting = setting_for(path, ranks)
    for key, value in overrides.items():
        setattr(setting, key, value)
    chosen = next(one for one in links.PROBES if one.name == probe)
    with Crew(ranks, faults=[parse_fault(fault) for fault in faults]) as faulty:
        return chosen.run(faulty, setting)[0], setting


def excluded(evidence: Evidence) -> list[str]:
    return [rank for limit in evidence.limits if limit.setting == "pool.ranks" for rank in limit.excluded]


PAIRS, RESULTS, SHAPES = "pairs of ranks", "results of collectives", "collectives in run shapes"
EXCHANGE, SET_UP, TOGETHER = (
    "exchange of tokens by group size",
    "set-up of communicators",
    "collectives at the same time",
)


@pytest.mark.parametrize(
    ("fault", "probe", "ranks", "said"),
    [
        pytest.param("slow-link@rank=1,peer=3,size=40", PAIRS, [1, 3], "the link 1-3", marks=pytest.mark.long),
        ("slow-link@rank=2,size=30", PAIRS, [2], "rank 2"),
        ("link-cut@rank=0,peer=2", PAIRS, [0, 2], "the link 0-2"),
        ("link-cut@rank=1,peer=3", RESULTS, [1, 3], "the link 1-3"),
        pytest.param("link-cut@rank=3", RESULTS, [3], "rank 3", marks=pytest.mark.long),
        ("link-cut@rank=0,peer=3,step=2", SHAPES, [0, 3], "the link 0-3"),
        pytest.param("hang@rank=2", PAIRS, [2], "rank 2", marks=pytest.mark.long),
        ("hang@rank=1,step=2", RESULTS, [1], "rank 1"),
        pytest.param("hang@rank=0,step=3", SET_UP, [0], "rank 0", marks=pytest.mark.long),
        ("crash@rank=3", EXCHANGE, [3], "crashed"),
        ("crash@rank=1,step=1", RESULTS, [1], "crashed"),
        ("wrong-sum@rank=2", RESULTS, [2], "wrong on rank 2"),
        ("wrong-sum@rank=2,size=0.01", RESULTS, [2], "wrong on rank 2"),
        ("wrong-sum@rank=0", TOGETHER, [0], "wrong on rank 0"),
        ("nan@rank=3,operator=c10d::", RESULTS, [3], "nan"),
        ("nan@rank=1", TOGETHER, [1], "product"),
        ("dtype-swap@rank=2", TOGETHER, [2], "product"),
        ("flipped-bit@rank=1,operator=c10d::", RESULTS, [1], "wrong on rank 1"),
    ],
)
def test_a_planted_fault_is_found_and_its_end_named(
    fault: str, probe: str, ranks: list[int], said: str, tmp_path: Path
):
    evidence, setting = look(tmp_path, probe, fault)
    assert evidence.outcome == "fail" and evidence.ranks == ranks and said in evidence.detail, evidence
    assert excluded(evidence) == [str(ranks[-1])]
    assert evidence.failure is not None
    case = FailureCase.model_validate_json((tmp_path / evidence.failure / "failure.json").read_bytes())
    assert case.function.startswith(WORK) and case.planted and len(setting.failures) >= 1


def test_two_ranks_are_not_fit_within_limits_if_the_link_between_them_is_bad(tmp_path: Path):
    evidence, _ = look(tmp_path, RESULTS, "link-cut@rank=0,peer=1", ranks=2)
    assert evidence.outcome == "fail" and evidence.ranks == [0, 1] and not evidence.limits


def test_an_exchange_that_breaks_in_large_groups_says_how_far_it_came(tmp_path: Path):
    """The cut link lies between the groups of two, so that only all four ranks miss it."""
    evidence, _ = look(tmp_path, EXCHANGE, "link-cut@rank=0,peer=3")
    assert evidence.outcome == "fail" and "all_to_all_2_bus_gbs" in evidence.figures
    assert excluded(evidence) == ["3"]


def test_an_exchange_that_slows_down_in_large_groups_limits_the_experts(tmp_path: Path):
    evidence, _ = look(tmp_path, EXCHANGE, "slow-link@rank=0,peer=3,size=400")
    assert evidence.outcome == "fail" and "fit for EP <= 2" in evidence.detail
    assert [(limit.setting, limit.most) for limit in evidence.limits] == [("train.expert", 2)]


def test_wrong_results_of_an_all_to_all_alone_keep_training_to_one_rank_of_experts(tmp_path: Path):
    faults = [f"nan@rank={rank},operator=c10d::alltoall" for rank in range(4)]
    evidence, _ = look(tmp_path, RESULTS, *faults)
    assert evidence.outcome == "fail" and not evidence.ranks
    assert [(limit.setting, limit.most) for limit in evidence.limits] == [("train.expert", 1)]


def test_a_link_that_is_slow_fails_again_when_only_that_is_asked():
    asked = {"bytes": 2**20, "repeats": 4, "latency_repeats": 0, "alone": True, "slower_than": 1 / links.SLOW}
    with Crew(4, faults=[parse_fault("slow-link@rank=1,peer=2,size=40")]) as faulty:
        values = faulty.call(f"{WORK}:pairs", asked, deadline_s=100).values
    assert values[1]["failed"] and values[2]["failed"] and "1>2" in values[1]["detail"]


def test_slow_communicators_fail_against_the_connect_timeout(crew: Crew, tmp_path: Path, monkeypatch):
    crew.start()
    monkeypatch.setattr(crew, "connect_timeout_s", 1e-4)
    evidence = links.look_at_set_up(crew, setting_for(tmp_path, 4))[0]
    assert evidence.outcome == "fail" and "ranks wait 0.0001 s" in evidence.detail and evidence.failure


def test_what_a_rehearsed_library_refuses_is_nobodys_fault(tmp_path: Path, monkeypatch):
    setting = setting_for(tmp_path, 2)
    with Crew(2, chip="ascend-910b-313t") as rehearsed:
        allowed = links.look_at_results(rehearsed, setting)[0]
        ask, wide = rehearsed.call, {"dtype": "float64"}
        monkeypatch.setattr(rehearsed, "call", lambda work, asked, **end: ask(work, asked | wide, **end))
        (evidence,) = links.look_at_results(rehearsed, setting)
    assert evidence.outcome == "fail" and not evidence.ranks and "refused on ascend-910b-313t" in evidence.detail
    assert allowed.outcome == "pass"


def test_portable_work_needs_torch_and_the_standard_library_alone():
    """As the bundle for a vendor's engineers runs it: from its file, with a rank that only beats."""
    code = (
        "import sys, types, importlib.util, torch, torch.distributed as dist\n"
        "spec = importlib.util.spec_from_file_location('work', sys.argv[1])\n"
        "work = importlib.util.module_from_spec(spec)\n"
        "sys.modules['work'] = work; spec.loader.exec_module(work)\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "rank = types.SimpleNamespace(rank=0, world=1, device=torch.device('cpu'), beat=lambda *_: None)\n"
        "replies = [work.verified(rank, kind, numel=5) for kind in ('all_reduce', 'all_gather', 'all_to_all_uneven')]\n"
        "replies += [work.pairs(rank), work.set_up(rank, 1), work.alternating(rank, 5), work.overlapped(rank, 5)]\n"
        "assert not any(reply['failed'] for reply in replies) and 'isthmus' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, collectives.__file__], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
