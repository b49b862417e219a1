"""A bundle: a folder in Hugging Face layout that transformers, vLLM and SGLang load, with a hash for each of its files.

The copies of the embedding and of the output head that published DeepSeek checkpoints keep in their MTP layer are
written, and dropped when read, after checking that they equal the shared tensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import DESCRIPTION, MODELSLIM, Format, Layout, get_format, recognise_format
from isthmus.formats.files.published import (
    CONFIG,
    INDEX,
    SHARD_BYTES,
    WEIGHTS,
    StoredTensors,
    weight_files,
    write_tensors,
)
from isthmus.formats.files.stream import TensorWriter, described, shown
from isthmus.formats.parts.names import mtp_copies
from isthmus.formats.parts.pieces import Adapt, streamed
from isthmus.formats.parts.ranges import Calibration
from isthmus.formats.parts.values import value_problems
from isthmus.lines import read_json_object
from isthmus.model.config import hf_config
from isthmus.model.model import Model
from isthmus.recipe.architecture import ModelSection, architecture_from_config, parse_architecture
from isthmus.recipe.section import RecipeError
from isthmus.run import new_folder, sha256_file, write_atomic

CHECKSUMS, CONVERSION, SEAL = "checksums.json", "conversion.json", "seal.json"
ROWS_AT_ONCE = 64 << 20
"""Bytes of a tensor that are compared at once."""


class TokenizerFiles(Protocol):
    """What a bundle needs of a tokenizer."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def ends(self) -> Sequence[int]:
        """The tokens that end an answer; the first is the end token."""
        ...

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Bundle:
    """A bundle: `tensors` as stored, without the MTP layer's copies; in memory, or read when they are asked for."""

    folder: Path
    format: str
    architecture: ModelSection
    tensors: Mapping[str, Tensor]

    def build(self) -> Model:
        """A model that computes on the CPU with the numerics of the format."""
        return get_format(self.format).build(self.architecture, dict(self.tensors))

    def stream(self, adapt: Adapt = lambda _piece: None, *, lend_experts: bool = True) -> Model:
        """The same model, in memory piece by piece (parts/pieces.py); `adapt` changes each piece that was built."""
        build = get_format(self.format).build
        return streamed(self.architecture, self.tensors, build, adapt, lend_experts=lend_experts)


def write_bundle(
    folder: Path,
    chosen: Format | str,
    state: Mapping[str, Tensor],
    architecture: ModelSection,
    tokenizer: TokenizerFiles,
    shard_bytes: int = SHARD_BYTES,
    calibration: Calibration | None = None,
    refine: Callable[[dict[str, Tensor]], None] = lambda _stored: None,
    threads: int = 1,
    advance: Callable[[int], None] = lambda _done: None,
    beside: Callable[[], Mapping[str, bytes]] = dict,
) -> None:
    """Write `state` (float, published names) as a bundle. A reader sees the whole folder or none of it.

    Each tensor is asked of `state` once, made into what is stored, written, and dropped, `threads` of them at a time: a
    state that reads tensors when asked is never in memory whole. `refine` may change the values of what is stored of
    each; `advance` is called with the number of finished tensors; `beside` gives, when all are written, the content of
    further files by their path in the bundle. Weights of more than `shard_bytes` are written as
    several files and an index. An existing bundle at `folder` is replaced. generation_config.json holds no sampling
    defaults: an engine that read them (vLLM does) would sample from another distribution than the one it is asked for.

    Raises DamagedFile if the state does not fit the architecture, IsthmusError if the format lacks a calibration.
    """
    chosen = get_format(chosen) if isinstance(chosen, str) else chosen
    ends = tokenizer.ends[0] if len(tokenizer.ends) == 1 else list(tokenizer.ends)
    token_ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends}
    config = hf_config(architecture, dtype=chosen.dtype, bos_token_id=tokenizer.bos_id, eos_token_id=ends)
    quantization = chosen.quantization_config(architecture)
    if quantization is not None:
        config["quantization_config"] = quantization

    def stored(name: str) -> dict[str, Tensor]:
        found = chosen.export_one(name, state[name], architecture, calibration)
        refine(found)
        return found

    with new_folder(folder) as new:
        layout = _in_order_of(state, chosen.layout(architecture))
        copies = mtp_copies(architecture)
        layout |= {copy: layout[name] for copy, name in copies.items()}
        with TensorWriter(new, layout, shard_bytes, _misfit(folder, chosen)) as writer:
            _stream(writer, state, stored, copies, threads, advance)
        write_atomic(new / CONFIG, _json(config))
        write_atomic(new / "generation_config.json", _json(token_ids))
        for name, content in chosen.extra_files(architecture).items():
            write_atomic(new / name, content)
        for name, content in beside().items():
            (new / name).parent.mkdir(exist_ok=True)
            write_atomic(new / name, content)
        tokenizer.save(new)
        write_atomic(new / CHECKSUMS, _json(file_hashes(new, known=writer.hashes)))


def with_other_weights(folder: Path, source: Path, tensors: dict[str, Tensor]) -> None:
    """Write at `folder` the bundle `source` with other tensors of the same format, as `Format.export` gives them.

    Raises IsthmusError if `source` is no bundle, DamagedFile if the tensors do not fit its architecture.
    """
    if not (source / CONFIG).is_file():
        raise IsthmusError(f"{source} is not a bundle: it has no {CONFIG}")
    config = read_config(source)
    architecture = architecture_of(source, config)
    _compare_with_layout(folder, recognise_format(config), architecture, _layout_of(tensors))
    replaced = {CHECKSUMS, SEAL, INDEX, *(path.name for path in weight_files(source))}
    with new_folder(folder) as new:
        for path in source.iterdir():
            if path.is_file() and path.name not in replaced:
                shutil.copyfile(path, new / path.name)
        copies = {copy: tensors[name] for copy, name in mtp_copies(architecture).items()}
        hashes = write_tensors(new, {**tensors, **copies})
        write_atomic(new / CHECKSUMS, _json(file_hashes(new, known=hashes)))


def read_bundle(folder: Path, *, check_files: bool = True) -> Bundle:
    """Read a bundle, checking every file against its hash and every tensor against the architecture.

    Without `check_files` the hashes are left out, for whoever wants to see what a changed bundle does.

    Raises IsthmusError if this is no bundle, DamagedFile if a file or a tensor is missing, unexpected or changed.
    """
    with open_bundle(folder, check_files=check_files) as bundle:
        return replace(bundle, tensors=dict(bundle.tensors))


@contextmanager
def open_bundle(folder: Path, *, check_files: bool = True) -> Iterator[Bundle]:
    """`read_bundle` for models that are larger than the memory: tensors are read when they are asked for, inside this
    context."""
    if not (folder / CONFIG).is_file():
        raise IsthmusError(f"{folder} is not a bundle: it has no {CONFIG}. `isthmus handoff RUN` writes bundles")
    if check_files:
        verify_files(folder)
    config = read_config(folder)
    chosen = recognise_format(config)
    architecture = architecture_of(folder, config)
    with StoredTensors(folder) as stored:
        if not stored.names:
            raise DamagedFile(f"{folder / WEIGHTS} is missing")
        tensors = _without_copies(folder, stored, architecture)
        layout = {name: (stored.dtype(name), stored.shape(name)) for name in tensors}
        _compare_with_layout(folder, chosen, architecture, layout)
        yield Bundle(folder, chosen.name, architecture, tensors)


class _BundleTensors(Mapping[str, Tensor]):
    """Some tensors of a folder, read when they are asked for; `rows` reads some rows of one."""

    def __init__(self, stored: StoredTensors, names: list[str]):
        self._stored, self._names = stored, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._stored.read(name)

    def rows(self, name: str, rows: range) -> Tensor:
        return self._stored.rows(name, rows)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with the quantisation that the folder announces elsewhere, for `recognise_format`.

    ModelSlim describes it in quant_model_description.json and leaves config.json without a `quantization_config`: the
    description, with the quant_method "modelslim", stands in its place. Raises IsthmusError if the folder is no bundle,
    DamagedFile if config.json is no JSON object or there are both.
    """
    if not (folder / CONFIG).is_file():
        raise IsthmusError(f"{folder} is not a bundle: it has no {CONFIG}. `isthmus handoff RUN` writes bundles")
    config = read_object(folder / CONFIG)
    if (folder / DESCRIPTION).is_file():
        if config.get("quantization_config"):
            raise DamagedFile(f"{folder} announces its quantisation twice, in {CONFIG} and in {DESCRIPTION}")
        config["quantization_config"] = {"quant_method": MODELSLIM, **read_object(folder / DESCRIPTION)}
    return config


def file_hashes(
    folder: Path, without: tuple[str, ...] = (CHECKSUMS, SEAL), known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """SHA-256 of every file of a bundle by its path in the folder; the files that hold hashes are left out.

    Those of files whose hash is `known` are taken from there.
    """
    known = known or {}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {name: known.get(name) or sha256_file(folder / name) for name in names if name not in without}


def first_stranger(folder: Path) -> tuple[str, str] | None:
    """What lies in a bundle and no hash covers, and what it is: a link out of it, a pipe, an empty folder.

    The first by its path; None if there are only files, folders of files, and links to files of the bundle.
    """
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found = _problem_of_link(path, root)
        elif path.is_dir():
            found = None if any(path.iterdir()) else "is an empty folder, which belongs to no bundle; remove it"
        else:
            found = None if path.is_file() else "is neither a file nor a folder; remove it"
        if found is not None:
            return str(path.relative_to(folder)), found
    return None


def _problem_of_link(path: Path, root: Path) -> str | None:
    """What is wrong with a link in a bundle: it may only lead to a file of the same bundle."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return "is a link that leads nowhere; copy the bundle again"
    if not target.is_relative_to(root):
        return "is a link out of the bundle, where it may change unseen; copy it with what it leads to (cp -rL)"
    return None if target.is_file() else "is a link to what is no file; remove it"


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the weights as they lie on the disk: of their file, or of the hashes of their files in order."""
    hashes = [sha256_file(path) for path in weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _stream(
    writer: TensorWriter,
    state: Mapping[str, Tensor],
    stored: Callable[[str], dict[str, Tensor]],
    copies: dict[str, str],
    threads: int,
    advance: Callable[[int], None],
) -> None:
    """Write what is stored of each tensor of a state, with the copies that the MTP layer keeps."""
    copies_of = {name: [copy for copy, original in copies.items() if original == name] for name in copies.values()}

    def write(name: str) -> None:
        for one, tensor in stored(name).items():
            for target in (one, *copies_of.get(one, ())):
                writer.write(target, tensor)

    if threads == 1:
        for done, name in enumerate(state, start=1):
            write(name)
            advance(done)
    else:
        with ThreadPoolExecutor(threads) as workers:
            for done, _ in enumerate(workers.map(write, state), start=1):
                advance(done)
    writer.finish()


def _in_order_of(state: Mapping[str, Tensor], layout: Layout) -> Layout:
    """The layout in the order in which a state's modules come, so that what is read together lies together."""
    place: dict[str, int] = {}
    for name in state:
        place.setdefault(_module(name), len(place))
    return dict(sorted(layout.items(), key=lambda entry: place.get(_module(entry[0]), len(place))))


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def architecture_of(folder: Path, config: dict[str, Any]) -> ModelSection:
    """The architecture that a config.json describes. Raises IsthmusError naming the key that is not understood."""
    try:
        return parse_architecture(architecture_from_config(config))
    except RecipeError as error:
        raise IsthmusError(f"{folder / CONFIG}: {error}") from None


def _without_copies(folder: Path, stored: StoredTensors, architecture: ModelSection) -> _BundleTensors:
    copies = mtp_copies(architecture)
    for copy, original in copies.items():
        if copy in stored and original in stored and not _equal(stored, copy, original):
            raise DamagedFile(f"{folder}: {copy} differs from {original}, which the MTP layer shares")
    return _BundleTensors(stored, [name for name in stored.names if name not in copies])


def _equal(stored: StoredTensors, one: str, other: str) -> bool:
    """Whether two tensors have the same values, some rows at a time."""
    shape = stored.shape(one)
    if stored.shape(other) != shape:
        return False
    step = max(1, ROWS_AT_ONCE * shape[0] // max(1, stored.size(one)))
    blocks = (range(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
    return all(torch.equal(stored.rows(one, rows), stored.rows(other, rows)) for rows in blocks)


def _layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _compare_with_layout(folder: Path, chosen: Format, architecture: ModelSection, found: Layout) -> None:
    expected = chosen.layout(architecture)
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if found[name] != expected[name]:
            problems.append(f"{name} is {described(*found[name])} and should be {described(*expected[name])}")
    if problems:
        raise DamagedFile(f"{_misfit(folder, chosen)}: {shown(sorted(problems))}")


def check_values(bundle: Bundle) -> None:
    """Raise DamagedFile if a scale, an offset or a routing bias has a value that no layout allows.

    For whoever serves a bundle that no gate has looked at: the gate finds it by itself, with the module.
    """
    problems = [f"{name} {problem}" for name, problem in value_problems(bundle.tensors, bundle.tensors.__getitem__)]
    if problems:
        raise DamagedFile(f"{bundle.folder} holds values that nothing here writes: {shown(problems)}")


def _misfit(folder: Path, chosen: Format) -> str:
    return f"the tensors of {folder} do not fit its architecture in format {chosen.name}"


def verify_files(folder: Path) -> None:
    """Raise DamagedFile if a file of a bundle is missing, added, or not what it was when the bundle was written."""
    if not (folder / CHECKSUMS).is_file():
        raise DamagedFile(f"{folder} has no {CHECKSUMS}: it was not written by isthmus, or not copied whole")
    if (stranger := first_stranger(folder)) is not None:
        raise DamagedFile(f"{folder / stranger[0]} {stranger[1]}")
    recorded, found = read_object(folder / CHECKSUMS), file_hashes(folder)
    for name, sha256 in recorded.items():
        if name not in found:
            raise DamagedFile(f"{folder / name} is missing; copy the bundle again or repeat the hand-off")
        if found[name] != sha256:
            raise DamagedFile(f"{folder / name} does not match its hash; copy the bundle again or repeat the hand-off")
    unknown = sorted(found.keys() - recorded.keys())
    if unknown:
        raise DamagedFile(f"{folder / unknown[0]} does not belong to this bundle; remove it")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a bundle. Raises DamagedFile if it is none."""
    return read_json_object(path, DamagedFile)


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=2).encode() + b"\n"
