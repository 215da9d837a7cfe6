"""Pretrained weights: from files, and as torchvision publishes them."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models
from torchvision.models import WeightsEnum

from distrib.config import ModelConfig, UserError
from distrib.models import build_model


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_weights_is_loaded_but_for_what_the_data_change(tmp_path: Path, suffix: str) -> None:
    trained = models.resnet18(num_classes=5)
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(trained.state_dict(), path)
    model = build_model(ModelConfig(name="resnet18", weights=str(path)), (3, 224, 224), classes=7)
    assert torch.equal(model.conv1.weight, trained.conv1.weight)
    assert torch.equal(model.layer4[1].conv2.weight, trained.layer4[1].conv2.weight)
    assert model.fc.out_features == 7
    same = build_model(ModelConfig(name="resnet18", weights=str(path)), (3, 224, 224), classes=5)
    assert torch.equal(same.fc.weight, trained.fc.weight)
    grey = build_model(ModelConfig(name="resnet18", weights=str(path)), (1, 224, 224), classes=7)
    assert torch.equal(grey.layer1[0].conv1.weight, trained.layer1[0].conv1.weight)


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
        trained.transform_input = True
    assert getattr(model, "transform_input", False) == (name == "googlenet")
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(model(images), trained(images), rtol=1e-4, atol=1e-5)


def test_weights_that_cannot_be_had_or_do_not_fit_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(name: str, weights: str) -> str:
        with pytest.raises(UserError) as error:
            build_model(ModelConfig(name=name, weights=weights), (3, 64, 64), classes=10)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert told("resnet18", str(tmp_path / "gone.pth")).startswith(f"model.weights {tmp_path}/gone.pth cannot be read: ")
    (tmp_path / "torn.safetensors").write_bytes(b"x")
    assert "cannot be read" in told("resnet18", str(tmp_path / "torn.safetensors"))
    torch.save({"a": print}, tmp_path / "hostile.pth")
    assert "cannot be read" in told("resnet18", str(tmp_path / "hostile.pth"))
    (tmp_path / "text.pth").write_text("hello\n")
    assert "cannot be read" in told("resnet18", str(tmp_path / "text.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    assert told("resnet18", str(tmp_path / "list.pth")).endswith("list.pth has a list, and not a network's state_dict()")
    torch.save(models.resnet18().state_dict() | {"bn1.weight": "lost"}, tmp_path / "odd.pth")
    assert "odd.pth do not fit resnet18: 1 tensors, such as bn1.weight" in told("resnet18", str(tmp_path / "odd.pth"))
    torch.save(models.resnet34().state_dict(), tmp_path / "other.pth")
    assert "other.pth do not fit resnet50: " in told("resnet50", str(tmp_path / "other.pth"))
    assert "resnet18 has no weights 'IMAGENET1K_V9': use a file, or IMAGENET1K_V1" in told("resnet18", "IMAGENET1K_V9")
    assert "cannot be read" in told("cnn", "DEFAULT")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "model.weights DEFAULT cannot be read" in told("resnet18", "DEFAULT")
