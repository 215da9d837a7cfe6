"""Every command of the README, as it stands there but for its length, in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ON_CPUS, ROOT, requires
from test_launch import pictures

pytestmark = pytest.mark.slow

BLOCKS = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line.partition("  #")[0].strip() for line in LINES if "# cluster" not in line]
# What makes a run short: everything else is as the README has it.
SHORT = {
    "fashion_mnist": "epochs=0.01 model.width=4",
    "data.root=photos": "epochs=1 batch_size=8",
    "runs/wide": "epochs=1",
    "run_dir=runs/single": "epochs=1",
    "make train": "ARGS=epochs=1",
}
ELSEWHERE = ("make test", "source .venv/bin/activate")  # it runs this test; the copy has the tests' own packages


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files, without what git ignores, beside the packages that are installed for the tests."""
    root = tmp_path_factory.mktemp("readme")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        if (ROOT / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)  # with its time, for make
    pictures(root / "photos")
    (root / ".venv").symlink_to(Path(sys.prefix))
    return root


def test_the_readme_has_at_most_130_lines_and_its_commands_are_here() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 130
    assert {"make train", "make test", "distrib runs", "tensorboard --logdir runs"} <= set(COMMANDS)
    assert len(COMMANDS) == len(LINES) - 1  # one needs a cluster: tests/slurm submits such jobs


@pytest.mark.parametrize("command", [each for each in COMMANDS if each not in ELSEWHERE and "tensorboard" not in each])
def test_a_command_of_the_readme_works(copy: Path, command: str) -> None:
    if "fashion_mnist" in command and "print-config" not in command:
        requires(Path("/usr/share/datasets/fashion-mnist").is_dir(), "apt-get install dataset-fashion-mnist")
    if command == "make train":
        requires((copy / ".venv" / "ready").exists(), "make .venv/ready")
    if command == "distrib runs":
        (copy / "runs" / "one").mkdir(parents=True, exist_ok=True)
        (copy / "runs" / "one" / "status.json").write_text('{"state": "completed", "step": 1234}')
    if command.startswith(("distrib predict", "distrib export")):
        training = next(each for each in COMMANDS if "run_dir=runs/photos" in each)
        command = f"{training} epochs=1 batch_size=8 >&2 && {command}"
    if command.startswith("distrib evaluate"):
        command = f"distrib train run_dir=runs/single epochs=1 && {command}"
    extra = " ".join(short for words, short in SHORT.items() if words in command)
    path = f"{copy}/.venv/bin:{os.environ['PATH']}"
    environment = os.environ | ON_CPUS | {"PATH": path, "PYTHONPATH": str(copy)}
    del environment["OMP_NUM_THREADS"]  # as most users have it
    line = command if "&&" in command else f"{command} {extra}"
    done = subprocess.run(["bash", "-c", line], cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = {
        "--help": "batch_size",
        "distrib evaluate": "of 360 images",
        "distrib export": "photos.onnx.md: its model card",
        "distrib predict": "photos/val/a/000.JPEG,",
        "--print-config": "name: cifar10",
        "distrib runs": "1,234",
        "distrib scan": "nothing is wrong",
    }
    assert next((words for part, words in said.items() if part in command), "\ndone: top1 ") in done.stdout


def test_tensorboard_shows_a_run(copy: Path) -> None:
    assert "tensorboard --logdir runs" in COMMANDS
    (copy / "runs").mkdir(exist_ok=True)
    program = copy / ".venv" / "bin" / "tensorboard"
    command = [program, "--logdir", "runs", "--port", "0"]
    with subprocess.Popen(command, cwd=copy, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            assert any("http://localhost:" in line for line in server.stderr)
        finally:
            server.kill()
