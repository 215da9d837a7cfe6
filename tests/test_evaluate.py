"""`distrib evaluate`: what it says of a run, on any number of ranks."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import SMALL, launch, points
from test_launch import pictures
from torch import nn

from distrib import evaluate, train
from distrib.cli import main
from distrib.command_line import load_config
from distrib.runtime.status import read_status

FILES = ["data.name=folder", "data.size=16", "batch_size=4", "epochs=1", "precision=no", "model.width=8", "threads=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("evaluate") / "run"
    assert main(["train", *SMALL, "threads=1", "optim.ema_decay=0.9", "tta=2", f"run_dir={run_dir}"]) == 0
    return run_dir


def test_a_run_is_evaluated_by_class_and_the_worst_class_comes_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = read_status(run)["best"]
    assert found["checkpoint"] == f"{run}/checkpoints/step_{best['step']:08d}"
    assert found["values"]["top1"] == best["top1"]
    hits, images = (sum(each[name] for each in found["classes"].values()) for name in ("hits", "images"))
    assert (round(best["top1"] * 3.6), 360) == (hits, images)
    assert main(["evaluate", str(run)]) == 0
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith(f"{found['checkpoint']}: loss {found['values']['loss']:.4f}  top1 {best['top1']:.4f}  top5 ")
    assert title.endswith("  of 360 images")
    assert head.split() == ["class", "images", "right", "%"]
    assert {row.split()[0]: [*map(int, row.split()[1:3])] for row in rows} == {
        name: [each["images"], each["hits"]] for name, each in found["classes"].items()
    }
    shares = [float(row.split()[3]) for row in rows]
    assert shares == sorted(shares)


@pytest.mark.slow
def test_the_hits_are_those_that_the_run_logged_on_any_number_of_ranks(run: Path) -> None:
    found = [launch(ranks, "-m", "distrib", "evaluate", run, "--json") for ranks in (1, 2, 3)]
    assert [each.returncode for each in found] == [0, 0, 0], [each.stderr for each in found]
    results = [json.loads(each.stdout) for each in found]
    assert all(each["classes"] == results[0]["classes"] for each in results)
    assert all(each["values"]["top1"] == read_status(run)["best"]["top1"] for each in results)
    assert all(each["values"]["loss"] == pytest.approx(results[0]["values"]["loss"], rel=1e-6) for each in results)


def test_other_photos_of_the_same_classes_are_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [*FILES, f"data.root={pictures(tmp_path / 'first')}", "data.workers=0", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", *keys]) == 0
    others = pictures(tmp_path / "others", train=2, val=9)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), f"data.root={others}", "data.workers=1"]) == 0
    assert "  of 9 images\n" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "run"), f"data.root={others / 'val'}", "data.holdout=1"]) == 0
    told = capsys.readouterr().out
    assert "data: data.holdout=1: all 9 images are for validation\n" in told
    assert "  of 9 images\n" in told
    assert main(["train", *keys, f"data.root={others / 'val'}", "data.holdout=1", f"run_dir={tmp_path / 'other'}"]) == 2
    assert "data.holdout=1 leaves no images to train on: it is for distrib evaluate" in capsys.readouterr().err
    (others / "train/b").rename(others / "train/c")
    (others / "val/b").rename(others / "val/c")
    assert main(["evaluate", str(tmp_path / "run"), f"data.root={others}"]) == 2
    assert "has another set of classes (2 there, 2 now: b only there, c only now)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give a run folder or a checkpoint, and keys of data only: distrib evaluate RUN [data.root=FOLDER]"),
        (["RUN", "optim.lr=1"], "give a run folder or a checkpoint, and keys of data only"),
        (["RUN", "data.root=/nowhere"], "data.root would be ignored: data.root applies to"),
        (["RUN", "data.mean=0.5"], "data.mean would be ignored: give name, root, holdout, "),
        (["RUN", "data.rooot=1"], "there is no key data.rooot: did you mean data.root?"),
        (["/nowhere"], "/nowhere has no checkpoints: give a run folder or a checkpoint"),
    ],
)
def test_a_mistake_is_told_in_a_line(run: Path, args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *(str(run) if arg == "RUN" else arg for arg in args)]) == 2
    assert re.match(f"distrib: {re.escape(words)}", capsys.readouterr().err)


def test_classes_that_a_run_never_recognized_are_counted_in_its_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class OneAnswer(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(64, 10))
            with torch.no_grad():
                self[1].weight.zero_()
                self[1].bias.copy_(torch.arange(10))

    config = load_config([f"run_dir={tmp_path}", "epochs=1", "optim.lr=1e-9", "precision=no", "threads=1"])
    for _ in range(2):  # and again when the same command finds that the run is complete
        state = train(config, network=OneAnswer)
        assert f"; no image of 9 classes was recognized: distrib evaluate {tmp_path}; " in capsys.readouterr().out
    assert state.values["missed_classes"] == 9
    assert evaluate(tmp_path, network=OneAnswer) == state.values
    assert points(tmp_path)["val/missed_classes"] == [(11, 9.0)]
