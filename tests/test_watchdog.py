"""The watchdog of one process; tests/test_faults.py lets it end real runs."""

import faulthandler
import threading
import time
from pathlib import Path

import pytest
import torch

from distrib.config import Config
from distrib.runtime import ranks
from distrib.runtime.watchdog import Watchdog, device_is_busy


def test_a_program_that_goes_on_after_its_run_is_not_ended_by_the_limit_of_a_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[bool] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **options: armed.append(options["exit"]))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", armed.clear)
    with Watchdog(Config(run_dir=str(tmp_path))) as watching:
        watching.stopwatch.enter("step")
        while not armed:
            time.sleep(0.01)
    assert armed == []


QUERIES = {"done": lambda: True, "busy": lambda: False, "silent": threading.Event().wait}


@pytest.mark.parametrize("name", QUERIES)
def test_a_rank_whose_gpu_has_work_to_do_waits_for_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A stand-in for a GPU: with NCCL, a rank that waits for others stands in whatever call launches a kernel."""

    class Stream:
        def __init__(self, device: object) -> None:
            assert device == "the device"

        def query(self) -> bool:
            return QUERIES[name]()

    assert device_is_busy() == torch.cuda.is_initialized()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_stream", Stream)
    monkeypatch.setattr(ranks, "device", lambda: "the device")
    assert device_is_busy() == (name != "done")
