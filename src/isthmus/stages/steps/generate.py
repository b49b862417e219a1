"""The engine of a step: it generates on the pool that the plan chose for rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local import LocalEngine, report_kernels
from isthmus.engines.local.core.options import DEFAULT_OPTIONS
from isthmus.formats.files.bundle import write_bundle
from isthmus.pools import Pool
from isthmus.recipe.schema import EngineOptions
from isthmus.stages.steps.step import StepRun


@contextmanager
def open_engine(
    work: StepRun[Any],
    weights: Mapping[str, Tensor],
    form: str,
    tokenizer: Tokenizer,
    pool: Pool,
    threads: int,
    options: EngineOptions = DEFAULT_OPTIONS,
) -> Iterator[LocalEngine]:
    """An engine that has these weights in a format, under the rules of the pool's chip if that is rehearsed."""
    bundle = work.folder / "rollout-bundle"
    write_bundle(bundle, form, weights, work.architecture, tokenizer)
    rehearse = pool.chip if pool.rehearsed else None
    log = work.folder / "engine.log"
    with LocalEngine(bundle, threads=threads, rehearse=rehearse, log=log, options=options) as engine:
        report_kernels(work.event, engine.kernels)
        yield engine
