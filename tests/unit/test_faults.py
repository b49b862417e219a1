"""Planted faults: each kind happens where and when it is asked for, and nowhere else."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isthmus.chips.rehearse.damage import damage, round_mantissa
from isthmus.chips.rehearse.faults import FAULT_KINDS, Fault, check_fault, parse_fault
from isthmus.chips.rehearse.inject import FALLBACK_S, Injector
from isthmus.errors import DamagedFile, IsthmusError
from isthmus.formats.files.bundle import verify_files, write_bundle
from isthmus.launch.crew import Crew
from isthmus.model.model import Model
from isthmus.run import write_atomic
from isthmus.trainer.checkpoint import CheckpointWriter, load_model_state
from tests.support.checkpoint_ranks import whole_state
from tests.support.small import tiny_architecture


class NoTokenizer:
    """Enough of a tokenizer for a bundle that nobody serves."""

    bos_id, ends = 0, (1,)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def injector(*faults: str, rank: int = 0) -> Injector:
    return Injector([parse_fault(fault) for fault in faults], rank)


def pair(dtype: torch.dtype = torch.float32, size: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(size, size, generator=generator).to(dtype),
        torch.randn(size, size, generator=generator).to(dtype),
    )


def products(planted: Injector, steps: int = 3, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """At each step a product of matrices, a sum, and another product, as they come out under planted faults."""
    left, right = pair(dtype)
    results = []
    with planted.operators():
        for step in range(steps):
            planted.step(step)
            results.append([left @ right, left + right, torch.bmm(left[None], right[None])[0]])
    return results


def changed(found: Tensor, healthy: Tensor) -> int:
    """How many elements differ, NaN from NaN not among them."""
    return int((~((found == healthy) | (found.isnan() & healthy.isnan()))).sum())


def flips(found: list[Tensor], healthy: list[Tensor]) -> list[Tensor]:
    """The bits that differ, tensor by tensor."""
    kind = BITS[healthy[0].dtype]
    return [a.view(kind) ^ b.view(kind) for a, b in zip(found, healthy, strict=True)]


@pytest.mark.parametrize("dtype", list(BITS), ids=str)
@pytest.mark.parametrize("bit", [0, 5, 15])
def test_a_flipped_bit_is_that_bit_of_one_element_of_a_product_at_its_step(dtype: torch.dtype, bit: int):
    healthy = products(injector(), dtype=dtype)
    found = products(injector(f"flipped-bit@rank=0,step=1,size={bit}"), dtype=dtype)
    differences = [flips(*results) for results in zip(found, healthy, strict=True)]
    counts = [[int(bits.count_nonzero()) for bits in step] for step in differences]
    assert counts == [[0, 0, 0], [1, 0, 1], [0, 0, 0]]
    expected = 1 << bit if bit < 15 or BITS[dtype] != torch.int16 else -(1 << 15)
    assert {int(bits[bits != 0]) for bits in differences[1] if bits.any()} == {expected}


def test_a_bit_that_is_not_named_is_drawn_from_the_seed():
    healthy = products(injector())
    found = [products(injector(f"flipped-bit@rank=0,step=0,seed={seed}")) for seed in (1, 1, 2, 3)]
    raw = [torch.stack(flips(one[0], healthy[0])) for one in found]
    assert torch.equal(raw[0], raw[1])
    assert len({tuple(bits[bits != 0].tolist()) for bits in raw}) == 3


@pytest.mark.parametrize("kind", ["small-error", "nan"])
def test_an_error_in_values_is_in_one_element_of_each_product(kind: str):
    healthy = products(injector())
    found = products(injector(f"{kind}@rank=0,step=2"))
    counts = [list(map(changed, *results)) for results in zip(found, healthy, strict=True)]
    assert counts == [[0, 0, 0], [0, 0, 0], [1, 0, 1]]
    for a, b in ((found[2][0], healthy[2][0]), (found[2][2], healthy[2][2])):
        wrong = a != b
        if kind == "nan":
            assert a[wrong].isnan().all()
        else:
            torch.testing.assert_close(a[wrong] / b[wrong], torch.tensor([1.01]))


def test_an_operator_is_struck_in_the_backward_pass_alone():
    """addmm computes a linear layer forward; backward it is mm."""

    def trained(planted: Injector) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        layer = nn.Linear(6, 6)
        with planted.operators():
            planted.step(0)
            out = layer(pair(size=6)[0])
            out.square().sum().backward()
        return out.detach(), layer.weight.grad

    healthy, found = trained(injector()), trained(injector("nan@rank=0,operator=aten::mm"))
    assert torch.equal(healthy[0], found[0])
    assert changed(found[1], healthy[1]) == 1


def test_products_without_gradients_are_struck_under_inference_mode_too():
    with torch.inference_mode():
        healthy, found = products(injector()), products(injector("nan@rank=0"))
    assert changed(found[0][0], healthy[0][0]) == 1


def test_the_rate_is_how_often_it_happens():
    planted = injector("nan@rank=0,rate=0.1,seed=4")
    left, right = pair(size=3)
    with planted.operators():
        planted.step(0)
        struck = sum(bool((left @ right).isnan().any()) for _ in range(1500))
    assert abs(struck - 150) < 5 * math.sqrt(1500 * 0.1 * 0.9)
    assert len(planted.fired) == struck


def test_other_ranks_and_no_faults_change_nothing():
    healthy = products(injector())
    for planted in (injector("nan@rank=1", "crash@rank=2", "hang@rank=1,step=1"), injector()):
        for one, other in zip(products(planted), healthy, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert planted.fired == []


def test_a_fallback_takes_longer_and_says_so_once():
    healthy, planted = products(injector(), steps=8), injector("fallback@rank=0,operator=aten::mm")
    began = time.perf_counter()
    with pytest.warns(UserWarning, match="'aten::mm'.*fall back to run on the CPU") as heard:
        found = products(planted, steps=8)
    assert len(heard) == 1 and len(planted.fired) == 8
    assert time.perf_counter() - began > 8 * FALLBACK_S
    assert all(torch.equal(a, b) for a, b in zip(found[7], healthy[7], strict=True))


def test_a_swapped_dtype_comes_back_as_float32_where_float64_was_asked():
    left, right = pair(torch.float64)
    healthy, found = (
        products(injector(), dtype=torch.float64),
        products(injector("dtype-swap@rank=0"), dtype=torch.float64),
    )
    assert found[0][0].dtype == torch.float32 and found[0][1].dtype == torch.float64
    assert torch.equal(found[0][0], left.float() @ right.float())
    assert torch.equal(found[0][1], healthy[0][1])


def test_a_swapped_dtype_is_silent_where_float32_was_asked():
    left, right = pair()
    found = products(injector("dtype-swap@rank=0"))
    assert found[0][0].dtype == torch.float32
    assert torch.equal(found[0][0], left.bfloat16().float() @ right.bfloat16().float())


def test_a_swapped_dtype_keeps_the_bits_of_mantissa_that_size_says():
    left, right = pair()
    found = products(injector("dtype-swap@rank=0,size=10"))
    assert torch.equal(found[0][0], left.half().float() @ right.half().float())


def test_mantissas_are_rounded_as_other_types_are():
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 8
    values = torch.cat([values, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38])])
    np.testing.assert_array_equal(round_mantissa(values, 7).numpy(), values.bfloat16().float().numpy())
    doubles = values.double() * math.pi
    normal = doubles.abs() < 3e38
    np.testing.assert_array_equal(round_mantissa(doubles, 23)[normal].numpy(), doubles.float().double()[normal].numpy())


def test_a_slow_rank_takes_as_many_times_longer_as_asked():
    """In seconds of the process, so that a busy machine does not matter."""
    planted = injector("slow-rank@rank=0,step=1,size=4")
    left, right = pair(size=192)
    spent = []
    with planted.operators():
        planted.begin()
        for step in range(3):
            planted.step(step)
            began, worked = time.perf_counter(), time.process_time()
            while time.process_time() - worked < 0.05:
                left @ right
            spent.append((time.perf_counter() - began) / (time.process_time() - worked))
    assert spent[1] > 3.0
    assert [text.split(":")[0] for text in planted.fired] == ["slow-rank at step 1"]


def test_out_of_memory_is_the_error_that_torch_raises():
    planted = injector("out-of-memory@rank=0,step=2,size=3")
    planted.step(1)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 3\.00 GiB"):
        planted.step(2)


def test_out_of_memory_may_come_from_an_operator():
    with pytest.raises(torch.OutOfMemoryError):
        products(injector("out-of-memory@rank=0,step=1,operator=aten::bmm"))


def one_bit_apart(found: bytes, healthy: bytes) -> bool:
    differing = [(a, b) for a, b in zip(found, healthy, strict=True) if a != b]
    return len(differing) == 1 and (differing[0][0] ^ differing[0][1]).bit_count() == 1


@pytest.mark.parametrize("save", [lambda *saved: torch.save(*saved), save_file], ids=["torch.save", "safetensors"])
def test_a_corrupted_save_has_one_bit_wrong_in_its_file(save: Callable[..., None], tmp_path: Path):
    planted = injector("corrupted-save@rank=0,step=1")
    content = []
    with planted.install_saves():
        for step in range(3):
            planted.step(step)
            save({"a": torch.arange(64.0)}, tmp_path / "a.pt")
            content.append((tmp_path / "a.pt").read_bytes())
    assert content[0] == content[2]
    assert one_bit_apart(content[1], content[0]) and len(planted.fired) == 1
    save({"a": torch.arange(64.0)}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == content[0]


def test_a_corrupted_checkpoint_is_found_by_its_hashes(tmp_path: Path):
    planted = injector("corrupted-save@rank=0")
    with planted.install_saves():
        writer = CheckpointWriter(tmp_path, 2, None)
        writer.save(1, whole_state())
        saved = writer.finish()
    assert len(planted.fired) == 2
    with pytest.raises(DamagedFile):
        load_model_state(saved.folder, saved.sha256)


def test_a_corrupted_bundle_is_found_and_other_files_are_left_alone(tmp_path: Path):
    planted, architecture = injector("corrupted-save@rank=0"), tiny_architecture()
    with planted.install_saves():
        write_bundle(
            tmp_path / "b", "bf16", Model(architecture).initialise(0).state_dict(), architecture, NoTokenizer()
        )
        write_atomic(tmp_path / "record.json", b"{}")
    assert (tmp_path / "record.json").read_bytes() == b"{}"
    assert len(planted.fired) == 1 and "model.safetensors" in planted.fired[0]
    with pytest.raises(DamagedFile, match=r"model\.safetensors"):
        verify_files(tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1.0, -0.5, 1e6])
def test_a_value_is_wrong_also_at_the_ends_of_its_range(dtype: torch.dtype, size: float):
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    for value in (limits.min, 0, 1, limits.max):
        result = torch.full((3,), value, dtype=dtype)
        assert damage(Fault("wrong-sum", 0, size=size), [result], random.Random(0))
        assert int((result != value).sum()) == 1


def test_the_same_faults_go_wrong_in_the_same_way():
    faults = ("nan@rank=0,rate=0.3,seed=1", "flipped-bit@rank=0,rate=0.3", "small-error@rank=0,operator=aten::add")
    first, second = injector(*faults), injector(*faults)
    products(first, steps=20)
    products(second, steps=20)
    assert first.fired == second.fired and len(first.fired) > 20


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("crash@rank=0,peer=1", "has peer, which crash does not use"),
        ("nan@rank=0,size=3", "has size"),
        ("slow-link@rank=1,peer=1", "at both ends"),
        ("flipped-bit@rank=0,size=64", "whole number from 0 to 63"),
        ("flipped-bit@rank=0,size=1.5", "whole number"),
        ("slow-rank@rank=0,size=0.5", "at least 1"),
        ("small-error@rank=0,size=0", "must not be 0"),
        ("wrong-sum@rank=0,operator=aten::mm", "must start with c10d::"),
        ("dtype-swap@rank=0,operator=c10d::allreduce_", "not of a collective"),
        ("nan@rank=0,rate=0", "above 0"),
    ],
)
def test_a_fault_that_says_what_cannot_be_is_refused(fault: str, why: str):
    with pytest.raises(IsthmusError, match=why):
        parse_fault(fault)


def test_every_kind_can_be_planted_and_written():
    for kind in FAULT_KINDS:
        fault = Fault(kind, rank=1, step=3, rate=0.5, seed=random.Random(1).randrange(99))
        check_fault(fault)
        assert parse_fault(str(fault)) == fault


def test_a_bit_that_a_dtype_does_not_have_is_an_error():
    with pytest.raises(ValueError, match="bits 0 to 15"):
        products(injector("flipped-bit@rank=0,size=40"), dtype=torch.bfloat16)


def test_collectives_of_accelerators_are_not_said_to_be_damaged():
    with pytest.raises(IsthmusError, match="among ranks on the CPU"):
        Crew(2, device="anything", faults=[parse_fault("wrong-sum@rank=0")])


def test_no_warning_is_left_behind_by_healthy_operators():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        products(injector("fallback@rank=1"))
