"""What crosses at a step of RL as deltas, against full snapshots: bytes and seconds per step of a real run.

    python -m benchmarks.deltas

r-nano on the tiny recipe, shortened. The supervised model learns by RL three times: with full updates and with deltas,
both in w8a8, which must give the same weights at every step; and in fp32, writing every version into a shared folder.
The versions of that folder are then exported in each format, and each difference is encoded and applied;
every result is compared by hash. The rival of a delta is all weights as one message (formats/updates/wire.py).
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.conditions import store
from isthmus.formats import get_format
from isthmus.formats.updates import delta
from isthmus.formats.updates.delta import WeightSet, apply, encode, read_message
from isthmus.formats.updates.version_folder import advance, next_versions, read_versions
from isthmus.formats.updates.wire import digest, pack, unpack
from isthmus.progress import Watch
from isthmus.recipe.read import load_recipe
from isthmus.run import RunFolder
from isthmus.stages import plan, qualify, steps

ROOT = Path(__file__).parents[1]
STEPS, FORM_ELEMENTS = 12, 8_000_000
FORMATS = ("w8a8", "bf16", "fp32")
SETTINGS = {
    "step.cold-start.steps": 120,
    "step.reasoning.steps": STEPS,
    "step.reasoning.prompts_per_step": 16,
    "step.reasoning.samples_per_prompt": 8,
    "step.reasoning.max_new_tokens": 96,
    "step.reasoning.heldout_problems": 8,
    "step.reasoning.snapshot_every": 1000,
    "data.teacher_give_up": 0.9,
    "qualify.matmul_size": 128,
    "qualify.memory_mib": 4,
    "qualify.repeats": 3,
    "qualify.pilot_steps": 2,
}
STEP_KEYS = ("update_bytes", "update_encode_s", "update_send_s", "update_apply_s", "sync_s", "train_s", "parity_s")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        prepare(root / "base")
        full = rl_run(root, "full", {"step.reasoning.update": "full"})
        changes = rl_run(root, "delta", {"step.reasoning.update": "delta"})
        published = root / "published"
        rl_run(root, "fp32", {"step.reasoning.rollout_format": "fp32", "step.reasoning.publish": published})
        check_same_learning(full, changes)
        in_run = {"full": means(full), "delta": means(changes)}
        rows = [row(name, published) for name in FORMATS]
    shapes = forms()
    show(rows, in_run, shapes)
    conditions = {"model": "r-nano", "steps": STEPS, "settings": SETTINGS}
    store("deltas", {**conditions, "run": in_run, "formats": rows, "forms": shapes})


def prepare(folder: Path) -> None:
    """Everything before RL, once."""
    run = RunFolder.create(folder, recipe({}))
    for stage in (qualify, plan):
        stage.execute(run, Watch())
    steps.execute(run, Watch(), name="cold-start")


def recipe(changes: dict[str, Any]) -> Any:
    settings = tuple(f"{name}={value}" for name, value in {**SETTINGS, **changes}.items())
    return load_recipe(ROOT / "recipes" / "tiny.toml", settings)


def rl_run(root: Path, name: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of the steps of one RL run."""
    folder = root / name
    shutil.copytree(root / "base", folder)
    (folder / "recipe.json").unlink()
    run = RunFolder.create(folder, recipe(changes))
    steps.execute(run, Watch(), name="reasoning")
    return run.events("reasoning", "step")


def check_same_learning(full: list[dict[str, Any]], changes: list[dict[str, Any]]) -> None:
    for one, other in zip(full, changes, strict=True):
        for key in ("weight_sha256", "reward", "loss"):
            assert one.get(key) == other.get(key), f"{key} of step {one['step']} depends on how weights cross"


def means(steps: list[dict[str, Any]]) -> dict[str, float | None]:
    """Medians over the steps."""
    found = {key: [step[key] for step in steps if step.get(key) is not None] for key in STEP_KEYS}
    return {key: statistics.median(values) if values else None for key, values in found.items()}


def versions(published: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The fp32 weights of every version, in order."""
    stored, held = read_versions(published), None
    first = stored[0]
    assert first.snapshot is not None
    held = advance(published, None, [first])[0]
    yield held.tensors
    while next_versions(stored, held):
        held = advance(published, held, stored)[0]
        yield held.tensors


def row(format_name: str, published: Path) -> dict[str, Any]:
    """Means per step of one format over the versions of the run."""
    chosen, architecture = get_format(format_name), recipe({}).model
    held: WeightSet | None = None
    sizes, encode_s, apply_s, full_s, hash_s, methods, full_bytes = [], [], [], [], [], {}, 0
    for version, state in enumerate(versions(published)):
        tensors = chosen.export(state, architecture)
        began = time.process_time()
        new = WeightSet.of(version, {name: tensor.clone() for name, tensor in tensors.items()})
        hash_s.append(time.process_time() - began)
        if held is not None:
            began = time.process_time()
            parts = encode(held, new)
            encoded = time.process_time()
            result = apply(held, parts)
            encode_s.append(encoded - began)
            apply_s.append(time.process_time() - encoded)
            assert result.sha256 == new.sha256, f"version {version} in {format_name} is not lossless"
            sizes.append(sum(map(len, parts)))
            for entry in read_message(parts[0]).header.entries:
                methods[entry.method] = methods.get(entry.method, 0) + 1
        full_bytes, seconds = full_update(tensors)
        full_s.append(seconds)
        held = new
    mean = statistics.mean
    return {
        "format": format_name,
        "versions": len(sizes),
        "full_bytes": full_bytes,
        "delta_bytes": mean(sizes),
        "smallest_delta_bytes": min(sizes),
        "largest_delta_bytes": max(sizes),
        "ratio": mean(sizes) / full_bytes,
        "encode_cpu_s": mean(encode_s),
        "hash_cpu_s": mean(hash_s),
        "apply_cpu_s": mean(apply_s),
        "full_cpu_s": mean(full_s),
        "methods": methods,
    }


def full_update(tensors: dict[str, torch.Tensor]) -> tuple[int, float]:
    """Bytes, and CPU seconds to pack, hash, check and unpack all weights."""
    began = time.process_time()
    payload = pack(tensors)
    unpack(payload, digest(payload))
    return len(payload), time.process_time() - began


def forms() -> list[dict[str, float]]:
    """Bytes per element of the sparse and the dense form, where a share of the elements moved up or down by one, and
    the rate of encoding and applying (bytes of weights per CPU second) with the form that delta.py chooses."""
    found = []
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.005, 0.02, 0.08, 0.25, 0.4, 0.6):
        old = torch.randint(-120, 120, (FORM_ELEMENTS,), dtype=torch.int8, generator=generator)
        moved = torch.rand(FORM_ELEMENTS, generator=generator) < share
        step = 1 - 2 * torch.randint(0, 2, (FORM_ELEMENTS,), generator=generator)
        base, new = WeightSet.of(0, {"t": old}), WeightSet.of(1, {"t": old + (moved * step).to(torch.int8)})
        row: dict[str, float] = {"share": share}
        for name, bounds in (("sparse", (2.0, 2.0)), ("dense", (-1.0, -1.0))):
            with mock.patch.multiple(delta, NEVER_SPARSE=bounds[0], ONLY_SPARSE=bounds[1]):
                row[name] = sum(map(len, encode(base, new))) / FORM_ELEMENTS
        began = time.process_time()
        parts = encode(base, new)
        encoded = time.process_time()
        assert apply(base, parts).sha256 == new.sha256
        row["encode_mb_per_s"] = FORM_ELEMENTS / (encoded - began) / 1e6
        row["apply_mb_per_s"] = FORM_ELEMENTS / (time.process_time() - encoded) / 1e6
        found.append(row)
    return found


def show(
    rows: list[dict[str, Any]], in_run: dict[str, dict[str, float | None]], shapes: list[dict[str, float]]
) -> None:
    print(f"{'moved':>6} {'sparse':>8} {'dense':>8}  bytes per int8 element")
    for one in shapes:
        print(
            f"{one['share']:>6} {one['sparse']:>8.4f} {one['dense']:>8.4f}  encode {one['encode_mb_per_s']:,.0f} MB/s"
        )
    print(f"{'format':>6} {'full':>11} {'delta':>11} {'ratio':>7} {'encode':>9} {'apply':>9} {'full cpu':>9}")
    for one in rows:
        print(
            f"{one['format']:>6} {one['full_bytes']:>11,} {one['delta_bytes']:>11,.0f} "
            f"{one['ratio']:>7.2%} {1e3 * one['encode_cpu_s']:>6.1f} ms {1e3 * one['apply_cpu_s']:>6.1f} ms "
            f"{1e3 * one['full_cpu_s']:>6.1f} ms"
        )
    for name, found in in_run.items():
        shown = "  ".join(f"{key} {value:,.4g}" for key, value in found.items() if value is not None)
        print(f"w8a8 run, {name} updates, medians per step: {shown}")


if __name__ == "__main__":
    main()
