"""What becomes of memory that a step has freed."""

import resource

import pytest
import torch

from distrib import memory


def pages_asked_for(size: int) -> int:
    """The pages that the kernel has to give when a tensor of so many bytes is made and freed, a few times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(size, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_what_a_step_frees_is_there_for_the_next_one() -> None:
    memory.keep_freed_memory()
    size = 64 << 20
    # Until the heap has settled, small blocks that others keep may take the place of a large one that was freed.
    settled = min(pages_asked_for(size) for _ in range(10))
    assert settled < size // resource.getpagesize() // 10


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.keep_freed_memory()
