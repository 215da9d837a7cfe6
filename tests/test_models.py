"""Networks: their shapes, their norms, and where they compute in float32."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from distrib.config import ModelConfig
from distrib.errors import UserError
from distrib.models import torchvision_names
from distrib.models.build import build_model
from distrib.models.cnn import CNN
from distrib.models.layers import fit_whitening, with_fast_depthwise

SHAPE = (1, 28, 28)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)])
@pytest.mark.parametrize("name", ["cnn", "airbench", "resnet18"])
def test_small_images_become_logits(name: str, shape: tuple[int, int, int]) -> None:
    model = build_model(ModelConfig(name=name, width=8), shape, classes=7)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


def test_a_resnet_keeps_small_pictures_whole_and_has_its_own_stem_for_large_ones() -> None:
    small, large = (build_model(ModelConfig(name="resnet18"), (3, size, size), classes=10) for size in (32, 224))
    assert (small.conv1.stride, large.conv1.stride) == ((1, 1), (2, 2))
    assert isinstance(small.maxpool, nn.Identity)
    assert isinstance(large.maxpool, nn.MaxPool2d)


@pytest.mark.parametrize(
    "name",
    ["mobilenet_v3_small", "squeezenet1_1", "efficientnet_b0", "shufflenet_v2_x0_5", "googlenet", "convnext_tiny", "vit_b_32"],
)
def test_torchvisions_networks_take_the_channels_and_classes_of_the_data(name: str) -> None:
    model = build_model(ModelConfig(name=name), (1, 224, 224), classes=7)
    assert model(torch.zeros(2, 1, 224, 224)).shape == (2, 7)
    assert model.training


def test_every_classification_network_of_torchvision_is_offered() -> None:
    assert torchvision_names() == sorted(models.list_models(module=models))
    assert len(torchvision_names()) > 70
    with pytest.raises(
        UserError, match=r"no model 'resnet19': use cnn, airbench, timm:NAME, or one of torchvision: .*resnet18"
    ):
        build_model(ModelConfig(name="resnet19"), SHAPE, classes=10)


def test_images_that_are_too_small_are_told() -> None:
    with pytest.raises(UserError, match=r"model alexnet does not accept images of 1x28x28: "):
        build_model(ModelConfig(name="alexnet"), SHAPE, classes=10)


@pytest.mark.parametrize("name", ["cnn", "airbench", "resnet18"])
def test_with_group_norm_an_image_does_not_see_its_batch(name: str) -> None:
    images = torch.randn(6, *SHAPE)
    for norm in ("batch", "group"):
        model = build_model(ModelConfig(name=name, norm=norm, width=8), SHAPE, classes=10)
        together, alone = model(images)[:2], model(images[:2])
        assert torch.allclose(together, alone, atol=1e-5) == (norm == "group")
        assert any(True for _ in model.buffers()) == (norm == "batch")


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", ["cnn", "airbench"])
def test_every_weight_of_our_networks_learns(name: str, norm: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name, norm=norm, width=8), SHAPE, classes=10)
    images, labels = torch.randn(32, *SHAPE), torch.randint(10, (32,))
    learning = [each for each in model.parameters() if each.requires_grad]
    for _ in range(2):  # in the first step, what a block adds is nothing, and its convolution waits
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for each in learning:
                each -= 0.1 * each.grad
    assert all(each.grad.abs().max() > 0 for each in learning)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_a_whitening_layer_gives_uncorrelated_outputs_of_variance_1_over_patches(side: int) -> None:
    torch.manual_seed(0)
    smooth = 10 * nn.functional.avg_pool2d(torch.randn(200, 3, 18, 18), 3, 1)  # neighbouring pixels are alike
    model = build_model(ModelConfig(whiten=side, width=8), tuple(smooth.shape[1:]), classes=10)
    fit_whitening(model, lambda: smooth)
    half = 3 * side**2
    outputs = model.whitening.convolution(smooth).transpose(0, 1).flatten(1)
    assert torch.equal(outputs[:half], -outputs[half:])
    torch.testing.assert_close(outputs[:half] @ outputs[:half].T / outputs.shape[1], torch.eye(half), atol=0.02, rtol=0)
    assert not model.whitening.convolution.weight.requires_grad
    assert model(smooth).shape == (200, 10)


def test_any_network_can_have_a_whitening_layer() -> None:
    assert build_model(ModelConfig(name="resnet18", whiten=2), (1, 28, 28), classes=10)(torch.zeros(2, 1, 28, 28)).shape == (
        2,
        10,
    )


def test_dropout_is_of_the_cnns_features() -> None:
    model = CNN(1, 10, width=8, dropout=0.5)
    images = torch.randn(4, *SHAPE)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_a_network_that_is_handed_in_is_called_once_and_taken_as_it_is() -> None:
    calls = []

    def build() -> nn.Module:
        calls.append(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 7))

    assert build_model(ModelConfig(name="own:build"), SHAPE, classes=7, own=build)(torch.zeros(2, *SHAPE)).shape == (2, 7)
    assert len(calls) == 1
    network = build()
    assert build_model(ModelConfig(name="own:Sequential"), SHAPE, classes=7, own=network) is network
    assert network.training
    network.eval()
    assert not build_model(ModelConfig(name="own:Sequential"), SHAPE, classes=7, own=network).training


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(784, 9)),
            r"returns \[1, 9\] for one image, not the logits of 7 classes: \[1, 7\]",
        ),
        (nn.Conv2d(1, 7, 28), r"returns \[1, 7, 1, 1\] for one image, not the logits of 7 classes: \[1, 7\]"),
        (
            nn.Sequential(nn.Flatten(0), nn.Linear(784, 7)),
            r"returns \[7\] for one image, not the logits of 7 classes: \[1, 7\]",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(783, 7)), r"does not accept images of 1x28x28: [^\n]+"),
        (nn.Conv2d(3, 7, 28), r"does not accept images of 1x28x28: [^\n]+"),
    ],
)
def test_a_handed_network_that_gives_no_logits_is_refused_in_a_line(network: nn.Module, words: str) -> None:
    with pytest.raises(UserError, match=rf"^model own:mine {words}$"):
        build_model(ModelConfig(name="own:mine"), SHAPE, classes=7, own=network)


def test_a_handed_network_brings_its_own_first_layer() -> None:
    with pytest.raises(UserError, match=r"^model.whiten does not work with your own network: put such a layer into"):
        build_model(ModelConfig(name="own:mine", whiten=2), SHAPE, classes=7, own=nn.Flatten())


def test_depthwise_convolutions_have_the_gradients_of_float32_where_those_of_bf16_are_slow() -> None:
    network = with_fast_depthwise(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, stride=2, groups=8)))
    first, second = network
    assert type(first) is nn.Conv2d
    images = torch.randn(2, 8, 9, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = second(images)
        out.sum().backward()
        with torch.no_grad():
            assert torch.equal(second(images), F.conv2d(images, second.weight, second.bias, 2, groups=8))
    exact = F.conv2d(images.float(), second.weight, second.bias, 2, groups=8)
    assert torch.equal(out, exact.bfloat16())
    [gradient] = torch.autograd.grad(exact.bfloat16().sum(), second.weight)
    assert torch.equal(second.weight.grad, gradient)
    assert torch.equal(deepcopy(second)(images.float()), second(images.float()))


def test_each_network_of_a_package_has_fast_depthwise_convolutions() -> None:
    for name in ("mobilenet_v2", "timm:tf_efficientnet_lite0"):
        network = build_model(ModelConfig(name=name), (3, 64, 64), 3)
        strided = [each for each in network.modules() if isinstance(each, nn.Conv2d) and each.groups > 1 and each.stride[0] > 1]
        assert len(strided) == 4, name
        assert {type(each).__name__ for each in strided} == {"TrainedInFloat32"}
