"""The engine of a step: it generates on the pool that the plan chose for rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from isthmus.data.tokenizer import Tokenizer
from isthmus.engines import Engine
from isthmus.engines.elsewhere import open_fleet
from isthmus.engines.local import LocalEngine, report_kernels
from isthmus.engines.local.core.options import DEFAULT_OPTIONS
from isthmus.errors import IsthmusError
from isthmus.formats import get_format
from isthmus.formats.files.bundle import write_bundle
from isthmus.formats.updates.wire import digest, pack
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
) -> Iterator[Engine]:
    """An engine that has these weights in a format, under the rules of the pool's chip if that is rehearsed.

    On a pool elsewhere it is the engines there, taken together, with these weights as version 0.
    """
    bundle = bundle_of(work, weights, form, tokenizer)
    with engine_on(work, bundle, form, pool, threads, options) as engine:
        if pool.elsewhere:
            payload = pack(get_format(form).export(dict(weights), work.architecture))
            engine.update(payload, 0, digest(payload))
        yield engine


def bundle_of(work: StepRun[Any], weights: Mapping[str, Tensor], form: str, tokenizer: Tokenizer) -> Path:
    """These weights in a format, for the engines of a step to begin with."""
    bundle = work.folder / "rollout-bundle"
    write_bundle(bundle, form, weights, work.architecture, tokenizer)
    return bundle


@contextmanager
def engine_on(
    work: StepRun[Any], bundle: Path, form: str, pool: Pool, threads: int, options: EngineOptions = DEFAULT_OPTIONS
) -> Iterator[Engine]:
    """An engine on a pool that has read a bundle, or the engines there, which have weights of their own until some are
    brought. Raises EngineError if it cannot be had."""
    if pool.elsewhere:
        if options.record_routes:
            raise IsthmusError(
                f"step.{work.name} replays the experts of its samples, which engines elsewhere ({pool.name}) are not "
                "asked for; write loss.router_replay = false, or roll out on a pool that is here"
            )
        yield open_fleet(pool, bundle, form, work.event)
        return
    rehearse = pool.chip if pool.rehearsed else None
    log = work.folder / "engine.log"
    with LocalEngine(bundle, threads=threads, rehearse=rehearse, log=log, options=options) as engine:
        report_kernels(work.event, engine.kernels)
        yield engine
