"""Names in published checkpoints beyond those of the model: scales of fp8 blocks, copies in the MTP layer."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from isthmus.formats.parts.assemble import EMBEDDING, HEAD
from isthmus.recipe.architecture import ModelSection

SCALE = "_scale_inv"
"""Ending of the name of a weight's scales, in DeepSeek's fp8."""
ROWS_AT_ONCE = 16


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
    values = _in_fp32(weight)
    for index, factors in enumerate(scale.to(torch.float32)):
        wide = factors.repeat_interleave(columns)[: values.shape[1]]
        values[index * rows : (index + 1) * rows] *= wide
    return values


def _in_fp32(weight: Tensor) -> Tensor:
    """e4m3 in fp32: by a table, as torch converts values one by one on a CPU, some rows at a time for its caches."""
    if weight.device.type != "cpu" or weight.dtype != torch.float8_e4m3fn:
        return weight.to(torch.float32)
    table = torch.arange(256, dtype=torch.uint8).view(weight.dtype).to(torch.float32).numpy()
    values = torch.empty(weight.shape)
    codes, numbers = weight.view(torch.uint8).numpy(), values.numpy()
    for start in range(0, len(codes), ROWS_AT_ONCE):
        here = slice(start, start + ROWS_AT_ONCE)
        numpy.take(table, codes[here], out=numbers[here], mode="clip")
    return values
