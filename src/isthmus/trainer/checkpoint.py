"""Checkpoints: written in the background, verified by hash when they are loaded, and free to move between worlds.

`torch.distributed.checkpoint` plans who writes and who reads which part of which tensor; `checkpoint_files` is its
storage. A checkpoint is a folder `step-000123`. It is written under a temporary name and renamed when every rank has
reported that its part is on the disk, so a folder with the final name is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from rich.markup import escape
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.utils import find_state_dict_object

from isthmus.errors import DamagedFile, IsthmusError, SaveFailed
from isthmus.run import explain_io_errors, new_folder
from isthmus.trainer.checkpoint_files import (
    CheckpointFilesReader,
    CheckpointFilesWriter,
    Manifest,
    folder_step,
    folders,
    read_manifest,
    split_key,
    verify_file,
    write_manifest,
)

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingState:
    """What a training stage needs to go on.

    `model` has published names, `optimizer` the names of `Optimizer.state`. A tensor is whole or a DTensor. Ranks may
    have different names (experts); a whole tensor that several ranks have is the same on all of them. `extra` is JSON:
    the position in the data, the schedule, random states; that of rank 0 is stored.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    extra: dict[str, Any]

    @property
    def keyed(self) -> dict[str, Tensor]:
        """All tensors, by the keys of a manifest."""
        parts = {"model": self.model, "optimizer": self.optimizer}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is on the disk; `sha256` is that of its manifest, which holds the hashes of all else."""

    folder: Path
    step: int
    sha256: str


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was verified and loaded; `torch` is the version that wrote it."""

    folder: Path
    step: int
    extra: dict[str, Any]
    sha256: str
    torch: str


class CheckpointWriter:
    """Writes checkpoints under `root` in the background and keeps the newest `keep`.

    `group` is a group of all ranks on the CPU that nothing else uses, because the background thread speaks through it;
    None means a single process. Every rank makes the same calls.
    """

    def __init__(self, root: Path, keep: int, group: ProcessGroup | None):
        self.root, self.keep, self.group = root, keep, group
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[SavedCheckpoint] | None = None
        self._last: SavedCheckpoint | None = None

    def save(self, step: int, state: TrainingState) -> None:
        """Copy the state to host memory and write it as `root/step-<step>` in the background.

        Waits first for a write that is still going on and raises its error, as `finish`.
        """
        self.finish()
        extra = json.loads(json.dumps(state.extra, allow_nan=False))
        self._pending = self._background.submit(self._write, step, extra, _HostCopy(state.keyed))

    def finish(self) -> SavedCheckpoint | None:
        """Wait until the last state is on the disk; None if there was none.

        Raises on every rank what went wrong on any: SaveFailed if the disk is full or may not be written. Older
        checkpoints then stay as they were.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                self._last = pending.result()
            except DamagedFile:
                raise
            except IsthmusError as error:
                raise SaveFailed(str(error)) from error
        return self._last

    def _write(self, step: int, extra: dict[str, Any], planner: _HostCopy) -> SavedCheckpoint:
        folder = self.root / f"step-{step:06d}"
        rank, size = _rank_and_size(self.group)
        with explain_io_errors(folder), ExitStack() as opened:
            place = _vote(lambda: _open(folder, opened) if rank == 0 else folder, self.group)
            writer = CheckpointFilesWriter(place)
            _save(planner, writer, self.group)
            _vote(writer.raise_failure, self.group)
            manifest = Manifest(
                step=step, torch=torch.__version__, world_size=size, extra=extra, tensors=writer.tensors
            )
            sha256 = _vote(lambda: self._publish(place, manifest, opened) if rank == 0 else "", self.group)
        return SavedCheckpoint(folder, step, _gather(sha256, self.group)[0])

    def _publish(self, place: Path, manifest: Manifest, opened: ExitStack) -> str:
        """Complete the folder, give it its name, and delete old ones. Returns the SHA-256 of the manifest."""
        sha256 = write_manifest(place, manifest)
        opened.close()
        _delete_old(self.root, manifest.step, self.keep)
        return sha256


def _open(folder: Path, opened: ExitStack) -> Path:
    """Clear away what killed writers left, and make a folder that gets the name `folder` when `opened` is closed."""
    for leftover in folder.parent.glob(".step-*"):
        shutil.rmtree(leftover)
    return opened.enter_context(new_folder(folder))


def _delete_old(root: Path, step: int, keep: int) -> None:
    """Keep the newest up to `step`; later ones belong to a continuation that was damaged and given up."""
    kept = [folder for folder in folders(root) if folder_step(folder) <= step][-keep:]
    for folder in folders(root):
        if folder not in kept:
            shutil.rmtree(folder)


class _HostCopy(DefaultSavePlanner):
    """A rank's plan, and copies of its tensors in host memory: training goes on while they are written."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._plan = create_default_local_save_plan(state, is_coordinator=False)
        self._copies = {item.index: _host_copy(find_state_dict_object(state, item.index)) for item in self._plan.items}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        return self._plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._copies[index]


def _host_copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def _save(planner: _HostCopy, writer: CheckpointFilesWriter, group: ProcessGroup | None) -> None:
    """torch.distributed.checkpoint.save; alone its steps, because it warns if there is no group."""
    if group is not None:
        save({}, storage_writer=writer, planner=planner, process_group=group)
        return
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    writer.finish(metadata, [writer.write_data(plan, planner).wait()])


def load_latest(
    root: Path, state: TrainingState, group: ProcessGroup | None, damaged: Callable[[str], None]
) -> LoadedCheckpoint | None:
    """Verify the newest checkpoint under `root` and copy it into the tensors of `state`; None if there is none.

    The world that saved it may have had another size. A checkpoint that is damaged is passed over for the one before
    it, after `damaged` was called with a message on every rank. Every rank of `group` makes the same call.

    Raises DamagedFile if there are checkpoints and all are damaged, and IsthmusError that names the first tensor that
    is not the same in the checkpoint and in `state`.
    """
    messages = []
    for folder in reversed(_gather(folders(root), group)[0]):
        try:
            return load_checkpoint(folder, state, group)
        except DamagedFile as error:
            messages.append(str(error))
            damaged(str(error))
    if messages:
        raise DamagedFile(
            f"no checkpoint under {root} is whole: {'; '.join(messages)}. "
            f"Restore one, or delete {root} and run the same command to start this stage from its beginning."
        )
    return None


def load_checkpoint(folder: Path, state: TrainingState, group: ProcessGroup | None) -> LoadedCheckpoint:
    """Verify one checkpoint and copy it into the tensors of `state`. Every rank of `group` makes the same call.

    Raises DamagedFile that names what does not match, and IsthmusError if it is of another model or optimiser.
    """
    rank, size = _rank_and_size(group)
    manifest, sha256 = _vote(lambda: read_manifest(folder), group)
    _vote(lambda: _verify(folder, manifest, manifest.files[rank::size]), group)
    wanted = state.keyed
    _vote(lambda: _compare(folder, manifest, wanted), group)
    _check_nothing_is_left_out(folder, manifest, wanted, group)
    _vote(lambda: _fill(folder, manifest, wanted), group)
    return LoadedCheckpoint(folder, manifest.step, manifest.extra, sha256, manifest.torch)


def resume(
    root: Path,
    state: TrainingState,
    group: ProcessGroup | None,
    device: torch.device,
    event: Callable[..., None],
    say: Callable[[str], None],
) -> LoadedCheckpoint | None:
    """Fill `state` and the random generators as `load_latest` does; None if there is no checkpoint.

    `event` takes the name of an event and its fields, `say` a line for the user. Raises as `load_latest`.
    """

    def damaged(message: str) -> None:
        event("fallback", what=f"the checkpoint before a damaged one: {message}", why="the newest is damaged")
        say(f"  [yellow]{escape(message)}[/]; trying the one before it")

    loaded = load_latest(root, state, group, damaged)
    if loaded is None:
        return None
    if not restore_rng(loaded.extra["rng"], device):
        event("fallback", what="a new random state", why=f"{loaded.folder} was written on another kind of chip")
    if loaded.torch != torch.__version__:
        event("torch-changed", before=loaded.torch, now=torch.__version__)
    return loaded


def load_model_state(folder: Path, sha256: str) -> dict[str, Tensor]:
    """The whole model tensors of a checkpoint, under published names, verified against the hash that a record holds.

    Raises DamagedFile that names what does not match.
    """
    try:
        manifest = read_manifest(folder, sha256)[0].of_part("model")
        _verify(folder, manifest, manifest.files)
        tensors = {key: torch.empty(stored.shape, dtype=stored.torch_dtype) for key, stored in manifest.tensors.items()}
        _fill(folder, manifest, tensors)
    except DamagedFile as error:
        raise DamagedFile(f"{error}: {_advice(folder)}") from None
    return {split_key(key)[1]: tensor for key, tensor in tensors.items()}


def load_weights(folder: Path, sha256: str, model: dict[str, Tensor], group: ProcessGroup | None) -> None:
    """Copy the model of a checkpoint into tensors under published names, which may be parts of sharded ones.

    It is verified against the hash that a record holds. Every rank of `group` makes the same call.

    Raises DamagedFile that names what does not match, and IsthmusError if the checkpoint is of another model.
    """
    rank, size = _rank_and_size(group)
    wanted = {f"model/{name}": tensor for name, tensor in model.items()}
    try:
        manifest = _vote(lambda: read_manifest(folder, sha256)[0].of_part("model"), group)
        _vote(lambda: _verify(folder, manifest, manifest.files[rank::size]), group)
        _vote(lambda: _compare(folder, manifest, wanted), group)
        _check_nothing_is_left_out(folder, manifest, wanted, group)
        _vote(lambda: _fill(folder, manifest, wanted), group)
    except DamagedFile as error:
        raise DamagedFile(f"{error}: {_advice(folder)}") from None


def _advice(folder: Path) -> str:
    older = [other for other in folders(folder.parent) if folder_step(other) < folder_step(folder)]
    where = f"continues from {older[-1].name}" if older else "starts from its beginning"
    return (
        f"the checkpoint is damaged. Restore {folder}; or delete it and the record of the stage that wrote it, and run "
        f"that stage again: it {where}."
    )


def _verify(folder: Path, manifest: Manifest, files: list[str]) -> None:
    for file in files:
        verify_file(folder, manifest, file)


def _compare(folder: Path, manifest: Manifest, wanted: dict[str, Tensor]) -> None:
    """Raise IsthmusError if a tensor of this rank is not in the checkpoint, or is there with another type or shape."""
    for key, tensor in wanted.items():
        if key not in manifest.tensors:
            raise _does_not_fit(folder, key, "is not in it, and this run needs it")
        stored = manifest.tensors[key]
        there, here = _describe(stored.torch_dtype, stored.shape), _describe(tensor.dtype, tuple(tensor.shape))
        if there != here:
            raise _does_not_fit(folder, key, f"is {there} in it and {here} in this run")


def _check_nothing_is_left_out(
    folder: Path, manifest: Manifest, wanted: dict[str, Tensor], group: ProcessGroup | None
) -> None:
    """Raise IsthmusError on all ranks if the checkpoint has a tensor that no rank has."""
    keys = sorted(manifest.tensors)
    held = torch.tensor([key in wanted for key in keys], dtype=torch.uint8)
    if group is not None:
        dist.all_reduce(held, dist.ReduceOp.MAX, group)
    for key, is_held in zip(keys, held.tolist(), strict=True):
        if not is_held:
            raise _does_not_fit(folder, key, "is in it, and this run has no such tensor")


def _describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _does_not_fit(folder: Path, key: str, how: str) -> IsthmusError:
    part, name = split_key(key)
    return IsthmusError(
        f"the checkpoint {folder} is of another architecture or optimizer: the {part} tensor {name!r} {how}. "
        "Use a new run folder, or the recipe that the checkpoint was written with."
    )


def _fill(folder: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """Copy the checkpoint's values into `tensors`; a DTensor gets the part of it that this rank holds."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = CheckpointFilesReader(folder, manifest)
    metadata = reader.read_metadata()
    planner.set_up_planner(tensors, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


def _rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _gather(value: T, group: ProcessGroup | None) -> list[T]:
    """The values of all ranks."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def _vote(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """Do work on every rank. If it raises an IsthmusError or OSError on one, all raise that of the first rank."""
    outcome: T | IsthmusError | OSError
    try:
        outcome = work()
    except (IsthmusError, OSError) as error:
        outcome = error
    for failure in _gather(outcome if isinstance(outcome, IsthmusError | OSError) else None, group):
        if failure is not None:
            raise failure
    assert not isinstance(outcome, IsthmusError | OSError)
    return outcome


def rng_state(device: torch.device) -> dict[str, str]:
    """The states of torch's random generators as hexadecimal text: the CPU's, and that of `device` if it is another."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        with torch.accelerator.device_index(device.index):
            states[device.type] = torch.get_device_module(device).get_rng_state()
    return {kind: state.numpy().tobytes().hex() for kind, state in states.items()}


def restore_rng(states: dict[str, str], device: torch.device) -> bool:
    """Set the generators to what `rng_state` gave; False if it was taken on another kind of device than `device`."""
    tensors = {kind: torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8) for kind, state in states.items()}
    torch.set_rng_state(tensors["cpu"])
    if device.type not in tensors:
        return False
    if device.type != "cpu":
        with torch.accelerator.device_index(device.index):
            torch.get_device_module(device).set_rng_state(tensors[device.type])
    return True
