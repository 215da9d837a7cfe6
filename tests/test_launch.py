"""Real processes, as a user starts them: plain python, torchrun, accelerate launch, launch/local.sh; and what is refused."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ON_CPUS, ROOT, SMALL, launch, points, weights
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter

from distrib.cli import main
from distrib.runtime import saver
from distrib.runtime.environment import env_world_size, refuse_unconnected_processes

ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--num_machines=1",
    "--mixed_precision=no",
    "--dynamo_backend=no",
]


def pictures(root: Path, train: int = 40, val: int = 6) -> Path:
    """A folder of JPEG files in two classes."""
    for part, images in (("train", train), ("val", val)):
        for i in range(images):
            path = root / part / "ab"[i % 2] / f"{i:03d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (50 + i, 40), (200 * (i % 2), 10 if part == "train" else 20, i)).save(path)
    return root


def told(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line that is refused gets to hear, in this process."""
    assert main(["train", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("distrib: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["optim.lrr=1"], "no key optim.lrr: did you mean optim.lr?"),
        (["optim.lr=fast"], "optim.lr is 'fast', not a number"),
        (["epochs=-1"], "epochs is -1.0, not in (0, inf)"),
        (["nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["data.name=digit"], "there is no data set 'digit': use one of digits, mnist, "),
        (["data.name=folder", "data.root=/nowhere"], "data.root=/nowhere is not a folder"),
        (["model.name=resnet19"], "there is no model 'resnet19': use cnn, airbench, timm:NAME, or one of torchvision: "),
        (["model.weights=/nowhere.pth"], "model.weights=/nowhere.pth cannot be read"),
        (["batch_size=2000"], "batch_size 2000 is more than the 1437 training images"),
        (["micro_batches=129"], "micro_batches 129 is more than the 128 images of a rank's share of a batch: use 128 or fewer"),
        (["batch_size=3", "micro_batches=2"], "Expected more than 1 value per channel when training"),
        (["precision=fp16"], "precision=fp16 needs a GPU"),
        (["run_dir=/dev/null/run"], "run_dir /dev/null/run cannot be written: Not a directory"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in told(args, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_config_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [*SMALL, f"run_dir={tmp_path}"]
    assert main(["train", *keys]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert "was started with another seed (0 there, 1 now): give another run_dir" in told([*keys, "seed=1"], capsys)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def full_disk(monkeypatch: pytest.MonkeyPatch, saves: range) -> None:
    """The disk is full while these saves are made, counted from 0."""
    write, made = saver.write, []

    def writing(*args: Any) -> None:
        made.append(args)
        if len(made) - 1 in saves:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    monkeypatch.setattr(saver, "write", writing)


def test_a_run_goes_on_when_a_save_fails_and_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk(monkeypatch, range(1, 3))
    assert main(["train", *SMALL, f"run_dir={tmp_path}", "save_every=10"]) == 0
    warning = "warning: the checkpoint of step 20 was not saved: OSError: [Errno 28] No space left on device; trying again now"
    assert warning in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000040", "step_00000046"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's thread
def test_a_run_goes_on_when_tensorboards_file_cannot_be_written_and_tries_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, written = RecordWriter.write, []

    def writing(self: RecordWriter, data: bytes) -> None:
        written.append(data)
        if len(written) in (11, 12):  # of a report, and of the next save's new file
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", writing)
    assert main(["train", *SMALL, f"run_dir={tmp_path}", "save_every=10", "log_every=2"]) == 0
    # TensorBoard writes in a thread: the second error may come while its file is opened, which is not reported, or later.
    assert capsys.readouterr().out.count("warning: TensorBoard's file cannot be written: [Errno 28] No space left") in (1, 2)
    steps = [step for step, _ in points(tmp_path)["train/loss"]]
    assert steps[0] == 2
    assert steps[-8:] == list(range(32, 47, 2))


def test_a_run_that_cannot_save_its_end_does_not_exit_with_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk(monkeypatch, range(1, 9))
    assert main(["train", *SMALL, f"run_dir={tmp_path}", "save_every=40", "eval_every=46"]) == 5
    assert "distrib: the checkpoint of step 46 was not saved: OSError: [Errno 28]" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000040"]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    monkeypatch.undo()
    assert main(["train", *SMALL, f"run_dir={tmp_path}", "save_every=40", "eval_every=46"]) == 0
    assert "resumes after step 40" in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_would_each_train_alone_are_refused(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "4")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    words = told([], capsys)
    assert "4 processes were started, but RANK, " in words
    assert "LOCAL_RANK, MASTER_PORT is not set, so each would train alone: start them with accelerate launch" in words
    assert words.endswith("; if this is the only process, unset SLURM_STEP_NUM_TASKS\n") == (variable == "SLURM_STEP_NUM_TASKS")


def test_in_a_shell_that_srun_gave_a_process_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `srun --pty bash` leaves the environment in an allocation of four tasks."""
    for name, value in {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PTY_PORT": "33357", "SLURM_TASK_PID": str(os.getppid())}.items():
        monkeypatch.setenv(name, value)
    assert env_world_size() == 1
    refuse_unconnected_processes()
    monkeypatch.setenv("SLURM_TASK_PID", str(os.getpid()))  # srun itself started this process
    assert env_world_size() == 4


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--num_processes=2", "--num-processes 2"])
def test_one_rank_where_two_were_asked_for_is_told_with_the_way_to_two(tmp_path: Path, option: str) -> None:
    done = start([*ACCELERATE, "--cpu", *option.split(), "train.py"], *SMALL, "epochs=0.1", f"run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "warning: accelerate launch --num_processes 2 has started one rank: add --multi_gpu, on CPUs too\n" in done.stdout


def test_help_and_print_config_are_told_and_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "\nobjective.*\n  name " in out
    assert "\n  label_smoothing fraction of a label's weight " in out
    assert main(["train", "--print-config", "epochs=3"]) == 0
    assert "\nepochs: 3.0\n" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "--help"]) == 0
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


QUICK = """\
import sys
from distrib.cli import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "--print-config"], 0),
        (["trian"], 2),
        (["train", "optim.lrr=1"], 2),
        (["train", "data.name=digit"], 2),
        (["train", "nowhere.yaml"], 2),
    ],
)
def test_help_and_a_typo_are_answered_without_torch_which_takes_seconds(args: list[str], code: int) -> None:
    done = start([sys.executable, "-c", QUICK], *args)
    assert done.returncode == code, done.stderr
    assert (done.stdout.count("\n") > 5, done.stderr.count("\n")) == ((True, 0) if code == 0 else (False, 1))


@pytest.mark.slow
def test_help_may_be_piped_into_a_program_that_reads_a_line() -> None:
    done = start(["bash", "-o", "pipefail", "-c", f"{sys.executable} -m distrib train --help | head -n 1"])
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")


@pytest.mark.slow
def test_help_fits_on_a_terminal_of_80_columns() -> None:
    done = start([sys.executable, "-m", "distrib", "train", "--help"], COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    assert max(map(len, done.stdout.splitlines())) > 70


@pytest.mark.slow
def test_local_sh_tells_of_a_mistake_in_one_line() -> None:
    done = start(["launch/local.sh"], "optim.lrr=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "distrib: there is no key optim.lrr: did you mean optim.lr?\n"


def start(launcher: list[str], *args: str, timeout: float = 600, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [*launcher, *args]
    environment = os.environ | ON_CPUS | {"PATH": path} | variables
    del environment["OMP_NUM_THREADS"]  # as most users have it
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


LAUNCHERS = {
    "python": [sys.executable, "train.py"],
    "python -m": [sys.executable, "-m", "distrib", "train"],
    "accelerate": [*ACCELERATE, "--num_processes=1", "train.py"],
    "accelerate 2": [*ACCELERATE, "--multi_gpu", "--num_processes=2", "--main_process_port=0", "train.py"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train.py"],
    "torchrun 2": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"],
    "local.sh": ["launch/local.sh"],
}


STARTED = [name for name in LAUNCHERS if name not in ("torchrun", "accelerate")]  # with two ranks they show more


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """The same config, started in every way: its run folder, and what was said."""
    runs = {}
    for name in STARTED:
        run_dir = tmp_path_factory.mktemp(name.replace(" ", "_"))
        done = start(LAUNCHERS[name], *SMALL, f"run_dir={run_dir}")
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr, done.stderr
        runs[name] = run_dir, done.stdout
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("visible", "ranks"), [(None, 4), ("0,2", 2), ("1", 1), ("", 2)])
def test_local_sh_starts_a_rank_for_each_gpu_that_is_visible(tmp_path: Path, visible: str | None, ranks: int) -> None:
    for name, line in (("nvidia-smi", "printf 'GPU %d: H100\\n' 0 1 2 3"), ("accelerate", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    said = subprocess.run([ROOT / "launch/local.sh"], env=environment, capture_output=True, text=True, check=True).stdout
    assert f"--num_processes {ranks} " in said


@pytest.mark.slow
@pytest.mark.parametrize("launcher", STARTED)
def test_every_launcher_starts_the_same_run(launched: dict[str, tuple[Path, str]], launcher: str) -> None:
    run_dir, out = launched[launcher]
    ranks = 2 if launcher in ("accelerate 2", "torchrun 2", "local.sh") else 1
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    assert out.count(f"ranks {ranks}, device cpu, threads {threads}, precision no (as asked)") == 1
    twin = weights(launched["python" if ranks == 1 else "torchrun 2"][0])
    assert all(map(torch.equal, weights(run_dir).values(), twin.values()))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", STARTED)
def test_the_console_tells_where_a_run_is_and_how_it_ended(launched: dict[str, tuple[Path, str]], launcher: str) -> None:
    run_dir, out = launched[launcher]
    top1 = points(run_dir)["val/top1"][-1][1]
    assert re.search(
        r"^epoch 0\.22  step 5/46  train: loss \d\.\d{4}  top1 \d+\.\d\d %  [\d,]+ images/s  \d\d:\d\d left$", out, re.M
    )
    assert re.search(r"^epoch 2\.00  step 46/46  val: loss \d\.\d{4}  top1 \d+\.\d\d %  top5 \d+\.\d\d %$", out, re.M)
    best = rf"best \d+\.\d\d % in {run_dir}/checkpoints/step_\d+"
    assert re.search(rf"^done: top1 {top1:.2f} %, {best}; 2,760 images seen at [\d,]+ a second; ", out, re.M)
    assert out.rstrip().endswith(f"; tensorboard --logdir {run_dir.parent}")


@pytest.mark.slow
def test_on_a_terminal_there_is_a_progress_bar(tmp_path: Path) -> None:
    """script(1) gives the program a terminal."""
    command = " ".join(["stty cols 160 rows 40;", sys.executable, "train.py", *SMALL, f"run_dir={tmp_path}"])
    done = start(["script", "--quiet", "--return", "--command", command, "/dev/null"])
    assert done.returncode == 0, done.stdout
    assert "100%|" in done.stdout
    assert re.search(r"epoch 2\.00: 100%.*46/46 \[\d\d:\d\d<\d\d:\d\d.*loss \d", done.stdout)
    assert re.search(r"^\r?.*done: top1 ", done.stdout, re.M)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("optim.lrr=1", "there is no key optim.lrr: did you mean optim.lr?"),  # each rank meets it alone
        ("batch_size=61", "batch_size 61 does not divide among 2 ranks: use 60 or 62"),
    ],
)
def test_two_ranks_tell_of_a_mistake_once_and_none_hangs(tmp_path: Path, pair: str, words: str) -> None:
    done = launch(2, "train.py", pair, f"run_dir={tmp_path / 'run'}", timeout=600)
    assert done.returncode != 0
    assert done.stderr.count(f"distrib: {words}\n") == done.stderr.count(words) == 1
    assert "Traceback" not in done.stderr.split("distrib: ")[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("train", "words"), [(2, "2 training images"), (6, "2 validation images")])
def test_more_ranks_than_images_are_refused(tmp_path: Path, train: int, words: str) -> None:
    folder = pictures(tmp_path / "folder", train=train, val=2)
    keys = ["data.name=folder", f"data.root={folder}", "data.size=16", "batch_size=3", f"run_dir={tmp_path / 'run'}"]
    done = launch(3, "train.py", *keys)
    assert f"distrib: 3 ranks are more than the {words}: use 2 or fewer\n" in done.stderr


@pytest.mark.slow
def test_a_file_that_is_no_image_ends_a_run_on_all_ranks_and_is_named(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "folder")
    broken = folder / "train" / "b" / "033.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    keys = [
        "data.name=folder",
        f"data.root={folder}",
        "data.size=16",
        "batch_size=4",
        "model.width=8",
        f"run_dir={tmp_path / 'run'}",
    ]
    done = launch(2, "train.py", *keys, "data.workers=1", timeout=600)
    assert done.returncode != 0
    assert len(re.findall(rf"^distrib: (rank 1: )?{broken} cannot be read as an image: ", done.stderr, re.M)) == 1


@pytest.mark.slow
def test_the_config_of_imagenet_trains_on_a_folder_of_the_true_format(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "folder", train=8, val=3)
    keys = [f"data.root={folder}", "epochs=1", "batch_size=4", "data.size=32", "data.workers=1", f"run_dir={tmp_path / 'run'}"]
    done = launch(1, "train.py", "configs/imagenet.yaml", *keys)
    assert done.returncode == 0, done.stderr
    assert points(tmp_path / "run")["val/top1"][-1][0] == 2
