"""The loop of the engine, in a thread of its own: admit, compute, draw, hand out.

Each pass runs one token for every row, or two where a draft is checked, and chunks of the prompts of newcomers.
Whatever changes what the loop sees (a request, an abort, new weights) is posted to it and done between two steps, so a
step never sees half a change.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import torch

from isthmus.engines import EngineError
from isthmus.engines.kept import Kept
from isthmus.engines.local.core.cache import blocks_for
from isthmus.engines.local.core.options import DEFAULT_OPTIONS
from isthmus.engines.local.core.replica import bits_of
from isthmus.engines.local.core.runner import Runner
from isthmus.engines.local.core.scheduler import Counters, Finished, Request, Sample, Scheduler
from isthmus.engines.local.core.steps import Steps
from isthmus.errors import IsthmusError
from isthmus.model.model import Model
from isthmus.recipe.schema import EngineOptions

CACHE_BYTES = 2 << 30
"""The cache takes no more than this unless it is told to, but always enough for one sequence of full length."""
REFUSALS = (IsthmusError, RuntimeError, MemoryError, AttributeError, TypeError, ValueError)
"""What a model that cannot be taken into use raises."""


class Core:
    """A model that answers requests. `length` bounds prompt and completion together, in tokens.

    `slots` bounds the samples that run at once. Raises EngineError for an option that does not fit the model.
    """

    def __init__(
        self,
        model: Model,
        *,
        eos_id: int,
        version: int = 0,
        slots: int = 256,
        length: int | None = None,
        threads: int = 1,
        options: EngineOptions = DEFAULT_OPTIONS,
    ):
        self.length = length or model.architecture.max_position_embeddings
        self.slots, self.threads = slots, threads
        if options.speculate and model.mtp_layer is None:
            raise EngineError("this model has no layer for multi-token prediction, which speculation needs")
        self.runner = Runner(
            model,
            self._blocks(model, options) + 1,
            options.block_size,
            drafts=options.speculate,
            row_by_row=options.batch_invariant,
            threads=threads,
            record_routes=options.record_routes,
        )
        self.scheduler = Scheduler(self.runner.store, options, slots=slots, length=self.length, eos_id=eos_id)
        self.steps = Steps(self.runner, self.scheduler, eos_id=eos_id, version=version, speculate=options.speculate)
        self.observers: list[Callable[[Finished], None]] = []
        self.failure: BaseException | None = None
        self._mail: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._door, self._stopping, self._ended, self._paused = threading.Lock(), False, False, False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def _blocks(self, model: Model, options: EngineOptions) -> int:
        """Blocks of the cache. Raises EngineError if it could not hold one sequence of full length."""
        size, layers = options.block_size, model.architecture.num_hidden_layers + options.speculate
        least = blocks_for(self.length, size)
        if options.cache_tokens is not None:
            if options.cache_tokens // size < least:
                raise EngineError(
                    f"a cache of {options.cache_tokens} tokens cannot hold one sequence of {self.length}; give it "
                    f"{least * size} or more, or shorten the sequences"
                )
            return options.cache_tokens // size
        block_bytes = model.architecture.cache_width * model.lm_head.weight.element_size() * layers * size
        return max(least, min(least * self.slots, CACHE_BYTES // block_bytes))

    @property
    def version(self) -> int:
        """Names the weights in use."""
        return self.steps.version

    @property
    def records_routes(self) -> bool:
        """Whether a request can ask for the experts of its tokens."""
        return self.runner.store.routes is not None

    @property
    def kernels(self) -> str:
        """`native`, or `torch` and why."""
        return self.runner.kernels

    @property
    def bits(self) -> str | None:
        """What decides the last bit of what it computes; None if the batch does too."""
        return bits_of(self.runner)

    @property
    def running(self) -> int:
        """Samples that have left the line."""
        return self.scheduler.running

    @property
    def waiting(self) -> int:
        """Samples in the line."""
        return len(self.scheduler.waiting)

    @property
    def cache_usage(self) -> float:
        """Share of the cache's blocks that sequences hold."""
        return self.scheduler.pool.used / self.scheduler.pool.total

    @property
    def counters(self) -> Counters:
        """Sums since the start."""
        return self.scheduler.counters

    @property
    def paused(self) -> bool:
        return self._paused

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the step in progress; whatever is unfinished is aborted."""
        self._post(self._halt)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, request: Request) -> None:
        """Put a request in the line. Its prompts must not be empty and must leave room for `max_new_tokens`."""
        assert all(len(p) > 0 and len(p) + request.max_new_tokens <= self.length for p in request.prompts)
        assert request.max_new_tokens > 0 or request.prompt_logprobs is not None
        if not self._post(lambda: self.scheduler.submit(request)):
            raise self._why_ended()

    def end(self, request: Request, choice: int | None = None, reason: str = "abort") -> None:
        """End a request, or one choice of it, and free what it holds. Finished samples stay finished."""
        self._post(lambda: self._end(request, choice, reason))

    def hold(self, request: Request) -> None:
        """Let nothing of a request run until `release`; it keeps what it has drawn, and gives its cache back."""
        self._post(lambda: self.scheduler.hold(request))

    def release(self, request: Request) -> None:
        """Let a held request go on."""
        self._post(lambda: self.scheduler.release(request))

    def swap(self, model: Model, version: int) -> None:
        """Exchange the weights between two steps; returns when it is done. Active samples go on with the new ones."""

        def exchange() -> None:
            self.runner.use(model)
            self.steps.version = version
            self.scheduler.forget_prefixes()

        self._between_steps(exchange)

    def pause(self) -> None:
        """Return when the step in progress is done. Nothing moves until `resume`; what runs keeps its place."""

        def hold() -> None:
            self._paused = True

        self._between_steps(hold)

    def resume(self) -> None:
        """Go on after a pause."""

        def go() -> None:
            self._paused = False

        self._between_steps(go)

    def step(self) -> None:
        """One turn of the loop: what was posted, then one pass if anything runs or may run."""
        while not self._mail.empty():
            self._mail.get()()
        if self._paused:
            return
        work = self.scheduler.schedule()
        if work or len(self.scheduler.rows):
            for ending in self.steps.run(work):
                self._tell_finished(*ending)
        for request in list(self.steps.deaf):
            self._end(request, None, "abort")

    def _tell_finished(
        self, sample: Sample, tokens: list[int], logprobs: list[float], reason: str, stop_token: int | None = None
    ) -> None:
        elapsed = time.perf_counter() - sample.arrived
        finished = Finished(
            sample.choice,
            tokens,
            logprobs,
            sample.top,
            reason,
            sample.version if sample.started else self.version,
            self.version,
            sample.first_token_s,
            elapsed,
            sample.cached_tokens,
            sample.prompt_tokens,
            stop_token,
            elapsed if sample.queued_s is None else sample.queued_s,
            sample.versions,
            sample.routes,
            Kept.of(sample.kept, self.runner.model.architecture.vocab_size) if sample.request.kept else None,
        )
        for observe in self.observers:
            observe(finished)
        self.steps.tell(sample.request, finished)

    def _end(self, request: Request, choice: int | None, reason: str) -> None:
        for sample in self.scheduler.withdraw(request, choice):
            self._tell_finished(sample, sample.tokens, sample.logprobs, reason)
        for row in reversed(range(len(self.scheduler.rows))):
            sample = self.scheduler.rows.samples[row]
            if sample.request is request and choice in (None, sample.choice):
                self._tell_finished(*self.steps.end(row, reason))

    def _between_steps(self, command: Callable[[], None]) -> None:
        """Have a command done by the loop, and wait for it. Its refusal is raised here, and the loop goes on.

        Raises EngineError if the loop has ended, ends with this command, or was never started.
        """
        if self._thread.ident is None:
            raise EngineError("the engine was not started")
        done, errors = threading.Event(), []

        def carry_out() -> None:
            try:
                command()
            except REFUSALS as error:
                errors.append(error)
            except BaseException as error:
                errors.append(EngineError(f"the engine has stopped: {error!r}"))
                raise
            finally:
                done.set()

        if not self._post(carry_out):
            raise self._why_ended()
        done.wait()
        if errors:
            raise errors[0]

    def _post(self, command: Callable[[], None]) -> bool:
        """Leave a command to the loop. False if it has ended; what was left before that is still done."""
        with self._door:
            if not self._ended:
                self._mail.put(command)
            return not self._ended

    def _why_ended(self) -> EngineError:
        return EngineError(f"the engine has stopped{f': {self.failure!r}' if self.failure else ''}")

    def _halt(self) -> None:
        self._stopping = True

    def _main(self) -> None:
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                self._loop()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self._end_all()

    def _loop(self) -> None:
        while not self._stopping:
            if self._paused or not (self.running or self.scheduler.waiting.is_moving):
                self._mail.get()()
            self.step()

    def _end_all(self) -> None:
        with self._door:
            self._ended = True
        while not self._mail.empty():
            self._mail.get()()
        scheduler = self.scheduler
        samples = [*scheduler.waiting, *scheduler.rows.samples, *(one for job in scheduler.jobs for one in job.samples)]
        for request in {sample.request for sample in samples}:
            self._end(request, None, "abort")
