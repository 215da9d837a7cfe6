"""What the tests share: small data sets, runs in this process, and runs in several."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
PATHS = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
# Tests that start processes start up to three ranks: they are on the CPUs of a machine that has fewer GPUs.
ON_CPUS = {} if torch.cuda.device_count() >= 3 else {"CUDA_VISIBLE_DEVICES": ""}
SCRIPTS = {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"} | ON_CPUS  # for programs in tests/ that train as train.py does
LONG = ("test_survival.py", "test_slurm.py")
SMALL = ["model.width=8", "precision=no", "epochs=2", "batch_size=60", "log_every=5"]  # a run of a second or two


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that both of the processes that `make test` starts are busy to the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


def requires(held: bool, install: str) -> None:
    """Skip where a part of the system is missing, telling how to install it; in CI that is a failure."""
    if not held:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs: {install}")


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    """Accelerate keeps its state in the process: each test starts without, on one thread, which gives the same bits always."""
    environment = dict(os.environ)
    torch.set_num_threads(1)
    yield
    os.environ.clear()
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def launch(world: int, *args: str | Path, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """`world` ranks of a program under torchrun, or one of plain python."""
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)] if world > 1 else []
    environment = os.environ | SCRIPTS
    command = [sys.executable, *program, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


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


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's newest checkpoint."""
    from safetensors.torch import load_file

    return load_file(max(run_dir.glob("checkpoints/step_*")) / "state.safetensors")


def assert_same(run_dir: Path, whole: Path) -> None:
    """The same weights, bit by bit, and the same curves with each point once."""
    got, expected = weights(run_dir), weights(whole)
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []
    curves, expected_curves = points(run_dir), points(whole)
    for tag in expected_curves.keys() - {"train/images_per_second"}:
        assert curves[tag] == expected_curves[tag], tag
