"""Errors that are printed as one line, without a traceback, and their exit codes."""

from typing import Any

FAILED, MISTAKE, LOST_RANK, HANG, DISK = 1, 2, 3, 4, 5  # exit codes; docs/surviving.md explains them
MAY_PASS = {LOST_RANK, HANG, DISK}  # failures after which the same command may succeed

# Parts of the messages of torch's backends when another rank has exited.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "was aborted")


class UserError(ValueError):
    """A mistake that the user can correct. `speaks`: whether this rank prints it; None: each rank makes it by itself."""

    code = MISTAKE
    speaks: bool | None = None


class RunError(RuntimeError):
    """A failure that is not the user's mistake. `facts` go into status.json."""

    code = FAILED
    speaks: bool | None = None

    def __init__(self, text: str, **facts: Any) -> None:
        super().__init__(text)
        self.facts = facts


class LostRankError(RunError):
    """The process of a rank has ended."""

    code = LOST_RANK


class DiskError(RunError):
    """A disk is full, or cannot be read or written now."""

    code = DISK


def exit_code(error: BaseException) -> int:
    """The exit code of a program that ends with this error."""
    return error.code if isinstance(error, UserError | RunError) else FAILED


def one_line(error: BaseException) -> str:
    """The message of an error as one line."""
    return " ".join(str(error).split())


def lost_rank(error: BaseException) -> bool:
    """Whether an error of a collective means that the connection to another rank was lost."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)
