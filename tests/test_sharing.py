"""Ranks of a machine hold a data set in memory once. Real processes."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sharing
import torch
from conftest import launch

from distrib.data.sharing import Offer, copy_to_shared_memory

pytestmark = pytest.mark.slow


def noted(out: Path, world: int, *way: str) -> tuple[int, list[dict[str, Any]]]:
    done = launch(world, sharing.__file__, out, *way)
    return done.returncode, [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(world)]


def mapped_by_any(inode: str) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if any("/memfd:distrib-" in line and line.split()[4] == inode for line in maps.read_text().splitlines()):
                return True
    return False


@pytest.mark.parametrize("way", ["", "killed"])
def test_the_ranks_of_a_machine_map_the_same_memory_and_leave_none_behind(tmp_path: Path, way: str) -> None:
    returned, ranks = noted(tmp_path, 3, way)
    assert (returned == 0) == (way != "killed")
    assert [each["same"] for each in ranks] == [True] * 3
    assert len(ranks[0]["mapped"]) == 4  # images and labels, to train on and to validate
    assert ranks[0]["mapped"].keys() == ranks[1]["mapped"].keys() == ranks[2]["mapped"].keys()
    assert ranks[1]["mapped"][max(ranks[1]["mapped"], key=ranks[1]["mapped"].__getitem__)] >= 1437 * 64 // 1024
    assert [each["open"] for each in ranks] == [[]] * 3  # so that the mappings are all that holds it
    assert not any(mapped_by_any(inode) for inode in ranks[0]["mapped"])
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("distrib")]


def test_where_no_memory_is_shared_each_rank_loads_a_copy(tmp_path: Path) -> None:
    returned, ranks = noted(tmp_path, 2, "alone")
    assert returned == 0
    assert [(each["same"], each["mapped"]) for each in ranks] == [(True, {})] * 2


def test_an_offer_of_another_machine_is_not_taken() -> None:
    offer = copy_to_shared_memory([torch.arange(5)])
    (file,) = offer.files
    assert offer.tensors()[0].tolist() == [0, 1, 2, 3, 4]
    for foreign in (
        Offer(offer.process, "distrib-0", offer.files, offer.kinds),
        Offer(2**22 + 1, offer.name, offer.files, offer.kinds),
    ):
        with pytest.raises(FileNotFoundError):
            foreign.tensors()
    os.close(file)
    with pytest.raises(FileNotFoundError):
        offer.tensors()
