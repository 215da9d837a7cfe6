"""distrib as a library: one's own images, network and loss, on 1 and 2 ranks; and evaluate()."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Ranks, assert_same, launch, points, signed_again, weights
from sklearn.metrics import balanced_accuracy_score
from torch import nn

import distrib
from distrib.runtime.checkpoint import checkpoints

sys.path.insert(0, str(ROOT / "examples"))
from own import Focal, network, stripes

EXAMPLE = ROOT / "examples" / "own.py"
CLASSES = ["top", "upper", "lower", "bottom"]


def own_source(train: int = 120, val: int = 40, classes: list[str] = CLASSES) -> distrib.Source:
    return distrib.Source.from_arrays(stripes(train, 0), stripes(val, 1), classes, name="stripes")


def config(run_dir: Path, **keys: Any) -> distrib.Config:
    return distrib.Config(run_dir=str(run_dir), **{"epochs": 1, "batch_size": 30, "precision": "no"} | keys)


@pytest.fixture(scope="module", params=[1, 2])
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """The example's run on so many ranks, which nobody disturbed."""
    run_dir = tmp_path_factory.mktemp(f"ranks{request.param}") / "whole"
    done = launch(request.param, EXAMPLE, run_dir)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return request.param, run_dir


@pytest.mark.slow
def test_the_example_is_thirty_lines_and_learns(example: tuple[int, Path]) -> None:
    code = [line for line in EXAMPLE.read_text().splitlines()[1:] if line.strip()]
    assert len(code) <= 30
    _, run_dir = example
    found = points(run_dir)
    assert found["val/top1"][-1][1] > 95
    assert "val/top5" not in found  # of four classes
    assert {"own:source", "own:network", "own:Focal"} <= set((run_dir / "config.yaml").read_text().split())


@pytest.mark.slow
def test_the_example_goes_on_after_a_kill_bit_by_bit(example: tuple[int, Path], tmp_path: Path) -> None:
    ranks, whole = example
    run = Ranks(ranks, EXAMPLE, tmp_path / "killed")
    while not any("step_000" in path.name and not path.suffix for path in (tmp_path / "killed" / "checkpoints").glob("*")):
        assert run.run()
        time.sleep(0.01)
    run.kill()
    run.wait()
    done = launch(ranks, EXAMPLE, tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    assert "resumes after step " in done.stdout
    assert json.loads((tmp_path / "killed" / "status.json").read_text())["attempts"] == 2
    assert_same(tmp_path / "killed", whole)


@pytest.mark.slow
def test_an_evaluation_of_a_run_is_what_the_run_reported(tmp_path: Path, example: tuple[int, Path]) -> None:
    _, run_dir = example
    source = distrib.Source.from_arrays(stripes(3000, seed=0), stripes(600, seed=1), CLASSES)
    last = checkpoints(run_dir)[-1]
    found = distrib.evaluate(last, source=source, network=network, objective=Focal())
    status = json.loads((run_dir / "status.json").read_text())
    assert {"loss", "top1"} <= found.keys()
    assert found == pytest.approx({name: status[name] for name in found}, rel=1e-6)
    other = distrib.Source.from_arrays(stripes(3000, seed=0), stripes(7, seed=2), CLASSES)
    assert distrib.evaluate(run_dir, source=other, network=network, objective=Focal())["top1"] > 80


def test_an_evaluation_takes_the_best_checkpoint_and_its_moving_average(tmp_path: Path) -> None:
    keys = [
        f"run_dir={tmp_path}",
        "model.width=8",
        "precision=no",
        "batch_size=60",
        "epochs=3",
        "optim.ema_decay=0.9",
        "keep=9",
    ]
    from distrib.command_line import load_config

    distrib.train(load_config(keys))
    curve = dict(points(tmp_path)["val_ema/top1"])
    best = max(curve, key=lambda step: curve[step])
    assert distrib.evaluate(tmp_path)["top1"] == pytest.approx(curve[best])
    for folder in checkpoints(tmp_path):
        assert distrib.evaluate(folder)["top1"] == pytest.approx(curve[int(folder.name[5:])])


def test_what_evaluate_cannot_use_is_refused(tmp_path: Path) -> None:
    distrib.train(config(tmp_path / "run"), source=own_source(), network=network, objective=Focal())
    run, objects = tmp_path / "run", {"source": own_source(), "network": network, "objective": Focal()}
    for missing in objects:
        with pytest.raises(
            distrib.UserError, match=r"was trained with .*=own:.*, an object: pass it in Python, distrib.evaluate"
        ):
            distrib.evaluate(run, **{name: each for name, each in objects.items() if name != missing})
    with pytest.raises(distrib.UserError, match=r"was saved with another network: 2.weight is .* and 7 more"):
        distrib.evaluate(
            run, **objects | {"network": lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(1568, 4))}
        )
    with pytest.raises(distrib.UserError, match=r"has another set of classes \(4 there, 4 now: top only there, a only now\)"):
        distrib.evaluate(run, **objects | {"source": own_source(classes=["a", *CLASSES[1:]])})
    with pytest.raises(distrib.UserError, match="has no checkpoints: give a run folder"):
        distrib.evaluate(tmp_path)
    (checkpoints(run)[-1] / "state.json").write_text("")
    with pytest.raises(distrib.UserError, match=r"is damaged .*: give another checkpoint"):
        distrib.evaluate(run, **objects)
    assert len(checkpoints(run)) == 1  # nothing was set aside


class Wide(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(256, 4))


def deeper() -> nn.Module:
    return nn.Sequential(*Wide(), nn.Linear(4, 4))


deeper.__name__ = "Wide"  # as if the class had been edited


class Plain(distrib.CrossEntropy):
    """Another objective."""


CHANGES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a layer more": (lambda: {"network": deeper}, r"saved with another network: 2.weight is only now, 2.bias is only now"),
    "another objective": (lambda: {"objective": Plain()}, r"another objective.name \(own:CrossEntropy there, own:Plain now\)"),
    "an image less": (lambda: {"source": own_source(train=119)}, r"another number of train images \(120 there, 119 now\)"),
    "an image more to validate": (lambda: {"source": own_source(val=41)}, r"number of val images \(40 there, 41 now\)"),
    "a class renamed": (
        lambda: {"source": own_source(classes=["a", *CLASSES[1:]])},
        r"another set of classes \(4 there, 4 now: top only there, a only now\)",
    ),
    "classes in another order": (
        lambda: {"source": own_source(classes=CLASSES[::-1])},
        r"another set of classes \(4 there, 4 now: in another order\)",
    ),
    "other pixels": (
        lambda: {"source": distrib.Source.from_arrays(stripes(120, 5), stripes(40, 1), CLASSES, name="stripes")},
        r"another content of the data \(as many images of the same classes, but other names, sizes or pixels\)",
    ),
    "another key": (lambda: {"seed": 1}, r"another seed \(0 there, 1 now\)"),
    "another precision": (lambda: {"precision": "bf16"}, r"another precision \(no there, bf16 now\)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_was_changed_is_refused_by_name_and_nothing_is_touched(tmp_path: Path, change: str) -> None:
    def train(source: Any = None, network: Any = Wide, objective: Any = None, **keys: Any) -> None:
        objects = {"source": source or own_source(), "network": network, "objective": objective or distrib.CrossEntropy()}
        distrib.train(config(tmp_path, **keys), **objects)

    train()
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("status.json", "lock")]
    before = {path: path.read_bytes() for path in kept}
    changed, words = CHANGES[change]
    with pytest.raises(distrib.UserError, match=words) as told:
        train(**changed())
    assert "\n" not in str(told.value)
    assert "give another run_dir" in str(told.value)
    assert {path: path.read_bytes() for path in kept} == before
    train()  # and the run itself is still there
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "completed"


def test_a_run_goes_on_when_a_later_version_has_one_key_more(tmp_path: Path) -> None:
    """The manifest and config.yaml of a version without the key: it has its default."""
    distrib.train(config(tmp_path, epochs=1), source=own_source(), network=Wide)
    for folder in checkpoints(tmp_path):
        earlier = json.loads((folder / "manifest.json").read_text())["config"]
        del earlier["optim"]["clip_norm"], earlier["nonfinite"]
        signed_again(folder, config=earlier)
    first = weights(tmp_path)
    state = distrib.train(config(tmp_path, epochs=2), source=own_source(), network=Wide, changes={"epochs"})
    assert state.step == 8
    assert first.keys() == weights(tmp_path).keys()
    with pytest.raises(distrib.UserError, match=r"optim.clip_norm \(0.0 there, 1 now\)"):
        distrib.train(
            config(tmp_path, epochs=2, optim=distrib.config.OptimConfig(clip_norm=1)), source=own_source(), network=Wide
        )


@pytest.mark.parametrize(("begun", "later"), [("no", True), ("bf16", False)])
def test_a_run_keeps_the_precision_that_auto_chose_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], begun: str, later: bool
) -> None:
    from distrib.training import precision

    def machine(fast: bool) -> None:
        monkeypatch.setattr(precision, "is_fast_at_bf16", lambda device: (fast, "as this machine is"))

    machine(not later)
    distrib.train(config(tmp_path, precision="auto"), source=own_source(), network=Wide)
    assert f"precision {begun} (as this machine is)" in capsys.readouterr().out
    machine(later)
    distrib.train(config(tmp_path, precision="auto", epochs=2), source=own_source(), network=Wide, changes={"epochs"})
    assert f"precision {begun} (as the run was started)" in capsys.readouterr().out
    manifest = json.loads((checkpoints(tmp_path)[-1] / "manifest.json").read_text())
    assert manifest["chosen"] == {"precision": begun, "compile": "no", "virtual_ranks": 1}


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "as accelerate's settings say: precision=bf16\n"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3", "as accelerate's settings say: micro_batches=3\n"),
        ("ACCELERATE_USE_FSDP", "true", ""),
        ("ACCELERATE_USE_DEEPSPEED", "true", ""),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER", ""),
    ],
)
def test_settings_of_accelerate_are_honoured_and_said_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    if not said:
        with pytest.raises(distrib.UserError, match=r"^accelerate's settings ask for "):
            distrib.train(config(tmp_path), source=own_source(), network=Wide)
        assert list(tmp_path.iterdir()) == []
        return
    distrib.train(config(tmp_path, precision="auto"), source=own_source(), network=Wide)
    assert said in capsys.readouterr().out
    assert os.environ[variable] == value


def test_a_compiler_that_accelerates_settings_ask_for_is_the_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(Wide, "compile", lambda self, mode: compiled.append(mode))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    distrib.train(config(tmp_path), source=own_source(), network=Wide)
    assert "as accelerate's settings say: compile=default\n" in capsys.readouterr().out
    assert compiled == ["default"]
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    distrib.train(config(tmp_path, epochs=2), source=own_source(), network=Wide, changes={"epochs"})
    assert compiled == ["default", "default"]  # as the run was started
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(distrib.UserError, match=r"^compile=no, but accelerate's settings ask for default"):
        distrib.train(config(tmp_path / "no", compile="no"), source=own_source(), network=Wide)


def test_a_manifest_explains_the_run(tmp_path: Path) -> None:
    source = own_source()
    distrib.train(config(tmp_path), source=source, network=Wide)
    manifest = json.loads((checkpoints(tmp_path)[-1] / "manifest.json").read_text())
    assert manifest["config"]["batch_size"] == 30
    assert manifest["data"] == source.fingerprint()
    assert manifest["image"] == {"shape": [1, 16, 16], "mean": list(source.mean), "std": list(source.std)}
    assert {"torch", "torchvision", "accelerate"} <= manifest["versions"].keys()
    assert manifest["ranks"] == 1
    plain = Wide()
    from safetensors.torch import load_file

    plain.load_state_dict(load_file(checkpoints(tmp_path)[-1] / "model.safetensors"))  # by one call, without distrib


def test_soft_targets_train_like_the_class_ids_that_they_stand_for(tmp_path: Path) -> None:
    (images, labels), (val_images, val_labels) = stripes(120, 0), stripes(40, 1)
    soft = [nn.functional.one_hot(each, 4).float() for each in (labels, val_labels)]
    softly = distrib.Source.from_arrays((images, soft[0]), (val_images, soft[1]), CLASSES, name="soft")
    for name, source in (("hard", own_source()), ("soft", softly)):
        distrib.train(
            config(tmp_path / name, micro_batches=2), source=source, network=Wide, objective=distrib.CrossEntropy(smoothing=0.1)
        )
    expected, got = points(tmp_path / "hard"), points(tmp_path / "soft")
    for tag in expected.keys() - {"train/images_per_second"}:
        assert got[tag] == [(step, pytest.approx(value, rel=1e-4)) for step, value in expected[tag]], tag


def test_the_meter_in_the_documents_is_exact_and_decides_what_is_best(tmp_path: Path) -> None:
    blocks = (ROOT / "docs" / "library.md").read_text().split("```")
    code = next(block.removeprefix("python") for block in blocks if "class Balanced" in block)
    names: dict[str, Any] = {"torch": torch, "distrib": distrib, "cached_property": cached_property}
    exec(code, names)
    images, labels = stripes(200, 1)
    rare = labels < 3
    rare[:20] = True
    source = distrib.Source.from_arrays(stripes(120, 0), (images[rare], labels[rare]), CLASSES)
    state = distrib.train(config(tmp_path, epochs=2), source=source, network=Wide, objective=names["Balanced"](smoothing=0.1))
    pixels = (images[rare] / 255 - torch.tensor(source.mean).view(-1, 1, 1)) / torch.tensor(source.std).view(-1, 1, 1)
    answers = state.network(pixels).argmax(1)
    expected = balanced_accuracy_score(labels[rare].numpy(), answers.numpy())
    assert state.values["balanced"] == pytest.approx(100 * expected)
    assert state.best_values["balanced"] == pytest.approx(max(value for _, value in points(tmp_path)["val/balanced"]))


def test_keys_that_do_not_go_with_what_was_handed_in_are_refused(tmp_path: Path) -> None:
    from distrib.config import DataConfig, ModelConfig, ObjectiveConfig

    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": DataConfig(name="cifar10")}, r"data.name=cifar10 was given together with an object"),
        ({"data": DataConfig(size=9)}, r"data.size would be ignored"),
        ({"data": DataConfig(workers=9)}, r"data.workers would be ignored: it applies to image files only"),
        ({"model": ModelConfig(width=9)}, r"model.width would be ignored"),
        ({"model": ModelConfig(whiten=2)}, r"model.whiten does not work with your own network"),
        ({"objective": ObjectiveConfig(label_smoothing=0.5)}, r"objective.label_smoothing would be ignored"),
        ({"run_dir": ""}, r"run_dir is missing"),
    ]
    for keys, words in cases:
        with pytest.raises(distrib.UserError, match=words):
            distrib.train(
                distrib.Config(**{"run_dir": str(tmp_path), "batch_size": 30} | keys),
                source=own_source(),
                network=Wide,
                objective=distrib.CrossEntropy(),
            )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_public_names_are_there_and_importing_them_takes_no_torch() -> None:
    code = "import sys, distrib; assert 'torch' not in sys.modules; distrib.Config(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert all(getattr(distrib, name) for name in distrib.__all__)
    assert distrib.PUBLIC.keys() == set(distrib.__all__)


def test_a_program_that_listens_to_signals_itself_does_so_again_after_a_run(tmp_path: Path) -> None:
    def handler(*_: object) -> None: ...

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        distrib.train(config(tmp_path), source=own_source(), network=Wide)
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_stops_a_run_of_a_program_which_goes_on_with_what_it_was_doing(tmp_path: Path) -> None:
    class Interrupting(distrib.CrossEntropy):
        calls = 0

        def loss_and_sums(self, *batch: Any) -> Any:
            self.calls += 1
            if self.calls == 4:  # the first was a rehearsal
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss_and_sums(*batch)

    state = distrib.train(config(tmp_path, epochs=500), source=own_source(), network=Wide, objective=Interrupting())
    assert 0 < state.step < 2000
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"
    assert torch.isfinite(state.network[1].weight).all()
