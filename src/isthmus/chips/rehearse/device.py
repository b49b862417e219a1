"""The memory of a chip that is not here: which tensors are on it, and what is said of their device.

Everything is computed on the CPU. A storage is marked when it is made on the chip or copied to it, and everything that
is computed from it is marked too; what concerns the host alone is not judged by the chip's tables.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from isthmus.chips.rehearse.dispatch import Rehearsal, is_distributed
from isthmus.chips.rehearse.tables import Emulation, Profile, RehearsalRefused, Tally

HOST = torch.device("cpu")
_MARK = "_isthmus_on_chip"
_COLLECTIVES = ("c10d", "_c10d_functional")


class _Here(threading.local):
    """What a thread is at: in the chip's work, making a copy for the host, or doing the host's work."""

    inside = False
    leaving = False
    host = False


class ChipMemory:
    """Which storages are on the chip.

    `kinds` are the torch device types that name it; the first one is its own. This process sees `count` devices of it.
    `allocated` is the size of the marked storages that are alive, in bytes, `peak` the largest that it was.
    """

    def __init__(self, kind: str, count: int = 1):
        self.kinds, self.count = [kind], count
        self.index = 0
        self.is_default = False
        self.allocated = self.peak = 0
        self._here = _Here()

    @property
    def device(self) -> torch.device:
        """The chip that this process has set."""
        return torch.device(self.kinds[0], self.index)

    @property
    def works(self) -> bool:
        """Whether what this thread computes now is the chip's work."""
        return self._here.inside and not self._here.host

    @property
    def leaving(self) -> bool:
        """Whether what this thread computes now is a copy for the host."""
        return self._here.leaving

    def names(self, device: object) -> bool:
        """Whether a device, or the name of one, is the chip. A number counts devices of the accelerator.

        Raises RuntimeError for a device of the chip that is not there.
        """
        if isinstance(device, int) and not isinstance(device, bool):
            self.checked(device)
            return True
        if not isinstance(device, str | torch.device):
            return False
        kind, _, index = str(device).partition(":")
        if kind not in self.kinds:
            return False
        if index.isdecimal():
            self.checked(int(index))
        return True

    def checked(self, index: int) -> int:
        """The index of a device that is there. Raises RuntimeError for another, as the runtime of the chip does."""
        if not 0 <= index < self.count:
            raise RuntimeError(
                f"invalid device ordinal: {self.kinds[0]}:{index}. This process sees {self.count} rehearsed device(s), "
                "numbered from 0; with `--ranks N`, or LOCAL_WORLD_SIZE=N, it sees N."
            )
        return index

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the chip."""
        return hasattr(_place(tensor), _MARK)

    def take(self, tensor: Tensor) -> Tensor:
        """Put a tensor that was just made onto the chip."""
        self.mark(_place(tensor))
        return tensor

    def mark(self, place: object) -> None:
        """Put a storage, or what stands for one, onto the chip."""
        if not hasattr(place, _MARK):
            setattr(place, _MARK, True)
            if isinstance(place, torch.UntypedStorage):
                self._account(place)

    def _account(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self.allocated -= size

    def tag(self, storage: object) -> str | None:
        """The name that torch.save gives to the place of a storage; None if it is not on the chip."""
        return str(self.device) if hasattr(storage, _MARK) else None

    def restore(self, storage: Any, location: str) -> Any:
        """What torch.load puts onto the chip, if this is the name of the chip; else None.

        Raises RuntimeError for a device that is not there.
        """
        if not self.names(location):
            return None
        self.mark(storage)
        return storage

    @property
    def rests(self) -> bool:
        """Whether what this thread computes now is the host's work, whatever it starts from."""
        return self._here.host

    def going_home(self) -> contextlib.AbstractContextManager[None]:
        """What is computed here is a copy for the host."""
        return self._being(leaving=True)

    def at_host(self) -> contextlib.AbstractContextManager[None]:
        """Everything that is computed here is the host's work, whatever it starts from."""
        return self._being(host=True)

    def all_here(self) -> contextlib.AbstractContextManager[None]:
        """Everything that is computed here is the chip's work, whatever it starts from."""
        return self._being(inside=True)

    def as_tensors_say(self) -> contextlib.AbstractContextManager[None]:
        """What is computed here is the chip's work where its tensors are on the chip: the script's own code, called in
        the middle of work that is all the chip's."""
        return self._being(inside=False)

    @contextlib.contextmanager
    def _being(self, **at: bool) -> Iterator[None]:
        """This thread is at something else, and then at what it was at before."""
        before = {name: getattr(self._here, name) for name in at}
        vars(self._here).update(at)
        try:
            yield
        finally:
            vars(self._here).update(before)


def _place(tensor: Tensor) -> object:
    """What carries the mark: the storage that views share, or the tensor itself where it has none. The part of a tensor
    that is spread over ranks stands for it."""
    shards = getattr(tensor, "_local_shards", None)
    tensor = shards[0].tensor if shards else getattr(tensor, "_local_tensor", tensor)
    return tensor.untyped_storage() if tensor.layout is torch.strided and torch._C._has_storage(tensor) else tensor


class DeviceRehearsal(Rehearsal):
    """A rehearsal of what happens on the chip alone. `refusals` collects what was refused."""

    def __init__(
        self,
        profile: Profile,
        memory: ChipMemory,
        *,
        strict: bool,
        emulate: Emulation,
        tally: Tally | None = None,
        refusals: list[str] | None = None,
    ):
        super().__init__(profile, strict=strict, emulate=emulate, tally=tally)
        self.memory = memory
        self.refusals = refusals if refusals is not None else []

    def another(self) -> DeviceRehearsal:
        """The same rehearsal, for another thread."""
        assert self.emulate is not None
        return DeviceRehearsal(
            self.profile,
            self.memory,
            strict=self.strict,
            emulate=self.emulate,
            tally=self.tally,
            refusals=self.refusals,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._placed(func, types, args, dict(kwargs or {}))

    def _placed(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        memory = self.memory
        if is_distributed(types):
            return NotImplemented
        if func.namespace in _COLLECTIVES:
            self.tally.collectives[func.name()] += 1
            return func(*args, **kwargs)
        asked = memory.names(kwargs.get("device"))
        if asked:
            kwargs["device"] = HOST
        if memory.rests or not (asked or memory.works or any(map(memory.holds, _tensors((*args, *kwargs.values()))))):
            self.tally.host += 1
            return func(*args, **kwargs)
        try:
            with memory.all_here():
                result = super().__torch_dispatch__(func, types, args, kwargs)
        except RehearsalRefused as refused:
            if str(refused) not in self.refusals:
                self.refusals.append(str(refused))
            raise
        if not memory.leaving:
            self._keep(func, result)
        return result

    def _keep(self, func: Any, result: Any) -> None:
        """New results are on the chip. What an operator returns of its arguments stays where it is."""
        returned = func._schema.returns
        results = result if isinstance(result, tuple) and len(returned) > 1 else (result,)
        for declared, value in zip(returned, results, strict=False):
            if declared.alias_info is None:
                for tensor in _tensors((value,)):
                    self.memory.take(tensor)


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(tuple(value))


class DeviceNames(TorchFunctionMode):
    """Lets code speak of the chip as if it were there: it moves tensors there and back, and asks where they are."""

    def __init__(self, memory: ChipMemory):
        super().__init__()
        self.memory = memory
        made = dict.fromkeys((torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor), self._make)
        self._handlers: dict[Any, Callable[..., Any]] = {
            **made,
            torch.device: self._numbered,
            Tensor.to: self._to,
            Tensor.cpu: lambda _func, tensor, *args, **kwargs: self._move(tensor, HOST),
            Tensor.cuda: self._to_own_name,
            Tensor.numpy: self._host_only,
            Tensor.__array__: self._host_only,
            Tensor.__repr__: self._show,
            Tensor.pin_memory: lambda _func, tensor, *args, **kwargs: tensor,
            Tensor.get_device: self._get_device,
            Tensor.device.__get__: self._device,  # pyright: ignore[reportAttributeAccessIssue]
            Tensor.is_cuda.__get__: lambda _func, tensor, *_: self.holds(tensor) and "cuda" in self.memory.kinds,  # pyright: ignore[reportAttributeAccessIssue]
            Tensor.is_cpu.__get__: lambda func, tensor, *_: func(tensor) and not self.holds(tensor),  # pyright: ignore[reportAttributeAccessIssue]
        }

    def holds(self, tensor: Tensor) -> bool:
        return self.memory.holds(tensor)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.memory.is_default and kwargs.get("device") is None and func in _device_constructors():
            kwargs = {**kwargs, "device": self.memory.device}
        handler = self._handlers.get(func)
        device = kwargs.get("device")
        if handler is None and device is not None:
            if not self.memory.names(device):
                with self.memory.at_host():
                    return func(*args, **kwargs)
            if isinstance(device, int):
                kwargs = {**kwargs, "device": self.memory.device}
        with self.memory.as_tensors_say() if self.memory.works else contextlib.nullcontext():
            return handler(func, *args, **kwargs) if handler else func(*args, **kwargs)

    def _device(self, func: Any, tensor: Tensor, *_: Any) -> torch.device:
        return self.memory.device if self.holds(tensor) else func(tensor)

    def _numbered(self, func: Any, *args: Any, **kwargs: Any) -> torch.device:
        """`torch.device(0)` is of the accelerator."""
        if args and isinstance(args[0], int):
            args = (self.memory.kinds[0], *args)
        return func(*args, **kwargs)

    def _get_device(self, func: Any, tensor: Tensor) -> int:
        return self.memory.index if self.holds(tensor) else func(tensor)

    def _to_own_name(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`x.cuda()` works where the chip answers to that name, and fails elsewhere as it does there."""
        if "cuda" not in self.memory.kinds:
            return func(tensor, *args, **kwargs)
        device = args[0] if args else kwargs.get("device")
        return self._move(tensor, self.memory.device if device is None else device)

    def _make(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Tensors from data: made where the data is, then copied to where they are asked for."""
        device = kwargs.pop("device", None)
        if device is None and func is Tensor.new_tensor and self.holds(args[0]):
            device = self.memory.device
        if device is None:
            return func(*args, **kwargs)
        wants_gradient = kwargs.pop("requires_grad", False)
        to_chip = self.memory.names(device)
        made = func(*args, **kwargs) if to_chip else func(*args, **kwargs, device=device)
        if to_chip or self.holds(made):
            made = self._move(made, device)
        return made.detach().requires_grad_() if wants_gradient else made

    def _to(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (self.memory.device if self.holds(args[0]) else args[0].device, args[0].dtype, *args[1:])
        if isinstance(other := kwargs.pop("other", None), Tensor):
            kwargs = {**kwargs, "device": self.memory.device if self.holds(other) else other.device}
            kwargs["dtype"] = other.dtype
        positional = bool(args) and _is_device(args[0])
        target = args[0] if positional else kwargs.get("device")
        if target is None:
            return func(tensor, *args, **kwargs)
        args = args[1:] if positional else args
        kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        return self._move(tensor, target, *args, **kwargs)

    def _move(self, tensor: Tensor, target: Any, *args: Any, **kwargs: Any) -> Tensor:
        """`tensor.to(target, ...)`: there, back, or a conversion where it is."""
        on_chip, to_chip = self.holds(tensor), self.memory.names(target)
        if to_chip and not on_chip:
            return tensor.to(self.memory.device, *args, **kwargs)
        if to_chip:
            return tensor.to(HOST, *args, **kwargs)
        if not on_chip:
            return tensor.to(target, *args, **kwargs)
        with self.memory.going_home():
            moved = tensor.to(target, *args, **kwargs)
            return moved.clone() if self.holds(moved) else moved

    def _host_only(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.holds(tensor):
            if not kwargs.get("force"):
                raise TypeError(
                    f"can't convert {self.memory.device} device type tensor to numpy. Use Tensor.cpu() to copy the "
                    "tensor to host memory first."
                )
            tensor = self._move(tensor.detach(), HOST)
        return func(tensor, *args, **kwargs)

    def _show(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> str:
        if not self.holds(tensor):
            return func(tensor, *args, **kwargs)
        shown = func(self._move(tensor.detach(), HOST), *args, **kwargs).removesuffix(")")
        return f"{shown}, device='{self.memory.device}'{', requires_grad=True' if tensor.requires_grad else ''})"


def follow_backward(memory: ChipMemory) -> None:
    """Make all backward passes of this process the chip's that begin there: their formulas also make tensors out of
    nothing. The script's code that they call, such as hooks, sees devices as it does elsewhere."""
    run = torch.autograd.graph._engine_run_backward

    @functools.wraps(run)
    def run_here(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(map(memory.holds, _tensors(tuple(outputs)))):
            return run(outputs, *args, **kwargs)
        with memory.all_here(), DeviceNames(memory):
            return run(outputs, *args, **kwargs)

    for module in (torch.autograd, torch.autograd.graph):
        module._engine_run_backward = run_here  # pyright: ignore[reportAttributeAccessIssue]
    _follow_saved_tensors(memory)


def _follow_saved_tensors(memory: ChipMemory) -> None:
    """Hooks of tensors that are saved for backward are called in the middle of an operator: they see devices too."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    create = hooks.__init__

    def seeing(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def see(value: Any) -> Any:
            with DeviceNames(memory):
                return hook(value)

        return see

    @functools.wraps(create)
    def init(self: Any, pack_hook: Callable[[Any], Any], unpack_hook: Callable[[Any], Any]) -> None:
        create(self, seeing(pack_hook), seeing(unpack_hook))

    hooks.__init__ = init


def _is_device(value: object) -> bool:
    return isinstance(value, str | torch.device) or (isinstance(value, int) and not isinstance(value, bool))
