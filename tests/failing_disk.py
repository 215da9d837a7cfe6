"""train.py on a disk that fails. usage: failing_disk.py FAULT [train.py's arguments]

FAULT is CALL:ERRNO:TIMES, such as image:ESTALE:1. A CALL raises ERRNO the first TIMES times, in each process; `checkpoint` is
reading one, on other ranks than 0.
"""

import errno
import fcntl
import hashlib
import os
import sys
from collections.abc import Callable
from typing import Any

from distrib.runtime import signals

if __name__ == "__main__":
    signals.listen()

from PIL import Image

from distrib import cli
from distrib.runtime import exits
from distrib.runtime.environment import env_rank
from distrib.training import state

call, name, times = sys.argv[1].split(":")
failures: list[int] = []
CALLS: dict[str, list[tuple[Any, str]]] = {
    "image": [(Image, "open")],
    "lock": [(fcntl, "lockf")],
    "checkpoint": [(hashlib, "file_digest"), (state, "load_file"), (state, "safe_open")] if env_rank() else [],
}


def failing(work: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **options: Any) -> Any:
        if len(failures) < int(times):
            failures.append(1)
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        return work(*args, **options)

    return called


if __name__ == "__main__":
    for module, function in CALLS[call]:
        setattr(module, function, failing(getattr(module, function)))
    exits.leave(cli.main(["train", *sys.argv[2:]]))
