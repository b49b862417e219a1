"""Names in published checkpoints beyond those of the model: scales of fp8 blocks, copies in the MTP layer."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.formats.parts.assemble import EMBEDDING, HEAD
from isthmus.recipe.architecture import ModelSection

SCALE = "_scale_inv"
"""Ending of the name of a weight's scales, in DeepSeek's fp8."""


def mtp_copies(architecture: ModelSection) -> dict[str, str]:
    """Names of the copies that published checkpoints keep in the MTP layer, and of the tensors they copy."""
    if not architecture.num_nextn_predict_layers:
        return {}
    prefix = f"model.layers.{architecture.num_hidden_layers}"
    head = EMBEDDING if architecture.tie_word_embeddings else HEAD
    return {f"{prefix}.embed_tokens.weight": EMBEDDING, f"{prefix}.shared_head.head.weight": head}


def dequantise_blocks(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """weight [M, N] times the factor of its block, in fp32; scale [ceil(M / block[0]), ceil(N / block[1])]."""
    rows, columns = block
    values = weight.to(torch.float32)
    for index, factors in enumerate(scale.to(torch.float32)):
        wide = factors.repeat_interleave(columns)[: values.shape[1]]
        values[index * rows : (index + 1) * rows] *= wide
    return values
