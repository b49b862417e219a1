"""Slice: bundles of a few layers of a bundle, each fed its golden input, so that an engine shows them one by one.

At full depth an engine's tokens show only what costs quality: int8 activations amplify every last bit. In one layer
they do not, and a fault is told from rounding, with the layer that has it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from isthmus.errors import IsthmusError
from isthmus.formats.files.bundle import read_bundle
from isthmus.formats.files.sliced import write_slice
from isthmus.model.model import Model
from isthmus.parity.capture import GoldenSet
from isthmus.parity.tokens import distinct
from isthmus.progress import Watch


def execute(
    folder: Path, out: Path, watch: Watch, *, layers: str | None, each: bool, bare: bool, tokens: int
) -> list[Path]:
    """Write one slice at `out`, or one of each layer into folders in it. Raises IsthmusError for layers that are not
    there, and for a bundle without golden sequences unless `bare`."""
    if (layers is None) == (not each):
        raise IsthmusError("say which layers: --layers 3, --layers 3:5, or --each for every layer by itself")
    bundle = read_bundle(folder)
    depth = bundle.architecture.num_hidden_layers
    chosen = [range(layer, layer + 1) for layer in range(depth)] if each else [_layers(layers or "", depth)]
    rows = [] if bare else golden_rows(GoldenSet(folder), tokens)
    inputs = layer_inputs(bundle.build(), rows, {one.start for one in chosen}) if rows else {}
    written = []
    with watch.count("slices", len(chosen)) as counter:
        for done, one in enumerate(chosen, start=1):
            target = out / f"layer-{one.start:03d}" if each else out
            write_slice(target, bundle, one, inputs.get(one.start), [len(row) for row in rows])
            written.append(target)
            counter.advance_to(done)
    what = "their golden inputs as embeddings" if rows else "the embedding of the whole"
    watch.say(f"  wrote {len(written)} slices of {folder} with {what}, {sum(map(len, rows))} places")
    return written


def golden_rows(golden: GoldenSet, tokens: int) -> list[list[int]]:
    """The golden sequences, each once, the last one cut so that there are at most so many tokens."""
    sequences = golden.listed.golden_sequences()
    rows: list[list[int]] = []
    for place in distinct(sequences):
        row = [*sequences[place].prompt, *sequences[place].completion][: tokens - sum(map(len, rows))]
        if len(row) > 1:
            rows.append(row)
    return rows


@torch.inference_mode()
def layer_inputs(model: Model, rows: list[list[int]], layers: set[int]) -> dict[int, Tensor]:
    """What reaches each of these layers at all places of the rows, each row by itself: [N, D] by layer, in bf16."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, given: found[layer].append(given[0][0].bfloat16())

    handles = [model.model.layers[layer].register_forward_pre_hook(keep(layer)) for layer in layers]
    try:
        for row in rows:
            model.hidden(torch.tensor([row]))
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _layers(text: str, depth: int) -> range:
    first, _, end = text.partition(":")
    try:
        chosen = range(int(first), int(end) if end else int(first) + 1)
    except ValueError:
        raise IsthmusError(
            f"--layers {text!r} is not understood: write 3 for layer 3, 3:5 for layers 3 and 4"
        ) from None
    if not chosen or chosen.start < 0 or chosen.stop > depth:
        raise IsthmusError(f"--layers {text} is not within the layers 0 to {depth - 1} of this bundle")
    return chosen
