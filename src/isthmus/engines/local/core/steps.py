"""One step of the engine: a pass through the model, what is drawn from it, and what is guessed ahead."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isthmus.engines.local.core.batch import Chunk, Singles, StepBatch
from isthmus.engines.local.core.cache import places_of
from isthmus.engines.local.core.runner import Runner
from isthmus.engines.local.core.sampler import Adjustment, Draw, adjust, draw, kept_sets, uniforms
from isthmus.engines.local.core.scheduler import (
    Counters,
    Finished,
    Job,
    PromptToken,
    Request,
    Sample,
    Scheduler,
    Token,
    TopLogprobs,
)

DRAFTING_ROWS = 8
"""With more rows than this a pass is bound by arithmetic, and a second token per row costs more than a draft saves."""
CONSTRAINT_ERRORS = (ValueError, RuntimeError)
"""What a constraint raises that cannot go on; its sample ends, the others go on."""
logger = logging.getLogger(__name__)


class Ending(NamedTuple):
    """A sample that is done: its tokens, why it ended, and the stop token that ended it, if one did."""

    sample: Sample
    tokens: list[int]
    logprobs: list[float]
    reason: str
    stop_token: int | None


class Step:
    """What happens to rows in one step.

    `places` has, for each row, the place in the pass of its last computed token, and `last` that token's position. The
    rows `checked` had a right draft, which was computed at `checked_places`.
    """

    def __init__(self, work: list[tuple[Job, int]], last: NDArray[np.int64]):
        self.work, self.last, self.plain = work, last, len(last)
        self.places = np.arange(self.plain)
        self.checked = self.checked_places = np.zeros(0, dtype=np.int64)
        self.ended: dict[int, str] = {}
        self.stopped_by: dict[int, int] = {}

    def add(self, rows: list[int], place: int, last: int) -> None:
        """New rows, which follow those that are here."""
        self.places = np.concatenate((self.places, np.full(len(rows), place)))
        self.last = np.concatenate((self.last, np.full(len(rows), last)))

    def alive(self) -> NDArray[np.int64]:
        """Rows that have not ended, in order."""
        return np.array([row for row in range(len(self.places)) if row not in self.ended], dtype=np.int64)


class Steps:
    """Carries out what the scheduler decides. `version` names the weights in use.

    With `speculate`, multi-token prediction drafts tokens. `observers` are told how many tokens each pass computed.
    `deaf` requests are those whose listener has raised: it is not called again, and they have to be ended.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, *, eos_id: int, version: int, speculate: bool):
        self.runner, self.scheduler = runner, scheduler
        self.eos_id, self.version, self.speculate = eos_id, version, speculate
        self.observers: list[Callable[[int], None]] = []
        self.deaf: WeakSet[Request] = WeakSet()

    def run(self, work: list[tuple[Job, int]]) -> list[Ending]:
        """Compute what is scheduled beside the rows, draw, guess, and end what is done."""
        self._counters.steps += 1
        for job in self.scheduler.jobs:
            job.version = self.version if job.version is None else job.version
        singles, drafting = self._singles()
        chunks = [
            Chunk(job.sequence[job.computed : job.computed + count], job.computed, np.array(job.table, dtype=np.int32))
            for job, count in work
        ]
        batch = StepBatch(singles, chunks, self.runner.store)
        hidden = self.runner.hidden(batch)
        step = Step(work, self.scheduler.rows.totals() - 1)
        for (job, count), part in zip(work, batch.chunk_rows, strict=True):
            if job.wants_prompt:
                self._read_prompt(job, count, hidden[part])
            self._advance(job, count, part.stop - 1, step)
        places = np.concatenate((step.places, step.plain + np.arange(len(drafting))))
        logits = self._logits(hidden, places)
        self._draw(step.alive(), logits[: len(step.places)], step)
        self._check_drafts(drafting, logits[len(step.places) :], step)
        self.scheduler.register_rows()
        if self.speculate:
            self._guess(hidden, batch, step)
        for observe in self.observers:
            observe(len(batch))
        ended = sorted(step.ended, reverse=True)
        return [self.end(row, step.ended[row], step.stopped_by.get(row)) for row in ended]

    @property
    def _counters(self) -> Counters:
        return self.scheduler.counters

    def _singles(self) -> tuple[Singles, NDArray[np.int64]]:
        """The last token of every row, and behind these the drafts; and the rows that have one."""
        rows = self.scheduler.rows
        active, last = np.arange(len(rows)), rows.totals() - 1
        drafting = np.flatnonzero(rows.draft[: len(rows)] >= 0)
        tokens = np.concatenate((rows.tokens[active, last].astype(np.int64), rows.draft[drafting]))
        tables = rows.tables[: len(rows)]
        if len(drafting):
            tables = np.concatenate((tables, tables[drafting]))
        return Singles(tokens, np.concatenate((last, last[drafting] + 1)), tables), drafting

    def _advance(self, job: Job, count: int, last_place: int, step: Step) -> None:
        """Note what is computed of a job; if that is all, its samples become rows, which the pass has logits for."""
        self.scheduler.advance(job, count)
        if job.remaining:
            return
        now = time.perf_counter()
        new = self.scheduler.finish_job(job)
        step.add(new, last_place, len(job.sequence) - 1)
        for row in new:
            sample = self.scheduler.rows.samples[row]
            if not sample.started:
                assert job.version is not None
                sample.started, sample.first_token_s, sample.version = True, now - sample.arrived, job.version
            if sample.request.max_new_tokens == 0:
                step.ended[row] = "length" if _are_numbers(job.prompt_tokens) else "error"

    def _logits(self, hidden: Tensor, places: NDArray[np.int64]) -> Tensor:
        if not np.array_equal(places, np.arange(len(hidden))):
            hidden = hidden.index_select(0, torch.from_numpy(places).to(hidden.device))
        return self.runner.logits(hidden).cpu()

    def _read_prompt(self, job: Job, count: int, hidden: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow those of a chunk."""
        sample, first = job.samples[0], job.computed + 1
        if first == 1:
            job.prompt_tokens = [PromptToken(int(job.sequence[0]), None, [])]
        following = torch.from_numpy(job.sequence[first : first + count])
        if len(following):
            job.prompt_tokens += self._following(following, hidden, sample.request.prompt_logprobs or 0)
        if first + count > len(job.sequence):
            sample.prompt_tokens = job.prompt_tokens

    def _following(self, following: Tensor, hidden: Tensor, alternatives: int) -> list[PromptToken]:
        """Log-probability and rank of each of these tokens by the state before it."""
        distribution = torch.log_softmax(self.runner.logits(hidden[: len(following)]).float().cpu(), dim=-1)
        own = distribution.gather(-1, following.unsqueeze(1)).squeeze(1)
        ranks = (distribution > own.unsqueeze(1)).sum(-1) + 1
        tops = _likeliest(distribution, np.full(len(following), alternatives))
        columns = zip(following.tolist(), own.tolist(), tops, ranks.tolist(), strict=True)
        return [PromptToken(*column) for column in columns]

    def _draw(self, rows: NDArray[np.int64], logits: Tensor, step: Step) -> None:
        """Draw one token for each of these rows from its logits, hand it out, and note which rows end with it."""
        if not len(rows):
            return
        table = self.scheduler.rows
        if len(rows) != len(logits):
            logits = logits[rows]
        for index in np.flatnonzero(table.special[rows]):
            row = int(rows[index])
            try:
                change = self._adjustment(row)
            except CONSTRAINT_ERRORS:
                self._note_failed_constraint(row, step)
                continue
            adjust(logits[index], change, self._prompt_of(row), table.generated(row))
        drawn = self._drawn(rows, logits)
        tokens, logprobs = drawn.tokens.numpy(), drawn.logprobs.numpy()
        table.record(rows, tokens, logprobs, self.version)
        if table.top_logprobs[rows].any():
            tops = _likeliest(drawn.distribution, table.top_logprobs[rows])
            for index in np.flatnonzero(table.top_logprobs[rows]):
                table.samples[rows[index]].top.append(tops[index])
        if len(telling := np.flatnonzero(table.tells_kept[rows])):
            for index, one in zip(telling, kept_sets(drawn.distribution[telling]), strict=True):
                table.samples[rows[index]].kept.append(one)
        broken = ~np.isfinite(logprobs) | np.isin(rows, list(step.ended))
        if table.streamed[rows].any():
            self._stream(rows[~broken], tokens[~broken], logprobs[~broken])
        self._note_ends(rows, tokens, broken, step)

    def _drawn(self, rows: NDArray[np.int64], logits: Tensor) -> Draw:
        """One draw for each of these rows from logits [len(rows), V], with the row's options and random numbers."""
        if self.runner.row_by_row and len(rows) > 1:
            parts = [self._drawn(rows[i : i + 1], logits[i : i + 1]) for i in range(len(rows))]
            return Draw(*map(torch.cat, zip(*parts, strict=True)))
        table = self.scheduler.rows
        return draw(
            logits,
            torch.from_numpy(table.temperature[rows]),
            torch.from_numpy(table.top_p[rows]),
            torch.from_numpy(uniforms(table.key[rows], table.drawn[rows])),
            torch.from_numpy(table.top_k[rows]),
            torch.from_numpy(table.min_p[rows]),
        )

    def _note_ends(
        self, rows: NDArray[np.int64], tokens: NDArray[np.int64], broken: NDArray[np.bool_], step: Step
    ) -> None:
        table = self.scheduler.rows
        closed = tokens == table.eos[rows]
        for index in np.flatnonzero(table.special[rows] & ~broken):
            row, token = int(rows[index]), int(tokens[index])
            sample = table.samples[row]
            if token in sample.request.stop_tokens:
                closed[index], step.stopped_by[row] = True, token
            elif sample.constraint is not None and not closed[index]:
                try:
                    sample.constraint.accept(token)
                    closed[index] = sample.constraint.done
                except CONSTRAINT_ERRORS:
                    self._note_failed_constraint(row, step)
                    broken[index] = True
        for index in np.flatnonzero(broken | closed | (table.drawn[rows] >= table.limit[rows])):
            step.ended[int(rows[index])] = "error" if broken[index] else "stop" if closed[index] else "length"

    def _check_drafts(self, drafting: NDArray[np.int64], logits: Tensor, step: Step) -> None:
        """Rows whose draft is what they drew have their second token in the same pass.

        What is drawn does not depend on the draft, so neither does the distribution of what is generated.
        """
        table = self.scheduler.rows
        drawn = table.tokens[drafting, step.last[drafting] + 1]
        alive = np.array([int(row) not in step.ended for row in drafting], dtype=bool)
        right = np.flatnonzero(alive & (drawn == table.draft[drafting]))
        table.draft[: len(table)] = -1
        self._counters.draft_tokens += len(drafting)
        self._counters.accepted_draft_tokens += len(right)
        step.checked, step.checked_places = drafting[right], step.plain + right
        self._draw(step.checked, logits[torch.from_numpy(right)], step)

    def _guess(self, hidden: Tensor, batch: StepBatch, step: Step) -> None:
        """Let multi-token prediction draft the token after the one that each row has just drawn.

        Its own cache gets an entry for every token whose next one is known by now.
        """
        table, alive = self.scheduler.rows, step.alive()
        if len(alive) > DRAFTING_ROWS:
            return
        again = np.flatnonzero(np.isin(step.checked, alive))
        rows = np.concatenate((alive, step.checked[again]))
        positions = np.concatenate((step.last[alive], step.last[step.checked[again]] + 1))
        places = [step.places[alive], step.checked_places[again]]
        chunks = []
        for (job, count), part in zip(step.work, batch.chunk_rows, strict=True):
            first = job.computed - count
            following = job.sequence[first + 1 : first + count + 1]
            if len(following):
                chunks.append(Chunk(following, first, np.array(job.table, dtype=np.int32)))
                places.append(np.arange(part.start, part.start + len(following)))
        if not len(rows) and not chunks:
            return
        singles = Singles(table.tokens[rows, positions + 1].astype(np.int64), positions, table.tables[rows])
        source = torch.from_numpy(np.concatenate(places)).to(hidden.device)
        states = self.runner.draft_states(hidden[source], StepBatch(singles, chunks, self.runner.store))
        if not len(alive):
            return
        newest = np.arange(len(alive))
        newest[np.searchsorted(alive, step.checked[again])] = len(alive) + np.arange(len(again))
        self.draft(alive, self.runner.head(states[torch.from_numpy(newest).to(states.device)]).cpu())

    def draft(self, rows: NDArray[np.int64], logits: Tensor) -> None:
        """Draft with the random numbers that will draw the token: where both distributions agree, so do the tokens."""
        table = self.scheduler.rows
        guessed = self._drawn(rows, logits)
        wanted = table.limit[rows] - table.drawn[rows] >= 2
        table.draft[rows] = np.where(wanted & np.isfinite(guessed.logprobs.numpy()), guessed.tokens.numpy(), -1)

    def _adjustment(self, row: int) -> Adjustment:
        table = self.scheduler.rows
        sample = table.samples[row]
        request = sample.request
        if request.constraint is not None and sample.constraint is None:
            sample.constraint = request.constraint.start()
        too_early = table.drawn[row] < request.min_tokens
        return Adjustment(
            request.presence_penalty,
            request.frequency_penalty,
            request.repetition_penalty,
            request.logit_bias,
            [*request.stop_tokens, *([self.eos_id] if table.eos[row] >= 0 else [])] if too_early else [],
            sample.constraint.mask() if sample.constraint else None,
        )

    def _prompt_of(self, row: int) -> NDArray[np.int32]:
        table = self.scheduler.rows
        return table.tokens[row, : table.prompt_length[row]]

    def _stream(self, rows: NDArray[np.int64], tokens: NDArray[np.int64], logprobs: NDArray[np.float32]) -> None:
        table = self.scheduler.rows
        for index in np.flatnonzero(table.streamed[rows]):
            sample = table.samples[rows[index]]
            top = sample.top[-1] if sample.top else []
            token = Token(sample.choice, int(tokens[index]), float(logprobs[index]), top, self.version)
            self.tell(sample.request, token)

    def tell(self, request: Request, event: Token | Finished) -> None:
        """Call the listener of a request. If it raises RuntimeError, as an event loop does that has ended, that is
        logged and the request deaf; the others go on."""
        if request in self.deaf:
            return
        try:
            request.listener(event)
        except RuntimeError:
            logger.exception("the listener of a request failed; the request is ended")
            self.deaf.add(request)

    def _note_failed_constraint(self, row: int, step: Step) -> None:
        """To be called where an exception is handled."""
        logger.exception("the constraint of a sample failed; the sample is ended")
        step.ended[row] = "error"

    def end(self, row: int, reason: str, stop_token: int | None = None) -> Ending:
        """Drop a row and give back what it holds."""
        table = self.scheduler.rows
        sample = table.samples[row]
        tokens, logprobs = table.generated(row).tolist(), table.logprobs[row, : table.drawn[row]].tolist()
        sample.versions = table.versions[row, : table.drawn[row]].tolist()
        if sample.request.routes:
            sample.routes = self._routes(row)
        self.scheduler.remove_row(row, damaged=reason == "error")
        return Ending(sample, tokens, logprobs, reason, stop_token)

    def _routes(self, row: int) -> NDArray[np.int16]:
        """The experts of a row's tokens but the last, which is in no cache."""
        table, store = self.scheduler.rows, self.runner.store
        assert store.routes is not None
        positions = np.arange(table.prompt_length[row] + table.drawn[row] - 1)
        return store.routes[places_of(table.tables[row], positions, store.block_size)]


def _are_numbers(tokens: list[PromptToken]) -> bool:
    return not any(token.logprob is not None and math.isnan(token.logprob) for token in tokens)


def _likeliest(distribution: Tensor, wanted: NDArray[np.int64]) -> list[TopLogprobs]:
    """The likeliest tokens of each row of distribution [B, V], as many as `wanted` [B] says; no impossible ones."""
    values, tokens = distribution.topk(min(int(wanted.max()), distribution.shape[-1]), dim=-1)
    columns = zip(tokens.tolist(), values.tolist(), wanted, strict=True)
    return [
        [(token, value) for token, value in zip(row[:count], own[:count], strict=True) if value > float("-inf")]
        for row, own, count in columns
    ]
