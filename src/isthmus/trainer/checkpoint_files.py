"""What a checkpoint is on the disk: safetensors files, and a manifest with the place and the hash of every tensor.

These are storage plug-ins of torch.distributed.checkpoint. They take the place of its file system storage, whose
metadata is a pickle: here the metadata is JSON, the tensors are safetensors, and nothing is ever unpickled. A tensor
that was sharded when it was saved is stored in chunks, and each chunk has its own hash.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from isthmus.errors import DamagedFile
from isthmus.model.digest import tensor_sha256
from isthmus.run import sha256_file

MANIFEST = "manifest.json"
PARTS = ("model", "optimizer")


class StoredChunk(BaseModel):
    """A box of a tensor: where it starts, its extent, the file that holds it, and `tensor_sha256` of its values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(pattern=r"^(model|optimizer)-\d{5,}\.safetensors$")
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    sha256: str

    def stored_name(self, name: str, tensor_shape: tuple[int, ...]) -> str:
        """Its name in the file: the tensor's, with the offset if this is not the whole tensor."""
        return name if self.shape == tensor_shape else f"{name}@{','.join(map(str, self.offset))}"


class StoredTensor(BaseModel):
    """A tensor: its type, its whole shape, and the chunks that it was saved in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    shape: tuple[int, ...]
    chunks: list[StoredChunk]

    @field_validator("dtype")
    @classmethod
    def _known(cls, name: str) -> str:
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(f"torch {torch.__version__} has no type {name!r}")
        return name

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Manifest(BaseModel):
    """All that is known of a checkpoint. The keys of `tensors` are `model/<name>` and `optimizer/<name>`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    torch: str
    world_size: int
    extra: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def of_part(self, part: str) -> Manifest:
        """The same with the tensors of one part alone."""
        return self.model_copy(update={"tensors": {k: v for k, v in self.tensors.items() if split_key(k)[0] == part}})

    @property
    def files(self) -> list[str]:
        """The names of the files with tensors, sorted."""
        return sorted({chunk.file for tensor in self.tensors.values() for chunk in tensor.chunks})


def split_key(key: str) -> tuple[str, str]:
    """The part and the name in a key of `Manifest.tensors`."""
    part, _, name = key.partition("/")
    return part, name


def folders(root: Path) -> list[Path]:
    """The checkpoints under `root`, the oldest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if re.fullmatch(r"step-\d{6,}", path.name)), key=folder_step)


def folder_step(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Write the manifest with a hash of its own content. Returns the SHA-256 of the file."""
    content = manifest.model_dump(mode="json")
    (folder / MANIFEST).write_text(_text(content), encoding="utf-8")
    return sha256_file(folder / MANIFEST)


def read_manifest(folder: Path, sha256: str | None = None) -> tuple[Manifest, str]:
    """The manifest of a checkpoint and the SHA-256 of its file, which must be `sha256` if that is given.

    Raises DamagedFile if it is missing, is another one, cannot be read, or does not match the hash in itself.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DamagedFile(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read ({error})") from None
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise DamagedFile(f"{path} is not the one that was recorded: it has another SHA-256")
    try:
        stored = json.loads(content)
        if _text(stored["manifest"]).encode() != content:
            raise DamagedFile(f"{path} does not match its hash")
        return Manifest.model_validate(stored["manifest"]), found
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        raise DamagedFile(f"{path} cannot be read ({type(error).__name__}: {error})") from None


def _text(content: Any) -> str:
    return json.dumps({"sha256": _content_sha256(content), "manifest": content}, sort_keys=True, indent=1)


def _content_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify_file(folder: Path, manifest: Manifest, file: str) -> None:
    """Compare the tensors in a file with the manifest. Raises DamagedFile that names the first that differs."""
    expected = {
        chunk.stored_name(split_key(key)[1], tensor.shape): chunk
        for key, tensor in manifest.tensors.items()
        for chunk in tensor.chunks
        if chunk.file == file
    }
    with _opened(folder / file) as stored:
        if disputed := sorted(expected.keys() ^ set(stored.keys())):
            raise DamagedFile(f"{folder / file} and {MANIFEST} disagree about the tensor {disputed[0]!r}")
        for name, chunk in expected.items():
            if tensor_sha256(stored.get_tensor(name)) != chunk.sha256:
                raise DamagedFile(f"{folder / file}: the tensor {name!r} does not match its hash")


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DamagedFile(f"{path} cannot be read ({error})") from None


@dataclass(frozen=True)
class _Place:
    """Where a rank writes: the folder under its temporary name, and the rank's number."""

    folder: Path
    rank: int


class CheckpointFilesWriter(StorageWriter):
    """Storage for torch.distributed.checkpoint.save: each rank writes, flushes and hashes its part.

    `folder` is one that exists; the first rank's counts. A disk that fails does not end the save, in which a rank that
    raises can leave others waiting: the error is kept, and `raise_failure` raises it afterwards.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._failure: Exception | None = None

    def raise_failure(self) -> None:
        """Raise the OSError that kept this rank from writing its part, if there was one."""
        if self._failure is not None:
            raise self._failure

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        if checkpoint_id is not None:
            self.folder = Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is set up before the plans of all ranks are known."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank: tell every rank its place."""
        return [replace(plan, storage_data=_Place(self.folder, rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written: list[WriteResult] = []
        try:
            for part in PARTS:
                items = [item for item in plan.items if split_key(item.index.fqn)[0] == part]
                if items:
                    written += _write_items(plan.storage_data, part, items, planner)
        except OSError as error:
            self._failure = error
        done: Future[list[WriteResult]] = Future()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank: note what all ranks have written."""
        chunks: dict[str, list[StoredChunk]] = {}
        for result in (one for of_rank in results for one in of_rank):
            chunks.setdefault(result.index.fqn, []).append(result.storage_data)
        self.tensors = {
            key: _stored_tensor(stored, chunks.get(key, []))
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return Path(checkpoint_id).is_dir()


def _write_items(place: _Place, part: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    """Write tensors to one file and flush it; the results carry their chunks."""
    file = f"{part}-{place.rank:05d}.safetensors"
    content: dict[str, Tensor] = {}
    results = []
    for item in items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor) and item.tensor_data is not None and item.index.offset is not None
        offset, shape = tuple(item.index.offset), tuple(tensor.shape)
        chunk = StoredChunk(file=file, offset=offset, shape=shape, sha256=tensor_sha256(tensor))
        content[chunk.stored_name(split_key(item.index.fqn)[1], tuple(item.tensor_data.size))] = tensor
        results.append(WriteResult(item.index, tensor.nbytes, chunk))
    _save_tensors(place.folder / file, content)
    return results


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file and flush it; a failure of the disk comes out as the OSError that it is."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _stored_tensor(stored: TensorStorageMetadata, chunks: list[StoredChunk]) -> StoredTensor:
    dtype = str(stored.properties.dtype).removeprefix("torch.")
    return StoredTensor(dtype=dtype, shape=tuple(stored.size), chunks=sorted(chunks, key=lambda chunk: chunk.offset))


class CheckpointFilesReader(StorageReader):
    """Storage for loading with a planner of torch.distributed.checkpoint: it reads slices of what the plan asks for.

    It does not verify: `verify_file` does.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._places: dict[MetadataIndex, tuple[str, str]] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        if checkpoint_id is not None:
            self.folder = Path(checkpoint_id)
            self.manifest, _ = read_manifest(self.folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({key: _tensor_metadata(tensor) for key, tensor in self.manifest.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Note for each chunk the file that holds it and its name there."""
        self._places = {
            MetadataIndex(key, chunk.offset): (chunk.file, chunk.stored_name(split_key(key)[1], tensor.shape))
            for key, tensor in self.manifest.tensors.items()
            for chunk in tensor.chunks
        }

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[ReadItem, str]]] = {}
        for item in plan.items:
            file, stored_name = self._places[item.storage_index]
            by_file.setdefault(file, []).append((item, stored_name))
        for file, wanted in by_file.items():
            with _opened(self.folder / file) as stored:
                for item, stored_name in wanted:
                    _read_item(stored, stored_name, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return (Path(checkpoint_id) / MANIFEST).is_file()


def _read_item(stored: safe_open, stored_name: str, item: ReadItem, planner: LoadPlanner) -> None:
    """Copy a box of a stored chunk into the tensor that the plan names."""
    target = planner.resolve_tensor(item).detach()
    if item.lengths:
        ranges = zip(item.storage_offsets, item.lengths, strict=True)
        values = stored.get_slice(stored_name)[tuple(slice(start, start + length) for start, length in ranges)]
    else:
        values = stored.get_tensor(stored_name)
    target.copy_(values)
    planner.commit_tensor(item, target)


def _tensor_metadata(tensor: StoredTensor) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)) for chunk in tensor.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=tensor.torch_dtype), torch.Size(tensor.shape), chunks)
