"""Runs one call of a portable probe on its own ranks, and says whether a known failure shows: 0 no, 1 yes, 2 undecided.

`isthmus case` packs everything below the mark as it is, behind the probe's source. So this file needs torch and the
standard library alone, and runs with versions of torch and Python older than the project's own.
"""

from __future__ import annotations

# --- packed from here on ---
import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HEALTHY, REPRODUCED, UNDECIDED = 0, 1, 2
GRACE_S = 2.0
START_S = 600.0
"""What ranks get to load torch and to find each other."""


class CouldNotRun(Exception):
    """What stands in the way of running the case here."""


class CaseRank:
    """What the probe is given: the place of this rank, its device, and how to say what it does."""

    def __init__(self, rank: int, world: int, device: torch.device, say: Callable[[str], object]):
        self.rank, self.world, self.device, self._say = rank, world, device, say

    def beat(self, section: str, step: int = 0) -> None:
        """Say what this rank does now."""
        self._say(f"{section}, step {step}")


def manner_of(replies: list[dict[str, Any]]) -> dict[str, Any] | None:
    """In which way a call failed: `state` and `errors`, without the numbers in them. None: it did not.

    A reply has `state` (done, raised, crashed, hung, stopped), `value`, `error` and `seconds`. A crash weighs more than
    an error that it causes on other ranks, the first error more than those that follow, and any more than waiting. Of
    wrong answers the errors are the kinds of what was found, where the probe tells them.
    """
    for state in ("crashed", "raised", "hung"):
        ended = [reply for reply in replies if reply["state"] == state]
        if ended:
            ended = [min(ended, key=lambda reply: reply.get("seconds", 0.0))] if state == "raised" else ended
            return {"state": state, "errors": sorted({_kind(str(reply["error"])) for reply in ended} - {""})}
    wrong = [reply["value"] for reply in replies if isinstance(reply["value"], dict) and reply["value"].get("failed")]
    kinds = {str(one["kind"]) for value in wrong for one in value.get("findings", []) if "kind" in one}
    return {"state": "wrong", "errors": sorted(kinds)} if wrong else None


def same_manner(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two failures are of one kind: the same state and, where there are errors, one that both have."""
    if one is None or other is None or one["state"] != other["state"]:
        return False
    return not (one["errors"] and other["errors"]) or bool(set(one["errors"]) & set(other["errors"]))


def _kind(error: str) -> str:
    """An error's type and the beginning of its message up to the first number; an exit or signal as it is."""
    if error.startswith(("killed by signal", "exit code")):
        return error
    found = re.match(r"[^\d\[(]{0,60}", error)
    return found.group().strip() if found else ""


def _start_device(case: dict[str, Any], rank: int) -> torch.device:
    if case.get("extension"):
        importlib.import_module(case["extension"])
    if case["device"] == "cpu":
        torch.set_num_threads(case.get("threads", 1))
        return torch.device("cpu")
    module = getattr(torch, case["device"])
    index = int(os.environ.get("LOCAL_RANK", rank)) % max(1, module.device_count())
    module.set_device(index)
    return torch.device(case["device"], index)


def _join(case: dict[str, Any], method: str, rank: int, world: int) -> None:
    backend = case["backend"] if case["device"] == "cpu" else f"cpu:gloo,{case['device']}:{case['backend']}"
    dist.init_process_group(
        backend, init_method=method, rank=rank, world_size=world, timeout=timedelta(seconds=START_S)
    )


def _located(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The arguments, with the files among them found beside this script."""
    named = {name: str(folder / case["arguments"][name]) for name in case.get("files", [])}
    return {**case["arguments"], **named}


def _work(pipe: Any, case: dict[str, Any], function: Any, folder: str, place: tuple[int, int], method: str) -> None:
    """One rank: sends ("ready", ""), ("beat", text), ("value", result) for each run, or ("raised"/"unable", error)."""
    rank, world = place
    stage = "unable"
    try:
        device = _start_device(case, rank)
        _join(case, method, rank, world)
        stage = "raised"
        pipe.send(("ready", ""))
        me = CaseRank(rank, world, device, lambda text: pipe.send(("beat", text)))
        for _ in range(case["runs"]):
            pipe.send(("value", function(me, **_located(case, Path(folder)))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        traceback.print_exc()
        pipe.send((stage, f"{type(error).__name__}: {error}"))
        raise


def _context(device: str) -> Any:
    """CPU ranks come from a process that has loaded torch, which saves time; an accelerator's start anew."""
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


class _Ranks:
    """The processes of one attempt, and what each of them has said so far."""

    def __init__(self, case: dict[str, Any], function: Any, folder: Path, meeting: str):
        context = _context(case["device"])
        self.case, self.world = case, case["ranks"]
        self.values: list[list[Any]] = [[] for _ in range(self.world)]
        self.ends: dict[int, tuple[str, str]] = {}
        self.ended_after = [0.0] * self.world
        self.ready = [False] * self.world
        self.began = time.monotonic()
        self.beats = ["its start"] * self.world
        self.pipes, self.processes = [], []
        for rank in range(self.world):
            ours, theirs = context.Pipe(duplex=False)
            work = (theirs, case, function, str(folder), (rank, self.world), meeting)
            process = context.Process(target=_work, args=work, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def watch(self, stall_s: float) -> None:
        """Until all have answered, one has failed and the others had a moment, or nothing moves for `stall_s`."""
        moved, failed = time.monotonic(), None
        while len(self.ends) < self.world:
            if all(len(values) == self.case["runs"] for values in self.values):
                self.ends = dict.fromkeys(range(self.world), ("done", ""))
                break
            waiting = {self.pipes[rank]: rank for rank in range(self.world) if rank not in self.ends}
            for pipe in wait(list(waiting), timeout=0.1):
                self._hear(waiting[pipe])
                moved = time.monotonic()
            now = time.monotonic()
            if failed is None and any(state != "done" for state, _ in self.ends.values()):
                failed = now
            patience = stall_s if all(self.ready) else max(stall_s, START_S)
            if (failed is not None and now - failed > GRACE_S) or now - moved > patience:
                break
        for rank in range(self.world):
            self.ends.setdefault(rank, ("stopped", "") if failed is not None else ("hung", ""))
        for process in self.processes:
            process.join(timeout=GRACE_S if failed is None and self.ends[0][0] == "done" else 0)
            if process.is_alive():
                process.kill()
            process.join()

    def _hear(self, rank: int) -> None:
        self.ended_after[rank] = time.monotonic() - self.began
        try:
            kind, content = self.pipes[rank].recv()
        except (EOFError, OSError):
            self.ready[rank] = True
            self.processes[rank].join(timeout=GRACE_S)
            code = self.processes[rank].exitcode
            if code == 0:
                self.ends[rank] = ("done", "")
            else:
                manner = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
                self.ends[rank] = ("crashed", manner)
            return
        self.ready[rank] = True
        if kind == "beat":
            self.beats[rank] = content
        elif kind == "value":
            self.values[rank].append(content)
        elif kind != "ready":
            self.ends[rank] = (kind, content)

    def runs(self) -> list[list[dict[str, Any]]]:
        """The replies of every rank, run by run. The last run may be one that did not end."""
        whole = min(map(len, self.values))
        found = [
            [self._reply(rank, "done", self.values[rank][run]) for rank in range(self.world)] for run in range(whole)
        ]
        if any(state != "done" for state, _ in self.ends.values()):
            found.append([self._reply(rank, self.ends[rank][0], None) for rank in range(self.world)])
        return found

    def _reply(self, rank: int, state: str, value: Any) -> dict[str, Any]:
        return {
            "rank": rank,
            "state": state,
            "value": value,
            "error": self.ends[rank][1] if state != "done" else "",
            "beat": self.beats[rank],
            "seconds": self.ended_after[rank],
        }


def run_here(case: dict[str, Any], function: Any, folder: Path, stall_s: float) -> list[list[dict[str, Any]]]:
    """Run the case on ranks that this process starts. Returns the replies of each run. Raises CouldNotRun."""
    with tempfile.TemporaryDirectory(prefix="reproduce-") as meeting:
        ranks = _Ranks(case, function, folder, Path(meeting, "store").as_uri())
        ranks.watch(stall_s)
    unable = [f"rank {rank}: {error}" for rank, (state, error) in sorted(ranks.ends.items()) if state == "unable"]
    if unable:
        raise CouldNotRun("; ".join(unable))
    return ranks.runs()


class _Ending:
    """Ends this process with what an error of the probe means, where torchrun and not this script watches the ranks."""

    def __init__(self, case: dict[str, Any]):
        self.case = case

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            return
        traceback.print_exception(kind, error, trace)
        reply = {"state": "raised", "value": None, "error": f"{kind.__name__}: {error}"}
        raise SystemExit(REPRODUCED if same_manner(manner_of([reply]), self.case["manner"]) else UNDECIDED)


def run_under_torchrun(case: dict[str, Any], function: Any, folder: Path) -> list[list[dict[str, Any]]]:
    """Run the case as one rank of those that torchrun started. A crash or a hang is torchrun's to tell."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _start_device(case, rank)
    _join(case, "env://", rank, world)
    me = CaseRank(rank, world, device, lambda text: print(f"rank {rank}: {text}", file=sys.stderr, flush=True))
    found = []
    for _ in range(case["runs"]):
        with _Ending(case):
            value = function(me, **_located(case, folder))
        found.append(
            [{"rank": rank, "state": "done", "value": one, "error": ""} for rank, one in _gathered(value, world)]
        )
    dist.destroy_process_group()
    return found


def _gathered(value: Any, world: int) -> list[tuple[int, Any]]:
    """What each rank returned, with its number. As text, since torch's own way for objects needs NumPy."""
    text = json.dumps(value, default=str).encode()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(text)]))
    longest = int(max(sizes))
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world)]
    dist.all_gather(texts, torch.tensor(list(text.ljust(longest)), dtype=torch.uint8))
    return [(rank, json.loads(bytes(one.tolist()))) for rank, one in enumerate(texts)]


def _check_devices(case: dict[str, Any]) -> None:
    if case.get("extension"):
        try:
            importlib.import_module(case["extension"])
        except ImportError as error:
            raise CouldNotRun(f"{case['extension']} cannot be loaded: {error}") from None
    if case["device"] == "cpu":
        return
    module = getattr(torch, case["device"], None)
    count = module.device_count() if module is not None and module.is_available() else 0
    if count < case["ranks"] and "RANK" not in os.environ:
        raise CouldNotRun(
            f"{case['ranks']} devices of type {case['device']} are needed and {count} are here; "
            "start it on several machines with torchrun, or try --ranks"
        )


def _tell(replies: list[dict[str, Any]]) -> None:
    for reply in replies:
        if reply["state"] == "done":
            print(f"    rank {reply['rank']}: {json.dumps(reply['value'], default=str)}")
        else:
            place = f" in {reply['beat']}" if reply.get("beat") and reply["state"] != "stopped" else ""
            print(f"    rank {reply['rank']} {reply['state']}{place}: {reply['error']}".rstrip(": "))


def _conclude(case: dict[str, Any], runs: list[list[dict[str, Any]]]) -> int:
    manners = [manner_of(replies) for replies in runs]
    reproduced = sum(same_manner(manner, case["manner"]) for manner in manners)
    other = [manner for manner in manners if manner is not None and not same_manner(manner, case["manner"])]
    for index, replies in enumerate(runs):
        state = (manners[index] or {"state": "no failure"})["state"]
        print(f"  run {index + 1} of {case['runs']}: {state}")
        _tell(replies)
    print(f"\nexpected: {case['expected']}\nobserved when it was found: {case['observed']}")
    if reproduced:
        print(f"\nREPRODUCED: it failed in {reproduced} of {len(runs)} runs.")
        return REPRODUCED
    if other:
        print(f"\nUNDECIDED: it failed in another way than the one that was found, {case['manner']}.")
        return UNDECIDED
    if case["manner"] is None:
        print("\nUNDECIDED: the probe does not judge itself; compare what it printed with what was expected.")
        return UNDECIDED
    print(f"\nHEALTHY: no failure in {len(runs)} runs.")
    return HEALTHY


def reproduce(case: dict[str, Any], function: Any, script: str) -> int:
    """Run a case as the command line asks, tell what was expected and what came, and return the exit code."""
    parser = argparse.ArgumentParser(description=f"{case['title']}. Exit code 0: healthy, 1: reproduced, 2: undecided.")
    parser.add_argument("--device", default=case["device"], help="torch device type (default: %(default)s)")
    parser.add_argument("--backend", help="of torch.distributed (default: gloo on cpu, else the one of the case)")
    parser.add_argument("--ranks", type=int, default=case["ranks"], help="processes to start (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=case["runs"], help="times to run it (default: %(default)s)")
    parser.add_argument("--stall", type=float, default=120.0, help="seconds without a sign of life (default: 120)")
    options = parser.parse_args()
    backend = options.backend or ("gloo" if options.device == "cpu" else case["backend"])
    extension = case.get("extension") if options.device != "cpu" else None
    asked = {"device": options.device, "ranks": options.ranks, "runs": options.runs}
    case = {**case, **asked, "backend": backend, "extension": extension}
    folder, started_by_torchrun = Path(script).resolve().parent, "RANK" in os.environ
    if started_by_torchrun:
        case["ranks"] = int(os.environ["WORLD_SIZE"])
    speaks = os.environ.get("RANK", "0") == "0"
    with contextlib.redirect_stdout(sys.stdout if speaks else io.StringIO()):
        return _run_and_tell(case, function, folder, None if started_by_torchrun else options.stall)


def _run_and_tell(case: dict[str, Any], function: Any, folder: Path, stall_s: float | None) -> int:
    """On ranks of its own, or as one of torchrun's where `stall_s` is None."""
    for line in case["warnings"]:
        print(line)
    print(f"{case['title']}\non {case['ranks']} ranks of {case['device']}, torch {torch.__version__}")
    try:
        _check_devices(case)
        if stall_s is None:
            return _conclude(case, run_under_torchrun(case, function, folder))
        return _conclude(case, run_here(case, function, folder, stall_s))
    except CouldNotRun as problem:
        print(f"\nUNDECIDED: it could not run. {problem}")
        return UNDECIDED
