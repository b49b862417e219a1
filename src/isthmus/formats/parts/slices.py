"""Some layers of a model as a model of their own: its architecture, and the names of its tensors.

Layers are numbered as in published checkpoints: the layers of the network from 0, then the one for multi-token
prediction. What lies outside the layers (embedding, last norm, output head) is in every slice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeVar

from isthmus.errors import IsthmusError
from isthmus.recipe.architecture import ModelSection

Architecture = TypeVar("Architecture", bound=ModelSection)
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def cut_architecture(architecture: Architecture, layers: range) -> Architecture:
    """The architecture of these layers alone, each of the kind that it has in the whole.

    A slice of nothing but the layer for multi-token prediction has no other layer, which a model in memory can do
    without and config.json cannot. Raises IsthmusError for layers that are not there or do not follow each other.
    """
    depth, extra = architecture.num_hidden_layers, architecture.num_nextn_predict_layers
    if layers.step != 1 or not layers or layers.start < 0 or layers.stop > depth + extra:
        raise IsthmusError(
            f"a slice is of layers that follow each other, of the {depth + extra} that there are, and not {layers}"
        )
    regular = range(min(layers.start, depth), min(layers.stop, depth))
    changes: dict[str, Any] = {
        "num_hidden_layers": len(regular),
        "num_nextn_predict_layers": max(layers.stop - depth, 0),
    }
    if (dense := getattr(architecture, "first_k_dense_replace", None)) is not None:
        changes["first_k_dense_replace"] = max(min(dense, regular.stop) - regular.start, 0)
    if (kinds := getattr(architecture, "layer_types", None)) is not None:
        changes["layer_types"] = [kinds[index] for index in regular]
    if (step := getattr(architecture, "decoder_sparse_step", None)) is not None:
        dense = [i for i in regular if (i + 1) % step or i in getattr(architecture, "mlp_only_layers", ())]
        changes |= {"decoder_sparse_step": 1, "mlp_only_layers": [index - regular.start for index in dense]}
    return architecture.model_copy(update=changes)


def tensors_of_layers(names: Iterable[str], layers: range) -> dict[str, str]:
    """Which names belong to a slice: the name in it of each, and the name that it has in the whole, in their order.

    Names of anything that lies in layers, such as entries of a description of the weights, are cut as well.
    """
    found = {}
    for name in names:
        layer = _LAYER.match(name)
        if layer is None:
            found[name] = name
        elif int(layer[1]) in layers:
            found[f"model.layers.{int(layer[1]) - layers.start}.{name[layer.end() :]}"] = name
    return found
