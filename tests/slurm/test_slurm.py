"""Runs on a real SLURM cluster, whose nodes are network namespaces: submitted, stopped, preempted, cancelled, crashed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import SCRIPT as CLUSTER
from cluster import Cluster, wait_for
from conftest import ROOT, SCRIPTS, assert_same, launch, requires, weights
from test_launch import pictures
from test_survival import FILES, KEYS

pytestmark = pytest.mark.slow

SCRIPT = "launch/slurm.sbatch"
REPORT = r"^epoch .* step [\d,]+/[\d,]+  train"
SLOW = {"PACE": "0.5", "PACE_FROM": "5"}  # so that a run is under way when something happens to it
STOPPED = r"^stopped by (\w+) after step (\d+), which is saved: run the same command to resume$"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    needed = ("slurmctld", "slurmd", "munged", "ip")
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    requires(os.geteuid() == 0, "root, for the network namespaces that stand for nodes")
    requires(
        all(shutil.which(each, path=path) for each in needed),
        "apt-get install -y --no-install-recommends slurm-wlm munge iproute2",
    )
    folder = tempfile.mkdtemp(prefix="slurm.")  # short: Unix sockets are in it
    cluster = Cluster(folder)
    cluster.environment |= {"DISTRIB_SITE": "tests/slurm/site.sh", "PYTHON_OF_TESTS": str(Path(sys.executable).parent)}
    try:
        cluster.do("start", "6")
        yield cluster
    finally:
        cluster.do("stop")
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's runs are, and the pictures that loader workers read."""
    root = tmp_path_factory.mktemp("slurm")
    pictures(root / "folder", train=120, val=30)
    return root


def keys(root: Path, workers: int) -> list[str]:
    """The keys of a run on images in memory, or on files that loader workers read."""
    files = [*FILES, f"data.root={root / 'folder'}", f"data.workers={workers}"] if workers else []
    return [*KEYS, *files]


@pytest.fixture(scope="module")
def whole(root: Path) -> dict[tuple[int, int], Path]:
    """The same runs without SLURM, undisturbed, by ranks and loader workers."""
    runs = {}
    for ranks, workers in ((1, 0), (1, 2), (2, 0), (2, 2), (4, 0)):
        run_dir = runs[ranks, workers] = root / f"whole_{ranks}_{workers}"
        done = launch(ranks, "train.py", *keys(root, workers), f"run_dir={run_dir}")
        assert done.returncode == 0, done.stderr
    return runs


class Job:
    """A job under way, its run folder and its output."""

    def __init__(self, slurm: Cluster, run_dir: Path, keys: list[str], *options: str, **environment: str) -> None:
        self.slurm, self.run_dir, self.output = slurm, run_dir, run_dir.with_suffix(".out")
        chosen = ["--nodes=2", "--nodelist=node1,node2", "--time=10", f"--output={self.output}", f"--chdir={ROOT}", *options]
        self.id = slurm.sbatch(*chosen, SCRIPT, *keys, f"run_dir={run_dir}", **environment)

    def reports(self) -> "Job":
        wait_for(self.output, REPORT)
        return self

    def completes(self, restarts: int, whole: Path, *, or_more: bool = False) -> None:
        """It ends well, after so many restarts, as if it had not been disturbed."""
        job = self.slurm.wait(self.id, "COMPLETED")
        if or_more:
            restarts = max(restarts, int(job["Restarts"]))
        assert (job["Restarts"], job["ExitCode"]) == (str(restarts), "0:0")
        assert_same(self.run_dir, whole)
        attempts = [json.loads(line) for line in (self.run_dir / "attempts.jsonl").read_text().splitlines()]
        assert [attempt["restarts"] for attempt in attempts] == list(range(restarts + 1))
        assert {attempt["job"] for attempt in attempts} == {self.id}
        stops = [int(step) for _, step in re.findall(STOPPED, self.output.read_text(), re.M)]
        if stops:
            assert [attempt["after_step"] for attempt in attempts] == [0, *stops]


@pytest.fixture(scope="module")
def limited(slurm: Cluster, root: Path) -> list[Job]:
    """Two jobs at once on the same two nodes, with 0 and 2 loader workers, which SLURM itself tells of their time limit.

    Nobody helps them back: they go on two minutes later, while other tests run.
    """
    # SLURM may send the signal a minute early, and a busy machine may need a minute to start the ranks.
    options, slow = ["--nodelist=node3,node4", "--time=3", "--signal=USR1@30"], {"PACE": "3", "PACE_FROM": "5"}
    jobs = [Job(slurm, root / f"limited_{workers}", keys(root, workers), *options, **slow) for workers in (0, 2)]
    return [job.reports() for job in jobs]


@pytest.fixture(scope="module")
def unplugged(slurm: Cluster, root: Path, limited: list[Job]) -> Job:
    """A job one of whose nodes has lost its power."""
    job = Job(slurm, root / "unplugged", keys(root, 0), "--nodelist=node5,node6", **SLOW).reports()
    slurm.do("crash", "node6")
    return job


@pytest.mark.usefixtures("limited", "unplugged", "whole")  # these are made while the jobs wait for their limit
def test_slurm_tells_two_jobs_on_the_same_nodes_of_their_time_limit_and_both_go_back_into_the_queue(
    slurm: Cluster, limited: list[Job]
) -> None:
    for job in limited:
        assert int(slurm.wait(job.id, "PENDING")["Restarts"]) >= 1  # more, where a start alone takes a minute
        assert re.findall(STOPPED, job.output.read_text(), re.M)[0][0] == signal.SIGUSR1.name
        slurm.tell("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")  # one more limit would prove nothing more


def test_a_job_that_is_told_to_stop_goes_back_into_the_queue_and_on(
    slurm: Cluster, root: Path, whole: dict[tuple[int, int], Path]
) -> None:
    job = Job(slurm, root / "told", keys(root, 2), **SLOW).reports()
    slurm.tell("scancel", "--signal=USR1", job.id)
    slurm.release(job.id)
    job.completes(1, whole[2, 2])
    assert "slurm.sbatch: the run has stopped and can resume: back into the queue" in job.output.read_text()


def test_preempted_jobs_go_on_when_the_other_one_is_done(
    slurm: Cluster, root: Path, whole: dict[tuple[int, int], Path]
) -> None:
    """One in a partition that gives them time to leave, and one in a partition that does not. The first has loader workers,
    which get the signal too."""
    options, workers = ["--nodes=1", "--exclusive"], (2, 0)
    places = [("node1", "main"), ("node2", "graceless")]
    jobs = [
        Job(slurm, root / f"preempted_{where}", keys(root, n), *options, f"--nodelist={node}", f"--partition={where}", **SLOW)
        for n, (node, where) in zip(workers, places, strict=True)
    ]
    for job in jobs:
        job.reports()
    urgent = ["--partition=urgent", "--nodelist=node1,node2", "--nodes=2", "--exclusive"]
    slurm.wait(slurm.sbatch(*urgent, "--output=/dev/null", "--wrap=sleep 1"), "COMPLETED")
    for job in jobs:
        slurm.release(job.id)
    for n, job in zip(workers, jobs, strict=True):
        job.completes(1, whole[1, n])
        assert re.search(STOPPED, job.output.read_text(), re.M)


def test_a_job_that_is_requeued_by_hand_goes_on(slurm: Cluster, root: Path, whole: dict[tuple[int, int], Path]) -> None:
    job = Job(slurm, root / "requeued", keys(root, 0), **SLOW).reports()
    slurm.tell("scontrol", "requeue", job.id)
    slurm.release(job.id)
    job.completes(1, whole[2, 0])


def test_a_cancelled_job_stays_cancelled_and_its_checkpoint_is_there(slurm: Cluster, root: Path) -> None:
    job = Job(slurm, root / "cancelled", keys(root, 0), "--nodes=1", "--nodelist=node1", **SLOW).reports()
    slurm.tell("scancel", job.id)
    assert slurm.wait(job.id, "CANCELLED")["Restarts"] == "0"
    (step,) = re.findall(STOPPED, wait_for(job.output, STOPPED), re.M)
    assert (job.run_dir / "checkpoints" / f"step_{int(step[1]):08d}").is_dir()
    time.sleep(1)
    assert slurm.job(job.id)["JobState"] == "CANCELLED"


def test_a_job_that_the_file_stops_is_over_and_the_same_line_goes_on(
    slurm: Cluster, root: Path, whole: dict[tuple[int, int], Path]
) -> None:
    job = Job(slurm, root / "by_file", keys(root, 0), **SLOW).reports()
    (job.run_dir / "STOP").touch()
    assert slurm.wait(job.id, "COMPLETED")["Restarts"] == "0"
    assert re.search(r"^stopped by the file STOP after step \d+, which is saved", job.output.read_text(), re.M)
    again = Job(slurm, root / "by_file", keys(root, 0))
    assert slurm.wait(again.id, "COMPLETED")["Restarts"] == "0"
    assert_same(job.run_dir, whole[2, 0])


def test_of_a_job_array_only_the_element_that_is_stopped_goes_back_into_the_queue(
    slurm: Cluster, root: Path, whole: dict[tuple[int, int], Path]
) -> None:
    """A sweep, of which the last element, whose id is that of the array, is stopped."""
    sweep = ["optim.lr=0.05,0.1", f"run_dir={root}/array_%a_%v"]
    options = ["--array=0-1", "--nodes=1", f"--chdir={ROOT}", f"--output={root}/array_%a.out"]
    array = slurm.sbatch(*options, SCRIPT, *keys(root, 0), *sweep, **SLOW)
    wait_for(root / "array_1.out", REPORT)
    slurm.tell("scancel", "--signal=USR1", f"{array}_1")
    slurm.release(f"{array}_1")
    assert slurm.wait(f"{array}_1", "COMPLETED")["Restarts"] == "1"
    assert slurm.wait(f"{array}_0", "COMPLETED")["Restarts"] == "0"
    assert_same(root / "array_1_0.1", whole[1, 0])
    assert weights(root / "array_0_0.05").keys() == weights(whole[1, 0]).keys()


def test_an_element_without_a_value_of_its_own_is_refused(slurm: Cluster, root: Path) -> None:
    output = root / "beyond.out"
    job = slurm.sbatch("--array=2", f"--chdir={ROOT}", f"--output={output}", SCRIPT, "seed=1,2", f"run_dir={root}/beyond")
    assert "slurm.sbatch: seed=1,2 has 2 values, and none for element 2 of the job array\n" in wait_for(output, "slurm.sbatch")
    assert slurm.wait(f"{job}_2", "FAILED")["ExitCode"] == "2:0"


def test_a_killed_rank_ends_its_job_which_is_tried_again_only_as_often_as_asked(slurm: Cluster, root: Path) -> None:
    job = Job(slurm, root / "killed", [*keys(root, 0), "epochs=50"], MAX_CRASHES="1", PACE_LIVES="2", **SLOW).reports()
    kill = "pkill", "-KILL", "-f", f"train.py .*run_dir={job.run_dir}"
    slurm.do("at", "node2", *kill)
    slurm.release(job.id)
    why = "the run failed with exit code 3: rank 1 has exited, so the other ranks exit too; the same command resumes from "
    assert f"slurm.sbatch: crash 1 of at most 1 ({why}the last checkpoint): back into the queue\n" in job.output.read_text()
    wait_for(job.output, r"back into the queue\n(.*\n)+" + REPORT[1:])
    slurm.do("at", "node2", *kill)
    failed = slurm.wait(job.id, "FAILED")
    assert (failed["Restarts"], failed["NodeList"]) == ("1", "node[1-2]")
    assert job.output.read_text().count("distrib: rank 1 has exited, so the other ranks exit too") == 2
    assert json.loads((job.run_dir / "status.json").read_text())["cause"] == "rank 1 has exited"
    attempts = [json.loads(line) for line in (job.run_dir / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["restarts"] for attempt in attempts] == [0, 1]


def gpus_and_places(notes: Path, ranks: int) -> list[dict[str, str]]:
    """What paced.py noted of each rank."""
    return [json.loads((notes / f"rank_{rank}.json").read_text()) for rank in range(ranks)]


def test_a_mistake_in_a_command_is_told_once_and_never_tried_again(slurm: Cluster, root: Path) -> None:
    """The tasks of this job have a GPU each, and see no other: it is the first one there."""
    notes = root / "notes_mistaken"
    notes.mkdir()
    options = ["--nodes=1", "--nodelist=node1", "--ntasks-per-node=2", "--gpus-per-task=1"]
    job = Job(slurm, root / "mistaken", ["optim.lrr=1"], *options, MAX_CRASHES="3", NOTES=str(notes))
    failed = slurm.wait(job.id, "FAILED")
    assert (failed["Restarts"], failed["ExitCode"]) == ("0", "2:0")
    assert job.output.read_text().count("distrib: there is no key optim.lrr: did you mean optim.lr?\n") == 1
    ranks = gpus_and_places(notes, 2)
    assert sorted(rank["CUDA_VISIBLE_DEVICES"] for rank in ranks) == ["0", "1"]
    assert [(rank["LOCAL_RANK"], rank["LOCAL_WORLD_SIZE"]) for rank in ranks] == [("0", "1")] * 2


def submit(slurm: Cluster, *arguments: str | Path, **environment: str) -> tuple[int, str, str]:
    done = slurm.run(sys.executable, "launch/submit.py", *arguments, **environment)
    return done.returncode, done.stdout, done.stderr


def test_ranks_find_the_network_that_nodes_share_although_a_nodes_own_name_is_a_loopback_address(
    slurm: Cluster, root: Path
) -> None:
    """As on Debian, whose /etc/hosts calls the machine itself 127.0.1.1. gloo would listen there."""
    address = re.search(r"(\S+) node1$", Path(slurm.folder, "hosts").read_text(), re.M)
    assert address
    ranks = []
    for rank, node in enumerate(("node1", "node2")):
        hosts = root / f"hosts_{node}"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {node}\n")
        variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        variables |= {"MASTER_ADDR": address[1], "MASTER_PORT": 23456}
        words = " ".join(f"{name}={value}" for name, value in variables.items())
        command = f"mount --bind {hosts} /etc/hosts && exec env {words} {sys.executable} train.py {' '.join(KEYS)}"
        command += f" epochs=1 limits.start=120 run_dir={root / 'loopback'}"
        at = [CLUSTER, "at", slurm.folder, node, "unshare", "--mount", "sh", "-c", command]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ranks.append(subprocess.Popen(at, cwd=ROOT, env=slurm.environment | SCRIPTS, **options))
    outputs = [each.communicate(timeout=600)[0] for each in ranks]
    assert [each.returncode for each in ranks] == [0, 0], outputs


def test_submit_gives_each_rank_its_gpu_and_cpus_and_they_train_as_as_many_local_ranks_do(
    slurm: Cluster, root: Path, whole: dict[tuple[int, int], Path]
) -> None:
    """The cluster's GPUs are none that torch could use, so the ranks train on CPUs; two nodes have 2 GPUs and 8 CPUs each."""
    notes = root / "notes"
    notes.mkdir()
    arguments = ["--nodes", "2", "--gpus-per-node", "2", "--time", "5", "--nodelist=node1,node2", "--", *KEYS]
    arguments += [f"run_dir={root}/submitted"]
    code, out, err = submit(slurm, "--dry-run", *arguments)
    assert (code, err) == (0, "")
    assert not (root / "submitted").exists()
    code, out, err = submit(slurm, *arguments, NOTES=str(notes))
    assert (code, err) == (0, "")
    line, told = out.splitlines()
    assert line.startswith("sbatch --job-name=submitted ")
    assert " --nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=4 --nodelist=node1,node2 " in line
    job = told.split(":")[0].removeprefix("job ")
    assert told == f"job {job}: squeue --job {job}; its output is in {root}/submitted/slurm-{job}.out"
    slurm.wait(job, "COMPLETED")
    ranks = gpus_and_places(notes, 4)
    assert [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "0", "1"]
    assert [rank["SLURMD_NODENAME"] for rank in ranks] == ["node1", "node1", "node2", "node2"]
    for rank in ranks:
        assert (rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"], rank["MASTER_ADDR"]) == ("4", "2", "node1")
        assert rank["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "ranks 4, device cpu, threads 1," in (root / f"submitted/slurm-{job}.out").read_text()  # as KEYS ask
    assert json.loads((root / "submitted/attempts.jsonl").read_text())["hosts"] == ["node1", "node2"]
    assert_same(root / "submitted", whole[4, 0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes=7"], "7 nodes are more than partition main has: 6"),
        (["--gpus-per-node=3"], "3 GPUs on a node are more than partition main has: 2"),
        (["--ranks-per-node=4", "--cpus-per-task=3"], "12 CPUs on a node are more than partition main has: 8"),
        (["--partition=gpu"], "there is no partition gpu: give --partition, one of graceless, main, urgent"),
        (["--nodes=3", "--ranks-per-node=1"], "batch_size 128 does not divide among 3 ranks: use 126 or 129"),
        (["--time=soon"], "SLURM refuses: "),
        (["--", "optim.lrr=1"], "there is no key optim.lrr: did you mean optim.lr?"),
        (["--sweep", "seed=1,,2"], "--sweep seed=1,,2 is not KEY=A,B,..."),
        (["--sweep", "seed=1,x"], "seed is 'x', not a whole number"),
        (["configs/fashion_mnist.yaml"], "unexpected argument 'configs/fashion_mnist.yaml': a config and its keys follow '--'"),
    ],
)
def test_submit_refuses_what_cannot_work_in_a_line(slurm: Cluster, arguments: list[str], words: str) -> None:
    code, out, err = submit(slurm, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"submit.py: {words}")


def test_submit_makes_a_job_array_of_a_sweep(slurm: Cluster, root: Path) -> None:
    code, out, err = submit(slurm, "--dry-run", "--sweep", "optim.lr=0.05,0.1,0.2", "--", f"run_dir={root}/sweep")
    assert (code, err) == (0, "")
    assert " --array=0-2 " in out
    assert f" --output={root}/sweep/slurm-%A_%a.out " in out
    assert out.endswith(f" launch/slurm.sbatch optim.lr=0.05,0.1,0.2 run_dir={root}/sweep/optim.lr_%v\n")


def test_a_job_whose_node_loses_its_power_is_requeued_and_finishes(
    slurm: Cluster, unplugged: Job, whole: dict[tuple[int, int], Path]
) -> None:
    give_up = time.monotonic() + 600
    while "DOWN" not in slurm.tell("scontrol", "--oneliner", "show", "node", "node6") and time.monotonic() < give_up:
        time.sleep(0.2)
    slurm.do("boot", "node6")
    slurm.hasten(unplugged.id)  # its two minutes may be over, so that it starts as soon as it has its nodes
    unplugged.completes(1, whole[2, 0])


@pytest.mark.parametrize("workers", [0, 2])
def test_jobs_that_met_their_time_limit_go_on_without_help_side_by_side(
    limited: list[Job], whole: dict[tuple[int, int], Path], workers: int
) -> None:
    limited[workers // 2].completes(1, whole[2, workers], or_more=True)
