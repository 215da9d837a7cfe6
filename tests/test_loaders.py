"""How batches reach the device: from memory, and from files that workers read. A GPU is tried too where there is one."""

import errno
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import waits_refused
from PIL import Image

from distrib.config import Config, DataConfig, ModelConfig
from distrib.data import loaders, workers
from distrib.data.datasets import load_source
from distrib.data.files import Reader
from distrib.data.loaders import Batch, Loader, Resident, placement
from distrib.data.pixels import ImageSpec
from distrib.data.source import Files, Source
from distrib.data.steps import Share, Steps
from distrib.data.workers import AHEAD, Stream, Workers, start_workers
from distrib.errors import RunError, UserError
from distrib.run import train as train_run
from distrib.runtime import ranks

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DEVICES = [CPU, GPU] if torch.cuda.is_available() else [CPU]
NOISE, NO_WORKERS = DataConfig(translate=1, flip="random"), Workers()


def loader(
    data: DataConfig,
    device: torch.device = CPU,
    rank: int = 0,
    world: int = 1,
    share: int = 5,
    workers: Workers = NO_WORKERS,
) -> Loader:
    source: Source = load_source(data, download=False)
    return Loader(source, Config(data=data), Steps(len(source.train), share * world, 3, rank, world), device, workers)


def train(opened: Loader, steps: range) -> list[Batch]:
    return [Batch(images.cpu(), targets.cpu()) for images, targets in opened.train(steps)]


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected)
    assert all(torch.equal(a, b) for pair in zip(batches, expected, strict=True) for a, b in zip(*pair, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """23 pictures to train on, 11 to validate, of two classes."""
    root, source = tmp_path_factory.mktemp("pictures"), load_source(DataConfig(), download=False)
    for part, arrays, images in (("train", source.train, 23), ("val", source.val, 11)):
        for i, image in enumerate(arrays.images[:images, 0]):
            path = root / part / "ab"[i % 2] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).resize((30 + i, 40 - i)).save(path)
    return DataConfig(name="folder", root=str(root), size=16, flip="random")


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("where", ["auto", "device", "host"])
def test_a_set_in_memory_gives_the_same_batches_wherever_it_is_kept(where: str, device: torch.device) -> None:
    steps = range(280, 300)  # into the second epoch
    kept: Any = replace(NOISE, resident=where)
    opened = loader(kept, device)
    assert_same(train(opened, steps), train(loader(NOISE), steps))
    assert {each.device.type for each in next(opened.train(steps))} == {device.type}


@pytest.mark.parametrize(
    ("size", "where", "kept"), [(24, "auto", GPU), (26, "auto", CPU), (26, "device", GPU), (24, "host", CPU)]
)
def test_a_gpu_keeps_what_takes_a_quarter_of_its_free_memory_or_what_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, size: int, where: str, kept: torch.device
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    assert placement(size, where, GPU) == kept
    assert placement(size, where, CPU) == CPU


@pytest.mark.parametrize("name", ["memory", "files"])
def test_each_rank_has_its_part_of_the_validation_set_and_no_more(folder: DataConfig, name: str) -> None:
    data = DataConfig() if name == "memory" else folder
    opened = [loader(data, CPU, rank, 3) for rank in range(3)]
    alone = list(loader(data).val(1000))
    assert_same([Batch(*map(torch.cat, zip(*(batch for each in opened for batch in each.val(4)), strict=True)))], alone)
    if name == "memory":
        kept: list[Any] = [each.sets[1] for each in opened]
        assert [len(each.images) for each in kept] == [120] * 3
        assert all(isinstance(each, Resident) for each in kept)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_any_number_of_workers_reads_the_same_batches_also_more_than_there_are_images_in_one(
    folder: DataConfig, workers: int, device: torch.device, recwarn: pytest.WarningsRecorder
) -> None:
    alone = loader(folder)
    with Workers(workers) as started:
        opened = loader(folder, device, workers=started)
        assert len(opened.sample()) == 23  # more images than a batch has
        assert_same(train(opened, range(3, 9)), train(alone, range(3, 9)))
        assert all(each.images.is_contiguous(memory_format=torch.channels_last) for each in opened.train(range(2)))
        for size in (4, 9):
            assert_same([Batch(*(each.cpu() for each in batch)) for batch in opened.val(size)], list(alone.val(size)))


def test_the_same_workers_read_for_training_and_validation_in_turn(folder: DataConfig) -> None:
    alone, before = loader(folder), set(multiprocessing.active_children())
    expected = train(alone, range(8)), list(alone.val(3))
    with Workers(2) as started:
        opened = loader(folder, workers=started)
        training = opened.train(range(8))
        batches = [Batch(*map(torch.clone, next(training))) for _ in range(3)]
        assert_same(list(opened.val(3)), expected[1])
        assert len(set(multiprocessing.active_children()) - before) == 2
        assert_same([*batches, *training], expected[0])
    assert set(multiprocessing.active_children()) == before


def test_workers_leave_no_open_file_behind(folder: DataConfig) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with Workers(2) as started:
            train(loader(folder, workers=started), range(2))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reading_that_was_given_up_leaves_nothing_to_the_next_one(folder: DataConfig) -> None:
    with Workers(2) as started:
        opened = loader(folder, workers=started)
        whole = train(opened, range(8))
        for _ in range(3):
            given_up = opened.train(range(8, 16))
            next(given_up)
            given_up.close()
            assert_same(train(opened, range(8)), whole)


def test_a_worker_that_is_killed_is_named(folder: DataConfig) -> None:
    with Workers(2) as started:
        os.kill(started.workers[1].process.pid or 0, signal.SIGKILL)
        with pytest.raises(RunError, match="loader worker 1 of rank 0 was ended by SIGKILL: the machine may be out of memory"):
            train(loader(folder, workers=started), range(8))


def test_a_worker_that_is_killed_while_its_replies_are_waiting_is_named(folder: DataConfig) -> None:
    with Workers(1) as started:
        batches = loader(folder, workers=started).train(range(50))
        next(batches)
        process = started.workers[0].process
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        with pytest.raises(RunError, match="loader worker 0 of rank 0 was ended by SIGKILL"):
            list(batches)


@pytest.mark.slow
def test_a_rank_and_its_worker_never_wait_for_each_other_however_much_they_have_to_say(folder: DataConfig) -> None:
    """Thousands of bad images in each share: neither their numbers nor their errors fit into a pipe."""
    files = Files(np.array([os.fsencode(f"/nowhere/{i:090d}.png") for i in range(8000)]), torch.zeros(8000), ImageSpec(1, 1))
    with Workers(1) as started:
        stream = Stream(Reader(files, skip=True), started, pinned=False)
        shares = [Share(0, torch.arange(8000)) for _ in range(6)]
        assert [len(images) for _, images in stream.read(shares)] == [0] * 6


def test_a_worker_says_nothing_when_its_rank_ends_at_once(folder: DataConfig) -> None:
    """The process of this test is forked, and ends as a rank does that lost another one."""
    read, write = os.pipe()
    rank = os.fork()
    if rank == 0:
        os.dup2(write, 2)
        with Workers(1) as started:
            next(loader(folder, workers=started).train(range(8)))
            os._exit(3)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) == 3
    with os.fdopen(read) as said:
        assert said.read() == ""  # to the end: until the worker has ended too


def test_an_error_in_a_worker_is_told_with_its_traceback(
    folder: DataConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Reader, "read", lambda *args: 1 / 0)
    with Workers(1) as started, pytest.raises(RunError, match="loader worker of rank 0 failed: ZeroDivisionError: division by"):
        train(loader(folder, workers=started), range(2))
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["named", "own"])
def test_workers_are_forked_before_the_ranks_are_connected_and_end_with_the_run(
    folder: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    seen, connect, before = list[int](), ranks.connect, set(multiprocessing.active_children())
    monkeypatch.setattr(
        ranks, "connect", lambda config: seen.append(len({*multiprocessing.active_children()} - before)) or connect(config)
    )
    data = DataConfig(workers=2) if kind == "own" else replace(folder, workers=2)
    config = Config(run_dir=str(tmp_path), data=data, epochs=1, batch_size=5, precision="no", model=ModelConfig(width=8))
    train_run(config, source=load_source(folder, download=False) if kind == "own" else None)
    assert seen == [2]
    assert set(multiprocessing.active_children()) == before


def test_workers_that_cannot_be_started_are_refused_and_none_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before, fork, forks = set(multiprocessing.active_children()), os.fork, iter(range(3))

    def fork_twice() -> int:
        if next(forks) == 2:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", fork_twice)
    with pytest.raises(UserError, match=r"data.workers: 8 processes cannot be started .* use fewer"):
        Workers(8)
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize(
    ("keys", "number"),
    [({"name": "folder"}, 5), ({"name": "folder", "workers": 0}, 0), ({"name": "folder", "workers": 2}, 2), ({}, 0)],
)
def test_auto_is_as_many_workers_as_the_rank_has_cores(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], number: int
) -> None:
    monkeypatch.setattr(workers, "cores_of_a_rank", lambda ranks: 5)
    with start_workers(Config(data=DataConfig(**keys)), None) as started:
        assert len(started.workers) == number
    monkeypatch.setattr(workers, "cores_of_a_rank", lambda ranks: 100)
    monkeypatch.setattr(workers, "Workers", lambda number, report: number)
    assert start_workers(Config(data=DataConfig(name="folder")), None) == 16


@pytest.mark.skipif(len(DEVICES) == 1, reason="needs a GPU")
@pytest.mark.parametrize("name", ["device", "host", "files"])
def test_the_host_does_not_wait_for_a_gpu_to_have_a_batch(folder: DataConfig, name: str) -> None:
    data: Any = folder if name == "files" else replace(NOISE, resident=name)
    batches = loader(data, GPU).train(range(4))
    next(batches)
    with waits_refused():
        assert len(list(batches)) == 3


@pytest.mark.parametrize(
    ("share", "together", "small", "made"), [(5, 1, 2 << 20, 20), (5, 8, 2 << 20, 3), (5, 8, 2 * 5 * 64, 11)]
)
def test_shares_that_are_made_together_are_the_same_and_of_one_epoch(
    monkeypatch: pytest.MonkeyPatch, share: int, together: int, small: int, made: int
) -> None:
    steps = range(280, 300)  # 7 of the first epoch, 13 of the second
    monkeypatch.setattr(loaders, "TOGETHER", 1)
    alone = train(loader(NOISE, share=share), steps)
    monkeypatch.setattr(loaders, "TOGETHER", together)
    monkeypatch.setattr(loaders, "SMALL", small)
    times, normalize = [], loaders.Normalize.__call__
    monkeypatch.setattr(loaders.Normalize, "__call__", lambda *args: times.append(1) or normalize(*args))
    batches = train(loader(NOISE, share=share), steps)
    assert_same(batches, alone)
    assert len(times) == made
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in batches)


def test_what_is_read_ahead_is_bounded(folder: DataConfig) -> None:
    asked: list[int] = []

    class Counted(Steps):
        def __call__(self, step: int) -> Share:
            asked.append(step)
            return super().__call__(step)

    with Workers(2) as started:
        opened = loader(folder, workers=started)
        opened.steps = Counted(23, 5, 3)
        next(opened.train(range(1000)))
    assert len(asked) <= AHEAD + 2
