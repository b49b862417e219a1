"""Who runs: waiting samples are admitted whenever slots are free, and the active ones stay in rows [0, B).

Row b of every array here belongs to slot b of the cache. When a row ends, the last row moves into its place.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from isthmus.engines.local.sampler import stream_key

TopLogprobs = list[tuple[int, float]]


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

    `first_token_s` and `elapsed_s` count seconds from the submission. `cached_tokens` of the prompt were taken from the
    prefix cache. `prompt_tokens` is filled where the request asked for `prompt_logprobs`, in the first sample of each
    prompt. `stop_token` is the token of `Request.stop_tokens` that ended the sample, if one did.
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
    log-probabilities of the prompts with that many alternatives. `max_new_tokens` 0 is allowed with it.
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

    def key(self, prompt: int, sample: int) -> int:
        """The key of the sample's uniforms."""
        if self.seeds is not None:
            return stream_key(self.seeds[prompt], sample)
        return stream_key(self.seed, prompt * self.n + sample)


@dataclass(eq=False)
class Sample:
    """A choice on its way."""

    request: Request
    prompt: int
    sample: int
    arrived: float
    first_token_s: float = 0.0
    version: int = 0
    top: list[TopLogprobs] = field(default_factory=list)

    @property
    def choice(self) -> int:
        return self.prompt * self.request.n + self.sample

    @property
    def prompt_tokens(self) -> list[int]:
        return self.request.prompts[self.prompt]


class Rows:
    """The active samples as arrays: what a step reads and writes without a Python loop."""

    def __init__(self, slots: int, length: int):
        self.samples: list[Sample] = []
        self.tokens = np.zeros((slots, length), dtype=np.int64)
        self.logprobs = np.zeros((slots, length), dtype=np.float32)
        self.prompt_length = np.zeros(slots, dtype=np.int64)
        self.drawn = np.zeros(slots, dtype=np.int64)
        self.limit = np.zeros(slots, dtype=np.int64)
        self.key = np.zeros(slots, dtype=np.uint64)
        self.temperature = np.zeros(slots, dtype=np.float32)
        self.top_p = np.zeros(slots, dtype=np.float32)
        self.top_logprobs = np.zeros(slots, dtype=np.int64)
        self.streamed = np.zeros(slots, dtype=bool)

    def __len__(self) -> int:
        return len(self.samples)

    def add(self, sample: Sample) -> None:
        row, request = len(self.samples), sample.request
        self.samples.append(sample)
        self.prompt_length[row] = len(sample.prompt_tokens)
        self.drawn[row] = 0
        self.limit[row] = request.max_new_tokens
        self.key[row] = request.key(sample.prompt, sample.sample)
        self.temperature[row] = request.temperature
        self.top_p[row] = request.top_p
        self.top_logprobs[row] = request.top_logprobs
        self.streamed[row] = request.stream

    def record(self, first: int, tokens: NDArray[np.int64], logprobs: NDArray[np.float32]) -> None:
        """Append one drawn token to rows `first`, `first` + 1, ..."""
        rows = np.arange(first, first + len(tokens))
        self.tokens[rows, self.drawn[rows]] = tokens
        self.logprobs[rows, self.drawn[rows]] = logprobs
        self.drawn[rows] += 1

    def next_tokens(self) -> NDArray[np.int64]:
        """The last drawn token of every row, [B]."""
        rows = np.arange(len(self))
        return self.tokens[rows, self.drawn[rows] - 1]

    def positions(self) -> NDArray[np.int64]:
        """Where the last drawn token of every row stands in its sequence, [B]."""
        active = len(self)
        return self.prompt_length[:active] + self.drawn[:active] - 1

    def remove(self, row: int) -> int | None:
        """Drop a row. Returns the row that moved into its place, or None if it was the last."""
        last = len(self.samples) - 1
        moved = self.samples.pop()
        if row == last:
            return None
        self.samples[row] = moved
        drawn = self.drawn[last]
        self.tokens[row, :drawn] = self.tokens[last, :drawn]
        self.logprobs[row, :drawn] = self.logprobs[last, :drawn]
        for column in (
            self.prompt_length,
            self.drawn,
            self.limit,
            self.key,
            self.temperature,
            self.top_p,
            self.top_logprobs,
            self.streamed,
        ):
            column[row] = column[last]
        return last


class Scheduler:
    """The waiting line and the rows."""

    def __init__(self, slots: int, length: int, prefill_tokens: int):
        self.slots, self.prefill_tokens = slots, prefill_tokens
        self.rows = Rows(slots, length)
        self.waiting: deque[Sample] = deque()

    def submit(self, request: Request) -> None:
        """Put every sample of a request at the end of the line."""
        now = time.perf_counter()
        for prompt in range(len(request.prompts)):
            self.waiting.extend(Sample(request, prompt, sample, now) for sample in range(request.n))

    def admit(self) -> list[Sample]:
        """Move samples from the line into rows: as many as there are free slots, within one prefill's size.

        Samples of one prompt stand next to each other, so that they can share its prefill. At least one prompt is
        admitted if a slot is free, however long it is.
        """
        admitted: list[Sample] = []
        prompts, longest = 0, 0
        while self.waiting and len(self.rows) < self.slots:
            sample = self.waiting[0]
            if not (admitted and _same_prompt(admitted[-1], sample)):
                prompts, longest = prompts + 1, max(longest, len(sample.prompt_tokens))
                if admitted and prompts * longest > self.prefill_tokens:
                    break
            self.rows.add(self.waiting.popleft())
            admitted.append(sample)
        return admitted

    def withdraw(self, request: Request, choice: int | None) -> list[Sample]:
        """Take samples of a request (one choice, or all) out of the line; those in rows stay. Returns them."""
        gone = [s for s in self.waiting if s.request is request and choice in (None, s.choice)]
        if gone:
            self.waiting = deque(s for s in self.waiting if s not in gone)
        return gone


def _same_prompt(a: Sample, b: Sample) -> bool:
    return a.request is b.request and a.prompt == b.prompt
