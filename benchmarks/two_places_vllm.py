"""recipes/tiny.toml with its rollouts on one engine by URL: a live vLLM on the CPU with our plug-in, and ours."""

from __future__ import annotations

import argparse
import shlex
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean, median

from benchmarks.conditions import store
from benchmarks.processes import ROOT, isthmus
from benchmarks.two_places_shore import KEY, Row
from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.started import started
from isthmus.records import RlRecord
from isthmus.run import RunFolder

RECIPE, STEP = ROOT / "recipes" / "tiny.toml", "reasoning"
SHAPE = ("model.qk_rope_head_dim=32", "model.v_head_dim=32", "model.moe_intermediate_size=64")
"""Sizes that vLLM's kernels for the CPU have: heads of 32, multiples of 32 elsewhere."""
PLACES = (
    "pools.away.chip=cpu",
    "pools.away.rehearsed=false",
    "place.train=['home']",
    "place.rollout=['away']",
    "place.serve=['home']",
    f"step.{STEP}.rollout_format=fp32",
)
"""In fp32, because vLLM on the CPU has no experts in 8 bits."""
LENGTH = 384
Opening = Callable[[Path, int], AbstractContextManager[HttpEngine]]


def vllm(options: argparse.Namespace) -> None:
    """Run both, print what they came to, and store it."""
    if not (options.vllm and options.plug_in):
        raise SystemExit("--what vllm wants --vllm PYTHON and --plug-in FOLDER")
    with tempfile.TemporaryDirectory() as scratch:
        makes: dict[str, Opening] = {"isthmus": _ours, "vllm": lambda bundle, port: _vllm(options, bundle, port)}
        rows = {name: one_run(Path(scratch) / name, opening, options.set) for name, opening in makes.items()}
    for name, row in rows.items():
        print(name, row)
    gains = [rows[name]["gain"] for name in makes]
    within = [rows[name]["gain_low"] <= gain <= rows[name]["gain_high"] for name in makes for gain in gains]
    print("each gain lies within the interval of the other:", all(within))
    store("two_places", {"what": "vllm", "set": options.set, "same_gain": all(within), "rows": rows})


def one_run(folder: Path, opening: Opening, changes: list[str]) -> Row:
    """`isthmus run` is refused first, because no engine is there, and leaves the bundle to start one with."""
    folder.mkdir()
    key, run, port = folder / "away.key", folder / "run", _free_port()
    key.write_text(KEY)
    changes = [*SHAPE, *PLACES, f"pools.away.engines=['http://127.0.0.1:{port}']", *changes]
    words = ["run", RECIPE, "--run", run, "--set", f"pools.away.api_key_file={key}"]
    words += [word for change in changes for word in ("--set", change)]
    refused = isthmus(*words)
    assert refused.code != 0 and "vllm serve" in refused.errors, refused.output + refused.errors
    with opening(run / "qualify" / "away-bundle", port) as engine:
        result = isthmus(*words)
        assert result.code == 0, result.output + result.errors
        return {"engine": engine.server, **_measured(RunFolder.open(run))}


def _measured(run: RunFolder) -> Row:
    record, steps = run.require_record(f"steps/{STEP}/record", RlRecord, "run"), run.events(STEP, "step")
    gain = record.accuracy_gain
    row: Row = {"before": record.accuracy_before.value, "after": record.accuracy_after.value, "steps": len(steps)}
    row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high, "seconds": record.seconds}
    for key in ("mismatch_abs", "mismatch_k3", "parity_gap", "tokens_per_s", "update_bytes", "update_full_bytes"):
        row[key] = fmean(one[key] for one in steps if one.get(key) is not None)
    for key in ("sync_s", "update_encode_s", "update_send_s", "update_apply_s", "parity_s", "rollout_s", "train_s"):
        row[key] = median([one[key] for one in steps if one.get(key) is not None] or [0.0])
    row["updates"] = {kind: sum(one["update_kind"] == kind for one in steps) for kind in ("delta", "snapshot", "full")}
    row |= {name: len(run.events(STEP, name)) for name in ("fallback", "alarm", "incident")}
    return row


def _ours(bundle: Path, port: int) -> AbstractContextManager[HttpEngine]:
    python = shlex.quote(sys.executable)
    command = f"env ISTHMUS_ADMIN_KEY={KEY} {python} -m isthmus.engines.local --bundle {{bundle}} --port {port} --admin"
    return started(command, bundle, bundle.parent / "engine.log", f"http://127.0.0.1:{port}", KEY)


def _vllm(options: argparse.Namespace, bundle: Path, port: int) -> AbstractContextManager[HttpEngine]:
    command = (
        f"env PYTHONPATH={options.plug_in} VLLM_SERVER_DEV_MODE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_MLA_DISABLE=1 "
        "VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "
        f"{shlex.quote(options.vllm)} -m vllm.entrypoints.openai.api_server --model {{bundle}} --port {port} "
        f"--host 127.0.0.1 --dtype float32 --max-model-len {LENGTH} --logprobs-mode processed_logprobs "
        """--weight-transfer-config '{"backend": "isthmus"}'"""
    )
    return started(command, bundle, bundle.parent / "vllm.log", f"http://127.0.0.1:{port}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
