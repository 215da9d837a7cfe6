"""`distrib predict` and `distrib.load`: the same answers as the evaluation of the run, for any file."""

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from test_bad_images import damaged, pictures
from torch import nn

import distrib
from distrib.cli import COMMANDS, main
from distrib.config import DataConfig
from distrib.data.datasets import load_source
from distrib.errors import UserError
from distrib.inference import predict as module
from distrib.inference.predict import predict

KEYS = ["data.name=folder", "data.size=16", "batch_size=8", "epochs=6", "precision=no", "model.width=8", "threads=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = pictures(tmp_path_factory.mktemp("predict") / "pictures")
    keys = [*KEYS, f"data.root={root}", "data.workers=0", f"run_dir={root.parent / 'run'}", "optim.ema_decay=0.5", "tta=2"]
    assert main(["train", *keys]) == 0
    return root.parent / "run"


def predicted(capsys: pytest.CaptureFixture[str], *args: object) -> list[dict[str, str]]:
    capsys.readouterr()
    assert main(["predict", *map(str, args)]) == 0
    return [*csv.DictReader(io.StringIO(capsys.readouterr().out))]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_hits_are_those_of_the_evaluation(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(module, "FEW", 10 if workers else 1000)
    rows = predicted(capsys, run, run.parent / "pictures/val")
    assert [Path(row["path"]).name for row in rows] == [f"{i:03d}.png" for i in range(12)]
    hits = sum(row["class"] == Path(row["path"]).parent.name for row in rows)
    assert hits == round(0.12 * distrib.evaluate(run)["top1"])
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)
    assert all(row["error"] == "" for row in rows)


def test_a_bad_file_is_a_row_with_its_error_in_its_place(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = damaged(tmp_path)
    (tmp_path / "text.jpg").write_text("no image")
    paths = [tmp_path / "text.jpg", *sorted(root.glob("train/*/*.png"))]
    rows = predicted(capsys, run, *paths, "--top", "2")
    assert [row["path"] for row in rows] == [*map(str, paths)]
    bad = [i for i, row in enumerate(rows) if row["error"]]
    assert bad == [0, 2, 8, 9, 21]
    assert all(row["class"] == row["class2"] == row["probability"] == "" for i, row in enumerate(rows) if i in bad)
    assert rows[0]["error"].startswith("cannot be read as an image: ")
    good = rows[1]
    assert {good["class"], good["class2"]} == {"a", "b"}
    assert float(good["probability"]) + float(good["probability2"]) == pytest.approx(1, abs=1e-5)


def test_paths_come_from_the_standard_input_and_answers_as_json(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = (str(run.parent / "pictures/val" / name) for name in ("a/000.png", "b"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{path}\n\n/nowhere.png\n{folder}\n"))
    capsys.readouterr()
    assert main(["predict", str(run), "-", "--json", "--top", "9"]) == 0
    out, err = capsys.readouterr()
    first, second, *rest = map(json.loads, out.splitlines())
    assert err == f"1 of {2 + len(rest)} images cannot be used\n"
    assert [Path(each["path"]).parent for each in rest] == [Path(folder)] * 6
    assert first["path"] == path
    assert [each["class"] for each in first["top"]] in (["a", "b"], ["b", "a"])
    assert second.keys() == {"path", "error"}
    assert "No such file" in second["error"]


def test_a_file_named_like_an_odd_text_is_one_cell(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / 'a, "b".png')
    (row,) = predicted(capsys, run, tmp_path / 'a, "b".png')
    assert row["path"] == str(tmp_path / 'a, "b".png')


def test_a_loaded_run_gives_the_logits_of_its_files_and_of_its_pixels(run: Path) -> None:
    classifier = distrib.load(run)
    paths = sorted(map(str, (run.parent / "pictures/val").rglob("*.png")))
    images = torch.stack([classifier.pixels(path) for path in paths])
    assert (classifier.classes, images.shape, images.dtype) == (("a", "b"), (12, 3, 16, 16), torch.uint8)
    probabilities = classifier.logits(images).softmax(1)
    for each, row in zip(predict(classifier, paths, top=2), probabilities, strict=True):
        assert [value for _, value in each.top] == pytest.approx(row.sort(descending=True).values.tolist(), abs=1e-6)


def test_a_run_on_images_in_memory_classifies_files_of_them(tmp_path: Path) -> None:
    assert main(["train", *SMALL, "threads=1", f"run_dir={tmp_path / 'run'}"]) == 0
    source = load_source(DataConfig(), download=False)
    images = source.val.images  # type: ignore[union-attr]
    paths = [str(tmp_path / f"{i:03d}.png") for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(np.asarray(image[0])).save(path)
    classifier = distrib.load(tmp_path / "run")
    assert torch.equal(torch.stack([classifier.pixels(path) for path in paths]), images)
    answers = [each.top[0][0] for each in predict(classifier, paths)]
    hits = sum(answer == source.classes[target] for answer, target in zip(answers, source.val.targets.tolist(), strict=True))
    assert hits == round(3.6 * distrib.evaluate(tmp_path / "run")["top1"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give a run and images: distrib predict RUN PATH... [--top K] [--json]"),
        (["RUN"], "give a run and images"),
        (["RUN", "a.png", "--top"], "give a run and images"),
        (["RUN", "a.png", "--top", "0"], "give a run and images"),
        (["RUN", "a.png", "--fast"], "unexpected argument '--fast': distrib predict RUN"),
        (["RUN", "EMPTY"], "there are no images: give files, folders, or - for paths in the standard input"),
        (["RUN", "PICTURES", "data.size=64"], "there is no file or folder data.size=64"),
        (["/nowhere", "PICTURES"], "/nowhere has no checkpoints: give a run folder or a checkpoint"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    run: Path, tmp_path: Path, args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"RUN": str(run), "EMPTY": str(tmp_path), "PICTURES": str(run.parent / "pictures")}
    assert main(["predict", *(names.get(arg, arg) for arg in args)]) == 2
    assert capsys.readouterr().err.startswith(f"distrib: {words}")


def test_predict_is_refused_under_a_launcher(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["predict", str(run), "a.png"]) == 2


def test_a_network_of_the_users_own_has_to_be_passed_again(tmp_path: Path) -> None:
    source = load_source(DataConfig(), download=False)
    config = distrib.Config(run_dir=str(tmp_path), epochs=0.1, batch_size=60, precision="no")
    distrib.train(config, source=source, network=lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))
    with pytest.raises(UserError, match=r"an object: pass it in Python, distrib\.load"):
        distrib.load(tmp_path)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    assert distrib.load(tmp_path, network=network).logits(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 10)


def test_what_a_folder_has_beside_images_is_counted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    pictures(tmp_path / "more")
    (tmp_path / "more/link").symlink_to("/nowhere")
    assert main(["predict", str(run), str(tmp_path / "empty"), str(tmp_path / "more")]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 + 36
    assert err == "left out: 1 empty folders, 1 links to nothing, pipes and the like\n"


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "predict", interrupted)
    assert main(["predict", "run", "photo.jpg"]) == 130
    assert capsys.readouterr() == ("", "")


def test_of_equal_logits_the_first_class_is_the_answer_as_in_an_evaluation(run: Path) -> None:
    class Equal(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([1.0, 2.0, *[2.0 + 1e-7] * 6, 2.0]).expand(len(images), 9)

    classifier = replace(distrib.load(run), network=Equal(), classes=tuple("abcdefghi"))
    paths = sorted(map(str, (run.parent / "pictures/val").rglob("*.png")))
    answers = [each.top for each in predict(classifier, paths, top=2)]
    expected = int(classifier.logits(classifier.pixels(paths[0])[None]).argmax())
    assert {top[0][0] for top in answers} == {classifier.classes[expected]}
    assert all(top[0][1] >= top[1][1] for top in answers)
