"""What code finds under torch of a chip that is not here: its device module, its extension, its backend.

They answer as the chip's software would where that is known, do nothing where the CPU has nothing to do (streams), and
lack everything else, so that code which asks whether a function is there is told the truth.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch.distributed import device_mesh
from torch.utils import backend_registration

from isthmus.chips import Chip
from isthmus.chips.rehearse.device import HOST, ChipMemory
from isthmus.chips.rehearse.tables import MEANING, Profile, RehearsalRefused, Status
from isthmus.errors import IsthmusError

LIBRARY = (2, 11, 1)
"""The version of NCCL that code is told: the newest that the tables of collectives speak of."""

BEFORE_THE_CPU = 5
"""torch asks who keeps a storage in the order of such numbers; the CPU's own is 10."""


class Stream:
    """A queue of work. On the CPU all work is done when it is issued."""

    def __init__(self, *_args: Any, **_options: Any):
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    synchronize = wait_stream = wait_event = record_event = wait

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False


class Event:
    """A moment in a queue of work."""

    def __init__(self, *_args: Any, **_options: Any):
        self._at: float | None = None

    def record(self, *_: Any) -> None:
        self._at = time.perf_counter()

    def wait(self, *_: Any) -> None:
        pass

    synchronize = wait

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds of this host."""
        if self._at is None or later._at is None:
            raise RuntimeError("both events must be recorded before their time can be taken")
        return (later._at - self._at) * 1e3


def install(chip: Chip, profile: Profile, memory: ChipMemory, extension: str | None) -> None:
    """Make the chip's device known to torch in this process."""
    kind = memory.kinds[0]
    if not hasattr(torch, kind):
        backend_registration.rename_privateuse1_backend(kind)
        module = types.ModuleType(f"torch.{kind}")
        setattr(torch, kind, module)
        sys.modules[f"torch.{kind}"] = module
        _add_methods(kind, memory)
    _add_functions(getattr(torch, kind), chip, memory)
    _add_to_accelerator(chip, memory)
    _map_constructors(memory)
    _map_process_groups(chip, memory)
    _keep_copies(memory)
    if extension is not None:
        _add_extension(extension, kind, chip, profile, memory)


_PARTS = {
    "random": ("get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all", "manual_seed"),
    "memory": ("memory_allocated", "max_memory_allocated", "memory_reserved", "mem_get_info", "empty_cache"),
    "streams": ("Stream", "Event"),
}


def _add_parts(module: types.ModuleType, functions: dict[str, Any]) -> None:
    """Modules below that of the device, and what is there already of them."""
    kind = module.__name__.rpartition(".")[2]
    parts = {name: {key: functions[key] for key in keys} for name, keys in _PARTS.items()}
    if not hasattr(module, "amp"):
        parts["amp"] = {name: functools.partial(getattr(torch.amp, name), kind) for name in ("autocast", "GradScaler")}
    for name, content in parts.items():
        part = getattr(module, name, None) or types.ModuleType(f"{module.__name__}.{name}")
        part.__dict__.update(content)
        setattr(module, name, part)
        sys.modules[part.__name__] = part


def _add_methods(kind: str, memory: ChipMemory) -> None:
    """`tensor.npu()` and the like."""

    def to_chip(self: Any, device: Any = None, non_blocking: bool = False) -> Any:
        return self.to(memory.device if device is None else device, non_blocking=non_blocking)

    def module_to_chip(self: Any, device: Any = None) -> Any:
        return self.to(memory.device if device is None else device)

    setattr(Tensor, kind, to_chip)
    setattr(Tensor, f"is_{kind}", property(lambda self: self.device.type == kind))
    setattr(torch.nn.Module, kind, module_to_chip)


def _functions(chip: Chip, memory: ChipMemory) -> dict[str, Any]:
    """The functions of a device module."""

    def nothing(*_args: Any, **_options: Any) -> None:
        pass

    def set_device(device: Any) -> None:
        memory.index = memory.checked(device if isinstance(device, int) else torch.device(device).index or 0)

    def total() -> int:
        if chip.mem_gb is None or chip.mem_gb.value is None:
            raise IsthmusError(f"the memory of {chip.name} is unknown, so the rehearsal cannot tell it")
        return int(chip.mem_gb.value * 1e9)

    def name(device: Any = None) -> str:
        memory.names(device)
        return chip.name

    def properties(device: Any = None) -> Any:
        memory.names(device)
        return types.SimpleNamespace(name=chip.name, total_memory=total())

    def reset_peak(_device: Any = None) -> None:
        memory.peak = memory.allocated

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(value)

    @contextlib.contextmanager
    def device(index: Any) -> Iterator[None]:
        before = memory.index
        set_device(index)
        try:
            yield
        finally:
            memory.index = before

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: "bf16" in (chip.dtypes or ()),
        "is_current_stream_capturing": lambda: False,
        "init": nothing,
        "_lazy_init": nothing,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: memory.count,
        "current_device": lambda: memory.index,
        "set_device": set_device,
        "device": device,
        "synchronize": nothing,
        "empty_cache": nothing,
        "ipc_collect": nothing,
        "memory_allocated": lambda *_: memory.allocated,
        "max_memory_allocated": lambda *_: memory.peak,
        "memory_reserved": lambda *_: memory.allocated,
        "max_memory_reserved": lambda *_: memory.peak,
        "reset_peak_memory_stats": reset_peak,
        "reset_max_memory_allocated": reset_peak,
        "mem_get_info": lambda *_: (total() - memory.allocated, total()),
        "get_device_name": name,
        "get_device_properties": properties,
        "manual_seed": seed,
        "manual_seed_all": seed,
        "initial_seed": torch.initial_seed,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "set_stream": nothing,
        "current_stream": Stream,
        "default_stream": Stream,
    }


def _add_functions(module: Any, chip: Chip, memory: ChipMemory) -> None:
    functions = _functions(chip, memory)
    for name, function in functions.items():
        setattr(module, name, function)
    _add_parts(module, functions)
    if hasattr(module, "nccl"):
        module.nccl.version = lambda: LIBRARY
    if chip.generation and chip.generation.startswith("sm"):
        major, minor = int(chip.generation[2:-1]), int(chip.generation[-1])
        module.get_device_capability = lambda *_: (major, minor)


def _add_to_accelerator(chip: Chip, memory: ChipMemory) -> None:
    functions = _functions(chip, memory)
    shared = ("is_available", "device_count", "synchronize", "empty_cache", "memory_allocated", "max_memory_allocated")
    more = {
        "current_accelerator": lambda *_args, **_options: torch.device(memory.kinds[0]),
        "current_device_index": functions["current_device"],
        "current_device_idx": functions["current_device"],
        "set_device_index": functions["set_device"],
        "set_device_idx": functions["set_device"],
        "current_stream": functions["current_stream"],
        "set_stream": functions["set_stream"],
        "reset_peak_memory_stats": functions["reset_peak_memory_stats"],
    }
    for name, function in ({name: functions[name] for name in shared} | more).items():
        setattr(torch.accelerator, name, function)
    torch._C._get_accelerator = lambda *_args: torch.device(memory.kinds[0])


def _map_constructors(memory: ChipMemory) -> None:
    """Constructors and functions that take the chip's name and know nothing of it."""

    class Generator(torch._C.Generator):
        def __new__(cls, device: Any = HOST) -> Any:
            return super().__new__(cls, HOST if memory.names(device) else device)  # pyright: ignore[reportCallIssue]

    torch.Generator = Generator  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.record_stream = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    for owner, parameter in ((torch.amp.autocast_mode.autocast, "device_type"), (torch.amp.GradScaler, "device")):
        owner.__init__ = _on_host(owner.__init__, memory, parameter)
    set_default = torch.set_default_device

    @functools.wraps(set_default)
    def set_default_device(device: Any) -> None:
        memory.is_default = memory.names(device)
        set_default(None if memory.is_default else device)

    torch.set_default_device = set_default_device


def _map_process_groups(chip: Chip, memory: ChipMemory) -> None:
    """What starts groups of processes, and works with them, takes the chip's name too."""
    start, kind = dist.init_process_group, memory.kinds[0]
    own = [name for name in chip.capabilities.collectives or () if name != "gloo"]
    if own:
        dist.Backend.default_device_backend_map.setdefault(kind, own[0])

    @functools.wraps(start)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        memory.names(kwargs.pop("device_id", None))
        return start(_backend(backend, memory), *args, **kwargs)

    class Reducer(c10d.Reducer):
        """The buckets that DDP gathers gradients in are where its parameters are."""

        def __init__(self, params: list[Tensor], *args: Any, **kwargs: Any):
            self._on_chip = any(map(memory.holds, params))
            with self._there():
                super().__init__(params, *args, **kwargs)

        def _rebuild_buckets(self) -> bool:
            with self._there():
                return super()._rebuild_buckets()

        def _there(self) -> contextlib.AbstractContextManager[None]:
            return memory.all_here() if self._on_chip else contextlib.nullcontext()

    dist.Reducer = Reducer  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
    dist.init_process_group = init_process_group
    dist.distributed_c10d.init_process_group = init_process_group
    device_mesh.init_process_group = init_process_group  # pyright: ignore[reportPrivateImportUsage]


def _keep_copies(memory: ChipMemory) -> None:
    """Copies of storages stay on the chip: those of copy.deepcopy and pickle, and what torch.save writes and torch.load
    reads, unless it is asked to put it elsewhere."""
    clone = torch.UntypedStorage.clone

    @functools.wraps(clone)
    def clone_there(self: torch.UntypedStorage) -> Any:
        copy = clone(self)
        if memory.tag(self) is not None:
            memory.mark(copy)
        return copy

    def to_chip(self: torch.UntypedStorage, device: Any = None, non_blocking: bool = False) -> Any:
        memory.names(memory.device if device is None else device)
        copy = clone(self)
        memory.mark(copy)
        return copy

    torch.UntypedStorage.clone = clone_there
    setattr(torch.UntypedStorage, memory.kinds[0], to_chip)
    torch.serialization.register_package(BEFORE_THE_CPU, memory.tag, memory.restore)


def _on_host(function: Callable[..., None], memory: ChipMemory, parameter: str) -> Callable[..., None]:
    """A constructor whose first argument, a device type, is the CPU where it names the chip."""

    @functools.wraps(function)
    def with_host(self: Any, *args: Any, **kwargs: Any) -> None:
        if args and memory.names(args[0]):
            args = (HOST.type, *args[1:])
        if memory.names(kwargs.get(parameter)) or (parameter == "device" and not args and parameter not in kwargs):
            kwargs[parameter] = HOST.type
        function(self, *args, **kwargs)

    return with_host


def _backend(asked: str | None, memory: ChipMemory) -> str | None:
    """The backend that serves the chip, of `cpu:gloo,npu:hccl` or the like; its own where none is named."""
    if asked is None:
        return dist.Backend.default_device_backend_map.get(memory.kinds[0])
    if ":" not in asked:
        return asked
    pairs = dict(pair.split(":", 1) for pair in asked.split(","))
    return next((name for kind, name in pairs.items() if kind in memory.kinds), asked)


def _add_extension(name: str, kind: str, chip: Chip, profile: Profile, memory: ChipMemory) -> None:
    """The vendor's package that code imports beside torch. Its own operators have no reference here."""

    own: dict[str, Status] = {}
    for operator, row in profile.operators.items():
        own[operator.partition(".")[0]] = row.status

    def attribute(operator: str) -> Callable[..., NoReturn]:
        if f"{kind}::{operator}" not in own:
            raise AttributeError(f"{name}.{operator} is not part of the rehearsal")
        return functools.partial(refuse, operator)

    def refuse(operator: str, *_args: Any, **_options: Any) -> NoReturn:
        raise RehearsalRefused(
            f"{name}.{operator} cannot be rehearsed: it is the vendor's own operator "
            f"({MEANING[own[f'{kind}::{operator}']]}), and there is no reference of it on the CPU. "
            f"Write it with torch's operators, or test it on {chip.name}."
        )

    package = _package(name, __getattr__=attribute, __version__=profile.version.split()[-1])
    setattr(package, kind, getattr(torch, kind))
    sys.modules[f"{name}.{kind}"] = getattr(torch, kind)
    _package(f"{name}.contrib")

    def transfer() -> None:
        memory.kinds.append("cuda")
        _add_functions(torch.cuda, chip, memory)

    sys.meta_path.insert(0, _Transfer(f"{name}.contrib.transfer_to_{kind}", transfer))


class _Transfer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The module whose import makes code that was written for another vendor's devices run on these."""

    def __init__(self, name: str, transfer: Callable[[], None]):
        self._name, self._transfer = name, transfer

    def find_spec(self, fullname: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname == self._name else None

    def exec_module(self, module: types.ModuleType) -> None:
        self._transfer()


def _package(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    for key, value in content.items():
        setattr(module, key, value)
    sys.modules[name] = module
    return module
