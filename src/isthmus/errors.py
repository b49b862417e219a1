"""The errors a user can meet. Each says what happened, why, and what to write instead."""


class IsthmusError(Exception):
    """Wrong usage or bad input: the command ends with exit code 2."""

    exit_code = 2


class GateRefused(IsthmusError):
    """A gate did its work and said no: the command ends with exit code 1."""

    exit_code = 1


class DamagedFile(GateRefused):
    """Stored bytes do not match their recorded hash."""


class RanksFailed(IsthmusError):
    """A rank of a stage stopped, and not because of an error that the user can meet."""

    def __init__(self, message: str):
        super().__init__(f"{message}\nRun the same command again to go on from the last checkpoint.")
