"""Slices on disk: bundles of a few layers of another, whose embedding may hold what reaches the first of these layers.

Every place of the golden sequences gets a token id of its own, and the row of the embedding at that id is the input of
the slice's first layer at that place. So whatever takes token ids feeds the slice its golden input: no engine needs a
way to take vectors, and none can compute them differently. The output head is the whole model's.

Shapes: N places of all sequences, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats import DESCRIPTION, get_format
from isthmus.formats.files.beside import beside_weights
from isthmus.formats.files.bundle import CHECKSUMS, Bundle, file_hashes, read_object
from isthmus.formats.files.published import CONFIG, weight_files, write_tensors
from isthmus.formats.parts.assemble import EMBEDDING, HEAD
from isthmus.formats.parts.slices import cut_architecture, tensors_of_layers
from isthmus.model.config import hf_config
from isthmus.run import new_folder, write_atomic

SLICE = "slice.json"
GENERATION = "generation_config.json"


class Slice(BaseModel):
    """The content of slice.json: which layers of which weights, and how long the sequences of golden places are.

    Without `lengths` the embedding is the whole model's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    of: str
    layers: tuple[int, int]
    lengths: list[int]

    @property
    def name(self) -> str:
        """The layers in the published names."""
        first, end = self.layers
        return f"model.layers.{first}" if end == first + 1 else f"model.layers.{first} to {end - 1}"

    def sequences(self) -> list[list[int]]:
        """The token ids of the golden places."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [list(range(end - length, end)) for end, length in zip(ends, self.lengths, strict=True)]


def read_slice(folder: Path) -> Slice:
    """Raises IsthmusError if the folder is no slice, DamagedFile if it cannot be read."""
    path = folder / SLICE
    if not path.is_file():
        raise IsthmusError(f"{folder} is no slice of a bundle: `isthmus slice BUNDLE OUT --each` writes them")
    try:
        return Slice.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DamagedFile(f"{path} cannot be read: {error}") from None


def weights_id(folder: Path) -> str:
    """What tells the weights of a bundle from others: a hash of the recorded hashes of its weight files."""
    recorded = read_object(folder / CHECKSUMS)
    hashes = [recorded[path.name] for path in weight_files(folder)]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def write_slice(folder: Path, bundle: Bundle, layers: range, inputs: Tensor | None, lengths: list[int]) -> None:
    """Write these layers of a bundle as an unsealed bundle of its own.

    `inputs` [N, D] are what reaches the first of them at the places of sequences of these `lengths`, and become the
    first rows of the embedding; without them it stays as it is. Raises IsthmusError if there are more places than
    token ids, or no such layers.
    """
    cut = cut_architecture(bundle.architecture, layers)
    tensors = {name: bundle.tensors[whole] for name, whole in tensors_of_layers(bundle.tensors, layers).items()}
    if inputs is not None:
        if len(inputs) > cut.vocab_size:
            raise IsthmusError(f"{len(inputs)} golden places need as many token ids, and there are {cut.vocab_size}")
        tensors.setdefault(HEAD, tensors[EMBEDDING])
        table = torch.zeros_like(tensors[EMBEDDING])
        table[: len(inputs)] = inputs.to(table.dtype)
        tensors[EMBEDDING] = table
        cut = cut.model_copy(update={"tie_word_embeddings": False})
    told = Slice(of=weights_id(bundle.folder), layers=(layers.start, layers.stop), lengths=lengths)
    with new_folder(folder) as new:
        beside_weights(bundle.folder).copy(bundle.folder, new)
        if (bundle.folder / GENERATION).is_file():
            shutil.copyfile(bundle.folder / GENERATION, new / GENERATION)
        _write_json(new / CONFIG, _config(bundle, cut, layers))
        if (bundle.folder / DESCRIPTION).is_file():
            described = read_object(bundle.folder / DESCRIPTION)
            kept = {name: described[whole] for name, whole in tensors_of_layers(described, layers).items()}
            _write_json(new / DESCRIPTION, kept)
        _write_json(new / SLICE, told.model_dump(mode="json"))
        hashes = write_tensors(new, {name: tensor.contiguous() for name, tensor in tensors.items()})
        _write_json(new / CHECKSUMS, file_hashes(new, known=hashes))


def _config(bundle: Bundle, cut: Any, layers: range) -> dict[str, Any]:
    """config.json of a slice: its architecture, with what the whole announces of its quantisation."""
    whole = read_object(bundle.folder / CONFIG)
    config = hf_config(
        cut,
        dtype=get_format(bundle.format).dtype,
        bos_token_id=whole.get("bos_token_id"),
        eos_token_id=whole["eos_token_id"],
    )
    if quantisation := whole.get("quantization_config"):
        ignored = quantisation.get("ignore")
        cut_ignored = {} if ignored is None else {"ignore": list(tensors_of_layers(ignored, layers))}
        config["quantization_config"] = quantisation | cut_ignored
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(content, sort_keys=True, indent=2).encode() + b"\n")
