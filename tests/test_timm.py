"""timm's networks by name, and images shown as those were that weights were trained on."""

import json
from argparse import Namespace
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.utils import CheckpointSaver, ModelEmaV3
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.models.vision_transformer import interpolate_embeddings

from distrib import train
from distrib.command_line import load_config
from distrib.config import Config, ModelConfig
from distrib.data.pixels import ImageSpec
from distrib.errors import UserError
from distrib.inference.evaluate import evaluate
from distrib.models.build import build_model
from distrib.models.weights import SHOWN_WITH
from distrib.training.identity import with_pixels_of_weights


def test_group_norm_keeps_the_activations_of_timms_norms() -> None:
    batch, group = (
        build_model(ModelConfig(name="timm:test_efficientnet", norm=norm), (3, 32, 32), 5) for norm in ("batch", "group")
    )
    assert not any(isinstance(each, torch.nn.BatchNorm2d) for each in group.modules())
    found: dict[str, float] = {}
    for name, each in group.named_modules():
        if isinstance(each, torch.nn.GroupNorm):
            each.register_forward_hook(lambda _, __, out, name=name: found.update({name: out.min().item()}))
    group(torch.randn(2, 3, 32, 32))
    silent = {name for name, each in batch.named_modules() if isinstance(getattr(each, "act", None), torch.nn.Identity)}
    assert len(found) > len(silent) > 1
    assert {name for name, least in found.items() if least < -0.3} == silent  # SiLU is never below -0.28


@pytest.mark.parametrize(
    ("name", "words"),
    [("test_vit", "no norm of this kind"), ("levit_128s", "BatchNorm1d")],
)
def test_group_norm_is_refused_where_it_replaces_nothing_or_not_all(name: str, words: str) -> None:
    with pytest.raises(UserError, match=f"^model.norm=group replaces BatchNorm2d, but this network has {words}: omit it$"):
        build_model(ModelConfig(name=f"timm:{name}", norm="group"), (3, 224, 224), 5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("timm:test_resnet", (3, 64, 64)),
        ("timm:test_efficientnet.r160_in1k", (1, 48, 32)),
        ("timm:test_vit", (3, 64, 96)),
        ("timm:test_vit", (1, 160, 160)),
    ],
)
def test_a_network_of_timm_takes_the_size_channels_and_classes_of_the_data(name: str, shape: tuple[int, int, int]) -> None:
    model = build_model(ModelConfig(name=name), shape, classes=7)
    assert model(torch.rand(2, *shape)).shape == (2, 7)
    assert model.training


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("timm:resnet19", "", r"timm has no network 'resnet19': did you mean .*resnet18.*\?"),
        ("timm:zzz", "", r"timm has no network 'zzz': timm.list_models\(\) lists them"),
        (
            "timm:resnet50.nobody",
            "",
            r"model.name=timm:resnet50.nobody: Invalid pretrained tag ",
        ),
        ("timm:test_vit", "IMAGENET1K_V1", "timm:test_vit has no weights 'IMAGENET1K_V1': use a file, or DEFAULT; the tag of"),
        ("timm:test_vit", "DEFAULT", "model.weights=DEFAULT cannot be read: "),  # there is no network here
        ("vit_b_16", "", "model vit_b_16 does not accept images of 3x40x40: "),
    ],
)
def test_what_timm_and_torchvision_do_not_have_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, weights: str, words: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"^{words}") as error:
        build_model(ModelConfig(name=name, weights=weights), (3, 40, 40), classes=10)
    assert "\n" not in str(error.value)


def test_without_timm_its_networks_are_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrib.models.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^model.name=timm:resnet18 needs timm: pip install timm$"):
        build_model(ModelConfig(name="timm:resnet18"), (3, 40, 40), classes=10)


def test_weights_that_timm_downloaded_before_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache of the Hugging Face hub, as a download leaves it."""
    trained = timm.create_model("test_resnet")
    cache = tmp_path / "models--timm--test_resnet.r160_in1k"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    save_file(trained.state_dict(), cache / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    lines: list[str] = []
    config = ModelConfig(name="timm:test_resnet", weights="DEFAULT")
    model = build_model(config, (3, 64, 64), classes=7, tell=lines.append)
    own, there = model.state_dict(), trained.state_dict()
    assert [name for name in own if not torch.equal(own[name], there[name])] == ["fc.weight", "fc.bias"]
    assert lines == [f"weights: {len(own) - 2} of {len(own)} tensors from DEFAULT; not loaded, so 0: fc.weight, fc.bias"]


def test_position_embeddings_of_another_size_are_interpolated(tmp_path: Path) -> None:
    trained, path = timm.create_model("test_vit", img_size=160), tmp_path / "vit.safetensors"
    save_file(trained.state_dict(), path)
    lines: list[str] = []
    config = ModelConfig(name="timm:test_vit", weights=str(path))
    model = build_model(config, (3, 96, 128), classes=7, tell=lines.append)
    expected = resample_abs_pos_embed(trained.pos_embed, [6, 8], num_prefix_tokens=1)
    torch.testing.assert_close(model.pos_embed, expected)
    assert lines[0].endswith("; not loaded, so 0: head.weight, head.bias; interpolated: pos_embed")

    torchvisions = models.VisionTransformer(64, 16, 1, 2, 32, 64, num_classes=5)
    torch.save(torchvisions.state_dict(), tmp_path / "tv.pth")
    own = models.VisionTransformer(96, 16, 1, 2, 32, 64, num_classes=5)
    build_model(ModelConfig(name="own:vit", weights=str(tmp_path / "tv.pth")), (3, 96, 96), classes=5, own=own)
    known = interpolate_embeddings(96, 16, torchvisions.state_dict())["encoder.pos_embedding"]
    got = own.encoder.pos_embedding.detach()
    assert torch.equal(got[:, :1], known[:, :1])
    assert torch.nn.functional.cosine_similarity(got.flatten(), known.flatten(), 0) > 0.9  # it aligns the corners


def test_tensors_of_a_file_that_the_network_lacks_are_named(tmp_path: Path) -> None:
    torch.save(models.resnet34().state_dict(), tmp_path / "larger.pth")
    lines: list[str] = []
    config = ModelConfig(name="resnet18", weights=str(tmp_path / "larger.pth"))
    build_model(config, (3, 224, 224), classes=1000, tell=lines.append)
    assert "; not used: layer1.2.conv1.weight, layer1.2.bn1.weight, " in lines[0]
    assert lines[0].endswith(" and 92 more")


def config_of(tmp_path: Path, *keys: str) -> Config:
    for i, (split, name) in enumerate(product(["train"] * 9 + ["val"] * 2, "ab")):
        folder = tmp_path / "photos" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((80, 60), 10 * i).convert("RGB").save(folder / f"{i}.png")
    run = ["data.name=folder", f"data.root={tmp_path / 'photos'}", f"run_dir={tmp_path / 'run'}", "data.workers=0"]
    return load_config([*run, "batch_size=6", "epochs=1", "precision=no", "threads=1", *keys])


def chosen(tmp_path: Path) -> tuple[dict[str, str], dict[str, list[float]]]:
    manifest = json.loads(max((tmp_path / "run").glob("checkpoints/step_*/manifest.json")).read_text())
    return {key: manifest["config"]["data"][key] for key in SHOWN_WITH}, manifest["image"]


def test_images_are_shown_as_to_the_weights_and_a_run_that_resumes_needs_no_weights_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    config = config_of(tmp_path, "model.name=timm:test_vit", f"model.weights={path}", "data.size=64")
    values = train(config).values
    shown = "data.fit=crop data.center_crop=0.95 data.filter=bicubic data.mean=0.5,0.5,0.5 data.std=0.5,0.5,0.5"
    assert f"images as the weights were trained on: {shown}\n" in capsys.readouterr().out
    keys, image = chosen(tmp_path)
    assert keys == {"size": 64, "fit": "crop", "center_crop": 0.95, "filter": "bicubic"}
    assert (image["mean"], image["std"], image["shape"]) == ([0.5] * 3, [0.5] * 3, [3, 64, 64])
    assert evaluate(tmp_path / "run") == values

    path.unlink()
    more = load_config([f"{tmp_path}/run/config.yaml", f"run_dir={tmp_path / 'run'}", "epochs=2"])
    assert train(more, changes={"epochs"}).step == 6
    assert "as the weights" not in capsys.readouterr().out
    assert chosen(tmp_path) == (keys, image)


def test_typed_keys_win_over_those_of_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    keys = ["data.size=64", "data.center_crop=1", "data.filter=bilinear", "data.mean=0.25", "data.std=0.5,0.25,0.5"]
    train(config_of(tmp_path, "model.name=timm:test_vit", f"model.weights={path}", *keys))
    got, image = chosen(tmp_path)
    assert got == {"size": 64, "fit": "crop", "center_crop": 1.0, "filter": "bilinear"}
    assert (image["mean"], image["std"]) == ([0.25] * 3, [0.5, 0.25, 0.5])


def test_images_are_stretched_for_weights_that_know_them_so_and_a_center_crop_of_them_is_refused(
    tmp_path: Path,
) -> None:
    squashed = [
        f"run_dir={tmp_path}",
        "data.name=folder",
        "model.name=timm:convnext_tiny.in12k_ft_in1k_384",
        "model.weights=DEFAULT",
    ]
    config, lines = with_pixels_of_weights(load_config(squashed), own=False)
    assert (config.data.size, config.data.fit, config.data.center_crop) == (384, "stretch", "auto")
    assert "data.size=384 data.fit=stretch data.filter=bicubic data.mean=" in lines[0]
    with pytest.raises(UserError, match=r"data.center_crop would be ignored: .* and data.fit is stretch"):
        with_pixels_of_weights(load_config([*squashed, "data.center_crop=0.9"]), own=False)
    config, _ = with_pixels_of_weights(load_config([*squashed, "data.center_crop=0.9", "data.fit=crop"]), own=False)
    assert ImageSpec.of(config.data).center_crop == 0.9


def test_images_are_shown_as_torchvision_and_an_earlier_run_showed_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **options: models.mobilenet_v2().state_dict())
    config = config_of(tmp_path, "model.name=mobilenet_v2", "model.weights=IMAGENET1K_V2", "data.size=32", "data.mean=0.4")
    train(config)
    keys, image = chosen(tmp_path)
    assert keys == {"size": 32, "fit": "crop", "center_crop": 224 / 232, "filter": "bilinear"}
    assert image["mean"] == [0.4] * 3
    (tmp_path / "run").rename(tmp_path / "first")
    train(config_of(tmp_path, "model.name=mobilenet_v2", f"model.weights={tmp_path / 'first'}"))
    assert chosen(tmp_path) == (keys, image)


def test_the_mean_of_colors_becomes_that_of_grey(tmp_path: Path) -> None:
    keys = ["model.width=4", "batch_size=256", "epochs=1", "data.mean=0.1,0.2,0.6", "data.std=0.5", "precision=no"]
    train(load_config([*keys, f"run_dir={tmp_path / 'run'}"]))
    manifest = json.loads(max((tmp_path / "run").glob("checkpoints/step_*/manifest.json")).read_text())
    assert manifest["image"]["mean"] == [pytest.approx(0.3)]
    config = config_of(tmp_path, "data.mean=0.1,0.2", f"run_dir={tmp_path / 'two'}")
    with pytest.raises(UserError, match=r"^data.mean has 2 numbers, but images have 3 channels: give 1 or 3$"):
        train(config)


def test_a_checkpoint_that_timms_script_saves_is_loaded_with_its_moving_average(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=7)
    average = ModelEmaV3(network)
    with torch.no_grad():
        for weight in average.module.parameters():
            weight.add_(1)
    arguments, optimizer = Namespace(model="test_resnet", lr=0.1), torch.optim.SGD(network.parameters(), 0.1)
    saver = CheckpointSaver(network, optimizer, arguments, average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=50.0)
    [path] = tmp_path.glob("checkpoint-*.pth.tar")
    lines: list[str] = []
    config = ModelConfig(name="timm:test_resnet", weights=str(path))
    loaded = build_model(config, (3, 64, 64), classes=7, tell=lines.append).state_dict()
    assert [name for name, each in average.module.state_dict().items() if not torch.equal(each, loaded[name])] == []
    assert lines == [f"weights: {len(loaded)} of {len(loaded)} tensors from {path} (its key state_dict_ema)"]
