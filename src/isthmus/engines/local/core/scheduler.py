"""Who runs, and in which blocks of the cache.

A sample waits in the line, then its prompt is computed by a job, in chunks, and then it is a row that draws tokens. A
job may serve several samples of one prompt. If blocks run out, whoever came last goes back to the line with all it has
drawn, and is computed again when there is room.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from isthmus.engines.kept import Kept, KeptSet
from isthmus.engines.local.core.cache import NULL_BLOCK, BlockPool, PagedStore, blocks_for, chained_digest
from isthmus.engines.local.core.line import Line, Shares
from isthmus.engines.local.core.sampler import stream_key
from isthmus.recipe.schema import EngineOptions

TopLogprobs = list[tuple[int, float]]
PATIENCE_S = 0.1
"""Seconds for which a request of which nothing runs waits for a place before another has to give one up."""


class Token(NamedTuple):
    """One token of a streamed sample, as it is drawn."""

    choice: int
    token: int
    logprob: float
    top: TopLogprobs
    version: int


class PromptToken(NamedTuple):
    """A token of a prompt: its log-probability under the model given those before it, and the likeliest tokens there.

    `rank` is 1 for the likeliest. The first token has neither, and no alternatives.
    """

    token: int
    logprob: float | None
    top: TopLogprobs
    rank: int | None = None


class Finished(NamedTuple):
    """The end of a sample, with all of it. `finish_reason` is stop, length, abort or error.

    `first_token_s`, `elapsed_s` and `queued_s`, the time in the line, count seconds from the submission.
    `cached_tokens` of the prompt were taken from the prefix cache. `prompt_tokens` is filled where the request asked
    for `prompt_logprobs`, in the first sample of each prompt. `stop_token` is the token of `Request.stop_tokens` that
    ended the sample, if one did. `versions` has that of the weights which wrote each token. `routes` [T - 1, R], where
    the request asked for them, has the experts of all layers for each of its T tokens, prompt and drawn, but the last,
    and `kept`, likewise, the tokens that each of its own was drawn among.
    """

    choice: int
    tokens: list[int]
    logprobs: list[float]
    top: list[TopLogprobs]
    finish_reason: str
    version: int
    last_version: int
    first_token_s: float
    elapsed_s: float
    cached_tokens: int = 0
    prompt_tokens: list[PromptToken] | None = None
    stop_token: int | None = None
    queued_s: float = 0.0
    versions: list[int] | None = None
    routes: NDArray[np.int16] | None = None
    kept: Kept | None = None


class ConstraintState(Protocol):
    """How far one sample is in what its constraint allows. Called from the engine's thread."""

    def mask(self) -> NDArray[np.bool_] | None:
        """[V]: True where the next token may be that one; None where every token may."""
        ...

    def accept(self, token: int) -> None:
        """The token that was drawn. The end token is not told."""
        ...

    @property
    def done(self) -> bool:
        """Nothing may follow: the sample ends with finish_reason `stop`."""
        ...


class Constraint(Protocol):
    """What the tokens of a sample must be, for example JSON of a schema."""

    def start(self) -> ConstraintState: ...


Listener = Callable[[Token | Finished], None]


@dataclass(frozen=True, eq=False)
class Request:
    """Prompts with the same sampling. Sample j of prompt p is choice p * n + j.

    `seeds` has one seed per prompt: sample j then draws from the stream (seeds[p], j). Without it every choice draws
    from the stream (seed, choice). `listener` is called from the engine's thread: with every Finished, and with every
    Token if `stream` is set.

    `top_k` 0 keeps all tokens; `min_p` drops tokens below that share of the likeliest one's probability (arXiv
    2407.01082). `presence_penalty` and `frequency_penalty` are OpenAI's, over the generated tokens;
    `repetition_penalty` is CTRL's (arXiv 1909.05858), over prompt and generated tokens. `logit_bias` is added to the
    logits of tokens. `stop_tokens` end a sample like the end token and stay in its tokens; with `ignore_eos` the end
    token does not end it. Before `min_tokens` tokens neither can be drawn. `prompt_logprobs` asks for the
    log-probabilities of the prompts with that many alternatives. `max_new_tokens` 0 is allowed with it. Requests of
    one `owner` share what is an owner's share of the engine.
    """

    prompts: list[list[int]]
    listener: Listener
    max_new_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    seed: int = 0
    seeds: list[int] | None = None
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    stream: bool = False
    routes: bool = False
    kept: bool = False
    owner: str = ""

    @property
    def special(self) -> bool:
        """Whether a row of it needs more than what `draw` takes as arrays."""
        changes = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0 or self.logit_bias
        return bool(changes or self.stop_tokens or self.min_tokens or self.constraint)

    def key(self, prompt: int, sample: int) -> int:
        """The key of the sample's uniforms."""
        if self.seeds is not None:
            return stream_key(self.seeds[prompt], sample)
        return stream_key(self.seed, prompt * self.n + sample)


@dataclass(eq=False)
class Sample:
    """A choice on its way. `tokens` and `logprobs` are what it had drawn when it last went back to the line.

    `constraint` is started when the first token is drawn.
    """

    request: Request
    prompt: int
    sample: int
    order: int
    arrived: float
    started: bool = False
    first_token_s: float = 0.0
    queued_s: float | None = None
    version: int = 0
    cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopLogprobs] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    prompt_tokens: list[PromptToken] | None = None
    constraint: ConstraintState | None = None
    versions: list[int] = field(default_factory=list)
    routes: NDArray[np.int16] | None = None
    kept: list[KeptSet] = field(default_factory=list)

    @property
    def choice(self) -> int:
        return self.prompt * self.request.n + self.sample

    @property
    def prompt_ids(self) -> list[int]:
        return self.request.prompts[self.prompt]

    @property
    def wants_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt are still to be found, for this sample to report."""
        return self.request.prompt_logprobs is not None and self.sample == 0 and self.prompt_tokens is None


@dataclass(eq=False)
class Job:
    """A sequence that is being computed, for one or more samples. `table` holds blocks for all of it.

    `version` names the weights with which it was begun, cached blocks included.
    """

    samples: list[Sample]
    sequence: NDArray[np.int64]
    table: list[int]
    computed: int
    digests: list[bytes]
    reusable: bool = True
    version: int | None = None
    prompt_tokens: list[PromptToken] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        """Tokens still to be computed."""
        return len(self.sequence) - self.computed

    @property
    def order(self) -> int:
        return self.samples[0].order

    @property
    def wants_prompt(self) -> bool:
        return self.samples[0].wants_prompt


@dataclass
class Counters:
    """Sums since the start. Prefix queries and hits count prompt tokens."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    steps: int = 0


class Rows:
    """The samples that draw, as arrays: what a step reads and writes without a Python loop.

    `tokens` holds a row's prompt and what it has drawn. All but the last of these are in the cache. `tables` is filled
    up with the null block. `draft` is a guess for the next token, or -1.
    """

    def __init__(self, slots: int, length: int, blocks: int):
        self.samples: list[Sample] = []
        self.tokens = np.zeros((slots, length), dtype=np.int32)
        self.logprobs = np.zeros((slots, length), dtype=np.float32)
        self.versions = np.zeros((slots, length), dtype=np.int64)
        self.tables = np.zeros((slots, blocks), dtype=np.int32)
        self.block_count = np.zeros(slots, dtype=np.int64)
        self.registered = np.zeros(slots, dtype=np.int64)
        self.prompt_length = np.zeros(slots, dtype=np.int64)
        self.drawn = np.zeros(slots, dtype=np.int64)
        self.limit = np.zeros(slots, dtype=np.int64)
        self.eos = np.zeros(slots, dtype=np.int64)
        self.draft = np.zeros(slots, dtype=np.int64)
        self.key = np.zeros(slots, dtype=np.uint64)
        self.temperature = np.zeros(slots, dtype=np.float32)
        self.top_p = np.zeros(slots, dtype=np.float32)
        self.top_k = np.zeros(slots, dtype=np.int64)
        self.min_p = np.zeros(slots, dtype=np.float32)
        self.top_logprobs = np.zeros(slots, dtype=np.int64)
        self.streamed = np.zeros(slots, dtype=bool)
        self.special = np.zeros(slots, dtype=bool)
        self.tells_kept = np.zeros(slots, dtype=bool)
        self._columns = [value for value in vars(self).values() if isinstance(value, np.ndarray) and value.ndim == 1]

    def __len__(self) -> int:
        return len(self.samples)

    def add(self, sample: Sample, sequence: NDArray[np.int64], table: list[int], eos_id: int) -> int:
        """A row for a sample whose whole `sequence` is in the cache. Returns its number."""
        row, request, prompt_length = len(self.samples), sample.request, len(sample.prompt_ids)
        self.samples.append(sample)
        self.tokens[row, : len(sequence)] = sequence
        self.logprobs[row, : len(sample.logprobs)] = sample.logprobs
        self.versions[row, : len(sample.versions)] = sample.versions
        self.prompt_length[row] = prompt_length
        self.drawn[row] = len(sequence) - prompt_length
        self.limit[row] = request.max_new_tokens
        self.eos[row] = -1 if request.ignore_eos else eos_id
        self.draft[row] = -1
        self.key[row] = request.key(sample.prompt, sample.sample)
        self.temperature[row] = request.temperature
        self.top_p[row], self.top_k[row], self.min_p[row] = request.top_p, request.top_k, request.min_p
        self.top_logprobs[row] = request.top_logprobs
        self.streamed[row] = request.stream
        self.special[row] = request.special
        self.tells_kept[row] = request.kept
        self.block_count[row], self.tables[row] = 0, NULL_BLOCK
        self.extend_table(row, table)
        self.registered[row] = len(sample.digests)
        return row

    def extend_table(self, row: int, blocks: list[int]) -> None:
        """More blocks at the end of a row's table."""
        count = int(self.block_count[row])
        self.tables[row, count : count + len(blocks)] = blocks
        self.block_count[row] = count + len(blocks)

    def record(
        self, rows: NDArray[np.int64], tokens: NDArray[np.int64], logprobs: NDArray[np.float32], version: int
    ) -> None:
        """Append one token to each of these rows, drawn with the weights of that version."""
        drawn = self.drawn[rows]
        self.tokens[rows, self.prompt_length[rows] + drawn] = tokens
        self.logprobs[rows, drawn] = logprobs
        self.versions[rows, drawn] = version
        self.drawn[rows] = drawn + 1

    def totals(self) -> NDArray[np.int64]:
        """Tokens of every row, prompt and drawn, [B]."""
        active = len(self)
        return self.prompt_length[:active] + self.drawn[:active]

    def table(self, row: int) -> list[int]:
        """The blocks of a row."""
        return self.tables[row, : self.block_count[row]].tolist()

    def generated(self, row: int) -> NDArray[np.int32]:
        """What a row has drawn."""
        first = self.prompt_length[row]
        return self.tokens[row, first : first + self.drawn[row]]

    def remove(self, row: int) -> None:
        """Drop a row; the last one moves into its place."""
        last = len(self.samples) - 1
        moved = self.samples.pop()
        if row == last:
            return
        self.samples[row] = moved
        total, drawn = self.prompt_length[last] + self.drawn[last], self.drawn[last]
        self.tokens[row, :total] = self.tokens[last, :total]
        self.logprobs[row, :drawn] = self.logprobs[last, :drawn]
        self.versions[row, :drawn] = self.versions[last, :drawn]
        self.tables[row] = self.tables[last]
        for column in self._columns:
            column[row] = column[last]


class Scheduler:
    """The waiting line, the jobs and the rows, and the blocks that they hold."""

    def __init__(self, store: PagedStore, options: EngineOptions, *, slots: int, length: int, eos_id: int):
        self.store, self.options, self.slots = store, options, slots
        self.eos_id, self.block_size = eos_id, store.block_size
        self.pool = BlockPool(store.blocks)
        self.rows = Rows(slots, length, blocks_for(length, store.block_size))
        self.jobs: list[Job] = []
        self.waiting: Line[Sample] = Line()
        self.counters = Counters()
        self._orders = itertools.count()

    @property
    def running(self) -> int:
        """Samples that have left the line."""
        return len(self.rows) + sum(len(job.samples) for job in self.jobs)

    def submit(self, request: Request) -> None:
        """Put every sample of a request at the end of the line."""
        now = time.perf_counter()
        for prompt in range(len(request.prompts)):
            for number in range(request.n):
                self.waiting.append(Sample(request, prompt, number, next(self._orders), now))

    def schedule(self) -> list[tuple[Job, int]]:
        """Make room for the next token of every row, and say how many tokens of which jobs run beside them.

        The oldest job has half of them; the rest goes to those that need the least, so that a short prompt does not
        wait for long ones.
        """
        self._make_places()
        self._grow_rows()
        budget = max(self.options.chunk_tokens - len(self.rows), self.block_size)
        self._admit_jobs(budget)
        if not self.jobs:
            return []
        oldest = min(self.jobs, key=lambda job: job.order)
        given = {oldest: min(oldest.remaining, budget // 2)}
        for job in sorted(self.jobs, key=lambda job: (job.remaining, job.order)):
            given[job] = given.get(job, 0) + min(job.remaining - given.get(job, 0), budget - sum(given.values()))
        return [(job, count) for job in self.jobs if (count := given.get(job, 0))]

    def advance(self, job: Job, count: int) -> None:
        """Note that so many more tokens of a job are in the cache."""
        job.computed += count
        if self.options.prefix_cache and job.reusable:
            for index in range(len(job.digests), job.computed // self.block_size):
                self._register(job.digests, job.sequence, index, job.table[index])

    def finish_job(self, job: Job) -> list[int]:
        """Rows for the samples of a job that is computed; samples for which no block is left go back to the line."""
        self.jobs.remove(job)
        rows = []
        for number, sample in enumerate(job.samples):
            sample.digests = list(job.digests)
            table = job.table if number == 0 else self._fork(job)
            if table is None:
                self._to_line(job.samples[number:])
                break
            row = self.rows.add(sample, job.sequence, table, self.eos_id)
            if not job.reusable:
                self.rows.registered[row] = np.iinfo(np.int64).max
            rows.append(row)
        return rows

    def register_rows(self) -> None:
        """Make the blocks that rows have filled known to later prompts."""
        if not self.options.prefix_cache:
            return
        rows = self.rows
        full = (rows.totals() - 1) // self.block_size
        for row in np.flatnonzero(full > rows.registered[: len(rows)]):
            sample = rows.samples[row]
            for index in range(len(sample.digests), int(full[row])):
                self._register(sample.digests, rows.tokens[row], index, int(rows.tables[row, index]))
            rows.registered[row] = full[row]

    def remove_row(self, row: int, damaged: bool = False) -> None:
        """Drop a row and give back its blocks; `damaged` ones hold what is no number, and nobody may find it."""
        self._give_back(self.rows.table(row), damaged)
        self.rows.remove(row)

    def withdraw(self, request: Request, choice: int | None) -> list[Sample]:
        """Take samples of a request (one choice, or all) out of the line and the jobs; rows stay. Returns them."""

        def meant(sample: Sample) -> bool:
            return sample.request is request and choice in (None, sample.choice)

        self.waiting.release(request)
        gone = self.waiting.withdraw(request, meant)
        for job in list(self.jobs):
            leaving = [sample for sample in job.samples if meant(sample)]
            job.samples = [sample for sample in job.samples if not meant(sample)]
            if not job.samples:
                self._drop(job)
            gone += leaving
        return gone

    def forget_prefixes(self) -> None:
        """The weights have changed: what is in the cache serves its own sequences alone."""
        self.pool.forget_all()
        self.rows.registered[: len(self.rows)] = np.iinfo(np.int64).max
        for job in self.jobs:
            job.reusable = False

    def check(self) -> None:
        """Assert that the blocks in use are those that rows and jobs hold, as often as they hold them."""
        held: dict[int, int] = {}
        tables = [self.rows.table(row) for row in range(len(self.rows))] + [job.table for job in self.jobs]
        for block in itertools.chain.from_iterable(tables):
            held[block] = held.get(block, 0) + 1
        assert held == self.pool.users(), f"blocks held {held}, counted {self.pool.users()}"

    def hold(self, request: Request) -> None:
        """Put all that runs of a request back in the line, where it stays until `release`."""
        self.waiting.hold(request)
        for job in [job for job in self.jobs if job.samples[0].request is request]:
            self._drop(job)
            self._to_line(job.samples)
        for row in reversed(range(len(self.rows))):
            if self.rows.samples[row].request is request:
                self._suspend(row)

    def release(self, request: Request) -> None:
        """Let a held request go on."""
        self.waiting.release(request)

    def _shares(self) -> Shares:
        return Shares(itertools.chain(self.rows.samples, *(job.samples for job in self.jobs)))

    def _admit_jobs(self, budget: int) -> None:
        """Begin jobs for those who wait, until `budget` tokens of a pass have work; the first short prompt of a request
        begins anyway. Its next ones wait, for they may share what is computed of it."""
        if not self.waiting.is_moving:
            return
        shares, remaining = self._shares(), sum(job.remaining for job in self.jobs)
        while (first := self.waiting.first(shares)) is not None:
            is_short = len(first.prompt_ids) + len(first.tokens) <= budget // 2
            begins_anyway = is_short and not shares.of_request(first.request)
            if (remaining >= budget and not begins_anyway) or (job := self._admit(first, shares)) is None:
                return
            remaining += job.remaining

    def _make_places(self) -> None:
        """Let who runs most give a place to a request of which nothing runs, if that has waited for PATIENCE_S."""
        if not self.waiting.is_moving or not len(self.rows):
            return
        shares = self._shares()
        first = self.waiting.first(shares)
        if first is None or shares.of_request(first.request) or time.perf_counter() - first.arrived < PATIENCE_S:
            return
        wanted = blocks_for(len(first.prompt_ids) + len(first.tokens), self.block_size) + self._spare_blocks()
        row = self._heaviest_row(shares)
        is_full = self.running >= self.slots or self.pool.available < wanted
        if is_full and shares.is_short(first.request, self.rows.samples[row].request):
            self.counters.preemptions += 1
            self._suspend(row)

    def _spare_blocks(self) -> int:
        """Blocks that are left for the rows when a prompt is taken on."""
        return min(len(self.rows), self.pool.total // 20)

    def _heaviest_row(self, shares: Shares) -> int:
        """The latest row of the request that runs most."""
        samples = self.rows.samples
        return max(range(len(samples)), key=lambda row: (*shares.weight(samples[row].request), samples[row].order))

    def _admit(self, first: Sample, shares: Shares) -> Job | None:
        """A job for the next in the line and the samples behind it that share its prompt, if there is room."""
        free = self.slots - self.running
        if free <= 0:
            return None
        sequence = np.array(first.prompt_ids + first.tokens, dtype=np.int64)
        digests, table = self._known_prefix(first, sequence)
        for block in table:
            self.pool.share(block)
        wanted = blocks_for(len(sequence), self.block_size) - len(table)
        if self.pool.available < wanted + self._spare_blocks():
            self.pool.release(table)
            return None
        self._note_prefix(first, len(sequence), len(table))
        table += [self._new_block() for _ in range(wanted)]
        job = Job(self._take_group(first, free, shares), sequence, table, len(digests) * self.block_size, digests)
        self.jobs.append(job)
        return job

    def _take_group(self, first: Sample, free: int, shares: Shares) -> list[Sample]:
        """Where others wait too, a request gets its part of the free places."""
        most = -(-free // self.waiting.moving)
        group = self.waiting.take(first, most, lambda sample: _same_prompt(first, sample))
        for sample in group:
            shares.add(sample.request)
        now = time.perf_counter()
        for sample in group:
            if sample.queued_s is None:
                sample.queued_s = now - sample.arrived
        return group

    def _known_prefix(self, sample: Sample, sequence: NDArray[np.int64]) -> tuple[list[bytes], list[int]]:
        """Digests and blocks of the longest beginning that is in the cache; the last token is always computed."""
        digests: list[bytes] = []
        table: list[int] = []
        if not self.options.prefix_cache or sample.wants_prompt:
            return digests, table
        before = b""
        for start in range(0, len(sequence) - self.block_size, self.block_size):
            before = chained_digest(before, sequence[start : start + self.block_size].astype(np.int32))
            block = self.pool.find(before)
            if block is None:
                break
            digests.append(before)
            table.append(block)
        return digests, table

    def _note_prefix(self, sample: Sample, length: int, blocks: int) -> None:
        if self.options.prefix_cache and not sample.tokens:
            sample.cached_tokens = blocks * self.block_size
            self.counters.prefix_queries += length
            self.counters.prefix_hits += sample.cached_tokens

    def _register(self, digests: list[bytes], tokens: NDArray[np.integer], index: int, block: int) -> None:
        part = tokens[index * self.block_size : (index + 1) * self.block_size].astype(np.int32)
        digests.append(chained_digest(digests[-1] if digests else b"", part))
        self.pool.register(block, digests[-1])

    def _fork(self, job: Job) -> list[int] | None:
        """A table for one more sample of a job: full blocks are shared, the last one is copied if it is not full."""
        full, rest = divmod(len(job.sequence), self.block_size)
        copied = []
        if rest:
            block = self.pool.allocate()
            if block is None:
                return None
            self.store.copy_block(job.table[full], block, rest)
            copied = [block]
        for block in job.table[:full]:
            self.pool.share(block)
        return job.table[:full] + copied

    def _grow_rows(self) -> None:
        rows = self.rows
        while True:
            drafted = rows.draft[: len(rows)] >= 0
            short = np.flatnonzero((rows.totals() + drafted - 1) // self.block_size >= rows.block_count[: len(rows)])
            if not len(short):
                return
            for row in short:
                block = self.pool.allocate()
                if block is not None:
                    rows.extend_table(int(row), [block])
                elif rows.draft[row] >= 0:
                    rows.draft[row] = -1
                    break
                else:
                    self._preempt()
                    break

    def _preempt(self) -> None:
        """Send whoever came last back to the line."""
        self.counters.preemptions += 1
        shares, samples = self._shares(), self.rows.samples
        heaviest = self._heaviest_row(shares) if samples else None
        last_job = max(self.jobs, key=lambda job: (*shares.weight(job.samples[0].request), job.order), default=None)
        if last_job is not None and (heaviest is None or last_job.order > samples[heaviest].order):
            self._drop(last_job)
            self._to_line(last_job.samples)
            return
        assert heaviest is not None, "blocks are short and nobody holds one"
        self._suspend(heaviest)

    def _suspend(self, row: int) -> None:
        """Send a row back to the line with all it has drawn."""
        sample = self.rows.samples[row]
        sample.tokens = self.rows.generated(row).tolist()
        sample.logprobs = self.rows.logprobs[row, : len(sample.tokens)].tolist()
        sample.versions = self.rows.versions[row, : len(sample.tokens)].tolist()
        self.remove_row(row)
        self._to_line([sample])

    def _to_line(self, samples: list[Sample]) -> None:
        self.waiting.return_(samples)

    def _drop(self, job: Job) -> None:
        self.jobs.remove(job)
        self._give_back(job.table, damaged=not self.store.holds_numbers(job.table))

    def _give_back(self, blocks: list[int], damaged: bool) -> None:
        if damaged:
            uses = self.pool.users()
            self.pool.forget(blocks)
            self.store.clear([block for block in blocks if uses[block] == 1])
        self.pool.release(blocks)

    def _new_block(self) -> int:
        block = self.pool.allocate()
        assert block is not None, "there was room a moment ago"
        return block


def _same_prompt(a: Sample, b: Sample) -> bool:
    return a.request is b.request and a.prompt == b.prompt and not a.tokens and not b.tokens
