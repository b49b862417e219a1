"""Deltas of stored tensors: lossless for any bit patterns, small where little changed, refused where damaged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats.updates import delta
from isthmus.formats.updates.delta import WeightSet, WrongBase, apply, encode, read_message, split_messages

DTYPES = [
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
]
SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (16, 33), (5, 1, 90)]


def bits(generator, dtype, shape):
    """A tensor of any bit patterns that its dtype has, NaNs and infinities among them."""
    width = torch.empty((), dtype=dtype).element_size()
    count = torch.Size(shape).numel()
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(high, (count * width,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same_bits(one, other):
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


def mixed(generator, old, share):
    """`old` with a share of its elements drawn anew."""
    new = bits(generator, old.dtype, old.shape)
    kept = torch.rand(old.shape, generator=generator) >= share
    width = old.element_size()
    mask = kept.reshape(-1, 1).expand(-1, width).reshape(-1)
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in (old, new)]
    return torch.where(mask, *flat).view(old.dtype).reshape(old.shape)


@st.composite
def pairs(draw):
    kinds = draw(st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES)), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    old = {f"t{place}": bits(generator, *kind) for place, kind in enumerate(kinds)}
    shares = draw(st.lists(st.sampled_from([0.0, 0.005, 0.1, 0.5, 1.0]), min_size=len(old), max_size=len(old)))
    new = {name: mixed(generator, tensor, share) for (name, tensor), share in zip(old.items(), shares, strict=True)}
    return WeightSet.of(3, old), WeightSet.of(4, new)


@settings(max_examples=150, deadline=None)
@given(pairs(), st.sampled_from([1, 200, 1 << 20]), st.booleans())
def test_any_two_versions_come_through_bit_by_bit(pair, part_bytes, whole):
    base, new = pair
    parts = encode(None if whole else base, new, part_bytes=part_bytes)
    assert split_messages(b"".join(parts)) == parts
    before = {name: tensor.clone() for name, tensor in base.tensors.items()}
    result = apply(base, list(reversed(parts)))
    assert all(same_bits(result.tensors[name], tensor) for name, tensor in new.tensors.items())
    assert (result.version, result.sha256) == (4, WeightSet.of(0, new.tensors).sha256)
    assert all(same_bits(base.tensors[name], tensor) for name, tensor in before.items())


@settings(max_examples=100, deadline=None)
@given(pairs(), st.integers(0, 2**32))
def test_a_damaged_message_is_refused(pair, seed):
    base, new = pair
    payload = bytearray(encode(base, new)[0])
    chance = random.Random(seed)
    kind = chance.choice(["bit", "cut", "longer"])
    if kind == "bit":
        payload[chance.randrange(len(payload))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del payload[chance.randrange(len(payload)) :]
    else:
        payload += b"\0"
    with pytest.raises(DamagedFile):
        apply(base, [bytes(payload)])


def weights(version=0, **changes):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randint(-127, 128, (200, 50), generator=generator, dtype=torch.int8),
        "b": torch.randn(40, 30, generator=generator),
    }
    return WeightSet.of(version, {**tensors, **changes})


def test_another_base_is_refused_whatever_its_number():
    base = weights(5)
    parts = encode(base, weights(6, b=torch.zeros(40, 30)))
    others = [weights(4), weights(5, a=torch.zeros(200, 50, dtype=torch.int8)), None]
    for other in others:
        with pytest.raises(WrongBase, match="send a snapshot"):
            apply(other, parts)


def test_parts_of_different_messages_are_refused():
    base = weights(5)
    one = encode(base, weights(6, b=torch.zeros(40, 30), a=torch.zeros(200, 50, dtype=torch.int8)), part_bytes=1)
    other = encode(base, weights(6, b=torch.ones(40, 30), a=torch.ones(200, 50, dtype=torch.int8)), part_bytes=1)
    assert len(one) == len(other) == 2
    for parts in (one[:1], [one[0], other[1]], [*one, one[0]]):
        with pytest.raises(DamagedFile, match="parts"):
            apply(base, parts)


def test_another_layout_needs_a_snapshot():
    with pytest.raises(IsthmusError, match="b is not the same kind of tensor"):
        encode(weights(1), weights(2, b=torch.zeros(40, 30, dtype=torch.bfloat16)))


def written(header, streams=b""):
    """A message of a header and streams, by the format as formats/updates/delta.py describes it."""
    content = dataclasses.asdict(header)
    content["entries"] = [list(entry.values()) for entry in content["entries"]]
    packed = zlib.compress(json.dumps(content).encode())
    length = 8 + 8 + 4 + len(packed) + len(streams) + 32
    whole = b"ISTHMDL1" + struct.pack("<QI", length, len(packed)) + packed + streams
    return whole + hashlib.sha256(whole).digest()


def test_a_sender_that_computes_another_difference_is_found_by_the_hash_of_the_tensor():
    base = weights(1)
    meant, sent = (
        read_message(encode(base, weights(2, b=base.tensors["b"] * factor))[0]) for factor in (1 + 1e-6, 1 + 2e-6)
    )
    assert same_bits(apply(base, [written(meant.header, meant.streams)]).tensors["b"], base.tensors["b"] * (1 + 1e-6))
    wrong = dataclasses.replace(sent.header.entries[0], sha256=meant.header.entries[0].sha256)
    forged = dataclasses.replace(meant.header, entries=[wrong])
    with pytest.raises(DamagedFile, match="b has another SHA-256 after the delta"):
        apply(base, [written(forged, sent.streams)])


def test_a_tensor_that_was_left_out_is_found_by_the_hash_of_the_set():
    base, new = weights(1), weights(2, a=torch.zeros(200, 50, dtype=torch.int8))
    believed = WeightSet(1, base.tensors, {**base.hashes, "a": new.hashes["a"]})
    parts = encode(believed, new)
    honest = read_message(parts[0]).header
    forged = written(dataclasses.replace(honest, base_sha256=base.sha256))
    with pytest.raises(DamagedFile, match="version 2 has the SHA-256"):
        apply(base, [forged])


def method_of(old, new):
    entries = read_message(encode(WeightSet.of(0, {"t": old}), WeightSet.of(1, {"t": new}))[0]).header.entries
    return entries[0].method if entries else "nothing"


def test_each_tensor_is_sent_in_the_form_that_suits_it():
    generator = torch.Generator().manual_seed(1)
    old = torch.randint(-100, 100, (300, 300), generator=generator, dtype=torch.int8)
    few = old + (torch.rand(old.shape, generator=generator) < 0.01).to(torch.int8)
    floats = torch.randn(200, 200, generator=generator)
    assert method_of(old, old.clone()) == "nothing"
    assert method_of(old, few) == "sparse"
    assert method_of(floats, floats * (1 + 1e-6)) == "dense"
    assert method_of(floats, torch.zeros(200, 200)) == "full"


def test_a_few_changed_weights_cost_a_few_bytes():
    """A bound from outside: k changed of n elements, each by one step up or down, need log2(C(n, k)) + k bits."""
    n = 1_000_000
    generator = torch.Generator().manual_seed(2)
    old = torch.randint(-100, 100, (n,), generator=generator, dtype=torch.int8)
    moved = torch.rand(n, generator=generator) < 0.02
    new = old + moved * (1 - 2 * torch.randint(0, 2, (n,), generator=generator)).to(torch.int8)
    k = torch.tensor(float((old != new).sum()))
    total = torch.tensor(float(n))
    bits_needed = (torch.lgamma(total + 1) - torch.lgamma(k + 1) - torch.lgamma(total - k + 1)) / torch.log(
        torch.tensor(2.0)
    ) + k
    parts = encode(WeightSet.of(0, {"t": old}), WeightSet.of(1, {"t": new}))
    assert bits_needed / 8 < sum(map(len, parts)) < 1.15 * bits_needed / 8


def test_a_stream_cannot_expand_beyond_its_tensor():
    zeros = torch.zeros(1 << 20)
    message = read_message(encode(None, WeightSet.of(0, {"t": zeros}))[0])
    entry = message.header.entries[0]
    bomb = delta.Entry(entry.name, entry.dtype, (4,), "full", 4, 0, entry.streams, entry.sha256)
    with pytest.raises(DamagedFile, match="cannot be read"):
        delta.decode(delta.Message(delta.Header(None, 0, None, "", 0, 1, [bomb]), message.streams), {})
