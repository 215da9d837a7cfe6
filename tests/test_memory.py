"""What becomes of memory that a step has freed."""

import resource

import pytest
import torch

from distrib.errors import UserError
from distrib.training import memory


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


def test_a_lack_of_memory_is_known_by_its_words() -> None:
    lacks = [
        "DefaultCPUAllocator: can't allocate memory: you tried",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED when",
    ]
    assert all(memory.ran_out(RuntimeError(words)) for words in lacks)
    assert memory.ran_out(torch.OutOfMemoryError())
    assert memory.ran_out(MemoryError())
    assert not memory.ran_out(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_of_parts_of_a_step_are_refused(mode: str) -> None:
    with pytest.raises(UserError, match=rf"compile={mode} does not work with micro_batches=2: use compile=default"):
        memory.refuse_graphs_of_parts(mode, 2, torch.device("cuda"))
    memory.refuse_graphs_of_parts(mode, 1, torch.device("cuda"))
    memory.refuse_graphs_of_parts("default", 2, torch.device("cuda"))
    memory.refuse_graphs_of_parts(mode, 2, torch.device("cpu"))


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.keep_freed_memory()
