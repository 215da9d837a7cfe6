"""The control channel between ranks, here as threads: who has exited, who fails, and who asks to stop."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

from distrib.errors import LostRankError, RunError, UserError
from distrib.runtime import connection, control_channel
from distrib.runtime.control_channel import ControlChannel, Failure, open_channel

WAIT = 60.0  # seconds for what happens at once
LOST = RuntimeError("[pair.cc] Connection closed by peer [127.0.0.1]")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes of processes that a channel has ended."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(control_channel, "GRACE", 0.05)
    return codes


@pytest.fixture
def channels() -> Iterator[list[ControlChannel]]:
    """Three ranks, connected."""
    store = torch.distributed.HashStore()
    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor() as pool:
        patched.setenv("MASTER_ADDR", "127.0.0.1")
        patched.setattr(control_channel, "count", Zero())
        opened = list(pool.map(lambda rank: open_channel(store, rank, 3), range(3)))
    yield opened
    for each in opened:
        each.close(finished=False)


class Zero:
    """The first channel of each of several ranks in one process."""

    def __next__(self) -> int:
        return 0


def vanish(channel: ControlChannel) -> None:
    """What the kernel does to the connections of a process that is killed."""
    channel.closed = True  # a dead process has no threads
    for each in channel.peers.values():
        each.shut_down()


def until(happened: Callable[[], bool]) -> None:
    assert any(happened() or threading.Event().wait(0.01) for _ in range(int(WAIT / 0.01)))


def test_a_rank_that_has_exited_is_named_on_all_others_and_rank_0_says_it(
    channels: list[ControlChannel], ended: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = []
    channels[0].last_words = lambda failure: facts.append(failure.facts)
    vanish(channels[2])
    until(lambda: len(ended) == 2)
    assert ended == [3, 3]
    assert facts == [{"cause": "rank 2 has exited", "rank": 2}]
    said = "distrib: rank 2 has exited, so the other ranks exit too; the same command resumes from the last checkpoint\n"
    assert capsys.readouterr().err == said


def test_if_rank_0_has_exited_another_rank_says_it(
    channels: list[ControlChannel], ended: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    vanish(channels[0])
    until(lambda: len(ended) == 2)
    assert capsys.readouterr().err.count("distrib: rank 0 has exited, so the other ranks exit too") == 1


def test_ranks_that_exit_together_are_named_together(channels: list[ControlChannel], ended: list[int]) -> None:
    for rank in (2, 1):
        vanish(channels[rank])
    until(lambda: bool(ended))
    assert channels[0].failure
    assert channels[0].failure.text.startswith("rank 1, 2 has exited, ")


def test_a_rank_that_has_finished_is_not_missed(channels: list[ControlChannel], ended: list[int]) -> None:
    channels[2].close(finished=True)
    vanish(channels[1])
    until(lambda: bool(ended))
    assert channels[0].failure
    assert channels[0].failure.gone == [1]


def test_the_error_of_one_rank_is_that_of_all_and_rank_0_says_it(channels: list[ControlChannel]) -> None:
    mine = channels[2].settle(UserError("this machine has no bf16"))
    assert isinstance(mine, UserError)
    assert mine.speaks is False
    for rank, speaks in ((0, True), (1, False)):
        assert channels[rank].failed.wait(WAIT)
        found = channels[rank].settle(LOST)
        assert isinstance(found, UserError)
        assert (str(found), found.speaks) == ("this machine has no bf16", speaks)


def test_an_error_that_all_ranks_have_is_said_once(channels: list[ControlChannel]) -> None:
    with ThreadPoolExecutor() as pool:
        errors = list(pool.map(lambda channel: channel.settle(RunError("the loss is not finite")), channels))
    assert [getattr(each, "speaks", None) for each in errors] == [True, False, False]
    assert channels[0].settle(errors[0]) is errors[0]  # a second time, where another context is left


def test_a_lost_connection_is_explained_by_the_rank_that_has_exited(channels: list[ControlChannel]) -> None:
    vanish(channels[1])
    for rank, speaks in ((2, False), (0, True)):
        found = channels[rank].settle(LOST)
        assert isinstance(found, LostRankError)
        assert (found.facts, found.speaks) == ({"cause": "rank 1 has exited", "rank": 1}, speaks)


def test_an_unexpected_error_of_a_rank_is_named_on_the_others(channels: list[ControlChannel]) -> None:
    error = ZeroDivisionError("division by zero")
    assert channels[1].settle(error) is error
    what = "ZeroDivisionError: division by zero"
    assert channels[0].failure == Failure(f"rank 1 failed: {what}", 1, facts={"cause": what, "rank": 1})


def test_if_rank_0_does_not_answer_a_rank_says_its_error_itself(
    channels: list[ControlChannel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_channel, "ANSWER", 0.05)
    stopped = threading.Event()  # rank 0 is, as by SIGSTOP, until then
    monkeypatch.setattr(channels[0], "_receive", lambda rank: not stopped.wait())
    found = channels[2].settle(RunError("no progress"))
    stopped.set()
    assert isinstance(found, RunError)
    assert found.speaks is True


def test_rank_0_hears_who_asks_to_stop_and_its_decision_reaches_all(channels: list[ControlChannel]) -> None:
    channels[1].ask_to_stop(0)
    channels[2].ask_to_stop(15)
    until(lambda: channels[0].asked == 15)
    channels[0].decide(step=7, asked=15, next=8)
    assert [channel.decision() for channel in channels[1:]] == [{"step": 7, "asked": 15, "next": 8}] * 2


def test_a_rank_that_waits_for_a_decision_leaves_when_another_one_has_exited(channels: list[ControlChannel]) -> None:
    vanish(channels[2])
    with pytest.raises(LostRankError, match="rank 2 has exited"):
        channels[1].decision()


def test_a_stranger_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        accepted = pool.submit(connection.accept, listener, "x" * connection.TOKEN, 2)
        with socket.create_connection(listener.getsockname()) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: rank0\r\nUser-Agent: scanner\r\n\r\n")
            with suppress(ConnectionResetError):
                assert not stranger.recv(1)
        rank = connection.dial(["127.0.0.1"], listener.getsockname()[1], "x" * connection.TOKEN + "00000001")
        assert accepted.result(WAIT).keys() == {1}
        for each in (rank, accepted.result()[1]):
            each.socket.close()


def test_a_rank_that_cannot_reach_rank_0_says_which_address_it_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RunError, match=rf"rank 3 cannot connect to rank 0, port {port} \(127.0.0.1: Connection refused\): is"):
        connection.dial(["127.0.0.1"], port, "x" * connection.TOKEN + "00000003")
