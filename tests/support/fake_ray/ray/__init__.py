"""As much of Ray as a child that stands for processes on nodes asks for, with threads of its own process as actors.

The nodes are those of the JSON in $FAKE_NODES: name, labels, resources. A node is lost when the file $FAKE_LOST/NAME is
there; the node $FAKE_FAINT is lost as soon as something is started on it.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NODES: list[dict[str, Any]] = json.loads(os.environ.get("FAKE_NODES", "[]"))
CALLED = Path(os.environ["FAKE_CALLS"]) if "FAKE_CALLS" in os.environ else None


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class ActorUnavailableError(RayActorError):
    pass


exceptions = SimpleNamespace(
    RayError=RayError, RayActorError=RayActorError, ActorUnavailableError=ActorUnavailableError
)
cloudpickle = SimpleNamespace(register_pickle_by_value=lambda module: None)


def init(address: str, **options: Any) -> None:
    if address == "nowhere:1":
        raise ConnectionError("Could not find any running Ray instance.")
    note("init", address=address)


def shutdown() -> None:
    note("shutdown")


def note(what: str, **facts: Any) -> None:
    if CALLED is not None:
        with CALLED.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, **facts}) + "\n")


def lost(node: str) -> bool:
    folder = os.environ.get("FAKE_LOST")
    return folder is not None and (Path(folder) / node).exists()


def nodes() -> list[dict[str, Any]]:
    return [
        {
            "NodeID": node["name"],
            "NodeManagerAddress": "127.0.0.1",
            "Alive": not lost(node["name"]),
            "Labels": node["labels"],
            "Resources": node["resources"],
        }
        for node in NODES
    ]


class Group:
    """Each bundle on the first node that has its labels and room."""

    def __init__(self, bundles: list[dict[str, float]], selectors: list[dict[str, str]]):
        room = {node["name"]: dict(node["resources"]) for node in NODES}
        self.places: list[str] = []
        for bundle, selector in zip(bundles, selectors, strict=True):
            for node in NODES:
                able = selector.items() <= node["labels"].items() and not lost(node["name"])
                if able and all(room[node["name"]].get(name, 0) >= one for name, one in bundle.items()):
                    for name, one in bundle.items():
                        room[node["name"]][name] -= one
                    self.places.append(node["name"])
                    break
        self.whole = len(self.places) == len(bundles)

    def wait(self, seconds: float) -> bool:
        time.sleep(0 if self.whole else seconds)
        return self.whole


def placement_group(bundles: list[dict[str, float]], strategy: str, bundle_label_selector: list[dict[str, str]]):
    return Group(bundles, bundle_label_selector)


class Reference:
    def __init__(self, node: str, future: Any):
        self.node, self.future = node, future


class Actor:
    def __init__(self, made: Any, node: str, threads: int):
        self.made, self.node = made, node
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Reference:
            return Reference(self.node, self.pool.submit(self._call, name, arguments))

        return SimpleNamespace(remote=remote)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name == "start" and self.node == os.environ.get("FAKE_FAINT"):
            (Path(os.environ["FAKE_LOST"]) / self.node).touch()
        found = getattr(self.made, name)(*arguments)
        return {**found, "node": self.node} if name == "where" else found


def remote(kind: type) -> Any:
    def options(name: str, scheduling_strategy: Any, max_concurrency: int, **others: Any) -> Any:
        def made() -> Actor:
            note("actor", name=name, **others)
            return Actor(kind(), scheduling_strategy.node, max_concurrency)

        return SimpleNamespace(remote=made)

    return SimpleNamespace(options=options)


def get(what: Any) -> Any:
    if isinstance(what, list):
        return [get(one) for one in what]
    if lost(what.node):
        raise RayActorError("The actor died because its node has died.")
    return what.future.result()


def wait(references: list[Reference], timeout: float) -> tuple[list[Reference], list[Reference]]:
    end = time.monotonic() + timeout
    while True:
        ready = [one for one in references if one.future.done() or lost(one.node)]
        if ready or time.monotonic() > end:
            return ready[:1], [one for one in references if one not in ready[:1]]
        time.sleep(0.01)


def kill(actor: Actor) -> None:
    actor.made.end()
    actor.pool.shutdown(wait=False, cancel_futures=True)


def get_actor(name: str) -> Actor:
    raise ValueError(name)


def get_runtime_context() -> Any:
    return SimpleNamespace(get_node_id=lambda: "unused", gcs_address="127.0.0.1:6379")


def strategy(group: Group, placement_group_bundle_index: int) -> Any:
    return SimpleNamespace(node=group.places[placement_group_bundle_index])


util = SimpleNamespace(
    placement_group=placement_group,
    remove_placement_group=lambda group: note("removed"),
    get_node_ip_address=lambda: "127.0.0.1",
    scheduling_strategies=SimpleNamespace(PlacementGroupSchedulingStrategy=strategy),
)
