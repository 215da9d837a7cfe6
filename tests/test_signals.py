"""Signals, sent to a process that does nothing but listen."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from conftest import ROOT

from distrib.runtime import signals
from distrib.runtime.signals import SIGNALS

pytestmark = pytest.mark.slow

LISTEN = """
import os, time
from distrib.runtime import signals
signals.SAME_PRESS = float(os.environ.get("SAME_PRESS", signals.SAME_PRESS))
signals.listen()
print("listening", flush=True)
while not signals.received():
    time.sleep(0.01)
print(signals.received(), flush=True)
time.sleep(60)
"""


HEED_HANGUP = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # also where the tests are run under nohup


@pytest.fixture
def listener(request: pytest.FixtureRequest) -> Iterator["subprocess.Popen[str]"]:
    """A process that listens; a parameter is how many seconds it takes two SIGINT for one."""
    environment = os.environ | {"SAME_PRESS": str(getattr(request, "param", signals.SAME_PRESS))}
    command = [sys.executable, "-c", HEED_HANGUP + LISTEN]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_process_lives(listener: "subprocess.Popen[str]", number: int) -> None:
    listener.send_signal(number)
    assert listener.stdout is not None
    assert listener.stdout.readline() == f"{int(number)}\n"
    listener.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    assert listener.poll() is None


def test_a_lost_terminal_stops_no_run_under_nohup() -> None:
    with subprocess.Popen(["nohup", sys.executable, "-c", LISTEN], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == f"{int(signal.SIGUSR1)}\n"
        process.kill()


@pytest.mark.parametrize("listener", [0], indirect=True)
def test_a_second_ctrl_c_leaves_at_once(listener: "subprocess.Popen[str]") -> None:
    listener.send_signal(signal.SIGINT)
    assert listener.stdout is not None
    assert listener.stdout.readline() == "2\n"
    listener.send_signal(signal.SIGINT)
    assert listener.wait(300) == 130


@pytest.mark.parametrize("listener", [300], indirect=True)
def test_the_same_ctrl_c_may_arrive_twice(listener: "subprocess.Popen[str]") -> None:
    listener.send_signal(signal.SIGINT)
    assert listener.stdout is not None
    assert listener.stdout.readline() == "2\n"
    listener.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert listener.poll() is None


ENDING = """
import signal, time
from distrib.runtime import exits, signals

class Slow:
    def __del__(self, say=print, wait=time.sleep):  # while Python takes down its modules, after it has given up its handlers
        say("ending", flush=True)
        wait(1)

last = Slow()
signals.listen()
exits.leave(0)
"""


def test_signals_that_come_as_a_finished_run_ends_do_not_make_it_fail() -> None:
    with subprocess.Popen([sys.executable, "-c", ENDING], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ending\n"
        for number in SIGNALS:
            process.send_signal(number)
            time.sleep(0.05)
        assert process.wait(300) == 0


LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
sys.stdin.read()
"""


def test_a_launchers_death_is_a_sigterm_to_its_ranks() -> None:
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, LISTEN.replace("time.sleep(60)", "")],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "listening\n"
        launcher.kill()
        assert launcher.stdout.readline() == f"{int(signal.SIGTERM)}\n"
        assert launcher.stdout.read() == ""  # the rank has left too
