"""int8 layers: symmetric and asymmetric sums against int64, and the dtypes of a target build."""

from __future__ import annotations

import pytest
import torch

from isthmus.formats import get_format
from isthmus.formats.parts.int8 import exact_matmul, quantise_rows
from isthmus.formats.w8a8 import W8A8Experts, W8A8Linear
from isthmus.model.model import Model
from tests.support.small import tiny_architecture as architecture


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 96, 1024, 1025, 5000])
def test_asymmetric_sums_equal_int64_at_the_ends_of_the_range(length):
    generator = torch.Generator().manual_seed(length)
    a = torch.randint(-128, 128, (5, length), generator=generator)
    b = torch.randint(-127, 128, (length, 7), generator=generator)
    a[0], b[:, 0] = -128, -127
    addend = torch.randint(-(2**20), 2**20, (7,), generator=generator)
    found = exact_matmul(a.float(), b.float(), addend.to(torch.int32))
    assert torch.equal(found, (a @ b + addend).float())
    assert torch.equal(exact_matmul(a.float(), b.float()), (a @ b).float())


def w8a8_linear(bias: bool = False) -> W8A8Linear:
    values, scale = quantise_rows(drawn(24, 96))
    return W8A8Linear((values.to(torch.int8), scale), bias=bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_go_in_and_come_out_and_fp32_is_used_between(dtype):
    layer, x = w8a8_linear(bias=True), drawn(5, 96, seed=1).to(dtype)
    layer.bias = drawn(24, seed=2)
    found = layer(x)
    assert found.dtype == dtype
    assert torch.equal(found, layer(x.float()).to(dtype))


def test_a_model_in_bf16_keeps_its_scales():
    arch = architecture(q_lora_rank=14)
    tensors = get_format("w8a8").export(Model(arch).initialise(0).state_dict(), arch)
    tokens = torch.arange(20)[None] % 61
    plain, half = (get_format("w8a8").build(arch, tensors) for _ in range(2))
    half.to(torch.bfloat16)
    for module, other in zip(half.modules(), plain.modules(), strict=True):
        if isinstance(module, W8A8Linear | W8A8Experts):
            for (name, found), (_, wanted) in zip(module.named_buffers(), other.named_buffers(), strict=True):
                assert torch.equal(found, wanted) and found.dtype == torch.float32, name
    found, wanted = half(tokens), plain(tokens)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() / wanted.norm() < 0.1
