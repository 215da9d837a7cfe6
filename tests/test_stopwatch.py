"""How long each phase of a run takes."""

import pytest

from distrib.runtime import stopwatch
from distrib.runtime.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the stopwatch sees."""
    now = [100.0]
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: now[0])
    return now


def test_only_the_time_of_steps_counts_for_their_speed_and_only_since_the_last_report(clock: list[float]) -> None:
    watch = Stopwatch()
    clock[0] += 5
    watch.enter("step")
    for _ in range(10):
        clock[0] += 0.5
        watch.stepped()
    assert watch.steps_per_second() == pytest.approx(2)
    with watch.during("evaluation"):
        clock[0] += 100
    for _ in range(4):
        clock[0] += 1
        watch.stepped()
    assert watch.steps_per_second() == pytest.approx(1)
    assert watch.overall() == pytest.approx(14 / 9)
    assert watch.seconds == pytest.approx({"start": 5, "step": 9, "evaluation": 100, "save": 0})


def test_a_state_costs_the_steps_and_evaluations_since_the_save_before(clock: list[float]) -> None:
    watch = Stopwatch()
    watch.enter("step")
    clock[0] += 3
    with watch.during("evaluation"):
        clock[0] += 2
    with watch.during("save"):
        clock[0] += 7
        assert watch.seconds_since_save() == pytest.approx(5)
    clock[0] += 1
    watch.stepped()
    assert watch.seconds_since_save() == pytest.approx(1)


def test_a_phase_that_is_interrupted_goes_on_also_after_an_error(clock: list[float]) -> None:
    watch = Stopwatch()
    watch.enter("step")
    with pytest.raises(ZeroDivisionError), watch.during("save"):
        1 / 0  # noqa: B018
    assert watch.current[0] == "step"
