"""Weights to start from: of a run, from files, and as torchvision publishes them."""

import argparse
import collections
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, signed_again
from safetensors.torch import load_file, save_file
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.transforms.functional import normalize

import distrib
from distrib import train
from distrib.command_line import load_config
from distrib.config import ModelConfig
from distrib.errors import UserError
from distrib.models.build import build_model
from distrib.models.weights import shown_with


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_weights_is_loaded_but_for_what_the_data_change(tmp_path: Path, suffix: str) -> None:
    trained = models.resnet18(num_classes=5)
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(trained.state_dict(), path)
    model = build_model(ModelConfig(name="resnet18", weights=str(path)), (3, 224, 224), classes=7)
    assert torch.equal(model.conv1.weight, trained.conv1.weight)
    assert torch.equal(model.layer4[1].conv2.weight, trained.layer4[1].conv2.weight)
    assert not model.fc.weight.any()
    assert len(model.fc.weight) == 7
    same = build_model(ModelConfig(name="resnet18", weights=str(path)), (3, 224, 224), classes=5)
    assert torch.equal(same.fc.weight, trained.fc.weight)
    lines: list[str] = []
    grey = build_model(ModelConfig(name="resnet18", weights=str(path)), (1, 224, 224), classes=7, tell=lines.append)
    assert torch.equal(grey.layer1[0].conv1.weight, trained.layer1[0].conv1.weight)
    assert torch.equal(grey.conv1.weight, trained.conv1.weight.sum(1, keepdim=True))
    details = "not loaded, so 0: fc.weight, fc.bias; summed over its channels: conv1.weight"
    assert lines == [f"weights: 120 of 122 tensors from {path}; {details}"]
    images = torch.rand(2, 1, 224, 224)
    with torch.no_grad():  # grey pictures give what they gave as colored ones
        torch.testing.assert_close(grey.eval().conv1(images), trained.conv1(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MISSING = "No such file or directory"
FOUND = models.resnet18(num_classes=5).state_dict()


def shown_of_resnet18(weights: str) -> dict[str, Any]:
    return shown_with(ModelConfig(name="resnet18", weights=weights))


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": each for name, each in FOUND.items()}


FILES = {  # as the best-known programs write them, and the key and prefix that are told
    "pytorch/examples.pth.tar": (
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in FOUND.items()}},
        "state_dict",
        "module.",
    ),
    "torchvision.pth": ({"model": FOUND, "args": argparse.Namespace(lr=1, path=Path("a")), "epoch": 3}, "model", ""),
    "compiled.bin": (prefixed("_orig_mod."), "", "_orig_mod."),
    "lightning.ckpt": (
        {
            "state_dict": {**prefixed("model."), "criterion.weight": torch.ones(5)},
            "hyper_parameters": {"optimizer": collections.Counter("aab")},
        },
        "state_dict",
        "model.",
    ),
    "parallel.pt": (prefixed("module."), "", "module."),
    "both.pth": ({"model_state": {"module": prefixed("module._orig_mod.")}}, "model_state.module", "module._orig_mod."),
    "average.pth": ({"state_dict": {k: 0 * v for k, v in FOUND.items()}, "state_dict_ema": FOUND}, "state_dict_ema", ""),
    "torchvision_ema.pth": (
        {"model": FOUND, "model_ema": {"n_averaged": torch.tensor(3), **prefixed("module.")}},
        "model_ema",
        "module.",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_weights_are_found_in_files_as_other_programs_write_them(tmp_path: Path, name: str) -> None:
    content, key, prefix = FILES[name]
    path = tmp_path / Path(name).name
    torch.save(content, path)
    lines: list[str] = []
    model = build_model(ModelConfig(name="resnet18", weights=str(path)), (3, 224, 224), classes=5, tell=lines.append)
    assert [name for name, each in model.state_dict().items() if not torch.equal(each, FOUND[name])] == []
    details = ", ".join([f"its key {key}"] * bool(key) + [f"without the prefix {prefix}"] * bool(prefix))
    rest = {"lightning.ckpt": "criterion.weight", "torchvision_ema.pth": "n_averaged"}.get(name)
    unused = f"; not used: {rest}" if rest else ""
    assert lines == [f"weights: 122 of 122 tensors from {path}" + (f" ({details})" if details else "") + unused]


def test_a_file_is_known_by_its_bytes_and_an_old_format_is_read(tmp_path: Path) -> None:
    save_file(FOUND, tmp_path / "weights.bin")
    torch.save(FOUND, tmp_path / "old", _use_new_zipfile_serialization=False)
    for name in ("weights.bin", "old"):
        model = build_model(ModelConfig(name="resnet18", weights=str(tmp_path / name)), (3, 224, 224), classes=5)
        assert torch.equal(model.conv1.weight, FOUND["conv1.weight"])


def test_weights_of_batch_norm_are_told_where_group_norm_takes_its_place(tmp_path: Path) -> None:
    lines, path = list[str](), tmp_path / "weights.pth"
    torch.save(FOUND, path)
    config = ModelConfig(name="resnet18", norm="group", weights=str(path))
    model = build_model(config, (3, 224, 224), classes=5, tell=lines.append)
    assert torch.equal(model.bn1.weight, FOUND["bn1.weight"])
    assert lines[0].startswith(f"weights: 62 of 62 tensors from {path} (trained with batch norm); not used: bn1.running_mean, ")


def test_weights_of_another_network_do_not_fit(tmp_path: Path) -> None:
    norm = {name: each for name, each in FOUND.items() if name.startswith("bn1.")}  # a name that is common
    torch.save({f"blocks.{block}.{name}": each for block in range(3) for name, each in norm.items()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights.pth do not fit resnet18: 100 of 122 tensors, such as conv1.weight, which is"):
        build_model(ModelConfig(name="resnet18", weights=str(tmp_path / "weights.pth")), (3, 224, 224), classes=5)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    torch.save(FOUND | {"conv1.weight": FOUND["conv1.weight"] / 0}, tmp_path / "weights.pth")
    with pytest.raises(
        UserError, match=r"resnet18: 1 of 122 tensors, such as conv1.weight, which has values that are not finite$"
    ):
        build_model(ModelConfig(name="resnet18", weights=str(tmp_path / "weights.pth")), (3, 224, 224), classes=5)


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


class Settings:
    """An object of a program, beside its weights."""


def test_nothing_in_a_file_of_weights_is_executed(tmp_path: Path) -> None:
    torch.save({"state_dict": FOUND, "args": Settings()}, tmp_path / "settings.pth")
    torch.save({"state_dict": FOUND, "args": Hostile(tmp_path / "mark")}, tmp_path / "hostile.pth")
    torch.save(models.resnet18(), tmp_path / "network.pth")
    model = build_model(ModelConfig(name="resnet18", weights=str(tmp_path / "settings.pth")), (3, 224, 224), classes=5)
    assert torch.equal(model.conv1.weight, FOUND["conv1.weight"])
    with pytest.raises(UserError, match=r"hostile.pth cannot be read: it has objects that are never loaded \("):
        build_model(ModelConfig(name="resnet18", weights=str(tmp_path / "hostile.pth")), (3, 224, 224), classes=5)
    assert not (tmp_path / "mark").exists()
    with pytest.raises(UserError, match=r"network.pth has a whole network, and no state_dict: save network.state_dict\(\)"):
        build_model(ModelConfig(name="resnet18", weights=str(tmp_path / "network.pth")), (3, 224, 224), classes=5)


def test_small_images_keep_the_stem_of_the_weights_unless_another_is_asked_for(tmp_path: Path) -> None:
    torch.save(FOUND, tmp_path / "weights.pth")
    config = ModelConfig(name="resnet18", weights=str(tmp_path / "weights.pth"))
    assert build_model(config, (3, 32, 32), classes=5).conv1.kernel_size == (7, 7)
    assert build_model(replace(config, weights=""), (3, 32, 32), classes=5).conv1.kernel_size == (3, 3)
    assert build_model(replace(config, weights="", stem="large"), (3, 32, 32), classes=5).conv1.kernel_size == (7, 7)
    with pytest.raises(UserError, match=r"model.stem=small would be ignored: it applies to ResNets only; omit it"):
        build_model(ModelConfig(stem="small"), (1, 8, 8), classes=5)
    with pytest.raises(UserError, match=r"conv1.weight, which is \[64, 3, 7, 7\] there, \[64, 3, 3, 3\] here: model.stem="):
        build_model(replace(config, stem="small"), (3, 32, 32), classes=5)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 64), ("densenet121", 64), ("googlenet", 64)])
def test_weights_are_loaded_as_torchvision_published_them_years_ago(
    monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    options = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
    trained = models.get_model(name, weights=None, **options).eval()
    published = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): each
        for key, each in trained.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **options: published)
    model = build_model(ModelConfig(name=name, weights="DEFAULT"), (3, size, size), classes=1000).eval()
    if name == "resnet18":
        model.conv1, model.maxpool = trained.conv1, trained.maxpool  # that of small images is another
    if name == "googlenet":
        trained.transform_input = True  # from the mean and std of ImageNet to those of TensorFlow
    shown = shown_with(ModelConfig(name=name, weights="DEFAULT"))
    mean, std = (torch.tensor(shown[f"data.{key}"])[:, None, None] for key in ("mean", "std"))
    pixels = torch.rand(2, 3, size, size)
    torch.testing.assert_close(model((pixels - mean) / std), trained(normalize(pixels, *IMAGENET)), rtol=1e-4, atol=1e-5)


def test_weights_that_cannot_be_had_or_do_not_fit_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(name: str, weights: str) -> str:
        with pytest.raises(UserError) as error:
            build_model(ModelConfig(name=name, weights=weights), (3, 64, 64), classes=10)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert told("resnet18", str(tmp_path / "gone.pth")) == f"model.weights={tmp_path}/gone.pth cannot be read: {MISSING}"
    assert told("cnn", "runs/gone") == "model.weights=runs/gone cannot be read: there is no such file or folder"
    save_file(FOUND, tmp_path / "whole.safetensors")
    for content in (
        b"x",
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        (tmp_path / "whole.safetensors").read_bytes()[:3000],
    ):
        (tmp_path / "torn.safetensors").write_bytes(content)
        words = r"torn.safetensors cannot be read: it is damaged, or no file of weights \(SafetensorError\)$"
        assert re.search(words, told("resnet18", str(tmp_path / "torn.safetensors")))
        for function in (distrib.load, shown_of_resnet18):
            with pytest.raises(UserError, match=words):
                function(str(tmp_path / "torn.safetensors"))
    torch.save({"a": print}, tmp_path / "hostile.pth")
    assert "hostile.pth has a dict with a, and no state_dict" in told("resnet18", str(tmp_path / "hostile.pth"))
    (tmp_path / "text.pth").write_text("hello\n")
    assert "cannot be read" in told("resnet18", str(tmp_path / "text.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    assert told("resnet18", str(tmp_path / "list.pth")).endswith(
        "list.pth has a list, and no state_dict: save network.state_dict()"
    )
    torch.save(models.resnet18().state_dict() | {"bn1.weight": "lost"}, tmp_path / "odd.pth")
    assert "odd.pth do not fit resnet18: 1 of 122 tensors, such as bn1.weight, which is not there" in told(
        "resnet18", str(tmp_path / "odd.pth")
    )
    torch.save(models.resnet34().state_dict(), tmp_path / "other.pth")
    assert "other.pth do not fit resnet50: " in told("resnet50", str(tmp_path / "other.pth"))
    assert "resnet18 has no weights 'IMAGENET1K_V9': use a file, or IMAGENET1K_V1" in told("resnet18", "IMAGENET1K_V9")
    assert "cannot be read" in told("cnn", "DEFAULT")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "model.weights=DEFAULT cannot be read" in told("resnet18", "DEFAULT")


def trained(run_dir: Path, *keys: str) -> tuple[ModelConfig, list[Path]]:
    """The model of a small run of two checkpoints, and these, of which the older one is the best."""
    config = load_config([*SMALL, f"run_dir={run_dir}", "threads=1", *keys])
    train(config)
    older, newer = sorted((run_dir / "checkpoints").iterdir())
    for folder, score in ((older, 99.0), (newer, 50.0)):
        assert json.loads((folder / "manifest.json").read_text())["score"] is not None
        signed_again(folder, score=score)
    return config.model, [older, newer]


def assert_loaded(config: ModelConfig, weights: Path, file: Path) -> None:
    """Every tensor is as in the file, but for the filters of a layer that is fitted to the data in each run."""
    torch.manual_seed(1)  # other initial weights than the run had
    got, expected = build_model(replace(config, weights=str(weights)), (1, 8, 8), classes=10).state_dict(), load_file(file)
    assert got.keys() == expected.keys()
    assert [name for name in got if not name.startswith("whitening.") and not torch.equal(got[name], expected[name])] == []
    assert [name for name in got if name.startswith("whitening.")] == ["whitening.convolution.weight"] * bool(config.whiten)


@pytest.mark.parametrize(
    "keys",
    [
        ["model.name=cnn"],
        ["model.name=airbench", "model.whiten=1"],
        ["model.name=airbench", "model.norm=group"],
        ["model.name=cnn", "model.whiten=1", "model.norm=group"],
    ],
)
def test_a_run_or_a_checkpoint_of_it_gives_its_weights_exactly(tmp_path: Path, keys: list[str]) -> None:
    config, (older, newer) = trained(tmp_path / "run", *keys, "optim.ema_decay=0.9")
    for folder in (older, newer):
        average, last = (load_file(folder / name) for name in ("ema.safetensors", "model.safetensors"))
        assert not all(torch.equal(average[name], last[name]) for name in last)
        assert_loaded(config, folder, folder / "ema.safetensors")
        assert_loaded(config, folder / "model.safetensors", folder / "model.safetensors")
    assert_loaded(config, tmp_path / "run", older / "ema.safetensors")
    for folder in (older, newer):
        (folder / "ema.safetensors").unlink()
        signed_again(folder)
        assert_loaded(config, folder, folder / "model.safetensors")
    assert_loaded(config, tmp_path / "run", older / "model.safetensors")


def test_a_run_whose_checkpoints_were_never_evaluated_gives_its_newest_weights(tmp_path: Path) -> None:
    config, (older, newer) = trained(tmp_path / "run")
    for folder in (older, newer):
        signed_again(folder, score=None)
    assert_loaded(config, tmp_path / "run", newer / "model.safetensors")


def test_the_weights_of_a_run_start_another_one_on_other_classes(tmp_path: Path) -> None:
    config, (older, _) = trained(tmp_path / "run", "model.whiten=1")
    expected = load_file(older / "model.safetensors")
    got = build_model(replace(config, weights=str(tmp_path / "run")), (1, 8, 8), classes=7).state_dict()
    ends = ("whitening.", "network.head.")
    assert [name for name in got if not name.startswith(ends) and not torch.equal(got[name], expected[name])] == []
    assert got["network.head.weight"].shape == (7, 32)


def test_a_folder_without_weights_or_with_those_of_another_network_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"^{tmp_path}/empty has no checkpoints: give a run folder or a checkpoint"):
        build_model(ModelConfig(weights=str(tmp_path / "empty")), (1, 8, 8), classes=10)
    config, (older, _) = trained(tmp_path / "run")
    with pytest.raises(UserError, match=rf"^model.weights={tmp_path}/run do not fit cnn: 34 of 44 tensors, such as stem"):
        build_model(replace(config, width=16, weights=str(tmp_path / "run")), (1, 8, 8), classes=10)
    (older / "model.safetensors").write_bytes(b"x")
    with pytest.raises(
        UserError, match=rf"^{older} is damaged \(model.safetensors has 1 bytes, not \d+\): give another checkpoint$"
    ):
        build_model(replace(config, weights=str(tmp_path / "run")), (1, 8, 8), classes=10)


def test_a_run_tells_what_was_loaded_and_when_it_resumes_it_needs_no_file_of_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [*SMALL, "optim.lr=0.01"]
    train(load_config([*keys, f"run_dir={tmp_path / 'first'}", "epochs=0.1"]))
    path = tmp_path / "weights.safetensors"
    path.write_bytes((tmp_path / "first" / "checkpoints" / "step_00000002" / "model.safetensors").read_bytes())
    config = load_config([*keys, f"run_dir={tmp_path / 'second'}", f"model.weights={path}", "epochs=0.1"])
    train(config)
    assert f"weights: 44 of 44 tensors from {path}\n" in capsys.readouterr().out
    path.unlink()
    assert train(replace(config, epochs=0.2), changes={"epochs"}).step == 5


def test_of_two_networks_in_a_file_the_average_is_loaded_or_none(tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(each) for name, each in FOUND.items()}
    lines, path = list[str](), tmp_path / "weights.pth"
    torch.save(prefixed("ema_model.") | {f"model.{name}": each for name, each in zeros.items()}, path)
    config = ModelConfig(name="resnet18", weights=str(path))
    model = build_model(config, (3, 224, 224), classes=5, tell=lines.append)
    assert torch.equal(model.conv1.weight, FOUND["conv1.weight"])
    assert "(without the prefix ema_model.); not used: model.conv1.weight, " in lines[0]
    assert lines[0].endswith(" and 118 more")
    torch.save(prefixed("teacher.") | {f"student.{name}": each for name, each in zeros.items()}, path)
    with pytest.raises(UserError, match=r"have several networks, 'student.' or 'teacher.': save the tensors of one of them"):
        build_model(config, (3, 224, 224), classes=5)


def test_the_last_layer_of_a_run_on_other_classes_starts_at_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels, ids = torch.randint(256, (20, 1, 8, 8)).byte(), torch.arange(20) % 2

    def run(name: str, classes: tuple[str, str], *keys: str) -> None:
        config = load_config(
            [f"run_dir={tmp_path / name}", "model.width=4", "batch_size=10", "epochs=1", "precision=no", *keys]
        )
        train(config, source=distrib.Source.from_arrays((pixels, ids), (pixels, ids), classes))

    run("first", ("cat", "dog"))
    for classes, told in ((("cat", "dog"), False), (("owl", "fox"), True)):
        capsys.readouterr()
        run(f"of {classes[0]}", classes, f"model.weights={tmp_path / 'first'}", "optim.lr=1e-30")
        said = "(trained on other classes); not loaded, so 0: head.weight, head.bias\n"
        assert (said in capsys.readouterr().out) == told
        tensors = load_file(next((tmp_path / f"of {classes[0]}").glob("checkpoints/*/model.safetensors")))
        assert (tensors["head.weight"].abs().max() < 1e-20) == told
    with pytest.raises(UserError, match=r"which is \[2\] there, \[4\] here: it was trained with model.width=4$"):
        run("wider", ("cat", "dog"), f"model.weights={tmp_path / 'first'}", "model.width=8")
