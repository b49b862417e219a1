"""The gate on one model: a bundle as the source would send it, faults planted in it, and what the gate says.

A fault of the conversion is in the bundle before anything is captured, and the source's weights are at hand. A fault on
the way, or in config.json, comes after the capture, with the checksums made to fit. A fault of the target is in its
loader or in what it computes, on a device with noise of its own.
"""

from __future__ import annotations

import functools
import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import get_format
from isthmus.formats.files.bundle import CHECKSUMS, file_hashes, write_bundle
from isthmus.formats.files.published import CONFIG, weight_files, write_tensors
from isthmus.formats.parts.names import mtp_copies
from isthmus.model.model import Model
from isthmus.parity.capture import CaptureOptions, capture
from isthmus.parity.coverage import check_coverage
from isthmus.parity.gate import refuses
from isthmus.parity.manifest import write_manifest
from isthmus.parity.target import DTYPES
from isthmus.parity.verify import Limits, Target, verify_bundle
from isthmus.records import Check
from isthmus.run import write_atomic
from tests.support.gate_device import on_device
from tests.support.gate_faults import CONFIG_FAULTS, RUNTIME_FAULTS, TENSOR_FAULTS, Plant, Subject, effective
from tests.support.gate_models import RandomModel

KINDS: dict[str, tuple[str, ...]] = {
    "conversion": (
        "last scale row lost",
        "scales floored to powers of two",
        "experts swapped",
        "stale weights of one module",
        "stale weights of one version ago",
        "MTP layer never synced",
        "square matrix transposed twice",
        "layer silently left in bf16",
    ),
    "way": ("one weight bit flipped", "tensors swapped", "stale weights of one module"),
    "config": tuple(CONFIG_FAULTS),
    "loader": (
        "last scale row lost",
        "scales floored to powers of two",
        "one weight bit flipped",
        "experts swapped",
        "stale weights of one module",
        "MTP layer never synced",
        "square matrix transposed twice",
    ),
    "runtime": tuple(RUNTIME_FAULTS),
}
"""The faults that are planted, by where they happen."""
LIMITS = Limits(max_chip_kl=100.0, max_mean_kl=100.0, source="random weights have no budget in nats")
REPLAY = "module replay"
TRIES = 12
TENSOR_NAME = re.compile(r"(?:model|lm_head)\.[\w.]*?weight\w*")


class NoTokenizer:
    """Random models need none."""

    bos_id, ends = 0, (1,)

    def save(self, folder: Path) -> None:
        write_atomic(folder / "tokenizer.json", b"{}\n")


@dataclass(frozen=True)
class TargetDevice:
    """An imitated chip: what it computes in, what decides its noise, and whether it takes rows one by one."""

    seed: int
    dtype: str = "bf16"
    rows_alone: bool = False


@dataclass(frozen=True)
class Said:
    """What the gate said: the layer that refused first, and the module and operator that it named.

    `replayed` is the module that the module replay would have named alone, if it refused.
    """

    refused: bool
    layer: str | None = None
    module: str | None = None
    operator: str | None = None
    detail: str = ""
    replayed: str | None = None


@dataclass(frozen=True)
class Case:
    """A model's healthy bundle in `folder`, captured, with its manifest, and what coverage said of it."""

    subject: Subject
    folder: Path
    coverage: list[Check]

    def scratch(self) -> Path:
        """A copy of the bundle to damage."""
        copy = self.folder.with_name("damaged")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.folder, copy)
        return copy


def prepare(model: RandomModel, format_name: str, folder: Path) -> Case:
    """Convert, capture and list, as the source's machine does."""
    write_bundle(folder, format_name, model.state, model.architecture, NoTokenizer())
    entries, checks = check_coverage(model.state, folder)
    capture(folder, model.state, model.prompts(), CaptureOptions(origin="random tokens", synthetic=True))
    write_manifest(folder, coverage=entries, architecture=model.architecture)
    stored = get_format(format_name).export(model.state, model.architecture)
    return Case(Subject(model, format_name, stored), folder, checks)


def draw_plant(case: Case, kind: str, fault: str, seed: int) -> Plant | None:
    """A fault that changes something, drawn again until it does; None if this model cannot have it."""
    for attempt in range(TRIES):
        draw = random.Random(f"{kind} {fault} {seed} {attempt}")
        if kind == "config":
            config = json.loads((case.folder / CONFIG).read_bytes())
            plant = CONFIG_FAULTS[fault](case.subject, config, draw)
        else:
            plant = {**RUNTIME_FAULTS, **TENSOR_FAULTS}[fault](case.subject, draw)
        if plant is None:
            return None
        if plant.config is not None or effective(case.subject, plant):
            return plant
    return None


def ask(case: Case, kind: str, plant: Plant | None, device: TargetDevice) -> Said:
    """What the gate says of a fault, or of no fault."""
    if kind == "conversion" and plant is not None:
        return _refusal(lambda: check_coverage(case.subject.model.state, _converted(case, plant))[1])
    folder = case.folder if plant is None or kind in ("loader", "runtime") else _damaged(case, plant)
    build = functools.partial(target, case.subject, plant if kind in ("loader", "runtime") else None, device)
    before, at = [] if plant else case.coverage, Target(dtype=device.dtype)
    return _refusal(lambda: [*before, *verify_bundle(folder, build=lambda _: build(), target=at, limits=LIMITS).checks])


def target(subject: Subject, plant: Plant | None, device: TargetDevice) -> Model:
    """The target's model, with the fault if there is one."""
    dtype = DTYPES[device.dtype]
    model = subject.build(dtype=dtype) if plant is None else plant.build(subject, dtype)
    return on_device(model, device.seed, device.rows_alone)


def right_module(plant: Plant, said: Said) -> bool:
    """Whether the named module holds the fault, or is in it."""
    named = said.module or ""
    where = plant.where
    enough = named.count(".") >= min(where.count("."), 3)
    return bool(named) and ((enough and _within(where, named)) or _within(named, where))


def right_operator(plant: Plant, said: Said) -> bool:
    """Whether the named operator is the one at fault, or holds it. A module without parts is its own operator."""
    if not right_module(plant, said):
        return False
    if said.operator is None:
        return said.module == plant.where
    named, where = _operator(f"{said.module}.{said.operator}"), _operator(plant.where)
    aliased = any(word in said.operator for word in plant.operators)
    return aliased or any(_within(a, b) or _within(b, a) for a in named for b in where)


def _operator(path: str) -> list[str]:
    """A path without the numbers of experts and the names of tensors; gate and up are one product, or two."""
    parts = [part for part in path.split(".") if part not in ("weight", "scale", "bias")]
    name = ".".join(part for i, part in enumerate(parts) if not (part.isdigit() and parts[i - 1] == "experts"))
    name = name.replace("down_scale", "down").replace("gate_up_scale", "gate_up").replace("_proj", "")
    return [name.replace("gate_up", "gate"), name.replace("gate_up", "up")]


def _within(path: str, whole: str) -> bool:
    return path == whole or path.startswith(f"{whole}.")


def _refusal(look: Callable[[], Sequence[Check]]) -> Said:
    try:
        checks = look()
    except IsthmusError as error:
        found = TENSOR_NAME.search(str(error))
        module = found.group().rpartition(".")[0] if found else None
        return Said(True, "files" if isinstance(error, DamagedFile) else "config", module, None, str(error))
    failed = list(filter(refuses, checks))
    if not failed:
        return Said(False)
    named = next((check for check in failed if check.module is not None), failed[0])
    replayed = next((check.module for check in failed if check.name == REPLAY), None)
    return Said(True, failed[0].layer, named.module, named.operator, failed[0].detail, replayed)


def _converted(case: Case, plant: Plant) -> Path:
    """The bundle as a faulty exporter writes it: consistent in itself."""
    assert plant.stored is not None
    return _rewritten(case, plant.stored)


def _damaged(case: Case, plant: Plant) -> Path:
    """The captured bundle, changed on the way, with checksums that fit."""
    if plant.stored is not None:
        return _rewritten(case, plant.stored)
    folder = case.scratch()
    write_atomic(folder / CONFIG, json.dumps(plant.config, sort_keys=True, indent=2).encode() + b"\n")
    return _summed(folder)


def _rewritten(case: Case, stored: dict[str, torch.Tensor]) -> Path:
    folder = case.scratch()
    for path in weight_files(folder):
        path.unlink()
    copies = {copy: stored[name].clone() for copy, name in mtp_copies(case.subject.model.architecture).items()}
    write_tensors(folder, {**stored, **copies})
    return _summed(folder)


def _summed(folder: Path) -> Path:
    write_atomic(folder / CHECKSUMS, json.dumps(file_hashes(folder), sort_keys=True, indent=2).encode() + b"\n")
    return folder
