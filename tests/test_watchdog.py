"""The watchdog of one process; tests/test_faults.py lets it end real runs."""

import faulthandler
import time
from pathlib import Path

import pytest

from distrib.config import Config
from distrib.runtime.watchdog import Watchdog


def test_a_program_that_goes_on_after_its_run_is_not_ended_by_the_limit_of_a_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed: list[bool] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **options: armed.append(options["exit"]))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", armed.clear)
    with Watchdog(Config(run_dir=str(tmp_path))) as watchdog:
        watchdog.stopwatch.enter("step")
        while not armed:
            time.sleep(0.01)
    assert armed == []
