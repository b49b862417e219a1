"""Prompts shared among engines: whoever is free takes the next few, and what a lost one held is taken by another."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Generic, TypeVar

from isthmus.engines import Completion, EngineError
from isthmus.engines.remote.transport import Refused

PIECES_EACH, LANES = 4, 3
"""Pieces of the work for each engine, and how many of them it has at once: the last quarter goes to who is free."""
LOOK_S = 2.0
"""Seconds between two looks at whether the engines that are at work are alive."""
SILENT_LOOKS = 3
OWN_FAULT = range(400, 500)
NOT_OWN_FAULT = frozenset({401, 403, 404, 408, 429})

Piece = range


M = TypeVar("M")
Ask = Callable[..., list[list[Completion]]]


class Sharing(Generic[M]):
    """`count` prompts shared among members. `ask(member, piece)` gives the completions of some of them; `lose` hears of
    members that are lost, `alive` is asked of those that take long. Each prompt is answered once.
    """

    def __init__(
        self,
        members: Sequence[M],
        count: int,
        ask: Ask,
        lose: Callable[[M, str], None],
        alive: Callable[[M], bool],
        look_s: float = LOOK_S,
    ):
        self.members, self.count = list(members), count
        self._ask, self._lose, self._alive, self._look_s = ask, lose, alive, look_s
        self._waiting: deque[Piece] = deque(pieces(count, len(self.members)))
        self._held: dict[int, set[Piece]] = {place: set() for place in range(len(self.members))}
        self._found: dict[int, list[Completion]] = {}
        self._lost: dict[int, str] = {}
        self._error: BaseException | None = None
        self._ended = False
        self._changed = threading.Condition()

    def run(self) -> list[list[Completion]]:
        """The completions of each prompt, in order. Raises EngineError if no member is left or one refuses the work."""
        for place in range(len(self.members)):
            for _ in range(LANES):
                threading.Thread(target=self._work, args=(place,), daemon=True).start()
        try:
            self._await()
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
        if self._error is not None:
            raise self._error
        return [self._found[number] for number in range(self.count)]

    def _await(self) -> None:
        silent = dict.fromkeys(self._held, 0)
        looked = time.monotonic()
        while True:
            with self._changed:
                if not self._is_settled():
                    self._changed.wait(self._look_s)
                if self._error is not None or len(self._found) == self.count:
                    return
                if len(self._lost) == len(self.members):
                    self._error = EngineError(
                        f"no engine is left: {'; '.join(self._lost.values()) or 'there was none'}"
                    )
                    return
                busy = [place for place, held in self._held.items() if held and place not in self._lost]
            if time.monotonic() - looked < self._look_s:
                continue
            for place in busy:
                silent[place] = 0 if self._alive(self.members[place]) else silent[place] + 1
                if silent[place] >= SILENT_LOOKS:
                    self._drop(place, f"it does not say any more that it is healthy, {SILENT_LOOKS} times in a row")
            looked = time.monotonic()

    def _is_settled(self) -> bool:
        return self._error is not None or len(self._found) == self.count or len(self._lost) == len(self.members)

    def _work(self, place: int) -> None:
        done = False
        try:
            while (piece := self._next(place)) is not None and self._take(place, piece):
                pass
            done = True
        finally:
            if not done:
                self._fail(EngineError("a thread that asks an engine ended, for the reason that it wrote above"))

    def _take(self, place: int, piece: Piece) -> bool:
        """Whether the member answered. One that does not, or says what cannot be read, is lost."""
        try:
            self._keep(place, piece, self._ask(self.members[place], piece))
        except Refused as error:
            if error.status in OWN_FAULT and error.status not in NOT_OWN_FAULT:
                self._fail(error)
            else:
                self._drop(place, str(error))
        except EngineError as error:
            self._drop(place, str(error))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            self._drop(place, f"its answer cannot be read: {error!r}")
        else:
            return True
        return False

    def _next(self, place: int) -> Piece | None:
        with self._changed:
            while not self._waiting and not self._is_over(place):
                self._changed.wait()
            if self._is_over(place):
                return None
            piece = self._waiting.popleft()
            self._held[place].add(piece)
            return piece

    def _is_over(self, place: int) -> bool:
        return self._ended or self._error is not None or place in self._lost or len(self._found) == self.count

    def _keep(self, place: int, piece: Piece, found: list[list[Completion]]) -> None:
        """What comes from a member that is lost is not kept: another one has its piece."""
        with self._changed:
            if piece in self._held[place]:
                self._found.update(list(zip(piece, found, strict=True)))
                self._held[place].discard(piece)
            self._changed.notify_all()

    def _drop(self, place: int, why: str) -> None:
        with self._changed:
            if place in self._lost:
                return
            self._lost[place] = why
            self._waiting.extendleft(sorted(self._held[place], key=lambda piece: -piece.start))
            self._held[place] = set()
            self._changed.notify_all()
        self._lose(self.members[place], why)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


def pieces(count: int, members: int) -> list[Piece]:
    """`count` prompts in a row, divided so that each of `members` gets several pieces."""
    wanted = min(count, max(1, members) * PIECES_EACH)
    edges = [round(number * count / wanted) for number in range(wanted + 1)]
    return [range(first, last) for first, last in pairwise(edges)]
