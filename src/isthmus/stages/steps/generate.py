"""The engine of a step: it generates on the pool that the plan chose for rollouts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from isthmus.data.tokenizer import Tokenizer
from isthmus.engines import Engine, EngineError
from isthmus.engines.elsewhere import open_fleet
from isthmus.engines.fleet import Fleet
from isthmus.engines.local import LocalEngine, report_kernels
from isthmus.engines.local.core.options import DEFAULT_OPTIONS
from isthmus.errors import EnginesLost
from isthmus.formats import get_format
from isthmus.formats.files.bundle import write_bundle
from isthmus.formats.updates.wire import digest, pack
from isthmus.nodes import launcher_of
from isthmus.pools import Pool
from isthmus.recipe.schema import EngineOptions
from isthmus.stages.steps.step import StepRun

NOTICED_S, LOOK_S = 20.0, 0.2
"""Until the loss of a node is noticed, and between two looks."""


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

    On a pool elsewhere, or on nodes of a cluster, it is the engines there, taken together. Those elsewhere get these
    weights as version 0. Raises EnginesLost if none of those that it started on nodes is left.
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
        yield open_fleet(pool, bundle, form, work.event, routes=options.record_routes)
        return
    if pool.nodes is not None:
        with _on_nodes(work, bundle, pool, threads, options) as fleet:
            yield fleet
        return
    rehearse = pool.chip if pool.rehearsed else None
    log = work.folder / "engine.log"
    with LocalEngine(bundle, threads=threads, rehearse=rehearse, log=log, options=options) as engine:
        report_kernels(work.event, engine.kernels)
        yield engine


@contextmanager
def _on_nodes(work: StepRun[Any], bundle: Path, pool: Pool, threads: int, options: EngineOptions) -> Iterator[Fleet]:
    """An engine for each chip of the pool, each started on a node of it, and replaced if it is lost."""
    assert pool.nodes is not None
    engines = [
        LocalEngine(
            bundle.absolute(),
            threads=threads,
            log=work.folder / f"engine-{number}.log",
            options=options,
            launcher=launcher_of(pool, work.run.path, f"{work.name}-engine-{number}", follows_input=True),
            node_s=pool.nodes.wait_s,
        )
        for number in range(pool.count)
    ]
    fleet = Fleet(engines, work.event)
    try:
        fleet.start(bundle)
        for engine in engines:
            report_kernels(work.event, engine.kernels)
        work.event("engines", engines=[f"{engine.url}: {engine.server}" for engine in engines])
        with _lost_if_gone(pool, engines):
            yield fleet
    finally:
        fleet.stop()


@contextmanager
def _lost_if_gone(pool: Pool, engines: Sequence[LocalEngine]) -> Iterator[None]:
    """An error of engines none of which is there any more is one that others, started anew, may not have."""
    try:
        yield
    except EngineError as error:
        end = time.monotonic() + NOTICED_S
        while any(engine.is_there for engine in engines) and time.monotonic() < end:
            time.sleep(LOOK_S)
        if any(engine.is_there for engine in engines):
            raise
        raise EnginesLost(f"all engines of the pool {pool.name!r} are gone: {error}") from error
