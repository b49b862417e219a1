"""`isthmus rehearse`: plain training scripts under the rules of chips that are not here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rehearse_scripts
from isthmus.chips.rehearse import Emulation, profile_of
from isthmus.chips.rehearse.device import ChipMemory, DeviceNames, DeviceRehearsal
from isthmus.errors import IsthmusError
from isthmus.progress import Watch
from isthmus.tools import rehearse

ASCEND = "ascend-910b-313t"
KIND = "ipu"
"""A type of device whose name torch knows, and for which it starts nothing."""


@dataclass
class Rehearsed:
    """How a rehearsal ended: its exit code, what was printed, and its report."""

    code: int
    text: str
    report: dict[str, Any]


def run(folder: Path, script: str, *options: str, chip: str = ASCEND, **environment: str) -> Rehearsed:
    (folder / "train.py").write_text(script)
    command = [sys.executable, "-m", "isthmus", "rehearse", "--chip", chip, "--json", str(folder / "report.json")]
    done = subprocess.run(
        [*command, *options, "--", "python", str(folder / "train.py"), "an argument"],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=240,
        env=os.environ | {"COLUMNS": "120", **environment},
        check=False,
    )
    report = folder / "report.json"
    found = json.loads(report.read_text()) if report.exists() else {}
    return Rehearsed(done.returncode, done.stdout + done.stderr, found)


PLAIN = """
import sys
import torch
from torch import nn

assert sys.argv[1:] == ["an argument"] and torch.npu.is_available() and torch.npu.device_count() == 1
torch.manual_seed(0)
torch.npu.set_device(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 4)).npu()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = torch.randn(16, 8)
for step in range(4):
    loss = model(data.to("npu:0")).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
torch.npu.synchronize()
torch.save(model.state_dict(), "model.pt")
print("loss", loss.item(), loss.device, loss.cpu().device, torch.npu.max_memory_allocated() > 1000)
try:
    loss.detach().numpy()
except TypeError as error:
    print("as on a chip:", error)
try:
    data.to("npu:1")
except RuntimeError as error:
    print("as on a chip:", error)
"""


def expected_of_plain() -> tuple[float, dict[str, torch.Tensor]]:
    """The same training on the CPU, in this process."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)]
    model = torch.nn.Sequential(*layers)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    data, loss = torch.randn(16, 8), torch.zeros(())
    for _ in range(4):
        loss = model(data).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss.item(), model.state_dict()


def test_a_plain_script_trains_as_on_the_cpu_and_is_counted(tmp_path: Path):
    done = run(tmp_path, PLAIN)
    loss, weights = expected_of_plain()
    assert done.code == 0, done.text
    assert f"loss {loss} npu:0 cpu True" in done.text and "can't convert npu:0" in done.text
    assert "invalid device ordinal: npu:1. This process sees 1" in done.text
    saved = torch.load(tmp_path / "model.pt", map_location="cpu", weights_only=True)
    assert all(torch.equal(saved[name], weights[name]) for name in weights)
    report = done.report
    assert (report["steps"], report["exit_codes"], report["refusals"]) == (4, [0], [])
    operators = report["operators"]
    assert operators["aten::addmm"] == {"status": "native", "calls": 8, "calls_per_step": 2.0}
    assert operators["aten::native_layer_norm_backward"]["calls"] == 4
    assert "aten::normal_" not in operators and "aten::randn" not in operators, "the data was made on the host"
    assert "does not speak for the vendor" in done.text and "4 optimiser steps" in done.text


ODD = """
import threading
import torch
import torch_npu
from torch.utils.data import DataLoader, TensorDataset
from torch_npu.contrib import transfer_to_npu

x = torch.linspace(0, 1, 6, device="cuda").reshape(2, 3)
print("float64 becomes", x.to(torch.float64).dtype, "on the host", x.cpu().double().dtype)
for _ in range(3):
    torch.nextafter(x, x)
    torch.nextafter(torch.ones(2), torch.ones(2))
thread = threading.Thread(target=lambda: print("in a thread", torch.nextafter(x, x).device))
thread.start()
thread.join()
print("memory", torch.empty(2, device="npu"))
again = torch.load("data.pt", map_location="npu")
with torch.autocast("npu", dtype=torch.bfloat16):
    print("autocast", (x @ x.T).dtype, torch.accelerator.current_accelerator())
print("collectives by", torch.distributed.get_default_backend_for_device(torch.accelerator.current_accelerator()))
generator = torch.Generator(device="npu")
print("drawn", torch.rand(2, generator=generator.manual_seed(3), device="npu").device)
loader = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=4, pin_memory=True)
print("batch", [(one.device, one.npu().device) for (one,) in loader])
torch.set_default_device("npu")
print("default", torch.ones(1).device, torch.tensor([1]).device)
print("loaded", again.device, x.npu() is x, torch.tensor([1], device=x.device).device)
raise SystemExit(7)
"""


def test_what_a_chip_does_silently_happens_and_is_reported(tmp_path: Path):
    torch.save(torch.ones(2), tmp_path / "data.pt")
    done = run(tmp_path, ODD)
    assert done.code == 7, done.text
    assert "float64 becomes torch.float32 on the host torch.float64" in done.text
    assert done.text.count("Device do not support double dtype now") == 1
    assert done.text.count("'aten::nextafter' is not currently supported on the NPU backend") == 1
    assert "in a thread npu:0" in done.text and "memory tensor([nan, nan], device='npu:0')" in done.text
    assert "loaded npu:0 True npu:0" in done.text and "autocast torch.bfloat16 npu" in done.text
    assert "collectives by hccl" in done.text
    assert "drawn npu:0" in done.text and "default npu:0 npu:0" in done.text
    assert "batch [(device(type='cpu'), device(type='npu', index=0))]" in done.text
    assert done.report["operators"]["aten::nextafter"]["calls"] == 4
    assert done.report["substitutions"] == {"aten::_to_copy float64 > float32": 1}
    assert "aten::nextafter: 4 calls" in done.text


REFUSED = """
import torch
x = torch.ones(3, device="npu")
torch.nextafter(torch.ones(2), torch.ones(2))
try:
    torch.nextafter(x, x)
except Exception as error:
    print("caught", type(error).__name__)
import torch_npu
torch_npu.npu_rms_norm(x, x)
"""


def test_what_the_chip_lacks_ends_the_script_with_a_reason(tmp_path: Path):
    done = run(tmp_path, REFUSED, TORCH_NPU_FALLBACK_CPU_DISABLE="1")
    assert done.code == 1 and done.report["exit_codes"] == [1]
    assert "caught RehearsalRefused" in done.text
    assert "isthmus: torch_npu.npu_rms_norm cannot be rehearsed" in done.text
    assert f'File "{tmp_path}/train.py", line 10' in done.text and "chips/rehearse/dispatch.py" not in done.text
    assert [text.split()[0] for text in done.report["refusals"]] == ["aten::nextafter", "torch_npu.npu_rms_norm"]


PARALLEL = """
import os
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group(device_id=torch.device("cuda", rank))
torch.manual_seed(rank)
model = DistributedDataParallel(torch.nn.Linear(4, 2).cuda(), device_ids=[rank], gradient_as_bucket_view=True)
optimizer = torch.optim.AdamW(model.parameters())
for step in range(3):
    loss = model(torch.full((3, 4), rank + 1.0, device="cuda")).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
weight = model.module.weight.detach()
assert model.module.weight.grad.device == weight.device, model.module.weight.grad.device
total = weight.clone()
dist.all_reduce(total)
os.write(1, f"rank {rank} {weight.device} {dist.get_backend()} {torch.equal(total, weight * 2)}\\n".encode())
try:
    dist.all_reduce(torch.ones(1, dtype=torch.int16, device="cuda"))
finally:
    dist.destroy_process_group()
"""


def test_ranks_train_together_under_the_rules_of_the_chips_library(tmp_path: Path):
    done = run(tmp_path, PARALLEL, "--ranks", "2", "--fault", "slow-rank@rank=1,step=1,size=2", chip="h800-sxm")
    assert "rank 0 cuda:0 nccl True" in done.text and "rank 1 cuda:1 nccl True" in done.text, done.text
    report = done.report
    assert (done.code, report["exit_codes"], report["processes"], report["steps"]) == (1, [1, 1], 2, 3)
    assert report["refusals"] == [text for text in report["refusals"] if "all_reduce of int16" in text] != []
    assert report["operators"]["aten::addmm"] == {"status": "native", "calls": 6, "calls_per_step": 1.0}
    assert report["collectives"] >= 2 * 4
    assert report["faults"] and all(text.startswith("rank 1: slow-rank at step 1") for text in report["faults"])


SHARDED = """
import os
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

rank = int(os.environ["LOCAL_RANK"])
torch.npu.set_device(rank)
dist.init_process_group("cpu:gloo,npu:hccl")
torch.manual_seed(0)
model = torch.nn.Linear(8, 8).npu()
fully_shard(model, mesh=init_device_mesh("npu", (2,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(4):
    loss = model(torch.ones(2, 8, device="npu")).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    os.write(1, f"rank {rank} step {step} {model.weight.device} {loss.item():.5f}\\n".encode())
"""


FLATTENED = """
import os
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl")
torch.manual_seed(0)
layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
model = FullyShardedDataParallel(layers, auto_wrap_policy=ModuleWrapPolicy([torch.nn.Linear]), device_id=rank)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(3):
    loss = model(torch.ones(2, 8, device=rank)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    model.clip_grad_norm_(0.5)
    optimizer.step()
with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
    places = {str(part.device) for part in model.state_dict().values()}
config = FullStateDictConfig(offload_to_cpu=True, rank0_only=True)
with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, config):
    state = model.state_dict()
os.write(1, f"rank {rank} {places} {sorted(state)} {loss.device}\\n".encode())
if rank == 0:
    torch.save(state, "state.pt")
"""


def test_training_with_flattened_shards_ends_as_plain_training_does(tmp_path: Path):
    """FullyShardedDataParallel, the older of torch's two."""
    done = run(tmp_path, FLATTENED, "--ranks", "2", chip="h800-sxm")
    assert done.code == 0, done.text
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        model(torch.ones(2, 8)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
    names = sorted(model.state_dict())
    assert f"rank 0 {{'cuda:0'}} {names} cuda:0\n" in done.text, done.text
    assert "rank 1 {'cuda:1'} [] cuda:1\n" in done.text, done.text
    torch.testing.assert_close(torch.load(tmp_path / "state.pt"), dict(model.state_dict()))
    assert done.report["steps"] == 3 and done.report["operators"]["aten::addmm"]["calls"] == 12


def test_sharded_training_runs_until_the_rank_with_a_planted_crash_is_gone(tmp_path: Path):
    done = run(tmp_path, SHARDED, "--ranks", "2", "--fault", "crash@rank=1,step=3,size=9")
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        loss = model(torch.ones(2, 8)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step < 2:
            assert f"rank 1 step {step} npu:1 {loss.item():.5f}" in done.text, done.text
    assert "rank 0 step 3" not in done.text and "rank 1 step 2" not in done.text
    assert done.report["exit_codes"][1] == 9 and done.code in done.report["exit_codes"] and done.code != 0
    assert done.report["unfinished"] >= 1 and done.report["planted"] == ["crash@rank=1,step=3,size=9"]
    assert {"aten::_foreach_lerp_.Scalar", "aten::addmm"} <= set(done.report["operators"])


HOOKS = """
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

seen = []

def see(name):
    return lambda gradient: seen.append((name, str(gradient.device)))

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        made = torch.ones(2), torch.zeros_like(gradient), torch.ones(2, device=gradient.device)
        seen.append(("backward", *(str(one.device) for one in (gradient, x, *made))))
        return gradient * 2

def work(x, device):
    layer = nn.Linear(3, 3).to(device)
    layer.register_full_backward_hook(lambda module, given, got: see("module")(given[0]))
    layer.weight.register_post_accumulate_grad_hook(lambda weight: see("accumulated")(weight.grad))
    def model(x):
        out = Doubled.apply(layer(x))
        if out.requires_grad:
            out.register_hook(see("tensor"))
        return out
    model(x).sum().backward()
    torch.autograd.backward(model(x).sum())
    torch.autograd.grad(model(x).sum(), [x])
    for reentrant in (False, True):
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()

for device in ("npu", "cpu"):
    work(torch.ones(2, 3, device=device, requires_grad=True), device)
    print(device, sorted(set(seen)))
    seen.clear()
with torch.autograd.graph.save_on_cpu():
    x = torch.ones(2, 3, device="npu", requires_grad=True)
    kept = (x * x).sum()
kept.backward()
print("gradient", x.grad.device)
"""


COPIES = """
import copy
import io
import pickle
import torch
from torch import nn

def again(what, **options):
    buffer = io.BytesIO()
    torch.save(what, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)

def places(what):
    content = what.state_dict() if isinstance(what, nn.Module) else what
    return sorted({str(one.device) for one in content.values()})

model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).npu()
model(torch.ones(2, 3, device="npu")).sum().backward()
optimizer = torch.optim.AdamW(model.parameters())
optimizer.step()
state = model.state_dict()
ways = {
    "deepcopy": copy.deepcopy(model),
    "averaged": torch.optim.swa_utils.AveragedModel(model).module,
    "copy": copy.copy(model),
    "pickle": pickle.loads(pickle.dumps(model)),
    "saved": again(state),
    "to the chip": again(state, map_location="npu:0"),
    "by a function": again({"a": torch.ones(1)}, map_location=lambda storage, place: storage.npu()),
    "to the host": again(state, map_location="cpu"),
    "by a map": again(state, map_location={"npu:0": "cpu"}),
    "of the host": again({"a": copy.deepcopy(torch.ones(1))}),
    "optimiser": {k: v for k, v in copy.deepcopy(optimizer.state_dict()["state"][0]).items() if v.dim()},
}
for name, found in ways.items():
    print(name, "is on", *places(found))
half = copy.deepcopy([state["0.weight"][:2], state["0.weight"][2:]])
print("shared", half[0].untyped_storage().data_ptr() == half[1].untyped_storage().data_ptr(), half[1].device)
assert all(torch.equal(ways["deepcopy"].state_dict()[name].cpu(), value.cpu()) for name, value in state.items())
assert all(torch.equal(ways["to the host"][name], value.cpu()) for name, value in state.items())
torch.save(state, "state.pt")
"""


DEVICES = """
import torch
import torch_npu
from torch_npu.contrib import transfer_to_npu

torch.save({"a": torch.ones(1)}, "data.pt")
x, layer = torch.ones(2, device="npu"), torch.nn.Linear(2, 2)

def all_of(index):
    name = f"npu:{index}"
    return {
        "to": lambda: x.to(name),
        "to a number": lambda: x.to(index),
        "from the host": lambda: torch.ones(1).npu(index),
        "under another name": lambda: torch.ones(1).cuda(index),
        "made": lambda: torch.ones(1, device=name),
        "made as": lambda: torch.zeros_like(x, device=torch.device(name)),
        "from data": lambda: torch.tensor([1], device=name),
        "a module": lambda: layer.npu(index),
        "a module to": lambda: layer.to(name),
        "set": lambda: torch.npu.set_device(index),
        "set by name": lambda: torch.npu.set_device(name),
        "within": lambda: torch.npu.device(index).__enter__(),
        "told": lambda: torch.npu.get_device_name(index),
        "loaded": lambda: torch.load("data.pt", map_location=name),
        "drawn": lambda: torch.Generator(device=name),
    }

for index in range(3):
    failed = []
    for name, call in all_of(index).items():
        try:
            call()
        except RuntimeError as error:
            assert f"invalid device ordinal: npu:{index}" in str(error), error
            failed.append(name)
    print("device", index, "all" if len(failed) == len(all_of(index)) else failed, flush=True)
"""


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rehearsed]:
    """Three scripts in one process, for torch takes long to load, and the folder that they wrote into."""
    folder = tmp_path_factory.mktemp("placed")
    done = run(folder, HOOKS + COPIES + DEVICES, LOCAL_WORLD_SIZE="2")
    assert done.code == 0, done.text
    return folder, done


def test_hooks_and_custom_functions_of_a_backward_pass_see_where_gradients_are(placed: tuple[Path, Rehearsed]):
    _, done = placed
    for device, name in (("npu", "npu:0"), ("cpu", "cpu")):
        expected = sorted(
            [("backward", name, name, "cpu", name, name)]
            + [(what, name) for what in ("accumulated", "module", "tensor")]
        )
        assert f"{device} {expected}" in done.text, done.text
    assert "gradient npu:0" in done.text


def test_copies_are_where_their_originals_are_and_loading_puts_them_where_it_is_told(placed: tuple[Path, Rehearsed]):
    folder, done = placed
    for way in ("deepcopy", "averaged", "copy", "pickle", "saved", "to the chip", "by a function", "optimiser"):
        assert f"{way} is on npu:0\n" in done.text, done.text
    for way in ("to the host", "by a map", "of the host"):
        assert f"{way} is on cpu\n" in done.text, done.text
    assert "shared True npu:0" in done.text
    with pytest.raises(RuntimeError, match="npu:0"):
        torch.load(folder / "state.pt", weights_only=True)


@contextlib.contextmanager
def rehearsed() -> Iterator[DeviceRehearsal]:
    """This thread's tensors may be on a chip, without a process of their own."""
    memory = ChipMemory(KIND)
    with (
        DeviceNames(memory),
        DeviceRehearsal(profile_of("h800-sxm"), memory, strict=False, emulate=Emulation()) as found,
    ):
        yield found


HOSTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros_like": lambda x: torch.zeros_like(x, dtype=torch.float64, device="cpu"),
    "empty_like": lambda x: torch.empty_like(x, device=torch.device("cpu")).copy_(x),
    "full_like": lambda x: torch.full_like(x, 3.0, device="cpu"),
    "new_zeros": lambda x: x.new_zeros(4, device="cpu"),
    "new_empty": lambda x: x.new_empty((2, 3), device="cpu").copy_(x),
    "new_full": lambda x: x.new_full((2, 2), 5.0, device="cpu"),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0], device="cpu"),
    "to": lambda x: x.to("cpu", torch.float64),
    "cpu": lambda x: x.cpu(),
    "tensor": lambda x: torch.tensor(x[0, 0], device="cpu"),
    "as_tensor": lambda x: torch.as_tensor(x, device="cpu"),
    "asarray": lambda x: torch.asarray(x, dtype=torch.float64, device="cpu"),
}


@pytest.mark.parametrize("way", HOSTS)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_a_result_that_is_asked_for_on_the_host_is_the_hosts(way: str):
    data = torch.arange(6.0).reshape(2, 3)
    expected = HOSTS[way](data)
    with rehearsed() as found:
        x = data.to(KIND)
        result = HOSTS[way](x)
        judged = found.tally.by_operator.copy()
        later = result + result
        assert (x.device.type, result.device.type, later.device.type) == (KIND, "cpu", "cpu")
        assert found.tally.by_operator == judged
    assert result.dtype == expected.dtype and torch.equal(result, expected)


def test_a_result_that_is_asked_for_nowhere_is_where_the_data_is():
    with rehearsed():
        x = torch.ones(2, device=KIND)
        made = (torch.zeros_like(x), x.new_zeros(2), x.new_tensor([1.0]), torch.as_tensor(x))
        assert [one.device.type for one in made] == [KIND] * 4
        assert torch.ones(2).new_tensor([1.0]).device.type == "cpu"


def test_a_device_that_the_process_does_not_see_is_refused_as_by_the_runtime(placed: tuple[Path, Rehearsed]):
    _, done = placed
    assert all(f"device {line}\n" in done.text for line in ("0 []", "1 []", "2 all")), done.text


HANGING = """
import os
import torch
import torch.distributed as dist

dist.init_process_group("hccl")
layer = torch.nn.Linear(4, 4).npu()
model = torch.nn.parallel.DistributedDataParallel(layer)
optimizer = torch.optim.AdamW(model.parameters())
for step in range(9):
    model(torch.ones(2, 4, device="npu")).sum().backward()
    optimizer.step()
"""


def test_a_rehearsal_that_hangs_is_stopped_by_ctrl_c_and_says_how_far_it_came(tmp_path: Path):
    """One rank hangs by a fault and the other in a collective, where Ctrl-C does not reach it: a second one does."""
    (tmp_path / "train.py").write_text(HANGING)
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "isthmus", "rehearse", "--chip", ASCEND, "--json", str(report), "--ranks", "2"]
    command += ["--fault", "hang@rank=1,step=2", "--", "python", str(tmp_path / "train.py")]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
    with subprocess.Popen(command, preexec_fn=_hears_ctrl_c, **options) as process:
        assert process.stdout is not None
        lines = []
        while "planted: hang" not in "".join(lines[-1:]):
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        while "KeyboardInterrupt" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        text = "".join(lines) + process.communicate(timeout=60)[0]
    assert process.returncode == 130, text
    found = json.loads(report.read_text())
    assert found["interrupted"] and found["faults"] == ["rank 1: hang at step 2: planted"] and found["steps"] == 2
    assert found["exit_codes"][0] == -signal.SIGKILL and found["exit_codes"][1] < 0 and found["processes"] == 2
    assert found["operators"]["aten::addmm"]["calls"] >= 2 and "stopped before its end" in text


def _hears_ctrl_c() -> None:
    """Also where the tests themselves were started to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


STRUCK = """
import torch

def products(x):
    x = x.detach().requires_grad_()
    forward = x @ x
    forward.sum().backward()
    return torch.stack([forward.detach(), x.grad])

data = torch.arange(9.0).reshape(3, 3)
whole = torch.tensor([[15.0, 18, 21, 42, 54, 66, 69, 90, 111], [12, 21, 30, 15, 24, 33, 18, 27, 36]]).view(2, 3, 3)
for turn in range(2):
    print("host", torch.equal(products(data), whole), torch.bmm(data[None], data[None]).sum().item())
    chip = products(data.npu())
    print("chip", bool(chip.isnan().any()), torch.equal(products(torch.zeros_like(chip[0], device="cpu")), whole * 0))
try:
    torch.bmm(data[None].npu(), data[None].npu())
except torch.OutOfMemoryError:
    print("no memory left")
"""


def test_faults_of_operators_strike_what_the_chip_computes_and_not_what_the_host_does(tmp_path: Path):
    """A product of matrices is one `mm`, and its backward pass two."""
    kinds = ("nan", "flipped-bit", "small-error", "dtype-swap", "fallback")
    faults = [f"--fault={kind}@rank=0,operator=aten::mm" for kind in kinds]
    done = run(tmp_path, STRUCK, *faults, "--fault=out-of-memory@rank=0,operator=aten::bmm")
    assert done.code == 0, done.text
    assert done.text.count("host True 486.0\n") == done.text.count("chip True True\n") == 2, done.text
    assert done.text.count("no memory left") == 1
    struck = Counter(text.split()[2] for text in done.report["faults"])
    assert struck == dict.fromkeys(kinds, 6) | {"out-of-memory": 1}


def test_a_script_that_does_not_use_torch_is_left_alone(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text("print('the one that was there')")
    paths = os.pathsep.join([str(tmp_path), *sys.path[1:]])
    done = run(tmp_path, "import sys; print('torch' in sys.modules, 'isthmus' in sys.modules)", PYTHONPATH=paths)
    assert done.code == 0 and "False False" in done.text and "the one that was there" in done.text
    assert "no process of the command loaded torch" in done.text


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ([], {}, "after --"),
        (["no-such-program"], {}, "no-such-program"),
        (["python", "x.py"], {"chip": "mlu590"}, "no tables of what the software of mlu590 supports"),
        (["--strickt", "python", "x.py"], {}, "--strickt is no option of rehearse"),
        (["python", "x.py"], {"faults": ("crash@rank=2",), "ranks": 2}, "not there, of 2"),
        (["python", "x.py"], {"faults": ("explode@rank=0",)}, "unknown kind"),
    ],
)
def test_wrong_usage_is_explained(command: list[str], options: dict[str, Any], says: str):
    with pytest.raises(IsthmusError, match=says):
        rehearse.execute(command, Watch(quiet=True), **{"chip": ASCEND, **options})


def test_the_list_of_scripts_that_were_tried_names_each_of_them():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "qualification.md").read_text(encoding="utf-8")
    kept = {path.stem for path in (root / "benchmarks" / "scripts").glob("*.py")}
    assert kept == {script.name for script in rehearse_scripts.ALL}
    tried = {name for name in kept if f"| `{name}`" in page}
    assert kept - tried == {"lightning_fit"} and "Lightning" in page
