"""A bundle brought to life: the core, its tokenizer, what it says about itself, and how its weights are exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from isthmus.chips.rehearse.dispatch import enforce
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local.api.text import Vocabulary
from isthmus.engines.local.core.core import Core
from isthmus.engines.local.core.grammar import Compiler
from isthmus.engines.local.core.options import DEFAULT_OPTIONS
from isthmus.engines.local.core.runner import Trial
from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import get_format
from isthmus.formats.files.bundle import Bundle, check_values, read_bundle, weights_sha256
from isthmus.formats.files.golden import Golden, read_golden
from isthmus.lines import read_json
from isthmus.model.model import Model
from isthmus.recipe.architecture import ModelSection
from isthmus.recipe.schema import EngineOptions, Thinking

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
LONGEST_SEQUENCE, TRIED_TOKENS = 8192, 32
STATES = ("sealed", "unsealed", "untrusted", "tampered", "refused")
"""What a bundle is, by its seal: see parity/seal.py."""


@dataclass(frozen=True)
class Identity:
    """What a server says it is. `rehearsed` names the chip whose rules were enforced, if any.

    `seal` is the id of a seal that holds, `signer` the public key that signed it. `state` is one of STATES.
    """

    model: str
    format: str
    seal: str | None = None
    pool: str | None = None
    rehearsed: str | None = None
    state: str = "unsealed"
    signer: str | None = None

    @property
    def statement(self) -> str | None:
        """What has to be said wherever the server shows numbers."""
        return f"rehearsed on CPU with the rules of {self.rehearsed}" if self.rehearsed else None


@dataclass
class Service:
    """A running engine on one bundle.

    `tensors` are the weights in use, as stored: what a delta update adds to. The model's own tensors are views of them
    where the format allows it (fp32); otherwise they are held beside it. `is_original` says whether they are the
    bundle's; `revision` counts the exchanges of weights. Prompt tokens may wait up to `max_waiting_tokens`.
    `thinking` is what the server adds to the chat template: see prepare.py. `seal_checks` are the checks of the seal,
    counted by their outcome.
    """

    identity: Identity
    architecture: ModelSection
    core: Core
    tokenizer: Tokenizer
    tensors: Mapping[str, Tensor]
    weights_sha256: str
    rehearsal: dict[str, int] | None = None
    examples: list[str] = field(default_factory=list)
    golden: Golden | None = None
    thinking: Thinking = "auto"
    default_tokens: int | None = None
    other_names: tuple[str, ...] = ()
    seal_checks: Mapping[str, int] = field(default_factory=dict)
    default_temperature: float = 1.0
    max_waiting: int = 4096
    max_waiting_tokens: int | None = None
    is_original: bool = True
    revision: int = 0

    def __post_init__(self) -> None:
        marked = self.tokenizer.template.knows_thinking or self.thinking == "always"
        self.vocabulary = Vocabulary(self.tokenizer, marked)
        self.grammars = Compiler(self.tokenizer, self.architecture.vocab_size)
        self.layout = layout_of(self.tensors)
        self.bundle_version = self.core.version

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the model in the API; the first is the one that answers carry."""
        return (self.identity.model, *self.other_names)

    @property
    def thinks(self) -> bool:
        """Whether answers think, where a request does not say otherwise."""
        return self.tokenizer.thinks if self.thinking == "auto" else self.thinking == "always"

    @cached_property
    def holds_turns(self) -> bool:
        """Whether the chat template gives earlier turns a place in the prompt."""
        turns = {"earlier-question": "user", "earlier-answer": "assistant", "this-question": "user"}
        try:
            prompt = self.tokenizer.chat_text([{"role": role, "content": text} for text, role in turns.items()])
        except IsthmusError:
            return False
        return all(text in prompt for text in turns)

    @property
    def other_ends(self) -> frozenset[int]:
        """The tokens that end an answer beside the tokenizer's own."""
        return frozenset(self.tokenizer.ends[1:])

    @property
    def fingerprint(self) -> str:
        """Seal, or the state of a bundle without one, and weight version: what `system_fingerprint` carries."""
        return f"{self.identity.seal or self.identity.state}-v{self.core.version}"

    @property
    def is_sealed(self) -> bool:
        """Whether the weights in use are those that the seal vouches for."""
        return self.is_original and self.identity.seal is not None

    def answers_numbers(self, text: list[int]) -> bool:
        """Whether the model in use, apart from all requests, gives a number for every token after this text."""
        model = self.core.runner.model
        with torch.inference_mode():
            return bool(torch.isfinite(Trial(model, sequences=1, length=len(text)).prefill([text])).all())

    def exchange(self, tensors: Mapping[str, Tensor], version: int, sha256: str) -> None:
        """Take new weights into use between two steps. Raises IsthmusError if they do not fit; the old ones go on then.

        One caller at a time: WeightUpdates sees to it.
        """
        compare_layouts(self.layout, layout_of(tensors))
        check_finite(tensors)
        self._take(tensors, version, sha256, is_original=False)

    def restore(self, bundle: Bundle) -> None:
        """Go back to the weights of the bundle that this service was started with."""
        compare_layouts(self.layout, layout_of(bundle.tensors))
        self._take(bundle.tensors, self.bundle_version, weights_sha256(bundle.folder), is_original=True)

    def _take(self, tensors: Mapping[str, Tensor], version: int, sha256: str, *, is_original: bool) -> None:
        model = get_format(self.identity.format).build(self.architecture, dict(tensors))
        if not is_original:
            self._try(model)
        self.core.swap(model, version)
        self.revision += 1
        self.tensors, self.weights_sha256, self.is_original = tensors, sha256, is_original

    def _try(self, model: Model) -> None:
        """Let a model that is not in use yet read golden prompts, or tokens from all over its vocabulary.

        Raises DamagedFile if what it answers is not a number: finite weights may overflow.
        """
        known = [answer.prompt[:TRIED_TOKENS] for answer in self.golden.answers] if self.golden else []
        step = max(1, self.architecture.vocab_size // TRIED_TOKENS)
        prompts = [*known, list(range(0, self.architecture.vocab_size, step))[: min(TRIED_TOKENS, self.core.length)]]
        trial = Trial(model, sequences=len(prompts), length=TRIED_TOKENS + 1)
        with torch.inference_mode():
            logits = trial.prefill(prompts)
            answers = [logits, trial.decode(logits.argmax(-1))]
        if not all(bool(torch.isfinite(one).all()) for one in answers):
            raise DamagedFile(
                "the model of these weights answers what is not a number, though each weight is one; the update is "
                "refused and the old weights go on"
            )


def load_service(
    folder: Path,
    *,
    model_name: str | None = None,
    seal: str | None = None,
    pool: str | None = None,
    rehearse: str | None = None,
    slots: int = 256,
    threads: int = 1,
    options: EngineOptions = DEFAULT_OPTIONS,
    state: str | None = None,
    signer: str | None = None,
    thinking: Thinking = "auto",
) -> Service:
    """Read a bundle, rehearse it if asked, and start its core. Raises IsthmusError if it cannot be served.

    `state` is one of STATES; if absent, what follows from whether there is a `seal`. The files of a bundle whose state
    is "tampered" are not held against their hashes again: whoever serves it knows that they differ.
    """
    torch.set_num_threads(threads)
    state = state or ("sealed" if seal else "unsealed")
    bundle = read_bundle(folder, check_files=state != "tampered")
    if state != "tampered":
        check_values(bundle)
    tokenizer = Tokenizer.load(folder)
    model = bundle.build()
    rehearsal = rehearse_steps(model, rehearse) if rehearse else None
    length = min(bundle.architecture.max_position_embeddings, LONGEST_SEQUENCE)
    core = Core(model, eos_id=tokenizer.eos_id, slots=slots, length=length, threads=threads, options=options)
    core.start()
    identity = Identity(model_name or folder.resolve().name, bundle.format, seal, pool, rehearse, state, signer)
    return Service(
        identity,
        bundle.architecture,
        core,
        tokenizer,
        bundle.tensors,
        weights_sha256(folder),
        rehearsal,
        read_examples(folder),
        read_golden(folder),
        thinking,
    )


def rehearse_steps(model: Model, chip: str) -> dict[str, int]:
    """Run a prefill and decode steps under the rules of a chip that is not here; calls by how the chip runs them.

    Raises RehearsalRefused if an operator or a dtype is not allowed there.
    """
    trial = Trial(model, sequences=2, length=8)
    with torch.inference_mode(), enforce(chip) as rehearsal:
        trial.prefill([[0, 1, 2], [1]])
        trial.decode(torch.tensor([1, 2]))
        trial.decode(torch.tensor([1, 0]))
    return {str(status): calls for status, calls in rehearsal.tally.calls.items()}


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
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


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise DamagedFile that names a tensor with a value that is not a number or infinite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DamagedFile(f"{name} has values that are infinite or not a number")


def read_examples(folder: Path) -> list[str]:
    """Prompts to try, from the bundle's examples.json (a list of strings), which it need not have."""
    path = folder / "examples.json"
    if not path.is_file():
        return []
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
        raise IsthmusError(f"{path} must be a JSON list of strings")
    return content


def _describe(kind: tuple[torch.dtype, tuple[int, ...]]) -> str:
    return f"{str(kind[0]).removeprefix('torch.')}{list(kind[1])}"
