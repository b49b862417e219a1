"""What a rehearsed chip does silently, emulated: other dtypes, fallbacks, memory that holds anything, noise."""

from __future__ import annotations

import warnings

import numpy
import pytest
import torch
from torch import Tensor

from isthmus import chips
from isthmus.chips.rehearse import Emulation, RehearsalRefused, profile_of
from isthmus.chips.rehearse.dispatch import Rehearsal, enforce

ASCEND = "ascend-910b-313t"
SILENT = Emulation()


def emulated(chip: str = ASCEND, **options: object) -> Rehearsal:
    return enforce(chip, emulate=Emulation(**options))  # pyright: ignore[reportArgumentType]


def test_a_conversion_gives_the_dtype_that_the_chip_has_with_one_warning():
    with pytest.warns(UserWarning, match="do not support double dtype") as seen, emulated() as rehearsal:
        results = [torch.ones(3).to(torch.float64), torch.ones(2).double()]
    assert [one.dtype for one in results] == [torch.float32, torch.float32] and len(seen) == 1
    assert rehearsal.tally.substitutions == {"aten::_to_copy float64 > float32": 2}


def test_what_another_vendor_does_not_replace_stays():
    with warnings.catch_warnings(), emulated("h20") as rehearsal:
        warnings.simplefilter("error")
        assert torch.ones(3).to(torch.float64).dtype == torch.float64
    assert not rehearsal.tally.substitutions


def test_without_emulation_what_is_silent_is_refused():
    with pytest.raises(RehearsalRefused, match="silently gives float32"), enforce(ASCEND):
        torch.ones(3).to(torch.float64)
    with pytest.raises(RehearsalRefused, match="float64"), emulated(substitute=False):
        torch.ones(3).to(torch.float64)


def test_a_tensor_in_such_a_dtype_is_computed_with_and_said_to_be_untested():
    there = torch.ones(2, 2, dtype=torch.float64)
    with emulated() as rehearsal:
        product = there @ there
    assert product.dtype == torch.float64 and "fp64" not in profile_of(ASCEND).operators["aten::mm"].documented_dtypes
    assert rehearsal.tally.untested == {"aten::mm float64": 1}


def test_a_dtype_that_the_chip_refuses_is_refused_by_an_emulation_too():
    with pytest.raises(RehearsalRefused, match="fp8"), emulated():
        torch.ones(3).to(torch.float8_e4m3fn)


def test_a_fallback_warns_once_in_the_vendors_words_and_is_counted():
    x = torch.ones(3)
    with pytest.warns(UserWarning, match="'aten::nextafter' is not currently supported on the NPU") as seen:  # noqa: SIM117
        with emulated() as rehearsal:
            for _ in range(4):
                torch.nextafter(x, x)
    assert len(seen) == 1 and rehearsal.tally.by_operator["aten::nextafter"] == 4


@pytest.mark.parametrize(("value", "refused"), [("1", True), ("0", False)])
def test_the_vendors_switch_makes_a_fallback_an_error(monkeypatch: pytest.MonkeyPatch, value: str, refused: bool):
    monkeypatch.setenv("TORCH_NPU_FALLBACK_CPU_DISABLE", value)
    assert (enforce(ASCEND).strict, enforce("h20").strict) == (refused, False)
    if refused:
        with pytest.raises(RehearsalRefused, match="nextafter"), enforce(ASCEND):
            torch.nextafter(torch.ones(1), torch.ones(1))


def test_memory_that_nobody_initialised_is_not_what_anybody_computed():
    with emulated() as rehearsal:
        made = [torch.empty(3), torch.empty_like(torch.ones(2)), torch.ones(1).new_empty(2, dtype=torch.bfloat16)]
        integers, zeros, written = torch.empty(2, dtype=torch.int32), torch.zeros(3), torch.empty(3)
        written.fill_(2.0)
    assert all(one.isnan().all() for one in made) and (integers == 2**31 - 1).all()
    assert (zeros == 0).all() and (written == 2).all()
    assert sum(rehearsal.tally.filled.values()) == 5


def test_memory_is_left_alone_unless_it_is_asked_for():
    with emulated(fill=False) as rehearsal:
        torch.empty(3)
    with enforce(ASCEND) as plain:
        torch.empty(3)
    assert not rehearsal.tally.filled and not plain.tally.filled


def test_gelu_is_its_tanh_form():
    x = torch.linspace(-3, 3, 50, requires_grad=True)
    with emulated() as rehearsal:
        there = torch.nn.functional.gelu(x)
        there.sum().backward()
    other = x.detach().requires_grad_()
    expected = torch.nn.functional.gelu(other, approximate="tanh")
    expected.sum().backward()
    assert torch.equal(there, expected) and torch.equal(x.grad, other.grad)  # pyright: ignore[reportArgumentType]
    assert not torch.equal(there, torch.nn.functional.gelu(x))
    assert set(rehearsal.tally.substitutions) == {
        "aten::gelu approximate none > tanh",
        "aten::gelu_backward approximate none > tanh",
    }


def test_an_argument_with_a_documented_limit_is_counted():
    with emulated() as rehearsal:
        torch.topk(torch.rand(5), 2, sorted=False)
        torch.topk(torch.rand(5), 2)
    assert sum(rehearsal.tally.cautions.values()) == 1 and "sorted=False" in next(iter(rehearsal.tally.cautions))


def products(seed: int, rows: int = 64, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(rows, 1024, generator=generator) + 0.5).to(dtype)
    with emulated(noise=True, seed=seed):
        return [x @ x.T for _ in range(3)]


def test_noise_changes_from_call_to_call_and_repeats_with_its_seed():
    first, again, other = products(3), products(3), products(4)
    assert not torch.equal(first[0], first[1])
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])


def test_noise_is_the_size_of_another_order_of_accumulation():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(64, 1024, generator=generator) + 0.5
    exact = x.double() @ x.double().T
    terms = x[0] * x[1]
    orders = [numpy.cumsum(terms[torch.randperm(1024, generator=generator)].numpy())[-1] for _ in range(50)]
    reordered = (torch.tensor(orders, dtype=torch.float64) / terms.double().sum() - 1).square().mean().sqrt()
    with emulated(noise=True):
        product = x @ x.T
    noise = (product.double() / exact - 1).square().mean().sqrt()
    assert 0.1 < noise / reordered < 10


def test_noise_in_a_narrow_dtype_moves_few_values_and_by_little():
    first, second, _ = products(0, 512, torch.bfloat16)
    moved = (first.double() / second.double() - 1).abs()
    assert 0 < (moved > 0).double().mean() < 0.05
    assert moved.max() <= 3 * torch.finfo(torch.bfloat16).eps


def test_no_noise_where_it_is_not_asked_for_or_deterministic_algorithms_are(monkeypatch: pytest.MonkeyPatch):
    x = torch.rand(8, 64)
    with enforce(ASCEND, emulate=SILENT):
        assert torch.equal(x @ x.T, x @ x.T)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with emulated(noise=True) as rehearsal:
        assert torch.equal(x @ x.T, x @ x.T)
    assert not rehearsal.tally.varied


def test_each_vendor_varies_in_the_operators_that_it_documents():
    x, index = torch.rand(8, 8), torch.tensor([0, 0, 1])
    for chip, operators in ((ASCEND, {"aten::mm"}), ("h20", {"aten::index_add"})):
        with emulated(chip, noise=True) as rehearsal:
            x @ x.T
            x.index_add(0, index, x[:3])
        assert set(rehearsal.tally.varied) == operators


def test_operators_that_are_there_only_for_the_cpu_are_not_held_against_a_chip():
    lstm = torch.nn.LSTM(4, 4)
    with torch.no_grad(), enforce(ASCEND, strict=True) as rehearsal:
        lstm(torch.rand(3, 1, 4))
    assert "none" not in rehearsal.tally.operators.values()


@pytest.mark.parametrize("chip", ["ascend-910b-280t", "ascend-910b-376t", "ascend-910c-752t", "h800-sxm", "mi308x"])
def test_a_training_step_can_be_rehearsed_on_every_chip_that_matters(chip: str):
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    optimiser = torch.optim.AdamW(layer.parameters(), foreach=True)
    with enforce(chip, strict=True, emulate=SILENT) as rehearsal:
        layer(torch.randn(2, 3, 8)).square().mean().backward()
        optimiser.step()
    assert not {"none", "fallback"} & set(rehearsal.tally.operators.values())
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_profiles_differ_where_their_sources_do():
    speeds = [chips.get_chip(f"ascend-910b-{speed}t").bf16_tflops.value for speed in (280, 313, 376)]
    assert speeds == sorted(set(speeds))
    fast, slow = profile_of("ascend-910c-752t"), profile_of("ascend-910c-560t")
    assert (fast.link("within node", "EP dispatch (normal)", 8).standing, fast.rates) == ("documented", ())
    assert slow.link("within node", "EP dispatch (normal)", 8).standing == "assumed"
    assert profile_of("h800-sxm").link("within node").bandwidth_gbs == 200
    assert profile_of("h20").link("within node").bandwidth_gbs == 450
    assert profile_of("h800-sxm").link("between nodes", "EP dispatch (normal)", 64).bandwidth_gbs == 51
    assert profile_of("h100-sxm").rate().per_chip_hour == pytest.approx(419 / (54 * 24 * 16384), rel=1e-3)
    assert all(profile_of(slug).rate() is None for slug in (ASCEND, "h20", "mi308x", "ascend-910c-752t"))
    assert profile_of("a100-80gb-sxm").status("aten::_scaled_mm") == "none"
    assert profile_of("h20").status("aten::_scaled_mm") == "native"
    assert "fnuz" in profile_of("mi308x").dtypes["float8_e4m3fn"].behaviour
    with pytest.raises(RehearsalRefused, match="BAND"):
        profile_of("mi308x").check_collective("all_reduce", "int32", "band")


def test_latency_is_the_smallest_that_was_published():
    assert profile_of("h800-sxm").latency_us("between nodes") == 77
    assert profile_of("ascend-910c-752t").latency_us("within node") == 126
    assert profile_of(ASCEND).latency_us("within node") is None
