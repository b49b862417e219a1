"""The counter of collectives against arithmetic by hand, and against the bytes that the loopback interface counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from isthmus.probes.static.costs import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER
from tests.support.traffic import Traffic, loopback_bytes
from tests.support.worlds import in_world

MEGABYTES = 4
NUMBERS = MEGABYTES * 10**6 // 4


def whole() -> torch.Tensor:
    return torch.ones(NUMBERS)


def piece() -> torch.Tensor:
    return torch.ones(NUMBERS // dist.get_world_size())


def all_reduce() -> None:
    dist.all_reduce(whole())


def all_gather() -> None:
    dist._all_gather_base(whole(), piece())


def reduce_scatter() -> None:
    dist._reduce_scatter_base(piece(), whole())


def all_to_all() -> None:
    dist.all_to_all_single(whole(), whole())


def sent_by(work: Callable[[], Any]) -> list[tuple[str, int, float]]:
    with Traffic() as traffic:
        work()
    return [(one.kind, one.ranks, one.sent) for one in traffic.collectives]


def counted(rank: int) -> list[tuple[dict[str, float], int]]:
    """Of each collective: (what the counter says, what all ranks together put on the loopback interface)."""
    found = []
    for work in (all_gather, reduce_scatter, all_reduce, all_to_all):
        work()  # ranks connect
        with Traffic() as traffic:
            work()
        found.append((traffic.sent(), min(on_the_loopback(work) for _ in range(3))))
    return found


def on_the_loopback(work: Callable[[], Any]) -> int:
    """Bytes while `work` runs, whoever sends them."""
    before = quiet_loopback()
    work()
    return quiet_loopback() - before


def quiet_loopback() -> int:
    """The interface's count while no rank sends."""
    dist.barrier()
    time.sleep(0.05)
    count = loopback_bytes()
    dist.barrier()
    return count


@pytest.mark.skipif(not Path("/proc/net/dev").exists(), reason="needs Linux's count of bytes")
def test_the_loopback_interface_carries_what_is_counted():
    """gloo does a reduce-scatter as an all-reduce of which it keeps a part. Other traffic of the machine only adds."""
    size, ranks = MEGABYTES * 1e6, 4
    expected = {ALL_GATHER: 0.75, REDUCE_SCATTER: 0.75, ALL_REDUCE: 1.5, ALL_TO_ALL: 0.75}
    for results in in_world(ranks, counted):
        for (kind, share), (sent, wire) in zip(expected.items(), results, strict=True):
            assert sent == {kind: share * size}
            assert wire >= sent[kind] * ranks
            if kind != REDUCE_SCATTER:
                assert wire < 1.4 * sent[kind] * ranks


def exchanged_unevenly(rank: int) -> list[tuple[str, int, float]]:
    """Rank 0 sends 3 rows to itself and 5 to rank 1, which sends 1 row to rank 0 and none to itself; 4 numbers each."""
    send, receive = ([3, 5], [3, 1]) if rank == 0 else ([1, 0], [5, 0])
    rows, arrived = torch.ones(sum(send), 4), torch.empty(sum(receive), 4)
    return sent_by(lambda: dist.all_to_all_single(arrived, rows, receive, send))


def test_what_stays_on_a_rank_is_not_sent():
    assert in_world(2, exchanged_unevenly) == [[(ALL_TO_ALL, 2, 5 * 4 * 4)], [(ALL_TO_ALL, 2, 1 * 4 * 4)]]


class Summed(torch.autograd.Function):
    """Its backward pass sums over ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def hidden_collectives(rank: int) -> list[list[tuple[str, int, float]]]:
    """One in a backward pass, one in a subgroup, and those that a sharded tensor issues by itself."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mesh = init_device_mesh("cpu", (4,))
    sharded = distribute_tensor(torch.arange(12.0).reshape(6, 2), mesh, [Shard(0)], src_data_rank=None)
    weight = torch.ones(6, requires_grad=True)
    return [
        sent_by(lambda: Summed.apply(weight).sum().backward()),
        sent_by(lambda: dist.all_reduce(torch.ones(5, dtype=torch.float64), group=pairs[rank // 2])),
        sent_by(sharded.full_tensor),
        sent_by(lambda: sharded.sum().full_tensor()),
        sent_by(dist.barrier),
    ]


def test_collectives_are_seen_wherever_they_are_issued():
    """The 6 rows of 2 numbers are gathered as 2 rows of each of 4 ranks: the last one's are padding."""
    for backward, pair, gathered, summed, barrier in in_world(4, hidden_collectives):
        assert backward == [(ALL_REDUCE, 4, 1.5 * 6 * 4)]
        assert pair == [(ALL_REDUCE, 2, 5 * 8)]
        assert gathered == [(ALL_GATHER, 4, 3 * 2 * 2 * 4)]
        assert summed == [(ALL_REDUCE, 4, 1.5 * 4)]
        assert barrier == []


def unknown(rank: int) -> str:
    with pytest.raises(NotImplementedError) as refusal, Traffic():
        dist.broadcast(torch.ones(2), 0)
    return str(refusal.value)


def test_a_collective_that_cannot_be_counted_is_refused():
    assert "c10d::broadcast_" in in_world(1, unknown)[0]
