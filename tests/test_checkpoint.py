"""Checkpoints: killed, torn, refused by the disk, flipped, truncated, hostile. What is found afterwards is always good."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distrib.config import Config
from distrib.errors import DiskError, RunError, UserError
from distrib.runtime import checkpoint, disk
from distrib.runtime.checkpoint import (
    MANIFEST,
    MODEL,
    NUMBERS,
    TRAINING,
    Snapshot,
    Torn,
    best_of,
    checkpoints,
    newest,
    prune,
    write,
)
from distrib.runtime.saver import Saver, try_save

ABOUT = {"config": {"seed": 0}, "ranks": 2}


def taken(step: int, score: float | None = None, evaluated: bool = True) -> Snapshot:
    files = {
        MODEL: {"weight": torch.full((50, 3), float(step)), "count": torch.tensor(step)},
        TRAINING: {"optimizer.weight.momentum_buffer": torch.full((50, 3), -float(step))},
    }
    return Snapshot(step, files, {"step": step}, (step if score is None else score) if evaluated else None)


def found(run_dir: Path) -> tuple[int, list[str]]:
    """The step of the newest good checkpoint, whose content is checked, and what was told."""
    folder, manifest, told = newest(run_dir, lambda folder, manifest: None)
    if folder is None:
        return 0, told
    step = json.loads((folder / NUMBERS).read_text())["step"]
    assert manifest["step"] == step
    assert torch.equal(load_file(folder / MODEL)["weight"], torch.full((50, 3), float(step)))
    assert torch.equal(load_file(folder / TRAINING)["optimizer.weight.momentum_buffer"], torch.full((50, 3), -float(step)))
    return step, told


class Kill(BaseException):
    """The process ends here: nothing of the trainer's runs after it."""


class Faults:
    """Counts every call that changes the disk, and lets the one numbered `at` go wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = -1, what: str = "") -> None:
        self.calls, self.at, self.what = 0, at, what
        for owner, name in (
            (checkpoint, "save_file"),
            (Path, "write_text"),
            (Path, "mkdir"),
            (os, "fsync"),
            (os, "rename"),
            (shutil, "rmtree"),
        ):
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name), name))

    def watched(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls - 1 != self.at:
                return call(*args, **options)
            if self.what == "killed after":
                call(*args, **options)
            if self.what == "torn" and name in ("save_file", "write_text"):
                call(*args, **options)
                path = args[1] if name == "save_file" else args[0]
                os.truncate(path, path.stat().st_size // 2)
            if self.what in ("ENOSPC", "EIO"):
                code = getattr(errno, self.what)
                if not options.get("ignore_errors"):
                    raise OSError(code, os.strerror(code))
                return None
            raise Kill

        return called


def faulty_save(run_dir: Path, at: int, what: str) -> int:
    """A third save in which call number `at` goes wrong; returns how many calls there were."""
    for step in (1, 2):
        write(taken(step), run_dir, ABOUT, keep=2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        faults = Faults(monkeypatch, at, what)
        with suppress(Kill, OSError):
            write(taken(3), run_dir, ABOUT, keep=2)
    return faults.calls


@pytest.mark.parametrize("what", ["killed before", "killed after", "torn", "ENOSPC", "EIO"])
def test_whatever_goes_wrong_in_a_save_a_good_checkpoint_is_found_and_the_next_save_works(tmp_path: Path, what: str) -> None:
    calls = faulty_save(tmp_path / "whole", at=-1, what="")
    assert calls == 14  # each call in a save and a prune that changes the disk
    for at in range(calls):
        run_dir = tmp_path / str(at)
        assert faulty_save(run_dir, at, what) > at
        step, told = found(run_dir)
        assert step in (2, 3)
        assert told == []
        write(taken(4), run_dir, ABOUT, keep=2)
        assert found(run_dir) == (4, [])
        assert not [path for path in (run_dir / "checkpoints").iterdir() if path.suffix]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders_can_be_saved_to_and_one_that_syncs_no_files_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fsync, refused = os.fsync, [stat.S_ISDIR]

    def refusing(handle: int) -> None:
        if any(kind(os.fstat(handle).st_mode) for kind in refused):
            raise OSError(code, os.strerror(code))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refusing)
    write(taken(1), tmp_path, ABOUT, keep=2)
    assert found(tmp_path) == (1, [])
    refused.append(stat.S_ISREG)
    with pytest.raises(OSError, match=os.strerror(code)):
        write(taken(2), tmp_path, ABOUT, keep=2)
    assert found(tmp_path) == (1, [])


def test_every_flipped_bit_and_every_truncation_is_seen_and_the_one_before_is_used(tmp_path: Path) -> None:
    """400 flips, and 4 truncations and a longer form of each file."""
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2):
        write(taken(step), tmp_path / "whole", ABOUT, keep=2)
    damages: list[tuple[str, bytes]] = []
    for name in (MODEL, TRAINING, NUMBERS, MANIFEST):
        content = (tmp_path / "whole" / "checkpoints" / "step_00000002" / name).read_bytes()
        for bit in torch.randint(8 * len(content), (100,), generator=generator).tolist():
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            damages.append((name, bytes(flipped)))
        cuts = (0, 1, len(content) // 2, len(content) - 1)
        damages += [(name, content[:cut]) for cut in cuts] + [(name, content + b"\0")]
    assert len(damages) == 420
    intact = (tmp_path / "whole" / "checkpoints" / "step_00000002" / MANIFEST).read_text()
    for i, (name, content) in enumerate(damages):
        run_dir = tmp_path / str(i)
        shutil.copytree(tmp_path / "whole", run_dir)
        (run_dir / "checkpoints" / "step_00000002" / name).write_bytes(content)
        step, told = found(run_dir)
        if name == MANIFEST and json.loads(intact) == _parsed(content):
            assert step == 2  # a flip that changes white space alone
            continue
        assert step == 1, (name, i)
        assert len(told) == 1
        assert told[0].startswith("step_00000002 is damaged (")
        assert (run_dir / "checkpoints" / "step_00000002.damaged").is_dir()
        shutil.rmtree(run_dir)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def signed(folder: Path, **changes: Any) -> None:
    """Make a manifest that fits the files, as someone who means harm would."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}
        for name in (MODEL, TRAINING, NUMBERS)
        if (folder / name).exists()
    }
    manifest = {"format": 2, "step": int(folder.name[5:]), **ABOUT, "files": files} | changes
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": checkpoint.own_sha256(manifest)}))


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (os.environ["BOMB"],)


def hostile(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    def put(name: str, content: bytes) -> Callable[[], None]:
        def act() -> None:
            (folder / name).write_bytes(content)
            signed(folder)

        return act

    def link(name: str) -> Callable[[], None]:
        def act() -> None:
            outside = folder.parent.parent / "outside"
            (folder / name).rename(outside)
            (folder / name).symlink_to(outside)
            signed(folder)

        return act

    def moved() -> None:
        (folder / MODEL).rename(folder.parent.parent / MODEL)
        told = {"bytes": 0, "sha256": ""}
        signed(folder, files={f"../../{MODEL}": told, NUMBERS: told})

    bomb = pickle.dumps(Bomb())
    for name in (MODEL, TRAINING, NUMBERS):
        yield f"pickle as {name}", put(name, bomb)
        yield f"link {name}", link(name)
        yield f"folder as {name}", lambda name=name: ((folder / name).unlink(), (folder / name).mkdir())
    yield f"pickle as {MANIFEST}", lambda: (folder / MANIFEST).write_bytes(bomb)
    yield "out of the folder", moved
    yield "huge header", put(MODEL, (10**12).to_bytes(8, "little") + b"{}")
    yield "deep", lambda: (folder / MANIFEST).write_text("[" * 100_000)
    yield "a list", lambda: (folder / MANIFEST).write_text("[1]")
    yield "large", lambda: (folder / MANIFEST).write_text(" " * (1 << 25))


def test_a_hostile_checkpoint_is_set_aside_and_nothing_in_it_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distrib.training.state import TrainState, check_numbers, check_tensors

    network = nn.Module()
    network.weight, network.count = nn.Parameter(torch.zeros(50, 3)), nn.Buffer(torch.tensor(0))
    state = TrainState(network, network, torch.optim.SGD(network.parameters()))
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    names = [name for name, _ in hostile(tmp_path)]
    for i, name in enumerate(names):
        folder = tmp_path / str(i) / "checkpoints" / "step_00000002"
        for step in (1, 2):
            write(taken(step), tmp_path / str(i), ABOUT, keep=2)
        dict(hostile(folder))[name]()

        def check(folder: Path, manifest: dict[str, Any]) -> None:
            if folder.name == "step_00000002":
                check_tensors(folder, state)
                check_numbers(folder / NUMBERS, 2)

        best, _, told = newest(tmp_path / str(i), check)
        assert best is not None, name
        assert best.name == "step_00000001", name
        assert len(told) == 1, name
        assert "\n" not in told[0], name
    assert not (tmp_path / "bomb").exists()


def test_the_newest_and_the_most_accurate_are_kept(tmp_path: Path) -> None:
    for step, top1 in ((1, 50.0), (2, 90.0), (3, 70.0), (4, 80.0), (5, 60.0)):
        write(taken(step, top1), tmp_path, ABOUT, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002", "step_00000004", "step_00000005"]
    write(taken(6, 99.0, evaluated=False), tmp_path, ABOUT, keep=2)  # an accuracy of other weights
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002", "step_00000005", "step_00000006"]
    prune(tmp_path, keep=2)
    assert len(checkpoints(tmp_path)) == 3


def test_of_checkpoints_that_were_never_evaluated_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 5):
        write(taken(step, evaluated=False), tmp_path, ABOUT, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_committed(tmp_path: Path, value: float) -> None:
    write(taken(1), tmp_path, ABOUT, keep=2)
    bad = taken(2)
    bad.files[MODEL]["weight"][3, 1] = value
    with pytest.raises(Torn, match=r"^weight is not finite"):
        write(bad, tmp_path, ABOUT, keep=2)
    assert found(tmp_path) == (1, [])


def test_a_saver_works_behind_the_back_and_tells_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk: list[int] = []
    with Saver(Config(run_dir=str(tmp_path)), ABOUT, lambda saved: on_disk.append(saved.step)) as saver:
        saver.save(taken(1))
        assert saver.wait() is None
        with monkeypatch.context() as full:
            Faults(full, at=2, what="ENOSPC")
            saver.save(taken(2))
            assert str(saver.wait()) == "the checkpoint of step 2 was not saved: OSError: [Errno 28] No space left on device"
        saver.save(taken(3))
    assert found(tmp_path) == (3, [])
    assert on_disk == [1, 3]


@pytest.mark.parametrize("name", ["mkdir", "posix_fallocate", "fsync", "rename"])
def test_a_disk_that_cannot_be_saved_to_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, name, fail)
        with pytest.raises(DiskError, match=r"a checkpoint of 2.0 MB cannot be saved in .*: No space left on device"):
            try_save(tmp_path, 2_000_000)
    (tmp_path / "checkpoints" / "trial.partial").mkdir(parents=True)  # of a process that was killed
    try_save(tmp_path, 2_000_000)
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_that_cannot_reserve_room_may_still_be_saved_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    try_save(tmp_path, 2_000_000)


def test_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    for step in (1, 2):
        write(taken(step), tmp_path, ABOUT, keep=2)
    first, second = checkpoints(tmp_path)
    shutil.copy(first / MODEL, second / MODEL)
    assert found(tmp_path)[0] == 1


def test_a_file_of_weights_is_what_the_library_reads(tmp_path: Path) -> None:
    write(taken(7), tmp_path, ABOUT, keep=2)
    manifest = json.loads((checkpoints(tmp_path)[0] / MANIFEST).read_text())
    assert manifest["config"] == {"seed": 0}
    tensors: dict[str, Tensor] = load_file(checkpoints(tmp_path)[0] / MODEL)
    assert tensors.keys() == {"weight", "count"}  # the network's own names
    save_file(tensors, tmp_path / "copy.safetensors")
    assert manifest["files"][MODEL]["bytes"] == (tmp_path / "copy.safetensors").stat().st_size


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_checkpoint_of_another_run_is_refused_and_keeps_its_name(tmp_path: Path) -> None:
    for step in (1, 2):
        write(taken(step), tmp_path, ABOUT, keep=2)

    def check(folder: Path, manifest: dict[str, Any]) -> None:
        raise UserError("another network")

    with pytest.raises(UserError, match="another network"):
        newest(tmp_path, check)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize(
    ("form", "words"), [(1, "is of an earlier version: run its training command again"), (3, "has format 3, and this")]
)
def test_a_checkpoint_of_another_format_is_refused_and_keeps_its_name(tmp_path: Path, form: int, words: str) -> None:
    write(taken(2), tmp_path, ABOUT, keep=2)
    signed(checkpoints(tmp_path)[0], format=form)
    with pytest.raises(UserError, match=words):
        found(tmp_path)
    assert names(tmp_path) == ["step_00000002"]


def failing_reads(monkeypatch: pytest.MonkeyPatch, code: int, times: int, name: str) -> list[Path]:
    """Reading a file of this name fails so many times; returns the failures."""
    failures: list[Path] = []
    opened, read, lstat = Path.open, Path.read_bytes, Path.lstat

    def fail(path: Path) -> None:
        if path.name == name and len(failures) < times:
            failures.append(path)
            raise OSError(code, os.strerror(code), str(path))

    def on(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(path: Path, *args: Any, **options: Any) -> Any:
            fail(path)
            return call(path, *args, **options)

        return called

    monkeypatch.setattr(disk, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(disk, "retries", disk.Retries(limit=0.02))
    for each, call in (("open", opened), ("read_bytes", read), ("lstat", lstat)):
        monkeypatch.setattr(Path, each, on(call))
    return failures


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN])
@pytest.mark.parametrize("name", [MODEL, NUMBERS, MANIFEST])
def test_a_read_that_fails_for_a_moment_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, name: str
) -> None:
    write(taken(1), tmp_path, ABOUT, keep=2)
    with monkeypatch.context() as patched:
        failures = failing_reads(patched, code, 3, name)
        patched.setattr(disk.retries, "limit", 1000)
        assert newest(tmp_path, lambda *_: None)[0] is not None
        assert len(failures) == 3
    assert names(tmp_path) == ["step_00000001"]


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOMEM])
@pytest.mark.parametrize("name", [MODEL, NUMBERS, MANIFEST])
def test_a_checkpoint_that_cannot_be_read_now_ends_the_run_and_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, name: str
) -> None:
    for step in (1, 2):
        write(taken(step), tmp_path, ABOUT, keep=2)
    with monkeypatch.context() as patched:
        failing_reads(patched, code, 1000, name)
        with pytest.raises(RunError, match=r"step_00000002 cannot be read now: .*; nothing was changed, try again later"):
            newest(tmp_path, lambda *_: None)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    assert found(tmp_path) == (2, [])


def test_a_run_whose_checkpoints_are_all_damaged_is_never_begun_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        write(taken(step), tmp_path, ABOUT, keep=2)
    for folder in checkpoints(tmp_path):
        (folder / NUMBERS).write_text("")
    for _ in range(2):  # also when they have been set aside
        with pytest.raises(UserError, match=r"has no intact checkpoint, only step_00000001.damaged, step_00000002.dam"):
            found(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    assert found(tmp_path) == (0, [])


def test_the_best_checkpoint_is_the_one_with_the_highest_score(tmp_path: Path) -> None:
    for step, score in ((1, -3.0), (2, -1.0), (3, -1.0), (4, None)):
        write(taken(step, score, evaluated=score is not None), tmp_path, ABOUT, keep=9)
    assert best_of(checkpoints(tmp_path)) == tmp_path / "checkpoints" / "step_00000002"
    assert best_of(checkpoints(tmp_path)[3:]) is None
