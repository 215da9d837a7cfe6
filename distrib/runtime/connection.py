"""TCP connections between ranks: a message is a line of JSON."""

import json
import os
import resource
import secrets
import socket
import threading
import weakref
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, ClassVar

import psutil

from distrib.errors import RunError

TIMEOUT = 30.0  # seconds to connect, and to send a message
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 5}  # where the system has them
ELSEWHERE = "192.0.2.1"  # an address that no machine has (RFC 5737), to find the default route
TOKEN = 32  # characters of the secret with which a rank connects


class Connection:
    """One end of a connection. A message is a line of JSON."""

    open: ClassVar[weakref.WeakSet[socket.socket]] = weakref.WeakSet()

    def __init__(self, connected: socket.socket) -> None:
        self.socket, self.arrived, self.sending = connected, b"", threading.Lock()
        self.finished = False  # whether the other end has left the run without a failure
        connected.settimeout(TIMEOUT)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.open.add(connected)

    def send(self, kind: str, **content: Any) -> None:
        """Send a message. If the other end is gone, the thread that receives notices it."""
        with suppress(OSError), self.sending:
            self.socket.sendall(json.dumps({"kind": kind, **content}).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for messages; None if the other end is gone."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        *lines, self.arrived = (self.arrived + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def shut_down(self) -> None:
        """End the connection; the thread that receives at either end then gets None."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    @classmethod
    def close_in_child(cls) -> None:
        """A child process, such as a loader worker, must not keep its parent's connections open."""
        for each in [*cls.open]:
            each.close()


os.register_at_fork(after_in_child=Connection.close_in_child)


def dial(hosts: list[str], port: int, hello: str) -> Connection:
    """Connect to rank 0 on the first of these hosts that answers. Raises RunError."""
    errors = []
    for host in hosts:
        try:
            connected = socket.create_connection((host, port), TIMEOUT)
            connected.sendall(hello.encode())
            return Connection(connected)
        except OSError as error:
            errors.append(f"{host}: {error.strerror or error}")
    raise RunError(
        f"rank {int(hello[TOKEN:])} cannot connect to rank 0, port {port} ({'; '.join(errors)}): is there a firewall?"
    )


def accept(listener: socket.socket, token: str, world: int) -> dict[int, Connection]:
    """The connections from all other ranks; others are refused."""
    peers: dict[int, Connection] = {}
    while len(peers) < world - 1:
        connected, _ = listener.accept()
        connected.settimeout(TIMEOUT)
        hello = b""
        with suppress(OSError):
            hello = connected.recv(TOKEN + 8, socket.MSG_WAITALL)
        if secrets.compare_digest(hello[:TOKEN], token.encode()):
            peers[int(hello[TOKEN:])] = Connection(connected)
        else:
            connected.close()
    return peers


def interface_to(host: str) -> str | None:
    """The network interface through which this machine reaches `host`, or by which `host`, if it is this machine, is reached.

    A machine's own name is often a loopback address, to which no other machine can connect: then it is the interface of the
    default route.
    """
    for target in (host, ELSEWHERE):
        with suppress(OSError):
            family, _, _, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # of a datagram socket: nothing is sent
                own = probe.getsockname()[0]
            for name, addresses in psutil.net_if_addrs().items():
                if not ip_address(own).is_loopback and own in [each.address for each in addresses]:
                    return name
    return None


def allow_open_files(world: int) -> None:
    """Raise this process's limit of open files: rank 0 has a connection to each rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024 + world:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard < 1024 + world else 1024 + world, hard))
