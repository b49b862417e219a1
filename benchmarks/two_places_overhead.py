"""What a crossing costs at 1, 2 and 4 engines: from weights that are ready to engines that were looked at.

The rivals, on the same engines and versions: the same deltas to one engine after the other, and all weights to one
engine after the other while it is paused, which is what a reload is. Neither looks at what the engines then compute.
"""

from __future__ import annotations

import argparse
import http.client
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, cast
from urllib.parse import urlsplit

import torch

from benchmarks.conditions import store
from benchmarks.two_places_faults import steps_of
from benchmarks.two_places_shore import KEY, Row, opened
from isthmus.engines.fleet import Fleet
from isthmus.engines.local.core.options import DEFAULT_OPTIONS
from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.transport import Transport
from isthmus.formats.updates.publisher import Publisher
from isthmus.formats.updates.wire import digest, pack
from isthmus.stages.steps.rl import loop
from isthmus.stages.steps.rl.crossing import Crossing
from isthmus.stages.steps.rl.engines import Engines

COUNTS = (1, 2, 4)
MOVED = 2e-5
"""How far a weight moves in a version, relative to itself: about 0.5 % of the elements of bf16 are others then."""
SIZES = (
    "model.hidden_size=256",
    "model.intermediate_size=512",
    "model.moe_intermediate_size=128",
    "model.num_hidden_layers=4",
    "step.reasoning.snapshot_every=1000",
)
QUICK_SIZES = ("step.reasoning.snapshot_every=1000",)
OURS, ONE_BY_ONE, RELOADED = "all at once, deltas", "one after the other, deltas", "one after the other, all, paused"


class Crossings:
    """Versions to the first so many engines, in one way or another."""

    def __init__(self, shores: loop.Shores, engines: Sequence[HttpEngine], bundle: Path):
        self.shores, self.engines = shores, list(engines)
        fleet = Fleet(self.engines, lambda *_, **__: None)
        fleet.start(bundle)
        self.crossing = Crossing(shores.state, cast(Engines, fleet), shores.crossing.prompts, lambda _: None)
        self.fleet, self.publisher = fleet, Publisher(snapshot_every=1000)

    def move(self) -> None:
        """The next version of the weights."""
        state = self.shores.state
        state.step += 1
        noise = torch.Generator().manual_seed(state.step)
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.mul_(1 + MOVED * torch.randn(parameter.shape, generator=noise))

    def ours(self) -> Row:
        self.move()
        began, own = time.perf_counter(), time.process_time()
        told = self.crossing.send()
        return {"seconds": time.perf_counter() - began, "trainer_cpu_s": time.process_time() - own, **told}

    def one_by_one(self) -> Row:
        self.move()
        began, own = time.perf_counter(), time.process_time()
        version, published = self.shores.state.step, self.publisher.publish(self.shores.state.step, self._tensors())
        assert published.delta is not None and published.base is not None
        for engine in self.engines:
            engine.update_delta(published.delta, published.base[0], version, published.weights.sha256)
            engine.in_use()
        size = sum(map(len, published.delta))
        return {
            "seconds": time.perf_counter() - began,
            "trainer_cpu_s": time.process_time() - own,
            "update_bytes": size,
        }

    def reloaded(self) -> Row:
        self.move()
        began, own = time.perf_counter(), time.process_time()
        payload = pack(self._tensors())
        sha256 = digest(payload)
        for engine in self.engines:
            control = Transport(engine.url, KEY, 600.0)
            control.post("/pause?mode=keep")
            engine.update(payload, self.shores.state.step, sha256)
            control.post("/resume")
        return {
            "seconds": time.perf_counter() - began,
            "trainer_cpu_s": time.process_time() - own,
            "update_bytes": len(payload),
        }

    def align(self) -> None:
        """All weights of a new version by the way that comes next, so that deltas have a base."""
        self.move()
        self.crossing.send()
        self.publisher = Publisher(snapshot_every=1000)
        self.publisher.publish(self.shores.state.step, self._tensors())

    def writing(self) -> float:
        """Seconds of a rollout on these engines."""
        rollouts = replace(self.shores.rollouts, engine=self.fleet)
        return rollouts.generate(self.shores.state.step).seconds

    def _tensors(self) -> dict[str, torch.Tensor]:
        return self.crossing.format.export(self.shores.state.weights(), self.shores.state.work.architecture)


def overhead(options: argparse.Namespace) -> None:
    """Measure, print, and store."""
    repeats, rounds = (2, 1) if options.quick else (3, options.rounds)
    sizes = QUICK_SIZES if options.quick else SIZES
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch, opened(Path(scratch), max(COUNTS), DEFAULT_OPTIONS, sizes) as found:
        shore, prepared = found
        with steps_of(shore, prepared) as steps:
            parameters = sum(one.numel() for one in steps.shores.state.model.parameters())
            for _ in range(rounds):
                for count in COUNTS:
                    rows += _measured(Crossings(steps.shores, _direct(shore.engines[:count]), shore.bundle), repeats)
    table = summary(rows)
    for row in table:
        print(row)
    if not options.quick:
        described = {"what": "overhead", "parameters": parameters, "rounds": rounds}
        store("two_places", {**described, "summary": table, "rows": rows})


def _direct(engines: Sequence[HttpEngine]) -> list[HttpEngine]:
    return [HttpEngine(engine.url, KEY) for engine in engines]


def _measured(crossings: Crossings, repeats: int) -> list[Row]:
    rows: list[Row] = []
    for way, act in ((OURS, crossings.ours), (ONE_BY_ONE, crossings.one_by_one), (RELOADED, crossings.reloaded)):
        crossings.align()
        for _ in range(repeats):
            rows.append({"way": way, "engines": len(crossings.engines), **act()})
            print(rows[-1], flush=True)
    crossings.align()
    for way, act in ((OURS, crossings.ours), (RELOADED, crossings.reloaded)):
        with listening(crossings.engines) as gaps:
            began = time.perf_counter()
            act()
            ended = time.perf_counter()
        crossings.align()
        writing = crossings.writing()
        row = {"way": way, "engines": len(crossings.engines), "pause_s": max(gaps.during(began, ended))}
        rows.append(row | {"writing_s": writing, "usual_gap_s": median(gaps.all())})
        print(rows[-1], flush=True)
    return rows


class Gaps:
    """Seconds between two tokens of one answer."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def note(self, before: float, now: float) -> None:
        self.found.append((before, now))

    def during(self, began: float, ended: float) -> list[float]:
        """Of those that overlap this time."""
        return [now - before for before, now in self.found if now > began and before < ended] or [0.0]

    def all(self) -> list[float]:
        return [now - before for before, now in self.found] or [0.0]


@contextmanager
def listening(engines: Sequence[HttpEngine]) -> Iterator[Gaps]:
    """While each engine writes one answer after the other."""
    over, gaps = threading.Event(), Gaps()
    threads = [threading.Thread(target=_listen, args=(engine, over, gaps), daemon=True) for engine in engines]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    try:
        yield gaps
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _listen(engine: HttpEngine, over: threading.Event, gaps: Gaps) -> None:
    asked = {"prompt": [5, 6, 7, 8], "max_tokens": 300, "stream": True, "temperature": 1.0, "ignore_eos": True}
    while not over.is_set():
        connection = http.client.HTTPConnection(urlsplit(engine.url).netloc, timeout=120)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(asked), headers)
        answer, before = connection.getresponse(), None
        for line in answer:
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                if before is not None:
                    gaps.note(before, now)
                before = now
            if over.is_set():
                break
        connection.close()


def summary(rows: Sequence[Row]) -> list[Row]:
    """By way and number of engines: median seconds, their growth as a share of linear growth, and the pause of an
    engine as a share of a step that only crosses and writes."""
    table: list[Row] = []
    for way in (OURS, ONE_BY_ONE, RELOADED):
        alone = own_alone = None
        for count in COUNTS:
            of_it = [row for row in rows if (row["way"], row["engines"]) == (way, count)]
            timed = [row for row in of_it if "seconds" in row]
            paused = [row for row in of_it if "pause_s" in row]
            seconds = median(row["seconds"] for row in timed)
            own = median(row["trainer_cpu_s"] for row in timed)
            alone, own_alone = alone or seconds, own_alone or own
            row: dict[str, Any] = {"way": way, "engines": count, "seconds": round(seconds, 3)}
            row["share_of_linear"] = round((seconds / alone - 1) / (count - 1), 3) if count > 1 else None
            row["cpu_share_of_linear"] = round((own / own_alone - 1) / (count - 1), 3) if count > 1 else None
            row["bytes"] = median(one["update_bytes"] for one in timed)
            for key in ("trainer_cpu_s", "update_encode_s", "update_send_s", "update_apply_s", "parity_s"):
                known = [one[key] for one in timed if one.get(key) is not None]
                row[key] = round(median(known), 3) if known else None
            if paused:
                row["pause_s"] = round(median(one["pause_s"] for one in paused), 4)
                steps = [seconds + one["writing_s"] for one in paused]
                row["pause_share"] = round(median(one["pause_s"] for one in paused) / median(steps), 4)
            table.append(row)
    return table
