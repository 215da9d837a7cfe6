"""A run that an earlier version began goes on, bit by bit."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_same
from safetensors.torch import load_file, save_file
from test_loop import ALL, run

from distrib.config import RENAMED
from distrib.errors import UserError
from distrib.runtime.checkpoint import checkpoints, own_sha256, sha256

KEYS = [*ALL, "optim.name=adamw", "optim.lr=0.01"]


def as_format1(folder: Path, order: list[str]) -> None:
    """Make a checkpoint what the first version would have written: `order` has the weights as its optimizer counted them."""
    files = {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema", "training")}
    tensors = {f"model.{name}": each for name, each in files["model"].items()}
    tensors |= {f"average.{name}": each for name, each in files["ema"].items()}
    for name, each in files["training"].items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            weight, _, key = rest.rpartition(".")
            tensors[f"optimizer.{order.index(weight)}.{key}"] = each
    sums = [files["training"].get(f"sums.{name}", torch.zeros((), dtype=torch.float64)) for name in ("loss", "top1")]
    tensors["sums"] = torch.stack([*sums, sums[0] * 0, files["training"]["images"]])
    numbers = json.loads((folder / "state.json").read_text())
    numbers |= {"top1": numbers.pop("values").get("top1", 0.0), "best_top1": numbers.pop("best_values").get("top1", 0.0)}
    step = json.loads((folder / "manifest.json").read_text())["step"]
    for each in folder.iterdir():
        each.unlink()
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(numbers))
    described = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in ("state.safetensors", "state.json")
    }
    manifest = {"format": 1, "step": step, "config": "a digest", "world": 1, "versions": {}, "files": described}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": own_sha256(manifest)}))


def config_of_format1(path: Path) -> None:
    """The keys as they were called then, under their sections."""
    lines, smoothing = path.read_text().splitlines(), "0.1"
    for i, line in enumerate(lines):
        if "label_smoothing" in line:
            smoothing = line.partition(": ")[2]
        for old, new in RENAMED.items():
            if line.strip().startswith(f"{new.rpartition('.')[2]}:"):
                lines[i] = line.replace(new.rpartition(".")[2], old.rpartition(".")[2])
    text = "\n".join(line for line in lines if "label_smoothing" not in line and not line.startswith("objective"))
    text = text.replace("  name: cross_entropy\n", "").replace("compile: auto", "compile: 'no'")
    path.write_text(text.replace("optim:\n", f"optim:\n  label_smoothing: {smoothing}\n") + "\n")


@pytest.fixture(scope="module")
def of_format1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `begun`, which the first version left after an epoch, and `whole`, which went on undisturbed."""
    root = tmp_path_factory.mktemp("format1")
    state = run(root / "begun", *KEYS, "epochs=1")
    shutil.copytree(root / "begun", root / "whole")
    run(root / "whole", *KEYS, "epochs=2")
    learning = [(name, each) for name, each in state.network.named_parameters() if each.requires_grad]
    order = [name for name, each in learning if each.dim() > 1] + [name for name, each in learning if each.dim() < 2]
    for folder in checkpoints(root / "begun"):
        as_format1(folder, order)
    config_of_format1(root / "begun" / "config.yaml")
    return root


@pytest.fixture
def begun(tmp_path: Path, of_format1: Path) -> Path:
    """The run folder that the first version left, beside `whole`."""
    shutil.copytree(of_format1, tmp_path, dirs_exist_ok=True)
    return tmp_path / "begun"


def test_a_run_that_an_earlier_version_began_goes_on_bit_by_bit(
    begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [folder.name for folder in checkpoints(begun)]
    run(begun, *KEYS, "epochs=2")
    said = capsys.readouterr().out
    for name in found:
        assert f"warning: {name} was of an earlier version and was converted; the original is {name}.format1" in said
        assert (begun / "checkpoints" / f"{name}.format1" / "state.safetensors").exists()
    assert "resumes after step 23" in said
    assert_same(begun, tmp_path / "whole")
    assert not (begun / "upgrade").exists()


def test_an_earlier_versions_run_of_another_config_is_refused_and_left_alone(begun: Path) -> None:
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"was started with another seed \(0 there, 1 now\)"):
        run(begun, *KEYS, "seed=1", "epochs=2")
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_a_damaged_checkpoint_of_an_earlier_version_is_set_aside(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = checkpoints(begun)[-1]
    os.truncate(newest / "state.safetensors", 1000)
    state = run(begun, *KEYS, "epochs=2")
    assert state.step == 46
    said = capsys.readouterr().out
    assert f"{newest.name} is damaged (a file differs from what was written): renamed to {newest.name}.damaged\n" in said
    assert "resumes after step 16" in said


def test_a_kill_while_a_checkpoint_is_written_anew_loses_nothing(begun: Path, tmp_path: Path) -> None:
    newest = checkpoints(begun)[-1]
    os.rename(newest, newest.with_suffix(".format1"))  # and the new one is not in its place yet
    (begun / "upgrade" / "checkpoints").mkdir(parents=True)
    run(begun, *KEYS, "epochs=2")
    assert_same(begun, tmp_path / "whole")
