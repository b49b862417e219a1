"""How good the gate is: faults planted in random modules of random models, beside healthy twins, and the field's rules.

    python -m benchmarks.gate                     # 60 models: half an hour of CPU time
    python -m benchmarks.gate --quick             # 5 models, and no result is stored
    python -m benchmarks.gate --models 20 --healthy 8 --formats w8a8 bf16

Each model crosses in one format, in turn. It is converted, captured and listed as the source's machine does it. Then
every fault that it can have is planted once, where it happens in the field, and the gate is asked on an imitated bf16
device, whose noise has a seed of its own in each trial. Healthy twins are the same without the fault, and one more is
in fp32. A fault that changes nothing is drawn again.

The rivals judge the same faulty targets: thresholds on tensors propagated from end to end (msprobe's norm ratio,
SGLang's comparator, a relative error of one thousandth), and end accuracy, whose limits are set on the healthy twins
of this very run so that one twin in a hundred alarms.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import store
from isthmus.formats import format_names, get_format
from isthmus.parity.paired import wilson_interval
from tests.support.gate_faults import Plant
from tests.support.gate_models import random_model
from tests.support.gate_rivals import (
    Propagated,
    Rival,
    first_difference_rule,
    mean_kl,
    norm_ratio_rule,
    propagate,
    relative_error_rule,
    top1_agreement,
)
from tests.support.gate_run import (
    KINDS,
    Case,
    Said,
    TargetDevice,
    ask,
    draw_plant,
    prepare,
    right_module,
    right_operator,
    target,
)

CONFIDENCE = 0.95
CALIBRATED = 0.99
REPLAY_ALONE = "our replay alone"
"""The gate without reading weights or hyper-parameters of the target back, as where it cannot be looked into."""
RULES: dict[str, Callable[[Propagated, Propagated], Rival]] = {
    "norm ratio > 0.5": norm_ratio_rule,
    "1 - 2xy/(x2+y2) > 1e-3": first_difference_rule,
    "relative error > 1e-3": relative_error_rule,
}


@dataclass
class Trial:
    """One question to the gate. `rules` gives for each rival rule whether it refused and named the right module."""

    model: int
    architecture: str
    format: str
    kind: str
    fault: str | None
    dtype: str
    device: int
    rows_alone: bool = False
    threads: int = 1
    where: str | None = None
    detail: str = ""
    single: bool = False
    said: dict[str, Any] = field(default_factory=dict)
    right_module: bool = False
    right_operator: bool = False
    rules: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    kl: float | None = None
    top1: float | None = None

    @property
    def refused(self) -> bool:
        return self.said["refused"]


def main() -> None:
    options = parse()
    began = time.perf_counter()
    jobs = [
        (options.first + index, options.formats[index % len(options.formats)], options.healthy)
        for index in range(options.models)
    ]
    trials: list[Trial] = []
    seconds = 0.0
    with ProcessPoolExecutor(options.workers) as workers:
        for done, (found, spent) in enumerate(workers.map(examine, *zip(*jobs, strict=True)), 1):
            trials += found
            seconds += spent
            print_progress(done, options.models, trials, seconds)
    result = summary(trials)
    print_tables(result)
    print_misses(trials)
    wall = time.perf_counter() - began
    print(f"{len(trials)} verifications, {seconds:.0f} s of CPU time and {wall:.0f} s, preparation and rivals included")
    if not options.quick:
        described = {"models": options.models, "first_model": options.first, "formats": options.formats}
        misses = [asdict(trial) for trial in trials if is_miss(trial)]
        store("gate", {**described, "cpu_s": seconds, **result, "misses": misses})


def parse() -> argparse.Namespace:
    usable = [name for name in format_names() if not get_format(name).needs_calibration]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=60)
    parser.add_argument(
        "--healthy",
        type=int,
        default=4,
        help="healthy twins on a bf16 device per model and format, one fp32 twin beside them",
    )
    parser.add_argument("--formats", nargs="+", choices=usable, default=[name for name in usable if name != "fp32"])
    parser.add_argument("--first", type=int, default=0, help="number of the first random model")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="5 models, and no result is stored")
    options = parser.parse_args()
    options.models = 5 if options.quick else options.models
    return options


def examine(seed: int, format_name: str, healthy: int) -> tuple[list[Trial], float]:
    """All trials of one model in one format, and the CPU seconds that they took."""
    torch.set_num_threads(1)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        case = prepare(random_model(seed), format_name, Path(scratch) / "bundle")
        trials = [*healthy_trials(case, healthy), *faulty_trials(case)]
    return trials, time.process_time() - began


def healthy_trials(case: Case, count: int) -> Iterator[Trial]:
    reference = propagate(case.subject.build(), case.subject.model.prompts())
    for twin in range(count + 1):
        dtype = "fp32" if twin == count else "bf16"
        yield judged(case, new_trial(case, "healthy", dtype, twin), None, reference)


def faulty_trials(case: Case, done: Container[int] = ()) -> Iterator[Trial]:
    """Every fault that the model can have, once, the kinds mixed; not those whose devices are `done`."""
    reference = propagate(case.subject.build(), case.subject.model.prompts())
    pairs = [(kind, fault) for kind, faults in KINDS.items() for fault in faults]
    numbered = [*enumerate(pairs, 500)]
    random.Random(f"order {case.subject.model.seed} {case.subject.format}").shuffle(numbered)
    for number, (kind, fault) in numbered:
        if device_number(case, number) in done:
            continue
        plant = draw_plant(case, kind, fault, case.subject.model.seed)
        if plant is not None:
            trial = new_trial(case, kind, "bf16", number)
            trial.fault, trial.where, trial.detail, trial.single = fault, plant.where, plant.detail, not plant.several
            yield judged(case, trial, plant, reference)


def new_trial(case: Case, kind: str, dtype: str, number: int) -> Trial:
    model, device = case.subject.model, device_number(case, number)
    return Trial(model.seed, model.architecture.model_type, case.subject.format, kind, None, dtype, device)


def device_number(case: Case, number: int) -> int:
    """What decides the noise of the device of a trial, and tells it from the others of its model and format."""
    return 1000 * case.subject.model.seed + number


def judged(case: Case, trial: Trial, plant: Plant | None, reference: Propagated) -> Trial:
    """The trial with what the gate and, where the fault is in the target, the rivals say."""
    device = TargetDevice(trial.device, trial.dtype, trial.rows_alone)
    torch.set_num_threads(trial.threads)
    said = ask(case, trial.kind, plant, device)
    trial.said = asdict(said)
    if plant is not None:
        trial.right_module, trial.right_operator = right_module(plant, said), right_operator(plant, said)
    if trial.kind in ("healthy", "loader", "runtime"):
        found = propagate(target(case.subject, plant, device), case.subject.model.prompts())
        trial.kl, trial.top1 = mean_kl(reference, found), top1_agreement(reference, found)
        alone = Said(said.replayed is not None, module=said.replayed)
        trial.rules[REPLAY_ALONE] = (alone.refused, plant is not None and right_module(plant, alone))
        for name, rule in RULES.items():
            rival = rule(reference, found)
            right = plant is not None and right_module(plant, Said(rival.refused, module=rival.module))
            trial.rules[name] = (rival.refused, right)
    return trial


def share(hits: Iterable[bool]) -> dict[str, float | int] | None:
    """A proportion with Wilson's interval; None of nothing."""
    found = list(hits)
    if not found:
        return None
    low, high = wilson_interval(sum(found) / len(found), len(found), CONFIDENCE)
    return {"of": len(found), "count": sum(found), "share": sum(found) / len(found), "low": low, "high": high}


def summary(trials: list[Trial]) -> dict[str, Any]:
    """Per fault and overall: detection, localisation, false alarms, and the rivals' on the same targets."""
    healthy = [trial for trial in trials if trial.fault is None]
    faulty = [trial for trial in trials if trial.fault is not None]
    limits = accuracy_limits(healthy)
    rows = []
    for kind, faults in KINDS.items():
        for fault in faults:
            some = [trial for trial in faulty if (trial.kind, trial.fault) == (kind, fault)]
            if some:
                rows.append({"kind": kind, "fault": fault, **scores(some, limits)})
    kinds = {kind: scores([trial for trial in faulty if trial.kind == kind], limits) for kind in KINDS}
    return {
        "overall": scores(faulty, limits),
        "false_alarms": share(trial.refused for trial in healthy),
        "false_alarms_of_rivals": rival_scores(healthy, limits),
        "accuracy_limits": limits,
        "kinds": {kind: found for kind, found in kinds.items() if found["detected"]},
        "faults": rows,
    }


def scores(trials: list[Trial], limits: dict[str, float]) -> dict[str, Any]:
    single = [trial for trial in trials if trial.single and trial.kind != "config"]
    return {
        "detected": share(trial.refused for trial in trials),
        "layers": dict(Counter(trial.said["layer"] or "none" for trial in trials).most_common()),
        "module": share(trial.right_module for trial in single),
        "operator": share(trial.right_operator for trial in single),
        "rivals": rival_scores([trial for trial in trials if trial.kl is not None], limits),
    }


def rival_scores(trials: list[Trial], limits: dict[str, float]) -> dict[str, Any]:
    """Of each rule how often it refuses, and names the right module; end accuracy names none."""
    found: dict[str, Any] = {}
    for name in (REPLAY_ALONE, *RULES):
        single = [trial for trial in trials if trial.single]
        found[name] = {
            "detected": share(trial.rules[name][0] for trial in trials),
            "module": share(trial.rules[name][1] for trial in single),
        }
    found["KL"] = {"detected": share((trial.kl or 0.0) > limits[trial.format + " KL"] for trial in trials)}
    found["top-1"] = {"detected": share((trial.top1 or 0.0) < limits[trial.format + " top-1"] for trial in trials)}
    return found


def accuracy_limits(healthy: list[Trial]) -> dict[str, float]:
    """For each format the KL and the top-1 agreement that one noisy twin in a hundred passes."""
    limits = {}
    for name in sorted({trial.format for trial in healthy}):
        noisy = [trial for trial in healthy if trial.format == name and trial.dtype == "bf16"]
        kl = torch.tensor([trial.kl or 0.0 for trial in noisy], dtype=torch.float64)
        top1 = torch.tensor([trial.top1 or 0.0 for trial in noisy], dtype=torch.float64)
        limits[f"{name} KL"] = kl.quantile(CALIBRATED).item()
        limits[f"{name} top-1"] = top1.quantile(1 - CALIBRATED).item()
    return limits


def is_miss(trial: Trial) -> bool:
    """A false alarm, a fault that passed, or one module at fault and another named."""
    if trial.fault is None:
        return trial.refused
    return not trial.refused or (trial.single and trial.kind != "config" and not trial.right_module)


def print_progress(done: int, models: int, trials: list[Trial], seconds: float) -> None:
    faulty = [trial for trial in trials if trial.fault is not None]
    alarms = sum(trial.refused for trial in trials if trial.fault is None)
    print(
        f"{done}/{models} models, {len(trials) - len(faulty)} healthy with {alarms} false alarms, "
        f"{sum(trial.refused for trial in faulty)} of {len(faulty)} faults refused, {seconds:.0f} s CPU",
        flush=True,
    )


def print_tables(result: dict[str, Any]) -> None:
    rivals = [REPLAY_ALONE, *RULES, "KL", "top-1"]
    print("\nshares in % [95% interval]; a rival's is `refused / right module named`")
    print(f"{'where':<11}{'fault':<34}{'n':>5} {'refused':>18} {'module right':>18} {'operator':>9}  ", end="")
    print(" ".join(f"{name:>22}" for name in rivals) + "  first layer")
    overall: list[dict[str, Any]] = [{"kind": kind, "fault": "all", **found} for kind, found in result["kinds"].items()]
    for row in [*result["faults"], *overall, {"kind": "all", "fault": "all", **result["overall"]}]:
        if row["detected"] is None:
            continue
        print(f"{row['kind']:<11}{row['fault']:<34}{row['detected']['of']:>5} {shown(row['detected']):>18} ", end="")
        print(f"{shown(row['module']):>18} {plain(row['operator']):>9}  ", end="")
        print(" ".join(f"{both(row['rivals'][name]):>22}" for name in rivals), end="  ")
        print(", ".join(f"{layer} {count}" for layer, count in row["layers"].items()))
    alarms = result["false_alarms"]
    print(f"\nfalse alarms: {alarms['count']} of {alarms['of']} healthy verifications, {shown(alarms)}")
    for name, found in result["false_alarms_of_rivals"].items():
        print(f"  {name}: {shown(found['detected'])}")


def print_misses(trials: list[Trial]) -> None:
    for trial in filter(is_miss, trials):
        said = trial.said
        print(
            f"miss: model {trial.model} {trial.architecture} {trial.format}, {trial.kind}: {trial.fault or ''} "
            f"({trial.detail or trial.dtype}, device {trial.device}); gate: layer {said['layer']}, "
            f"module {said['module']}, operator {said['operator']}, {said['detail']!r}"
        )


def shown(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{100 * found['share']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def plain(found: dict[str, Any] | None) -> str:
    return "-" if found is None else f"{100 * found['share']:.1f}"


def both(found: dict[str, Any]) -> str:
    return plain(found["detected"]) + (f" / {plain(found['module'])}" if "module" in found else "")


if __name__ == "__main__":
    main()
