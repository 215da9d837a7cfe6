"""Errors that are printed as one line, without a traceback."""

# Parts of the messages of torch's backends when another rank has exited.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "was aborted")


class UserError(ValueError):
    """A mistake that the user can correct: the process exits with code 2."""


class RunError(RuntimeError):
    """A failure that is not the user's mistake: rank `speaker` prints it, and the process exits with code 1."""

    def __init__(self, text: str, speaker: int = 0) -> None:
        super().__init__(text)
        self.speaker = speaker


def one_line(error: BaseException) -> str:
    """The message of an error as one line."""
    return " ".join(str(error).split())


def lost_rank(error: BaseException) -> bool:
    """Whether an error means that the connection to another rank was lost."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)
