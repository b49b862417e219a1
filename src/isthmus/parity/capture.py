"""Golden inputs and outputs: what the source's machine writes into a bundle for the target's machine to replay.

For the attention and the MLP of every layer, `golden/replay.safetensors` holds the input on golden prompts, rounded to
bf16 so that every target gets the same numbers; what the exact emulator of the format makes of it; and by how much the
trained weights would have made something else of it. `golden/replay.json` lists the prompts, and says what the format
costs in nats on them; `golden/tokens.safetensors` holds the log-probabilities that the trained model, the emulator and
healthy twins of it give their tokens. Who has the bundle can read the prompts: private ones must not be captured, and
synthetic ones (random tokens) can take their place.

Shapes: B rows of T tokens, D hidden, N completion tokens of all golden sequences, K twins.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isthmus.errors import DamagedFile, GateRefused, IsthmusError
from isthmus.formats import Layout, get_format
from isthmus.formats.files.bundle import SEAL, Bundle, open_bundle
from isthmus.formats.files.published import weight_files
from isthmus.formats.files.stream import WEIGHTS, TensorWriter, tensor_bytes
from isthmus.formats.parts.pieces import at_hand, streamed
from isthmus.model.model import Model
from isthmus.parity.blocks import Block, blocks_of, inputs_by_layer, run_block, same_experts
from isthmus.parity.cost import FormatCost, measure_cost
from isthmus.parity.manifest import add_file, move_file
from isthmus.parity.target import DTYPES, stream_twin
from isthmus.parity.tokens import GoldenSequence, TokenParity, Told
from isthmus.parity.twins import GRANTED, SEED, Healthy, ask_twins

FOLDER, TENSORS, LIST = "golden", "golden/replay.safetensors", "golden/replay.json"
TOKENS = "golden/tokens.safetensors"
FIRST, TWINS = "emulator.first", "twins."
"""Names in it: the emulator's first choices, and the twins of an arithmetic."""
BYTES_PER_VALUE = 2 + 4 + 2
FEWEST_TOKENS, MOST_TOKENS = 8, 128
"""Tokens whose block inputs are kept. `benchmarks/gate.py` replays 96; more of them cost time and find nothing more."""
FREE_BYTES, SHARE_OF_WEIGHTS = 64_000_000, 0.05
"""Golden inputs and outputs take no more than this and that share of the bundle's weights."""
SYNTHETIC, SYNTHETIC_PROMPTS, SYNTHETIC_TOKENS = "random tokens", 16, 64
"""The origin of prompts that stand for none, how many they are, and of how many tokens."""
PRIVACY = "Whoever has this bundle can read these prompts and what follows them."


@dataclass(frozen=True)
class CaptureOptions:
    """`max_bytes` bounds the golden inputs and outputs, below what FREE_BYTES and SHARE_OF_WEIGHTS leave them;
    `max_tokens` the length of a row. `origin` says where the prompts come from, `arithmetics` of which dtypes twins are
    asked here, so that no verification has to."""

    max_bytes: int = 256 << 20
    max_tokens: int = 64
    arithmetics: tuple[str, ...] = ("fp32",)
    origin: str = "not said"
    synthetic: bool = False


class GoldenList(BaseModel):
    """The content of golden/replay.json. `sequences` are pairs of a prompt and what follows it, for whole-model checks.

    `rows` [B, T] are the tokens whose block inputs were kept; `bounded` says that there were more of them, and `bound`
    of how many they are, and why. `cost` is None in a bundle whose capture did not measure it. `arithmetics` are those
    of the healthy twins that were asked of the sequences.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    privacy: str = PRIVACY
    format: str
    origin: str
    synthetic: bool
    bounded: bool
    bound: str = ""
    rows: list[list[int]]
    sequences: list[tuple[list[int], list[int]]]
    blocks: list[str]
    cost: FormatCost | None = None
    arithmetics: tuple[str, ...] = ()

    def golden_sequences(self) -> list[GoldenSequence]:
        return [GoldenSequence(prompt, completion) for prompt, completion in self.sequences]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities [N] of the completion tokens of all golden sequences, one after the other, in float64."""

    trained: Tensor
    emulator: Tensor


@dataclass(frozen=True)
class GoldenBlock:
    """Of one block, in fp32: `input` and `output` (the emulator's) [B, T, D], and `float_output`, the trained one's.

    The last is NaN for tokens that the trained weights send to other experts: quantisation did not cause that.
    """

    input: Tensor
    output: Tensor
    float_output: Tensor


class GoldenSet:
    """The golden inputs and outputs of a bundle, read block by block. Raises DamagedFile if they cannot be read."""

    def __init__(self, folder: Path):
        path = folder / LIST
        if not path.is_file():
            raise IsthmusError(
                f"{folder} has no golden inputs. Run `isthmus capture {folder} --source WEIGHTS` where the trained "
                "weights are, before the bundle is copied"
            )
        try:
            self.listed = GoldenList.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise DamagedFile(f"{path} cannot be read: {error}") from None
        self.folder = folder

    def block(self, path: str) -> GoldenBlock:
        """Everything of the block at this path."""
        names = (f"{path}.input", f"{path}.output", f"{path}.quantisation")
        given, output, lost = (one.float() for one in self._read(TENSORS, names, f"the golden inputs of {path}"))
        return GoldenBlock(given, output, output + lost)

    @property
    def cost(self) -> FormatCost:
        """What the format costs. Raises IsthmusError if the capture did not measure it."""
        if self.listed.cost is None:
            raise IsthmusError(
                f"{self.folder} does not say what the trained model makes of its golden sequences: run "
                f"`isthmus capture {self.folder} --source WEIGHTS` again where the trained weights are"
            )
        return self.listed.cost

    def token_logprobs(self) -> TokenLogprobs:
        """What the trained model and the emulator say of the golden tokens; raises as `cost` does."""
        _ = self.cost
        return TokenLogprobs(*self._read(TOKENS, ("trained", "emulator"), "the log-probabilities of golden tokens"))

    def healthy(self, arithmetic: str) -> Healthy | None:
        """What the emulator said of the golden tokens, and healthy twins of this arithmetic; None if none was asked."""
        _ = self.cost
        names = ("emulator", FIRST, f"{TWINS}{arithmetic}")
        what = "what the emulator and healthy twins said of golden tokens"
        if arithmetic not in self.listed.arithmetics:
            return None
        logprobs, first, twins = self._read(TOKENS, names, what)
        return Healthy(Told(logprobs, first.long()), twins)

    def _read(self, file: str, names: tuple[str, ...], what: str) -> list[Tensor]:
        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as stored:
                return [stored.get_tensor(name) for name in names]
        except (SafetensorError, OSError) as error:
            raise DamagedFile(f"{path} does not hold {what}: {error}") from None


def capture(
    bundle_folder: Path,
    source: Mapping[str, Tensor],
    prompts: list[list[int]],
    options: CaptureOptions | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
    opened: Bundle | None = None,
) -> GoldenList:
    """Write the golden inputs of an unsealed bundle. `source` are the trained weights with their published names.

    `prompts` are token ids: of each, the first half is a prompt and the rest what follows it. `tell` hears of progress;
    `opened` is the bundle, where it is open, and so was checked, already.
    Raises GateRefused if the bundle is sealed, IsthmusError if there is no usable prompt.
    """
    options = options or CaptureOptions()
    if (bundle_folder / SEAL).exists():
        raise GateRefused(f"{bundle_folder} is sealed: what it holds cannot be changed. Capture before it is verified")
    with nullcontext(opened) if opened is not None else open_bundle(bundle_folder) as bundle:
        room = bundle.architecture.max_position_embeddings
        usable = [prompt[:room] for prompt in prompts if len(prompt) > 1]
        if not usable:
            raise IsthmusError("golden prompts need two tokens at least; give others")
        sequences = [GoldenSequence.halved(prompt) for prompt in usable]
        emulator = bundle.stream()
        trained = streamed(bundle.architecture, source, get_format("fp32").build)
        blocks = blocks_of(emulator)
        rows, bound = _bounded_rows(usable, bundle, len(blocks), options)
        _write_replay(bundle_folder, _run(emulator, trained, rows), blocks, rows.shape, emulator, tell)
        cost, found = measure_cost(trained, emulator, sequences)
        twins = {name: _twins(bundle, name, sequences) for name in options.arithmetics}
    add_file(bundle_folder, TOKENS, _tokens_file(found, twins))
    listed = GoldenList(
        format=bundle.format,
        origin=options.origin,
        synthetic=options.synthetic,
        bounded=bool(bound),
        bound=bound,
        rows=rows.tolist(),
        sequences=[(one.prompt, one.completion) for one in sequences],
        blocks=[block.path for block in blocks],
        cost=cost,
        arithmetics=options.arithmetics,
    )
    add_file(bundle_folder, LIST, listed.model_dump_json().encode() + b"\n")
    return listed


def _twins(bundle: Bundle, arithmetic: str, sequences: list[GoldenSequence]) -> Tensor:
    return ask_twins(stream_twin(bundle, DTYPES[arithmetic], SEED, GRANTED), sequences)


def _tokens_file(found: TokenParity, twins: Mapping[str, Tensor]) -> bytes:
    """What trained model, emulator and twins said, as the content of golden/tokens.safetensors."""
    of_trained, of_emulator = found.logprobs
    tensors = {"trained": of_trained, "emulator": of_emulator, FIRST: found.first[1].int()}
    tensors |= {f"{TWINS}{arithmetic}": said for arithmetic, said in twins.items()}
    contiguous = {name: one.contiguous() for name, one in tensors.items()}
    return safetensors.torch.save(contiguous, metadata={"format": "pt"})


def synthetic_prompts(
    vocab_size: int, count: int = SYNTHETIC_PROMPTS, tokens: int = SYNTHETIC_TOKENS, seed: int = 0
) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count, tokens), generator=generator).tolist()


def _bounded_rows(prompts: list[list[int]], bundle: Bundle, blocks: int, options: CaptureOptions) -> tuple[Tensor, str]:
    """The first prompts that fit into the size, as rows [B, T] with zeros behind the shorter ones, and what was left
    out."""
    weights = sum(path.stat().st_size for path in weight_files(bundle.folder))
    size = min(options.max_bytes, int(FREE_BYTES + SHARE_OF_WEIGHTS * weights))
    fitting = max(size // (BYTES_PER_VALUE * bundle.architecture.hidden_size * blocks), FEWEST_TOKENS)
    most, longest = min(fitting, MOST_TOKENS), max(map(len, prompts))
    width = min(longest, options.max_tokens, most)
    kept = prompts[: max(1, most // width)]
    rows = torch.tensor([prompt[:width] + [0] * (width - len(prompt)) for prompt in kept])
    if len(kept) == len(prompts) and width == longest:
        return rows, ""
    why = f"{size / 1e6:.0f} MB hold no more" if fitting < MOST_TOKENS else f"{MOST_TOKENS} tokens are enough"
    of_them = f"{len(kept)} of {len(prompts)} prompts, and up to {width} of {longest} tokens of each"
    return rows, f"golden inputs are of {of_them}: {why}"


GoldenTensors = tuple[Tensor, Tensor, Tensor]
"""Input, output and what quantisation changed of it, of a block."""


@torch.inference_mode()
def _run(emulator: Model, trained: Model, rows: Tensor) -> Iterator[tuple[str, GoldenTensors]]:
    """What is kept of each block, one after the other."""
    blocks = {block.path: block for block in blocks_of(emulator)}
    for inputs in inputs_by_layer(emulator, rows):
        for path, x in inputs.items():
            with at_hand(trained, path):
                yield path, _golden(emulator, trained, blocks[path], x.bfloat16())


def _golden(emulator: Model, trained: Model, block: Block, given: Tensor) -> GoldenTensors:
    output, routing = run_block(emulator, block, given.float())
    wanted, choice = run_block(trained, block, given.float())
    if routing is not None and choice is not None:
        wanted[~same_experts(routing, choice).view(given.shape[:-1])] = float("nan")
    return given, output.float(), (wanted - output).bfloat16()


def _write_replay(
    bundle_folder: Path,
    found: Iterable[tuple[str, GoldenTensors]],
    blocks: list[Block],
    shape: torch.Size,
    emulator: Model,
    tell: Callable[[int, int], None],
) -> None:
    """Write golden/replay.safetensors block by block; it takes its place in the bundle when it is whole."""
    whole = (*shape, emulator.architecture.hidden_size)
    kinds = {"input": torch.bfloat16, "output": torch.float32, "quantisation": torch.bfloat16}
    layout: Layout = {f"{block.path}.{name}": (dtype, whole) for block in blocks for name, dtype in kinds.items()}
    size = sum(tensor_bytes(*kind) for kind in layout.values())
    with tempfile.TemporaryDirectory(prefix=f".{bundle_folder.name}.", dir=bundle_folder.parent) as scratch:
        with TensorWriter(Path(scratch), layout, size, f"the golden inputs of {bundle_folder}") as writer:
            for done, (path, tensors) in enumerate(found):
                tell(done, len(blocks))
                for name, tensor in zip(kinds, tensors, strict=True):
                    writer.write(f"{path}.{name}", tensor.contiguous())
            writer.finish()
        move_file(bundle_folder, TENSORS, Path(scratch) / WEIGHTS, writer.hashes[WEIGHTS])
    tell(len(blocks), len(blocks))
