"""Exported networks: the answers of the checkpoint, in other runtimes, from decoded pictures of any size."""

import errno
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors import safe_open
from torch import nn

import distrib
from distrib import train
from distrib.command_line import load_config
from distrib.data.pixels import ImageSpec, center_of, picture_of, pixels_of
from distrib.data.resize import center_resized
from distrib.errors import DiskError, RunError, UserError
from distrib.inference import graph
from distrib.inference.evaluate import evaluate, evaluate_classes
from distrib.inference.export import export

side = st.integers(1, 300)


@given(
    size=st.tuples(side, side),
    wanted=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    fit=st.sampled_from(["crop", "pad", "stretch"]),
    filtered=st.sampled_from(["bilinear", "bicubic"]),
    part=st.sampled_from([0.875, 0.95, 1.0, 224 / 232, 0.1]),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_the_graph_resizes_to_the_same_bits(
    size: tuple[int, int], wanted: tuple[int, int], fit: str, filtered: str, part: float, seed: int
) -> None:
    picture = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    if seed % 3 == 0:
        picture = (picture > 127).byte() * 255  # edges, at which a filter overshoots
    spec = ImageSpec(*wanted, fit, center_crop=part, filter=filtered)
    assert torch.equal(center_resized(picture[None], spec)[0], center_of(picture, spec).float())


def photos(tmp_path: Path) -> Path:
    """Class folders of pictures of many kinds and sizes, whose class is the side that is brighter."""
    root, chance = tmp_path / "photos", random.Random(0)
    for i in range(60):
        name = "left" if i % 2 else "right"
        height, width = chance.randint(20, 90), chance.randint(20, 90)
        grey = np.tile(np.linspace(0, 255, width), (height, 1))
        picture = Image.fromarray((grey[:, ::-1] if i % 2 else grey).astype(np.uint8))
        folder = root / ("val" if i < 20 else "train") / name
        folder.mkdir(parents=True, exist_ok=True)
        if i % 5 == 0:
            exif = Image.Exif()
            exif[0x112] = 3
            picture.rotate(180).convert("RGB").save(folder / f"{i}.jpg", exif=exif)
        elif i % 5 == 1:
            picture.convert("CMYK").save(folder / f"{i}.tif")
        elif i % 5 == 2:
            picture.convert("RGBA").save(folder / f"{i}.png")
        elif i % 5 == 3:
            Image.fromarray(np.asarray(picture).astype(np.uint16) * 257).save(folder / f"{i}.png")
        else:
            picture.resize((width * 9, height * 9)).convert("RGB").save(folder / f"{i}.jpg")  # decoded at less than its size
    return root


def trained(tmp_path: Path, *keys: str, **handed: object) -> Path:
    run = [*SMALL, f"run_dir={tmp_path / 'run'}", "threads=1"] if not any("folder" in key for key in keys) else []
    train(load_config([*run, *keys]), **handed)
    return tmp_path / "run"


def trained_on_photos(tmp_path: Path, *keys: str) -> Path:
    run = ["data.name=folder", f"data.root={photos(tmp_path)}", "data.workers=0", "batch_size=10", "epochs=2", "precision=no"]
    return trained(tmp_path, *run, f"run_dir={tmp_path / 'run'}", "threads=1", "model.width=8", *keys)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".safetensors"])
def test_an_export_answers_as_the_run_did_and_tells_what_it_is(tmp_path: Path, suffix: str) -> None:
    run, out = trained(tmp_path, "tta=2", "precision=bf16"), tmp_path / f"model{suffix}"
    found = export(run, out)
    assert (found.images, found.other, found.left_out) == (360, 0, 0)
    assert found.largest < 1e-4
    assert abs(found.hits - 3.6 * evaluate(run)["top1"]) <= 3  # that was in bf16
    card = Path(f"{out}.md").read_text()
    assert f"{found.hits} of 360 validation images right" in card
    assert f"# model{suffix}\n" in card
    assert "SHA-256 39fabcc4" in card
    if suffix == ".onnx":
        onnx.checker.check_model(onnx.load(out), full_check=True)
        session = onnxruntime.InferenceSession(out)
        assert session.get_inputs()[0].shape == ["batch", "height", "width", 3]
        said = session.get_modelmeta().custom_metadata_map
        assert json.loads(said["classes"]) == list("0123456789")
        assert json.loads(said["preprocessing"])["mean"] == [0.3053]
    elif suffix == ".pt2":
        extra = {"distrib.json": ""}
        torch.export.load(out, extra_files=extra)
        assert json.loads(extra["distrib.json"])["classes"] == list("0123456789")
    else:
        with safe_open(out, "pt") as file:
            assert json.loads(file.metadata()["distrib"])["classes"] == list("0123456789")
    assert sorted(each.name for each in tmp_path.iterdir()) == [f"model{suffix}", f"model{suffix}.md", "run"]


def test_a_file_of_weights_that_was_exported_stands_for_its_run(tmp_path: Path) -> None:
    run, out = (
        trained_on_photos(tmp_path, "data.size=24x16", "data.center_crop=0.9", "data.mean=0.4"),
        tmp_path / "m.safetensors",
    )
    export(run, out)
    assert evaluate_classes(out)[1:] == evaluate_classes(run)[1:]
    [photo, *_] = (tmp_path / "photos" / "val" / "left").iterdir()
    one, other = distrib.load(run), distrib.load(out)
    assert torch.equal(one.logits(one.pixels(photo)[None]), other.logits(other.pixels(photo)[None]))
    own = ["data.name=folder", f"data.root={tmp_path / 'photos'}", f"run_dir={tmp_path / 'more'}", f"model.weights={out}"]
    keys = ["model.width=8", "batch_size=10", "epochs=1", "precision=no", "data.workers=0", "threads=1"]
    train(load_config([*own, *keys]))
    again = distrib.load(tmp_path / "more")
    assert (again.spec, again.manifest["image"]["mean"]) == (one.spec, [0.4] * 3)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_odd_pictures_get_the_same_answers_in_evaluation_prediction_and_export(tmp_path: Path, fit: str) -> None:
    run = trained_on_photos(tmp_path, "data.size=24x32", f"data.fit={fit}", "data.filter=bicubic", "data.crop_area=1")
    values = evaluate_classes(run)
    for name in ("model.onnx", "model.pt2"):
        found = export(run, tmp_path / name)
        assert (found.images, found.hits) == (20, sum(values.hits))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    program = torch.export.load(tmp_path / "model.pt2").module()
    classifier = distrib.load(run, device="cpu")
    for path in sorted((tmp_path / "photos" / "val").glob("*/*")):
        picture = picture_of(path, classifier.spec)
        shown = classifier.pixels(path)
        assert torch.equal(center_of(picture, classifier.spec), shown), path
        [logits] = session.run(["logits"], {"images": picture[None].numpy()})
        for answer in (torch.from_numpy(logits), program(picture[None])):
            torch.testing.assert_close(answer, classifier.logits(shown[None]), rtol=1e-4, atol=1e-4)
        other = np.asarray(ImageOps.exif_transpose(Image.open(path)))  # as another program decodes it
        if path.suffix == ".jpg" and other.shape == picture.shape:
            [same] = session.run(["logits"], {"images": other[None]})
            np.testing.assert_allclose(same, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "keys",
    [
        ["model.name=airbench", "model.whiten=2", "tta=6"],
        ["model.name=timm:test_vit", "data.flip=random"],
        ["model.name=resnet18", "model.norm=group"],
        ["model.name=mobilenet_v3_small"],
    ],
    ids=lambda keys: keys[0],
)
def test_networks_of_all_kinds_can_be_exported(tmp_path: Path, keys: list[str]) -> None:
    size = "160" if "vit" in keys[0] else "32"
    run = ["data.name=folder", f"data.root={photos(tmp_path)}", "data.workers=0", "batch_size=10", "epochs=1", "precision=no"]
    trained(tmp_path, *run, f"run_dir={tmp_path / 'run'}", "threads=1", f"data.size={size}", *keys)
    assert export(tmp_path / "run", tmp_path / "model.onnx").images == 20


@pytest.mark.parametrize("suffix", [".pt2", ".safetensors"])
def test_a_network_that_a_program_passed_is_passed_again(tmp_path: Path, suffix: str) -> None:
    class Network(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(64, 10))

    train(load_config([f"run_dir={tmp_path / 'run'}", "epochs=1", "precision=no", "threads=1"]), network=Network)
    out = tmp_path / f"model{suffix}"
    with pytest.raises(UserError, match=r"an object: pass it in Python, distrib.load\(..., network=...\)"):
        export(tmp_path / "run", out)
    assert distrib.export(tmp_path / "run", out, network=Network).images == 360


def test_an_export_whose_answers_differ_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, right = trained(tmp_path), graph.center_resized
    monkeypatch.setattr(graph, "center_resized", lambda images, spec: right(images, spec) + 1)
    with pytest.raises(RunError, match=r"^\d+ of 360 answers differ from those of .*, by up to .*: nothing was written$"):
        export(run, tmp_path / "model.pt2")
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


def test_mistakes_are_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path)
    (tmp_path / "there.pt2").write_bytes(b"mine")

    def told(out: str, **options: object) -> str:
        with pytest.raises(UserError) as error:
            export(run, tmp_path / out, **options)
        return str(error.value)

    assert told("there.pt2").endswith("there.pt2 exists: give another name, or delete it")
    (tmp_path / "noted.pt2.md").write_text("mine")
    assert told("noted.pt2").endswith("noted.pt2.md exists: give another name, or delete it")
    assert told("model.pt2", keys={"data.flip": "random"}).startswith("data.flip would be ignored: give name, root, ")
    assert (tmp_path / "there.pt2").read_bytes() == b"mine"
    assert told("model.tflite").endswith("model.tflite has no known suffix: give .safetensors, .pt2, .onnx")
    assert told("none/model.pt2") == f"the folder {tmp_path / 'none'} does not exist"
    assert told("model.pt2", keys={"data.root": "elsewhere"}).startswith("data.root would be ignored: ")
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: False)
        assert told("model.pt2") == f"the folder {tmp_path} cannot be written to: give another one"
    monkeypatch.setattr("distrib.inference.export.find_spec", lambda name: None)
    assert told("model.onnx") == ".onnx needs onnx, onnxscript, onnxruntime: pip install onnx onnxscript onnxruntime"


def test_a_full_disk_is_told_in_a_line_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = trained(tmp_path)
    monkeypatch.setattr("distrib.inference.export.shutil.copyfileobj", full)
    with pytest.raises(DiskError, match=r"^.*model.safetensors cannot be written: No space left on device$"):
        export(run, tmp_path / "model.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


def test_bad_images_are_left_out_and_counted_if_the_run_skips_them(tmp_path: Path) -> None:
    run = trained_on_photos(tmp_path, "data.size=16", "data.bad_images=skip")
    (tmp_path / "photos" / "val" / "left" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    found = export(run, tmp_path / "model.safetensors")
    assert (found.images, found.left_out) == (20, 1)
    assert "1 bad images left out" in Path(tmp_path / "model.safetensors.md").read_text()


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_nothing_half_there(tmp_path: Path) -> None:
    """DISTRIB_EXPORT_KILLS sets the number of kills."""
    run, chance = trained(tmp_path), random.Random(0)
    began = time.monotonic()
    command = [sys.executable, "-m", "distrib", "export", str(run)]
    (tmp_path / "whole").mkdir()
    subprocess.run([*command, str(tmp_path / "whole" / "model.onnx")], check=True, cwd=ROOT, capture_output=True)
    whole = time.monotonic() - began
    survived = 0
    for i in range(int(os.environ.get("DISTRIB_EXPORT_KILLS", "4"))):
        folder = tmp_path / f"out{i}"
        folder.mkdir()
        with subprocess.Popen([*command, str(folder / "model.onnx")], cwd=ROOT, stdout=-3, stderr=-3) as process:
            time.sleep(whole * chance.uniform(0.7, 1.05))
            process.kill()
        names = sorted(each.name for each in folder.iterdir())
        assert names in ([], ["model.onnx.md"], ["model.onnx", "model.onnx.md"])
        if "model.onnx" in names:
            survived += 1
            assert (folder / "model.onnx").stat().st_size > 1000
            onnx.checker.check_model(onnx.load(folder / "model.onnx"), full_check=True)
    print(f"{survived} were complete")


def test_pixels_and_the_center_of_the_whole_picture_are_the_same(tmp_path: Path) -> None:
    Image.effect_noise((700, 500), 50).convert("RGB").save(tmp_path / "a.jpg")
    for spec in (ImageSpec(32, 48), ImageSpec(64, 64, "pad"), ImageSpec(100, 20, "stretch"), ImageSpec(300, 300)):
        shown = pixels_of(tmp_path / "a.jpg", spec, spec.center)
        assert torch.equal(shown, center_of(picture_of(tmp_path / "a.jpg", spec), spec))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".safetensors"])
def test_the_code_in_a_model_card_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    run = trained(tmp_path)
    export(run, tmp_path / f"model{suffix}")
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / f"model{suffix}.md").read_text(), re.S)
    photo = Image.effect_noise((20, 30), 90).convert("RGB")
    photo.putalpha(Image.effect_noise((20, 30), 200))
    photo.save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"photo": "photo.png"}
    exec(code, space)
    classifier = distrib.load(run, device="cpu")
    expected = classifier.logits(classifier.pixels("photo.png")[None])
    torch.testing.assert_close(torch.as_tensor(space["logits"]), expected, rtol=1e-4, atol=1e-4)
