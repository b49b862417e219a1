"""Step time of training over 1 to 4 ranks on this machine, and the bytes a rank sends against the arithmetic minimum.

    python -m benchmarks.scaling [--models r-nano r-35m]

Ranks are processes with one thread each that torchrun's launcher starts; they speak over gloo on the loopback
interface. r-35m is r-100m with fewer layers and experts. A step's batch is the same in every layout and full of tokens;
each rank takes its rows. Every layout must find the losses that one process finds, before and after an update.
Speed-up is against one process that shards nothing, and cannot be more than the number of cores. Steps are timed
without the watcher; one more step is watched.

What a rank sends at least in one step, in bytes, with n ranks that shard, r copies of the model and e ranks that spread
the experts (n r ranks in all; s = n / e of them shard what one holds of the experts). L are the bytes of the parameters
of all layers without the routed experts, X those of the routed experts, R those outside of layers (embedding, final
norm, head); gradients have as many. A rank's batch is one microbatch here: each further one would gather the layers and
reduce-scatter the gradients again.

- all-gather: layers are gathered for the forward pass and again for the backward pass, because FSDP frees them in
  between; what is outside of layers stays. (n - 1)/n (2 L + R) + (s - 1)/s 2 X/e
- reduce-scatter of the gradients: (n - 1)/n (L + R) + (s - 1)/s X/e
- all-reduce of the gradients over copies: 2 (r - 1)/r (L + R + X)/n, and over all ranks a step's scalars: the number of
  rows, four counts, three losses, the load of each expert, the norm of the gradient
- all-to-all: 4 D for each choice of an expert of another rank, there and back, forward and backward; the choices are
  read from the routers. And once the counts of all E experts, 8 E (e - 1)/e, for each MoE layer. (A token with several
  experts on one other rank is sent once for each of them; to send it once would need less.)

A rank's bytes are means over ranks. A ratio above 1 at 3 ranks is padding: FSDP gives each rank as many rows of a
tensor, and 64 rows do not divide by 3. "wire" is what the loopback interface counted in the watched step, divided by
the ranks, with headers and with any other traffic of the machine. gloo does a reduce-scatter as an all-reduce of which
it keeps a part, so there the wire carries twice what a reduce-scatter needs.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.conditions import store
from isthmus.data.corpus import Document
from isthmus.formats.parts.assemble import unfilled
from isthmus.model.model import Model
from isthmus.model.moe import Experts, MixtureOfExperts, Routing
from isthmus.probes.static.costs import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER
from isthmus.recipe.architecture import DeepseekSection, ModelSection
from isthmus.recipe.schema import TrainSection
from isthmus.recipe.steps import OptimizerSection, SftSection
from isthmus.trainer.batch import Batch, pack
from isthmus.trainer.mesh import Ranks, open_ranks
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.parallel import distribute, materialise
from isthmus.trainer.parts import initialise
from isthmus.trainer.step import train_step
from tests.support.presets import preset_architecture
from tests.support.traffic import KINDS, Traffic, loopback_bytes

STEPS = 4
SECTION = SftSection(
    name="taught", kind="sft", steps=1000, optimizer=OptimizerSection(name="adamw", learning_rate=1e-4)
)


@dataclass(frozen=True)
class Subject:
    """A model and the rows of a step: a multiple of 12, so that each of 1 to 4 ranks has as many."""

    architecture: ModelSection
    rows: int
    row_length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.row_length


@dataclass(frozen=True)
class Layout:
    name: str
    world: int
    replicate: int = 1
    expert: int = 1

    @property
    def section(self) -> TrainSection:
        return TrainSection(replicate=self.replicate, expert=self.expert)


@dataclass(frozen=True)
class Seen:
    """What one rank saw. `sent` and `minimum` are bytes by kind; `wire` is of all ranks together."""

    losses: list[float]
    seconds: list[float]
    sent: dict[str, float]
    minimum: dict[str, float]
    wire: int


SUBJECTS = {
    "r-nano": Subject(preset_architecture("r-nano"), rows=24, row_length=256),
    "r-35m": Subject(preset_architecture("r-100m", num_hidden_layers=4, n_routed_experts=16), rows=12, row_length=256),
}
LAYOUTS = (
    Layout("one process", 1),
    Layout("FSDP", 2),
    Layout("experts spread", 2, expert=2),
    Layout("FSDP", 3),
    Layout("FSDP", 4),
    Layout("experts spread", 4, expert=4),
    Layout("FSDP + experts over 2", 4, expert=2),
    Layout("HSDP, 2 copies", 4, replicate=2),
)


def batch(subject: Subject) -> Batch:
    """Full rows of random tokens, four documents each."""
    generator = torch.Generator().manual_seed(0)
    length = subject.row_length // 4
    size = (4 * subject.rows, length)
    rows = torch.randint(subject.architecture.vocab_size, size, generator=generator).tolist()
    return pack([Document(row, length // 4) for row in rows], subject.row_length)


def measure(names: list[str], layouts: list[Layout]) -> list[Seen]:
    """On one rank: every layout of every subject."""
    torch.set_num_threads(1)
    with open_ranks("cpu", grouped=layouts[0].world > 1) as ranks:
        return [measure_one(SUBJECTS[name], layout, ranks) for name in names for layout in layouts]


def measure_one(subject: Subject, layout: Layout, ranks: Ranks) -> Seen:
    """Time steps, then watch one more."""
    step = stepper(model := sharded(subject, layout, ranks), subject, layout, ranks)
    losses, seconds = [], []
    for number in range(1 + STEPS):
        ranks.wait()
        began = time.perf_counter()
        losses.append(step(number))
        seconds.append(time.perf_counter() - began)
    choices = ChoicesElsewhere(model)
    before = _quiet_loopback(ranks)
    with Traffic() as traffic:
        step(1 + STEPS)
    wire = _quiet_loopback(ranks) - before
    return Seen(losses, seconds[1:], traffic.sent(), minimum(layout, model.architecture, choices.count), wire)


def sharded(subject: Subject, layout: Layout, ranks: Ranks) -> Model:
    model = unfilled(subject.architecture)
    if ranks.grouped:
        distribute(model, ranks, layout.section, torch.float32)
    materialise(model, ranks.device)
    initialise(model, 0)
    return model


def stepper(model: Model, subject: Subject, layout: Layout, ranks: Ranks) -> Callable[[int], float]:
    """A function that trains one step on this rank's rows and returns the loss."""
    optimizer = Optimizer(model, SECTION.optimizer, SECTION.steps, ranks, layout.replicate)
    rows = batch(subject).select(range(ranks.rank, subject.rows, ranks.world))
    return lambda number: train_step(model, optimizer, rows, SECTION, number, ranks)[0].loss


def _quiet_loopback(ranks: Ranks) -> int:
    """The loopback's bytes while no rank sends."""
    ranks.wait()
    time.sleep(0.2)
    found = loopback_bytes()
    ranks.wait()
    return found


class ChoicesElsewhere:
    """Counts the choices of experts that are not on this rank, as the routers make them."""

    def __init__(self, model: nn.Module):
        self.count = 0
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                self._watch(module.gate, module.experts)

    def _watch(self, gate: nn.Module, experts: Experts) -> None:
        size = experts.gate_up.shape[0]

        def note(_module: nn.Module, _inputs: Any, routing: Routing) -> None:
            here = (routing.experts >= experts.first) & (routing.experts < experts.first + size)
            self.count += int((~here).sum())

        gate.register_forward_hook(note)


def minimum(layout: Layout, architecture: ModelSection, choices_elsewhere: int) -> dict[str, float]:
    """Bytes that a rank sends at least in a step, by kind, as derived above."""
    assert isinstance(architecture, DeepseekSection)
    world, copies, spread = layout.world, layout.replicate, layout.expert
    shards = world // copies
    layers, outside, experts = parameter_bytes(architecture)
    moe_layers = architecture.num_hidden_layers - architecture.first_k_dense_replace
    moe_layers += architecture.num_nextn_predict_layers
    scalars = 8 + 4 * (4 + 3 + moe_layers * architecture.n_routed_experts + 1)
    counts = 8 * architecture.n_routed_experts * moe_layers
    return {
        ALL_GATHER: _others(shards) * (2 * layers + outside) + _others(shards // spread) * 2 * experts / spread,
        REDUCE_SCATTER: _others(shards) * (layers + outside) + _others(shards // spread) * experts / spread,
        ALL_REDUCE: 2 * _others(copies) * (layers + outside + experts) / shards + 2 * _others(world) * scalars,
        ALL_TO_ALL: 4 * choices_elsewhere * 4 * architecture.hidden_size + _others(spread) * counts,
    }


def _others(size: int) -> float:
    """The share of a whole that the other members of a group of this size hold."""
    return (size - 1) / size


def parameter_bytes(architecture: ModelSection) -> tuple[int, int, int]:
    """Of all parameters in fp32: (in layers without the routed experts, outside of layers, routed experts)."""
    layers = outside = experts = 0
    for name, parameter in unfilled(architecture).named_parameters():
        if ".mlp.experts." in name:
            experts += 4 * parameter.numel()
        elif name.startswith("model.layers."):
            layers += 4 * parameter.numel()
        else:
            outside += 4 * parameter.numel()
    return layers, outside, experts


def launch(names: list[str], layouts: list[Layout]) -> dict[tuple[str, Layout], list[Seen]]:
    """What each rank saw, for layouts of one world."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=layouts[0].world,
        max_restarts=0,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="scaling",
    )
    found = elastic_launch(config, measure)(names, layouts)
    by_subject = zip(*(found[rank] for rank in range(layouts[0].world)), strict=True)
    return dict(zip(((name, layout) for name in names for layout in layouts), map(list, by_subject), strict=True))


def summary(layout: Layout, everyone: list[Seen], tokens: int) -> dict[str, Any]:
    """A step takes as long as its slowest rank; the best step counts."""
    seconds = min(max(times) for times in zip(*(seen.seconds for seen in everyone), strict=True))
    world = len(everyone)
    sent = {kind: sum(seen.sent.get(kind, 0.0) for seen in everyone) / world for kind in KINDS}
    least = {kind: sum(seen.minimum[kind] for seen in everyone) / world for kind in KINDS}
    return {
        **asdict(layout),
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "losses": everyone[0].losses,
        "sent_bytes": sent,
        "minimum_bytes": least,
        "wire_bytes": everyone[0].wire / world if world > 1 else 0.0,
        "sent_per_minimum": sum(sent.values()) / sum(least.values()) if world > 1 else None,
    }


def scale(names: list[str], cores: int) -> dict[str, list[dict[str, Any]]]:
    """Measure and print, world by world."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for world in sorted({layout.world for layout in LAYOUTS}):
        found = launch(names, [layout for layout in LAYOUTS if layout.world == world])
        for (name, layout), everyone in found.items():
            rows = results[name]
            rows.append(summary(layout, everyone, SUBJECTS[name].tokens))
            rows[-1]["speed_up"] = rows[0]["seconds"] / rows[-1]["seconds"]
            rows[-1]["most"] = min(world, cores)
            _check_losses(rows[-1]["losses"], rows[0]["losses"])
    return results


def show(name: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{name}: {SUBJECTS[name].tokens:,} tokens a step; MB are what a rank sends in a step")
    print(
        f"{'layout':22} {'ranks':>5} {'s/step':>7} {'tokens/s':>8} {'speed-up':>8} {'at most':>7}  "
        + " ".join(f"{kind:>{len(kind)}}" for kind in KINDS)
        + f" {'all MB':>8} {'minimum':>8} {'ratio':>6} {'wire':>7}"
    )
    for row in rows:
        _print(row)


def _print(row: dict[str, Any]) -> None:
    sent, least, ratio = row["sent_bytes"], row["minimum_bytes"], row["sent_per_minimum"]
    print(
        f"{row['name']:22} {row['world']:>5} {row['seconds']:>7.3f} {row['tokens_per_s']:>8,.0f} "
        f"{row['speed_up']:>7.2f}x {row['most']:>6}x  "
        + " ".join(f"{sent[kind] / 1e6:>{len(kind)}.2f}" for kind in KINDS)
        + f" {sum(sent.values()) / 1e6:>8.2f} {sum(least.values()) / 1e6:>8.2f} "
        + f"{'-' if ratio is None else f'{ratio:.3f}':>6} {row['wire_bytes'] / 1e6:>7.2f}"
    )


def _check_losses(found: list[float], expected: list[float]) -> None:
    """Of two steps; later a choice of experts that was all but a tie may have gone the other way."""
    worst = max(abs(a - b) for a, b in zip(found[:2], expected[:2], strict=True))
    assert worst < 1e-5, f"the losses differ from those of one process by {worst}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores: no layout can be more than {cores} times as fast as one process")
    results = scale(options.models, cores)
    for name, rows in results.items():
        show(name, rows)
    store("scaling", {"usable_cores": cores, "steps": STEPS, "models": results})


if __name__ == "__main__":
    main()
