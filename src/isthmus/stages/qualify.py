"""What each pool of a recipe is fit for: probes, pilots of this run's own work, and a verdict with its evidence.

A pool that is here is measured by ranks on its chips, which are watched from this process. A rehearsed pool is judged
by the tables of its chip's software; what only the chip could show (stability, links, speed) stays unknown, so a
rehearsal never ends in `fit`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from isthmus.chips import check_available, check_names, device_of, get_chip
from isthmus.chips.rehearse import profile_of
from isthmus.chips.rehearse.dispatch import enforce
from isthmus.chips.rehearse.faults import Fault, parse_fault
from isthmus.errors import IsthmusError
from isthmus.launch.alone import Options
from isthmus.launch.crew import Crew
from isthmus.launch.places import Attendant, Place, remote_places
from isthmus.launch.pool_ranks import run_on
from isthmus.pools import Pool, get_pool, placed_pools
from isthmus.probes import PRELOAD, live_probes, pilots, rehearsed
from isthmus.probes.asking import ask
from isthmus.probes.budget import Choice, choose, parse_seconds
from isthmus.probes.compute import compute_threads
from isthmus.probes.contract import Probe, Setting
from isthmus.probes.findings import Findings
from isthmus.probes.links import render_matrix
from isthmus.probes.workload import Workload
from isthmus.progress import Watch
from isthmus.records import Aspect, Evidence, QualifyRecord, Score, Skipped
from isthmus.run import RunFolder
from isthmus.trainer.mesh import launched_world
from isthmus.verdict import QUESTIONS, compare, deciding, describe_limit, judge, limits_of, scores, without_pairs

NAME = "qualify"
LOOPBACK = "127.0.0.1"
PILOTS = "pilots of this run's own work"


def execute(
    run: RunFolder,
    watch: Watch,
    *,
    again: bool = False,
    pools: Sequence[str] = (),
    budget: str | None = None,
    prices: bool = False,
) -> list[QualifyRecord]:
    """Qualify every pool that the recipe places, or the named ones.

    A pool that has its record is left alone, unless `again` or a budget is asked for. `budget` is the time for the
    probes of each pool, such as `30s`; the pilots, which the plan needs, come on top. With `prices` the probes are only
    listed.

    Where torchrun started this process among others, they are the ranks of the one pool that is named, perhaps on
    several machines that share the run folder. The first of them examines, the others attend to it and return nothing.

    Raises IsthmusError for a pool that the recipe does not place, or that has another number of ranks.
    """
    placed = {pool.name: pool for pool in placed_pools(run.recipe)}
    for name in pools:
        if name not in placed:
            raise IsthmusError(f"no stage is placed on a pool {name!r}; the recipe places {', '.join(placed)}")
    text = budget or run.recipe.qualify.budget
    budget_s = parse_seconds(text) if text else None
    if launched_world() not in (None, 1) and not prices:
        return _execute_among_others(run, watch, pools, budget_s, again or bool(budget))
    asked = [name for name in placed if not pools or name in pools]
    stored = {name: _stored(run, name, again or bool(budget)) for name in asked}
    check_available(run.recipe, [name for name in asked if prices or stored[name] is None])
    if prices:
        for name in asked:
            watch.console.print(_price_table(placed[name], _choice(_setting(run, placed[name], watch), budget_s)))
        return []
    return [stored[name] or _qualified(run, placed[name], watch, budget, budget_s) for name in asked]


def _qualified(run: RunFolder, pool: Pool, watch: Watch, budget: str | None, budget_s: float | None) -> QualifyRecord:
    """Probe a pool where it is: here, or by ranks on its nodes, which write its record there."""
    if pool.nodes is None:
        return qualify_pool(run, pool.name, watch, budget_s=budget_s)
    options: Options = {"again": True, "pools": [pool.name], "budget": budget}
    run_on(pool, NAME, run.path, options, pool.ranks, run.path / NAME / f"{pool.name}-ranks")
    return run.require_record(f"{NAME}/{pool.name}", QualifyRecord, NAME)


def _stored(run: RunFolder, pool_name: str, again: bool) -> QualifyRecord | None:
    record = None if again else run.read_record(f"{NAME}/{pool_name}", QualifyRecord)
    return None if record is not None and record.disturbed else record


def _execute_among_others(
    run: RunFolder, watch: Watch, pools: Sequence[str], budget_s: float | None, again: bool
) -> list[QualifyRecord]:
    """Qualify one pool whose ranks torchrun has started."""
    if len(pools) != 1:
        raise IsthmusError("torchrun's ranks are of one pool: name it with --pool")
    check_names(run.recipe)
    ranks = get_pool(run.recipe, pools[0]).ranks
    store, rank, world = next(rendezvous("env://"))
    local_rank = int(os.environ["LOCAL_RANK"])
    if ranks != world:
        raise IsthmusError(f"the pool {pools[0]!r} has {ranks} ranks in the recipe, and torchrun started {world}")
    shared = PrefixStore("isthmus-qualify", store)
    if rank:
        Attendant(shared, rank, local_rank).attend()
        return []
    with remote_places(shared, world, rank, local_rank) as places:
        return [_stored(run, pools[0], again) or qualify_pool(run, pools[0], watch, budget_s=budget_s, places=places)]


def qualify_pool(
    run: RunFolder,
    pool_name: str,
    watch: Watch,
    *,
    budget_s: float | None = None,
    faults: Sequence[Fault] = (),
    places: Sequence[Place] = (),
) -> QualifyRecord:
    """Probe one pool, judge what was found, and write `qualify/<pool>.json`.

    `faults` are planted in the ranks that probe it, beside those that the recipe plants in a rehearsed pool; in a drill
    these wait for training. `places` are where its ranks live; children of this process if there are none.
    """
    started = time.time()
    pool = get_pool(run.recipe, pool_name)
    run.event(NAME, "start", pool=pool.name)
    watch.say(f"  examining {escape(str(pool))}")
    own = run.recipe.pools[pool_name].faults if run.recipe.drill is None else []
    planted = [*map(parse_fault, own), *faults]
    with compute_threads(pool.threads):
        examination = Examination(run, _setting(run, pool, watch), watch, planted, places, budget_s)
        if pool.elsewhere:
            examination.ask_elsewhere()
        elif pool.rehearsed:
            examination.rehearse()
        else:
            examination.measure()
    record = examination.record(started)
    run.enter(examination.setting.folder)
    run.write_record(f"{NAME}/{pool.name}", record)
    run.event(NAME, "end", pool=pool.name, seconds=round(record.seconds, 3), verdict=record.verdict)
    return record


def _setting(run: RunFolder, pool: Pool, watch: Watch) -> Setting:
    folder = run.path / NAME / pool.name
    profile = profile_of(pool.chip) if pool.rehearsed else None
    return Setting(
        recipe=run.recipe,
        pool=pool,
        chip=get_chip(pool.chip),
        profile=profile,
        device=device_of(pool),
        root=run.path,
        folder=folder,
        stall_s=run.recipe.qualify.stall_s,
        say=watch.say,
    )


def _choice(setting: Setting, budget_s: float | None) -> Choice:
    """A rehearsal asks ranks only where there are rules between several of them, or faults, to rehearse; in a drill its
    faults wait for training."""
    pool = setting.pool
    if pool.elsewhere:
        return Choice([], [])
    waiting = setting.recipe.drill is not None
    if pool.rehearsed and (waiting or (pool.ranks == 1 and not setting.recipe.pools[pool.name].faults)):
        return Choice([], [])
    return choose(live_probes(), setting, budget_s)


@dataclass
class Examination:
    """One pool under examination."""

    run: RunFolder
    setting: Setting
    watch: Watch
    faults: Sequence[Fault]
    places: Sequence[Place]
    budget_s: float | None
    skipped: list[Skipped] = field(default_factory=list)
    looked: list[tuple[Aspect, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.found = Findings(self.setting)

    def measure(self) -> None:
        """All that can be found out about a pool that is here."""
        if not self._ask_ranks():
            self._without_pilots("ranks crashed or hung in the probes, and so might this process")
            return
        if (why := pilots.too_large(self.run.recipe, self.setting.chip, self.setting.device)) is not None:
            self._without_pilots(why)
            return
        work = self._workload()
        pilots.rates(self.found, work)
        pilots.generation(self.found, work, None)
        pilots.weight_formats(self.found, None)
        if self.setting.pool.ranks == 1:
            self.found.add("links", "links", "training", "pass", "one chip: there is no link to measure")
        pilots.training(self.found, work)
        pilots.engine(self.found, work, self.run, self.setting.folder)

    def ask_elsewhere(self) -> None:
        """All that can be found out about engines behind URLs. Raises EngineError if they cannot take part."""
        pilots.weight_formats(self.found, None)
        pilots.elsewhere(self.found, self._workload(), self.run)

    def rehearse(self) -> None:
        """All that can be found out about a pool that is not here."""
        profile, chip = self.setting.profile, self.setting.pool.chip
        assert profile is not None
        self._ask_ranks()
        rehearsed.operators(self.found, profile, self.run)
        rehearsed.collectives(self.found, profile)
        rehearsed.only_the_chip_can_tell(self.found)
        pilots.weight_formats(self.found, profile)
        if (why := pilots.too_large(self.run.recipe, self.setting.chip, self.setting.device)) is not None:
            self._without_pilots(why)
            return
        work = self._workload()
        pilots.generation(self.found, work, enforce(chip))
        pilots.engine(self.found, work, self.run, self.setting.folder)

    def _without_pilots(self, why: str) -> None:
        """Nobody then knows whether this run's own work can be served here, nor how fast it is."""
        self._leave_out(PILOTS, "software", why)
        self.found.add(PILOTS, "software", "both", "unknown", why)

    def record(self, started: float) -> QualifyRecord:
        for aspect in QUESTIONS:
            if all(item.aspect != aspect for item in self.found.evidence):
                self.found.add(aspect, aspect, "training", "unknown", f"no probe of {aspect} was run")
        pool, evidence = self.setting.pool, self.found.evidence
        verdict = judge(evidence)
        decided = [item for item in (deciding(evidence),) if item is not None]
        others = [item for item in evidence if item.outcome != "pass" and item not in decided]
        doubts = [f"{item.name}: {item.detail}" for item in [*decided, *others]]
        return QualifyRecord(
            recipe_sha256=self.run.recipe.digest(),
            started=started,
            ended=time.time(),
            pool=pool.name,
            chip=pool.chip,
            present=not pool.rehearsed,
            rehearsed=pool.rehearsed,
            verdict=verdict,
            title=f"{pool}: {verdict}",
            reasons=doubts or [f"all {len(evidence)} findings pass"],
            evidence=evidence,
            figures=self.found.figures,
            scores=scores(evidence, self.looked, self.skipped),
            limits=limits_of(evidence),
            skipped=self.skipped,
            disturbed=self.found.disturbances,
        )

    def _workload(self) -> Workload:
        return Workload(self.run, torch.device(self.setting.device))

    def _ask_ranks(self) -> bool:
        """Run the live probes. Returns whether ranks can be relied on to answer."""
        choice = _choice(self.setting, self.budget_s)
        self.skipped += choice.skipped
        for one in choice.skipped:
            self.run.event(NAME, "skipped", what=f"{one.probe} on {self.setting.pool}", why=one.why)
        self.run.forget(self.setting.folder)
        shutil.rmtree(self.setting.folder / "failures", ignore_errors=True)
        if not choice.chosen:
            return True
        self.watch.console.print(_price_table(self.setting.pool, choice))
        prices = {probe.name: price for probe, price in choice.chosen}
        with self._crew() as crew, self.watch.count(f"probing {self.setting.pool.name}", len(prices)) as counter:
            self.setting.say = lambda text: counter.advance_to(counter.done, text)
            answers = ask(
                crew,
                self.setting,
                [probe for probe, _ in choice.chosen],
                lambda number, probe: counter.advance_to(number, f"{probe.name}, about {prices[probe.name]:.0f} s"),
            )
            counter.advance_to(len(prices))
        for answer in answers:
            if answer.evidence is None:
                why = "ranks crashed or hung in earlier probes"
                self._leave_out(answer.probe.name, answer.probe.aspect, why, answer.probe, prices[answer.probe.name])
            else:
                self._take(answer.probe, answer.evidence)
            self.found.disturbances += [answer.disturbed] if answer.disturbed else []
        return not any(answer.broken for answer in answers)

    def _crew(self) -> Crew:
        pool = self.setting.pool
        threads = max(1, pool.threads // pool.ranks)
        chip = pool.chip if pool.rehearsed else None
        host = os.environ["MASTER_ADDR"] if self.places else LOOPBACK
        return Crew(
            pool.ranks,
            self.setting.device,
            threads=threads,
            chip=chip,
            faults=tuple(self.faults),
            preload=PRELOAD,
            places=list(self.places),
            host=host,
        )

    def _take(self, probe: Probe, evidence: Sequence[Evidence]) -> None:
        for item in evidence:
            self.found.evidence.append(_only_rehearsed(item) if self.setting.pool.rehearsed else item)
            self.found.figures |= without_pairs(item.figures)
        answered = any(item.outcome != "unknown" for item in evidence)
        if answered and not (self.setting.pool.rehearsed and probe.aspect in ("stability", "links")):
            for kind in probe.finds:
                self.looked.append((probe.aspect, kind))

    def _leave_out(
        self, name: str, aspect: Aspect, why: str, probe: Probe | None = None, price: float | None = None
    ) -> None:
        unseen = [kind for kind in probe.finds if (aspect, kind) not in self.looked] if probe else []
        self.skipped.append(Skipped(probe=name, aspect=aspect, price_s=price, why=why, unseen=unseen))
        self.run.event(NAME, "skipped", what=f"{name} on {self.setting.pool}", why=why)


def _only_rehearsed(item: Evidence) -> Evidence:
    """What passes on the ranks of a rehearsal shows nothing about the chip's own stability and links."""
    if item.outcome != "pass" or item.aspect not in ("stability", "links"):
        return item
    detail = f"in the rehearsal: {item.detail}; only the chip itself can show it"
    return item.model_copy(update={"outcome": "unknown", "detail": detail, "needed_for": "training"})


def _price_table(pool: Pool, choice: Choice) -> RenderableType:
    """What the probes of a pool cost and look for, before they run."""
    if not choice.chosen and not choice.skipped:
        return Text(f"{pool}: no probe asks ranks; the tables of its chip are read, and pilots run under its rules\n")
    title = f"{pool}: {len(choice.chosen)} probes, about {choice.seconds:.0f} s, and then pilots of the run's own work"
    table = Table(box=box.SIMPLE_HEAD, title=escape(title), title_justify="left")
    for title in ("probe", "question", "price", "looks for"):
        table.add_column(title, overflow="fold", justify="right" if title == "price" else "left")
    for probe, price in choice.chosen:
        table.add_row(probe.name, probe.aspect, f"{price:.1f} s", ", ".join(probe.finds))
    for one in choice.skipped:
        price = "" if one.price_s is None else f"{one.price_s:.1f} s"
        unseen = f"left out; then nobody looks for {', '.join(one.unseen)}" if one.unseen else "left out"
        table.add_row(one.probe, one.aspect, price, unseen, style="dim")
    return table


def render(record: QualifyRecord) -> RenderableType:
    """The verdict, its scores and limits, its evidence finding by finding, and the pool's figures."""
    colour = {"pass": "green", "fail": "red", "unknown": "yellow"}
    table = Table(box=box.SIMPLE_HEAD, title=escape(record.title), title_justify="left", title_style="bold")
    for title in ("finding", "needed for", "outcome", "detail"):
        table.add_column(title, overflow="fold")
    for item in record.evidence:
        detail = item.detail + (f" [isthmus case {item.failure}]" if item.failure else "")
        table.add_row(item.name, item.needed_for, f"[{colour[item.outcome]}]{item.outcome}[/]", escape(detail))
    lines = [f"   {score.aspect}: {_score(score)}" for score in record.scores]
    lines += [f"   limit: {describe_limit(limit)} ({limit.reason})" for limit in record.limits]
    lines += [f"   left out: {one.probe}, {one.why}" + _unseen(one) for one in record.skipped]
    numbers = [f"{name.removesuffix('_s').replace('_', ' ')} {figure}" for name, figure in record.figures.items()]
    matrices = [matrix for item in record.evidence if (matrix := render_matrix(item)) is not None]
    return Group(
        table,
        *matrices,
        Text("\n".join(lines)),
        Text("\n".join(f"   {number}" for number in numbers), style="dim"),
        Text(),
    )


def _score(score: Score) -> str:
    text = f"{score.outcome}, {score.passed} of {score.findings} findings pass"
    return f"{text}; probes looked for {score.looked_for:.0%} of the faults to be expected"


def _unseen(one: Skipped) -> str:
    return f"; nobody looked for {', '.join(one.unseen)}" if one.unseen else ""


def render_together(records: Sequence[QualifyRecord]) -> RenderableType | None:
    """Pools side by side; None for a single one."""
    if len(records) < 2:
        return None
    table = Table(box=box.SIMPLE_HEAD, title="side by side", title_justify="left", title_style="bold")
    table.add_column("")
    for record in records:
        table.add_column(record.pool, overflow="fold")
    for name, texts in compare(records):
        table.add_row(name.replace("_", " "), *map(escape, texts))
    return table
