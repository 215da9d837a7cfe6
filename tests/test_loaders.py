"""How batches reach the device: from memory, and from files that workers read. A GPU is tried too where there is one."""

import gc
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import waits_refused
from PIL import Image

from distrib.config import Config, DataConfig
from distrib.data import loaders
from distrib.data.datasets import load_source
from distrib.data.loaders import Batch, Loader, Resident, placement
from distrib.data.source import Source
from distrib.data.steps import Share, Steps

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DEVICES = [CPU, GPU] if torch.cuda.is_available() else [CPU]
NOISE = DataConfig(translate=1, flip="random", workers=2)


def loader(
    tmp_path: Path, data: DataConfig, device: torch.device = CPU, rank: int = 0, world: int = 1, share: int = 5
) -> Loader:
    config = Config(run_dir=str(tmp_path / "run"), data=data)
    source: Source = load_source(data, download=False)
    return Loader(source, config, Steps(len(source.train), share * world, 3, rank, world), device)


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
    return DataConfig(name="folder", root=str(root), size=16, flip="random", workers=2)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("where", ["auto", "device", "host"])
def test_a_set_in_memory_gives_the_same_batches_wherever_it_is_kept(tmp_path: Path, where: str, device: torch.device) -> None:
    steps = range(280, 300)  # into the second epoch
    kept: Any = replace(NOISE, resident=where)
    opened = loader(tmp_path, kept, device)
    assert_same(train(opened, steps), train(loader(tmp_path, NOISE), steps))
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
def test_each_rank_has_its_part_of_the_validation_set_and_no_more(tmp_path: Path, folder: DataConfig, name: str) -> None:
    data = DataConfig() if name == "memory" else folder
    opened = [loader(tmp_path, data, CPU, rank, 3) for rank in range(3)]
    alone = list(loader(tmp_path, data).val(1000))
    assert_same([Batch(*map(torch.cat, zip(*(batch for each in opened for batch in each.val(4)), strict=True)))], alone)
    if name == "memory":
        kept: list[Any] = [each.sets[1] for each in opened]
        assert [len(each.images) for each in kept] == [120] * 3
        assert all(isinstance(each, Resident) for each in kept)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_any_number_of_workers_reads_the_same_batches_also_more_than_there_are_images_in_one(
    tmp_path: Path, folder: DataConfig, workers: int, device: torch.device, recwarn: pytest.WarningsRecorder
) -> None:
    opened = loader(tmp_path, replace(folder, workers=workers), device)
    alone = loader(tmp_path, replace(folder, workers=0))
    assert_same(train(opened, range(3, 9)), train(alone, range(3, 9)))
    assert all(each.images.is_contiguous(memory_format=torch.channels_last) for each in opened.train(range(2)))
    assert_same([Batch(*(each.cpu() for each in batch)) for batch in opened.val(4)], list(alone.val(4)))


def test_workers_stay_from_one_evaluation_to_the_next_and_leave_with_the_loader(tmp_path: Path, folder: DataConfig) -> None:
    def workers() -> set[int | None]:
        return {each.pid for each in multiprocessing.active_children()}

    before = workers()
    opened = loader(tmp_path, folder)
    evaluations, staff = [], []
    for size in (4, 4, 3):
        evaluations.append(list(opened.val(size)))
        staff.append(workers() - before)
    assert_same(evaluations[0], evaluations[1])
    assert sum(len(each.targets) for each in evaluations[2]) == 11
    assert len(staff[0]) == 2
    assert staff[0] == staff[1] == staff[2]
    del opened
    gc.collect()
    assert workers() == before


def test_workers_leave_at_once_with_a_reading_that_is_broken_off(tmp_path: Path, folder: DataConfig) -> None:
    """The garbage collector, if it is left to that, closes the queues first through which they hear of it."""
    before = set(multiprocessing.active_children())
    gc.disable()
    try:
        opened = loader(tmp_path, folder)
        reading = opened.train(range(8))
        next(reading)
        assert len(set(multiprocessing.active_children()) - before) == 2
        del opened, reading
        assert set(multiprocessing.active_children()) == before
    finally:
        gc.enable()


def test_a_reading_that_was_given_up_leaves_nothing_to_the_next_one(tmp_path: Path, folder: DataConfig) -> None:
    opened = loader(tmp_path, folder)
    whole = train(opened, range(8))
    given_up = opened.train(range(8, 16))
    next(given_up)
    assert_same(train(opened, range(8)), whole)


@pytest.mark.skipif(len(DEVICES) == 1, reason="needs a GPU")
@pytest.mark.parametrize("name", ["device", "host", "files"])
def test_the_host_does_not_wait_for_a_gpu_to_have_a_batch(tmp_path: Path, folder: DataConfig, name: str) -> None:
    data: Any = folder if name == "files" else replace(NOISE, resident=name)
    batches = loader(tmp_path, data, GPU).train(range(4))
    next(batches)
    with waits_refused():
        assert len(list(batches)) == 3


@pytest.mark.parametrize(
    ("share", "together", "small", "made"), [(5, 1, 2 << 20, 20), (5, 8, 2 << 20, 3), (5, 8, 2 * 5 * 64, 11)]
)
def test_shares_that_are_made_together_are_the_same_and_of_one_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: int, together: int, small: int, made: int
) -> None:
    steps = range(280, 300)  # 7 of the first epoch, 13 of the second
    monkeypatch.setattr(loaders, "TOGETHER", 1)
    alone = train(loader(tmp_path, NOISE, share=share), steps)
    monkeypatch.setattr(loaders, "TOGETHER", together)
    monkeypatch.setattr(loaders, "SMALL", small)
    times, normalize = [], loaders.Normalize.__call__
    monkeypatch.setattr(loaders.Normalize, "__call__", lambda *args: times.append(1) or normalize(*args))
    batches = train(loader(tmp_path, NOISE, share=share), steps)
    assert_same(batches, alone)
    assert len(times) == made
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in batches)


def test_what_is_read_ahead_is_bounded(tmp_path: Path, folder: DataConfig) -> None:
    asked: list[int] = []

    class Counted(Steps):
        def __call__(self, step: int) -> Share:
            asked.append(step)
            return super().__call__(step)

    opened = loader(tmp_path, folder)
    opened.steps = Counted(23, 5, 3)
    batches = opened.train(range(1000))
    next(batches)
    assert len(asked) <= loaders.AHEAD + 2
    batches.close()
