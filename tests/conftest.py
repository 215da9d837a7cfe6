"""What the tests share: small data sets, runs in this process, and runs in several."""

import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import forkserver
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch import Tensor

from distrib.runtime import signals
from distrib.runtime.checkpoint import EMA, MODEL, TRAINING

ROOT = Path(__file__).parent.parent
PATHS = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
# Tests that start processes start up to three ranks: they are on the CPUs of a machine that has fewer GPUs.
ON_CPUS = {} if torch.cuda.device_count() >= 3 else {"CUDA_VISIBLE_DEVICES": ""}
SCRIPTS = {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"} | ON_CPUS  # for programs in tests/ that train as train.py does
LONG = ("test_survival.py", "test_slurm.py")
os.environ["OMP_NUM_THREADS"] = "1"  # with more, the threads of several tests wait for each other on a busy machine
# nohup ignores the one, and a shell the other for programs in the background; programs that tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
SMALL = ["model.width=8", "precision=no", "epochs=2", "batch_size=60", "log_every=5"]  # a run of a second or two


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that all processes that `make test` starts are busy to the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


def requires(held: bool, install: str) -> None:
    """Skip where a part of the system is missing, telling how to install it; in CI that is a failure."""
    if not held:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs: {install}")


@pytest.fixture(autouse=True)
def only_marked_tests_start_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So `make test-quick` stays quick; git may run, which tells the commit."""
    if not request.node.get_closest_marker("slow"):
        start = subprocess.Popen.__init__

        def starting(self: Any, args: Any, *rest: Any, **options: Any) -> None:
            assert args[0] == "git", f"mark this test with pytest.mark.slow: it starts {args}"
            start(self, args, *rest, **options)

        monkeypatch.setattr(subprocess.Popen, "__init__", starting)


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """Accelerate keeps its state in the process, and `distrib train` takes its signals: each test starts without.

    It starts on one thread, which gives the same bits always.
    """
    environment, handlers = dict(os.environ), {number: signal.getsignal(number) for number in signals.SIGNALS}
    torch.set_num_threads(1)
    # TensorBoard reads files of the same second by name, and the tenth file of a process comes before the ninth.
    event_file_writer._global_uid = event_file_writer.AtomicCounter(0)
    yield
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signals._listening, signals._last = False, (0, 0.0)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


class Forked:
    """A program in a process that was forked from the server of tests/forkserver.py."""

    server: "subprocess.Popen[bytes] | None" = None
    path = ""

    @classmethod
    def start_server(cls) -> None:
        """Start the server, which ends with this process: then its standard input is closed."""
        cls.path = f"{tempfile.mkdtemp(prefix='fork.')}/socket"  # short, as a socket's path has to be
        environment = os.environ | SCRIPTS | forkserver.ENVIRONMENT
        cls.server = subprocess.Popen([sys.executable, forkserver.__file__, cls.path], env=environment, stdin=subprocess.PIPE)
        while not Path(cls.path).exists():
            assert cls.server.poll() is None
            time.sleep(0.01)

    def __init__(self, argv: Sequence[str | Path], environment: Mapping[str, str], out: Path, err: Path) -> None:
        if not self.server:
            self.start_server()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(self.path)
        self.stream = self.socket.makefile("rw")
        request = {"argv": [*map(str, argv)], "env": dict(environment), "cwd": str(ROOT), "out": str(out), "err": str(err)}
        print(json.dumps(request), file=self.stream, flush=True)
        self.pid = int(self.stream.readline())
        self.code: int | None = None

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, timeout: float) -> int | None:
        """The exit code; None if the process has not ended after so many seconds."""
        if self.code is None and select.select([self.socket], [], [], timeout)[0]:
            self.code = int(self.stream.readline())
            self.stream.close()
            self.socket.close()
        return self.code


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def ranks_of(world: int) -> list[dict[str, str]]:
    """The environment of each rank, as a launcher makes it; nothing for a single process."""
    if world == 1:
        return [{}]
    port = str(free_port())
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


class Ranks:
    """The ranks of a program under way. As launchers do, `wait` stops the others if one fails."""

    PATIENCE = 30.0  # seconds until they are killed, as torchrun's

    def __init__(self, world: int, *args: str | Path) -> None:
        self.args, self.folder = [*map(str, args)], tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self.folder.name, name) for name in ("out", "err"))
        self.out.touch()
        self.err.touch()
        self.ranks = [Forked(args, os.environ | SCRIPTS | each, self.out, self.err) for each in ranks_of(world)]

    def run(self) -> bool:
        """Whether all of them still do."""
        return all(each.wait(0) is None for each in self.ranks)

    def kill(self, number: int = signal.SIGKILL) -> None:
        for each in self.ranks:
            each.kill(number)

    def wait(self, timeout: float = 600) -> "subprocess.CompletedProcess[str]":
        give_up, kill, failed = time.monotonic() + timeout, math.inf, 0
        with self.folder:
            try:
                while any(each.code is None for each in self.ranks):
                    assert time.monotonic() < give_up, f"{self.args}: {self.out.read_text()}{self.err.read_text()}"
                    codes = [each.wait(0.02) for each in self.ranks]
                    if not failed and any(codes):
                        failed, kill = next(code for code in codes if code), time.monotonic() + self.PATIENCE
                        self.kill(signal.SIGTERM)
                    if time.monotonic() > kill:
                        self.kill()
            finally:
                self.kill()
            return subprocess.CompletedProcess(self.args, failed, self.out.read_text(), self.err.read_text())


def launch(world: int, *args: str | Path, timeout: float = 600) -> "subprocess.CompletedProcess[str]":
    """Run `world` ranks of a program to their end."""
    return Ranks(world, *args).wait(timeout)


@contextmanager
def waits_refused() -> Iterator[None]:
    """Where there is a GPU, an error in what makes the host wait for it."""
    if not torch.cuda.is_available():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a feature that is a prototype, when it is used first
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def points(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point of every curve of a run, (step, value), as TensorBoard itself reads them."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


PREFIXES = {MODEL: "model.", EMA: "ema.", TRAINING: ""}  # of the names of a file's tensors, where all are in one dict


def joined(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all files of a checkpoint, each under its name with its file's prefix."""
    return {f"{PREFIXES[file]}{name}": each for file, tensors in files.items() for name, each in tensors.items()}


def weights(run_dir: Path) -> dict[str, Tensor]:
    """The tensors of a run's newest checkpoint."""
    folder = max(run_dir.glob("checkpoints/step_*"))
    return joined({file: load_file(folder / file) for file in PREFIXES if (folder / file).exists()})


def assert_same(run_dir: Path, whole: Path) -> None:
    """The same weights, bit by bit, and the same curves with each point once."""
    got, expected = weights(run_dir), weights(whole)
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
    curves, expected_curves = points(run_dir), points(whole)
    for tag in expected_curves.keys() - {"train/images_per_second"}:
        assert curves[tag] == expected_curves[tag], tag


def signed_again(folder: Path, **changes: Any) -> None:
    """Make the manifest of a checkpoint fit its files as they are now, with other facts in it."""
    from distrib.runtime.checkpoint import own_sha256, sha256

    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    del manifest["sha256"]
    there = [name for name in manifest["files"] if (folder / name).exists()]
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in there}
    manifest |= {"files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": own_sha256(manifest)}))
