"""The dossier: complete, honest about what is missing, and safe to open."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from isthmus import records
from isthmus.errors import DamagedFile
from isthmus.progress import Watch
from isthmus.recipe.read import parse_recipe
from isthmus.report_page import chapters, charts, numbers, timing
from isthmus.run import Figure, RunFolder
from isthmus.stages import report

TAUGHT, REINFORCED = "cold-start", "reasoning"
OPTIMIZER = {"name": "adamw", "learning_rate": 1e-3}
STEPS = [
    {"name": TAUGHT, "kind": "sft", "steps": 6, "from": "model", "optimizer": OPTIMIZER},
    {"name": REINFORCED, "kind": "rl", "from": TAUGHT, "steps": 4, "optimizer": OPTIMIZER},
]
START = 1_700_000_000.0
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>'
VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})


class Story:
    """Writes a small run, stage by stage, with a clock of its own."""

    def __init__(self, folder: Path, **changes: Any):
        tree = {
            "name": "small",
            "model": {"preset": "r-nano"},
            "pools": {"home": {"chip": "cpu"}, "away": {"chip": "far-chip", "rehearsed": True}},
            "place": {"train": ["away", "home"], "rollout": ["away"], "serve": ["away"]},
            "tasks": {"countdown": {"largest_target": 39}},
            "step": STEPS,
        }
        self.run = RunFolder.create(folder, parse_recipe({**tree, **changes}))
        self.now = START

    def event(self, stage: str, event: str, after: float = 0.0, **fields: Any) -> None:
        self.now += after
        with (self.run.path / "events.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"time": self.now, "stage": stage, "event": event, **fields}) + "\n")

    def header(self) -> dict[str, Any]:
        return {"recipe_sha256": self.run.recipe.digest(), "started": self.now - 1, "ended": self.now}

    def qualify(self) -> None:
        for pool, rehearsed, verdict in (("home", False, "fit"), ("away", True, "serve-only")):
            self.event("qualify", "start", pool=pool)
            self.event("qualify", "end", after=3.0, seconds=3.0)
            rate = Figure.measured(5e9, "FLOP/s", f"probe on {pool}", rehearsed=rehearsed, low=4e9, high=6e9)
            evidence = records.Evidence(
                name="matmul_rate",
                aspect="compute",
                needed_for="both",
                outcome="pass",
                detail="timed",
                samples=7,
                figures={"rate": rate},
            )
            record = records.QualifyRecord(
                **self.header(),
                pool=pool,
                chip="far-chip" if rehearsed else "cpu",
                present=not rehearsed,
                rehearsed=rehearsed,
                verdict=verdict,  # type: ignore[arg-type]
                title=f"title of {pool}",
                reasons=[f"reason for {pool}"],
                evidence=[evidence],
                figures={"peak": Figure(value=None, unit="FLOP/s", kind="declared", source="no source")},
            )
            self.run.write_record(f"qualify/{pool}", record)

    def plan(self) -> None:
        def seconds(value: float) -> Figure:
            return Figure(value=value, unit="s", kind="forecast", source="a pilot")

        record = records.PlanRecord(
            **self.header(),
            placements=[
                records.Placement(stage="train", pool="home", reason="it is the only one that is here"),
                records.Placement(stage="rollout", pool="away", reason="first choice"),
                records.Placement(stage="serve", pool="away", reason="first choice"),
            ],
            rejected=[records.Rejection(stage="train", pool="away", reason="a rehearsal never vouches")],
            estimate={TAUGHT: seconds(10.0), REINFORCED: seconds(20.0), "total": seconds(30.0)},
        )
        self.run.write_record("plan", record)

    def sft_steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            loads = [[0.125] * 8, [0.5, 0.5] + [0.0] * 6]
            self.event(TAUGHT, "step", after=1.0, step=step, loss=3.0 / step, mtp_loss=4.0 / step, expert_load=loads)

    def train(self, resumed_from: tuple[int, ...] = ()) -> None:
        self.event(TAUGHT, "start", pool="home")
        self.sft_steps(1, 6)
        self.event(TAUGHT, "end", seconds=8.0)
        record = records.TextRecord(
            **self.header(),
            kind="sft",
            step=TAUGHT,
            started_from="model",
            pool="home",
            steps=6,
            resumed_from=list(resumed_from),
            checkpoint="steps/cold-start/checkpoints/6",
            checkpoint_sha256="ab" * 32,
            figures={"loss": Figure.measured(0.5, "nats/token", "events.jsonl", rehearsed=False)},
        )
        self.run.write_record(f"steps/{TAUGHT}/record", record)

    def rl_steps(self, last: int, **fields: Any) -> None:
        for step in range(1, last + 1):
            measures = {"accuracy": 0.1 * step, "reward": 0.2, "completion_tokens": 20.0 + step, "entropy": 0.5}
            mismatch = {
                "mismatch_abs": 0.01 * step,
                "mismatch_k3": 1e-4,
                "importance_clipped": 0.0,
                "mismatch_slope": None,
            }
            seconds = {"rollout_s": 2.0, "train_s": 1.0, "sync_s": 0.25, "wait_s": 0.5}
            self.event(
                REINFORCED,
                "step",
                after=3.25,
                step=step,
                weight_version=step,
                **{**measures, **mismatch, **seconds, **fields},
            )

    def rl(
        self,
        gain: tuple[float, float, float] = (30.0, 25.0, 35.0),
        before: str = "x</think>\n\n1",
        after: str = "y</think>\n\n2",
    ):
        def figure(value: float, unit: str, low: float | None = None, high: float | None = None) -> Figure:
            return Figure.measured(value, unit, "held-out problems", rehearsed=True, low=low, high=high)

        self.event(REINFORCED, "start", pool="home")
        self.event(REINFORCED, "evaluate", after=2.0, which="before", accuracy=0.2, seconds=2.0)
        self.rl_steps(4)
        self.event(REINFORCED, "evaluate", after=2.0, which="after", accuracy=0.5, seconds=2.0)
        self.event(REINFORCED, "end", seconds=20.0)
        value, low, high = gain
        record = records.RlRecord(
            **self.header(),
            step=REINFORCED,
            pool="home",
            started_from=TAUGHT,
            started_from_sha256="ab" * 32,
            rollout_pool="away",
            rollout_rehearsed=True,
            algorithm="grpo",
            steps=4,
            resumed_from=[],
            checkpoint="steps/reasoning/checkpoints/4",
            checkpoint_sha256="cd" * 32,
            weight_version=4,
            heldout_problems=500,
            accuracy_before=figure(20.0, "%", 17.0, 24.0),
            accuracy_after=figure(20.0 + value, "%", 45.0, 55.0),
            accuracy_gain=figure(value, "points", low, high),
            thought_tokens_before=figure(21.0, "tokens"),
            thought_tokens_after=figure(44.0, "tokens"),
            figures={},
            sample_before=before,
            sample_after=after,
        )
        self.run.write_record(f"steps/{REINFORCED}/record", record)

    def handoff(self, verdict: str = "pass") -> None:
        kl = Figure.measured(0.001, "nats/token", "golden prompts", rehearsed=True)
        limit = Figure(value=0.02, unit="nats/token", kind="declared", source="recipe: handoff.max_mean_kl")
        outcome = "pass" if verdict == "pass" else "fail"
        record = records.HandoffRecord(
            **self.header(),
            source_pool="home",
            target_pool="away",
            format="w8a8",
            verdict=verdict,  # type: ignore[arg-type]
            checks=[
                records.Check(
                    layer="tokens", name="mean_kl", outcome=outcome, figure=kl, limit=limit, detail="against fp32"
                )
            ],
            bundles={"w8a8": "bundle/w8a8"},
            seal_id="5ea1ed00" if verdict == "pass" else None,
            figures={},
            ledger=[
                records.LedgerRow(
                    module=f"model.layers.{index}.mlp", kind="mlp", quantisation=0.01 * index, chip=None, floor=0.003
                )
                for index in range(1, 12)
            ],
            culprit=None if verdict == "pass" else "model.layers.3.mlp",
            operator=None if verdict == "pass" else "down_proj",
        )
        self.run.write_record("parity", record)

    def whole(self) -> Story:
        for stage in (self.qualify, self.plan, self.train, self.rl, self.handoff):
            stage()
        return self


class Page(HTMLParser):
    """Text of the page by section id, all tags, and whether every tag is closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[tuple[str, str | None]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        opened, _ = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if any(tag in ("style", "title") for tag, _ in self.open):
            return
        section = next((name for tag, name in self.open if tag in ("section", "header", "nav")), None)
        self.texts.setdefault(section or "", []).append(data)

    def text(self, section: str) -> str:
        return " ".join(" ".join(self.texts[section]).split())

    @property
    def everything(self) -> str:
        return " ".join(self.text(section) for section in self.texts)


def page_of(story: Story) -> Page:
    path = report.execute(story.run, Watch(Console(quiet=True)))
    assert path == story.run.path / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path / "run")


def test_the_ledger_shows_the_costliest_modules_and_what_is_not_known(story: Story):
    text = page_of(story.whole()).text("parity")
    assert "Error ledger" in text and "The fault is in" not in text
    assert "model.layers.11.mlp 11 % none 0.3 %" in text.replace("\N{NO-BREAK SPACE}", " ")
    assert "model.layers.4.mlp" in text and "model.layers.3.mlp" not in text, "eight rows, the costliest first"
    assert text.index("model.layers.11.mlp") < text.index("model.layers.10.mlp")


def test_a_refusal_says_where_the_fault_is(story: Story):
    story.whole()
    story.handoff("refuse")
    assert "The fault is in model.layers.3.mlp , operator down_proj ." in page_of(story).text("parity")


def test_a_finished_run_tells_its_outcome_first(story: Story):
    head = page_of(story.whole()).text("outcome")
    assert "passed the gate to away (rehearsed)" in head
    assert (
        "trains on home ( cpu ): it is the only one that is here. Not on away : a rehearsal never vouches." in head
    ), "why the training is where it is"
    assert "from 20.0 % (17.0 to 24.0 %) rehearsed to 50.0 %" in head
    assert "+30.0 points (95 % interval +25.0 to +35.0) rehearsed" in head
    assert "clear of zero" in head
    assert "not clear of zero" not in head
    assert "5ea1ed00" in head
    assert "Not done" not in head


def test_every_section_of_a_finished_run_has_its_facts(story: Story):
    page = page_of(story.whole())
    expected = {
        "questions": ["Reason for home", "Train on home", "No finished step was interrupted", "The gate says yes"],
        "pools": ["title of home", "title of away", "serve-only", "7", "5 GFLOP/s"],
        "plan": ["A rehearsal never vouches.", "First choice.", "8.0 s measured", "0.80 ×"],
        "lineage": ["cold-start sft, done", "reasoning rl, done, handed off"],
        "step-cold-start": ["teach the weights of model", "Layer 1", "Layer 2", "6 updates", "abababab"],
        "step-reasoning": [
            *("From the weights of cold-start", "44 tokens", "weight version 4", "+30.0 points"),
            *("0.025 nats/token rehearsed", "Before x", "Answer 1", "After y", "Answer 2"),
        ],
        "parity": ["Mean KL", "0.001 nats/token", "0.02 nats/token declared", "5ea1ed00"],
        "time": [
            *("Qualify", "cold-start", "reasoning: rollouts", "reasoning: training", "reasoning: weight crossings"),
            "reasoning: evaluation",
        ],
        "incidents": ["no stage took a slower path"],
        "recipe": [story.run.recipe.digest(), '"largest_target": 39'],
    }
    for section, facts in expected.items():
        for fact in facts:
            assert fact in unescape(page.text(section)), f"{fact!r} is not in {section}"
    assert "not done yet" not in page.everything.lower()


def figures_on_disk(folder: Path) -> list[dict[str, Any]]:
    """Every JSON object in the records that has the keys of a figure, found without the records' types."""

    def walk(node: Any) -> list[dict[str, Any]]:
        if isinstance(node, dict):
            own = [node] if {"value", "kind", "source"} <= set(node) else []
            return own + [found for inner in node.values() for found in walk(inner)]
        return [found for inner in node for found in walk(inner)] if isinstance(node, list) else []

    files = [file for file in folder.rglob("*.json") if file.name != "recipe.json"]
    return [found for file in files for found in walk(json.loads(file.read_text(encoding="utf-8")))]


def test_the_appendix_lists_every_figure_with_kind_and_source(story: Story):
    page = page_of(story.whole())
    stored = figures_on_disk(story.run.path)
    assert len(stored) > 10
    rows = page.text("figures")
    for figure in stored:
        assert figure["source"] in rows
    counted = {kind: len(re.findall(rf"\b{kind}\b", rows)) for kind in ("declared", "forecast", "rehearsed")}
    for kind, count in counted.items():
        assert count >= sum(figure["kind"] == kind for figure in stored)


def test_a_rehearsed_figure_is_never_shown_as_measured(story: Story):
    page = page_of(story.whole())
    for match in re.finditer(r"([^ ]+) (nats/token|tokens) (\w+)", page.text("step-reasoning") + page.text("parity")):
        assert match[3] != "measured", match[0]
    assert "title of away away · 1 × far-chip · not here rehearsed" in page.text("pools")


@pytest.mark.parametrize("known", ["nothing", "plan", "record"])
def test_charts_of_rollouts_carry_the_kind_of_the_rollout_pool(story: Story, known: str):
    if known != "nothing":
        story.plan()
    story.rl() if known == "record" else story.rl_steps(4)
    assert "Mean |Δ log p| rehearsed" in page_of(story).text("step-reasoning")


def test_charts_of_rollouts_on_a_pool_that_is_here_are_measured(tmp_path: Path):
    story = Story(tmp_path / "run", place={"train": ["home"], "rollout": ["home"], "serve": ["home"]})
    story.rl_steps(4)
    assert "Mean |Δ log p| measured" in page_of(story).text("step-reasoning")


STAGES = {
    "qualify": "pools",
    "plan": "plan",
    TAUGHT: "step-cold-start",
    REINFORCED: "step-reasoning",
    "handoff": "parity",
}
"""What a run does, in order, and the section of each."""


@pytest.mark.parametrize("done", range(len(STAGES)))
def test_a_partial_run_says_what_is_missing_and_how_to_go_on(story: Story, done: int):
    for write in (story.qualify, story.plan, story.train, story.rl, story.handoff)[:done]:
        write()
    page = page_of(story)
    head = page.text("outcome")
    assert f"missing: {', '.join(list(STAGES)[done:])}. Go on with isthmus run {story.run.path}" in head
    for stage, section in STAGES.items():
        missing = f"isthmus run {story.run.path} --until {stage}" in page.text(section)
        assert missing == (stage in list(STAGES)[done:]), section
    assert ("20.0 %" in head) == (done >= 4)


def test_an_interrupted_stage_shows_how_far_it_came(story: Story):
    story.qualify()
    story.plan()
    story.event(TAUGHT, "start", pool="home")
    story.sft_steps(1, 3)
    page = page_of(story)
    assert "Step cold-start: It reached update 3 of 6; 2 of 2 steps are still to come" in page.text("outcome")
    assert "It reached update 3 of 6." in page.text("step-cold-start")
    assert "no end event after 3.0 s" in page.text("incidents")
    assert any(
        attrs.get("aria-label", "") and "next token: from 3 to 1" in str(attrs["aria-label"]) for _, attrs in page.tags
    )


def test_rl_without_a_single_event_still_renders(story: Story):
    story.qualify()
    story.plan()
    story.train()
    story.rl()
    (story.run.path / "events.jsonl").unlink()
    page = page_of(story)
    assert "no update has compared the two sides" in page.text("step-reasoning")
    assert "+30.0 points" in page.text("step-reasoning")
    assert "No stage has run" in page.text("time")


def test_a_refused_hand_off_is_not_dressed_up(story: Story):
    for stage in (story.qualify, story.plan, story.train, story.rl):
        stage()
    story.handoff("refuse")
    page = page_of(story)
    assert "The gate refused" in page.text("outcome")
    assert "Nothing was sealed" in page.text("parity")
    assert "passed the gate" not in page.everything
    assert "The gate says no" in page.text("questions")


@pytest.mark.parametrize(
    ("gain", "clear"), [((5.0, 0.1, 10.0), True), ((5.0, -0.1, 10.0), False), ((-5.0, -9.0, -1.0), False)]
)
def test_a_gain_is_clear_only_if_its_whole_interval_is_above_zero(
    story: Story, gain: tuple[float, float, float], clear: bool
):
    story.rl(gain=gain)
    story.handoff()
    head = page_of(story).text("outcome")
    assert ("which is clear of zero" in head) == clear
    assert ("is not clear of zero" in head) != clear


def test_text_from_a_run_is_escaped_wherever_it_can_come_in(story: Story):
    story.whole()
    story.rl(before=f"{HOSTILE}</think>{HOSTILE}", after=f"<think>{HOSTILE}")
    story.event(TAUGHT, "fallback", what=HOSTILE, why=HOSTILE)
    story.event(TAUGHT, "revert", to=HOSTILE)
    story.event(HOSTILE, "start", pool=HOSTILE)
    story.event(HOSTILE, "end", after=1.0, seconds=1.0)
    page = page_of(story)
    names = {tag for tag, _ in page.tags}
    assert "script" not in names
    assert "img" not in names
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert page.text("step-reasoning").count(HOSTILE) == 3
    assert page.text("incidents").count(HOSTILE) >= 3


def base_steps(story: Story, first: int, last: int, **fields: Any) -> None:
    for step in range(first, last + 1):
        measures = {"loss": 9.0 / step, "mtp_loss": 10.0 / step, "tokens": 100 * step, "seconds": 0.5}
        story.event("base", "step", after=0.5, **{"step": step, **measures, "mfu": None, **fields})


BASE = {"name": "base", "kind": "pretrain", "folder": "books", "steps": 4, "optimizer": OPTIMIZER}


@pytest.fixture
def pretrained(tmp_path: Path) -> Story:
    return Story(tmp_path / "run", step=[BASE, {**STEPS[0], "from": "base"}, STEPS[1]])


def test_pretraining_has_a_section_of_its_own(pretrained: Story):
    story = pretrained
    story.plan()
    story.event("base", "start", pool="home")
    base_steps(story, 1, 3, memory_gib=1.5)
    page = page_of(story)
    assert "Step base: It reached update 3 of 4; 3 of 3 steps are still to come" in page.text("outcome")
    assert f"It reached update 3 of 4. Go on with isthmus run {story.run.path} --until base" in page.text("step-base")
    assert "No update is made" in page.text("step-cold-start")
    base_steps(story, 4, 4, memory_gib=2.5)
    story.event("base", "end", seconds=2.0)
    story.event(TAUGHT, "start", pool="home")
    story.sft_steps(1, 6)
    story.event(TAUGHT, "end", seconds=7.0)
    page = page_of(story)
    text = page.text("step-base")
    assert (
        "base pretraining" in text and "on books , 64 rows of 512 tokens an update, from the weights of model" in text
    )
    assert "It reached update 4 of 4" in text, "no record says that it is done"
    assert "Loss measured nats per token, over 4 updates" in text
    assert "Mean tokens per second 500 tokens/s measured" in text, "1000 tokens in 2 seconds"
    assert "Peak memory 2.5 GiB measured" in text
    assert "MFU" not in text, "no step knew it"
    assert "teach the weights of base" in page.text("step-cold-start")
    labels = [str(attrs.get("aria-label")) for _, attrs in page.tags]
    assert any("next token: from 9 to 2.25" in label and "(MTP): from 10 to 2.5" in label for label in labels)
    assert any("base 22 percent, cold-start 78 percent" in label for label in labels), "2 of 9 seconds"


def test_a_run_has_the_sections_of_its_steps_and_no_others(story: Story):
    page = page_of(story.whole())
    assert "retraining" not in page.everything
    assert [name for name in page.texts if name.startswith("step-")] == ["step-cold-start", "step-reasoning"]
    assert {"#step-cold-start", "#step-reasoning"} <= {attrs["href"] for tag, attrs in page.tags if tag == "a"}


def test_mfu_is_shown_where_it_is_known_with_the_kind_of_its_peak(pretrained: Story):
    story = pretrained
    base_steps(story, 1, 1, mfu=None)
    base_steps(story, 2, 2, mfu=0.5)
    base_steps(story, 3, 3, mfu=0.2, seconds=1.0)
    assert "MFU 30.0 % rehearsed" in page_of(story).text("step-base"), "no plan yet, and training may be rehearsed"
    story.plan()
    page = page_of(story)
    assert "MFU 30.0 % declared" in page.text("step-base"), "(0.5 x 0.5 + 0.2 x 1.0) / 1.5 seconds"
    assert "mean of mfu over 2 steps" in page.text("figures")


def test_a_sampling_step_tells_what_its_filters_took(tmp_path: Path):
    sampled = {"name": "harvest", "kind": "sample", "from": REINFORCED}
    again = {
        "name": "again",
        "kind": "sft",
        "from": "model",
        "data": {"harvest": 1.0},
        "steps": 6,
        "optimizer": OPTIMIZER,
    }
    story = Story(tmp_path / "run", step=[*STEPS, sampled, again])
    story.plan()
    story.event("harvest", "start", pool="away")
    story.event("harvest", "step", after=2.0, step=3)
    page = page_of(story)
    assert "It has answered 3 batches of prompts." in page.text("step-harvest")
    assert "harvest" in page.text("step-again") and "again sft, waiting, handed off" in page.text("lineage")
    record = records.SampleRecord(
        **story.header(),
        step="harvest",
        pool="away",
        rehearsed=True,
        weights_of=REINFORCED,
        weights_sha256="cd" * 32,
        format="w8a8",
        seed=0,
        prompts=100,
        generated=400,
        kept=123,
        dropped={"correct": 270, "duplicates": 7},
        samples="steps/harvest/samples.jsonl",
        samples_sha256="ef" * 32,
        figures={"kept_share": Figure.measured(0.3075, "share", "answers", rehearsed=True)},
    )
    story.run.write_record("steps/harvest/record", record)
    text = page_of(story).text("step-harvest")
    assert "123 of 400 answers to 100 problems were kept, generated in W8A8 on away , rehearsed." in text
    assert "Correct 270" in text and "Duplicates 7" in text and "efefefefefefefef" in text
    assert "30.8 % rehearsed" in text and "cdcdcdcdcdcdcdcd" in text


def test_what_nothing_comes_of_is_told(tmp_path: Path):
    told = page_of(Story(tmp_path / "run", step=STEPS, handoff={"step": TAUGHT})).text("lineage")
    assert "Nothing goes on from 'reasoning': start a step from it" in told
    assert "Nothing" not in page_of(Story(tmp_path / "other")).text("lineage")


@pytest.mark.parametrize(("pool", "kind"), [("home", "measured"), ("away", "rehearsed")])
def test_speed_and_memory_of_training_have_the_kind_of_its_pool(tmp_path: Path, pool: str, kind: str):
    story = Story(tmp_path / "run", place={"train": [pool], "rollout": ["away"], "serve": ["away"]})
    story.event(TAUGHT, "step", step=1, loss=1.0, tokens=60, seconds=0.5, memory_gib=0.25, mfu=0.125)
    text = page_of(story).text("step-cold-start")
    assert f"Mean tokens per second 120 tokens/s {kind}" in text
    assert f"Peak memory 0.25 GiB {kind}" in text
    assert f"MFU 12.5 % {'declared' if kind == 'measured' else 'rehearsed'}" in text


def test_an_interrupted_step_counts_with_what_it_took_before():
    events = [
        event("base", "start", 10.0),
        event("base", "step", 14.0, step=1),
        event("base", "start", 100.0),
        event("base", "step", 102.0, step=2),
        event("base", "end", 102.0, seconds=2.0),
        event("taught", "start", 102.0),
        event("taught", "step", 109.0, step=1),
        event("taught", "end", 110.0, seconds=8.0),
    ]
    parts = timing.breakdown(events, {"base": "pretrain", "taught": "sft"})
    assert [(name, seconds) for name, seconds, _ in parts] == [("base", 6.0), ("taught", 8.0)]
    assert len({colour for _, _, colour in parts}) == 2


def test_the_page_fetches_nothing(story: Story):
    page = page_of(story.whole())
    html = (story.run.path / "report.html").read_text(encoding="utf-8")
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "img"), tag
        for name in ("src", "href", "data", "srcset"):
            assert (attrs.get(name) or "#").startswith("#"), f"{tag} {name}={attrs[name]}"
    assert "@import" not in html
    assert set(re.findall(r"url\((.*?)\)", html)) <= {"#land"}
    assert any("default-src 'none'" in str(attrs.get("content")) for tag, attrs in page.tags if tag == "meta")


def test_every_link_of_the_contents_leads_somewhere(story: Story):
    for made in (story, Story(story.run.path.parent / "whole").whole()):
        page = page_of(made)
        ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
        assert len(ids) == len(set(ids))
        assert {attrs["href"] for tag, attrs in page.tags if tag == "a"} <= {f"#{name}" for name in ids}


def test_equal_run_folders_give_equal_bytes_and_nothing_else_is_written(story: Story):
    story.whole()
    before = {
        file: file.read_bytes() for file in story.run.path.rglob("*") if file.is_file() and file.name != "files.json"
    }
    page_of(story)
    first = (story.run.path / "report.html").read_bytes()
    page_of(story)
    assert (story.run.path / "report.html").read_bytes() == first
    after = {
        file: file.read_bytes()
        for file in story.run.path.rglob("*")
        if file.is_file() and file.name not in ("report.html", "files.json")
    }
    assert after == before


def test_a_damaged_record_is_an_error_and_keeps_the_old_page(story: Story):
    story.whole()
    page_of(story)
    old = (story.run.path / "report.html").read_bytes()
    (story.run.path / "steps" / REINFORCED / "record.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DamagedFile, match=r"reasoning.record\.json"):
        report.execute(story.run, Watch(Console(quiet=True)))
    assert (story.run.path / "report.html").read_bytes() == old


@pytest.mark.parametrize("kind", ["fallback", "skipped"])
def test_what_was_slower_or_left_out_is_told(story: Story, kind: str):
    assert "None: no stage took a slower path" in page_of(story).text("incidents")
    story.event("qualify", kind, what="the engine pilot", why="there is no engine")
    incidents = page_of(story).text("incidents")
    assert "the engine pilot there is no engine" in incidents
    assert "no stage took a slower path" not in incidents


def test_an_estimate_without_an_ended_stage_has_no_truth(story: Story):
    story.plan()
    story.event(TAUGHT, "start", pool="home")
    story.sft_steps(1, 3)
    rows = {row.name: row for row in report.estimate_rows(report.read_dossier(story.run))}
    assert [row.truth for row in rows.values()] == [None, None, None]
    story.event(TAUGHT, "end", seconds=9.0)
    rows = {row.name: row for row in report.estimate_rows(report.read_dossier(story.run))}
    assert (rows["cold-start"].truth and rows["cold-start"].truth.value) == 9.0
    assert (rows["cold-start"].ratio and rows["cold-start"].ratio.value) == 0.9
    assert (rows["cold-start"].ratio and rows["cold-start"].ratio.kind) == "forecast", (
        "a ratio with a forecast is no measurement"
    )
    assert rows["Total"].truth is None, "RL has not ended"


def test_resumes_reverts_and_skipped_updates_are_told(story: Story):
    story.qualify()
    story.plan()
    story.train(resumed_from=(2, 4))
    story.event(REINFORCED, "revert", source="away", target="home")
    story.event(REINFORCED, "skipped-update", step=1, why="every group has equal rewards")
    incidents = page_of(story).text("incidents")
    assert "cold-start went on from its checkpoint at update 2, then from update 4" in incidents
    assert "reasoning moved to another pool: source away, target home" in incidents
    assert "1 RL step without an update: every group has equal rewards" in incidents


def test_alarms_are_told(story: Story):
    story.qualify()
    assert "no gap climbed" in page_of(story).text("incidents")
    story.event(REINFORCED, "alarm", step=31, what="the mismatch climbs", why="it passes the budget in 9 steps")
    told = page_of(story).text("incidents")
    assert (
        "reasoning, step 31: the mismatch climbs. It passes the budget in 9 steps" in told
        and "no gap climbed" not in told
    )


def event(stage: str, name: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"stage": stage, "event": name, "time": time, **fields}


def test_a_cut_off_attempt_counts_until_its_last_sign_of_life():
    events = [
        event("train", "start", 10.0),
        event("train", "step", 14.0, step=1),
        event("train", "start", 100.0),
        event("train", "step", 105.0, step=2),
        event("train", "end", 106.0, seconds=6.5),
        event("serve", "start", 200.0),
        event("serve", "request", 900.0),
    ]
    assert [(one.seconds, one.finished) for one in timing.attempts(events)] == [(4.0, False), (6.5, True)]
    assert timing.spent(events) == {"train": 10.5}


def test_a_pool_is_held_while_the_supervisor_waits_and_each_pool_has_its_own_part():
    """From update 2 at 14 s to the incident at 74 s it hung, and the next start took until 80 s."""
    events = [
        event("train", "start", 10.0, pool="away"),
        event("train", "step", 14.0, step=1),
        event("train", "incident", 74.0, number=1),
        event("train", "start", 80.0, pool="home"),
        event("train", "step", 85.0, step=1),
        event("train", "step", 86.0, step=2),
        event("train", "end", 87.0, seconds=7.0),
    ]
    assert [(one.pool, one.seconds, one.finished) for one in timing.attempts(events)] == [
        ("away", 70.0, False),
        ("home", 7.0, True),
    ]
    held = {
        pool: (seconds, [one["time"] for one in made]) for pool, (seconds, made) in timing.held(events, "train").items()
    }
    assert held == {"away": (70.0, [14.0]), "home": (7.0, [85.0, 86.0])}


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_parts_of_the_time_add_up_to_the_clock(staleness: int):
    turns = {"rollout_s": 4.0, "train_s": 2.0, "wait_s": 0.0, "sync_s": 1.0}
    beside = {"rollout_s": 4.0, "train_s": 2.0, "wait_s": 2.0, "sync_s": 1.0}
    step = beside if staleness else turns
    seconds = sum(step.values()) - (step["rollout_s"] if staleness else 0.0)
    events = [event("r", "start", 0.0)]
    events += [event("r", "step", i * seconds, step=i, staleness=staleness, **step) for i in range(1, 11)]
    events += [event("r", "evaluate", 10 * seconds, seconds=3.0), event("r", "end", 0.0, seconds=10 * seconds + 5.0)]
    parts = {name: seconds for name, seconds, _ in timing.breakdown(events, {"r": "rl"})}
    assert sum(parts.values()) == pytest.approx(10 * seconds + 5.0)
    assert parts["r: the rest"] == pytest.approx(2.0)
    assert ("r: rollouts" in parts) == (staleness == 0)
    assert timing.rollouts_beside_training(events) == (40.0 if staleness else 0.0)


@given(
    low=st.floats(-1e6, 1e6),
    span=st.one_of(st.just(0.0), st.floats(1e-6, 1e6)),
    from_zero=st.booleans(),
    tight=st.booleans(),
)
def test_a_scale_holds_its_data_with_a_few_round_ticks(low: float, span: float, from_zero: bool, tight: bool):
    scale = charts.scale(low, low + span, 5, from_zero=from_zero, tight=tight)
    slack = 1e-6 * (1 + abs(low) + span)
    assert scale.low <= low + slack
    assert scale.high >= low + span - slack
    assert len(scale.ticks) <= 8
    assert all(scale.low - slack <= tick <= scale.high + slack for tick in scale.ticks)
    assert not from_zero or (scale.low <= 0 <= scale.high)


def test_a_line_passes_through_its_data():
    """A straight line from (0, 0) to (10, 100) is a straight line on the drawing."""
    drawn = charts.line_chart([charts.Series("x", [(float(i), 10.0 * i) for i in range(11)])])
    path = re.search(r'class="line ink" d="M([^"]+)"', drawn)
    assert path is not None
    places = [tuple(map(float, pair.split())) for pair in path[1].split("L")]
    assert len(places) == 11
    for x, y in places:
        assert x / charts.WIDTH == pytest.approx(1 - y / charts.HEIGHT, abs=1e-3)


def test_a_long_line_is_thinned_but_keeps_its_mean():
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    drawn = charts.line_chart([charts.Series("x", points)])
    path = re.search(r'class="line ink" d="M([^"]+)"', drawn)
    assert path is not None
    ys = [float(pair.split()[1]) for pair in path[1].split("L")]
    assert len(ys) <= charts.MOST_POINTS
    top = float(charts.scale(0, max(y for _, y in points), 4, from_zero=True).high)
    assert sum(charts.HEIGHT - y for y in ys) / len(ys) / charts.HEIGHT * top == pytest.approx(3.0, rel=0.2)


def test_points_without_a_number_are_left_out():
    events = [
        {"step": 1, "x": 2.0},
        {"step": 2, "x": None},
        {"step": 3},
        {"step": None, "x": 1.0},
        {"step": 4, "x": True},
    ]
    assert charts.points_of(events, "x", 10) == [(1.0, 20.0)]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(1, 12))
def test_a_moving_average_is_the_mean_of_what_came_just_before(values: list[float], window: int):
    averaged = charts.moving_average(list(enumerate(values)), window)
    for index, (step, mean) in enumerate(averaged):
        recent = values[: index + 1][-window:]
        assert step == index
        assert mean == pytest.approx(sum(recent) / len(recent), abs=1e-9)


def test_a_heat_strip_tells_starved_from_even_from_crowded():
    strip = charts.heat_strip([(1, [0.0, 0.25, 0.75, 0.0])])
    cells = dict(re.findall(r'class="heat(\d)" d="([^"]+)"', strip))
    assert cells == {"0": "M0 0h1v1h-1zM0 3h1v1h-1z", "3": "M0 1h1v1h-1z", "6": "M0 2h1v1h-1z"}


def test_a_large_heat_strip_stays_small():
    strip = charts.heat_strip([(step, [1 / 256] * 256) for step in range(1000)])
    assert 'viewBox="0 0 59 32"' in strip
    assert len(strip) < 40_000


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.9998, "share", "99.98 %"),
        (0.0004, "share", "0.04 %"),
        (1.0, "share", "100.0 %"),
        (0.0, "share", "0.0 %"),
        (99.996, "%", "99.996 %"),
        (-0.012, "share", "−1.2 %"),
        (0.0421, "s", "42.1 ms"),
        (61.04, "s", "61.0 s"),
        (150, "s", "2 min 30 s"),
        (119.99, "s", "120.0 s"),
        (3 * 3600 + 59, "s", "3 h 00 min"),
        (64 * 2**30, "B", "64 GiB"),
        (313e12, "FLOP/s", "313 TFLOP/s"),
        (1234567, "parameters", "1,234,567 parameters"),
        (0.00003, "nats", "3·10⁻⁵ nats"),
        (12345.6, "tokens/s", "12,346 tokens/s"),
        (2.5, "", "2.5"),
    ],
)
def test_numbers_read_as_people_write_them(value: float, unit: str, shown: str):
    figure = Figure(value=value, unit=unit, kind="measured", source="x")
    assert numbers.quantity(figure).replace(numbers.NO_BREAK_SPACE, " ") == shown


@given(st.floats(-1e300, 1e300), st.sampled_from(["share", "%", "s", "B", "FLOP/s", "tokens", ""]))
def test_every_finite_number_can_be_shown(value: float, unit: str):
    assert numbers.with_unit(value, unit)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("top1_agreement", "Top-1 agreement"),
        ("bf16.mean_abs_dlogp", "bf16: mean |Δ log p|"),
        ("w8a8: mean KL", "W8A8: mean KL"),
        ("matmul_tflops", "Matmul"),
        ("rollout_tokens_per_s", "Rollout tokens per second"),
        ("sft_step_s", "SFT step"),
        ("loss", "Loss"),
        ("latency_8k_p99_us", "Latency 8k P99"),
        ("mtbf_h", "Time between failures"),
        ("config.json says", "Config.json says"),
    ],
)
def test_keys_read_as_words(key: str, words: str):
    assert numbers.label(key) == words


def test_reasons_become_sentences_and_stay_escaped():
    assert numbers.sentence("choice 2, and found `fit`") == "Choice 2, and found <code>fit</code>."
    assert numbers.sentence("aten::topk is <slow>.") == "aten::topk is &lt;slow&gt;."
    assert numbers.prose("`<b>`") == "<code>&lt;b&gt;</code>"


def test_a_thought_is_taken_apart_at_its_tags():
    assert chapters.split_thought("a b</think>\n\n c") == ("", "a b", "c", True)
    assert chapters.split_thought("question<think>a</think>b") == ("question", "a", "b", True)
    assert chapters.split_thought("on and on") == ("", "on and on", "", False)


def test_a_pool_shows_its_scores_its_limits_and_what_was_left_out(story: Story):
    story.qualify()
    record = story.run.read_record("qualify/home", records.QualifyRecord)
    assert record is not None
    limit = records.Limit(setting="train.expert", most=8, reason="all-to-all breaks down beyond 8 ranks")
    pairs = {
        f"p2p_{a}_{b}_gbs": Figure.measured(10.0 * a + b, "GB/s", "transfers", rehearsed=False)
        for a, b in ((0, 1), (1, 0))
    }
    links = records.Evidence(
        name="pairs", aspect="links", needed_for="training", outcome="fail", detail="", figures=pairs, limits=[limit]
    )
    score = records.Score(aspect="links", outcome="limited", passed=1, findings=3, looked_for=0.456, skipped=1)
    skipped = records.Skipped(probe="soak", aspect="stability", price_s=30.0, why="over budget", unseen=["hang"])
    changed = record.model_copy(
        update={"scores": [score], "limits": [limit], "skipped": [skipped], "evidence": [*record.evidence, links]}
    )
    story.run.write_record("qualify/home", changed)
    page = page_of(story).text("pools").replace("\N{NO-BREAK SPACE}", " ")
    assert "train.expert <= 8 for training: all-to-all breaks down" in page
    assert "limited" in page and "1 of 3" in page and "46" in page
    assert "Soak: over budget; nobody looked for hang." in page
    assert "Side by side" in page and "GB/s from the row" in page
    assert "p2p" not in page.lower()
