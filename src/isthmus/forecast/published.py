"""Published results, read row by row into settings and what was measured. The columns are those of results.csv."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from isthmus.chips import published_rows
from isthmus.forecast.device import Device, published_device
from isthmus.forecast.setting import ModelShape, Setting

Row = Mapping[str, str]
_RELEASE = re.compile(r"(\d\d)\.(\d\d)(\.\d\d)? NeMo Container")
# When the program that a source measured was current, in years since 2000, where its rows do not name a release.
_SOFTWARE = {
    "mlperf-v4.0": 24.4,
    "mlperf-v4.1": 24.8,
    "mlperf-v5.0": 25.4,
    "mlperf-v5.1": 25.8,
    "mosaic": 23.8,
    "titan": 25.2,
    "l3": 24.2,
    "megatron": 22.3,
    "bloom": 22.3,
    "maxtext": 25.3,
    "mlm": 24.5,
}
_TRAINING_UNITS = {"throughput": "tokens/s/chip", "throughput_incl_eval": "tokens/s/chip"}


@dataclass(frozen=True)
class Measured:
    """A published training result: tokens per second and device in a setting."""

    id: str
    setting: Setting
    tokens_per_s: float

    @property
    def mfu(self) -> float:
        """Model FLOPs over the dense peak at the stated precision, by the counts used here."""
        return self.tokens_per_s * self.setting.flops_per_token / self.setting.peak

    @property
    def framework(self) -> str:
        return self.setting.source


@functools.cache
def shipped_training() -> tuple[Measured, ...]:
    """The training results that come with the package."""
    return tuple(read_training(published_rows("results")))


def read_training(rows: Iterable[Row]) -> list[Measured]:
    """The rows that are training results of a known device, with a precision that it has a peak for."""
    return [measured for row in rows if (measured := _training(row)) is not None]


def _training(row: Row) -> Measured | None:
    if row["stage"] not in ("train", "sft") or "bubble-free bound" in row["note"]:
        return None
    model, device, precision = shape_named(row), published_device(row["chip"]), _precision(row)
    count = _number(row["n_chips"]) or 64.0
    if model is None or device is None or precision is None or device.peak(precision) is None:
        return None
    setting = _setting(row, model, device, int(count), precision)
    tokens = _tokens_per_s(row, setting)
    return None if tokens is None else Measured(row["id"], setting, tokens)


def _setting(row: Row, model: ModelShape, device: Device, count: int, precision: str) -> Setting:
    layout, note = row["parallelism"], row["note"]
    return Setting(
        model=model,
        device=device,
        count=count,
        precision=precision,
        source=_source(row),
        recipe=row["precision"].split(" (")[0],
        row_length=_number(row["seq_len"]),
        batch_rows=_number(row["global_batch"]),
        tensor=_size(layout, "TP"),
        pipeline=_size(layout, "PP"),
        stages_per_rank=_virtual_stages(layout),
        context=_size(layout, "CP"),
        expert=_size(layout, "EP"),
        microbatch=_size(layout, "MBS"),
        accumulation=_size(layout, "GA"),
        sharded="FSDP" in layout,
        checkpointing="act-ckpt=True" in layout or "full AC" in layout or "full recompute" in note,
        software=_software(row),
        layout=layout,
    )


def _tokens_per_s(row: Row, setting: Setting) -> float | None:
    value, metric, unit = _number(row["value"]), row["metric"], row["unit"]
    if value is None or value <= 0.0:
        return None
    if _TRAINING_UNITS.get(metric) == unit:
        return value
    if metric == "throughput_total" and unit == "tokens/s":
        return value / setting.count
    source = _source(row)
    if metric == "iteration_time" and source in ("megatron", "bloom") and setting.row_length and setting.batch_rows:
        return setting.batch_rows * setting.row_length / setting.count / value
    if metric == "model_tflops" and source == "l3":
        return value * 1e12 / setting.flops_per_token
    if metric == "mfu" and source == "mlm":
        return value / 100.0 * setting.peak / setting.flops_per_token
    return None


def shape_named(row: Row) -> ModelShape | None:
    """The shape of the model that a row names: a known one, or by its parameters; None if it gives none."""
    name = row["model"].lower()
    known = next((shape for pattern, shape in _models() if pattern.search(name)), None)
    if known is not None:
        return known
    total, active = _number(row["params_total"]), _number(row["params_active"])
    if total is None or active is None:
        return None
    hidden = max(512.0, 4.6 * (active / 12.0) ** (1.0 / 3.0))
    layers = active / (12.0 * hidden**2)
    mixture = total > 1.5 * active
    return ModelShape(name, total, active, layers, hidden, 2.0 * hidden, 8.0 * mixture, float(mixture))


@functools.cache
def _models() -> tuple[tuple[re.Pattern[str], ModelShape], ...]:
    return tuple(
        (
            re.compile(row["pattern"]),
            ModelShape(
                row["name"],
                *(float(row[key]) for key in ("total", "active", "layers", "hidden", "attention_width")),
                experts_per_token=float(row["experts_per_token"]),
                sparse_share=float(row["sparse_share"]),
            ),
        )
        for row in published_rows("models")
    )


def _source(row: Row) -> str:
    return row["id"].split("-")[0]


def _precision(row: Row) -> str | None:
    text = row["precision"].upper()
    for name, words in (("FP4", ("FP4",)), ("FP8", ("FP8",)), ("BF16", ("BF16", "FP16"))):
        if any(word in text for word in words):
            return name
    return "FP8" if _source(row) == "mlperf" else None


def _software(row: Row) -> float | None:
    release = _RELEASE.search(row["note"])
    if release is not None:
        return float(release[1]) + (float(release[2]) - 1.0) / 12.0 + (0.02 if release[3] else 0.0)
    return next((year for start, year in _SOFTWARE.items() if row["id"].startswith(start)), None)


def _virtual_stages(layout: str) -> float | None:
    """As stated; four where a source names its pipeline in prose, as TP8 PP16, and not how it interleaves."""
    stated = _size(layout, "VP")
    return 4.0 if stated is None and re.search(r"\bPP\d", layout) else stated


def _size(layout: str, name: str) -> float | None:
    found = re.search(rf"\b{name}=?(\d+(?:\.\d+)?)", layout, re.IGNORECASE)
    return float(found[1]) if found else None


def _number(text: str) -> float | None:
    found = re.match(r"\s*(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    value = float(found[1]) if found else None
    return value if value is not None and math.isfinite(value) else None
