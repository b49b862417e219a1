"""The ranks of a stage on this machine, started and watched by torchrun's agent."""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from isthmus.errors import IsthmusError, RanksFailed

LAST_LINES = 12


def run_ranks(arguments: list[str], ranks: int, logs: Path) -> None:
    """Run `isthmus ARGUMENTS` in `ranks` processes. The first one speaks on this console, the others into `logs`.

    Raises RanksFailed with the exit code and the words of the rank that failed first; KeyboardInterrupt if stopped.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="launch-", dir=logs) as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            max_restarts=0,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id="isthmus",
            logs_specs=DefaultLogsSpecs(
                log_dir=folder,
                redirects=dict.fromkeys(range(1, ranks), Std.ALL),
                tee={0: Std.ERR},
            ),
            log_line_prefix_template="",
        )
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        try:
            elastic_launch(config, sys.executable)("-m", "isthmus", *arguments)
        except SignalException:
            raise KeyboardInterrupt from None
        except ChildFailedError as error:
            raise _explained(*error.get_first_failure(), Path(folder)) from None


def _explained(rank: int, failure: ProcessFailure, folder: Path) -> IsthmusError:
    words = _last_words(folder, rank)
    if rank == 0 and failure.exitcode > 0:
        return RanksFailed(f"the first rank stopped with exit code {failure.exitcode}", failure.exitcode)
    how = f"exit code {failure.exitcode}" if failure.exitcode >= 0 else f"signal {-failure.exitcode}"
    return RanksFailed(f"rank {rank} stopped with {how}" + (f":\n{words}" if words else ""), failure.exitcode)


def _last_words(folder: Path, rank: int) -> str:
    for path in sorted(folder.rglob(f"{rank}/stderr.log")):
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join(f"  {line}" for line in lines[-LAST_LINES:])
    return ""
