"""Stands for processes on nodes of a Ray cluster: python -m isthmus.nodes ORDER WORD...

It places them, runs `python WORD...` there, prints what the first of them prints, passes signals and the end of its
input on, and ends as they end: with their exit code, or by their signal. If a node is gone it says so, and ends with
LOST. When it ends itself, however it ends, Ray ends them.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from isthmus.errors import IsthmusError
from isthmus.nodes import BEATS, HOST, Order, keeper
from isthmus.nodes.cluster import connect
from isthmus.pools import ON_POOL

LOST, STOPPED = 75, 130
GRACE_S = 15.0
"""What ranks get to end by themselves when one of them failed."""
LOOK_S = 0.5
ROOM_S = 5.0
"""Of one question whether there is room. A busy cluster needs seconds to answer, and says no until then."""
FENCE_S = 30.0
PATIENCE_S = 60.0
"""How long a node may be out of reach while the cluster still believes in it."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_TIME = struct.Struct("<d")
"""What a beat begins with: time.monotonic() of its machine (`isthmus.launch.beats`)."""


@dataclass
class Kept:
    """One process on a node: its keeper, where that is, and how it ended."""

    rank: int
    keeper: Any
    node: str = ""
    host: str = ""
    local: int = 0
    devices: dict[str, str] = field(default_factory=dict)
    code: int | None = None
    lost: str | None = None
    ended: float = 0.0
    silent: float | None = None


class Proxy:
    """All processes of an order."""

    def __init__(self, order: Order, words: list[str]):
        self.order, self.words = order, words
        self.ray: Any = None
        self.group: Any = None
        self.kept: list[Kept] = []
        self.failed: float | None = None
        self.signals: list[int] = []
        self.input_over = False
        self.port, self.gcs = 0, ""

    def run(self) -> int:
        """The exit code, negative for a signal. Raises IsthmusError if they cannot be started."""
        self.ray = connect(self.order.address)
        try:
            self._ask_for_room()
            self._place()
            self._start()
            self._attend()
        except self.ray.exceptions.RayError as error:
            self._lose_all(f"the Ray cluster at {self.order.address} failed: {' '.join(str(error).split())[:400]}")
        finally:
            self._leave()
        return self._conclude()

    def _lose_all(self, why: str) -> None:
        """What Ray can tell no more of is lost. Raises IsthmusError if nothing was started."""
        if not self.kept:
            raise IsthmusError(why)
        for one in self.kept:
            if one.code is None:
                one.code, one.lost, one.ended = LOST, why, time.time()

    def _leave(self) -> None:
        """End what is left. What the cluster is too busy to hear now it does when this process has ended."""
        with contextlib.suppress(self.ray.exceptions.RayError):
            for one in self.kept:
                self.ray.kill(one.keeper)
            if self.group is not None:
                self.ray.util.remove_placement_group(self.group)

    def _ask_for_room(self) -> None:
        """Room for all of them at once: neighbours on as few nodes as it takes."""
        order, count = self.order, self.order.count
        self.group = self.ray.util.placement_group(
            [dict(order.resources)] * count, strategy="PACK", bundle_label_selector=[dict(order.labels)] * count
        )
        end = time.monotonic() + order.wait_s
        while not self.group.wait(min(ROOM_S, max(LOOK_S, order.wait_s))):
            if self.signals:
                raise KeyboardInterrupt
            if time.monotonic() > end:
                each = ", ".join(f"{amount:g} {name}" for name, amount in order.resources.items())
                labels = ", ".join(f"{name} = {value}" for name, value in order.labels.items()) or "any labels"
                raise IsthmusError(
                    f"no room on the cluster within {order.wait_s:g} s for {count} processes of the pool "
                    f"{order.pool!r}, {each} each, on nodes with {labels}; `isthmus cluster RECIPE` shows what is there"
                )

    def _place(self) -> None:
        """A keeper for each, in the order of the nodes, so that ranks of a node are neighbours."""
        self._end_former()
        strategies = self.ray.util.scheduling_strategies
        made = []
        for index in range(self.order.count):
            strategy = strategies.PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index)
            made.append(self._keeper(index, strategy))
        places = self.ray.get([one.where.remote() for one in made])
        numbered = sorted(zip(places, made, strict=True), key=lambda pair: pair[0]["node"])
        seen: dict[str, int] = {}
        for rank, (place, one) in enumerate(numbered):
            local = seen[place["node"]] = seen.get(place["node"], -1) + 1
            self.kept.append(Kept(rank, one, place["node"], place["host"], local, place["devices"]))
        self.port, self.gcs = numbered[0][0]["port"], numbered[0][0]["gcs"]

    def _keeper(self, index: int, strategy: Any) -> Any:
        """Its class travels by value: the interpreter that Ray has on a node need not have Isthmus."""
        self.ray.cloudpickle.register_pickle_by_value(keeper)
        resources = dict(self.order.resources)
        named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        amounts = {option: resources.pop(name, 0) for name, option in named.items()}
        return (
            self.ray.remote(keeper.Keeper)
            .options(
                name=self._name(index),
                scheduling_strategy=strategy,
                resources=resources,
                max_concurrency=4,
                max_restarts=0,
                **amounts,
            )
            .remote()
        )

    def _name(self, index: int) -> str:
        return f"{self.order.name}-{index}"

    def _end_former(self) -> None:
        """Those that an earlier child of the same name left, where it was ended by force, must not go on beside."""
        for index in range(self.order.count):
            end = time.monotonic() + FENCE_S
            while (former := self._former(index)) is not None:
                self.ray.kill(former)
                if time.monotonic() > end:
                    raise IsthmusError(
                        f"a process of the pool {self.order.pool!r} that was started before does not end; "
                        "`ray list actors` shows it"
                    )
                time.sleep(LOOK_S)

    def _former(self, index: int) -> Any | None:
        try:
            return self.ray.get_actor(self._name(index))
        except ValueError:
            return None

    def _start(self) -> None:
        mark, content = Path(self.order.seen) / f".seen-{os.getpid()}", secrets.token_hex(8)
        mark.write_text(content, encoding="utf-8")
        try:
            orders = [
                one.keeper.start.remote(self._command(one), self._variables(one), str(Path.cwd()), str(mark), content)
                for one in self.kept
            ]
            answers = [self._answer(order) for order in orders]
        finally:
            mark.unlink()
        for one, (is_there, problem) in zip(self.kept, answers, strict=True):
            if not is_there:
                self._ended(one, LOST, self._gone(one))
            elif problem is not None:
                raise IsthmusError(
                    f"the node {one.host} of the pool {self.order.pool!r} {problem}. All nodes of a run see its folder "
                    "and the one in which its command is given under the same paths (docs/cluster.md)."
                )

    def _answer(self, order: Any) -> tuple[bool, str | None]:
        """Whether a keeper is there to carry an order out, and what is wrong with the order."""
        try:
            return True, self.ray.get(order)
        except self.ray.exceptions.RayActorError:
            return False, None

    def _command(self, one: Kept) -> list[str]:
        return [self.order.python or "{python}", *(one.host if word == HOST else word for word in self.words)]

    def _variables(self, one: Kept) -> dict[str, str]:
        """What a rank is told. It sees the devices of all ranks of its node, as where torchrun starts them."""
        along = {name: os.environ[name] for name in self.order.variables if name in os.environ}
        told = {ON_POOL: self.order.pool, "RAY_ADDRESS": self.gcs}
        neighbours = [other for other in self.kept if other.node == one.node]
        for name in one.devices:
            told[name] = ",".join(other.devices[name] for other in neighbours)
        if self.order.count > 1:
            told |= {
                "RANK": str(one.rank),
                "WORLD_SIZE": str(self.order.count),
                "LOCAL_RANK": str(one.local),
                "LOCAL_WORLD_SIZE": str(len(neighbours)),
                "MASTER_ADDR": self.kept[0].host,
                "MASTER_PORT": str(self.port),
            }
        return {**along, **told, **self.order.env}

    def _attend(self) -> None:
        """Until all of them have ended."""
        asked = {one.keeper.read.remote(): one for one in self.kept if one.code is None}
        told_of_input = False
        while asked:
            ready, _ = self.ray.wait(list(asked), timeout=LOOK_S)
            self._pass_signals_on()
            if self.input_over and not told_of_input:
                told_of_input = True
                self._tell("close_input")
            for call in ready:
                one = asked.pop(call)
                if self._hear(one, call):
                    asked[one.keeper.read.remote()] = one
            if self.failed is not None and time.monotonic() > self.failed + GRACE_S:
                self._tell("end")

    def _hear(self, one: Kept, call: Any) -> bool:
        """What a keeper said; whether there will be more."""
        try:
            said = self.ray.get(call)
        except self.ray.exceptions.ActorUnavailableError:
            if self._is_alive(one):
                return True
            return self._ended(one, LOST, self._gone(one))
        except self.ray.exceptions.RayActorError:
            return self._ended(one, LOST, self._gone(one))
        one.silent = None
        for stream, part in said["told"]:
            self._print(one, stream, part)
        for rank, beat in said["beats"]:
            _leave_beat(rank, beat, said["now"])
        return True if said["code"] is None else self._ended(one, said["code"], None)

    def _ended(self, one: Kept, code: int, lost: str | None) -> bool:
        one.code, one.lost, one.ended = code, lost, time.time()
        if code != 0 and self.failed is None:
            self.failed = time.monotonic()
            self._tell("send", signal.SIGTERM)
        return False

    def _is_alive(self, one: Kept) -> bool:
        """Whether the cluster still believes in a node that is out of reach, for a while."""
        one.silent = one.silent or time.monotonic()
        time.sleep(LOOK_S)
        alive = any(node["NodeID"] == one.node and node["Alive"] for node in self.ray.nodes())
        return alive and time.monotonic() < one.silent + PATIENCE_S

    def _gone(self, one: Kept) -> str:
        return f"the node {one.host} of the pool {self.order.pool!r} is gone, or Ray's worker on it"

    def _print(self, one: Kept, stream: int, part: bytes) -> None:
        if self.order.logs is not None and stream == 2:
            folder = Path(self.order.logs) / str(one.rank)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "stderr.log").open("ab") as file:
                file.write(part)
        if one.rank == 0:
            out = sys.stdout if stream == 1 else sys.stderr
            out.buffer.write(part)
            out.flush()

    def _pass_signals_on(self) -> None:
        while self.signals:
            self._tell("send", self.signals.pop(0))

    def _tell(self, what: str, *facts: Any) -> None:
        for one in self.kept:
            if one.code is None:
                getattr(one.keeper, what).remote(*facts)

    def _conclude(self) -> int:
        """As the first that failed ended, which its ranks' logs tell too."""
        bad = [one for one in self.kept if one.code != 0]
        if self.order.logs is not None:
            ends = [{"rank": one.rank, "code": one.code, "lost": one.lost, "time": one.ended} for one in bad]
            Path(self.order.logs).mkdir(parents=True, exist_ok=True)
            (Path(self.order.logs) / "ends.json").write_text(json.dumps(ends), encoding="utf-8")
        if not bad:
            return 0
        first = min(bad, key=lambda one: one.ended)
        if first.lost is not None:
            print(f"error: {first.lost}", file=sys.stderr, flush=True)
        assert first.code is not None
        return first.code


def _leave_beat(rank: str, beat: bytes, now: float) -> None:
    """A beat of a node, with the time that it has here, where the supervisor looks for those of this process."""
    folder = os.environ.get(BEATS)
    if not folder or len(beat) < _TIME.size:
        return
    (at,) = _TIME.unpack_from(beat)
    here = _TIME.pack(time.monotonic() - (now - at) if at else 0.0) + beat[_TIME.size :]
    path = Path(folder) / f"{rank}-{os.getpid()}"
    path.with_name(f".{rank}").write_bytes(here)
    path.with_name(f".{rank}").replace(path)


def _end_with_parent(parent: int) -> None:
    """Ray ends the processes of one that has ended; so nothing is left of a run whose command was killed. The kernel
    could do it at once, and would also where only the thread ended that started this process."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(STOPPED)


def _watch_input(proxy: Proxy) -> None:
    while os.read(0, 4096):
        pass
    proxy.input_over = True


def main() -> int:
    order, words = Order.read(sys.argv[1]), sys.argv[2:]
    proxy = Proxy(order, words)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    if order.follows_input:
        threading.Thread(target=_watch_input, args=(proxy,), daemon=True).start()

    def note(number: int, _frame: FrameType | None) -> None:
        proxy.signals.append(number)

    for number in PASSED_ON:
        signal.signal(number, note)
    try:
        code = proxy.run()
    except KeyboardInterrupt:
        return STOPPED
    except IsthmusError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if order.logs is not None:
            report = {"time": time.time(), "error": type(error).__name__, "message": str(error)}
            Path(order.logs).mkdir(parents=True, exist_ok=True)
            (Path(order.logs) / "rank-0.json").write_text(json.dumps(report), encoding="utf-8")
        return error.exit_code
    proxy.ray.shutdown()
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main())
