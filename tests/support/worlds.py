"""Small worlds of processes that speak over gloo, for tests. torch is imported once, in a server that forks them."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def server() -> multiprocessing.context.ForkServerContext:
    """Starts processes that have torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "isthmus.trainer.checkpoint"])
    return context


def in_world(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `work(rank, *arguments)` in `size` processes that form a group; what each returned, by rank."""
    context = server()
    with tempfile.TemporaryDirectory() as folder:
        pairs = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=_rank, args=(rank, size, Path(folder) / "store", sender, work, arguments))
            for rank, (_, sender) in enumerate(pairs)
        ]
        for process in processes:
            process.start()
        for _, sender in pairs:
            sender.close()
        results = [receiver.recv() if receiver.poll(120) else "no answer" for receiver, _ in pairs]
        for process in processes:
            process.join(timeout=30)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _rank(rank: int, size: int, store: Path, sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """One process. Ranks leave together, because gloo fails on a rank that still connects to one that has left."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(store), size), rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        result = work(rank, *arguments)
        dist.barrier()
        sender.send(result)
    except BaseException as error:
        sender.send(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
