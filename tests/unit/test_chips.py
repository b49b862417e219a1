"""Chips: sourced facts, honest presence, pools, and the rules of a rehearsed chip."""

from __future__ import annotations

import csv
import importlib.machinery
import os
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest
import torch

from isthmus import chips, pools
from isthmus.chips import Vendor, amd, ascend, cambricon, metax, nvidia
from isthmus.chips.rehearse import RehearsalRefused, can_rehearse, profile_of
from isthmus.chips.rehearse.dispatch import enforce
from isthmus.errors import IsthmusError
from isthmus.formats import format_names
from isthmus.recipe.read import load_recipe
from isthmus.recipe.schema import Recipe
from tests.support.flow_recipe import RECIPE
from tests.support.printed import printed

AWAY = "ascend-910b-313t"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, overrides)


def table(name: str) -> list[dict[str, str]]:
    text = (resources.files("isthmus.chips") / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def test_known_facts_of_the_chips_that_the_story_is_about():
    away, h800 = chips.get_chip(AWAY), chips.get_chip("h800-sxm")
    assert (away.bf16_tflops.value, away.mem_bw_gbs.value, away.scaleup_gbs_uni.value) == (294.9, 1759, 196)
    assert (h800.bf16_tflops.value, h800.fp8_tflops.value, h800.scaleup_gbs_uni.value) == (989, 1979, 200)
    assert "general knowledge" in h800.scaleup_gbs_uni.source and "general knowledge" not in h800.bf16_tflops.source


def test_every_row_of_the_table_is_a_chip_and_no_number_is_lost():
    rows = {row["slug"]: row for row in table("chips.csv")}
    assert set(chips.load_chips()) == set(rows) | {"cpu"}
    for slug, row in rows.items():
        for name, figure in chips.get_chip(slug).figures().items():
            assert (figure is not None and figure.value is not None) == bool(row[name]), (slug, name)
            assert figure is None or figure.value is None or figure.value == float(row[name])


def test_unknown_stays_unknown():
    mi308x, mlu = chips.get_chip("mi308x"), chips.get_chip("mlu590")
    assert mi308x.bf16_tflops is None and mi308x.floor_bf16_tflops.value == 174
    assert mi308x.tpp.value is None and mi308x.tpp.low == 3248
    assert all(figure is None for figure in mlu.figures().values()) and mlu.dtypes is None and mlu.formats is None
    assert "unknown" in printed(chips.describe("mlu590")) and "≥ 3,248" in printed(chips.describe("mi308x"))


def test_capabilities_follow_from_what_was_published():
    away = chips.get_chip(AWAY).formats
    own = ("modelslim", "modelslim_dynamic", "modelslim_fp16", "modelslim_mixed")
    assert away == ("fp32", "bf16", "w8a8", "w8a8_static", *own)
    assert set(chips.get_chip("cpu").formats) == set(format_names())
    assert "fp8" in chips.get_chip("h20").formats and "fp8" not in chips.get_chip("a100-80gb-sxm").formats
    assert chips.get_chip(AWAY).collectives[0] == "hccl" and chips.get_chip("cpu").collectives == ("gloo",)


def test_one_chip_is_shown_with_the_source_of_each_fact():
    text = printed(chips.describe(AWAY))
    assert "294.9 TFLOPS" in text and "Ascend/msmodeling@84fec85" in text and "B-number" in text
    assert all(slug in printed(chips.describe_all()) for slug in chips.load_chips())


@pytest.mark.parametrize(("typed", "meant"), [("ascend-910b-313", AWAY), ("H800-SXM", "h800-sxm"), ("mi300", "mi300x")])
def test_a_misspelt_chip_is_answered_with_the_nearest(typed: str, meant: str):
    with pytest.raises(IsthmusError, match=meant) as caught:
        chips.get_chip(typed)
    assert caught.value.exit_code == 2


def test_facts_and_tables_do_not_load_torch():
    code = f"""
import sys
from pathlib import Path
from isthmus import chips
from isthmus.chips.rehearse import profile_of
from isthmus.recipe.read import load_recipe
chips.describe("h800-sxm")
profile_of("{AWAY}")
chips.check_available(load_recipe(Path({str(RECIPE)!r})))
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, name: str, cuda: str | None, hip: str | None) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)


def pretend_device(monkeypatch: pytest.MonkeyPatch, vendor: Vendor, name: str) -> None:
    """A device of a vendor with this name, seen through torch.cuda or through the vendor's extension of torch."""
    hip = "6.4" if vendor is amd.VENDOR else None
    pretend_gpu(monkeypatch, name, None if hip else "12.8", hip)
    if vendor.package is not None:
        extension = types.ModuleType(vendor.package)
        extension.__spec__ = importlib.machinery.ModuleSpec(vendor.package, None)
        setattr(extension, vendor.device, torch.cuda)
        monkeypatch.setitem(sys.modules, vendor.package, extension)


@pytest.mark.parametrize(
    ("vendor", "name", "slug"),
    [
        (nvidia, "NVIDIA H100 80GB HBM3", "h100-sxm"),
        (nvidia, "NVIDIA H100 PCIe", None),
        (nvidia, "NVIDIA H800", "h800-sxm"),
        (nvidia, "NVIDIA H800 PCIe", None),
        (nvidia, "NVIDIA H200", "h200-sxm"),
        (nvidia, "NVIDIA H200 NVL", None),
        (nvidia, "NVIDIA H20", "h20"),
        (nvidia, "NVIDIA H20-3e", None),
        (nvidia, "NVIDIA GB200", "gb200"),
        (nvidia, "NVIDIA B200", "b200-sxm"),
        (nvidia, "NVIDIA A100-SXM4-40GB", None),
        (nvidia, "NVIDIA GeForce RTX 4090 D", None),
        (amd, "AMD Instinct MI308X", "mi308x"),
        (ascend, "Ascend910B3", AWAY),
        (ascend, "Ascend910_9382", None),
        (cambricon, "MLU590-M9", "mlu590"),
        (metax, "MetaX C550", "metax-c550"),
    ],
)
def test_device_names_are_matched_only_where_the_figures_hold(
    vendor: types.ModuleType, name: str, slug: str | None, monkeypatch: pytest.MonkeyPatch
):
    pretend_device(monkeypatch, vendor.VENDOR, name)
    assert [(found.name, found.chip) for found in vendor.detect().found] == [(name, slug)]


@pytest.mark.parametrize(
    ("name", "cuda", "hip", "owner"),
    [
        ("NVIDIA H20", "12.8", None, "NVIDIA"),
        ("AMD Instinct MI300X", None, "6.4", "AMD"),
        ("MetaX C550", "11.6", None, "MetaX"),
    ],
)
def test_one_vendor_claims_a_device(
    monkeypatch: pytest.MonkeyPatch, name: str, cuda: str | None, hip: str | None, owner: str
):
    pretend_gpu(monkeypatch, name, cuda, hip)
    claims = [found for found in chips.present().found if found.chip != "cpu"]
    assert [(found.vendor, found.name, found.device) for found in claims] == [(owner, name, "cuda:0")]


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], object]]:
    """Installs a torch_npu with the given code, for one test."""
    monkeypatch.syspath_prepend(tmp_path)
    yield (tmp_path / "torch_npu.py").write_text
    sys.modules.pop("torch_npu", None)


def test_a_torch_extension_brings_its_devices(extension):
    extension("""
class npu:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    get_device_name = staticmethod(lambda index: "Ascend910B3")
""")
    assert [(found.chip, found.device) for found in ascend.detect().found] == [(AWAY, "npu:0"), (AWAY, "npu:1")]
    assert chips.is_here(pools.get_pool(recipe("pools.away.rehearsed=false", "pools.away.count=2"), "away"))
    assert not chips.is_here(pools.get_pool(recipe("pools.away.rehearsed=false", "pools.away.count=3"), "away"))


def test_broken_software_is_told_apart_from_no_chip(extension):
    extension("raise ImportError('libascendcl.so: cannot open shared object file')")
    look = ascend.detect()
    assert not look.found and "libascendcl.so" in look.problems[0]
    with pytest.raises(IsthmusError, match=r"libascendcl\.so"):
        chips.check_available(recipe("pools.away.rehearsed=false"))


def test_the_tiny_recipe_can_run_here():
    chips.check_available(recipe())
    assert [pool.name for pool in pools.placed_pools(recipe())] == ["away", "home"]


def test_a_pool_that_is_not_here_is_an_error_that_teaches():
    with pytest.raises(IsthmusError) as caught:
        chips.check_available(recipe("pools.away.rehearsed=false"))
    message = str(caught.value)
    assert AWAY in message and "cpu" in message and "rehearsed = true" in message and "[pools.away]" in message
    with pytest.raises(IsthmusError, match="2 x cpu"):
        chips.check_available(recipe("pools.home.count=2"))


def test_only_chips_with_tables_can_be_rehearsed():
    with pytest.raises(IsthmusError, match="no tables") as caught:
        chips.check_names(recipe('pools.away.chip="mlu590"'))
    assert AWAY in str(caught.value)
    with pytest.raises(IsthmusError, match="did you mean 'h20'"):
        chips.check_names(recipe('pools.away.chip="h-20"'))


def test_a_pool_that_no_stage_uses_need_not_be_here():
    chips.check_available(recipe('pools.far={chip="h20"}'))


def test_a_rehearsed_pool_computes_on_the_cpu():
    rehearsed, present = (pools.get_pool(recipe(f"pools.away.rehearsed={flag}"), "away") for flag in ("true", "false"))
    assert (chips.device_of(rehearsed), chips.device_of(present)) == ("cpu", "npu")


def test_threads_are_the_recipes_then_the_environments_then_the_cores(monkeypatch: pytest.MonkeyPatch):
    assert pools.get_pool(recipe("pools.home.threads=5"), "home").threads == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert (pools.get_pool(recipe(), "home").threads, pools.get_pool(recipe(), "home").shared_threads) == (6, 3)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= pools.get_pool(recipe(), "home").threads <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("content", "cores"),
    [("max 100000\n", 8), ("150000 100000\n", 2), ("50000 100000\n", 1), ("900000 100000\n", 8), ("", 8), (None, 8)],
)
def test_a_cpu_quota_is_read(content: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of eight cores; half a core is one, since a process needs one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)))
    if content is not None:
        (tmp_path / "cpu.max").write_text(content)
    assert pools.available_cores(tmp_path / "cpu.max") == cores


def test_the_operator_table_has_the_counts_of_the_registrations():
    rows = table("rehearse/ascend/operators.csv")
    aten = Counter(row["status"] for row in rows if row["operator"].startswith("aten::"))
    assert aten == {"native": 1104, "generic": 836, "decomposes": 697, "fallback": 309, "none": 164}
    assert all(row["source"] and row["version"] for row in rows)


def test_an_operator_that_the_chip_lacks_is_refused_by_name():
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(RehearsalRefused, match=r"aten::_sparse_softmax \(float32\).*torch_npu"), enforce(AWAY):
        torch.sparse.softmax(sparse, dim=1)


def test_a_fallback_is_counted_and_refused_only_if_asked():
    x = torch.ones(3)
    with enforce(AWAY) as rehearsal:
        torch.nextafter(x, x)
    assert rehearsal.tally.calls == {"fallback": 1} and rehearsal.tally.names("fallback") == ["aten::nextafter"]
    with pytest.raises(RehearsalRefused, match="aten::nextafter"), enforce(AWAY, strict=True):
        torch.nextafter(x, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.uint64])
def test_a_dtype_that_the_chip_lacks_is_refused_as_request_and_as_input(dtype: torch.dtype):
    x, there = torch.ones(3), torch.ones(3).to(dtype)
    with pytest.raises(RehearsalRefused, match=str(dtype).removeprefix("torch.")), enforce(AWAY):
        x.to(dtype)
    with pytest.raises(RehearsalRefused, match=str(dtype).removeprefix("torch.")), enforce(AWAY):
        torch.stack([there, there])


def test_the_rules_are_those_of_the_chips_generation():
    with enforce("ascend-950dt"):
        torch.ones(3).to(torch.float8_e4m3fn)
    assert "float8_e4m3fn" in profile_of(AWAY).dtypes and "float8_e4m3fn" not in profile_of("ascend-950dt").dtypes
    cautions = [profile_of(slug).operators["aten::mm"].cautions for slug in ("ascend-950dt", AWAY)]
    assert cautions == [("documented as absent on 950DT",), ()]


def test_numbers_of_the_host_and_what_follows_the_rehearsal_are_not_refused():
    scalar = torch.tensor(2.0, dtype=torch.float64)
    with enforce(AWAY) as rehearsal:
        (torch.ones(3) * scalar * 0.5).sum()
    assert rehearsal.tally.calls["native"] >= 3
    assert torch.ones(3).to(torch.float64).dtype == torch.float64


def test_the_backward_pass_is_seen():
    x = torch.ones(3, requires_grad=True)
    with enforce(AWAY) as rehearsal:
        torch.nn.functional.silu(x).sum().backward()
    assert "aten::silu_backward" in rehearsal.tally.names("native")


def test_composite_operators_are_judged_by_their_parts():
    x = torch.ones(2, 2)
    with torch.inference_mode(), enforce(AWAY) as rehearsal:
        torch.nn.functional.linear(x, x)
    assert "aten::linear" not in rehearsal.tally.operators and "aten::mm" in rehearsal.tally.operators


def test_the_tally_says_what_the_table_says():
    statuses = {row["operator"]: row["status"] for row in table("rehearse/ascend/operators.csv")}
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with enforce(AWAY) as rehearsal:
        layer(torch.randn(2, 3, 8)).sum().backward()
    assert len(rehearsal.tally.operators) > 15
    assert rehearsal.tally.operators == {name: statuses.get(name, "unknown") for name in rehearsal.tally.operators}


def test_a_chip_without_tables_cannot_be_enforced():
    assert can_rehearse(AWAY) and can_rehearse("h20") and not can_rehearse("mlu590")
    with pytest.raises(IsthmusError, match="mlu590 cannot be rehearsed"):
        enforce("mlu590")


@pytest.mark.parametrize(
    ("collective", "dtype", "reduction"),
    [("all_reduce", "float64", "sum"), ("reduce_scatter", "int32", "bxor"), ("broadcast", "complex64", None)],
)
def test_collectives_that_the_library_refuses(collective: str, dtype: str, reduction: str | None):
    with pytest.raises(RehearsalRefused, match=f"{collective} of {dtype}"):
        profile_of(AWAY).check_collective(collective, dtype, reduction)


def test_collectives_that_are_allowed_and_how_they_differ():
    profile = profile_of(AWAY)
    assert profile.check_collective("all_reduce", "bfloat16", "sum") == ()
    assert profile.check_collective("all_gather", "float64") == ()
    assert "divide" in profile.check_collective("all_reduce", "float16", "avg")[0]
    assert "all_gather" in profile.check_collective("gather", "float32")[0]
    assert profile_of("ascend-950dt").check_collective("all_reduce", "float64", "sum") == ()
    assert any("120 s" in text for text in profile.timeouts())


def test_what_servers_read_are_formats_of_known_models_with_a_source():
    rows = table("servers.csv")
    assert {row["server"] for row in rows} == set(chips.servers())
    assert {row["format"] for row in rows} <= set(format_names()) and {row["models"] for row in rows} <= {
        "any",
        "dense",
    }
    assert all(row["source"] and row["standing"] in ("documented", "read in code", "assumed") for row in rows)
    for server in chips.servers():
        dense, experts = ([one.format for one in chips.read_by(server, kind)] for kind in ("dense", "moe"))
        assert set(experts) <= set(dense) and len(set(dense)) == len(dense) and "bf16" in experts
    assert chips.read_by("none", "dense") == []
