"""The control channel: a TCP connection from each rank to rank 0, beside the collectives.

It carries what cannot wait for a collective: that a process has ended, why a rank fails, and before which step all ranks stop.
The kernel closes a connection when its process ends, in whatever way, so a death is known at once, whatever the backend of the
collectives does. If a machine dies, TCP's keepalive closes its connections after about 15 seconds.
"""

import itertools
import json
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from queue import SimpleQueue
from typing import Any, NoReturn

from distrib.errors import (
    DISK,
    LOST_RANK,
    MISTAKE,
    DiskError,
    LostRankError,
    RunError,
    UserError,
    exit_code,
    lost_rank,
    one_line,
)
from distrib.runtime.connection import TOKEN, Connection, accept, allow_open_files, dial
from distrib.runtime.environment import env_local_rank

GATHER = 0.2  # seconds in which rank 0 collects the ranks that exit together
GRACE = 3.0  # seconds that the main thread has to leave the run by itself after another rank failed
ANSWER = 2.0  # seconds in which rank 0 answers, if it is alive


@dataclass(frozen=True)
class Failure:
    """Why a run ends on all ranks: a line for the user, the exit code, the ranks that exited, and facts for status.json."""

    text: str
    code: int
    gone: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, error: Exception, rank: int) -> "Failure":
        """The failure of the rank that raised `error`."""
        if isinstance(error, UserError | RunError):
            return cls(one_line(error), exit_code(error), facts=getattr(error, "facts", {}))
        text = f"{type(error).__name__}: {one_line(error)}"
        return cls(f"rank {rank} failed: {text}", exit_code(error), facts={"cause": text, "rank": rank})

    @classmethod
    def of_lost(cls, gone: list[int]) -> "Failure":
        """The failure of a run some of whose processes have ended."""
        names = f"rank {', '.join(map(str, sorted(gone)))} has exited"
        text = f"{names}, so the other ranks exit too; the same command resumes from the last checkpoint"
        return cls(text, LOST_RANK, gone, {"cause": names, "rank": min(gone)})

    def error(self) -> UserError | RunError:
        """This failure as an exception."""
        if self.code == MISTAKE:
            return UserError(self.text)
        return {LOST_RANK: LostRankError, DISK: DiskError}.get(self.code, RunError)(self.text, **self.facts)


class ControlChannel:
    """This rank's end of the control channel: rank 0 has a connection to each rank, and the others one to rank 0."""

    def __init__(self, rank: int, peers: dict[int, Connection]) -> None:
        self.rank, self.peers = rank, peers
        self.failure: Failure | None = None  # the first one
        self.failed, self.leaving, self.ending = threading.Event(), threading.Event(), threading.Lock()
        self.closed, self.rank0_answers = False, True
        self.asked = 0  # the largest number that was passed to `ask_to_stop`; on rank 0, by any rank
        self.decisions: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self.last_words: Callable[[Failure], None] = lambda failure: None  # called before a thread ends this process
        self.thread = threading.Thread(target=self._read, name="control channel", daemon=True)
        self.thread.start()

    def ask_to_stop(self, number: int) -> None:
        """Ask rank 0 to stop all ranks."""
        if number > self.asked:
            self.asked = number
            self._send_to_rank0("ask to stop", number=number)

    def decide(self, **decision: Any) -> None:
        """Send rank 0's decision to the other ranks."""
        for peer in self.peers.values():
            peer.send("decide", **decision)

    def decision(self) -> dict[str, Any]:
        """Wait for the next decision of rank 0. Raises the error of a rank that failed."""
        decision = self.decisions.get()
        if decision is None:
            assert self.failure
            raise self.failure.error()
        return decision

    def settle(self, error: Exception) -> Exception:
        """The error with which this rank leaves the run: if `error` came from the loss of another rank, that rank's failure.

        Otherwise the other ranks learn of `error` and leave too.
        """
        if self.leaving.is_set():
            return error
        self.leaving.set()
        if lost_rank(error):
            self.rank0_answers = self.failed.wait(ANSWER)
            error = self.failure.error() if self.failure else LostRankError(f"another rank has exited ({one_line(error)})")
        else:
            self.fail(Failure.of(error, self.rank))
        if isinstance(error, UserError | RunError):
            error.speaks = self.speaks()
        return error

    def fail(self, failure: Failure) -> None:
        """Tell all ranks of a failure, unless there was one before. Other ranks than 0 wait for rank 0's answer."""
        if self.rank and not self.failed.is_set():
            self._send_to_rank0("fail", **asdict(failure))
            self.rank0_answers = self.failed.wait(ANSWER)
        self._end(failure)

    def speaks(self) -> bool:
        """Whether this rank reports the failure. Rank 0 does; if it has exited, a rank of each machine does."""
        if self.rank == 0 or not self.rank0_answers:
            return True
        return self.failure is not None and 0 in self.failure.gone and (self.rank == 1 or env_local_rank() == 0)

    def end_process(self) -> NoReturn:
        """End this process because of the failure, from any thread."""
        self.ending.acquire()  # for ever: one thread does this
        failure = self.failure
        assert failure
        if self.speaks():
            self.last_words(failure)
            print(f"distrib: {failure.text}", file=sys.stderr, flush=True)
        os._exit(failure.code)

    def close(self, *, finished: bool) -> None:
        """Close the connections; `finished` if this rank has left the run without a failure."""
        self.closed = True
        self.leaving.set()
        for peer in self.peers.values():
            if finished:
                peer.send("finish")
            peer.shut_down()
        self.thread.join()
        for peer in self.peers.values():
            peer.socket.close()

    def _read(self) -> None:
        """Read messages until this rank leaves. If another rank fails and the main thread does not leave, end this process."""
        gone: list[int] = []
        with selectors.DefaultSelector() as selector:
            for rank, peer in self.peers.items():
                selector.register(peer.socket, selectors.EVENT_READ, rank)
            while selector.get_map() and not self.failed.is_set():
                ready = selector.select(GATHER if gone else None)
                for key, _ in ready:
                    if not self._receive(key.data):
                        selector.unregister(key.fileobj)
                        gone += [] if self.peers[key.data].finished or self.closed else [key.data]
                if gone and not ready:
                    break
        if gone and not self.failed.is_set():
            self._end(Failure.of_lost(gone))
        if self.failed.is_set() and not self.leaving.wait(GRACE):
            self.end_process()

    def _receive(self, rank: int) -> bool:
        """Handle the messages of a rank; False if it is gone."""
        messages = self.peers[rank].receive()
        for message in messages or []:
            kind = message.pop("kind")
            if kind == "finish":
                self.peers[rank].finished = True
            elif kind == "ask to stop":
                self.asked = max(self.asked, message["number"])
            elif kind == "decide":
                self.decisions.put(message)
            elif kind == "fail":
                self._end(Failure(**message))
        return messages is not None

    def _end(self, failure: Failure) -> None:
        """Remember the first failure; rank 0 tells the others."""
        if self.failure is None:
            self.failure = failure
            if self.rank == 0:
                for peer in self.peers.values():
                    peer.send("fail", **asdict(failure))
            self.failed.set()
            self.decisions.put(None)

    def _send_to_rank0(self, kind: str, **content: Any) -> None:
        if self.rank and self.peers:
            self.peers[0].send(kind, **content)


count = itertools.count()


def open_channel(store: Any, rank: int, world: int) -> ControlChannel:
    """Connect this rank to rank 0, whose address is in the launcher's store. Every rank must call this.

    Raises RunError if rank 0 cannot be reached.
    """
    name = f"control channel {next(count)}"
    if world == 1:
        return ControlChannel(0, {})
    if rank:
        host, port, token = json.loads(store.get(name))
        return ControlChannel(rank, {0: dial([os.environ.get("MASTER_ADDR", host), host], port, f"{token}{rank:08d}")})
    dual = socket.has_dualstack_ipv6()
    allow_open_files(world)
    with socket.create_server(
        ("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, backlog=world, dualstack_ipv6=dual
    ) as listener:
        token = secrets.token_hex(TOKEN // 2)
        store.set(name, json.dumps([socket.gethostname(), listener.getsockname()[1], token]))
        return ControlChannel(0, accept(listener, token, world))
