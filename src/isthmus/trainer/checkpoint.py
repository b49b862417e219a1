"""Checkpoints that are verified by hash when they are loaded.

A checkpoint is a folder `step-000123` with safetensors files and a manifest that holds the hash of every tensor. It is
written under a temporary name and renamed when all of it is on the disk, so a folder with the final name is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.errors import DamagedFile
from isthmus.model.digest import tensor_sha256
from isthmus.run import new_folder, sha256_file

MANIFEST = "manifest.json"
_PARTS = ("model", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """A stored state: model tensors under their published names, optimiser tensors, and the finished steps."""

    folder: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    sha256: str


def save_checkpoint(
    root: Path, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], keep: int
) -> tuple[Path, str]:
    """Write `root/step-<step>` and delete all but the newest `keep`. Returns the folder and its manifest's SHA-256."""
    folder = root / f"step-{step:06d}"
    _remove_leftovers(root)
    with new_folder(folder) as new:
        _write_parts(new, step, {"model": model, "optimizer": optimizer})
    for old in _folders(root)[:-keep]:
        shutil.rmtree(old)
    return folder, sha256_file(folder / MANIFEST)


def load_latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint under `root`, verified; None if there is none. Raises DamagedFile as `load_checkpoint`."""
    folders = _folders(root)
    return load_checkpoint(folders[-1]) if folders else None


def load_checkpoint(folder: Path, sha256: str | None = None) -> Checkpoint:
    """Read and verify a checkpoint; `sha256` is that of its manifest. Raises DamagedFile naming what does not match."""
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        raise DamagedFile(f"{folder} is not a checkpoint: it has no {MANIFEST}")
    found = sha256_file(manifest_path)
    if sha256 is not None and found != sha256:
        raise DamagedFile(f"{manifest_path} is not the one that was recorded: {_advice(folder)}")
    try:
        manifest = json.loads(manifest_path.read_bytes())
        hashes, step = manifest["tensors"], manifest["step"]
    except (ValueError, KeyError) as error:
        raise DamagedFile(f"{manifest_path} cannot be read ({error}): {_advice(folder)}") from None
    parts = {part: _read_part(folder, part, hashes[part]) for part in _PARTS}
    return Checkpoint(folder, step, parts["model"], parts["optimizer"], found)


def load_model_state(folder: Path, sha256: str) -> dict[str, Tensor]:
    """The model tensors of a checkpoint, verified against the manifest hash that a record holds."""
    return load_checkpoint(folder, sha256).model


def _write_parts(folder: Path, step: int, parts: dict[str, dict[str, Tensor]]) -> None:
    hashes = {}
    for part, tensors in parts.items():
        plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        hashes[part] = {name: tensor_sha256(tensor) for name, tensor in plain.items()}
        _save_tensors(folder / f"{part}.safetensors", {name: tensor.clone() for name, tensor in plain.items()})
    manifest = {"step": step, "torch": torch.__version__, "tensors": hashes}
    (folder / MANIFEST).write_text(json.dumps(manifest, sort_keys=True, indent=1), encoding="utf-8")


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file; a failure of the disk comes out as the OSError that it is."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), str(error)) from error
        raise


def _read_part(folder: Path, part: str, hashes: dict[str, str]) -> dict[str, Tensor]:
    path = folder / f"{part}.safetensors"
    try:
        tensors = load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise DamagedFile(f"{path} cannot be read ({error}): {_advice(folder)}") from None
    if missing := sorted(hashes.keys() ^ tensors.keys()):
        raise DamagedFile(f"{path} and its manifest disagree about the tensor {missing[0]!r}: {_advice(folder)}")
    for name, tensor in tensors.items():
        if tensor_sha256(tensor) != hashes[name]:
            raise DamagedFile(f"{path}: the tensor {name!r} does not match its hash: {_advice(folder)}")
    return tensors


def _advice(folder: Path) -> str:
    older = [other for other in _folders(folder.parent) if other.name < folder.name]
    where = f"from {older[-1].name}" if older else "this stage from its beginning"
    return f"the checkpoint is damaged. Delete {folder} and run the same command to continue {where}."


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if re.fullmatch(r"step-\d{6,}", path.name))


def _remove_leftovers(root: Path) -> None:
    for leftover in root.glob(".step-*"):
        shutil.rmtree(leftover)
