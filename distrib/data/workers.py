"""Worker processes that read image files into shared memory.

They are forked before CUDA and the collectives start, because neither survives a fork everywhere. So they get their readers
later, through the same kind of memory as the images: anonymous files (memfd), since /dev/shm is small in many containers.
"""

import multiprocessing
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import count, cycle, islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distrib.config import Config
from distrib.data.files import BadImage, Reader
from distrib.data.shared_memory import Place, SharedMemory, images_in
from distrib.data.source import Arrays, Source
from distrib.data.steps import Share
from distrib.errors import RunError, UserError, one_line
from distrib.keys import applies
from distrib.runtime import disk
from distrib.runtime.environment import cores_of_a_rank, env_local_world_size, env_rank
from distrib.runtime.signals import blocked_in_workers, guard_worker
from distrib.runtime.stacks import stack_report
from distrib.schema import AUTO

AHEAD = 4  # shares that workers read ahead
MOST = 16  # workers of a rank if data.workers=auto


Result = dict[int, BadImage] | Exception  # of a request


class Request(NamedTuple):
    """What a worker reads next, and where the images go."""

    reading: int
    reader: tuple[Place, ...]
    slot: Place
    epoch: int
    images: list[int]


class Worker:
    """A process that serves requests in order, and its rank's ends of the pipes to it."""

    def __init__(self, number: int, earlier: "list[Worker]", readers: SharedMemory, report: Path) -> None:
        fork, self.number, self.slots = multiprocessing.get_context("fork"), number, SharedMemory()
        requests, self.requests = fork.Pipe(duplex=False)
        self.replies, replies = fork.Pipe(duplex=False)
        of_rank = [end for each in (*earlier, self) for end in (each.requests, each.replies)]

        def work() -> None:
            for end in of_rank:
                end.close()  # an end of a pipe is open in one process only, so that its death closes the pipe
            torch.set_num_threads(1)
            guard_worker(number, report)
            serve(requests, replies, readers, self.slots)

        self.process = fork.Process(target=work, name=f"loader worker {number}", daemon=True)
        self.process.start()
        requests.close()
        replies.close()

    def send(self, request: Request) -> None:
        """Send a request. Raises RunError if the process has ended."""
        try:
            self.requests.send(request)
        except OSError:
            raise self._death() from None

    def receive(self) -> tuple[int, Result] | str:
        """The next reply: the number of its reading, and its result; or a warning. Raises RunError if the process has ended."""
        try:
            reply: tuple[int, Result] | str = self.replies.recv()
            return reply
        except (EOFError, OSError):
            raise self._death() from None

    def _death(self) -> RunError:
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"has exited with code {code}"
        hint = ": the machine may be out of memory" if code == -signal.SIGKILL else ""
        return RunError(f"loader worker {self.number} of rank {env_rank()} {how}{hint}")

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.requests.close()
        self.replies.close()
        self.slots.close()


def serve(requests: Any, replies: Any, readers: SharedMemory, slots: SharedMemory) -> None:
    """Read images until the rank ends this worker."""

    @cache
    def load(places: tuple[Place, ...]) -> Reader:
        data, *buffers = map(readers.view, places)
        reader: Reader = pickle.loads(data, buffers=buffers)
        return reader

    queue = SimpleQueue[Request | None]()
    # A thread receives, so that the rank can always send: otherwise each might wait for the other, both with a full pipe.
    threading.Thread(target=receive_all, args=(requests, queue), daemon=True).start()
    disk.retries.report = lambda text: replies.send(text)
    while request := queue.get():
        try:
            reader = load(request.reader)
            images = images_in(slots.view(request.slot), len(request.images), reader.files.spec)
            result: Result = reader.read(request.epoch, request.images, images)
        except (UserError, RunError) as error:
            result = error
        except Exception as error:
            traceback.print_exc()
            result = RunError(f"a loader worker of rank {env_rank()} failed: {type(error).__name__}: {one_line(error)}")
        try:
            replies.send((request.reading, result))
        except OSError:  # the rank has ended
            return


def receive_all(requests: Any, queue: "SimpleQueue[Request | None]") -> None:
    """Put requests into a queue until the rank ends; then None."""
    with suppress(EOFError, OSError):
        while True:
            queue.put(requests.recv())
    queue.put(None)


class Workers:
    """The worker processes of a rank, maybe none. At its exit, this context ends them."""

    def __init__(self, number: int = 0, report: Path = Path()) -> None:
        self.workers, self.numbers = list[Worker](), count()
        self.inboxes: dict[int, list[deque[Result]]] = {}  # of each reading: the results of each worker
        self.readers = SharedMemory() if number else None
        try:
            with blocked_in_workers():
                for each in range(number):
                    assert self.readers
                    self.workers.append(Worker(each, self.workers, self.readers, report))
        except OSError as error:
            self.__exit__()
            raise UserError(f"data.workers: {number} processes cannot be started ({error.strerror}): use fewer") from None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.end()
        self.workers.clear()
        if self.readers:
            self.readers.close()
            self.readers = None

    def give(self, reader: Reader) -> tuple[Place, ...]:
        """Give a reader to all workers, which share its large arrays; returns where it is."""
        if not self.readers:
            return ()
        buffers: list[pickle.PickleBuffer] = []
        bare = replace(reader, files=replace(reader.files, targets=torch.empty(0)))
        data = pickle.dumps(bare, protocol=5, buffer_callback=buffers.append)
        parts: list[bytes | memoryview] = [data, *(each.raw() for each in buffers)]
        return tuple(self.readers.put(each) for each in parts)

    def receive(self, reading: int, worker: int) -> dict[int, BadImage]:
        """Wait until a worker has served the next request of a reading; returns the bad images in it. Raises its error."""
        inbox = self.inboxes[reading][worker]
        while not inbox:
            reply = self.workers[worker].receive()
            if isinstance(reply, str):
                self._warn(reply)
            elif reply[0] in self.inboxes:  # not of a reading that was broken off
                self.inboxes[reply[0]][worker].append(reply[1])
        result = inbox.popleft()
        if isinstance(result, Exception):
            raise result
        return result

    def _warn(self, warning: str) -> None:
        if not disk.retries.reported:  # by another worker
            disk.retries.reported = True
            disk.retries.report(warning)


class Stream:
    """Reads shares with one reader: each worker reads a chunk of every share, ahead of time."""

    def __init__(self, reader: Reader, workers: Workers, *, pinned: bool) -> None:
        self.reader, self.workers, self.pinned = reader, workers, pinned
        self.places = workers.give(reader)
        self.slots: dict[tuple[int, int], Place] = {}  # by worker, and by turn in its ring of AHEAD slots
        self.bad: dict[int, str] = {}  # images that cannot be used, and why
        self.left_out = 0  # images that were read and left out

    def read(self, shares: Iterable[Share]) -> Iterator[tuple[Share, Tensor]]:
        """Each share and its images, without those that are left out."""
        if not self.workers.workers:
            for share in shares:
                images = self._room(len(share.images))
                yield self._usable(share, images, self.reader.read(share.epoch, share.images.tolist(), images))
            return
        remaining, turns, reading = iter(shares), cycle(range(AHEAD)), next(self.workers.numbers)
        requested: deque[tuple[Share, list[Tensor]]] = deque()
        self.workers.inboxes[reading] = [deque() for _ in self.workers.workers]

        def request_next() -> None:
            for share in islice(remaining, 1):
                requested.append((share, self._request(reading, share, next(turns))))

        try:
            for _ in range(AHEAD):
                request_next()
            while requested:
                share, chunks = requested.popleft()
                bad, first = dict[int, BadImage](), 0
                for worker, chunk in enumerate(chunks):
                    bad |= {first + place: each for place, each in self.workers.receive(reading, worker).items()}
                    first += len(chunk)
                images = torch.cat(chunks, out=self._room(len(share.images)))
                request_next()
                yield self._usable(share, images, bad)
        finally:
            del self.workers.inboxes[reading]

    def _usable(self, share: Share, images: Tensor, bad: dict[int, BadImage]) -> tuple[Share, Tensor]:
        """A share with the numbers of the images that replace bad ones, without those that nothing replaces."""
        if not bad:
            return share, images
        self.bad |= {each.number: each.why for each in bad.values()}
        numbers = share.images.clone()
        for place, each in bad.items():
            numbers[place] = -1 if each.instead is None else each.instead
        kept = numbers >= 0
        self.left_out += int((~kept).sum())
        return Share(share.epoch, numbers[kept]), images if kept.all() else images[kept]

    def _request(self, reading: int, share: Share, turn: int) -> list[Tensor]:
        """Request a share from the workers; returns the memory that it will be in, in chunks."""
        chunks, spec = share.images.tensor_split(min(len(self.workers.workers), len(share.images))), self.reader.files.spec
        memory = []
        for worker, chunk in zip(self.workers.workers, chunks, strict=False):
            slot, needed = self.slots.get((worker.number, turn)), len(chunk) * spec.height * spec.width * 3
            if slot is None or slot.size < needed:
                slot = self.slots[worker.number, turn] = worker.slots.allocate(needed)
            # As a list: it takes 0.3 ms to a worker. A tensor takes 1.6 ms, since it gets a shared memory file.
            worker.send(Request(reading, self.places, slot, share.epoch, chunk.tolist()))
            memory.append(images_in(worker.slots.view(slot), len(chunk), spec))
        return memory

    def _room(self, images: int) -> Tensor:
        spec = self.reader.files.spec
        return torch.empty(images, spec.height, spec.width, 3, dtype=torch.uint8, pin_memory=self.pinned).permute(0, 3, 1, 2)


def start_workers(config: Config, source: Source | None) -> Workers:
    """Start the workers of this rank, if it will read image files. Call it before CUDA and the collectives start.

    Raises UserError if they cannot be started.
    """
    reads = applies(config, "data.workers") and not (source and isinstance(source.train, Arrays))
    number = config.data.workers if reads else 0
    if sys.platform != "linux":
        if number not in (0, AUTO):
            raise UserError(f"data.workers={number} needs Linux: omit it")
        number = 0
    elif number == AUTO:
        number = min(MOST, cores_of_a_rank(env_local_world_size()))
    return Workers(int(number), stack_report(config.run_dir, env_rank()))
