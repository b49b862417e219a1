"""A finished run of two vendors, as its folder would hold it, for the papers and pages that are made of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.progress import Watch
from isthmus.recipe.read import load_recipe
from isthmus.records import Check, Evidence, HandoffRecord, QualifyRecord, Verdict
from isthmus.run import Figure, RunFolder
from isthmus.stages import plan
from isthmus.verdict import scores
from tests.support.flow_recipe import RECIPE, REINFORCED, TAUGHT

START = 1_780_000_000.0
ABROAD = (
    'pools.home={chip="h800-sxm", count=512, ranks=1}',
    'pools.away={chip="ascend-910b-313t", count=1024, ranks=1}',
    'place={train=["away", "home"], rollout=["away"], serve=["away"]}',
    "rules.as_of=2026-06-10",
    'rules.buyer_parent="CN"',
    'rules.site="CN"',
    'rules.licences={home="D1234567"}',
)
"""Trained on a foreign chip, since the domestic one was found to be good for serving alone; served on that."""


def figure(value: float, unit: str, source: str = "a soak", **ends: float) -> Figure:
    return Figure(value=value, unit=unit, kind="measured", source=source, **ends)


def finding(name: str, aspect: Any, outcome: Any, value: float | None = None) -> Evidence:
    figures = {} if value is None else {"rate": figure(value, "failures/chip-hour")}
    return Evidence(
        name=name,
        aspect=aspect,
        needed_for="training",
        outcome=outcome,
        detail="as found",
        samples=8,
        figures=figures,
    )


def qualified(run: RunFolder, pool: str, verdict: Verdict, evidence: list[Evidence]) -> None:
    section = run.recipe.pools[pool]
    run.write_record(
        f"qualify/{pool}",
        QualifyRecord(
            recipe_sha256=run.recipe.digest(),
            started=START,
            ended=START + 1800,
            pool=pool,
            chip=section.chip,
            present=not section.rehearsed,
            rehearsed=section.rehearsed,
            verdict=verdict,
            title=f"{pool}: {verdict}",
            reasons=["as found"],
            evidence=evidence,
            scores=scores(evidence, [("stability", "silent data corruption")], []),
        ),
    )


def event(run: RunFolder, stage: str, name: str, time: float, **fields: Any) -> None:
    run.event(stage, name, time=time, **fields)


def trained(run: RunFolder) -> None:
    """48 h of supervised tuning and 96 h of reinforcement learning, with their tokens."""
    event(run, TAUGHT, "start", START + 2000, pool="home")
    for step in (1, 2):
        event(run, TAUGHT, "step", START + 2000 + 80_000 * step, step=step, tokens=5_000_000, loss=1.0)
    event(run, TAUGHT, "end", START + 174_800, seconds=172_800.0)
    event(run, REINFORCED, "start", START + 175_000, pool="home")
    for step in (1, 2):
        event(run, REINFORCED, "step", START + 175_000 + step, step=step, tokens=9_000_000, trained_tokens=8_000_000.0)
    event(run, REINFORCED, "end", START + 520_600, seconds=345_600.0)


def handed_off(run: RunFolder, signer: str | None = None) -> None:
    lost = figure(-1.3, "points", "1,000 held-out problems", low=-2.5, high=-0.06)
    checks = [
        Check(layer="files", name="w8a8: tensors and files match the manifest", outcome="pass", detail="all"),
        Check(layer="config", name="w8a8: the target is known to run it", outcome="caution", detail="a known risk"),
        Check(
            layer="task", name="w8a8: accuracy, target minus reference", outcome="pass", figure=lost, detail="paired"
        ),
    ]
    event(run, "handoff", "start", START + 520_700, pool="away")
    event(run, "handoff", "end", START + 524_300, seconds=3600.0)
    bundle = run.path / "bundle" / "w8a8"
    bundle.mkdir(parents=True)
    (bundle / "seal.json").write_text(json.dumps({"signer": signer}), encoding="utf-8")
    run.write_record(
        "parity",
        HandoffRecord(
            recipe_sha256=run.recipe.digest(),
            started=START + 520_700,
            ended=START + 524_300,
            source_pool="home",
            target_pool="away",
            format="w8a8",
            verdict="pass",
            checks=checks,
            bundles={"w8a8": "bundle/w8a8"},
            seal_id="0f1e2d3c4b5a6978",
            figures={},
        ),
    )


def justified_run(path: Path, *overrides: str, finished: bool = True, signer: str | None = None) -> RunFolder:
    """A run of `ABROAD` with other `overrides` after it, planned, and finished if it is to be."""
    run = RunFolder.create(path, load_recipe(RECIPE, (*ABROAD, *overrides)))
    good = [finding("known answers", "stability", "pass", 0.001), finding("links", "links", "pass", 0.1)]
    qualified(run, "home", "fit", [*good, finding("pilot of training", "software", "pass")])
    weak = [
        finding("soak", "stability", "fail", 0.02),
        finding("pairs of ranks", "links", "pass", 0.1),
        finding("refused dtypes", "software", "fail"),
        finding("a probe of tomorrow", "software", "unknown"),
    ]
    qualified(run, "away", "serve-only", weak)
    for other in run.recipe.pools.keys() - {"home", "away"}:
        qualified(run, other, "fit", good)
    plan.execute(run, Watch(Console(quiet=True)))
    if finished:
        trained(run)
        handed_off(run, signer)
    return run
