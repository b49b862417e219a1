"""How wrong forecasts are on published results: the table of errors by what is new, beside the naive medians."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from isthmus.chips import published_rows
from isthmus.errors import IsthmusError
from isthmus.forecast.published import Measured, Row, read_training, shipped_training
from isthmus.forecast.rl import read_steps
from isthmus.forecast.validate import (
    RL_NEW,
    TESTS,
    Outcome,
    Prediction,
    calibrated,
    decoding_errors,
    predictions,
    rl_predictions,
    summary,
)
from isthmus.lines import csv_rows, explain_csv_errors, read_text
from isthmus.progress import Watch

ONE_PROGRAM = "mbridge"
"""The source whose rows the published naive errors are of."""
COLUMNS = ("id", "stage", "model", "params_total", "params_active", "chip", "n_chips", "parallelism", "seq_len")
MORE_COLUMNS = ("global_batch", "precision", "metric", "value", "unit", "note")


@dataclass(frozen=True)
class Validation:
    """Errors by test over all targets and over one program's, of pools with two points, and the rows that were read."""

    rows: int
    training: int
    rl: int
    outcomes: list[Outcome]
    one_program: list[Outcome]
    two_points: float | None
    decoding: float
    predictions: list[Prediction]

    def as_json(self) -> dict[str, Any]:
        """Shares, not percent: an error of 0.1 is 10 %."""
        return {
            "rows": self.rows,
            "training_rows": self.training,
            "rl_rows": self.rl,
            "all": [{**asdict(one), "ratio": one.ratio} for one in self.outcomes],
            "one_program": [{**asdict(one), "ratio": one.ratio} for one in self.one_program],
            "two_points_median_error": self.two_points,
            "decoding_median_error": self.decoding,
            "predictions": [asdict(one) for one in self.predictions],
        }


def execute(watch: Watch, *, rows: Path | None, as_json: bool) -> Validation:
    """Predict the rows of a file, or those that come with the package, with whole groups left out, and print errors.

    What the forecast learns from are the package's rows alone, without those of the group of each target.
    """
    table: Sequence[Row] = published_rows("results") if rows is None else read_rows(rows)
    targets, steps = read_training(table), read_steps(table)
    if not targets and not steps:
        raise IsthmusError(f"{rows or 'the table'} has no row of training or RL with a known device, model and unit")
    found: list[Prediction] = []
    for test in TESTS:
        found += predictions(test, targets, shipped_training())
    own = read_steps(published_rows("results"))
    for new in RL_NEW:
        found += rl_predictions(steps, own, new)
    validation = Validation(
        rows=len(table),
        training=len(targets),
        rl=len(steps),
        outcomes=_outcomes(found, None),
        one_program=_outcomes(found, {one.id for one in targets if one.setting.source == ONE_PROGRAM}),
        two_points=_two_points(targets),
        decoding=statistics.median(abs(one) for one in decoding_errors(published_rows("decoding"))),
        predictions=found,
    )
    if as_json:
        watch.console.print_json(json.dumps(validation.as_json()))
    else:
        watch.console.print(_render(validation))
    return validation


def _two_points(targets: Sequence[Measured]) -> float | None:
    errors = calibrated(targets)
    return statistics.median(abs(one) for one in errors) if errors else None


def _outcomes(found: Sequence[Prediction], ids: set[str] | None) -> list[Outcome]:
    names = dict.fromkeys(one.test for one in found)
    chosen = [
        summary(name, [one for one in found if one.test == name and (ids is None or one.id in ids)]) for name in names
    ]
    return [one for one in chosen if one is not None]


def read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with explain_csv_errors(path):
            rows = csv_rows(read_text(path))
    except FileNotFoundError:
        raise IsthmusError(f"no table of published results at {path}") from None
    missing = [name for name in (*COLUMNS, *MORE_COLUMNS) if rows and name not in rows[0]]
    if missing or not rows:
        what = f"lacks the columns {', '.join(missing)}" if missing else "has no rows"
        raise IsthmusError(f"{path} {what}; its first line has to name {', '.join((*COLUMNS, *MORE_COLUMNS))}, source")
    return [{key: value or "" for key, value in row.items() if key} for row in rows]


def _render(found: Validation) -> Table:
    title = f"{found.training} training and {found.rl} RL results of {found.rows} rows, whole groups left out"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for column in ("what is new", "results", "naive median", "ours", "ratio", "mean", "P90", "80 % interval covers"):
        table.add_column(column, justify="left" if column == "what is new" else "right")
    for heading, outcomes in (("", found.outcomes), (", one program", found.one_program)):
        for one in outcomes:
            table.add_row(
                one.name + heading,
                str(one.targets),
                f"{one.naive:.1%}",
                f"{one.median:.1%}",
                f"{one.ratio:.2f}",
                f"{one.mean:.1%}",
                f"{one.p90:.1%}",
                f"{one.coverage:.0%}",
            )
    if found.two_points is not None:
        table.add_row("two points on the pool", "", "", f"{found.two_points:.1%}", "", "", "", "")
    decoding = len(published_rows("decoding"))
    table.add_row("decoding, in sample", f"{decoding:,}", "", f"{found.decoding:.1%}", "", "", "", "")
    return table
