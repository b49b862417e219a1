"""Deltas: any two versions come back bit for bit, and anything else is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats.delta import apply, describe, encode, is_delta
from isthmus.formats.wire import pack, set_sha256

DTYPES = [torch.int8, torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int64]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (40, 9)]


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], draw: np.random.Generator) -> torch.Tensor:
    """Every pattern of bits, those of NaN and infinity too."""
    size = torch.empty(0, dtype=dtype).element_size() * int(np.prod(shape))
    data = torch.from_numpy(draw.integers(0, 256, size, dtype=np.uint8))
    return data.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def changed(tensor: torch.Tensor, share: float, draw: np.random.Generator) -> torch.Tensor:
    bits = tensor.clone().reshape(-1)
    if not bits.numel():
        return tensor.clone()
    other = random_bits(tensor.dtype, tuple(bits.shape), draw)
    mask = torch.from_numpy(draw.random(bits.numel()) < share)
    return (
        torch.where(
            mask,
            other.view(torch.uint8).reshape(bits.numel(), -1).T,
            bits.view(torch.uint8).reshape(bits.numel(), -1).T,
        )
        .T.contiguous()
        .view(tensor.dtype)
        .reshape(tensor.shape)
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_kind = (a.dtype, a.shape) == (b.dtype, b.shape)
    return same_kind and a.contiguous().reshape(-1).view(torch.uint8).equal(
        b.contiguous().reshape(-1).view(torch.uint8)
    )


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES)), min_size=1, max_size=4),
    share=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    codec=st.sampled_from(["zstd", "zlib"]),
    seed=st.integers(0, 2**31),
)
def test_any_two_versions_come_back_bit_for_bit(kinds, share, codec, seed):
    draw = np.random.default_rng(seed)
    old = {f"t{i}": random_bits(dtype, shape, draw) for i, (dtype, shape) in enumerate(kinds)}
    new = {name: changed(tensor, share, draw) for name, tensor in old.items()}
    kept = {name: tensor.clone() for name, tensor in old.items()}
    payload, hashes = encode(old, new, base_version=4, version=5, codec=codec)
    found, found_hashes = apply(payload, old)
    assert found.keys() == new.keys() and all(same_bits(found[name], new[name]) for name in new)
    assert all(same_bits(old[name], kept[name]) for name in old), "the old version is left as it is"
    assert hashes == found_hashes
    told = describe(payload)
    assert (told.base_version, told.version) == (4, 5) and told.changed <= len(old)
    assert (told.base_sha256, told.sha256) == (set_sha256(old), set_sha256(new))


def versions(step: float = 1e-3) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An int8 matrix with its scales, and a bf16 vector, before and after a small step of the weights behind them."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    moved = weight + step * torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    return tuple(
        {
            "w": (w / w.abs().amax(-1, keepdim=True) * 127).round().to(torch.int8),
            "s": w.abs().amax(-1, keepdim=True) / 127,
            "n": w[:, 0].bfloat16(),
        }
        for w in (weight, moved)
    )


def test_a_small_step_is_a_small_message():
    old, new = versions()
    payload, _ = encode(old, new, base_version=0, version=1)
    whole = len(pack(new))
    assert len(payload) < 0.15 * whole
    nothing, _ = encode(new, new, base_version=1, version=2)
    assert len(nothing) < 300 and apply(nothing, new)[0].keys() == new.keys()


def test_a_delta_on_other_weights_is_refused():
    old, new = versions()
    payload, _ = encode(old, new, base_version=0, version=1)
    with pytest.raises(DamagedFile, match="take a full snapshot"):
        apply(payload, new)


def test_every_flipped_bit_is_refused_or_changes_nothing():
    old, new = versions()
    payload, _ = encode(old, new, base_version=0, version=1)
    for place in range(0, len(payload), max(1, len(payload) // 200)):
        damaged = bytearray(payload)
        damaged[place] ^= 0x20
        try:
            found, _ = apply(bytes(damaged), old)
        except (DamagedFile, IsthmusError):
            continue
        assert all(same_bits(found[name], new[name]) for name in new), f"byte {place}"
    for cut in (0, 10, len(payload) // 2, len(payload) - 1):
        with pytest.raises(DamagedFile):
            apply(payload[:cut], old)


def test_other_layouts_are_refused_and_messages_told_apart():
    old, new = versions()
    with pytest.raises(IsthmusError, match="same tensors"):
        encode(old, {**new, "n": new["n"].float()}, base_version=0, version=1)
    assert not is_delta(pack(new)) and is_delta(encode(old, new, base_version=0, version=1)[0])
