"""The compiled layers against the torch path, on drawn architectures of every kind and in both formats."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.engines.local.core import native
from isthmus.engines.local.core.batch import Singles, StepBatch
from isthmus.engines.local.core.native import NativeModel, NativeUnavailable, load_library, tried_library
from isthmus.engines.local.core.runner import Runner
from isthmus.formats import get_format
from isthmus.model.model import Model
from isthmus.recipe.architecture import DeepseekSection
from tests.support.against_transformers import randomised
from tests.support.drawn import architectures, dense_architectures
from tests.support.small import architecture
from tests.support.small_dense import FAMILIES
from tests.support.small_dense import randomised as randomised_dense

SEEDS = st.integers(0, 2**20)
BLOCK, SPAN = 4, 23
DRAWN = settings(max_examples=40, derandomize=True, deadline=None, database=None)


def stepped(model: Model, seed: int, count: int, *, use_native: bool) -> torch.Tensor:
    """Logits of `count` sequences of different lengths, token by token, from blocks in no order."""
    generator = np.random.default_rng(seed)
    each = -(-SPAN // BLOCK)
    runner = Runner(model, count * each + 1, BLOCK, native=use_native)
    assert (runner.native is not None) == use_native
    tables = generator.permutation(count * each).astype(np.int32).reshape(count, each) + 1
    late = generator.integers(0, 5, count)
    found = []
    with torch.inference_mode():
        for step in range(SPAN):
            rows = np.flatnonzero(late <= step)
            if len(rows):
                tokens = generator.integers(0, model.architecture.vocab_size, len(rows))
                batch = StepBatch(Singles(tokens, step - late[rows], tables[rows]), [], runner.store)
                found.append(runner.logits(runner.hidden(batch)))
    return torch.cat(found)


def agrees(model: Model, seed: int, count: int, tolerance: float) -> None:
    ours, expected = (stepped(model, seed, count, use_native=native) for native in (True, False))
    difference = (ours - expected).abs().max() / expected.abs().max()
    assert difference < tolerance, difference


@DRAWN
@given(arch=architectures(), scoring=st.sampled_from(["sigmoid", "softmax"]), seed=SEEDS, count=st.integers(1, 7))
def test_latent_layers_with_experts(arch: DeepseekSection, scoring: str, seed: int, count: int):
    arch = arch.model_copy(update={"scoring_func": scoring})
    agrees(randomised(arch, seed).eval().requires_grad_(False), seed, count, 2e-5)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "mistral", "qwen3_moe"])
@settings(DRAWN, max_examples=20)
@given(data=st.data(), seed=SEEDS, count=st.integers(1, 7))
def test_grouped_query_layers(family: str, data: st.DataObject, seed: int, count: int):
    """With windows within a block and across blocks, norms of heads, and experts without bias or shared expert."""
    arch = data.draw(dense_architectures(family))
    agrees(randomised_dense(arch, seed).eval().requires_grad_(False), seed, count, 2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_emulated_w8a8_of_every_family(name: str):
    chosen, arch = get_format("w8a8"), FAMILIES[name]
    model = chosen.build(arch, chosen.export(randomised_dense(arch, 3).state_dict(), arch))
    ours, expected = (stepped(model, 3, 4, use_native=native) for native in (True, False))
    differences = (ours - expected).abs().amax(-1) / expected.abs().max()
    assert differences.median() < 1e-5 and differences.max() < 0.05


@pytest.mark.parametrize("q_rank", [None, 20])
@pytest.mark.parametrize("count", [1, 5])
def test_emulated_w8a8(q_rank: int | None, count: int):
    """A value that lands on the other side of a rounding makes a difference of a step of int8, and most do not."""
    chosen = get_format("w8a8")
    arch = architecture(q_lora_rank=q_rank, initializer_range=0.1)
    model = chosen.build(arch, chosen.export(Model(arch).initialise(3).state_dict(), arch))
    ours, expected = (stepped(model, 3, count, use_native=native) for native in (True, False))
    differences = (ours - expected).abs().amax(-1) / expected.abs().max()
    assert differences.median() < 1e-5 and differences.max() < 0.05


def test_w8a8_products_are_exact_beyond_what_fp32_sums_hold():
    chosen = get_format("w8a8")
    arch = architecture(
        intermediate_size=2500, first_k_dense_replace=1, num_hidden_layers=1, num_nextn_predict_layers=0
    )
    state = Model(arch).initialise(4).state_dict()
    down = state["model.layers.0.mlp.down_proj.weight"]
    state["model.layers.0.mlp.down_proj.weight"] = down.abs() + 0.2
    model = chosen.build(arch, chosen.export(state, arch))
    agrees(model, 4, 3, 1e-5)


def test_numbers_that_are_none_stay_in_their_sequence():
    arch = architecture(vocab_size=61)
    model = Model(arch).initialise(5).eval().requires_grad_(False)
    clean = stepped(model, 5, 3, use_native=True)
    model.model.embed_tokens.weight[7] = float("nan")
    spoilt = stepped(model, 5, 3, use_native=True)
    touched = ~torch.isfinite(spoilt).all(-1)
    assert 0 < touched.sum() < len(touched)
    assert torch.equal(spoilt[~touched], clean[~touched])


def test_what_the_kernels_do_not_compute_is_said():
    model = Model(architecture()).initialise(0).to(torch.bfloat16)
    with pytest.raises(NativeUnavailable, match=r"a tensor in torch\.bfloat16"):
        NativeModel(model, BLOCK, 1)
    assert Runner(model, 4, BLOCK).kernels.startswith("torch: the kernels compute fp32 and W8A8")


@pytest.mark.parametrize("name", ["fp32", "w8a8"])
def test_a_clamp_in_front_of_swiglu_takes_the_torch_path(name: str):
    arch = architecture(swiglu_limit=0.1)
    model = get_format(name).build(arch, get_format(name).export(Model(arch).initialise(0).state_dict(), arch))
    with pytest.raises(NativeUnavailable, match="with a clamp"):
        NativeModel(model, BLOCK, 1)


@pytest.fixture
def no_library():
    tried_library.cache_clear()
    yield
    tried_library.cache_clear()


def test_without_a_compiler_the_torch_path_runs_and_says_why(no_library, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model = Model(architecture()).initialise(0)
    assert Runner(model, 4, BLOCK).kernels == (
        "torch: there is no C compiler here; install one (gcc or clang) or name it in $CC"
    )


def test_kernels_that_cannot_be_loaded_are_not_used(no_library, monkeypatch, tmp_path):
    """As in a cache folder on a file system that allows no programs."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho "no library" > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runner = Runner(Model(architecture()).initialise(0), 4, BLOCK)
    assert runner.kernels.startswith("torch: the compiled kernels could not be loaded: ")


def test_without_a_home_the_torch_path_runs_and_says_why(no_library, monkeypatch):
    def no_home(_path: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(no_home))
    runner = Runner(Model(architecture()).initialise(0), 4, BLOCK)
    assert runner.kernels.startswith("torch: there is no folder for the compiled kernels")


def test_a_compiler_that_fails_is_quoted(no_library, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-no-such-flag"))
    with pytest.raises(NativeUnavailable, match=r"could not compile the kernels: .*no-such-flag"):
        load_library()
    assert list((tmp_path / "isthmus").iterdir()) == []


def test_kernels_in_the_cache_that_are_damaged_or_open_to_others_are_built_again(no_library, monkeypatch, tmp_path):
    compiler, calls = tmp_path / "cc", tmp_path / "calls"
    calls.touch()
    compiler.write_text(
        f'#!/bin/sh\necho called >> {calls}\nwhile [ "$1" != -o ]; do shift; done\necho "no library" > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def times_compiled():
        tried_library.cache_clear()
        with pytest.raises(NativeUnavailable):
            load_library()
        return len(calls.read_text().splitlines())

    assert times_compiled() == times_compiled() == 1
    [stored] = (tmp_path / "isthmus").glob("*.so")
    stored.write_bytes(b"")
    assert times_compiled() == 2
    stored.chmod(0o777)
    assert times_compiled() == times_compiled() == 3
    stored.unlink()
    stored.symlink_to(compiler)
    assert times_compiled() == 4
