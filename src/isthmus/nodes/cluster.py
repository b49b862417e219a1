"""What a Ray cluster has, beside what a recipe wants of it."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from isthmus.chips import check_names, resources_of
from isthmus.errors import IsthmusError
from isthmus.pools import Pool, placed_pools
from isthmus.recipe.schema import Recipe

NAMESPACE = "isthmus"
_OWN_LABELS = "ray.io/"


@dataclass(frozen=True)
class Node:
    """A node that is alive: what it has, and what of that nobody has taken."""

    id: str
    host: str
    labels: Mapping[str, str]
    total: Mapping[str, float]
    free: Mapping[str, float]

    def has(self, labels: Mapping[str, str]) -> bool:
        return all(self.labels.get(name) == value for name, value in labels.items())


@dataclass(frozen=True)
class Want:
    """Processes of one kind that a pool starts: its ranks, or its engines."""

    pool: Pool
    what: str
    count: int
    labels: Mapping[str, str]
    resources: Mapping[str, float]

    def __str__(self) -> str:
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.resources.items()) or "nothing"
        what = self.what.removesuffix("s") if self.count == 1 else self.what
        return f"{self.count} {what}, {each} each"


def ray_library() -> Any:
    """Ray, which is an extra. Raises IsthmusError where it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise IsthmusError(
            "pools on nodes of a cluster need Ray, which this Python does not have: pip install 'isthmus[ray]', in the "
            "version that the cluster runs"
        ) from None


def connect(address: str) -> Any:
    """Ray, connected to the cluster. Raises IsthmusError, with Ray's words, if there is none at the address."""
    ray = ray_library()
    options = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
    try:
        ray.init(address=address, configure_logging=True, **options)
    except (RuntimeError, ConnectionError, ValueError, OSError) as error:
        words = " ".join(str(error).split())
        raise IsthmusError(
            f"there is no Ray cluster that this Python can join at [cluster] address = {address!r}: {words[:400]}\n"
            "Start one with `ray start --head`, or write the host:port of its head."
        ) from None
    return ray


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, for a look at the cluster."""
    ray = connect(address)
    try:
        yield ray
    finally:
        ray.shutdown()


def look(address: str) -> list[Node]:
    """The nodes that are alive, by host."""
    with connected(address) as ray:
        free = ray._private.state.available_resources_per_node()
        found = [
            Node(
                node["NodeID"],
                node["NodeManagerAddress"],
                node["Labels"],
                node["Resources"],
                free.get(node["NodeID"], {}),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]
    return sorted(found, key=lambda node: (node.host, node.id))


def wants(recipe: Recipe, pools: Collection[str] | None = None) -> list[Want]:
    """What the placed pools that are on nodes want of the cluster; of the named ones, or of all if it is None."""
    found = []
    for pool in placed_pools(recipe):
        if pool.nodes is None or (pools is not None and pool.name not in pools):
            continue
        trains = pool.name in recipe.place.train
        what, count = ("ranks", pool.ranks) if trains else ("engines", pool.count)
        found.append(Want(pool, what, count, pool.nodes.labels, resources_of(pool)))
    return found


def placed(asked: Sequence[Want], nodes: Sequence[Node], *, free: bool = False) -> list[list[str]]:
    """The nodes that would take the processes of each want, all wants at once, each process on the first that has room.

    Fewer than a want's count if there is no room for more. With `free` what others have taken is no room.
    """
    room = {node.id: dict(node.free if free else node.total) for node in nodes}
    found = []
    for want in asked:
        taken: list[str] = []
        for node in nodes:
            while len(taken) < want.count and node.has(want.labels) and _take(room[node.id], want.resources):
                taken.append(node.id)
        found.append(taken)
    return found


def _take(room: dict[str, float], resources: Mapping[str, float]) -> bool:
    if any(room.get(name, 0.0) < amount for name, amount in resources.items()):
        return False
    for name, amount in resources.items():
        room[name] -= amount
    return True


def problems(asked: Sequence[Want], nodes: Sequence[Node]) -> list[str]:
    """Why processes of a pool find no place, even if nobody else were there."""
    found = []
    for want in asked:
        (taken,) = placed([want], nodes)
        able = [node for node in nodes if node.has(want.labels)]
        where = f"the pool {want.pool.name!r} wants {want}, on nodes with {_labels(want.labels)}"
        if not able:
            found.append(f"{where}, and no node has that. Nodes have: {_seen(nodes)}")
        elif len(taken) < want.count:
            have = "; ".join(f"{node.host}: {_amounts(node.total, want.resources)}" for node in able)
            found.append(f"{where}, and there is room for {len(taken)}. These nodes have {have}")
    return found


def check_cluster(recipe: Recipe, pools: Collection[str] | None = None) -> None:
    """Raise IsthmusError if a pool that is wanted on nodes of the cluster cannot have its processes there."""
    asked = wants(recipe, pools)
    if not asked or recipe.cluster is None:
        return
    if found := problems(asked, look(recipe.cluster.address)):
        raise IsthmusError("\n".join([*found, "`isthmus cluster RECIPE` shows what the cluster has."]))


def render(recipe: Recipe, nodes: Sequence[Node]) -> RenderableType:
    """What the recipe wants, and the nodes, as two tables."""
    asked = wants(recipe)
    whole, now = [placed([want], nodes)[0] for want in asked], placed(asked, nodes, free=True)
    pools = Table(box=box.SIMPLE_HEAD, title="what the recipe wants", title_justify="left")
    for title in ("pool", "chip", "processes", "labels", "nodes", "room for", "free now"):
        pools.add_column(title, overflow="fold")
    for want, every, free in zip(asked, whole, now, strict=True):
        able = sum(node.has(want.labels) for node in nodes)
        enough = f"[{'green' if len(every) == want.count else 'red'}]{len(every)} of {want.count}[/]"
        pools.add_row(
            escape(want.pool.name),
            want.pool.chip,
            str(want),
            escape(_labels(want.labels)),
            str(able),
            enough,
            f"{len(free)} of {want.count}",
        )
    has = Table(box=box.SIMPLE_HEAD, title="what the cluster has", title_justify="left")
    for title in ("node", "labels", "resources", "free now", "for"):
        has.add_column(title, overflow="fold")
    for node in nodes:
        names = [name for name in node.total if not name.startswith(("node:", "object_store"))]
        serves = ", ".join(want.pool.name for want in asked if node.has(want.labels))
        total, free = _amounts(node.total, names), _amounts(node.free, names)
        has.add_row(f"{node.host} {node.id[:8]}", escape(_labels(_own(node.labels))), total, free, serves)
    return Group(pools, has)


def execute(recipe: Recipe) -> tuple[RenderableType, list[str]]:
    """The tables, and what is missing. Raises IsthmusError for a recipe without pools on nodes."""
    check_names(recipe)
    if recipe.cluster is None:
        raise IsthmusError(
            'no pool of the recipe is on nodes of a cluster: write [cluster] address = "auto", and '
            "pools.NAME.ray = { labels = { ... } } (docs/cluster.md)"
        )
    nodes = look(recipe.cluster.address)
    return render(recipe, nodes), problems(wants(recipe), nodes)


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in sorted(labels.items())) or "any labels"


def _own(labels: Mapping[str, str]) -> dict[str, str]:
    """Without those that Ray sets by itself."""
    return {name: value for name, value in labels.items() if not name.startswith(_OWN_LABELS)}


def _seen(nodes: Sequence[Node]) -> str:
    return "; ".join(sorted({_labels(_own(node.labels)) for node in nodes}))


def _amounts(amounts: Mapping[str, float], names: Collection[str]) -> str:
    return ", ".join(_amount(name, amounts.get(name, 0.0)) for name in names) or "nothing"


def _amount(name: str, amount: float) -> str:
    return f"{amount / 2**30:.0f} GiB of memory" if name == "memory" else f"{amount:g} {name}"
