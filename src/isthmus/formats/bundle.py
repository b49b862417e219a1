"""A bundle: a folder in Hugging Face layout that transformers, vLLM and SGLang load, with a hash for each of its files.

The copies of the embedding and of the output head that published DeepSeek checkpoints keep in their MTP layer are
written, and dropped when read, after checking that they equal the shared tensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import DESCRIPTION, MODELSLIM, Format, get_format, recognise_format
from isthmus.formats.calibration import Calibration
from isthmus.formats.published import (
    CONFIG,
    INDEX,
    SHARD_BYTES,
    WEIGHTS,
    StoredTensors,
    mtp_copies,
    shown,
    weight_files,
    write_tensors,
)
from isthmus.model.config import hf_config
from isthmus.model.model import Model
from isthmus.recipe import ModelSection, RecipeError, architecture_from_config, parse_architecture
from isthmus.run import new_folder, sha256_file, write_atomic

CHECKSUMS, SEAL = "checksums.json", "seal.json"


class TokenizerFiles(Protocol):
    """What a bundle needs of a tokenizer."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int: ...

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory: `tensors` as stored, without the MTP layer's copies."""

    folder: Path
    format: str
    architecture: ModelSection
    tensors: dict[str, Tensor]

    def build(self) -> Model:
        """A model that computes on the CPU with the numerics of the format."""
        return get_format(self.format).build(self.architecture, self.tensors)


def write_bundle(
    folder: Path,
    format_name: str,
    state: dict[str, Tensor],
    architecture: ModelSection,
    tokenizer: TokenizerFiles,
    shard_bytes: int = SHARD_BYTES,
    calibration: Calibration | None = None,
    refine: Callable[[dict[str, Tensor]], None] = lambda _stored: None,
) -> None:
    """Write `state` (fp32, published names) as a bundle. A reader sees the whole folder or none of it.

    Weights of more than `shard_bytes` are written as several files and an index. An existing bundle at `folder` is
    replaced. generation_config.json holds no sampling defaults: an engine that read them (vLLM does) would sample from
    another distribution than the one it is asked for. `refine` may change the values of the stored tensors.
    """
    chosen = get_format(format_name)
    tensors = chosen.export(state, architecture, calibration)
    refine(tensors)
    _compare_with_layout(folder, chosen, architecture, tensors)
    config = hf_config(architecture, dtype=chosen.dtype, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    quantization = chosen.quantization_config(architecture)
    if quantization is not None:
        config["quantization_config"] = quantization
    token_ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    with new_folder(folder) as new:
        _write_weights(new, tensors, architecture, shard_bytes)
        write_atomic(new / CONFIG, _json(config))
        write_atomic(new / "generation_config.json", _json(token_ids))
        for name, content in chosen.extra_files(architecture).items():
            write_atomic(new / name, content)
        tokenizer.save(new)
        write_atomic(new / CHECKSUMS, _json(file_hashes(new)))


def with_other_weights(folder: Path, source: Path, tensors: dict[str, Tensor]) -> None:
    """Write at `folder` the bundle `source` with other tensors of the same format, as `Format.export` gives them.

    Raises IsthmusError if `source` is no bundle, DamagedFile if the tensors do not fit its architecture.
    """
    if not (source / CONFIG).is_file():
        raise IsthmusError(f"{source} is not a bundle: it has no {CONFIG}")
    config = read_config(source)
    architecture = _architecture(source, config)
    _compare_with_layout(folder, recognise_format(config), architecture, tensors)
    replaced = {CHECKSUMS, SEAL, INDEX, *(path.name for path in weight_files(source))}
    with new_folder(folder) as new:
        for path in source.iterdir():
            if path.is_file() and path.name not in replaced:
                shutil.copyfile(path, new / path.name)
        _write_weights(new, tensors, architecture, SHARD_BYTES)
        write_atomic(new / CHECKSUMS, _json(file_hashes(new)))


def read_bundle(folder: Path, *, check_files: bool = True) -> Bundle:
    """Read a bundle, checking every file against its hash and every tensor against the architecture.

    Without `check_files` the hashes are left out, for whoever wants to see what a changed bundle does.

    Raises IsthmusError if this is no bundle, DamagedFile if a file or a tensor is missing, unexpected or changed.
    """
    if not (folder / CONFIG).is_file():
        raise IsthmusError(f"{folder} is not a bundle: it has no {CONFIG}. `isthmus handoff RUN` writes bundles")
    if check_files:
        _check_files(folder)
    config = read_config(folder)
    chosen = recognise_format(config)
    architecture = _architecture(folder, config)
    tensors = _without_copies(folder, _load_tensors(folder), architecture)
    _compare_with_layout(folder, chosen, architecture, tensors)
    return Bundle(folder, chosen.name, architecture, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with the quantisation that the folder announces elsewhere, for `recognise_format`.

    ModelSlim describes it in quant_model_description.json and leaves config.json without a `quantization_config`: the
    description, with the quant_method "modelslim", stands in its place. Raises DamagedFile if there are both.
    """
    config = _read_json(folder / CONFIG)
    if (folder / DESCRIPTION).is_file():
        if config.get("quantization_config"):
            raise DamagedFile(f"{folder} announces its quantisation twice, in {CONFIG} and in {DESCRIPTION}")
        config["quantization_config"] = {"quant_method": MODELSLIM, **_read_json(folder / DESCRIPTION)}
    return config


def file_hashes(folder: Path, without: tuple[str, ...] = (CHECKSUMS, SEAL)) -> dict[str, str]:
    """SHA-256 of every file of a bundle by its path in the folder; the files that hold hashes are left out."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {name: sha256_file(folder / name) for name in names if name not in without}


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the weights as they lie on the disk: of their file, or of the hashes of their files in order."""
    hashes = [sha256_file(path) for path in weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _write_weights(folder: Path, tensors: dict[str, Tensor], architecture: ModelSection, shard_bytes: int) -> None:
    copies = {copy: tensors[name].clone() for copy, name in mtp_copies(architecture).items()}
    write_tensors(folder, {**tensors, **copies}, shard_bytes)


def _architecture(folder: Path, config: dict[str, Any]) -> ModelSection:
    try:
        return parse_architecture(architecture_from_config(config))
    except RecipeError as error:
        raise IsthmusError(f"{folder / CONFIG}: {error}") from None


def _without_copies(folder: Path, stored: dict[str, Tensor], architecture: ModelSection) -> dict[str, Tensor]:
    copies = mtp_copies(architecture)
    for copy, original in copies.items():
        if copy in stored and original in stored and not torch.equal(stored[copy], stored[original]):
            raise DamagedFile(f"{folder}: {copy} differs from {original}, which the MTP layer shares")
    return {name: tensor for name, tensor in stored.items() if name not in copies}


def _compare_with_layout(folder: Path, chosen: Format, architecture: ModelSection, tensors: dict[str, Tensor]) -> None:
    expected = chosen.layout(architecture)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if found[name] != expected[name]:
            problems.append(f"{name} is {_describe(*found[name])} and should be {_describe(*expected[name])}")
    if problems:
        what = f"the tensors of {folder} do not fit its architecture in format {chosen.name}"
        raise DamagedFile(f"{what}: {shown(sorted(problems))}")


def _describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _check_files(folder: Path) -> None:
    if not (folder / CHECKSUMS).is_file():
        raise DamagedFile(f"{folder} has no {CHECKSUMS}: it was not written by isthmus, or not copied whole")
    recorded, found = _read_json(folder / CHECKSUMS), file_hashes(folder)
    for name, sha256 in recorded.items():
        if name not in found:
            raise DamagedFile(f"{folder / name} is missing; copy the bundle again or repeat the hand-off")
        if found[name] != sha256:
            raise DamagedFile(f"{folder / name} does not match its hash; copy the bundle again or repeat the hand-off")
    unknown = sorted(found.keys() - recorded.keys())
    if unknown:
        raise DamagedFile(f"{folder / unknown[0]} does not belong to this bundle; remove it")


def _load_tensors(folder: Path) -> dict[str, Tensor]:
    with StoredTensors(folder) as stored:
        if not stored.names:
            raise DamagedFile(f"{folder / WEIGHTS} is missing")
        return {name: stored.read(name) for name in stored.names}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedFile(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise DamagedFile(f"{path} is not a JSON object")
    return content


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=2).encode() + b"\n"
