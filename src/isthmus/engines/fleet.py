"""Several engines behind URLs as one: they share the prompts, and one version of the weights is what they serve.

A version is staged and checked on every engine first, and switched to then. An engine that dies, hangs, cannot follow
or has other weights than it was given is left out, and told; what it was writing is written by another. One that comes
back gets the current version before it serves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from isthmus.engines import CannotFollow, Completion, EngineError, OtherBase, Sampling
from isthmus.engines.account import Account
from isthmus.engines.member import HEALTH_S, Act, Member, Patience, each
from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.dialect import spread_seed
from isthmus.engines.sharing import SILENT_LOOKS, Ask, Piece, Sharing

STAGING = Patience(looks=SILENT_LOOKS, behind_s=540.0)
"""Of bringing a version. Our server gives up what was staged and not used within 600 s."""
SWITCHING = Patience(looks=20)
"""SGLang's /health waits for its scheduler, which says nothing while it reads weights from a folder."""
ASKING = Patience(looks=SILENT_LOOKS, limit_s=60.0)
"""Of what is no work: which weights an engine has, and what it is when it comes back."""
REPLACING = Patience(limit_s=60.0)
"""Of starting one anew that was lost."""
BACK_S, BACK_TIMES = 60.0, 3.0
"""Generating waits so long for one that comes back to take the weights in use, or so many times what all took."""


T = TypeVar("T")


@dataclass(frozen=True)
class Whole:
    """All weights of a version as they were sent, and the seconds that it took."""

    payload: bytes
    version: int
    sha256: str
    seconds: float

    def bring(self, engine: HttpEngine) -> None:
        engine.stage(self.payload, self.version, self.sha256)
        engine.switch(self.version)


class Fleet:
    """Keeps the contract of an engine. `tell` gets an event for each engine that is left out or comes back."""

    def __init__(self, engines: Sequence[HttpEngine], tell: Callable[..., None]):
        self.members = [Member(engine) for engine in engines]
        self._tell, self._lock = tell, threading.RLock()
        self._bringing = threading.Lock()
        self._bundle: Path | None = None
        self._last: Whole | None = None
        self._version: int | None = None

    def start(self, bundle_folder: Path) -> None:
        """Find out what each of them is. Raises EngineError with what the first unfit one lacks."""
        self._bundle = bundle_folder
        _, failed = each(self.members, lambda engine: engine.start(bundle_folder))
        if failed:
            raise failed[0][1]

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None = None
    ) -> list[list[Completion]]:
        """As every engine's. What a prompt draws does not depend on the engine that it goes to.

        Raises EngineError if no engine is left, or one refuses what it is asked.
        """
        if not prompts:
            return []
        own = seeds or [spread_seed(sampling.seed, place) for place in range(len(prompts))]
        if len(own) != len(prompts):
            raise EngineError(f"{len(own)} seeds for {len(prompts)} prompts; give one for each")
        self._take_back_if_idle()
        serving = self.serving
        if not serving:
            raise EngineError(_nobody(self.members))
        ask = self._asker(prompts, sampling, own)
        found = Sharing(serving, len(prompts), ask, self._leave_out, Member.answers).run()
        for member in serving:
            if member.serves:
                member.pause_s = 0.0
        return found

    def update(self, payload: bytes, version: int, sha256: str) -> None:
        """Stage on all, then switch. If no engine takes it, the old weights go on serving on all."""
        with self._bringing:
            self._find_back(doubted=True)
            began = time.monotonic()
            self._bring(lambda engine: engine.stage(payload, version, sha256), version, None)
            self._last = Whole(payload, version, sha256, time.monotonic() - began)

    def update_delta(self, parts: Sequence[bytes], base_version: int, version: int, sha256: str) -> float:
        """The same by what changes. Raises OtherBase if an engine lacks what is changed, one that came back included:
        all of them then need all weights."""
        with self._bringing:
            self._find_back(doubted=True)
            if back := [member.url for member in self.members if member.returning]:
                raise OtherBase(f"{', '.join(back)} came back without the weights in use")
            self._bring(lambda engine: engine.stage_delta(parts, base_version, version), version, sha256)
            self._last = None
        return 0.0

    def accounts(self) -> list[tuple[str, Account]]:
        """What each engine holds that serves; one that does not say it is left out."""
        return self._of_each(lambda engine: engine.accounts())

    def probe(self, prompts: list[list[int]], sampling: Sampling) -> list[tuple[str, list[list[Completion]]]]:
        """What each engine answers that serves. Raises EngineError if none does."""
        found = self._of_each(lambda engine: engine.probe(prompts, sampling))
        if not found:
            raise EngineError(_nobody(self.members))
        return found

    def leave_out(self, url: str, why: str) -> None:
        """One that was found to compute something else. It comes back with a new version alone, which is looked at."""
        member = next(member for member in self.members if member.url == url)
        with self._lock:
            member.doubted = True
        self._leave_out(member, why)

    def stop(self) -> None:
        """End those that were started for this fleet; those that someone else started go on without us."""
        each(self.members, lambda engine: engine.stop())

    @property
    def serving(self) -> list[Member]:
        """Those that have the version in use and are not left out."""
        return [member for member in self.members if member.serves]

    @property
    def cannot_tell_kept(self) -> list[str]:
        return [name for member in self.members for name in member.engine.cannot_tell_kept]

    @property
    def cannot_tell_routes(self) -> list[str]:
        return [name for member in self.members for name in member.engine.cannot_tell_routes]

    @property
    def takes_deltas(self) -> bool:
        return all(member.engine.takes_deltas for member in self.members)

    @property
    def arithmetic(self) -> str | None:
        return _common([member.engine.arithmetic for member in self.members])

    @property
    def bits(self) -> str | None:
        return _common([member.engine.bits for member in self.members])

    def _of_each(self, ask: Callable[[HttpEngine], list[T]]) -> list[T]:
        found: dict[str, list[T]] = {}

        def note(engine: HttpEngine) -> None:
            found[engine.url] = ask(engine)

        done, failed = each(self.serving, note, Patience(looks=SILENT_LOOKS))
        for member, error in failed:
            self._leave_out(member, str(error))
        return [one for member in done for one in found[member.url]]

    def _asker(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> Ask:
        def ask(member: Member, piece: Piece) -> list[list[Completion]]:
            with self._lock:
                if not member.serves:
                    raise EngineError(member.why or "it came back in between, and has no weights yet")
                begun = max(0, len(member.versions) - (2 if member.switches else 1))
                known, wanted = bool(member.versions) and not member.switches, member.has
            if known:
                self._check_weights(member, wanted)
            part = slice(piece.start, piece.stop)
            groups = member.engine.generate(prompts[part], sampling, seeds[part])
            self._check_versions(member, begun, groups)
            if known:
                self._check_weights(member, wanted)
            return groups

        return ask

    def _check_weights(self, member: Member, wanted: str | None) -> None:
        """An engine that was started again, or was brought weights by somebody else, may tell the same number. `wanted`
        is None for one that never tells what it has."""
        found = member.engine.in_use()
        with self._lock:
            same = found == wanted or member.switches or member.has != wanted
        if not same:
            raise EngineError(f"it has other weights than it was given: {found} instead of {wanted}")

    def _check_versions(self, member: Member, begun: int, groups: list[list[Completion]]) -> None:
        """Every token must come from a version that the engine was given, and none from one before that in use."""
        if not member.versions:
            return
        with self._lock:
            given = set(member.versions[begun:])
        told = {version for group in groups for one in group for version in _versions_of(one)}
        if strange := sorted(told - given):
            raise EngineError(f"it wrote with version {strange[0]}, and was given {', '.join(map(str, sorted(given)))}")

    def _bring(self, stage: Act, version: int, sha256: str | None) -> None:
        """To all that serve or come back; `_bringing` is held."""
        staged, failed = each([member for member in self.members if member.why is None], stage, STAGING)
        for _, error in failed:
            if isinstance(error, OtherBase):
                self._drop([one for one in failed if one[0].busy], version)
                raise error
        self._drop_or_raise(staged, failed, version)
        with self._lock:
            for member in staged:
                member.switches = True
                member.versions.append(version)
        switched, failed = each(staged, lambda engine: engine.switch(version, sha256), SWITCHING)
        if not switched:
            self._undo_switch(staged)
        self._drop_or_raise(switched, failed, version)
        self._settle(switched)
        for member in switched:
            member.doubted = False
        self._version = version

    def _undo_switch(self, members: list[Member]) -> None:
        """What was in use goes on being what they should have."""
        with self._lock:
            for member in members:
                member.switches = False
                member.versions.pop()

    def _settle(self, members: list[Member]) -> None:
        """Remember how each names what it now has. One that came back serves from here on."""
        found: dict[int, str | None] = {}

        def ask(engine: HttpEngine) -> None:
            found[id(engine)] = engine.in_use()

        settled, failed = each(members, ask, ASKING)
        for member, error in failed:
            self._leave_out(member, str(error))
        for member in settled:
            with self._lock:
                back = member.returning
                member.has, member.switches, member.returning = found[id(member.engine)], False, False
            if back:
                self._tell("back", engine=member.url, weight_version=member.versions[-1])

    def _drop_or_raise(self, done: list[Member], failed: list[tuple[Member, EngineError]], version: int) -> None:
        """If nobody is done, only whoever still is at it is left out, and who must not be tried again."""
        self._drop([one for one in failed if done or one[0].busy or isinstance(one[1], CannotFollow)], version)
        if not done:
            raise failed[0][1] if failed else EngineError(_nobody(self.members))

    def _drop(self, failed: list[tuple[Member, EngineError]], version: int) -> None:
        for member, error in failed:
            self._leave_out(member, f"it cannot follow to version {version}: {error}")
            member.lost_for_good |= isinstance(error, CannotFollow)

    def _leave_out(self, member: Member, why: str) -> None:
        with self._lock:
            if member.why is not None:
                return
            member.why, member.switches, member.returning = why, False, False
            member.rest()
        left = len(self.serving)
        self._tell(
            "fallback", what=f"the engine {member.url} is left out, {left} of {len(self.members)} go on", why=why
        )

    def _find_back(self, *, doubted: bool) -> None:
        """Those that were left out and answer again are found out anew, and are `returning` then. With `doubted` also
        those that computed something else."""
        bundle = self._bundle
        if bundle is None:
            return
        away = [member for member in self.members if member.may_come_back and (doubted or not member.doubted)]
        here, silent = each([member for member in away if not member.engine.can_be_replaced], _must_answer)
        started, failed = each(here, lambda engine: engine.start(bundle), ASKING)
        lost = [member for member in away if member.engine.can_be_replaced]
        replaced, unplaced = each(lost, lambda engine: _start_anew(engine, bundle), REPLACING)
        with self._lock:
            for member in started + replaced:
                member.why, member.returning, member.versions, member.has = None, True, [], None
            for member, error in failed + unplaced:
                member.why = str(error)
            for member, _ in silent + failed + unplaced:
                member.rest()

    def _take_back_if_idle(self) -> None:
        """Before work, where no version is on its way: that brings those back itself."""
        if self._bringing.acquire(blocking=False):
            try:
                self._take_back()
            finally:
                self._bringing.release()

    def _take_back(self) -> None:
        """Those that answer again serve with the version in use, where it is here as a whole."""
        last = self._last
        if last is None or last.version != self._version:
            return
        self._find_back(doubted=False)
        patience = Patience(looks=SILENT_LOOKS, limit_s=max(BACK_S, BACK_TIMES * last.seconds))
        back = [member for member in self.members if member.returning and not member.doubted]
        brought, failed = each(back, last.bring, patience)
        for member, error in failed:
            self._leave_out(member, f"it came back and cannot follow: {error}")
            member.lost_for_good |= isinstance(error, CannotFollow)
        for member in brought:
            member.versions = [last.version]
        self._settle(brought)


def _must_answer(engine: HttpEngine) -> None:
    if not engine.answers(HEALTH_S):
        raise EngineError(f"the engine at {engine.url} does not answer")


def _start_anew(engine: HttpEngine, bundle: Path) -> None:
    """Unless it is there: one that was not waited for before may have come up since."""
    if not engine.answers(HEALTH_S):
        engine.start(bundle)


def _versions_of(one: Completion) -> set[int]:
    return {one.version, one.last_version, *(version for version, _ in one.versions or [])}


def _nobody(members: Sequence[Member]) -> str:
    return "no engine is left: " + "; ".join(f"{member.url}: {member.why}" for member in members)


def _common(values: Sequence[str | None]) -> str | None:
    return values[0] if len(set(values)) == 1 else None
