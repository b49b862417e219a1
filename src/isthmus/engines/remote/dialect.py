"""What every dialect offers, and what the ones of other makes share: seeds, the folder for weights, the version."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from isthmus.engines import Completion, EngineError, Sampling
from isthmus.engines.account import Account
from isthmus.engines.remote.prepared import Prepared
from isthmus.errors import IsthmusError
from isthmus.formats import recognise_format
from isthmus.formats.files.bundle import CONFIG, architecture_of, read_config, with_other_weights
from isthmus.formats.files.golden import TokenScore

_SEED_BITS = 48


@dataclass
class Weights:
    """The version of the weights in use: what the server says, else what was last set from here."""

    version: int = 0

    def told(self, version: str | None) -> int:
        """The number of a version that a server tells as text; servers start with a word such as "default"."""
        if version is not None and version.isdecimal():
            self.version = int(version)
        return self.version


class Dialect(Protocol):
    """How one kind of server is spoken to. `release` is its own version, where it tells it, and `arithmetic` the dtype
    in which it computes, where that is known. `bits` names what decides the last bit, where the batch does not."""

    name: str
    release: str | None
    arithmetic: str | None
    bits: str | None
    weights: Weights

    @property
    def takes_deltas(self) -> bool: ...

    def check(self) -> None:
        """Raise EngineError if the server cannot do what training needs, saying how to start it instead."""
        ...

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None
    ) -> list[list[Completion]]: ...

    def score(self, sequences: list[list[int]]) -> list[list[TokenScore]]: ...

    def update(self, payload: bytes, version: int, sha256: str) -> None: ...

    def stage(self, payload: bytes, version: int, sha256: str) -> None:
        """Bring all weights of a version and check them, without using them yet."""
        ...

    def stage_delta(self, parts: Sequence[bytes], base_version: int, version: int) -> None:
        """Bring what changes the weights in use, and check it, without using it yet."""
        ...

    def switch(self, version: int, sha256: str | None) -> None:
        """Use what was staged. `sha256`, if given, is `set_sha256` of the result."""
        ...

    def check_exchange(self, form: str) -> None:
        """Raise EngineError if weights of this format cannot be brought to the server, as far as can be asked."""
        ...

    def in_use(self) -> str | None:
        """What tells the weights in use from others, in the server's words; None where it does not tell."""
        ...

    def update_delta(self, parts: Sequence[bytes], base_version: int, version: int, sha256: str) -> float: ...

    def account(self) -> Account | None:
        """What the server holds of the weights that it was given; None where it does not tell."""
        ...


def staged_update(server: Dialect, parts: Sequence[bytes], base_version: int, version: int, sha256: str) -> float:
    """`update_delta` of a server that stages: the seconds of the switch."""
    server.stage_delta(parts, base_version, version)
    began = time.perf_counter()
    server.switch(version, sha256)
    return time.perf_counter() - began


class WholeWeights:
    """What a dialect inherits whose server takes weights only as a whole."""

    name: str
    arithmetic: str | None = None
    bits: str | None = None
    takes_deltas = False

    def account(self) -> Account | None:
        return None

    def stage_delta(self, parts: Sequence[bytes], base_version: int, version: int) -> None:
        """Raises EngineError."""
        self.update_delta(parts, base_version, version, "")

    def update_delta(self, parts: Sequence[bytes], base_version: int, version: int, sha256: str) -> float:
        """Raises EngineError."""
        raise EngineError(
            f"{self.name} takes new weights as a whole: put the delta to version {version} together first "
            "(`isthmus follow` does), or send a full update"
        )


def spread_seed(seed: int, *place: int) -> int:
    """A seed for one place in a batch. Near seeds and places give far ones: servers add the number of the choice, so
    that of two prompts with seeds 7 and 8 the second choice of one would draw what the first of the other draws."""
    text = ",".join(map(str, (seed, *place))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> (64 - _SEED_BITS)


def prompt_seeds(prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None) -> list[int]:
    """One seed per prompt. With `seeds` it depends on the prompt's own alone, else on its place too."""
    if seeds is None:
        return [spread_seed(sampling.seed, place) for place in range(len(prompts))]
    if len(seeds) != len(prompts):
        raise EngineError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one for each")
    return [spread_seed(seed) for seed in seeds]


def _kind(folder: Path) -> dict[str, Any]:
    """What says whether weights of one bundle fit another."""
    config = read_config(folder)
    architecture = architecture_of(folder, config).model_dump(mode="json", exclude={"from_"})
    return {"architecture": architecture, "format": recognise_format(config).name}


class Exchange:
    """The folder through which weights reach a server that reads them from storage it shares with us."""

    def __init__(self, folder: Path | None, bundle: Path | None, prepared: Prepared):
        self.folder, self.bundle, self.prepared = folder, bundle, prepared

    def check(self, url: str, served: str | None) -> None:
        """Raise EngineError without a folder; or if what the server reads lies here, and is of another model."""
        if self.folder is None:
            raise EngineError(
                f"the server at {url} takes new weights only from storage that it shares with us: write exchange = "
                "FOLDER under its pool, one that both see under the same path"
            )
        if served is None or self.bundle is None or not (Path(served) / CONFIG).is_file():
            return
        try:
            theirs, ours = (json.dumps(_kind(Path(one)), sort_keys=True) for one in (served, self.bundle))
        except IsthmusError as error:
            raise EngineError(
                f"the server at {url} serves {served}, which is no bundle of this model: {error}"
            ) from None
        if theirs != ours:
            raise EngineError(
                f"the server at {url} serves {served}, a model of another shape or format than the recipe's"
            )

    def write(self, payload: bytes, version: int, sha256: str) -> Path:
        """The weights as a bundle. Raises EngineError if the message is damaged or does not fit the served bundle."""
        if self.folder is None:
            raise EngineError(
                "this server takes new weights over HTTP only from storage that it shares with us: give HttpEngine "
                "exchange=FOLDER, one that both see under the same path. A server of isthmus takes them in the request"
            )
        if self.bundle is None:
            raise EngineError("start(bundle_folder) must name the bundle that the server serves before an update")
        bundle, target = self.bundle, self.folder.absolute() / f"weights-{version}"

        def write() -> Path:
            with_other_weights(target, bundle, tensors)
            return target

        try:
            tensors = self.prepared.unpacked(payload, sha256)
            return self.prepared.written((payload, version, bundle), target, write)
        except (IsthmusError, OSError) as error:
            raise EngineError(f"the new weights cannot be handed over: {error}") from error

    def keep_only(self, used: Path) -> None:
        """Remove what was written here before the weights that are in use now."""
        for folder in used.parent.glob("weights-*"):
            if folder != used:
                shutil.rmtree(folder, ignore_errors=True)
