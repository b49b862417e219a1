"""The live tier of software: healthy kernels pass in every dtype, and each planted fault is found and named."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.chips import environment_of, get_chip
from isthmus.chips.rehearse.faults import parse_fault
from isthmus.launch import places
from isthmus.launch.crew import Called, Crew, Reply
from isthmus.pools import get_pool
from isthmus.probes import software
from isthmus.probes.calls import Call, CallRecorder, describe_tensor, edge_calls, recipe_calls, specify
from isthmus.probes.contract import Setting
from isthmus.probes.portable import compiled, operators, traps
from isthmus.probes.trusted import trusted_errors
from isthmus.recipe.read import load_recipe
from isthmus.recipe.schema import Recipe
from isthmus.records import Evidence, FailureCase
from tests.support.flow_recipe import RECIPE, SMALL
from tests.support.traced import record_costs

aten = torch.ops.aten
DTYPES = ["float32", "bfloat16", "float16"]
RANK = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), beat=lambda *_: None)


def chosen_recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, (*(f"{key}={value}" for key, value in SMALL.items()), *overrides))


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    return [*recipe_calls(chosen_recipe()), *edge_calls(grouped=True)]


def some(calls: list[Call], *names: str) -> list[Call]:
    return [call for call in calls if call["operator"] in names]


class Replaced(TorchDispatchMode):
    """Gives an operator another implementation, as a chip with other kernels would."""

    def __init__(self, operator: str, instead: Callable[..., Any]):
        super().__init__()
        self.operator, self.instead = operator, instead

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == self.operator:
            return self.instead(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def after(change: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """The operator's own result, changed."""
    return lambda func, *args, **kwargs: change(func(*args, **kwargs))


def one_element(change: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """The largest element of the result, changed: what happens to the smallest may be lost in rounding."""

    def work(result: Tensor) -> Tensor:
        if result.numel():
            flat = result.view(-1)
            place = flat.abs().argmax()
            flat[place] = change(flat[place])
        return result

    return after(work)


def on_inputs(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def work(func, *args, **kwargs):
        changed = [change(one) if isinstance(one, Tensor) and one.is_floating_point() else one for one in args]
        return func(*changed, **kwargs)

    return work


def as_tf32(x: Tensor) -> Tensor:
    """Cut to 10 bits of mantissa."""
    if x.dtype != torch.float32:
        return x
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def warned(func, *args, **kwargs):
    warnings.warn("the operator is not supported on this device and will fall back to run on the CPU", stacklevel=1)
    return func(*args, **kwargs)


def missing(func, *args, **kwargs):
    raise NotImplementedError(f"no kernel for {func.name()}")


def forbidden(func, *args, **kwargs):
    """As an operator without a kernel ends where the vendor's switch is set."""
    raise RuntimeError(f"The operator '{func.name()}' would compute on CPU, but CPU fallback is disabled")


class Slow:
    """Takes 20 ms, the first `times` times."""

    def __init__(self, times: float):
        self.left = times

    def __call__(self, func, *args, **kwargs):
        if self.left > 0:
            self.left -= 1
            time.sleep(0.02)
        return func(*args, **kwargs)


class Unsteady:
    """Changes the last bit of one element, now and then."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, func, *args, **kwargs):
        self.count += 1
        result = func(*args, **kwargs)
        if result.numel() and self.count % 2:
            result.view(-1)[0] *= 1.0 + 2.0 * torch.finfo(result.dtype).eps
        return result


def test_what_is_recorded_is_what_runs_and_json(calls: list[Call]):
    layer = torch.nn.Linear(6, 4)

    def work() -> None:
        layer.zero_grad()
        (layer(torch.ones(3, 6)).softmax(-1).square() + torch.randn(3, 4)).sum().backward()

    with CallRecorder() as recorder:
        work()
    assert {call["operator"] for call in recorder.calls()} == set(record_costs(work, "cpu").operators()) - {
        "aten::randn"
    }
    assert json.loads(json.dumps(calls)) == calls
    wanted = {"aten::mm", "aten::_softmax_backward_data", "aten::topk", "aten::_fused_adamw_", "aten::index_copy_"}
    assert wanted <= {call["operator"] for call in calls}
    assert next(call for call in calls if call["operator"] == "aten::_fused_adamw_")["uses"] == ["training"]
    assert next(call for call in calls if call["operator"] == "aten::index_copy_")["uses"] == ["serving"]


def test_values_are_described_by_what_they_are():
    def described(tensor: Tensor) -> dict[str, Any]:
        return describe_tensor(tensor)["values"]

    x = torch.randn(4, 9)
    assert described(x.softmax(-1)) == {"kind": "probabilities"}
    assert described(x.log_softmax(-1)) == {"kind": "log-probabilities"}
    assert described(x.square() + 0.1)["kind"] == "positive"
    assert described(torch.full((3, 3), -math.inf).triu(1)) == {"kind": "masked", "share": 0.333, "zeros": True}
    assert described(torch.tensor([True, False, True])) == {"kind": "marks", "count": 2}
    assert described(torch.tensor([4, 2, 9])) == {"kind": "integers", "low": 2, "high": 9, "distinct": True}
    assert described(torch.tensor([2, 2, 9])) == {"kind": "integers", "low": 2, "high": 9, "sorted": True}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, 5).T,
        torch.zeros(3, 1, 5).expand(3, 4, 5),
        torch.zeros(6, 8)[:, 2:5],
        torch.zeros(()),
        torch.zeros(0, 3),
    ],
    ids=["transposed", "expanded", "narrow", "number", "empty"],
)
def test_a_tensor_is_made_again_in_its_layout(tensor: Tensor):
    made = operators.Maker(torch.Generator(), torch.bfloat16, RANK.device).value(
        specify("x", (tensor,), {})["arguments"]
    )
    assert made[0].shape == tensor.shape and made[0].dtype == torch.bfloat16
    assert made[0].stride() == tensor.stride() or tensor.is_contiguous()


@pytest.mark.parametrize("seed", [0, 1])
def test_healthy_kernels_pass_and_every_call_is_valid(calls: list[Call], seed: int):
    found = operators.check_operators(RANK, calls, DTYPES[: 3 - seed], seed=seed)
    assert not found["failed"] and found["detail"] == "", found["detail"]
    assert found["unchecked"] == [] and found["noted"] == []
    assert found["checked"] > 1.5 * len(calls) and found["closest"] < 0.8
    assert {key.split()[-1] for key in found["errors"]} == {"forward", "backward"}
    assert max(max(one.values()) for one in found["ratios"].values()) <= 1.0


WRONG: list[tuple[str, str, Callable[..., Any], str, str]] = [
    ("nan", "aten::mm", one_element(lambda x: x * math.nan), "float32", "not finite"),
    ("infinity", "aten::add.Tensor", one_element(lambda x: x * math.inf), "bfloat16", "not finite"),
    ("small error", "aten::mm", one_element(lambda x: x * 1.01), "float32", "inaccurate"),
    ("small error in bf16", "aten::bmm", one_element(lambda x: x * 1.04), "bfloat16", "inaccurate"),
    ("smaller error", "aten::_softmax", one_element(lambda x: x * 1.0005), "float32", "inaccurate"),
    ("tf32", "aten::mm", on_inputs(as_tf32), "float32", "inaccurate"),
    ("bf16 for fp32", "aten::bmm", on_inputs(lambda x: x.bfloat16().to(x.dtype)), "float32", "inaccurate"),
    ("the result's dtype", "aten::mul.Tensor", after(lambda x: x.bfloat16()), "float32", "dtype"),
    ("a moved value", "aten::cat", one_element(lambda x: x * 1.0001 + 1), "float32", "wrong"),
    ("a wrong place", "aten::topk", after(lambda x: (x[0], x[1].flip(-1) * 0)), "float32", "wrong"),
    ("a flipped bit", "aten::mm", Unsteady(), "float32", "non-deterministic"),
    ("a warning of a fallback", "aten::bmm", warned, "float32", "fallback"),
    ("a fallback that is forbidden", "aten::bmm", forbidden, "bfloat16", "fallback"),
    ("a missing kernel", "aten::silu", missing, "bfloat16", "error"),
    ("a missing backward kernel", "aten::silu_backward", missing, "float32", "error"),
]


@pytest.mark.parametrize(("name", "operator", "instead", "dtype", "kind"), WRONG, ids=[row[0] for row in WRONG])
def test_a_wrong_kernel_is_found_and_named(
    calls: list[Call], name: str, operator: str, instead: Callable[..., Any], dtype: str, kind: str
):
    mine = some(calls, operator, "aten::sub.Tensor", "aten::transpose.int")
    with Replaced(operator, instead):
        found = operators.check_operators(RANK, mine, [dtype])
    assert found["failed"], name
    assert {one["operator"] for one in found["findings"]} <= {operator, "aten::silu"}
    assert found["findings"][0]["kind"] == kind, found["detail"]
    number = found["findings"][0]["call"]
    with Replaced(operator, instead):
        assert operators.check_operators(RANK, [mine[number]], [dtype], repeats=2)["failed"], "not reproduced alone"


def test_only_the_backward_pass_may_be_wrong(calls: list[Call]):
    with Replaced("aten::silu_backward", one_element(lambda x: x * 1.01)):
        found = operators.check_operators(RANK, some(calls, "aten::silu"), ["float32"])
    assert {(one["operator"], one["pass"]) for one in found["findings"]} == {("aten::silu", "backward")}


def test_the_size_of_an_error_is_told():
    call = specify("aten::mul.Tensor", (torch.randn(40, 40), torch.randn(40, 40)), {})
    with Replaced("aten::mul.Tensor", after(lambda x: x * 1.001)):
        found = operators.check_operators(RANK, [call], ["float32"])
    told = float(found["findings"][0]["detail"].split("error ")[1].split(",")[0])
    assert told == pytest.approx(1e-3, rel=0.2)


def test_an_operator_that_is_slow_each_time_is_told_and_one_that_was_slow_once_is_not(calls: list[Call]):
    mine = some(calls, "aten::mm", "aten::silu", "aten::add.Tensor")
    for times, kinds in ((math.inf, {("aten::silu", "fallback")}), (1, set())):
        with Replaced("aten::silu", Slow(times)):
            found = operators.check_operators(RANK, mine, ["float32"])
        assert {(one["operator"], one["kind"]) for one in found["findings"]} == kinds


def one_by_one(func, x: Tensor, *args, **kwargs):
    total = torch.zeros((), dtype=x.dtype)
    for value in x.flatten():
        total = torch.add(total, value)
    return total


def test_an_error_is_judged_by_what_a_trusted_chip_does():
    """A sum one after another is worse than the CPU's, and no worse than such a chip's own."""
    call = specify("aten::sum", (torch.rand(3000) + 0.1,), {})
    key = "aten::sum float32 forward"
    with Replaced("aten::sum", one_by_one):
        strict = [operators.check_operators(RANK, [call], ["float32"], seed=seed) for seed in range(4)]
        errors = strict[0]["errors"][key]
        loose = {key: {name: 100.0 * value for name, value in errors.items()}}
        again = operators.check_operators(RANK, [call], ["float32"], trusted=loose)
    assert any("times a trusted chip's" in one["detail"] for one in strict)
    assert not again["failed"], again["detail"]


def test_a_narrow_accumulator_is_found_whatever_is_trusted():
    call = specify("aten::sum", (torch.rand(3000) + 0.1,), {})
    trusted = {f"aten::sum {dtype} forward": dict.fromkeys(("max", "mean", "rmse"), 1e9) for dtype in DTYPES}
    with Replaced("aten::sum", lambda func, x, **_: one_by_one(func, x.bfloat16()).to(x.dtype)):
        found = operators.check_operators(RANK, [call], DTYPES, trusted=trusted)
    assert {one["dtype"] for one in found["findings"]} == set(DTYPES)


def test_a_call_that_is_made_smaller_until_it_is_not_valid_is_no_failure():
    call = specify("aten::mm", (torch.randn(4, 5), torch.randn(5, 3)), {})
    call["arguments"][0]["tensor"]["shape"] = [4, 2]
    found = operators.check_operators(RANK, [call], ["float32"])
    assert not found["failed"] and "cannot be multiplied" in found["unchecked"][0]["detail"]


def lost_duplicates(func, x: Tensor, dim: int, index: Tensor, source: Tensor):
    return x.index_copy(dim, index, source)


TRAPPED: list[tuple[str, str, Callable[..., Any]]] = [
    ("float64 stays float64", "aten::_to_copy", after(lambda x: x.float())),
    ("fp32 products keep 24 bits", "aten::mm", on_inputs(as_tf32)),
    ("long products", "aten::mm", lambda func, a, b: (a.half() @ b.half()).clamp(max=2048.0).to(a.dtype)),
    ("long sums", "aten::sum", lambda func, x, **_: x.bfloat16().float().cumsum(0)[-1].bfloat16().float()),
    (
        "integers beyond 2^24",
        "aten::cummin",
        lambda func, x, dim: torch.cummin(x.float(), dim)[0:1] and func(x.float(), dim),
    ),
    ("integers beyond 2^24", "aten::add.Tensor", lambda func, a, b, **_: (a.float() + b).to(a.dtype)),
    ("duplicate indices", "aten::index_add", lost_duplicates),
    ("duplicate indices", "aten::embedding_dense_backward", one_element(lambda x: x - 1)),
    ("order and ties", "aten::topk", after(lambda x: (x[0].flip(-1), x[1].flip(-1)))),
    ("order and ties", "aten::sort.stable", lambda func, x, **_: (x.sort(-1)[0], x.sort(-1)[1].flip(-1))),
    ("gelu is exact", "aten::gelu", lambda func, x, **_: func(x, approximate="tanh")),
    ("true values add up", "aten::sum", after(lambda x: x.clamp(max=1))),
    ("infinities and NaN", "aten::_softmax", after(lambda x: x.nan_to_num(0.0))),
    ("infinities and NaN", "aten::max", lambda func, x: x.nan_to_num(0.0).amax()),
    ("subnormal numbers", "aten::mul.Tensor", after(lambda x: torch.where(x.abs() < 1e-38, 0.0, x))),
    ("used memory", "aten::mm", lambda func, a, b: func(a, b) if a.shape[1] else torch.full((len(a), b.shape[1]), 7.0)),
    ("rounding of casts", "aten::_to_copy", on_inputs(lambda x: x - x.abs() * 2.0**-9)),
    ("views and strides", "aten::clone", after(lambda x: x.flip(0) if x.dim() else x + 1)),
    ("seeds", "aten::randn.generator", Unsteady()),
]


@pytest.mark.parametrize(("trap", "operator", "instead"), TRAPPED, ids=[f"{row[0]}: {row[1]}" for row in TRAPPED])
def test_a_trap_catches_what_it_is_for(trap: str, operator: str, instead: Callable[..., Any]):
    with Replaced(operator, instead):
        found = traps.check_traps(RANK, [trap])
    assert found["traps"][0]["failed"], trap
    assert found["failed"] == bool(found["traps"][0]["needed_for"])


def test_a_healthy_chip_steps_over_all_traps():
    for seed, length in ((0, 4096), (1, 8), (2, 32768)):
        found = traps.check_traps(RANK, length=length, seed=seed)
        assert not any(one["failed"] for one in found["traps"]), found
    assert {row[0] for row in TRAPPED} == set(traps.TRAPS), "a trap without a fault that it catches"


def test_a_target_that_is_no_class():
    assert not traps.check_out_of_range(RANK)["failed"]

    def number(func, x, *args, **kwargs):
        return torch.tensor(0.25), torch.tensor(1.0)

    with Replaced("aten::nll_loss_forward", number):
        found = traps.check_out_of_range(RANK)
    assert found["failed"] and "0.25" in found["detail"]


def test_without_a_compiler_nothing_is_compared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    found = compiled.check_compiled(RANK)
    assert not found["failed"] and "C++ compiler" in found["unchecked"]


@pytest.mark.long
def test_eager_and_compiled_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    named = os.environ.get("CXX")
    if not any(map(shutil.which, [named] if named else ["c++", "g++", "clang++"])):
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with Replaced("aten::mm", after(lambda x: x * 1.01)):
        found = compiled.check_compiled(RANK)
    assert found["failed"] and "the gradient of gate" in found["detail"], found
    healthy = compiled.check_compiled(RANK)
    assert not healthy["failed"] and not healthy["unchecked"] and len(healthy["errors"]) == 6, healthy


def test_the_dtypes_of_a_run():
    assert software.run_dtypes(chosen_recipe(), get_chip("cpu")) == ["float32", "bfloat16"]
    assert software.run_dtypes(chosen_recipe('handoff.format="modelslim_fp16"'), get_chip("cpu"))[-1] == "float16"


@pytest.fixture
def answered(calls: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Evidence]]:
    """What the probe of operators says, use by use, of what each rank answers."""
    monkeypatch.setattr(software, "recipe_calls", lambda _recipe: calls)
    monkeypatch.setattr(software, "edge_calls", lambda _grouped: [])
    nothing: dict[str, Any] = {"errors": {}, "unchecked": [], "digests": {}, "noted": [], "findings": []}

    def run(*answers: dict[str, Any]) -> dict[str, Evidence]:
        recipe = chosen_recipe()
        crew = Crew(len(answers))
        values = [nothing | {"failed": True, "checked": 1, "closest": math.inf} | answer for answer in answers]
        replies = [Reply(rank, "done", value) for rank, value in enumerate(values)]
        monkeypatch.setattr(crew, "call", lambda *_, **__: Called(replies, 1.0))
        pool, folder = get_pool(recipe, "home"), tmp_path / "qualify" / "home"
        setting = Setting(recipe, pool, get_chip("cpu"), None, "cpu", tmp_path, folder)
        return {one.needed_for: one for one in software.check_operators(crew, setting)}

    return run


def test_one_bad_dtype_is_a_limit_and_fp32_is_none(answered):
    def limits(*dtypes: str) -> dict[str, list[str]]:
        finding = {"call": 0, "operator": "aten::mm", "pass": "forward", "kind": "inaccurate", "detail": ""}
        found = answered({"findings": [{**finding, "dtype": dtype} for dtype in dtypes]})
        return {one.setting: one.excluded for one in found["training"].limits}

    assert limits("bfloat16", "bfloat16") == {"train.precision": ["bf16"]}
    assert limits("float32") == limits("float32", "bfloat16") == {}


def test_equal_chips_must_agree(answered):
    def value(*bits: str, noted: bool = False) -> dict[str, Any]:
        digests = {f"{number} float32 forward": one for number, one in enumerate(bits)}
        noisy = {"call": 0, "dtype": "float32", "operator": "aten::mm", "kind": "non-deterministic"}
        return {"digests": digests, "noted": [noisy] if noted else []}

    def ranks(*values: dict[str, Any]) -> list[int]:
        return answered(*values)["training"].ranks

    assert ranks(value("a", "b"), value("a", "b"), value("a", "b")) == []
    assert ranks(value("a", "b"), value("a", "c"), value("a", "b")) == [1]
    assert ranks(value("a"), value("b")) == [0, 1], "of two, either may be wrong"
    assert ranks(value("a", noted=True), value("b", noted=True)) == []


def test_errors_of_trusted_chips_are_merged(tmp_path: Path):
    assert trusted_errors("a", tmp_path) is None
    for chip, size in (("a", 9.0), ("b", 1.0), ("c", 2.0)):
        errors = {"aten::mm float32 forward": {"max": size, "mean": 3.0 - size, "rmse": 1.0}}
        (tmp_path / f"{chip}.json").write_text(json.dumps({"chip": chip, "errors": errors}))
    assert trusted_errors("a", tmp_path) == {"aten::mm float32 forward": {"max": 2.0, "mean": 2.0, "rmse": 1.0}}


def test_a_vendors_environment_is_there_when_its_processes_start(monkeypatch: pytest.MonkeyPatch):
    (name,) = environment_of("npu")
    monkeypatch.delenv(name, raising=False)
    with places.variables_set(environment_of("npu")):
        assert os.environ[name] == "1"
    assert name not in os.environ and environment_of("cpu") == {}
    monkeypatch.setenv(name, "0")
    with places.variables_set(environment_of("npu")):
        assert os.environ[name] == "0", "what the user set stays"


@pytest.fixture
def examined(
    calls: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[Evidence], Path]]:
    """Run the probe of operators, on a few of them, over two ranks with planted faults."""
    few = some(calls, "aten::mm", "aten::bmm", "aten::silu", "aten::index_copy_", "aten::sigmoid_backward")
    monkeypatch.setattr(software, "recipe_calls", lambda _recipe: few)
    monkeypatch.setattr(software, "edge_calls", lambda _grouped: [])

    def run(*faults: str, stall_s: float = 120.0) -> tuple[list[Evidence], Path]:
        recipe = chosen_recipe("pools.home.ranks=2")
        pool, folder = get_pool(recipe, "home"), tmp_path / "qualify" / "home"
        with Crew(2, faults=[parse_fault(text) for text in faults]) as crew:
            setting = Setting(recipe, pool, get_chip("cpu"), None, "cpu", tmp_path, folder, stall_s=stall_s)
            return software.PROBES[0].run(crew, setting), tmp_path

    return run


def test_a_healthy_pool_passes_for_serving_and_for_training(examined):
    found, _ = examined()
    assert {(one.outcome, one.needed_for) for one in found} == {("pass", "serving"), ("pass", "training")}, found
    assert all(one.samples > 20 and one.figures["worst_error"].value > 0 and not one.ranks for one in found)


@pytest.mark.parametrize(
    ("fault", "operator", "kind"),
    [
        ("nan@rank=1", "", "not finite"),
        ("small-error@rank=1,operator=aten::mm,size=0.01", "aten::mm", "inaccurate"),
        ("dtype-swap@rank=1,operator=aten::bmm", "aten::bmm", "inaccurate"),
        ("flipped-bit@rank=1,operator=aten::silu,size=0", "aten::silu", "non-deterministic"),
        ("fallback@rank=1,operator=aten::mm", "aten::mm", "fallback"),
    ],
)
def test_a_planted_fault_is_found_on_its_rank_and_kept_as_one_call(examined, fault: str, operator: str, kind: str):
    found, root = examined(fault)
    training = next(one for one in found if one.needed_for == "training")
    assert training.outcome == "fail" and training.ranks == [1] and operator in training.detail, training
    assert training.failure is not None
    case = FailureCase.model_validate_json((root / training.failure / "failure.json").read_text())
    assert case.title.endswith(kind) and case.planted == [str(parse_fault(fault))]
    assert len(case.arguments["calls"]) == len(case.arguments["dtypes"]) == 1
    assert [reply["value"]["failed"] for reply in case.replies] == [False, True]


def test_an_operator_on_the_host_fails_training_and_is_told_of_serving(examined):
    """Serving gives right answers, later; a wrong one fails both. The static tier says the same of its tables."""
    for fault, outcomes in (("fallback", ("pass", "fail")), ("dtype-swap", ("fail", "fail"))):
        found = {one.needed_for: one for one in examined(f"{fault}@rank=1,operator=aten::mm")[0]}
        assert (found["serving"].outcome, found["training"].outcome) == outcomes, found
        told = "on the host's CPU, for which serving waits: aten::mm" in found["serving"].detail
        assert told == (fault == "fallback"), found["serving"].detail
        assert found["training"].ranks == [1]


def test_a_rank_that_dies_or_hangs_in_an_operator_is_a_finding(examined):
    for fault, stall_s in (("crash@rank=1,step=3", 120.0), ("hang@rank=1,step=3", 15.0)):
        (found,), root = examined(fault, stall_s=stall_s)
        assert found.outcome == "fail" and found.ranks == [1] and found.needed_for == "both", found
        assert (root / found.failure / "failure.json").is_file()
