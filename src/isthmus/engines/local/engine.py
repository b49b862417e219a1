"""The loop of the engine, in a thread of its own: admit, prefill, decode, draw, hand out.

Everything that changes what the loop sees (a request, an abort, new weights) is posted to it and done between two
steps, so a step never sees half a change.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isthmus.engines import EngineError
from isthmus.engines.local.runner import Runner
from isthmus.engines.local.sampler import draw, uniforms
from isthmus.engines.local.scheduler import Finished, Request, Sample, Scheduler, Token, TopLogprobs
from isthmus.model.model import Model


@dataclass
class Counters:
    """What the core has done so far; every number only grows. Prefix and draft numbers count tokens."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    steps: int = 0


class Core:
    """A model that answers requests. `length` bounds prompt and completion together, in tokens."""

    def __init__(
        self,
        model: Model,
        *,
        eos_id: int,
        version: int = 0,
        slots: int = 256,
        length: int | None = None,
        prefill_tokens: int = 8192,
        threads: int = 1,
    ):
        self.length = length or model.architecture.max_position_embeddings
        self.slots, self.eos_id, self.version, self.threads = slots, eos_id, version, threads
        self.runner = Runner(model, slots, self.length)
        self.scheduler = Scheduler(slots, self.length, prefill_tokens)
        self.observers: list[Callable[[Finished], None]] = []
        self.step_observers: list[Callable[[int], None]] = []
        self.counters = Counters()
        self.paused = False
        self.failure: BaseException | None = None
        self._mail: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    @property
    def running(self) -> int:
        """Active samples."""
        return len(self.scheduler.rows)

    @property
    def waiting(self) -> int:
        """Samples in the line."""
        return len(self.scheduler.waiting)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of the samples in the line."""
        return sum(len(sample.prompt_tokens) for sample in list(self.scheduler.waiting))

    @property
    def cache_usage(self) -> float:
        """Share of the cache that is in use, 0 to 1."""
        return self.running / self.slots

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
        self._raise_if_dead()
        self._post(lambda: self.scheduler.submit(request))

    def end(self, request: Request, choice: int | None = None, reason: str = "abort") -> None:
        """End a request, or one choice of it, and free what it holds. Finished samples stay finished."""
        self._post(lambda: self._end(request, choice, reason))

    def swap(self, model: Model, version: int) -> None:
        """Exchange the weights between two steps; returns when it is done. Active samples go on with the new ones."""

        def exchange() -> None:
            self.runner.model, self.version = model, version

        self._post_and_wait(exchange)

    def pause(self) -> None:
        """Stop between two steps; returns when the step in progress is done. What is submitted meanwhile waits."""
        self._post_and_wait(lambda: setattr(self, "paused", True))

    def resume(self) -> None:
        """Go on after a pause."""
        self._post(lambda: setattr(self, "paused", False))

    def step(self) -> None:
        """One turn of the loop: what was posted, a prefill if samples wait, then one token for every row."""
        while not self._mail.empty():
            self._mail.get()()
        if self.paused:
            return
        rows, computed = self.scheduler.rows, 0
        if self.scheduler.waiting:
            first = len(rows)
            admitted = self.scheduler.admit()
            if admitted:
                computed += sum(len(sample.prompt_tokens) for sample in admitted)
                self._prefill(admitted, first)
        if len(rows):
            computed += len(rows)
            positions = rows.positions()
            tokens = torch.from_numpy(rows.next_tokens())
            logits = self.runner.decode(tokens, torch.from_numpy(positions), int(positions.max()) + 1)
            self._hand_out(0, logits)
        self.counters.steps += 1
        for observer in self.step_observers:
            observer(computed)

    def _prefill(self, admitted: list[Sample], first: int) -> None:
        prompts: list[list[int]] = []
        prompt_of_slot: list[int] = []
        for sample in admitted:
            if not prompts or prompts[-1] is not sample.prompt_tokens:
                prompts.append(sample.prompt_tokens)
            prompt_of_slot.append(len(prompts) - 1)
        logits = self.runner.prefill(prompts, prompt_of_slot, first)
        now = time.perf_counter()
        for sample in admitted:
            sample.first_token_s, sample.version = now - sample.arrived, self.version
        self._hand_out(first, logits)

    def _hand_out(self, first: int, logits: Tensor) -> None:
        """Draw one token for each of the rows from `first` on, and finish those that end with it."""
        rows = self.scheduler.rows
        part = slice(first, first + len(logits))
        drawn = draw(
            logits.cpu(),
            torch.from_numpy(rows.temperature[part]),
            torch.from_numpy(rows.top_p[part]),
            torch.from_numpy(uniforms(rows.key[part], rows.drawn[part])),
        )
        tokens, logprobs = drawn.tokens.numpy(), drawn.logprobs.numpy()
        rows.record(first, tokens, logprobs)
        if rows.top_logprobs[part].any():
            self._record_top(first, drawn.distribution)
        if rows.streamed[part].any():
            self._stream(first, tokens, logprobs)
        broken = ~np.isfinite(logprobs)
        ended = broken | (tokens == self.eos_id) | (rows.drawn[part] >= rows.limit[part])
        for index in np.flatnonzero(ended)[::-1]:
            reason = "error" if broken[index] else "stop" if tokens[index] == self.eos_id else "length"
            self._finish(first + int(index), reason)

    def _record_top(self, first: int, distribution: Tensor) -> None:
        rows = self.scheduler.rows
        wanted = rows.top_logprobs[first : first + len(distribution)]
        values, tokens = distribution.topk(min(int(wanted.max()), distribution.shape[-1]), dim=-1)
        for index in np.flatnonzero(wanted):
            pairs = zip(tokens[index].tolist(), values[index].tolist(), strict=True)
            possible: TopLogprobs = [(token, value) for token, value in pairs if value > float("-inf")]
            rows.samples[first + int(index)].top.append(possible[: wanted[index]])

    def _stream(self, first: int, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        rows = self.scheduler.rows
        for index in np.flatnonzero(rows.streamed[first : first + len(tokens)]):
            sample = rows.samples[first + int(index)]
            top = sample.top[-1] if sample.top else []
            token = Token(sample.choice, int(tokens[index]), float(logprobs[index]), top, self.version)
            sample.request.listener(token)

    def _finish(self, row: int, reason: str) -> None:
        rows = self.scheduler.rows
        sample, drawn = rows.samples[row], rows.drawn[row]
        tokens, logprobs = rows.tokens[row, :drawn].tolist(), rows.logprobs[row, :drawn].tolist()
        if reason == "error":
            self.runner.cache.clear(row)
        moved = rows.remove(row)
        if moved is not None:
            self.runner.cache.move(moved, row, int(rows.positions()[row]))
        self._tell_finished(sample, tokens, logprobs, reason)

    def _tell_finished(self, sample: Sample, tokens: list[int], logprobs: list[float], reason: str) -> None:
        elapsed = time.perf_counter() - sample.arrived
        first_version = sample.version if tokens else self.version
        finished = Finished(
            sample.choice,
            tokens,
            logprobs,
            sample.top,
            reason,
            first_version,
            self.version,
            sample.first_token_s,
            elapsed,
        )
        for listener in (*self.observers, sample.request.listener):
            listener(finished)

    def _end(self, request: Request, choice: int | None, reason: str) -> None:
        for sample in self.scheduler.withdraw(request, choice):
            self._tell_finished(sample, [], [], reason)
        for row in reversed(range(self.running)):
            sample = self.scheduler.rows.samples[row]
            if sample.request is request and choice in (None, sample.choice):
                self._finish(row, reason)

    def _post_and_wait(self, command: Callable[[], None]) -> None:
        done = threading.Event()

        def run() -> None:
            command()
            done.set()

        self._post(run)
        while not done.wait(0.1):
            self._raise_if_dead()

    def _post(self, command: Callable[[], None]) -> None:
        self._mail.put(command)

    def _raise_if_dead(self) -> None:
        if self.failure is not None:
            raise EngineError(f"the engine has stopped: {self.failure!r}")

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
            if self.paused or (not self.running and not self.waiting):
                self._mail.get()()
            self.step()

    def _end_all(self) -> None:
        requests = {s.request for s in (*self.scheduler.waiting, *self.scheduler.rows.samples)}
        for request in requests:
            self._end(request, None, "abort")
