"""Module replay at its edges: dtypes that end early, targets built otherwise, and paths that only an engine takes."""

from __future__ import annotations

import math

import pytest
import torch

from isthmus.formats.files.bundle import read_bundle, write_bundle
from isthmus.model.model import Model
from isthmus.parity.capture import GoldenSet, capture, synthetic_prompts
from isthmus.parity.replay import Replay, Replayer, worst_channel
from isthmus.parity.target import DTYPES, build_target, make_twin
from isthmus.run import write_atomic
from tests.support.small import architecture


class NoTokenizer:
    bos_id, ends = 0, (1,)

    def save(self, folder):
        write_atomic(folder / "tokenizer.json", b"{}\n")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges") / "bundle"
    # Outputs of gated MLPs at 64 times their input are beyond fp16.
    small = architecture(initializer_range=0.5)
    state = Model(small).initialise(3).state_dict()
    write_bundle(folder, "w8a8", state, small, NoTokenizer())
    capture(folder, state, synthetic_prompts(small.vocab_size, 4, 24))
    return read_bundle(folder)


def replayed(bundle, dtype="bf16", change=lambda model: None) -> Replay:
    target = build_target(bundle, "cpu", DTYPES[dtype])
    change(target)
    twin = make_twin(bundle.build(), DTYPES[dtype])
    return Replayer(GoldenSet(bundle.folder), bundle.build(), twin, DTYPES[dtype]).compare(target)


def named(found: Replay) -> tuple[str, str | None]:
    _, first = found.faults[0]
    return first.path, first.operator


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_healthy_target_passes_in_every_dtype(bundle, dtype):
    assert not replayed(bundle, dtype).faults


def test_inputs_that_are_asked_of_fp16_do_overflow_without_a_bound(bundle):
    twin = make_twin(bundle.build(), torch.float16)
    x = 64 * GoldenSet(bundle.folder).block("model.layers.0.mlp").input.half()
    assert not torch.isfinite(twin.model.layers[0].mlp(x)).all()


def test_a_target_with_modules_of_another_kind_is_refused(bundle):
    """A dense layer where the bundle has experts: operators are missing and answers have another form."""

    def swap(model):
        layers = model.model.layers
        layers[0], layers[1] = layers[1], layers[0]

    assert replayed(bundle, change=swap).faults


def test_a_fault_of_the_form_with_a_cache_alone_is_found(bundle):
    """Engines run the absorbed form; without a cache nothing shows."""

    def scale(model):
        attention = model.model.layers[1].self_attn
        inner = attention.absorbed
        attention.absorbed = lambda *inputs: 1.2 * inner(*inputs)

    assert named(replayed(bundle, change=scale)) == ("model.layers.1.self_attn", "attention in latent space")


def test_an_mtp_layer_that_gets_another_token_is_found(bundle):
    def shift(model):
        inner = model.mtp_next
        model.mtp_next = lambda hidden, tokens, *rest: inner(hidden, tokens.roll(1, dims=1), *rest)

    assert named(replayed(bundle, change=shift)) == ("model.layers.3", "next token")


def test_channels_that_are_too_large_to_be_measured_are_no_match():
    """Squares of 1e20 overflow in fp32, and a finite difference over an infinite size would look like none."""
    expected = torch.full((4, 3), 1e20)
    assert worst_channel(expected + 1e13, expected) == math.inf
    assert worst_channel(expected * 1e-10, expected * 1e-10) == 0.0
