"""What ranks are asked to do in tests of planted faults and of the rehearsed process group."""

from __future__ import annotations

import dataclasses
import os
import time
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from isthmus.chips.rehearse import RehearsalRefused, group, profile_of
from isthmus.chips.rehearse.dispatch import short_name
from isthmus.chips.rehearse.inject import CollectiveCount

SIZE = 12
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def functional_sum(value: Tensor, process_group: Any, operation: str = "sum") -> Tensor:
    """What torch's functional collectives call, under the names that it has in every version."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(value, operation, process_group.group_name))


def steps(rank: Any, count: int) -> list[str]:
    """Steps with a product of matrices, a sum over ranks, and a barrier. Returns what went wrong by plan."""
    for step in range(count):
        rank.beat("steps", step)
        product = torch.ones(4, 4) @ torch.ones(4, 4)
        dist.all_reduce(product)
        dist.barrier()
    return rank.injector.fired


def sums(rank: Any, count: int) -> list[list[float]]:
    """What an all-reduce of [1, 2, 3, 4] gives this rank at each step."""
    results = []
    for step in range(count):
        rank.beat("sums", step)
        value = torch.tensor([1.0, 2.0, 3.0, 4.0])
        dist.all_reduce(value)
        results.append(value.tolist())
    return results


def messages(rank: Any, left: int, right: int, megabytes: float, repeats: int) -> float:
    """Seconds of one way of a message between two ranks: the least of some."""
    value = torch.ones(max(1, int(megabytes * 2**18)))
    if rank.rank not in (left, right):
        return 0.0
    other = right if rank.rank == left else left
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        if rank.rank == left:
            dist.send(value, other)
            dist.recv(value, other)
        else:
            dist.recv(value, other)
            dist.send(value, other)
        taken.append(time.perf_counter() - began)
    return min(taken) / 2


def timed(rank: Any, what: str, ranks: list[int] | None = None, elements: int = 1) -> float:
    """Seconds of one collective, after a barrier."""
    group = dist.new_group(ranks)
    dist.barrier()
    began = time.perf_counter()
    if ranks is None or rank.rank in ranks:
        size = dist.get_world_size(group)
        value, parts = torch.ones(elements * size), torch.ones(elements * size * size)
        {
            "all_reduce": lambda: dist.all_reduce(value, group=group),
            "all_gather": lambda: dist.all_gather_into_tensor(parts, value, group=group),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(value, parts, group=group),
            "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(value), value, group=group),
            "broadcast": lambda: dist.broadcast(value, dist.get_global_rank(group, 0), group=group),
            "barrier": lambda: dist.barrier(group=group),
            "functional": lambda: functional_sum(value, group),
            "asynchronous": lambda: dist.all_reduce(value, group=group, async_op=True).wait(),
            "object": lambda: dist.all_gather_object([None] * size, rank.rank, group=group),
        }[what]()
    return time.perf_counter() - began


def plain_group() -> Any:
    """A group of all ranks that is gloo's own."""
    routed = distributed_c10d.BackendConfig
    distributed_c10d.BackendConfig = routed.__base__  # torch's own, before a rehearsed backend took its place
    try:
        plain = dist.new_group(backend="gloo")
    finally:
        distributed_c10d.BackendConfig = routed
    assert type(plain) is dist.ProcessGroup
    return plain


def inputs(rank: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """Values that another rank does not have, and that do not overflow in a sum of some."""
    generator = torch.Generator().manual_seed(100 + rank)
    values = torch.randint(0, 7, shape, generator=generator)
    return (values / 8 + 0.25 if dtype.is_floating_point else values).to(dtype)


def collectives(rank: Any, dtype: torch.dtype, process_group: Any) -> dict[str, Any]:
    """The results on this rank of every collective, or the error that it raised."""
    world, me, found = rank.world, rank.rank, {}
    value = inputs(me, dtype, SIZE)
    whole = inputs(me, dtype, SIZE * world)
    here = {"group": process_group}
    one, many = partial(torch.empty_like, value), lambda: [torch.empty_like(value) for _ in range(world)]

    def note(name: str, results: list[Tensor], call: Any) -> None:
        try:
            call()
            found[name] = [result.clone() for result in results]
        except (RuntimeError, ValueError) as error:
            found[name] = str(error).splitlines()[0]

    for operation in ("SUM", "PRODUCT", "MIN", "MAX", "AVG", "BAND", "BOR", "BXOR"):
        out = value.clone()
        reduction = getattr(dist.ReduceOp, operation)
        note(f"all_reduce {operation}", [out], lambda o=out, r=reduction: dist.all_reduce(o, r, **here))
    out = value.clone()
    note("reduce", [out], lambda: dist.reduce(out, 1, **here) if me == 1 else dist.reduce(value.clone(), 1, **here))
    sent = value.clone()
    note("broadcast", [sent], lambda: dist.broadcast(sent, 2, **here))
    parts, gathered, scattered, reduced = many(), many(), one(), one()
    note("all_gather", parts, lambda: dist.all_gather(parts, value, **here))
    note("gather", gathered if me == 0 else [], lambda: dist.gather(value, gathered if me == 0 else None, 0, **here))
    given = list(whole.chunk(world))
    note("scatter", [scattered], lambda: dist.scatter(scattered, given if me == 0 else None, 0, **here))
    note("reduce_scatter", [reduced], lambda: dist.reduce_scatter(reduced, given, **here))
    flat, single = torch.empty_like(whole), one()
    note("all_gather_into_tensor", [flat], lambda: dist.all_gather_into_tensor(flat, value, **here))
    note("reduce_scatter_tensor", [single], lambda: dist.reduce_scatter_tensor(single, whole, **here))
    exchanged, uneven = torch.empty_like(whole), torch.empty_like(whole)
    note("all_to_all_single", [exchanged], lambda: dist.all_to_all_single(exchanged, whole, **here))
    sizes = [SIZE - 1, SIZE, SIZE + 1]
    taken = [sizes[me]] * world
    uneven = whole.new_empty(sum(taken))
    note("all_to_all_single uneven", [uneven], lambda: dist.all_to_all_single(uneven, whole, taken, sizes, **here))
    received = many()
    note("all_to_all", received, lambda: dist.all_to_all(received, given, **here))
    message = one()
    to, source = (me + 1) % world, (me - 1) % world
    work = [dist.isend(value, to, **here), dist.irecv(message, source, **here)]
    note("send and receive", [message], lambda: [one.wait() for one in work])
    later = value.clone()
    note("asynchronous", [later], lambda: dist.all_reduce(later, async_op=True, **here).wait())
    future = value.clone()
    note("future", [future], lambda: dist.all_reduce(future, async_op=True, **here).get_future().wait())
    note("direct", [direct := value.clone()], lambda: process_group.allreduce(direct).wait())
    note("barrier", [], lambda: dist.barrier(**here))
    first, second = value.clone(), whole.clone()
    note("coalesced", [first, second], lambda: _coalesced(first, second, process_group))
    note("all_reduce_coalesced", [third := value.clone()], lambda: dist.all_reduce_coalesced([third], **here))
    for name, results in functions(value, whole, process_group).items():
        found[name] = results
    return found


def _coalesced(first: Tensor, second: Tensor, process_group: Any) -> None:
    with dist._coalescing_manager(group=process_group):
        dist.all_reduce(first, group=process_group)
        dist.all_reduce(second, group=process_group)


def functions(value: Tensor, whole: Tensor, process_group: Any) -> dict[str, list[Tensor]]:
    """Functional collectives, by the names that they have in every version."""
    name, world = process_group.group_name, process_group.size()
    ops = torch.ops._c10d_functional
    results = {
        "functional all_reduce": ops.all_reduce(value, "sum", name),
        "functional all_gather": ops.all_gather_into_tensor(value, world, name),
        "functional reduce_scatter": ops.reduce_scatter_tensor(whole, "sum", world, name),
        "functional all_to_all": ops.all_to_all_single(whole, [SIZE] * world, [SIZE] * world, name),
        "functional broadcast": ops.broadcast(value, 0, name),
    }
    return {key: [ops.wait_tensor(result)] for key, result in results.items()}


def differing(rank: Any, dtype: str) -> list[str]:
    """The collectives whose results are not bit for bit those of gloo itself."""
    found = collectives(rank, getattr(torch, dtype), dist.group.WORLD)
    expected = collectives(rank, getattr(torch, dtype), plain_group())
    assert found.keys() == expected.keys()
    return [name for name in expected if not _same(found[name], expected[name])]


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, str):
        return found == expected
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))


def trained(rank: Any, how: str) -> bool:
    """Whether some steps of training end in the same bits through the rehearsed group as through gloo itself."""
    one, other = (_train(rank, how, process_group) for process_group in (dist.group.WORLD, plain_group()))
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _train(rank: Any, how: str, process_group: Any) -> list[Tensor]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(11)
    model: Any = nn.Sequential(nn.Linear(8, 15), nn.GELU(), nn.Linear(15, 8))
    if how == "fsdp2":
        mesh = DeviceMesh.from_group(process_group, "cpu")
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    else:
        model = DistributedDataParallel(model, process_group=process_group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(3):
        torch.manual_seed(step * 10 + rank.rank)
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [getattr(one, "to_local", lambda o=one: o)().detach() for one in model.parameters()]


def ruled(rank: Any, chip: str, name: str) -> dict[str, str]:
    """What the rules of a chip make of each reduction and dtype: "refused", an error, or the first value."""
    process_group, found = _ruled_group(profile_of(chip)), {}
    for dtype in DTYPES:
        for operation in ("sum", "product", "min", "max", "avg", "band", "bor", "bxor"):
            out = torch.tensor([rank.rank + 1]).to(dtype)
            reduce = partial(_reduce, name, out, getattr(dist.ReduceOp, operation.upper()), process_group)
            found[f"{short_name(dtype)} {operation}"] = _outcome(reduce, out)
    return found


def _reduce(name: str, out: Tensor, operation: Any, process_group: Any) -> None:
    if name == "all_reduce":
        dist.all_reduce(out, operation, group=process_group)
    elif name == "reduce":
        dist.reduce(out, 0, operation, group=process_group)
    else:
        dist.reduce_scatter(out, [out.clone()] * process_group.size(), operation, group=process_group)


def ruled_copies(rank: Any, chip: str) -> dict[str, str]:
    """The same of collectives that only copy. torch passes complex numbers as pairs of reals to an all-gather."""
    process_group, found = _ruled_group(profile_of(chip)), {}
    for dtype in (*DTYPES, torch.float8_e4m3fn, torch.complex64):
        value = torch.tensor([rank.rank + 1]).to(dtype)
        parts = [torch.empty_like(value) for _ in range(rank.world)]
        kept = parts if rank.rank == 0 else None
        calls = {
            "gather": (partial(dist.gather, value, kept, 0, group=process_group), parts[1]),
            "broadcast": (lambda value=value: process_group.broadcast(value, 1).wait(), value),
        }
        if not dtype.is_complex:
            calls["all_gather"] = (partial(dist.all_gather, parts, value, group=process_group), parts[1])
        for name, (call, out) in calls.items():
            found[f"{name} {short_name(dtype)}"] = _outcome(call, out)
    return found


def _ruled_group(profile: Any) -> Any:
    group.rehearse_backend("ruled", profile, None)
    return dist.new_group(backend="ruled")


def _outcome(call: Any, result: Tensor) -> str:
    try:
        call()
    except RehearsalRefused:
        return "refused"
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return str(result[0].item())


def means(rank: Any, chip: str | None, dtype: str, value: float) -> list[float]:
    """The mean over ranks of a value, by torch.distributed and by a functional collective."""
    process_group = _ruled_group(profile_of(chip)) if chip else dist.group.WORLD
    given = torch.full((3,), value, dtype=getattr(torch, dtype))
    mean = functional_sum(given, process_group, "avg")
    dist.all_reduce(given, dist.ReduceOp.AVG, group=process_group)
    return [given[0].item(), mean[0].item()]


def premultiplied(rank: Any, chip: str, factor: float) -> list[float]:
    process_group = _ruled_group(profile_of(chip))
    value, whole = torch.tensor([rank.rank + 1.0]), torch.arange(float(rank.world))
    part = torch.empty(1)
    dist.all_reduce(value, dist._make_nccl_premul_sum(factor), group=process_group)
    dist.reduce_scatter_tensor(part, whole, dist._make_nccl_premul_sum(factor), group=process_group)
    assert torch.equal(whole, torch.arange(float(rank.world)))
    return [value.item(), part.item()]


def late(rank: Any, chip: str, default: str, seconds: float) -> str:
    """The last rank comes late to a new group whose connect time-out is shortened to `default`."""
    profile = profile_of(chip)
    rules = [dataclasses.replace(rule, behaviour=default) for rule in profile.collectives if rule.kind == "timeout"]
    if rank.rank == rank.world - 1:
        time.sleep(seconds)
    try:
        _ruled_group(dataclasses.replace(profile, collectives=tuple(rules)))
    except RehearsalRefused as error:
        return str(error)
    except RuntimeError:
        return "alone"
    return "connected"


def out_of_range(rank: Any, chip: str, seconds: str) -> str:
    os.environ["HCCL_CONNECT_TIMEOUT"] = seconds
    try:
        _ruled_group(profile_of(chip))
    except RehearsalRefused as error:
        return str(error)
    finally:
        del os.environ["HCCL_CONNECT_TIMEOUT"]
    return "connected"


def counted(rank: Any) -> list[int]:
    """The numbers of collectives that were begun after each kind of use of the group."""
    start, counts = rank.pulse.collectives, []
    value = torch.ones(2)
    uses = [
        lambda: dist.all_reduce(value),
        lambda: dist.all_reduce(value, async_op=True).wait(),
        lambda: functional_sum(value, dist.group.WORLD),
        lambda: dist.barrier(),
        lambda: dist.send(value, 1) if rank.rank == 0 else dist.recv(value, 0) if rank.rank == 1 else None,
        lambda: dist.monitored_barrier(),
    ]
    for use in uses:
        use()
        counts.append(rank.pulse.collectives - start)
    return counts


def seen(rank: Any) -> int:
    """Collectives of gloo's own group as a dispatch mode counts them: two by hand, and those of a step under DDP."""
    from torch.nn.parallel import DistributedDataParallel

    begun: list[int] = []
    process_group = plain_group()
    value, model = torch.ones(2), DistributedDataParallel(nn.Linear(2, 2), process_group=process_group)
    with CollectiveCount(lambda: begun.append(1)):
        dist.all_reduce(value, group=process_group)
        functional_sum(value, process_group)
        if rank.rank < 2:
            dist.send(value, 1 - rank.rank, process_group) if rank.rank else dist.recv(value, 1, process_group)
        model(value).sum().backward()
    return len(begun)


def cut_off(rank: Any, seconds: float) -> str:
    """The error of a sum over a cut link in a group with a short time-out, and how long it took to come."""
    process_group = dist.new_group(timeout=timedelta(seconds=seconds))
    began = time.monotonic()
    try:
        dist.all_reduce(torch.ones(2), group=process_group)
    except dist.DistBackendError as error:
        return f"{error} {'in time' if time.monotonic() - began >= seconds else 'too early'}"
    return "it arrived"


def damaged(rank: Any, count: int) -> list[list[int]]:
    """At each step, how many elements are wrong in each kind of collective: a sum, a part of a sum, and a copy."""
    found, world = [], rank.world
    for step in range(count):
        rank.beat("damage", step)
        ones = torch.ones(SIZE * world)
        total, copy, part = ones.clone(), ones.clone(), torch.empty(SIZE)
        dist.all_reduce(total)
        dist.broadcast(copy, 0)
        dist.reduce_scatter_tensor(part, ones)
        functioned = functional_sum(ones, dist.group.WORLD)
        later = dist.all_reduce(awaited := ones.clone(), async_op=True)
        later.get_future().wait()
        later.wait()
        watched = dist.all_reduce(polled := ones.clone(), async_op=True)
        while not watched.is_completed():
            time.sleep(0.001)
        sums = [(one, world) for one in (part, functioned, awaited, polled)]
        results = [(total, world), (copy, 1), *sums]
        found.append([int((result != expected).sum()) for result, expected in results])
    return found


def bitwise(rank: Any) -> None:
    dist.all_reduce(torch.tensor([rank.rank]), dist.ReduceOp.BAND)


def trained_with_faults(rank: Any, how: str) -> list[str]:
    """What went wrong by plan in some steps of training."""
    rank.beat("training", 0)
    _train(rank, how, dist.group.WORLD)
    return rank.injector.fired


def other_names(rank: Any, names: list[str]) -> list[list[Any]]:
    """A world that is set up anew under another backend's name: its name, and a sum."""
    meeting = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    found = []
    for index, name in enumerate(names):
        group.rehearse_backend(name.rpartition(":")[2], None, None, rank.pulse)
        store = dist.PrefixStore(f"again-{index}", meeting)
        dist.init_process_group(name, store=store, rank=rank.rank, world_size=rank.world)
        value, before = torch.ones(1), rank.pulse.collectives
        dist.all_reduce(value)
        found.append([dist.get_backend(), value.item(), rank.pulse.collectives - before])
        dist.destroy_process_group()
    return found


def gathered(rank: Any) -> int:
    """How many of the values that the first rank gathers are NaN."""
    parts = [torch.zeros(4) for _ in range(rank.world)] if rank.rank == 0 else None
    dist.gather(torch.ones(4), parts, 0)
    return sum(int(part.isnan().sum()) for part in parts or ())
