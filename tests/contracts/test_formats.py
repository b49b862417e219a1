"""What every format must do. A new file in isthmus/formats is picked up here by its name."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch

import isthmus.formats
from isthmus.engines.local.core.core import Core
from isthmus.errors import IsthmusError
from isthmus.formats import format_names, get_format, recognise_format
from isthmus.formats.files.bundle import read_bundle, read_config, write_bundle
from isthmus.formats.parts.ranges import Calibration
from isthmus.model.config import hf_config
from isthmus.model.model import Model
from isthmus.recipe.architecture import ModelSection
from tests.support.calibrated import calibrate
from tests.support.engine_bundle import ask, finished, run_core
from tests.support.small import GrowingCache, tiny_architecture
from tests.support.small_dense import FAMILIES

ARCHITECTURE = tiny_architecture(vocab_size=53, initializer_range=0.1)
CLAMPED = ARCHITECTURE.model_copy(update={"swiglu_limit": 0.5})
TIED = ARCHITECTURE.model_copy(update={"tie_word_embeddings": True, "num_nextn_predict_layers": 0})
SIZES = {"vocab_size": 53, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1}
EXPERTS = {"moe_intermediate_size": 32}
GROUPED = {
    name: family.model_copy(update=SIZES | (EXPERTS if family.sparse_layers else {}))
    for name, family in FAMILIES.items()
}
WRITTEN: dict[str, Any] = {"dtype": "bfloat16", "eos_token_id": 1, "bos_token_id": 0}
TOKENS = torch.randint(53, (2, 18), generator=torch.Generator().manual_seed(0))


class TinyTokenizer:
    bos_id, ends = 0, (1,)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def every_format(test):
    return pytest.mark.parametrize("name", format_names())(test)


def state(architecture: ModelSection) -> dict[str, torch.Tensor]:
    return Model(architecture).initialise(0).state_dict()


def calibration(name: str, architecture: ModelSection) -> Calibration | None:
    return calibrate(state(architecture), architecture, TOKENS) if get_format(name).needs_calibration else None


def exported(name: str, architecture: ModelSection = ARCHITECTURE) -> dict[str, torch.Tensor]:
    return get_format(name).export(state(architecture), architecture, calibration(name, architecture))


def limit(name: str) -> float:
    """How far a format may be from fp32; one scale for all tokens costs most, then three bits of mantissa."""
    if name == "fp32":
        return 1e-6
    return 0.2 if get_format(name).needs_calibration else 0.15 if "fp8" in name else 0.1


def test_each_file_is_a_format():
    files = {module.name for module in pkgutil.iter_modules(isthmus.formats.__path__) if not module.ispkg}
    plugs = {name for name in files if hasattr(importlib.import_module(f"isthmus.formats.{name}"), "FORMAT")}
    assert plugs == set(format_names()) == files
    assert {"fp32", "bf16", "w8a8", "fp8"} <= plugs


@every_format
def test_the_name_is_the_registration(name):
    assert get_format(name).name == name


@every_format
@pytest.mark.parametrize(
    "architecture", [ARCHITECTURE, TIED, CLAMPED, *GROUPED.values()], ids=["mtp", "tied", "clamped", *GROUPED]
)
def test_a_bundle_comes_back_and_computes(tmp_path, name, architecture):
    known = calibration(name, architecture)
    write_bundle(tmp_path / "b", name, state(architecture), architecture, TinyTokenizer(), calibration=known)
    bundle = read_bundle(tmp_path / "b")
    wanted = exported(name, architecture)
    assert bundle.format == name
    assert hf_config(bundle.architecture, **WRITTEN) == hf_config(architecture, **WRITTEN)
    assert bundle.tensors.keys() == wanted.keys()
    assert all(same_bits(bundle.tensors[key], wanted[key]) for key in wanted)
    reference = Model(architecture)
    reference.load_state_dict(state(architecture))
    with torch.no_grad():
        found, wanted = bundle.build()(TOKENS), reference(TOKENS)
    assert (found - wanted).norm() / wanted.norm() < limit(name)


@every_format
def test_the_layout_is_what_export_stores(name):
    chosen = get_format(name)
    real = exported(name)
    assert {key: (t.dtype, tuple(t.shape)) for key, t in real.items()} == chosen.layout(ARCHITECTURE)
    assert all(tensor.is_contiguous() for tensor in real.values())


@every_format
def test_export_leaves_the_trainers_weights_alone(name):
    given, before = state(ARCHITECTURE), state(ARCHITECTURE)
    get_format(name).export(given, ARCHITECTURE, calibration(name, ARCHITECTURE))
    assert given.keys() == before.keys() and all(torch.equal(given[key], before[key]) for key in before)


@every_format
def test_only_its_own_config_is_recognised(name, tmp_path):
    write_bundle(
        tmp_path / "b",
        name,
        state(ARCHITECTURE),
        ARCHITECTURE,
        TinyTokenizer(),
        calibration=calibration(name, ARCHITECTURE),
    )
    config = read_config(tmp_path / "b")
    assert [other for other in format_names() if get_format(other).recognises(config)] == [name]
    assert recognise_format(config).name == name


@every_format
def test_what_needs_a_calibration_says_so(name):
    if get_format(name).needs_calibration:
        with pytest.raises(IsthmusError, match=f"format {name} .* needs a calibration"):
            get_format(name).export(state(ARCHITECTURE), ARCHITECTURE)
        other = Calibration({}, {}, tokens=7)
        with pytest.raises(IsthmusError, match=r"knows nothing of the inputs of model\.layers\.0.*saw 7 tokens"):
            get_format(name).export(state(ARCHITECTURE), ARCHITECTURE, other)
    else:
        assert exported(name)


@every_format
def test_a_built_model_runs_with_caches_and_takes_no_gradient(name):
    model = get_format(name).build(ARCHITECTURE, exported(name))
    assert not any(weight.requires_grad for weight in model.parameters()) and not model.training
    whole = model.hidden(TOKENS)
    caches, parts = [GrowingCache() for _ in range(2)], []
    for start, end in [(0, 11), (11, 12), (12, 18)]:
        positions = torch.arange(start, end).expand(2, -1)
        parts.append(model.hidden(TOKENS[:, start:end], positions, caches=caches))
    stepped = torch.cat(parts, dim=1)
    assert (stepped - whole).norm() / whole.norm() < (1e-5 if name in ("fp32", "bf16") else limit(name))


@every_format
def test_building_twice_from_the_same_tensors_gives_the_same_logits(name):
    tensors = exported(name)
    first, second = (get_format(name).build(ARCHITECTURE, tensors)(TOKENS) for _ in range(2))
    assert torch.equal(first, second)


@every_format
@pytest.mark.parametrize("architecture", [ARCHITECTURE, *GROUPED.values()], ids=["deepseek_v3", *GROUPED])
def test_the_local_engine_serves_it(name, architecture):
    """Greedy answers are those of the built model, token by token. Kernels in C exist for three formats."""
    model = get_format(name).build(architecture, exported(name, architecture))
    core, prompt = Core(model, eos_id=-1, length=32), [3, 1, 4, 1, 5]
    in_c = ("fp32", "bf16", "w8a8", *(() if architecture.sparse_layers else ("modelslim_dynamic", "modelslim_mixed")))
    assert core.runner.kernels.startswith("native" if name in in_c else "torch: ")
    request, events = ask([prompt], 8, temperature=0.0)
    run_core(core, request)
    (answer,) = finished(events)
    tokens, caches = list(prompt), [GrowingCache() for _ in range(architecture.num_hidden_layers)]
    new = torch.tensor([prompt])
    for _ in range(8):
        positions = torch.arange(len(tokens) - new.shape[1], len(tokens))[None]
        with torch.no_grad():
            best = model.logits(model.hidden(new, positions, caches=caches))[0, -1].argmax()
        tokens.append(int(best))
        new = best.view(1, 1)
    assert answer.tokens == tokens[len(prompt) :]
