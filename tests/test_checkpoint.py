"""Checkpoints: killed, torn, refused by the disk, flipped, truncated, hostile. What is found afterwards is always good."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distrib import checkpoint
from distrib.checkpoint import MANIFEST, NUMBERS, TENSORS, Damaged, Saver, Snapshot, checkpoints, newest, prune, write
from distrib.config import Config

ABOUT = {"config": "a digest", "world": 2}


def taken(step: int, top1: float | None = None, evaluated: bool = True) -> Snapshot:
    tensors = {"model.weight": torch.full((50, 3), float(step)), "model.count": torch.tensor(step)}
    return Snapshot(
        step, tensors, {"step": step, "top1": step if top1 is None else top1, "evaluated_step": step if evaluated else -1}
    )


def found(run_dir: Path) -> tuple[int, list[str]]:
    """The step of the newest good checkpoint, whose content is checked, and what was told."""
    folder, told = newest(run_dir, lambda folder, manifest: None)
    if folder is None:
        return 0, told
    step = json.loads((folder / NUMBERS).read_text())["step"]
    assert torch.equal(load_file(folder / TENSORS)["model.weight"], torch.full((50, 3), float(step)))
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
    assert calls == 12  # each call in a save and a prune that changes the disk
    for at in range(calls):
        run_dir = tmp_path / str(at)
        assert faulty_save(run_dir, at, what) > at
        step, told = found(run_dir)
        assert step in (2, 3)
        assert told == []
        write(taken(4), run_dir, ABOUT, keep=2)
        assert found(run_dir) == (4, [])
        assert not [path for path in (run_dir / "checkpoints").iterdir() if path.suffix]


def test_every_flipped_bit_and_every_truncation_is_seen_and_the_one_before_is_used(tmp_path: Path) -> None:
    """300 flips and 5 truncations of each file."""
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2):
        write(taken(step), tmp_path / "whole", ABOUT, keep=2)
    damages: list[tuple[str, bytes]] = []
    for name in (TENSORS, NUMBERS, MANIFEST):
        content = (tmp_path / "whole" / "checkpoints" / "step_00000002" / name).read_bytes()
        for bit in torch.randint(8 * len(content), (100,), generator=generator).tolist():
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            damages.append((name, bytes(flipped)))
        cuts = (0, 1, len(content) // 2, len(content) - 1)
        damages += [(name, content[:cut]) for cut in cuts] + [(name, content + b"\0")]
    assert len(damages) == 315
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
        for name in (TENSORS, NUMBERS)
        if (folder / name).exists()
    }
    manifest = {"format": 1, "step": int(folder.name[5:]), **ABOUT, "files": files} | changes
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
        (folder / TENSORS).rename(folder.parent.parent / TENSORS)
        told = {"bytes": 0, "sha256": ""}
        signed(folder, files={f"../../{TENSORS}": told, NUMBERS: told})

    bomb = pickle.dumps(Bomb())
    for name in (TENSORS, NUMBERS):
        yield f"pickle as {name}", put(name, bomb)
        yield f"link {name}", link(name)
        yield f"folder as {name}", lambda name=name: ((folder / name).unlink(), (folder / name).mkdir())
    yield f"pickle as {MANIFEST}", lambda: (folder / MANIFEST).write_bytes(bomb)
    yield "out of the folder", moved
    yield "huge header", put(TENSORS, (10**12).to_bytes(8, "little") + b"{}")
    yield "deep", lambda: (folder / MANIFEST).write_text("[" * 100_000)
    yield "a list", lambda: (folder / MANIFEST).write_text("[1]")
    yield "large", lambda: (folder / MANIFEST).write_text(" " * (1 << 21))


def test_a_hostile_checkpoint_is_refused_and_nothing_in_it_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_state import some_state

    from distrib.state import check_numbers, check_tensors

    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    names = [name for name, _ in hostile(tmp_path)]
    for i, name in enumerate(names):
        folder = tmp_path / str(i) / "checkpoints" / "step_00000002"
        for step in (1, 2):
            write(taken(step), tmp_path / str(i), ABOUT, keep=2)
        dict(hostile(folder))[name]()

        def check(folder: Path, manifest: dict[str, Any]) -> None:
            if folder.name == "step_00000002":
                check_tensors(folder / TENSORS, some_state())
                check_numbers(folder / NUMBERS, 2)

        best, told = newest(tmp_path / str(i), check)
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
    bad.tensors["model.weight"][3, 1] = value
    with pytest.raises(Damaged, match=r"model.weight is not finite"):
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
            assert saver.wait() == "no checkpoint of step 2 could be saved: OSError: [Errno 28] No space left on device"
        saver.save(taken(3))
    assert found(tmp_path) == (3, [])
    assert on_disk == [1, 3]


def test_files_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    for step in (1, 2):
        write(taken(step), tmp_path, ABOUT, keep=2)
    first, second = checkpoints(tmp_path)
    shutil.copy(first / TENSORS, second / TENSORS)
    assert found(tmp_path)[0] == 1


def test_a_snapshot_file_is_what_the_library_reads(tmp_path: Path) -> None:
    write(taken(7), tmp_path, ABOUT, keep=2)
    manifest = json.loads((checkpoints(tmp_path)[0] / MANIFEST).read_text())
    assert manifest["config"] == "a digest"
    tensors: dict[str, Tensor] = load_file(checkpoints(tmp_path)[0] / TENSORS)
    save_file(tensors, tmp_path / "copy.safetensors")
    assert manifest["files"][TENSORS]["bytes"] == (tmp_path / "copy.safetensors").stat().st_size
