"""`distrib runs`."""

from pathlib import Path

import pytest

from distrib.cli import main
from distrib.reporting.runs import TITLES
from distrib.runtime.disk import write_atomically


def test_runs_are_listed_with_their_state_step_last_evaluation_and_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses = {
        "deep/a": '{"state": "failed", "step": 1234, "top1": 99.123, "seconds": 7265.4, "attempts": 3, "cause": "no space", '
        '"best": {"step": 1200, "top1": 99.5}}',
        "b": "not JSON",
    }
    for name, status in statuses.items():
        (tmp_path / name).mkdir(parents=True)
        write_atomically(tmp_path / name / "status.json", status)
    assert main(["runs", str(tmp_path)]) == 0
    titles, b, a = (line.split() for line in capsys.readouterr().out.splitlines())
    assert titles == [*TITLES]
    assert b == ["b", "?", "0", "0", "?"]
    best = ["top1", "99.5", "at", "step", "1,200"]
    assert a == ["deep/a", "failed", "1,234", "top1", "99.12", *best, "7,265", "3", "no", "space"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "there are no runs in runs: give the folder that contains the run folders"),
        (["a", "b"], "unexpected argument 'b': give one folder"),
    ],
)
def test_a_folder_without_runs_and_a_second_folder_are_refused(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs", *args]) == 2
    assert capsys.readouterr().err == f"distrib: {words}\n"
