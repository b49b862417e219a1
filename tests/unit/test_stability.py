"""Stability: each check is shown what it must find, and pools that are well."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from isthmus.chips import get_chip, stability_rule
from isthmus.chips.rehearse.faults import FAULT_KINDS, parse_fault
from isthmus.launch.crew import Called, Crew, Reply
from isthmus.pools import get_pool
from isthmus.probes import PRELOAD, stability
from isthmus.probes.budget import choose
from isthmus.probes.contract import Setting
from isthmus.probes.judge.soak_judgement import problems_of, trends_of
from isthmus.probes.portable import known_answers, training
from isthmus.probes.workload import Workload
from isthmus.recipe.read import load_recipe
from isthmus.recipe.schema import QualifySection
from isthmus.records import Evidence, FailureCase
from isthmus.run import RunFolder
from tests.support.flow_recipe import RECIPE, SMALL


def alone(**changes: Any) -> SimpleNamespace:
    """A rank without others."""
    rank = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), beat=lambda _section, _step=0: None)
    return SimpleNamespace(**{**vars(rank), **changes})


class Spoilt(TorchDispatchMode):
    """Multiplies one entry of the result of the n-th matrix product by a factor."""

    def __init__(self, nth: int, factor: float, place: tuple[int, int] = (3, 5)):
        super().__init__()
        self.nth, self.factor, self.place, self.count = nth, factor, place, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() == "aten::mm":
            self.count += 1
            if self.count == self.nth:
                result[self.place] *= self.factor
        return result


@pytest.mark.parametrize("dtype", known_answers.EXACT)
@pytest.mark.parametrize("size", [1, 2, 7, 65, 200])
def test_a_known_product_is_exact_in_any_order_of_summation(dtype: str, size: int):
    limit = known_answers.EXACT[dtype]
    for seed in range(3):
        left, right, product = known_answers.known_product(size, seed, limit)
        assert torch.equal(product.long(), left.long() @ right.long())
        assert (left.abs() @ right.abs()).max() <= limit
        kind = getattr(torch, dtype)
        assert all(torch.equal(one.to(kind).float(), one) for one in (left, right, product))


@pytest.mark.parametrize("size", [1, 2, 33, 96])
def test_products_on_a_sound_device_are_exact_in_each_dtype(size: int):
    result = known_answers.products(alone(), size, 2, dtypes=list(known_answers.EXACT))
    assert not result["failed"] and result["trials"] == 6 and result["failures"] == 0


@pytest.mark.parametrize("factor", [1.0 + 1e-6, 2.0, float("nan"), float("inf")])
def test_one_wrong_entry_of_a_known_product_is_found_however_small(factor: float):
    for seed in range(3):
        _, _, product = known_answers.known_product(64, seed, 2**24)
        place = divmod(int(product.abs().argmax()), 64)
        with Spoilt(1, factor, place):
            result = known_answers.products(alone(), 64, 3, seed)
        assert result["failed"] and result["failures"] == 1 and f"[{place[0]}, {place[1]}]" in result["detail"]


def test_a_checksum_names_row_and_column_and_tells_a_passing_fault():
    sound = known_answers.checksum(alone(), 64, 4)
    assert not sound["failed"] and sound["failures"] == 0
    with Spoilt(2, 100.0, (7, 11)):
        result = known_answers.checksum(alone(), 64, 4)
    assert result["failed"] and "[7, 11]" in result["detail"] and "right when repeated" in result["detail"]
    assert result["lasting"] == 0 and result["digest"] != sound["digest"]


def test_a_checksum_allows_rounding_at_any_size_and_scale():
    for size in (1, 2, 30, 400):
        for dtype in (torch.float32, torch.bfloat16):
            left, right = torch.randn(size, size, dtype=dtype) * 1e4, torch.randn(size, size, dtype=dtype)
            assert known_answers.locate(left, right, left @ right) is None


def test_training_repeats_bit_by_bit_and_learns():
    result = training.steps(alone(), 25, hidden=32)
    assert not result["failed"] and result["trials"] == 25 and len(set(result["digests"])) == 25
    assert result["losses"][-1] < result["losses"][0] - 0.3


@pytest.mark.parametrize("hidden", [1, 2, 6, 20])
def test_training_can_be_made_small(hidden: int):
    assert not training.steps(alone(), 1, hidden=hidden, layers=1, batch=1)["failed"]


def test_one_changed_bit_in_one_repeat_is_found():
    with Spoilt(40, 1.0 + 2e-7, (0, 0)):
        result = training.steps(alone(), 4, hidden=32, repeats=2)
    assert result["failed"] and result["failures"] >= 1 and "two results" in result["detail"]


def test_a_loss_far_from_the_reference_is_found():
    sound = training.steps(alone(), 4, hidden=32)
    assert not training.steps(alone(), 4, hidden=32, reference=sound["losses"])["failed"]
    moved = [loss * 1.02 for loss in sound["losses"]]
    result = training.steps(alone(), 4, hidden=32, reference=moved)
    assert result["failed"] and "reference" in result["detail"]


def test_the_small_optimiser_is_torchs_adamw():
    value = torch.nn.Parameter(torch.randn(5, 3))
    own, moments = value.detach().clone().requires_grad_(True), (torch.zeros(5, 3), torch.zeros(5, 3))
    optimizer = torch.optim.AdamW([value], lr=training.RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(4):
        value.grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        own.grad = value.grad.clone()
        optimizer.step()
        training.adamw(own, *moments, step + 1)
    torch.testing.assert_close(own, value, rtol=1e-5, atol=1e-7)


def report(**changes: Any) -> dict[str, Any]:
    """What a rank that is well saw."""
    lists = (
        "losses",
        "norms",
        "step_s",
        "cpu_s",
        "resident",
        "on_device",
        "wrong",
        "pace",
        "saves_s",
        "damaged",
        "damaged_by",
    )
    well: dict[str, Any] = {name: [] for name in lists}
    well |= {"norms": [1.0, 1.3, 0.8, 1.1, 2.0], "stopped": None, "bad_here": False}
    return (
        well
        | {
            "repeats": 2,
            "differing": 0,
            "differing_here": 0,
            "operator": None,
            "kept": None,
            "layout": "as asked",
            "known": 4,
        }
        | changes
    )


def test_ranks_that_are_well_have_no_problem():
    assert problems_of([report(), report()]) == []


@pytest.mark.parametrize(
    ("changes", "words", "ranks"),
    [
        ({"stopped": 3, "bad_here": True}, "not finite at step 3", (1,)),
        ({"stopped": 3}, "not finite at step 3", ()),
        ({"wrong": ["off by 1"]}, "off by 1", (1,)),
        ({"differing": 1, "differing_here": 1}, "1 of 2 steps gave two results", (1,)),
        ({"damaged": ["the tensor 'x' does not match"], "damaged_by": [1]}, "'x' does not match", (1,)),
    ],
)
def test_what_one_rank_saw_is_a_problem_of_that_rank(changes: dict[str, Any], words: str, ranks: tuple[int, ...]):
    (problem,) = problems_of([report(), report(**changes), report()])
    assert words in problem.what and problem.ranks == ranks


def test_what_has_spread_to_all_ranks_names_none():
    (problem,) = problems_of([report(stopped=3, bad_here=True)] * 3)
    assert problem.ranks == ()
    (problem,) = problems_of([report(stopped=3, bad_here=True)])
    assert problem.ranks == (0,)


def test_a_norm_far_above_those_before_is_a_spike():
    assert problems_of([report(norms=[1.0, 1.2, 0.9, 9.0])]) == []
    (problem,) = problems_of([report(norms=[1.0, 1.2, 0.9, 12.0])])
    assert "at step 3" in problem.what


def test_a_rank_that_becomes_slow_while_it_trains_is_found_and_one_that_was_disturbed_is_not():
    disturbed = [1.0] * 8 + [9.0, 9.0, 1.1, 9.0]
    for late, problems in ([2.5] * 4, 1), ([1.8] * 4, 0):
        found = problems_of([report(pace=[1.0] * 8 + late), report(pace=disturbed), report(pace=[1.0] * 12)])
        assert len(found) == problems and all(one.ranks == (0,) for one in found)
    assert problems_of([report(pace=[9.0] * 6), report(pace=[1.0] * 6)]) == [], "too few rounds to judge"


def series(kind: str, steps: int, chance: random.Random) -> list[float]:
    level = 1e8 * (1.0 + 0.05 * chance.random())
    noise = [level * 0.002 * chance.gauss(0.0, 1.0) for _ in range(steps)]
    if kind == "leak":
        return [level * (1.0 + 0.004 * step) + noise[step] for step in range(steps)]
    if kind == "start":
        return [level * (1.0 - 0.4 * 0.9**step) + noise[step] for step in range(steps)]
    if kind == "stair":
        return [level * (1.0 + 0.02 * (step > steps * 0.7)) + noise[step] for step in range(steps)]
    return [level + noise[step] for step in range(steps)]


@pytest.mark.parametrize("steps", [40, 100, 1000])
def test_growth_that_lasts_matters_and_no_other(steps: int):
    chance = random.Random(steps)
    for _ in range(5):
        trends = trends_of([series(kind, steps, chance) for kind in ("flat", "leak", "start", "stair")])
        assert [trend.matters for trend in trends] == [False, True, False, False]
        leak = trends[1]
        assert leak.slope.low < 0.004 * 1e8 * 1.06 and leak.slope.high > 0.004 * 1e8 * 0.99


def test_too_few_steps_have_no_trend():
    assert trends_of([series("leak", 20, random.Random(0))]) == []


def test_a_rank_alone_has_its_own_pace():
    result = training.pace(alone(), size=16, slices=5)
    assert not result["failed"] and result["ratio"] == 1.0 and len(result["seconds"]) == 5


def test_the_rank_that_differs_from_the_majority_is_named(monkeypatch: pytest.MonkeyPatch):
    def gather(digests: list[str]) -> Any:
        def all_gather(into: list[Tensor], _mine: Tensor) -> None:
            for one, digest in zip(into, digests, strict=True):
                one.fill_(int(digest, 16))

        return all_gather

    for module in (known_answers, training):
        monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
        for digests, odd in (
            (["a", "a", "b"], [2]),
            (["a", "b"], [0, 1]),
            (["a"] * 4, []),
            (["c", "a", "a", "a"], [0]),
        ):
            monkeypatch.setattr(module.dist, "all_gather", gather(digests))
            assert module.odd_ranks(alone(world=len(digests)), digests[0]) == odd


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """This machine's processor as a pool of three ranks, in a run of the small recipe."""
    path = tmp_path_factory.mktemp("stability") / "run"
    small = (f"{key}={value}" for key, value in SMALL.items())
    run = RunFolder.create(path, load_recipe(RECIPE, (*small, "pools.home.ranks=3", "qualify.soak_s=0.1")))
    pool = get_pool(run.recipe, "home")
    return Setting(run.recipe, pool, get_chip("cpu"), None, "cpu", path, path / "qualify" / "home", stall_s=20.0)


def short_soak(crew: Crew, setting: Setting) -> list[Evidence]:
    return stability.soak(crew, setting, round_steps=2)


def price_of_soak(setting: Setting) -> float:
    return next(probe for probe in stability.PROBES if probe.name == "soak").price(setting)


def test_a_soak_costs_its_time_or_what_its_least_rounds_compute(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    """The operations of a step are those that torch counts while one is taken."""
    work = Workload(RunFolder.open(setting.root), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        work.sft_step(0, work.batch(0))
    second = counter.get_total_flops() / stability.TRAINING_SHARE
    parameters = sum(one.numel() for one in work.model.parameters())
    saves = 2 * parameters * stability.STATE_BYTES / stability.DISK_BYTES_PER_S
    prices = {}
    for steps_per_second in (1.0, 1e6):
        monkeypatch.setattr(stability, "matrix_rate", lambda _setting, rate=steps_per_second: second * rate)
        prices[steps_per_second] = price_of_soak(setting)
    steps = 2 * (4 + 2)
    assert prices[1.0] == pytest.approx(steps + saves + stability.LOAD_S, rel=0.15)
    assert prices[1e6] == pytest.approx(setting.recipe.qualify.soak_s + stability.LOAD_S, abs=saves)
    monkeypatch.setattr(stability, "matrix_rate", lambda _setting: second / 10)
    (skipped,) = [one for one in choose(stability.PROBES, setting, 60.0).skipped if one.probe == "soak"]
    assert skipped.price_s == pytest.approx(10 * steps, rel=0.2)
    monkeypatch.setattr(stability, "matrix_rate", lambda _setting: None)
    assert price_of_soak(setting) == setting.recipe.qualify.soak_s + stability.LOAD_S


def test_the_rate_behind_a_price_is_measured_on_a_cpu_and_published_of_a_chip(setting: Setting):
    measured = stability.matrix_rate(setting)
    assert measured is not None and 1e8 < measured < 1e14
    chips = replace(setting, device="cuda", pool=replace(setting.pool, chip="h20", ranks=3))
    assert stability.matrix_rate(chips) == pytest.approx(3 * 148e12, rel=0.01)


def look(setting: Setting, probe: Callable[[Crew, Setting], list[Evidence]], *faults: str, world: int = 3) -> Evidence:
    """What a probe finds on a few ranks with planted faults."""
    with Crew(world, faults=[parse_fault(fault) for fault in faults], preload=PRELOAD) as crew:
        (found,) = probe(crew, setting)
    assert found.aspect == "stability"
    return found


def test_ranks_that_are_well_pass_all_probes(setting: Setting):
    with Crew(2, preload=PRELOAD) as crew:
        found = [item for probe in stability.PROBES for item in probe.run(crew, setting)]
    assert [item.outcome for item in found] == ["pass"] * 6, [item.detail for item in found]
    assert all("could have stayed unseen" in item.detail for item in found if item.name != "stragglers")
    figures = {name: figure for item in found for name, figure in item.figures.items()}
    wanted = {"failure_rate_per_chip_hour", "soaked_chip_hours", "chip_hours_to_show_target", "straggler_ratio"}
    assert wanted | {"cold_start_s", "mtbf_h", "checkpoint_interval_s"} <= figures.keys()
    assert figures["cold_start_s"].kind == "measured" and figures["failure_rate_per_chip_hour"].kind == "declared"
    soaked = figures["soaked_chip_hours"].value
    assert figures["unseen_rate_per_chip_hour"].value == pytest.approx(3.0 / soaked, rel=0.01)
    assert not list(setting.folder.glob("soak*")), "a soak leaves its saves"


@pytest.mark.parametrize("error", ["small-error@rank=1,size=1e-6", "flipped-bit@rank=1,size=0", "nan@rank=1"])
def test_a_rank_that_computes_wrongly_is_named_by_known_answers(setting: Setting, error: str):
    found = look(setting, stability.known_answers, f"{error},rate=0.5,seed=4")
    assert found.outcome == "fail" and found.ranks == [1] and [one.excluded for one in found.limits] == [["1"]]
    case = json.loads((setting.root / str(found.failure) / "failure.json").read_text())
    assert case["function"] == stability.KNOWN_ANSWERS and case["planted"] and case["arguments"]["size"] == 128


def test_errors_too_small_for_a_checksum_are_seen_between_equal_ranks(setting: Setting):
    found = look(setting, stability.checksums, "small-error@rank=2,size=1e-6")
    assert found.outcome == "fail" and found.ranks == [2] and "differ from those of the other ranks" in found.detail


def test_a_rank_that_always_errs_alike_differs_from_the_majority(setting: Setting):
    found = look(setting, stability.same_result, "dtype-swap@rank=0")
    assert found.outcome == "fail" and found.ranks == [0] and "other ranks" in found.detail


def test_a_slow_rank_is_named_and_a_rank_that_was_slow_once_is_not(setting: Setting):
    found = look(setting, stability.stragglers, "slow-rank@rank=1,size=2")
    assert found.outcome == "fail" and found.ranks == [1] and found.figures["straggler_ratio"].value > 1.4
    assert found.failure is not None
    assert look(setting, stability.stragglers, "slow-rank@rank=1,step=7").outcome == "pass"


@contextlib.contextmanager
def busy(processor: int, processes: int = 3) -> Iterator[None]:
    """Other processes that want a processor all the time."""
    work = f"import os\nos.sched_setaffinity(0, {{{processor}}})\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", work]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.skipif(not training.WAITS.exists(), reason="this system does not tell how long a thread had no processor")
@pytest.mark.parametrize(("fault", "slow"), [(None, []), ("slow-rank@rank=1,size=3", [1])])
def test_work_of_others_on_a_processor_makes_no_rank_slow_and_hides_none_that_is(fault: str | None, slow: list[int]):
    processors = sorted(os.sched_getaffinity(0))
    faults = [parse_fault(fault)] if fault else []
    arguments = {"size": 128, "slices": 20, "share": 0.1, "limit": stability_rule("straggler").value}
    with Crew(2, faults=faults, preload=PRELOAD) as crew, busy(processors[-1]):
        places = {"processors": [processors[0], processors[-1]]}
        assert crew.call("tests.support.crew_work:stay_on", places, deadline_s=60.0).ok
        looks = [crew.call(stability.PACE, arguments, deadline_s=120.0).values for _ in range(2)]
    seconds = [[one for look in looks for one in look[rank]["seconds"]] for rank in range(2)]
    ratios = training.ratios_to_peers([training.quantile(one, 0.1) for one in seconds])
    assert [rank for rank, ratio in enumerate(ratios) if ratio > arguments["limit"]] == slow


@pytest.mark.parametrize(
    ("fault", "words"),
    [("crash@rank=2,step=3", "rank 2 crashed"), ("out-of-memory@rank=2,step=3", "rank 2 raised: OutOfMemoryError")],
)
def test_a_rank_that_does_not_answer_is_named_and_its_case_is_kept(setting: Setting, fault: str, words: str):
    found = look(setting, stability.same_result, fault)
    assert found.outcome == "fail" and found.detail.startswith(words) and found.ranks == [2]
    assert (setting.root / str(found.failure) / "failure.json").is_file()


def test_a_number_that_is_not_finite_ends_the_soak_and_its_rank_is_named(setting: Setting):
    found = look(setting, short_soak, "nan@rank=1,step=3", world=2)
    assert found.outcome == "fail" and "not finite at step 3" in found.detail and found.ranks == [1]
    assert found.figures["failure_rate_per_chip_hour"].value > 2e-4, "a failure does not raise the rate"


def test_a_step_that_cannot_be_repeated_and_a_save_that_is_damaged_are_found(setting: Setting):
    found = look(setting, short_soak, "small-error@rank=0,step=3", "corrupted-save@rank=1", world=2)
    assert found.outcome == "fail" and "steps gave two results" in found.detail and found.ranks == [0, 1]
    assert "a save is damaged on rank 1" in found.detail and "does not match its hash" in found.detail


def test_the_operator_that_gives_two_results_in_a_real_step_is_named_and_kept_as_a_case(setting: Setting):
    found = look(setting, short_soak, "small-error@rank=1,rate=0.2,operator=aten::bmm", world=2)
    assert found.outcome == "fail" and "aten::bmm did so for equal inputs" in found.detail and 1 in found.ranks
    assert found.failure is not None
    case = FailureCase.model_validate_json((setting.root / found.failure / "failure.json").read_bytes())
    assert case.arguments["operator"] == "aten::bmm" and (setting.root / found.failure / "inputs.pt").is_file()


def test_a_hang_in_real_steps_names_the_rank_that_lags(setting: Setting):
    short = Setting(**{**vars(setting), "stall_s": 8.0})
    found = look(short, short_soak, "hang@rank=1,step=1", world=2)
    assert found.outcome == "fail" and found.ranks == [1] and "hung in soak step, step 1" in found.detail


def test_ranks_that_do_not_come_up_fail_the_cold_starts(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    with Crew(2) as crew:
        monkeypatch.setattr(crew, "connect_timeout_s", -1.0)
        (found,) = stability.cold_starts(crew, setting)
    assert found.outcome == "fail" and "cold start 1 of 3" in found.name


def soaked_twice(setting: Setting, *looks: Any) -> Evidence:
    """What the soak says of two ranks whose first and second look went as said."""
    replies, ready = iter(looks), SimpleNamespace(ok=True)

    def call(work: str, *_: Any, **__: Any) -> Any:
        return next(replies) if work == stability.SOAK else ready

    crew = SimpleNamespace(device="cpu", world=2, faults=(), call=call)
    return stability.soak(crew, setting)[0]  # pyright: ignore[reportArgumentType]


def soaked(*memory: list[float]) -> SimpleNamespace:
    seen = [report(resident=one, losses=[2.0, 1.0], cpu_s=[0.1] * 90) for one in memory]
    return SimpleNamespace(ok=True, values=seen, seconds=3.0, replies=seen)


def test_growth_counts_where_a_second_look_confirms_it(setting: Setting):
    leak, flat = (series(kind, 90, random.Random(5)) for kind in ("leak", "flat"))
    found = soaked_twice(setting, soaked(leak, flat), soaked(leak, leak))
    assert found.outcome == "fail" and found.ranks == [0] and "memory" in found.detail
    again = soaked_twice(setting, soaked(leak, flat), soaked(flat, leak))
    assert again.outcome == "pass" and again.figures["memory_slope"].high > 0


def test_a_second_look_that_breaks_counts_with_the_hours_of_both(setting: Setting):
    leak = series("leak", 90, random.Random(5))
    crashed = Called([Reply(0, "crashed", error="killed by signal 9"), Reply(1, "stopped")], 6.0)
    found = soaked_twice(setting, soaked(leak, leak), crashed)
    assert found.outcome == "fail" and found.ranks == [0]
    chips = min(setting.pool.count, 2)
    assert found.figures["soaked_chip_hours"].value == pytest.approx(chips * (3.0 + 6.0) / 3600)


def test_what_the_probes_say_they_find_are_kinds_of_faults_and_prices_are_known(setting: Setting):
    for probe in stability.PROBES:
        assert set(probe.finds) <= set(FAULT_KINDS) and probe.price(setting) > 0
    default = QualifySection().soak_s
    assert sum(probe.price(setting) for probe in stability.PROBES) + default <= 30
