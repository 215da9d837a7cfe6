"""Run by test_ranks.py under torchrun: what ranks do together, noted by each. usage: agreeing.py OUT"""

import json
import sys
import time
from pathlib import Path

from accelerate import PartialState

from distrib.config import Config
from distrib.errors import UserError
from distrib.runtime import exits, ranks


def main(out: Path) -> None:
    ranks.connect(Config(threads=1))
    rank = PartialState().process_index

    def fetch(leads: bool) -> bool:
        if leads:
            time.sleep(0.5)
            (out / "fetched").write_text("")
        return (out / "fetched").exists()

    def fail(leads: bool) -> None:
        if leads:
            raise UserError("rank 0 could not")

    noted = {"first": ranks.rank0_first(fetch), "agreed": ranks.broadcast_object(f"rank {rank}'s")}
    try:
        ranks.rank0_first(fail)
    except UserError as error:
        noted["told"] = str(error)
    (out / f"rank{rank}.json").write_text(json.dumps(noted))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    exits.leave(0)
