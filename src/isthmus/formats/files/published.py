"""Weights in Hugging Face layout: one safetensors file, or several and an index, read tensor by tensor.

DeepSeek's fp8 checkpoints are read too: `X.weight` in float8_e4m3fn, and `X.weight_scale_inv` with one factor per
block of 128x128 (github.com/deepseek-ai/DeepSeek-V3, `inference/fp8_cast_bf16.py`), in a float type or in E8M0. Where
config.json says `scale_fmt = "ue8m0"` (DeepSeek-V3.1) they are powers of two, and bytes are E8M0 as well.

A checkpoint that holds a number which is not finite, or a scale that is none, is damaged before anything is made of it,
and the error names the tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats.files.stream import INDEX, KINDS, WEIGHTS, TensorWriter, shown
from isthmus.formats.parts.assemble import EMBEDDING, HEAD, ROUTER_BIAS, unfilled
from isthmus.formats.parts.names import SCALE, dequantise_blocks, mtp_copies
from isthmus.formats.parts.values import (
    FLOAT_KINDS,
    UE8M0,
    block_scale_kinds,
    scale_numbers,
    scale_problem,
    weight_problem,
)
from isthmus.lines import read_json_object
from isthmus.recipe.architecture import DeepseekSection, ModelSection, text_config

CONFIG = "config.json"
SHARD_BYTES = 5_000_000_000
WITHIN = "language_model."
"""In front of the text model's names, in a checkpoint of a model that also sees (Kimi K2.5, Mistral Small 3.1)."""
COMPUTED = ".rotary_emb.inv_freq"
"""Old Llama checkpoints store the inverse frequencies, which config.json says already."""


class StoredTensors:
    """The tensors of a folder by name; each is read when it is asked for. A context manager: files stay open in it.

    Those of a text model within a larger one have the names that they have alone.
    Opening raises IsthmusError if the folder holds no weights, and DamagedFile naming the file that is missing or not
    whole, the tensor that a file holds and the index does not name, or the reverse.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._places: dict[str, tuple[int, int, int]] = {}
        self._stored_name: dict[str, str] = {}
        try:
            self._file_of = self._find()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """All names, file by file: the order in which reading is fastest."""
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def kind(self, name: str) -> str:
        """The dtype as safetensors writes it: "F32", "BF16", "F8_E4M3", ..."""
        return self._slice(name).get_dtype()

    def size(self, name: str) -> int:
        """Bytes of the tensor in its file."""
        return self._places[name][2]

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored, in memory of its own. From any thread."""
        _, start, size = self._places[name]
        return self._read(name, start, size).reshape(self.shape(name))

    def rows(self, name: str, rows: range) -> Tensor:
        """Rows of a tensor as they are stored, in memory of their own; no others are read."""
        _, start, size = self._places[name]
        count, *rest = self.shape(name)
        row = size // count
        return self._read(name, start + rows.start * row, len(rows) * row).reshape(len(rows), *rest)

    def dtype(self, name: str) -> torch.dtype:
        """torch's type of a tensor. Raises DamagedFile if it is one that is not read."""
        kind = self.kind(name)
        if kind not in KINDS:
            raise DamagedFile(f"{self.folder / self._file_of[name]}: {name} has the type {kind}, which is not read")
        return KINDS[kind]

    def _read(self, name: str, start: int, size: int) -> Tensor:
        """So many bytes of a file from `start` on, which are values of a tensor."""
        dtype, descriptor = self.dtype(name), self._places[name][0]
        content = torch.empty(size, dtype=torch.uint8)
        view = content.numpy().data
        while len(view):
            count = os.preadv(descriptor, [view], start)
            if not count:
                raise DamagedFile(f"{self.folder / self._file_of[name]} ends within {name}")
            view, start = view[count:], start + count
        return content.view(dtype)

    def _slice(self, name: str) -> Any:
        return self._open[self._file_of[name]].get_slice(self._stored_name[name])

    def _find(self) -> dict[str, str]:
        files = _weight_files(self.folder)
        index = {_alone(name): file for name, file in _read_index(self.folder).items()}
        file_of: dict[str, str] = {}
        for file in files:
            for name in self._names_in(file):
                if name in file_of:
                    raise DamagedFile(f"{self.folder}: both {file_of[name]} and {file} hold {name}")
                file_of[name] = file
        problems = [f"{name} is in {file}, not in {INDEX}" for name, file in file_of.items() if name not in index]
        problems += [f"{file} does not hold {name}" for name, file in index.items() if file_of.get(name) != file]
        if index and problems:
            raise DamagedFile(f"{self.folder} does not fit its {INDEX}: {shown(problems)}")
        return file_of

    def _names_in(self, file: str) -> list[str]:
        try:
            self._open[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
        except SafetensorError as error:
            raise DamagedFile(f"{self.folder / file} is not a whole safetensors file: {error}") from None
        except FileNotFoundError:
            raise DamagedFile(f"{self.folder / file} is missing") from None
        except OSError as error:
            raise DamagedFile(f"{self.folder / file} cannot be read: {error.strerror or error}") from None
        self._find_places(file)
        stored = {_alone(name): name for name in self._open[file].keys()}  # noqa: SIM118 - it is no dictionary
        self._stored_name |= stored
        return list(stored)

    def _find_places(self, file: str) -> None:
        """Where each tensor lies. The library, which has checked the header, maps files and does not say."""
        descriptor = os.open(self.folder / file, os.O_RDONLY)
        self._stack.callback(os.close, descriptor)
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        header = json.loads(os.pread(descriptor, length, 8))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                self._places[_alone(name)] = descriptor, 8 + length + begin, end - begin


def _alone(name: str) -> str:
    """The name of a tensor in a checkpoint of the text model alone."""
    return name.removeprefix(WITHIN)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder, in order; empty if there are none."""
    return [folder / name for name in _weight_files(folder)]


def _weight_files(folder: Path) -> list[str]:
    if index := _read_index(folder):
        files = sorted(set(index.values()))
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            count = sum(file in missing for file in index.values())
            raise DamagedFile(f"{folder} lacks {shown(missing)}, named in {INDEX} for {count} tensors")
        return files
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _read_index(folder: Path) -> dict[str, str]:
    """File of each tensor by the index; empty if there is none."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        weight_map = read_json_object(path, DamagedFile)["weight_map"]
    except KeyError as error:
        raise DamagedFile(f"{path} is no index of safetensors files: {error!r}") from None
    plain = isinstance(weight_map, dict) and all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    )
    if not plain or not weight_map:
        raise DamagedFile(f"{path}: weight_map must give each tensor the name of a file in the same folder")
    return weight_map


def write_tensors(folder: Path, tensors: dict[str, Tensor], shard_bytes: int = SHARD_BYTES) -> dict[str, str]:
    """Write tensors as `TensorWriter` does; the SHA-256 of each file by its name."""
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorWriter(folder, layout, shard_bytes, f"the tensors of {folder}") as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    return writer.hashes


@dataclass
class Checkpoint:
    """A published checkpoint of float or fp8 weights, checked against an architecture but not yet read.

    `left_out` says in words which stored tensors the architecture does not use, for whoever tells the user; `dropped`
    gives each of them its reason.
    """

    stored: StoredTensors
    architecture: ModelSection
    left_out: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = _read_config(self.stored.folder)
        self._fp8, self._nested = _fp8(self.stored.folder, config), text_config(config) is not config
        self._sound: set[str] = set()
        self._used = self._select()
        self._check()

    def tensors(self, wants: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Tensor]]:
        """The tensors that `wants` names under their published names, one at a time, fp8 dequantised to fp32.

        Raises DamagedFile if a copy of a shared tensor differs from it, or naming a tensor of which a value is wrong.
        """
        self._check_small()
        for name in self._names():
            if wants(name):
                yield name, self._float(name)

    def check_values(self, wants: Callable[[str], bool] = lambda name: True) -> None:
        """Read the tensors that `wants` names, for their values alone; they are not looked at again after it.

        Raises DamagedFile as `tensors` does.
        """
        self._check_small()
        for name in filter(wants, self._names()):
            self._float(name)

    def state(self) -> Mapping[str, Tensor]:
        """The same tensors as a mapping, in the order of the files, that reads each whenever it is asked for it.

        Raises DamagedFile as `tensors` does, of a weight when it is read.
        """
        self._check_small()
        return _CheckpointState(self)

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of a block of fp8 weights; None if the weights are float."""
        return self._fp8.block if self._fp8 else None

    def scales(self) -> Iterator[tuple[str, Tensor]]:
        """The scales of the fp8 weights in fp32 by the weight's name, one at a time."""
        for name in self._used:
            if name.endswith(SCALE):
                yield name.removesuffix(SCALE), scale_numbers(self.stored.read(name))

    def blocks(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A weight in fp8: e4m3 [M, K] as it is stored, and the scales of its blocks in fp32. None if it is float."""
        scale = f"{name}{SCALE}"
        return (self.stored.read(name), scale_numbers(self.stored.read(scale))) if scale in self.stored else None

    def copies(self) -> dict[str, str]:
        """The stored names that are copies of another tensor, and of which: they are carried by that one."""
        return {copy: original for copy, original in self._copies.items() if copy in self.stored}

    def _names(self) -> list[str]:
        copies = self._copies
        return [name for name in self._used if name not in copies and not name.endswith(SCALE)]

    def _select(self) -> list[str]:
        """The stored names that this architecture uses; notes the others that are known."""
        names = self.stored.names
        computed = [name for name in names if name.endswith(COMPUTED)]
        mtp = [] if self.architecture.num_nextn_predict_layers else [name for name in names if self._of_mtp(name)]
        others = [name for name in names if not name.startswith(("model.", "lm_head."))] if self._nested else []
        for chosen, what, reason in (
            (computed, f"tensors *{COMPUTED}", "computed from config.json"),
            (mtp, "tensors of the MTP layer", "num_nextn_predict_layers = 0"),
            (others, "tensors beside the text model", "only the text model is read"),
        ):
            if chosen:
                self.left_out.append(f"{len(chosen)} {what}: {reason}")
                self.dropped |= dict.fromkeys(chosen, reason)
        return [name for name in names if name not in self.dropped]

    @property
    def _mtp_prefix(self) -> str:
        return f"model.layers.{self.architecture.num_hidden_layers}."

    def _of_mtp(self, name: str) -> bool:
        return isinstance(self.architecture, DeepseekSection) and name.startswith(self._mtp_prefix)

    @property
    def _copies(self) -> dict[str, str]:
        tied = {HEAD: EMBEDDING} if self.architecture.tie_word_embeddings else {}
        return {**mtp_copies(self.architecture), **tied}

    def _check(self) -> None:
        expected = {name: tuple(t.shape) for name, t in unfilled(self.architecture).state_dict().items()}
        wanted = {name: shape for name, shape in expected.items() if name not in self._copies}
        used = set(self._used)
        missing = [name for name in wanted if name not in used]
        if missing and all(map(self._of_mtp, missing)) and not any(map(self._of_mtp, used)):
            raise IsthmusError(
                f"{self.stored.folder} has no tensor of the MTP layer, {self._mtp_prefix}*, and "
                "num_nextn_predict_layers is 1: set num_nextn_predict_layers = 0 in [model]"
            )
        problems = [f"missing {name}" for name in missing]
        for name in self._used:
            if name.endswith(SCALE):
                problems += self._scale_problems(name)
            elif name in self._copies:
                problems += self._shape_problems(name, expected.get(self._copies[name]))
            else:
                problems += self._shape_problems(name, wanted.get(name))
        if problems:
            raise IsthmusError(f"{self.stored.folder} does not fit its architecture: {shown(sorted(problems))}")

    def _shape_problems(self, name: str, shape: tuple[int, ...] | None) -> list[str]:
        if shape is None:
            return [f"unexpected {name}"]
        found, kind = self.stored.shape(name), self.stored.kind(name)
        if found != shape:
            return [f"{name} is {list(found)} and should be {list(shape)}"]
        if kind in FLOAT_KINDS:
            return []
        if kind != "F8_E4M3":
            return [f"{name} is quantised ({kind}), which is not read"]
        if len(shape) != 2 or not name.endswith(".weight"):
            return [f"{name} is fp8, and only matrices are stored in it"]
        if f"{name}{SCALE}" not in self.stored:
            return [f"{name} is fp8, and {name}{SCALE} is missing"]
        if self._fp8 and (entry := self._fp8.left_in_float(name)) is not None:
            return [f"{name} is fp8, and {CONFIG} says that {entry} is not converted"]
        return []

    def _scale_problems(self, name: str) -> list[str]:
        weight = name.removesuffix(SCALE)
        if weight not in self.stored or self.stored.kind(weight) != "F8_E4M3":
            return [f"unexpected {name}"]
        if self._fp8 is None:
            return [f"{weight} is fp8, and {CONFIG} has no quantization_config of fp8"]
        kind, kinds = self.stored.kind(name), block_scale_kinds(self._fp8.scale_fmt)
        if kind not in kinds:
            hint = f'; bytes are E8M0 only where quantization_config has scale_fmt = "{UE8M0}"' if kind == "U8" else ""
            return [f"{name} has the type {kind}, and scales are {', '.join(kinds)}{hint}"]
        blocks = [-(-size // block) for size, block in zip(self.stored.shape(weight), self._fp8.block, strict=False)]
        found = list(self.stored.shape(name))
        return [] if found == blocks else [f"{name} is {found} and should be {blocks}"]

    def _float(self, name: str) -> Tensor:
        tensor = self.stored.read(name)
        if self.stored.kind(name) == "F8_E4M3":
            assert self._fp8 is not None, "checked when the checkpoint was opened"
            tensor = dequantise_blocks(tensor, scale_numbers(self.stored.read(f"{name}{SCALE}")), self._fp8.block)
        self._check_finite(name, tensor)
        return tensor

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        """Once for each tensor."""
        if name in self._sound:
            return
        if problem := weight_problem(tensor):
            raise DamagedFile(self._damage(name, problem))
        self._sound.add(name)

    def _check_small(self) -> None:
        """What is small: scales and routing biases, and the copies of shared tensors."""
        powers = self._fp8 is not None and self._fp8.scale_fmt == UE8M0
        for name in self._used:
            problem = None
            if name.endswith(SCALE):
                problem = scale_problem(self.stored.read(name), powers_of_two=powers)
            elif name.endswith(ROUTER_BIAS):
                problem = weight_problem(self.stored.read(name))
            if problem:
                raise DamagedFile(self._damage(name, problem))
        self._compare_copies()

    def _damage(self, name: str, problem: str) -> str:
        return (
            f"{self.stored.folder}: {name} {problem}. The source itself has them, before anything was made of it: copy "
            "this checkpoint again, or start from another one"
        )

    def _compare_copies(self) -> None:
        for copy, original in self._copies.items():
            if copy in self.stored and not torch.equal(self._float(copy).float(), self._float(original).float()):
                raise DamagedFile(f"{self.stored.folder}: {copy} differs from {original}, which it is a copy of")


class _CheckpointState(Mapping[str, Tensor]):
    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._known = dict.fromkeys(checkpoint._names())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        return self._checkpoint._float(name)

    def rows(self, name: str, rows: range) -> Tensor:
        """Rows of a tensor; of one in fp8, whose scales are of blocks, all are read."""
        stored = self._checkpoint.stored
        if stored.kind(name) == "F8_E4M3":
            return self[name][rows.start : rows.stop]
        found = stored.rows(name, rows)
        if problem := weight_problem(found):
            raise DamagedFile(self._checkpoint._damage(name, f"from row {rows.start} on {problem}"))
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        return read_json_object(path, DamagedFile)
    except FileNotFoundError:
        raise IsthmusError(f"{folder} is no checkpoint: it has no {CONFIG}") from None


@dataclass(frozen=True)
class _Fp8:
    """What a config.json says of fp8: the rows and columns of a block, the rule of its scales, and what stays float."""

    block: tuple[int, int]
    scale_fmt: str | None
    unconverted: tuple[str, ...]

    def left_in_float(self, name: str) -> str | None:
        """The entry that says that the module of this weight is not converted."""
        module = name.removesuffix(".weight")
        return next((one for one in self.unconverted if module == one or module.startswith(f"{one}.")), None)


def _fp8(folder: Path, config: dict[str, Any]) -> _Fp8 | None:
    """What is announced of DeepSeek's fp8; None if weights are float. Raises IsthmusError for another quantisation."""
    path = folder / CONFIG
    quantization = config.get("quantization_config") or text_config(config).get("quantization_config")
    if not quantization:
        return None
    if not isinstance(quantization, dict):
        raise DamagedFile(f"{path}: quantization_config is {type(quantization).__name__}, and should be an object")
    block, element = quantization.get("weight_block_size"), quantization.get("fmt") or "e4m3"
    if quantization.get("quant_method") != "fp8" or not isinstance(block, list) or len(block) != 2:
        raise IsthmusError(
            f"{path} announces quantisation {quantization.get('quant_method')!r} with weight_block_size {block!r}. "
            "What is read is float weights, or fp8 with a scale per block: use the unquantised checkpoint"
        )
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in block):
        raise DamagedFile(f"{path}: weight_block_size is {block!r}, and should be two numbers of rows and columns")
    if element not in ("e4m3", "float8_e4m3fn"):
        raise IsthmusError(f"{path}: fp8 weights are {element!r}, and e4m3 is read: use the unquantised checkpoint")
    scale_fmt = quantization.get("scale_fmt")
    if scale_fmt not in (None, UE8M0):
        raise IsthmusError(f"{path}: scale_fmt is {scale_fmt!r}; what is read is {UE8M0!r}, or none for any number")
    listed = quantization.get("modules_to_not_convert") or quantization.get("ignored_layers") or []
    return _Fp8((block[0], block[1]), scale_fmt, tuple(_alone(str(one)) for one in listed))
