"""The two errors that a user reads in one line, without a traceback, and the one that says that another rank is gone."""

# What torch's backends say when the other end of a connection has gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "was aborted")


class UserError(ValueError):
    """A mistake that the user can mend: the run ends with exit code 2."""


class RunError(RuntimeError):
    """What ends a run and is no mistake of the user's: rank `speaker` reports it, and the run ends with exit code 1."""

    def __init__(self, text: str, speaker: int = 0) -> None:
        super().__init__(text)
        self.speaker = speaker


def one_line(error: BaseException) -> str:
    """The message of an error, without line breaks."""
    return " ".join(str(error).split())


def lost_rank(error: BaseException) -> bool:
    """Whether an error is that of a rank which has lost another one."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)
