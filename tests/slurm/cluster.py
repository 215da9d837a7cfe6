"""A SLURM cluster of several nodes on this machine, and its jobs, as its own commands tell of them."""

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("cluster.sh")


class Cluster:
    """What a user has on a login node: sbatch, scancel, scontrol; and what the power grid has: crash and boot."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf", "SLURM_TEST_OWNER": str(os.getpid())}

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300, "check": False}
        return subprocess.run(words, env=self.environment | environment, **options)

    def tell(self, *command: str | Path, **environment: str) -> str:
        done = self.run(*command, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def do(self, verb: str, *arguments: str) -> str:
        """start, stop, crash, boot or at, which cluster.sh explains."""
        return self.tell(SCRIPT, verb, self.folder, *arguments)

    def sbatch(self, *arguments: str | Path, **environment: str) -> str:
        """Submit a job; returns its id."""
        return self.tell("sbatch", "--parsable", *arguments, **environment).strip()

    def job(self, job: str) -> dict[str, str]:
        """JobState, Reason, Restarts, ExitCode and so on."""
        return dict(re.findall(r"(\w+)=(\S*)", self.tell("scontrol", "--oneliner", "show", "job", job)))

    def wait(self, job: str, state: str, timeout: float = 1200) -> dict[str, str]:
        """Wait until a job is in a state, and fail as soon as it has ended in another one."""
        give_up = time.monotonic() + timeout
        while (found := self.job(job))["JobState"] != state:
            assert found["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "REQUEUED"), (
                found,
                Path(found["StdOut"]).read_text(),
            )
            assert time.monotonic() < give_up, (found, Path(found["StdOut"]).read_text())
            time.sleep(0.1)
        return found

    def release(self, job: str) -> None:
        """SLURM lets a job that is requeued wait for two minutes; two seconds are the least that works."""
        self.wait(job, "PENDING")
        assert self.hasten(job)

    def hasten(self, job: str) -> bool:
        """Whether the job was waiting still, so that it could be told to wait for two seconds."""
        return self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2").returncode == 0


def wait_for(output: Path, words: str, timeout: float = 600) -> str:
    """Wait until a job's output has words that a pattern describes; returns the output."""
    give_up = time.monotonic() + timeout
    while not (output.exists() and re.search(words, output.read_text(), re.M)):
        assert time.monotonic() < give_up, output.read_text() if output.exists() else f"no {output}"
        time.sleep(0.05)
    return output.read_text()
