"""Run by test_sharing.py under torchrun: ranks load the digits, and note in whose memory. usage: sharing.py OUT [alone|killed]

With `alone` no memory is to be had for sharing; with `killed` the ranks end by SIGKILL.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch

from distrib.config import Config, DataConfig
from distrib.data import sharing
from distrib.data.datasets import load_source
from distrib.runtime import exits, ranks
from distrib.runtime.environment import env_rank


def refuse(name: str) -> NoReturn:
    raise OSError("no memory")


def mappings() -> dict[str, int]:
    """What this process maps of files without a name: for each inode, the kilobytes that are in memory."""
    found, inode = {}, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inode = words[4] if "/memfd:distrib-" in line else ""
        elif inode and words[0] == "Rss:":
            found[inode] = int(words[1])
    return found


def main(out: Path, way: str) -> None:
    ranks.connect(Config(threads=1))
    if way == "alone":
        os.memfd_create = refuse
    source, own = sharing.load_shared(DataConfig()), load_source(DataConfig(), download=False)
    links = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.exists() or each.is_symlink()]
    noted = {
        "same": all(
            torch.equal(mine, expected)
            for a, b in ((source.train, own.train), (source.val, own.val))
            for mine, expected in ((a.images, b.images), (a.targets, b.targets))
        )
        and (source.classes, source.mean) == (own.classes, own.mean),
        "mapped": mappings(),
        "open": [link for link in links if "distrib-" in link],
    }
    (out / f"rank{env_rank()}.json").write_text(json.dumps(noted))
    ranks.all_gather_object(None)
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), (*sys.argv[2:], "")[0])
    exits.leave(0)
