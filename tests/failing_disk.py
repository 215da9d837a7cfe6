"""train.py on a disk that fails. usage: failing_disk.py FAULT [train.py's arguments]

FAULT is CALL:ERRNO:TIMES, such as image:ESTALE:1. For a CALL, ERRNO is raised the first TIMES times, in each process.
"""

import errno
import fcntl
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

call, name, times = sys.argv[1].split(":")
failures: list[int] = []


def failing(work: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **options: Any) -> Any:
        if len(failures) < int(times):
            failures.append(1)
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        return work(*args, **options)

    return called


if __name__ == "__main__":
    module: Any = {"image": Image, "lock": fcntl}[call]
    function = {"image": "open", "lock": "lockf"}[call]
    setattr(module, function, failing(getattr(module, function)))
    exits.leave(cli.main(["train", *sys.argv[2:]]))
