"""Engines by URL for benchmarks/two_places.py: three of ours behind proxies, and failures that are planted in them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, isthmus
from isthmus.engines.local import LocalEngine
from isthmus.formats import get_format
from isthmus.formats.files.bundle import read_bundle
from isthmus.formats.updates.wire import digest, pack
from isthmus.model.model import Model
from isthmus.recipe.schema import EngineOptions
from tests.support.meddling import COMPLETIONS, Meddler, meddling

RECIPE = ROOT / "benchmarks" / "two_places.toml"
TAUGHT, REINFORCED = "taught", "reasoning"
KEY = "key-of-two-places"
ENGINES = 3
SAME_BITS = EngineOptions(batch_invariant=True)
"""What a prompt draws is then the same to the last bit, whoever writes it and in whatever company."""
CROSSING = ("/start_weight_update", "/update_weights", "/finish_weight_update", "/weight_checksums")
KINDS = ("kill -9", "hang", "slow", "wrong answer", "connection cut", "500s", "truncated body", "old version")
OF_ANSWERS = {
    "connection cut": "broken off",
    "500s": "error",
    "truncated body": "truncated",
    "old version": "version before",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """What one engine does, from its `nth` request of a `moment` on: of a crossing, or of writing.

    It strikes `late_s` after the request came, where it is the process that fails. An answer is spoilt once, or, if it
    `lasts`, until somebody mends the engine. A slow one is `delay_s` late with each answer.
    """

    kind: str
    moment: str
    engine: int
    nth: int
    late_s: float
    lasts: bool
    delay_s: float

    @classmethod
    def drawn(cls, chance: random.Random, kind: str, engines: Sequence[int]) -> Failure:
        moment = chance.choice(("crossing", "writing"))
        nth = chance.randint(1, len(CROSSING) if moment == "crossing" else 6)
        lasts = kind == "old version" or chance.random() < 0.5
        return cls(kind, moment, chance.choice(engines), nth, chance.uniform(0, 0.1), lasts, chance.uniform(0.3, 1.0))

    def shown(self) -> Row:
        return asdict(self)


class Shore:
    """Engines, and the proxies before them. `shadow` is an engine with other weights, for answers of another version.

    `bundle` is what all of them start with.
    """

    def __init__(self, proxies: list[Meddler], options: EngineOptions):
        self.proxies, self.options = proxies, options
        self.engines: list[LocalEngine] = []
        self.shadow: LocalEngine | None = None
        self.bundle = Path()
        self.struck = threading.Event()
        self._others: bytes = b""
        self._restarts: dict[int, threading.Thread] = {}
        self._armed: Failure | None = None

    @property
    def urls(self) -> list[str]:
        return [proxy.url for proxy in self.proxies]

    def start(self, bundle: Path, stack: ExitStack) -> None:
        """Bring up the engines and the shadow."""
        self.bundle = bundle
        served = read_bundle(bundle)
        others = Model(served.architecture).initialise(99).state_dict()
        self._others = pack(get_format(served.format).export(others, served.architecture))
        for number in range(len(self.proxies) + 1):
            engine = LocalEngine(bundle, log=bundle.parent / f"engine-{number}.log", options=self.options)
            engine.api_key = KEY
            self.engines.append(stack.enter_context(engine))
        self.shadow = self.engines.pop()
        for proxy, engine in zip(self.proxies, self.engines, strict=True):
            proxy.target, proxy.shadow = engine.url, self.shadow.url

    def at_work(self) -> list[int]:
        """Those that run, as far as is known here."""
        return [place for place in range(len(self.engines)) if not self._is_restarting(place)]

    def arm(self, failure: Failure) -> None:
        """Let it come; `struck` is set when it did."""
        seen, lock, proxy = [0], threading.Lock(), self.proxies[failure.engine]
        self.struck.clear()
        self._armed = failure

        def watch(path: str) -> None:
            if path.partition("?")[0] not in (CROSSING if failure.moment == "crossing" else (COMPLETIONS,)):
                return
            with lock:
                seen[0] += 1
                due = seen[0] == failure.nth
            if due:
                self._strike(failure)

        proxy.watch = watch

    def mend(self) -> None:
        """What whoever runs the engines does after a failure."""
        failure, self._armed = self._armed, None
        if failure is None:
            return
        proxy, engine = self.proxies[failure.engine], self.engines[failure.engine]
        proxy.watch = lambda _path: None
        proxy.heal()
        if not self.struck.is_set():
            return
        if failure.kind == "hang" and engine.pid is not None:
            os.kill(engine.pid, signal.SIGCONT)
        if failure.kind == "kill -9":
            thread = threading.Thread(target=self._restart, args=(failure.engine,), daemon=True)
            self._restarts[failure.engine] = thread
            thread.start()

    def settle(self) -> None:
        """Wait until all that were killed are started again."""
        for thread in self._restarts.values():
            thread.join()

    def _strike(self, failure: Failure) -> None:
        proxy, engine = self.proxies[failure.engine], self.engines[failure.engine]
        if failure.kind in ("kill -9", "hang"):
            threading.Timer(failure.late_s, self._signal, (failure, engine)).start()
            return
        if failure.kind == "slow":
            proxy.delay_s = failure.delay_s
        elif failure.kind == "wrong answer" and failure.moment == "writing":
            _bring_under_the_same_number(engine, self._others)
        elif failure.kind == "wrong answer":
            proxy.fault = "stale"
        else:
            proxy.routes, proxy.times = None, None if failure.lasts else 1
            proxy.fault = OF_ANSWERS[failure.kind]
        self.struck.set()

    def _signal(self, failure: Failure, engine: LocalEngine) -> None:
        if self._armed is failure and engine.pid is not None:
            os.kill(engine.pid, signal.SIGKILL if failure.kind == "kill -9" else signal.SIGSTOP)
            self.struck.set()

    def _restart(self, place: int) -> None:
        self.engines[place].start(self.bundle)
        self.proxies[place].target = self.engines[place].url

    def _is_restarting(self, place: int) -> bool:
        thread = self._restarts.get(place)
        return thread is not None and thread.is_alive()


def _bring_under_the_same_number(engine: LocalEngine, payload: bytes) -> None:
    """Another trainer's weights, whose version happens to have the number of the one in use."""
    headers = {"Authorization": f"Bearer {KEY}"}
    with urllib.request.urlopen(urllib.request.Request(f"{engine.url}/health", headers=headers)) as answer:
        version = json.loads(answer.read())["weight_version"]
    query = f"version={version}&sha256={digest(payload)}"
    with urllib.request.urlopen(
        urllib.request.Request(f"{engine.url}/update_weights?{query}", payload, headers)
    ) as answer:
        answer.read()


@contextmanager
def opened(
    folder: Path, engines: int = ENGINES, options: EngineOptions = SAME_BITS, changes: Sequence[str] = ()
) -> Iterator[tuple[Shore, Path]]:
    """(engines that serve, a run of RECIPE with these changes that lacks reinforcement learning alone)."""
    run, key = folder / "prepared", folder / "away.key"
    key.write_text(KEY)
    with ExitStack() as stack:
        proxies = [stack.enter_context(meddling("http://127.0.0.1:9")) for _ in range(engines)]
        shore = Shore(proxies, options)
        changes = [f"pools.away.engines={shore.urls}", f"pools.away.api_key_file={key}", *changes]
        words = ["run", RECIPE, "--run", run, "--until", TAUGHT]
        words += [word for change in changes for word in ("--set", change)]
        asked = isthmus(*words)
        assert asked.code != 0 and "python -m isthmus.engines.local" in asked.errors, asked.errors
        shutil.copytree(run / "qualify" / "away-bundle", folder / "start")
        shore.start(folder / "start", stack)
        taught = isthmus(*words)
        assert taught.code == 0, taught.output + taught.errors
        yield shore, run
        shore.mend()
        shore.settle()
