"""Capture: golden inputs and outputs go into a bundle where the trained weights are, for the target to replay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from isthmus.data.prompts import FORM, PromptFile
from isthmus.errors import GateRefused, IsthmusError
from isthmus.formats.files.basis import read_conversion
from isthmus.formats.files.bundle import CONFIG, open_bundle
from isthmus.formats.files.published import Checkpoint, StoredTensors
from isthmus.parity.capture import SYNTHETIC, CaptureOptions, GoldenList, GoldenSet, capture, synthetic_prompts
from isthmus.parity.coverage import check_coverage
from isthmus.parity.gate import refusal, refuses
from isthmus.parity.manifest import write_manifest
from isthmus.parity.sanity import check_sanity
from isthmus.progress import Watch
from isthmus.recipe.architecture import ModelSection
from isthmus.records import Check


def execute(folder: Path, source: Path, prompts: Path | None, synthetic: bool, max_mb: int, watch: Watch) -> GoldenList:
    """Check that every weight of `source` is in the bundle, and write its golden inputs and its manifest.

    Raises GateRefused if a weight is not, or if the source makes no sense of the prompts, IsthmusError if there are no
    prompts or the source does not fit.
    """
    with open_bundle(folder) as bundle, source_weights(source, bundle.architecture) as weights:
        watch.say(f"  {len(weights)} tensors of {source}, {len(bundle.tensors)} of {folder} in {bundle.format}")
        made = read_conversion(folder)
        entries, checks = check_coverage(weights, folder, balance=made.balance.apply, compensated=made.inputs)
        require(checks, folder)
        chosen, origin = _golden_prompts(folder, bundle.architecture, prompts, synthetic)
        options = CaptureOptions(max_bytes=max_mb << 20, origin=origin, synthetic=synthetic)
        with watch.count("capture", len(bundle.tensors)) as counter:
            listed = capture(
                folder,
                made.balance.state(weights),
                chosen,
                options,
                lambda done, total: counter.advance_to(done * counter.total // total),
                bundle,
            )
    write_manifest(folder, coverage=entries, architecture=bundle.architecture)
    rows = f"{len(listed.rows)} rows of {len(listed.rows[0])} tokens"
    watch.say(f"  golden inputs of {len(listed.blocks)} blocks on {rows}")
    if listed.bound:
        watch.say(f"  {listed.bound}")
    if listed.cost is not None:
        watch.say(f"  {bundle.format} costs {listed.cost.kl:.3g} nats per token to the trained model; {listed.cost}")
    sane = check_sanity(GoldenSet(folder), bundle.architecture.vocab_size)
    if refuses(sane):
        raise GateRefused(refusal(f"{source} is not what a trained model is; {folder} would not be sealed:", [sane]))
    watch.say(f"  {sane.name}: {sane.detail}")
    if not synthetic:
        watch.say(f"  [yellow]the prompts of {origin} are in the bundle, and who has it can read them[/]")
    watch.say(f"  next, on the machine of the target: isthmus verify {folder}")
    return listed


def _golden_prompts(
    folder: Path, architecture: ModelSection, prompts: Path | None, synthetic: bool
) -> tuple[list[list[int]], str]:
    """Token ids, and where they come from."""
    if synthetic:
        return synthetic_prompts(architecture.vocab_size), SYNTHETIC
    if prompts is not None:
        return PromptFile(prompts, folder, architecture.vocab_size).sequences(), prompts.name
    raise IsthmusError(
        f"say what the model is to be asked: --prompts FILE.jsonl, where a line is {FORM}; or --synthetic for "
        "random tokens. Who has the bundle can read its golden prompts"
    )


@contextmanager
def source_weights(source: Path, architecture: ModelSection) -> Iterator[Mapping[str, Tensor]]:
    """Float weights of a checkpoint in Hugging Face layout, fp8 dequantised, by published name; read when asked for."""
    if not (source / CONFIG).is_file():
        raise IsthmusError(f"{source} is no checkpoint: it has no {CONFIG}. --source names the trained weights")
    with StoredTensors(source) as stored:
        yield Checkpoint(stored, architecture).state()


def require(checks: list[Check], folder: Path) -> None:
    """Raise GateRefused with what refuses."""
    if refusing := list(filter(refuses, checks)):
        raise GateRefused(f"{refusal(f'{folder} is not what its source became:', refusing[:8])}\nConvert it again.")
