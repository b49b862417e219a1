"""Several engines behind URLs as one: they share the prompts, and one version of the weights is what they serve.

A version is staged and checked on every engine first, and switched to then. An engine that dies, hangs, cannot follow
or has other weights than it was given is left out, and told; what it was writing is written by another. One that comes
back gets the current version before it serves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.engines import Completion, EngineError, OtherBase, Sampling
from isthmus.engines.remote import HttpEngine
from isthmus.engines.remote.dialect import spread_seed
from isthmus.engines.sharing import Ask, Piece, Sharing

HEALTH_S = 5.0
"""What an engine gets to say that it is alive."""

Act = Callable[[HttpEngine], None]


@dataclass
class Member:
    """One engine of a fleet. `versions` are those that it was given, in order; `has` is how it names the last one.

    `why` says why it is left out; None if it is not.
    """

    engine: HttpEngine
    versions: list[int] = field(default_factory=list)
    has: str | None = None
    switches: bool = False
    why: str | None = None

    @property
    def url(self) -> str:
        return self.engine.url


@dataclass(frozen=True)
class Whole:
    """All weights of a version as they were sent."""

    payload: bytes
    version: int
    sha256: str

    def bring(self, engine: HttpEngine) -> None:
        engine.stage(self.payload, self.version, self.sha256)
        engine.switch(self.version)


class Fleet:
    """Keeps the contract of an engine. `tell` gets an event for each engine that is left out or comes back."""

    def __init__(self, engines: Sequence[HttpEngine], tell: Callable[..., None]):
        self.members = [Member(engine) for engine in engines]
        self._tell, self._lock = tell, threading.RLock()
        self._bundle: Path | None = None
        self._last: Whole | None = None
        self._version: int | None = None

    def start(self, bundle_folder: Path) -> None:
        """Find out what each of them is. Raises EngineError with what the first unfit one lacks."""
        self._bundle = bundle_folder
        _, failed = _each(self.members, lambda engine: engine.start(bundle_folder))
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
        self._take_back()
        own = seeds or [spread_seed(sampling.seed, place) for place in range(len(prompts))]
        if len(own) != len(prompts):
            raise EngineError(f"{len(own)} seeds for {len(prompts)} prompts; give one for each")
        sharing = Sharing(self.serving, len(prompts), self._asker(prompts, sampling, own), self._leave_out, _answers)
        return sharing.run()

    def update(self, payload: bytes, version: int, sha256: str) -> None:
        """Stage on all, then switch. If no engine takes it, the old weights go on serving on all."""
        self._find_back()
        whole = Whole(payload, version, sha256)
        self._bring(lambda engine: engine.stage(payload, version, sha256), version, None)
        self._last = whole

    def update_delta(self, parts: Sequence[bytes], base_version: int, version: int, sha256: str) -> float:
        """The same by what changes. Raises OtherBase if an engine lacks what is changed, one that came back included:
        all of them then need all weights."""
        if back := self._find_back():
            raise OtherBase(f"{', '.join(member.url for member in back)} came back without the weights in use")
        self._bring(lambda engine: engine.stage_delta(parts, base_version, version), version, sha256)
        self._last = None
        return 0.0

    def stop(self) -> None:
        """Nothing to free: engines that someone else started go on without us."""

    @property
    def serving(self) -> list[Member]:
        """Those that are not left out."""
        return [member for member in self.members if member.why is None]

    @property
    def takes_deltas(self) -> bool:
        return all(member.engine.takes_deltas for member in self.members)

    @property
    def arithmetic(self) -> str | None:
        return _common([member.engine.arithmetic for member in self.members])

    @property
    def bits(self) -> str | None:
        return _common([member.engine.bits for member in self.members])

    def _asker(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> Ask:
        def ask(member: Member, piece: Piece) -> list[list[Completion]]:
            with self._lock:
                begun, wanted = len(member.versions) - 1, None if member.switches else member.has
            if wanted is not None:
                self._check_weights(member, wanted)
            part = slice(piece.start, piece.stop)
            groups = member.engine.generate(prompts[part], sampling, seeds[part])
            self._check_versions(member, begun, groups)
            return groups

        return ask

    def _check_weights(self, member: Member, wanted: str) -> None:
        """An engine that was started again serves what it read then, perhaps under the same number."""
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
        staged, failed = _each(self.serving, stage)
        for _, error in failed:
            if isinstance(error, OtherBase):
                raise error
        self._drop_or_raise(staged, failed, version)
        with self._lock:
            for member in staged:
                member.switches = True
                member.versions.append(version)
        switched, failed = _each(staged, lambda engine: engine.switch(version, sha256))
        self._drop_or_raise(switched, failed, version)
        self._settle(switched)
        self._version = version

    def _settle(self, members: list[Member]) -> None:
        """Remember how each names what it now has."""
        for member in members:
            try:
                has = member.engine.in_use()
            except EngineError as error:
                self._leave_out(member, str(error))
                continue
            with self._lock:
                member.has, member.switches = has, False

    def _drop_or_raise(self, done: list[Member], failed: list[tuple[Member, EngineError]], version: int) -> None:
        if not done:
            if not failed:
                raise EngineError(_nobody(self.members))
            raise failed[0][1]
        for member, error in failed:
            self._leave_out(member, f"it cannot follow to version {version}: {error}")

    def _leave_out(self, member: Member, why: str) -> None:
        with self._lock:
            if member.why is not None:
                return
            member.why, member.switches = why, False
        left = len(self.serving)
        self._tell(
            "fallback", what=f"the engine {member.url} is left out, {left} of {len(self.members)} go on", why=why
        )

    def _find_back(self) -> list[Member]:
        """Those that were left out and answer again, found out anew; they have no version yet."""
        back = []
        for member in self.members:
            if member.why is None or self._bundle is None or not member.engine.answers(HEALTH_S):
                continue
            try:
                member.engine.start(self._bundle)
            except EngineError as error:
                member.why = str(error)
                continue
            with self._lock:
                member.why, member.versions, member.has = None, [], None
            back.append(member)
        return back

    def _take_back(self) -> None:
        """Before work: those that answer again serve with the version in use, where it is here as a whole."""
        if self._last is None or self._last.version != self._version:
            return
        for member in self._find_back():
            with self._lock:
                member.versions = [self._last.version]
            try:
                self._last.bring(member.engine)
            except EngineError as error:
                self._leave_out(member, f"it came back and cannot follow: {error}")
                continue
            self._settle([member])
            self._tell("back", engine=member.url, weight_version=self._last.version)


def _each(members: Sequence[Member], act: Act) -> tuple[list[Member], list[tuple[Member, EngineError]]]:
    """(those that did it, those that failed with their errors), all at once. Other errors are raised."""
    if not members:
        return [], []
    with ThreadPoolExecutor(len(members)) as workers:
        begun = [(member, workers.submit(act, member.engine)) for member in members]
    done, failed = [], []
    for member, future in begun:
        try:
            future.result()
        except EngineError as error:
            failed.append((member, error))
        else:
            done.append(member)
    return done, failed


def _answers(member: Member) -> bool:
    return member.engine.answers(HEALTH_S)


def _versions_of(one: Completion) -> set[int]:
    return {one.version, one.last_version, *(version for version, _ in one.versions or [])}


def _nobody(members: Sequence[Member]) -> str:
    return "no engine is left: " + "; ".join(f"{member.url}: {member.why}" for member in members)


def _common(values: Sequence[str | None]) -> str | None:
    return values[0] if len(set(values)) == 1 else None
