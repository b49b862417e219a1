"""A rank's part of the soak: real training steps of this run's own model, saves and known answers among them.

What a rank sees is returned to its supervisor, which judges it. Ranks train as a step does: sharded by FSDP2.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from isthmus.data.corpus import run_tokenizer, sft_documents
from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats.parts.assemble import unfilled
from isthmus.launch.crew_rank import Rank
from isthmus.model.digest import tensor_sha256
from isthmus.model.model import Model
from isthmus.probes.cases.first_difference import first_difference, keep_operator
from isthmus.probes.portable import known_answers, training
from isthmus.recipe.practice import taught
from isthmus.recipe.schema import Recipe, TrainSection, layout_problem
from isthmus.run import RunFolder
from isthmus.tasks import load_tasks, seeded, tasks_of
from isthmus.trainer.batch import Batch, pack
from isthmus.trainer.checkpoint import CheckpointWriter, TrainingState, load_latest, rng_state
from isthmus.trainer.checkpoint_files import folders
from isthmus.trainer.mesh import PATIENCE, Ranks
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.parallel import distribute, materialise
from isthmus.trainer.parts import initialise, model_state, parts_of
from isthmus.trainer.step import accumulate_gradients, update_router_bias

_STATM = Path("/proc/self/statm")
_FILE_OF_RANK = re.compile(r"(?:model|optimizer)-(\d{5,})\.safetensors")
KNOWN_SIZE = 64
PACE_SLICES = 12


@dataclass
class Seen:
    """What one rank saw, in JSON. Lists have one value per step; a number that is not finite is None.

    `stopped` is the step at which a loss or a gradient was not finite, `bad_here` whether this rank's own activations
    or their gradients were so. `repeats` counts steps computed twice, `differing` those that gave two results,
    `differing_here` those where already this rank's activations did. `operator` is the one that gave two results for
    equal inputs, if it did so again, and `kept` the folder of its case. `pace` has one value per round: the seconds of
    a small piece of work that is the same on all ranks. `damaged` are messages about saves.
    `layout` says how the ranks divided the model.
    """

    losses: list[float | None] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    on_device: list[int] = field(default_factory=list)
    stopped: int | None = None
    bad_here: bool = False
    repeats: int = 0
    differing: int = 0
    differing_here: int = 0
    operator: str | None = None
    kept: str | None = None
    layout: str = "as [train] says"
    known: int = 0
    wrong: list[str] = field(default_factory=list)
    pace: list[float] = field(default_factory=list)
    saves_s: list[float] = field(default_factory=list)
    loads_s: list[float] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    damaged_by: list[int] = field(default_factory=list)
    seconds: float = 0.0


def ready(rank: Rank) -> int:
    """Answers when the trainer is loaded, an optimiser's code included: that can take long, without a sign of life."""
    value = nn.Parameter(torch.zeros(1))
    value.grad = torch.zeros(1)
    torch.optim.AdamW([value]).step()
    return rank.rank


def soak(
    rank: Rank,
    run: str,
    pool: str,
    folder: str,
    seconds: float,
    round_steps: int = 4,
    least_rounds: int = 2,
    save_every: int = 1,
    planted: Sequence[str] = (),
    horizon: int | None = None,
) -> dict[str, Any]:
    """Train in rounds of `round_steps` steps for about `seconds`, at least `least_rounds` rounds.

    After the steps of a round one is computed twice, known answers are computed, the pace is taken, and every
    `save_every` rounds the state is saved under `folder`, read back from the disk and verified. `run` is the run's
    folder, `pool` the pool's name in its recipe, `planted` the faults of its ranks, for a case. After every `horizon`
    steps, if that is given, training starts anew: a recipe whose own numbers do not last is soaked for as long as any.
    Returns `Seen`.
    """
    began = time.monotonic()
    work = _Work(rank, RunFolder.open(Path(run)), pool, Path(folder), planted, horizon)
    step, rounds = 0, 0
    started = time.monotonic()
    go_on = True
    with training.deterministic(rank.device):
        while go_on:
            for _ in range(round_steps):
                work.step(step)
                step += 1
                if work.seen.stopped is not None:
                    break
            if work.seen.stopped is not None:
                break
            work.twice(step - 1)
            work.known_answers(rounds)
            work.pace()
            rounds += 1
            if rounds % save_every == 0:
                work.save(step)
            enough = rounds >= least_rounds and time.monotonic() - started >= seconds
            go_on = work.agree(not enough)
    work.close()
    work.seen.seconds = time.monotonic() - began
    return vars(work.seen)


def steps_again(rank: Rank, run: str, pool: str, folder: str, steps: int, horizon: int | None = None) -> dict[str, Any]:
    """The first steps of a soak and nothing else, for a chip that is trusted. Returns `Seen`."""
    work = _Work(rank, RunFolder.open(Path(run)), pool, Path(folder), (), horizon)
    with training.deterministic(rank.device):
        for step in range(steps):
            work.step(step)
            if work.seen.stopped is not None:
                break
    work.close()
    return vars(work.seen)


class _Work:
    """The model, its data and its optimiser on one rank, and what was seen."""

    def __init__(
        self, rank: Rank, run: RunFolder, pool: str, folder: Path, planted: Sequence[str], horizon: int | None
    ):
        self.rank, self.run, self.recipe, self.pool, self.planted = rank, run, run.recipe, pool, planted
        self.horizon = horizon
        self.seen = Seen()
        rank.beat("building the model")
        grouped = rank.world > 1
        storage = dist.new_group(backend="gloo", timeout=PATIENCE) if grouped else None
        assert storage is None or isinstance(storage, dist.ProcessGroup)
        self.ranks = Ranks(rank.rank, rank.world, rank.device, grouped=grouped, storage=storage)
        self.section = _layout(self.recipe, rank.world)
        if self.section != self.recipe.train:
            self.seen.layout = f"in another layout, for [train] does not divide {rank.world} ranks"
        tasks = load_tasks(self.recipe)
        self.text = taught(self.recipe)
        self.tasks = tasks_of(self.recipe, self.text, tasks)
        self.tokenizer = run_tokenizer(run, list(tasks.values()))
        with ThreadPoolExecutor(max_workers=1) as host:
            self.model = host.submit(_model, self.recipe, self.ranks, self.section).result()
        self.optimizer = self._optimizer()
        self.folder = folder
        self.writer = CheckpointWriter(folder, 1, storage)
        self.watch = LocalWatch(self.model)

    def _optimizer(self) -> Optimizer:
        sft = self.text
        return Optimizer(self.model, sft.optimizer, sft.steps, self.ranks, self.section.replicate)

    def _at(self, step: int) -> int:
        """The step of training that a step of the soak is."""
        return step % self.horizon if self.horizon else step

    def batch(self, step: int) -> Batch:
        """This rank's rows of the worked examples of a step of training."""
        chance, size = seeded(self.text.kind, self.recipe.seed, step), self.text.batch_size
        documents = sft_documents(self.tasks, self.tokenizer, self.recipe.model, size, chance)
        whole = pack(documents, None, multiple_of=self.ranks.world)
        return whole.select(range(self.ranks.rank, len(whole.tokens), self.ranks.world))

    def step(self, step: int) -> None:
        """One step of supervised training, as `train_step`, which it leaves out if a number is not finite."""
        at = self._at(step)
        if step and not at:
            initialise(self.model, self.recipe.seed)
            self.optimizer = self._optimizer()
        batch = self.batch(at)
        self.rank.beat("soak step", step)
        began, cpu = time.perf_counter(), time.process_time()
        self.watch.begin(hashing=False)
        losses = accumulate_gradients(
            self.model, self.optimizer, batch, self.text, self.ranks, self.recipe.train.rows_per_microbatch
        )
        self.seen.losses.append(_finite(losses.loss))
        if self._somewhere(not (math.isfinite(losses.loss) and self._gradients_are_finite())):
            self.seen.stopped, self.seen.bad_here = step, not self.watch.is_finite
            return
        norm = self._update(at)
        if norm is None:
            self.seen.stopped = step
            return
        update_router_bias(self.model.routers(), losses.loads, self.text.bias_update_speed)
        self._finish()
        self.seen.norms.append(norm)
        self.seen.step_s.append(time.perf_counter() - began)
        self.seen.cpu_s.append(time.process_time() - cpu)
        if (resident := _resident()) is not None:
            self.seen.resident.append(resident)
        if self.rank.device.type != "cpu":
            self.seen.on_device.append(torch.accelerator.memory_allocated(self.rank.device))

    def _update(self, at: int) -> float | None:
        """The norm of all gradients, after an update; None if their squares do not fit into a number."""
        try:
            return self.optimizer.step(at)
        except IsthmusError:  # that the norm is not finite, which is the same on every rank
            return None

    def twice(self, step: int) -> None:
        """The losses and gradients of a step, computed twice from the same parameters, bit for bit."""
        batch = self.batch(self._at(step))
        found = []
        for _ in range(2):
            self.rank.beat("the same step again", step)
            self.watch.begin(hashing=True)
            accumulate_gradients(
                self.model, self.optimizer, batch, self.text, self.ranks, self.recipe.train.rows_per_microbatch
            )
            gradients = hashlib.sha256()
            for part in parts_of(self.model):
                if part.gradient is not None:
                    gradients.update(tensor_sha256(part.gradient).encode())
            found.append((self.watch.digest, gradients.hexdigest()))
        self.optimizer.zero_grad()
        self.seen.repeats += 1
        self.seen.differing_here += found[0][0] != found[1][0]
        if self._somewhere(found[0] != found[1]):
            self.seen.differing += 1
            self._blame(batch, step)

    def _blame(self, batch: Batch, step: int) -> None:
        """Look for the operator that gives two results, once, and keep it as a case. All ranks take the step again."""
        if self.seen.differing > 1:
            return

        def again() -> None:
            accumulate_gradients(
                self.model, self.optimizer, batch, self.text, self.ranks, self.recipe.train.rows_per_microbatch
            )

        self.rank.beat("looking for the operator", step)
        self.watch.begin(hashing=False)
        found = first_difference(lambda: again)
        self.optimizer.zero_grad()
        if found is not None:
            self.seen.operator = found[0].operator if found[0].kind == "result" else None
        if found is None or found[1] is None:
            return
        section = self.recipe.pools[self.pool]
        folder = self.folder.parent / "failures" / f"operator-of-rank-{self.rank.rank}"
        try:
            keep_operator(
                folder,
                *found,
                device=self.rank.device.type,
                pool=self.pool,
                chip=section.chip,
                rehearsed=section.rehearsed,
                planted=self.planted,
            )
        except ValueError:  # arguments that no file holds: the operator is named all the same
            return
        self.seen.kept = str(folder.relative_to(self.run.path))

    def known_answers(self, index: int) -> None:
        """A product with a known result and one that carries its checksum, on seeds of their own."""
        for result in (
            known_answers.products(self.rank, KNOWN_SIZE, 1, seed=index),
            known_answers.checksum(self.rank, KNOWN_SIZE, 1, seed=index),
        ):
            self.seen.known += 1
            if result["failed"]:
                self.seen.wrong.append(result["detail"])

    def pace(self) -> None:
        """How fast this rank is by itself. On a processor that others use too, the quickest piece of work counts."""
        on_cpu = self.rank.device.type == "cpu"
        size, share = (128, 0.0) if on_cpu else (2048, 0.5)
        self.seen.pace.append(training.pace(self.rank, size, PACE_SLICES, share)["pace"])

    def save(self, step: int) -> None:
        """Save, read back from the disk, verify, and load: the state must then be what it was, bit for bit."""
        self.rank.beat("save", step)
        began = time.perf_counter()
        extra = {"rng": rng_state(self.rank.device)}
        state = TrainingState(model_state(self.model), self.optimizer.state(), extra)
        before = _state_sha256(state)
        self.writer.save(step, state)
        saved = self.writer.finish()
        assert saved is not None
        self.seen.saves_s.append(time.perf_counter() - began)
        self.rank.beat("load", step)
        began = time.perf_counter()
        if self.ranks.is_first:
            _forget_cached(saved.folder)
        self.ranks.wait()
        try:
            load_latest(self.folder, state, self.ranks.storage, self.seen.damaged.append)
        except DamagedFile:
            self.seen.damaged_by += [int(rank) for rank in _FILE_OF_RANK.findall(self.seen.damaged[-1])]
            for damaged in folders(self.folder) if self.ranks.is_first else ():
                shutil.rmtree(damaged)
            self.ranks.wait()
        else:
            self.seen.loads_s.append(time.perf_counter() - began)
        if _state_sha256(state) != before:
            self.seen.damaged.append(f"rank {self.rank.rank}: what was loaded at step {step} is not what was saved")
            self.seen.damaged_by.append(self.rank.rank)

    def agree(self, go_on: bool) -> bool:
        """What the first rank decides."""
        decision = torch.tensor([go_on], dtype=torch.int64)
        if self.ranks.storage is not None:
            dist.broadcast(decision, 0, group=self.ranks.storage)
        return bool(decision)

    def close(self) -> None:
        self.watch.remove()
        if self.ranks.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _somewhere(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        flag = torch.tensor([here], dtype=torch.int32)
        if self.ranks.storage is not None:
            dist.all_reduce(flag, dist.ReduceOp.MAX, self.ranks.storage)
        return bool(flag)

    def _gradients_are_finite(self) -> bool:
        gradients = [part.gradient for part in parts_of(self.model) if part.gradient is not None]
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)

    def _finish(self) -> None:
        if self.rank.device.type != "cpu":
            torch.accelerator.synchronize(self.rank.device)


def _layout(recipe: Recipe, world: int) -> TrainSection:
    """[train] if this number of ranks divides as it says; else plain shards; else replicas."""
    choices = [recipe.train, TrainSection(precision=recipe.train.precision)]
    for section in choices:
        if layout_problem(recipe.model, section, world) is None:
            return section
    return TrainSection(precision=recipe.train.precision, replicate=world)


def _model(recipe: Recipe, ranks: Ranks, section: TrainSection) -> Model:
    """The recipe's model as its training starts, with values from the seed, sharded if there are several ranks.

    It is built in a thread of its own: that is the host's work, and the rules of a rehearsed chip hold by thread.
    """
    if ranks.device.type != "cpu":
        torch.accelerator.set_device_index(ranks.device)
    model = unfilled(recipe.model)
    precision = section.precision_on(ranks.device.type)
    if recipe.train.activation_checkpointing:
        model.recompute_activations()
    if ranks.grouped:
        distribute(model, ranks, section, torch.bfloat16 if precision == "bf16" else torch.float32)
    materialise(model, ranks.device)
    initialise(model, recipe.seed)
    return model


class LocalWatch:
    """Looks at the activations of each layer on this rank, and at their gradients, before any other rank's mix in."""

    def __init__(self, model: Model):
        self._hooks = [layer.register_forward_hook(self._saw) for layer in model.model.layers]
        self._hashing = False
        self._bad: list[Tensor] = []
        self._content = hashlib.sha256()

    def begin(self, *, hashing: bool) -> None:
        """Forget what was seen."""
        self._hashing, self._bad, self._content = hashing, [], hashlib.sha256()

    @property
    def is_finite(self) -> bool:
        return not any(bool(bad) for bad in self._bad)

    @property
    def digest(self) -> str:
        return self._content.hexdigest()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _saw(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._look(output)
            if output.requires_grad:
                output.register_hook(self._look)

    def _look(self, values: Tensor) -> None:
        values = values.detach()
        if self._hashing:
            self._content.update(tensor_sha256(values).encode())
        else:
            self._bad.append(~torch.isfinite(values).all())


def _state_sha256(state: TrainingState) -> str:
    """A hash of what this rank holds of a state."""
    content = hashlib.sha256()
    for key, tensor in sorted(state.keyed.items()):
        local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
        content.update(key.encode())
        content.update(tensor_sha256(local() if local is not None else tensor).encode())
    return content.hexdigest()


def _forget_cached(folder: Path) -> None:
    """Drop the pages of written files from the memory of the system, so that they are read from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident() -> int | None:
    """Bytes of this process that are in memory; None where nothing tells it."""
    if not _STATM.is_file():
        return None
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
