"""Run by test_ranks.py under torchrun: trains with each comm_hook in turn.

usage: rounded.py OUT HOOK,HOOK,... [key=value ...]
"""

import sys
from pathlib import Path

from distrib import train
from distrib.command_line import load_config
from distrib.runtime import exits


def main(out: Path, hooks: list[str], keys: list[str]) -> None:
    for hook in hooks:
        train(load_config([*keys, f"comm_hook={hook}", f"run_dir={out / hook}"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
    exits.leave(0)
