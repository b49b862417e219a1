"""A bundle brought to life: the core, its tokenizer, what it says about itself, and how its weights are exchanged."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.chips.rehearse import enforce
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local.engine import Core
from isthmus.engines.local.grammar import Compiler
from isthmus.engines.local.runner import Runner
from isthmus.engines.local.text import Vocabulary
from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import get_format
from isthmus.formats.bundle import read_bundle, weights_sha256
from isthmus.formats.wire import unpack
from isthmus.model.model import Model
from isthmus.recipe import ModelSection

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
LONGEST_SEQUENCE = 8192


@dataclass(frozen=True)
class Identity:
    """What a server says it is. `rehearsed` names the chip whose rules were enforced, if any."""

    model: str
    format: str
    seal: str | None = None
    pool: str | None = None
    rehearsed: str | None = None

    @property
    def statement(self) -> str | None:
        """What has to be said wherever the server shows numbers."""
        return f"rehearsed on CPU with the rules of {self.rehearsed}" if self.rehearsed else None


@dataclass
class Service:
    """A running engine on one bundle."""

    identity: Identity
    architecture: ModelSection
    core: Core
    tokenizer: Tokenizer
    layout: Layout
    weights_sha256: str
    rehearsal: dict[str, int] | None = None
    examples: list[str] = field(default_factory=list)
    default_tokens: int | None = None
    default_temperature: float = 1.0
    max_waiting: int = 4096
    _updating: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.vocabulary = Vocabulary(self.tokenizer)
        self.grammars = Compiler(self.tokenizer, self.architecture.vocab_size)

    @property
    def fingerprint(self) -> str:
        """Seal and weight version: what `system_fingerprint` carries."""
        return f"{self.identity.seal or 'unsealed'}-v{self.core.version}"

    def update(self, payload: bytes, version: int, sha256: str) -> None:
        """Exchange the weights. If they do not fit, raises IsthmusError and the old ones go on serving."""
        with self._updating:
            tensors = unpack(payload, sha256)
            compare_layouts(self.layout, layout_of(tensors))
            model = get_format(self.identity.format).build(self.architecture, tensors)
            self.core.swap(model, version)
            self.weights_sha256 = sha256


def load_service(
    folder: Path,
    *,
    model_name: str | None = None,
    seal: str | None = None,
    pool: str | None = None,
    rehearse: str | None = None,
    slots: int = 256,
    threads: int = 1,
) -> Service:
    """Read a bundle, rehearse it if asked, and start its core. Raises IsthmusError if it cannot be served."""
    torch.set_num_threads(threads)
    bundle = read_bundle(folder)
    tokenizer = Tokenizer.load(folder)
    model = bundle.build()
    rehearsal = rehearse_steps(model, rehearse) if rehearse else None
    length = min(bundle.architecture.max_position_embeddings, LONGEST_SEQUENCE)
    core = Core(model, eos_id=tokenizer.eos_id, slots=slots, length=length, threads=threads)
    core.start()
    identity = Identity(model_name or folder.resolve().name, bundle.format, seal, pool, rehearse)
    return Service(
        identity,
        bundle.architecture,
        core,
        tokenizer,
        layout_of(bundle.tensors),
        weights_sha256(folder),
        rehearsal,
        read_examples(folder),
    )


def rehearse_steps(model: Model, chip: str) -> dict[str, int]:
    """Run a prefill and decode steps under the rules of a chip that is not here; calls by how the chip runs them.

    Raises RehearsalRefused if an operator or a dtype is not allowed there.
    """
    runner = Runner(model, slots=2, length=8)
    with torch.inference_mode(), enforce(chip) as rehearsal:
        runner.prefill([[0, 1, 2], [1]], [0, 1], 0)
        runner.decode(torch.tensor([1, 2]), torch.tensor([3, 1]), 4)
        runner.decode(torch.tensor([1]), torch.tensor([4]), 5)
    return {str(status): calls for status, calls in rehearsal.tally.calls.items()}


def layout_of(tensors: dict[str, Tensor]) -> Layout:
    """Dtype and shape of every tensor."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def compare_layouts(expected: Layout, found: Layout) -> None:
    """Raise DamagedFile that names the tensors in which new weights do not fit the served bundle."""
    wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"{name} is unknown" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            wrong.append(f"{name} is {_describe(found[name])} and should be {_describe(expected[name])}")
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise DamagedFile(f"the new weights do not fit the served bundle: {'; '.join(sorted(wrong)[:4])}{more}")


def read_examples(folder: Path) -> list[str]:
    """Prompts to try, from the bundle's examples.json (a list of strings), which it need not have."""
    path = folder / "examples.json"
    if not path.is_file():
        return []
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
        raise IsthmusError(f"{path} must be a JSON list of strings")
    return content


def _describe(kind: tuple[torch.dtype, tuple[int, ...]]) -> str:
    return f"{str(kind[0]).removeprefix('torch.')}{list(kind[1])}"
