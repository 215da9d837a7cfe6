"""What a run folder tells of the attempts that made it."""

import json
import subprocess
from pathlib import Path

import pytest
from accelerate import PartialState
from conftest import SMALL

from distrib.cli import main
from distrib.runtime import attempts


def test_each_attempt_leaves_a_line_with_its_first_step_job_hosts_and_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [*SMALL, f"run_dir={tmp_path}"]
    assert main(["train", *keys]) == 0
    PartialState._reset_state()
    for name, value in {"SLURM_JOB_ID": "123", "SLURM_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(attempts.socket, "gethostname", lambda: "node7")
    assert main(["train", *keys, "epochs=3"]) == 0
    first, second = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert (first["after_step"], first["ranks"], first["job"], first["restarts"]) == (0, 1, None, 0)
    assert (second["after_step"], second["hosts"], second["job"], second["restarts"]) == (46, ["node7"], "123", 2)
    assert first["commit"] == second["commit"] == attempts.commit()


def test_the_commit_says_if_files_were_changed_since_and_there_may_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "attempts.py"
    monkeypatch.setattr(attempts, "__file__", str(code))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert attempts.commit() is None
    code.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert attempts.commit() == head
    code.write_text("changed")
    assert attempts.commit() == f"{head}-dirty"
