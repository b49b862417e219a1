"""The errors a user can meet. Each says what happened, why, and what to write instead."""

import difflib
from collections.abc import Iterable


class IsthmusError(Exception):
    """Wrong usage or bad input: the command ends with exit code 2."""

    exit_code = 2


class GateRefused(IsthmusError):
    """A gate did its work and said no: the command ends with exit code 1."""

    exit_code = 1


class DamagedFile(GateRefused):
    """Stored bytes do not match their recorded hash."""


class Diverged(IsthmusError):
    """An update computed what is no number, and neither computing it again nor leaving its batch out helped."""


class Unrepeatable(IsthmusError):
    """The same update computed twice came out differently, and computing it again did not tell which is right."""


class TooSlow(IsthmusError):
    """Updates are so slow that a step had better go on elsewhere; what is done is saved."""


class EnginesLost(IsthmusError):
    """All engines that a step had started on nodes of a cluster are gone; it can start others."""


class SaveFailed(IsthmusError):
    """A checkpoint could not be written; older ones stay as they were."""


class RanksFailed(IsthmusError):
    """A rank of a stage stopped, and not because of an error that the user can meet. `rank` is it, where known."""

    def __init__(self, message: str, rank: int | None = None):
        self.rank = rank
        super().__init__(f"{message}\nRun the same command again to go on from the last checkpoint.")


def suggestion(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The end of a message about an unknown word: names that it may mean, else `otherwise`, or all that are known."""
    names = sorted(known)
    begun = [name for name in names if word and name.startswith(word.lower())]
    if close := begun[:4] or difflib.get_close_matches(word.lower(), names, n=1):
        return f"; did you mean {' or '.join(map(repr, close))}?"
    if otherwise is None and names:
        otherwise = f"known: {', '.join(names)}"
    return f"; {otherwise}" if otherwise else ""
