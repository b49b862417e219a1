"""Rows of the dtype tables reach whoever asks: a rehearsal, the static tier, coverage, a qualification."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from isthmus.chips import get_chip
from isthmus.chips.rehearse import Emulation, RehearsalRefused, profile_of
from isthmus.chips.rehearse.dispatch import enforce
from isthmus.formats import get_format
from isthmus.model.config import hf_config
from isthmus.pools import get_pool
from isthmus.probes import pilots
from isthmus.probes.contract import Setting
from isthmus.probes.findings import Findings
from isthmus.probes.static.operators import support_of
from isthmus.recipe.architecture import ModelSection
from isthmus.recipe.read import load_recipe
from isthmus.tools.coverage import as_dictionary, examine, recipe_of, render, software_of
from tests.support.flow_recipe import RECIPE, SMALL, written
from tests.support.small_dense import FAMILIES, dense_architecture

ASCEND = "ascend-910b-313t"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("chip", "dtype", "words"),
    [
        ("mi300x", torch.float8_e4m3fn, "float8_e4m3fnuz"),
        ("mi355x", torch.float8_e4m3fnuz, "gfx942 alone"),
        ("a100-80gb-sxm", torch.float8_e4m3fn, "no matmul in fp8"),
        ("h800-sxm", torch.uint64, "few operators"),
        (ASCEND, torch.complex64, "disabled upstream tests"),
        (ASCEND, torch.float64, "silently gives float32"),
    ],
)
def test_a_dtype_that_is_weak_is_told_by_operator(chip: str, dtype: torch.dtype, words: str):
    with enforce(chip, emulate=Emulation()) as rehearsal:
        torch.zeros(4, dtype=dtype).clone()
    told = [one for one in rehearsal.tally.cautions if "aten::clone" in one and words in one]
    assert told and str(dtype).removeprefix("torch.") in told[0]


def test_fp8_that_the_matrix_units_do_not_have_is_refused_where_they_compute():
    """gfx942 computes in fnuz alone; torch says `"_tunable_scaled_gemm" not implemented for 'Float8_e4m3fn'`."""
    one = torch.ones(())
    a, b = (torch.ones(16, 16).to(torch.float8_e4m3fn) for _ in range(2))
    operator = "_scaled_mm"
    with (
        pytest.raises(RehearsalRefused, match=r"_scaled_mm with float8_e4m3fn is refused on mi300x.*e4m3fnuz"),
        enforce("mi300x"),
    ):
        getattr(torch.ops.aten, operator)(a, b.t(), one, one, out_dtype=torch.bfloat16)
    called = {"aten::_scaled_mm": {"float8_e4m3fn"}, "aten::t": {"float8_e4m3fn"}}
    found = support_of(called, profile_of("mi300x"))
    assert found.refused_dtypes == {"float8_e4m3fn": ("aten::_scaled_mm",)}
    assert found.weak_dtypes == {"float8_e4m3fn": ("aten::t",)}
    newer = support_of(called, profile_of("mi355x"))
    assert not newer.refused_dtypes and not newer.weak_dtypes


@pytest.mark.parametrize(
    ("chip", "outcome"), [("mi300x", "fail"), ("mi355x", "pass"), ("h800-sxm", "pass"), (ASCEND, "fail")]
)
def test_a_qualification_does_not_pass_weights_in_a_dtype_that_the_chip_does_not_compute_in(
    tmp_path: Path, chip: str, outcome: str
):
    pool = {"pools.away.chip": f'"{chip}"', "handoff.format": '"fp8"', written("rl.rollout_format"): '"fp8"'}
    recipe = load_recipe(RECIPE, tuple(f"{key}={value}" for key, value in {**SMALL, **pool}.items()))
    away = get_pool(recipe, "away")
    found = Findings(Setting(recipe, away, get_chip(chip), profile_of(chip), "cpu", tmp_path, tmp_path))
    pilots.weight_formats(found, profile_of(chip))
    (fp8,) = found.evidence
    assert fp8.outcome == outcome and ("e4m3fnuz" in fp8.detail) == (chip == "mi300x")


def folder_of(path: Path, model: ModelSection, quantisation: dict[str, Any] | None) -> Path:
    path.mkdir()
    config = hf_config(model, dtype="bfloat16", bos_token_id=0, eos_token_id=1)
    (path / "config.json").write_text(
        json.dumps(config | ({"quantization_config": quantisation} if quantisation else {}))
    )
    return path


def covered(folder: Path, chip: str) -> tuple[dict[str, Any], str]:
    """What coverage says of a folder, as JSON and as text."""
    report = examine(
        recipe_of(str(folder), chip, None, ()), get_chip(chip), software_of(profile_of(chip), None, None), 1
    )
    console = Console(file=io.StringIO(), width=200)
    console.print(render(report))
    return as_dictionary(report), console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("chip", "computed", "words"),
    [
        ("h800-sxm", True, "by aten::_scaled_mm"),
        ("mi300x", False, "aten::_scaled_mm refuses float8_e4m3fn"),
        (ASCEND, False, "no fp8 compute"),
    ],
)
def test_coverage_of_an_fp8_checkpoint_speaks_of_fp8(tmp_path: Path, chip: str, computed: bool, words: str):
    quantisation = {**FP8, "scale_fmt": "ue8m0"}
    found, said = covered(folder_of(tmp_path / "c", dense_architecture("llama"), quantisation), chip)
    assert found["weights"]["form"] == "fp8" and found["weights"]["computed"] is computed
    assert words in found["weights"]["detail"] and "scale_fmt ue8m0" in said and words in said
    assert found["verdict"]["serving"].startswith("impossible: weights stored in fp8") == (not computed)
    assert found["verdict"]["training"].startswith("possible")


def test_coverage_of_another_quantisation_says_that_nothing_is_known_of_it(tmp_path: Path):
    gptq = {"quant_method": "gptq", "bits": 4}
    found, said = covered(folder_of(tmp_path / "c", dense_architecture("llama"), gptq), ASCEND)
    assert found["weights"]["computed"] is None and "gptq, which is none of the formats here" in said


@pytest.mark.parametrize("form", [None, "w8a8"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_coverage_lists_what_the_model_has_and_nothing_else(tmp_path: Path, family: str, form: str | None):
    """A float model needs nothing of W8A8, nor a dense one of experts; every rule is of an operator that is listed."""
    model = FAMILIES.get(family) or dense_architecture(family)
    quantisation = get_format(form).quantization_config(model) if form else None
    found, said = covered(folder_of(tmp_path / "c", model, quantisation), ASCEND)
    assert (found["weights"] is not None) == bool(form) == ("W8A8" in {one["need"] for one in found["needs"]})
    listed = {one["operator"] for need in found["needs"] for one in (*need["usable"], *need["unusable"])}
    assert {rule["operator"] for rule in found["rules"]} <= listed
    assert any("moe" in one for one in listed) == (family == "qwen3_moe")
    assert not any("mla" in one for one in listed) and "latent" not in said
