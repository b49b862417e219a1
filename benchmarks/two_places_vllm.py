"""recipes/tiny.toml with its rollouts on one engine by URL: a live vLLM on the CPU with our plug-in, and ours."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from statistics import fmean, median

from benchmarks.conditions import store
from benchmarks.processes import ROOT, isthmus
from benchmarks.two_places_shore import KEY, Row
from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.started import started
from isthmus.records import RlRecord
from isthmus.run import RunFolder
from tests.support.meddling import meddling

RECIPE, TAUGHT, STEP = ROOT / "recipes" / "tiny.toml", "cold-start", "reasoning"
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


def vllm(options: argparse.Namespace) -> None:
    """Run both, print what they came to, and store it."""
    if not (options.vllm and options.plug_in):
        raise SystemExit("--what vllm wants --vllm PYTHON and --plug-in FOLDER")
    with tempfile.TemporaryDirectory() as scratch, meddling("http://127.0.0.1:9") as proxy, ExitStack() as stack:
        proxy.timeout_s = 1800.0
        words, prepared = _words(Path(scratch), proxy.url, options.set), Path(scratch) / "prepared"
        refused = isthmus(*words)
        assert refused.code != 0 and "--bundle" in refused.errors, refused.output + refused.errors
        bundle = Path(shutil.copytree(prepared / "qualify" / "away-bundle", Path(scratch) / "start"))
        engines = {"isthmus": stack.enter_context(_ours(bundle))}
        engines["vllm"] = stack.enter_context(_vllm(options, bundle))
        proxy.target = engines["isthmus"].url
        taught = isthmus(*words)
        assert taught.code == 0, taught.output + taught.errors
        rows: dict[str, Row] = {}
        for name, engine in engines.items():
            proxy.target, run = engine.url, Path(shutil.copytree(prepared, Path(scratch) / name))
            result = isthmus("run", run, "--only", STEP)
            assert result.code == 0, result.output + result.errors
            rows[name] = {"engine": engine.server, **_measured(RunFolder.open(run))}
            print(name, rows[name], flush=True)
    gains = [row["gain"] for row in rows.values()]
    within = all(row["gain_low"] <= gain <= row["gain_high"] for row in rows.values() for gain in gains)
    print("each gain lies within the interval of the other:", within)
    if not options.quick:
        store("two_places", {"what": "vllm", "set": options.set, "same_gain": within, "rows": rows})


def _words(folder: Path, url: str, changes: list[str]) -> list[object]:
    """`isthmus run` up to reinforcement learning. Without an engine it is refused, and leaves a bundle to start one."""
    key = folder / "away.key"
    key.write_text(KEY)
    places = [f"pools.away.engines=['{url}']", f"pools.away.api_key_file={key}"]
    settings = [word for change in (*SHAPE, *PLACES, *places, *changes) for word in ("--set", change)]
    return ["run", RECIPE, "--run", folder / "prepared", "--until", TAUGHT, *settings]


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


def _ours(bundle: Path) -> AbstractContextManager[HttpEngine]:
    python = f"env ISTHMUS_ADMIN_KEY={KEY} {shlex.quote(sys.executable)}"
    command = f"{python} -m isthmus.engines.local --bundle {{bundle}} --port {{port}} --admin"
    return started(command, bundle, bundle.parent / "engine.log", api_key=KEY)


def _vllm(options: argparse.Namespace, bundle: Path) -> AbstractContextManager[HttpEngine]:
    command = (
        f"env PYTHONPATH={options.plug_in} VLLM_SERVER_DEV_MODE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_MLA_DISABLE=1 "
        "VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "
        f"{shlex.quote(options.vllm)} -m vllm.entrypoints.openai.api_server --model {{bundle}} --port {{port}} "
        f"--host 127.0.0.1 --dtype float32 --max-model-len {LENGTH} --logprobs-mode processed_logprobs "
        """--weight-transfer-config '{"backend": "isthmus"}'"""
    )
    return started(command, bundle, bundle.parent / "vllm.log")
