"""How good the sentinel is: faults of an exchange of weights, planted one by one in a live engine, beside healthy ones.

    python -m benchmarks.sentinel                                 # our own engine: 8 of each fault, a few minutes
    python -m benchmarks.sentinel --quick                         # 1 of each, and no result is stored
    python -m benchmarks.sentinel --vllm PYTHON --plug-in FOLDER  # FOLDER: pip install --target FOLDER ./plugin
    python -m benchmarks.sentinel --url http://127.0.0.1:8000     # one that runs with Plants as its extension

Each trial brings a version in which every weight moved by a part of --moved, and looks at the engine as a step of RL
does: checksums of all tensors, and log-probabilities of greedy tokens on two prompts. `swapped projections` gives the
loader another order: no checksum that is free of the layout can see it, and the log-probabilities must.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import store
from benchmarks.sentinel_plants import KINDS, MTP, OF_LOADERS, Planter
from isthmus.engines import Sampling
from isthmus.engines.account import compare
from isthmus.engines.channel import Channel
from isthmus.engines.local.api.server import Server
from isthmus.engines.local.api.service import load_service
from isthmus.engines.local.core.replica import exact_for
from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.started import started
from isthmus.formats import get_format
from isthmus.formats.files.bundle import write_bundle
from isthmus.model.model import Model
from isthmus.parity.engine import spot_check
from isthmus.parity.paired import wilson_interval
from isthmus.parity.tokens import GoldenSequence
from tests.support.engine_bundle import small_tokenizer
from tests.support.live_server import live
from tests.support.small import VLLM_DEEPSEEK

KEY, BUDGET, TOKENS = "sentinel", 0.01, 8
PROMPTS = [[0, 2, 60, 61, 4], [0, 2, 70, 71, 72, 4]]


@dataclass
class Subject:
    """A live engine, how a fault is armed in it and strikes, and the faults that it can have."""

    engine: HttpEngine
    arm: Callable[[str, int], dict[str, Any]]
    strike: Callable[[], Any]
    kinds: tuple[str, ...]


class Trials:
    """Versions one after the other to one engine; `moved` is how far a weight moves in each, relative to itself."""

    def __init__(self, subject: Subject, moved: float):
        self.subject, self.moved, self.format = subject, moved, get_format("fp32")
        self.state = dict(Model(VLLM_DEEPSEEK).initialise(0).state_dict())
        self.version = 0
        self.channel = Channel(subject.engine, deltas=True, snapshot_every=1000, tell=lambda *_, **__: None)
        self.next()

    def next(self, kind: str | None = None, seed: int = 0) -> dict[str, Any] | None:
        """Bring one version, with a fault if named, and look. None if the engine cannot have this fault."""
        planted = self.subject.arm(kind, seed)["planted"] if kind else None
        if kind and planted is None:
            return None
        self.version += 1
        noise = torch.Generator().manual_seed(self.version)
        self.state = {
            name: one * (1 + self.moved * torch.randn(one.shape, generator=noise)) for name, one in self.state.items()
        }
        tensors = self.format.export(self.state, VLLM_DEEPSEEK)
        began = time.perf_counter()
        self.channel.send(self.version, tensors)
        sent = time.perf_counter()
        if kind:
            self.subject.strike()
        found = self._look(tensors)
        if kind:
            self.channel.send_whole()
        return {"fault": kind or "none", "planted": planted, "crossing_s": sent - began, **found}

    def _look(self, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        engine, began = self.subject.engine, time.perf_counter()
        findings = compare(engine.accounts()[0][1], self.version, tensors)
        checked = time.perf_counter()
        answers = [group[0] for group in engine.generate(PROMPTS, Sampling(TOKENS, temperature=0.0))]
        said = [
            (GoldenSequence(prompt, one.tokens), one.logprobs) for prompt, one in zip(PROMPTS, answers, strict=True)
        ]
        exact = exact_for(engine.bits, lambda: self._built(tensors), [sequence for sequence, _ in said])
        model, arithmetic = self._built(tensors), engine.arithmetic or "fp32"
        spot = spot_check(lambda: self._built(tensors), arithmetic, model, said, BUDGET, self.version, exact)
        return {
            "checksums": bool(findings.wrong),
            "named": sorted(findings.wrong),
            "logprobs": spot.is_over,
            "gap": spot.mean,
            "seen": findings.seen,
            "unseen": findings.unseen,
            "checksum_s": checked - began,
            "logprob_s": time.perf_counter() - checked,
        }

    def _built(self, tensors: dict[str, torch.Tensor]) -> Model:
        return self.format.build(VLLM_DEEPSEEK, dict(tensors))


@contextlib.contextmanager
def own_engine(folder: Path) -> Iterator[Subject]:
    """Our server in this process, so that faults can be planted in the model that it computes with."""
    service = load_service(folder, slots=8)
    with live(Server(service, admin_key=KEY)) as port:
        engine = HttpEngine(f"http://127.0.0.1:{port}", KEY)
        engine.start(folder)
        planter = Planter(lambda: service.core.runner.model, lambda _change: None)
        yield Subject(engine, planter.arm, planter.strike, tuple(kind for kind in (*KINDS, MTP) if kind != OF_LOADERS))


@contextlib.contextmanager
def vllm_at(url: str, folder: Path) -> Iterator[Subject]:
    """A vLLM with the plug-in that runs with Plants as its extension."""
    engine = HttpEngine(url, start_wait_s=60.0)
    engine.start(folder)

    def rpc(method: str, **options: Any) -> dict[str, Any]:
        body = json.dumps({"method": method, "kwargs": options}).encode()
        request = urllib.request.Request(f"{url}/collective_rpc", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())["results"][0]

    def arm(kind: str, seed: int) -> dict[str, Any]:
        return rpc("sentinel_arm", kind=kind, seed=seed)

    yield Subject(engine, arm, lambda: rpc("sentinel_strike"), KINDS)


@contextlib.contextmanager
def vllm_started(options: argparse.Namespace, folder: Path) -> Iterator[Subject]:
    """The same, started for this bundle."""
    root = Path(__file__).resolve().parent.parent
    command = (
        f"env PYTHONPATH={options.plug_in}:{root} VLLM_SERVER_DEV_MODE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_MLA_DISABLE=1 "
        "VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 "
        f"{options.vllm} -m vllm.entrypoints.openai.api_server --model {{bundle}} --port {{port}} --host 127.0.0.1 "
        "--dtype float32 --max-model-len 128 --logprobs-mode processed_logprobs "
        "--worker-extension-cls benchmarks.sentinel_plants.Plants "
        """--weight-transfer-config '{"backend": "isthmus"}'"""
    )
    with started(command, folder, folder.parent / "vllm.log") as engine, vllm_at(engine.url, folder) as subject:
        yield subject


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By fault: how often each half of the sentinel, and either, spoke, with Wilson's interval at 95 %."""
    rows = []
    for fault in dict.fromkeys(one["fault"] for one in found):
        of_it = [one for one in found if one["fault"] == fault]
        either = sum(one["checksums"] or one["logprobs"] for one in of_it)
        rows.append(
            {
                "fault": fault,
                "trials": len(of_it),
                "checksums": sum(one["checksums"] for one in of_it),
                "logprobs": sum(one["logprobs"] for one in of_it),
                "either": either,
                "interval": wilson_interval(either / len(of_it), len(of_it), 0.95),
            }
        )
    return rows


def run_trials(trials: Trials, count: int) -> list[dict[str, Any]]:
    """A healthy version, then one with a fault, of each kind so many times."""
    found = []
    for seed in range(count):
        for kind in trials.subject.kinds:
            for one in (trials.next(), trials.next(kind, seed)):
                if one is not None:
                    found.append(one)
                    print({key: value for key, value in one.items() if key != "named"}, one["named"][:3], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8, help="of each fault; as many healthy versions as faulty ones")
    parser.add_argument("--moved", type=float, default=1e-3)
    parser.add_argument("--quick", action="store_true", help="1 trial of each, and no result is stored")
    parser.add_argument("--vllm", metavar="PYTHON", help="the python of an environment with vLLM")
    parser.add_argument("--plug-in", metavar="FOLDER", help="where the wheel of plugin/ was installed")
    parser.add_argument("--url", help="a vLLM that runs already, on the bundle that --bundle wrote")
    parser.add_argument("--bundle", type=Path, help="write the bundle here")
    options = parser.parse_args()
    trials = 1 if options.quick else options.trials
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.bundle or Path(scratch) / "fp32"
        if not folder.exists():
            state = Model(VLLM_DEEPSEEK).initialise(0).state_dict()
            write_bundle(folder, "fp32", state, VLLM_DEEPSEEK, small_tokenizer())
        with _subject(options, folder) as subject:
            found = run_trials(Trials(subject, options.moved), trials)
            engine = subject.engine.server
    rows = summary(found)
    for row in rows:
        print(row)
    if not options.quick:
        described = {"engine": engine, "trials": trials, "moved": options.moved}
        store("sentinel", {**described, "seconds": time.perf_counter() - began, "summary": rows, "versions": found})


def _subject(options: argparse.Namespace, folder: Path) -> contextlib.AbstractContextManager[Subject]:
    if options.url:
        return vllm_at(options.url, folder)
    return vllm_started(options, folder) if options.vllm else own_engine(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
