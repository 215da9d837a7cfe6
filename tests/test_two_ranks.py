"""Everything that a config can ask for, on two ranks: killed, resumed, and evaluated by one process."""

from pathlib import Path

import pytest
from conftest import SMALL, assert_same, launch, points

import distrib
from distrib.runtime.checkpoint import checkpoints

pytestmark = pytest.mark.slow

WAYS = {
    "adamw": ["optim.name=adamw", "optim.lr=0.003", "optim.clip_norm=1", "micro_batches=4", "model.dropout=0.3"],
    "muon": ["optim.name=muon", "optim.lr=0.05", "model.name=airbench", "model.whiten=1", "tta=6", "optim.ema_decay=0.9"],
    "bf16": ["precision=bf16", "tta=2", "data.flip=random", "data.cutout=2", "optim.momentum=0"],
    "rounded": ["comm_hook=bf16", "model.norm=group", "optim.schedule=linear", "nonfinite=skip"],
    "compiled": ["compile=default", "optim.ema_decay=0.5"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_resumes_bit_by_bit_and_one_process_evaluates_it_alike(tmp_path: Path, way: str) -> None:
    keys = [*SMALL, "threads=1", "save_every=10", "eval_every=23", *WAYS[way]]
    fault = ["tests/faulty.py", "SIGKILL", "1", "25", str(tmp_path / "mark")]
    killed = launch(2, *fault, *keys, f"run_dir={tmp_path / 'killed'}")
    assert killed.returncode != 0
    for name in ("killed", "whole"):
        done = launch(2, "train.py", *keys, f"run_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "killed", tmp_path / "whole")

    curves = points(tmp_path / "whole")
    group = "val_ema" if "val_ema/top1" in curves else "val"
    found = distrib.evaluate(checkpoints(tmp_path / "whole")[-1])
    assert found["top1"] == pytest.approx(dict(curves[f"{group}/top1"])[46])
    assert found["loss"] == pytest.approx(dict(curves[f"{group}/loss"])[46], rel=1e-2 if way == "bf16" else 1e-5)
