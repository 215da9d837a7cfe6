"""The config: what is taken, what is refused, and in what words."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from conftest import ROOT

from distrib import data, models, training
from distrib.command_line import help_of_keys, load_config, read_config, to_yaml
from distrib.config import RENAMED, Config, OptimConfig
from distrib.errors import UserError
from distrib.keys import KEYS, applies, differences, keys_of


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["optim.lrr=1"], "no key optim.lrr: did you mean optim.lr?"),
        (["lr=1"], "no key lr: did you mean optim.lr?"),
        (["nonsense=1"], "no key nonsense: --help lists the keys"),
        (["views=2"], "no key views: it was renamed to tta"),
        (["batch_size=2.5"], "batch_size is '2.5', not a whole number"),
        (["batch_size=1e3"], "batch_size is '1e3', not a whole number"),
        (["batch_size=many"], "batch_size is 'many', not a whole number"),
        (["batch_size="], "batch_size is '', not a whole number"),
        (["batch_size=0"], "batch_size is 0, not in [1, inf): images per optimizer step"),
        (["epochs=nan"], "epochs is nan, not in (0, inf)"),
        (["optim.momentum=1"], "optim.momentum is 1.0, not in [0, 1)"),
        (["keep=1"], "keep is 1, not in [2, inf)"),
        (["tta=3"], "tta is '3', not 1|2|6"),
        (["optim.name=adam"], "optim.name is 'adam', not sgd|adamw|muon"),
        (["optim=3"], "no key optim: it is a section, with the keys optim.name, optim.lr"),
        (["seed=[1"], "seed is '[1', not a whole number"),
        (["run_dir=???"], "run_dir is ???, which is OmegaConf's word for no value"),
        (["seed=${x}"], "seed: Interpolation key 'x' not found"),
        (["nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["a.yaml", "b.yaml"], "unexpected argument 'b.yaml': give one CONFIG.yaml at most"),
        (["--epochs", "3"], "unexpected argument '--epochs': "),
    ],
)
def test_a_mistake_on_the_command_line_is_told_in_one_line(args: list[str], words: str) -> None:
    with pytest.raises(UserError) as told:
        load_config(args)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch_sise: 3", "no key batch_sise: did you mean batch_size?"),
        ("optim: {lr: -1}", "optim.lr is -1.0, not in (0, inf)"),
        ("optim: 3", "no key optim: it is a section"),
        ("seed: [1, 2]", "seed is ['1', '2'], not a whole number"),
        ("- a\n- list", "is not a config"),
        ("a: [1", "cannot be read as YAML"),
        ("seed: 1\nseed: 2", "the key seed is there twice"),
        ("optim:\n  lr: 1\n  lr: 2", "the key lr is there twice"),
        ("just words", "is not a config"),
        ("model: {name: resnet18, width: 3}", "model.width would be ignored"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        load_config([str(path)])
    assert words in str(told.value)
    assert str(path) in str(told.value) or "would be ignored" in words
    assert "\n" not in str(told.value)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 5\nbatch_size: 32\nprecision: no\n")
    config = load_config([str(path), "epochs=7", "optim.lr=1e-3"])
    assert config == Config(run_dir="runs/mine", epochs=7, batch_size=32, precision="no", optim=replace(OptimConfig(), lr=1e-3))


@pytest.mark.parametrize(
    "typed", ["2024_06_15", "0123", "1e3", "12:30", "yes", "no", "null", "~", "runs/exp #2", "/d/a: b", "[1]", "a=b", "'x'"]
)
def test_a_folder_on_the_command_line_is_what_was_typed(typed: str) -> None:
    config = load_config([f"run_dir={typed}", "data.name=folder", f"data.root={typed}"])
    expected = str(Path.home()) if typed == "~" else typed
    assert (config.run_dir, config.data.root) == (expected, expected)


@pytest.mark.parametrize(
    ("typed", "expected"), [("2024_06_15", "2024_06_15"), ("0123", "0123"), ("yes", "yes"), ("'#2'", "#2")]
)
def test_a_folder_in_a_file_is_what_was_typed(tmp_path: Path, typed: str, expected: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"run_dir: {typed}\noptim: {{lr: 1e-3}}\nepochs: 3\ncuda_graph: false\n")
    config = load_config([str(tmp_path / "mine.yaml")])
    assert (config.run_dir, config.optim.lr, config.epochs, config.cuda_graph) == (expected, 1e-3, 3.0, False)


def test_a_home_folder_may_be_a_tilde() -> None:
    assert load_config(["run_dir=~/mine"]).run_dir == str(Path.home() / "mine")


def test_a_file_whose_path_has_an_equals_sign_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "lr=0.1" / "config.yaml").write_text("epochs: 7\n")
    assert load_config([str(tmp_path / "lr=0.1" / "config.yaml")]).epochs == 7
    monkeypatch.chdir(tmp_path)
    assert load_config(["lr=0.1/config.yaml", "seed=1"]).epochs == 7
    (tmp_path / "run_dir=x").write_text("")
    assert load_config(["run_dir=x"]).run_dir == "x"  # a key is a key


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["model.name=resnet18", "model.dropout=0.9"],
            "model.dropout would be ignored: model.dropout applies to model.name=cnn",
        ),
        (
            ["data.name=cifar10", "data.size=32"],
            "data.size would be ignored: data.size applies to data.name=folder|csv only, and data.name is cifar10",
        ),
        (["data.size=224"], "data.size would be ignored"),  # given, though it is the default
        (["data.root=x"], "data.root would be ignored"),
        (["data.workers=1", "data.crop_area=1"], "data.workers, data.crop_area would be ignored"),
        (["data.name=folder", "data.resident=host"], "data.resident would be ignored"),
        (
            ["data.name=folder", "data.fit=pad", "data.center_crop=0.9"],
            "data.center_crop would be ignored: data.center_crop applies to data.fit=auto|crop only, and data.fit is pad",
        ),
        (
            ["data.center_crop=0.9"],
            "data.center_crop would be ignored: data.center_crop applies to data.name=folder|csv only, and data.name is digits",
        ),
    ],
)
def test_a_key_that_would_be_ignored_is_refused(args: list[str], words: str) -> None:
    with pytest.raises(UserError, match=rf"^{words.replace('[', '.')}"):
        load_config(args)


def test_every_condition_of_a_key_names_a_key_and_values_that_there_are() -> None:
    known = {
        "data.name": {*data.SOURCES, "own"},
        "model.name": {*models.NETWORKS},
        "objective.name": {*training.OBJECTIVES},
        "data.fit": {*get_args(KEYS["data.fit"].type)},
    }
    conditions = {key.meta["only"] for key in KEYS.values()} - {""}
    assert len(conditions) >= 4
    for condition in conditions:
        name, _, values = condition.partition("=")
        assert set(values.split("|")) <= known[name], condition
    described = {"data.name": data.SOURCES, "objective.name": training.OBJECTIVES, "model.name": models.NETWORKS}
    for name, registry in described.items():
        assert all(each in KEYS[name].meta["meaning"] for each in registry), name


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load_config([str(path)]) == Config(run_dir="runs/empty")
    assert load_config([]) == Config(run_dir="runs/digits")


@pytest.mark.parametrize(
    "args",
    [
        ["precision=no", "run_dir=/a folder/with blanks", "data.flip=random", "optim.schedule=linear"],
        ["run_dir=2024_06_15", "data.name=folder", "data.root=yes", "data.size=32", "model.name=resnet18"],
        ["run_dir=null", "micro_batches=3", "optim.weight_decay=1e-12"],
    ],
)
def test_a_config_survives_being_written_and_read(tmp_path: Path, args: list[str]) -> None:
    path = tmp_path / "config.yaml"
    config = load_config(args)
    path.write_text(to_yaml(config))
    assert load_config([str(path)]) == config == read_config(path)


def test_a_config_that_an_earlier_version_wrote_is_read_by_the_names_of_today(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("views: 2\ndata:\n  shift: 3\n  erase: 4\noptim:\n  average_decay: 0.5\n  label_smoothing: 0.3\n")
    config = read_config(path)
    assert (config.tta, config.data.translate, config.data.cutout) == (2, 3, 4)
    assert (config.optim.ema_decay, config.objective.label_smoothing) == (0.5, 0.3)
    assert set(RENAMED.values()) <= KEYS.keys()


def test_runs_differ_by_the_keys_that_decide_what_is_learned() -> None:
    there = {each.name: each.value for each in keys_of(Config(run_dir="a"))}
    assert differences(there, Config(run_dir="b", log_every=1, threads=3)) == []
    assert differences(there, Config(seed=2)) == ["seed (0 there, 2 now)"]
    del there["optim.clip_norm"]  # which a later version has added: it had its default
    assert differences(there, Config()) == []
    assert differences(there, Config(optim=OptimConfig(clip_norm=1))) == ["optim.clip_norm (0.0 there, 1 now)"]
    assert differences(there | {"wings": 2}, Config()) == ["wings (2 there, which this version does not know)"]


def test_a_run_keeps_what_it_chose_where_a_key_is_auto() -> None:
    there = {each.name: each.value for each in keys_of(Config())}
    chosen = {"precision": "bf16", "compile": "no"}
    assert differences(there, Config(), chosen) == []
    assert differences(there, Config(precision="bf16"), chosen) == []
    assert differences(there, Config(precision="no"), chosen) == ["precision (bf16 there, no now)"]
    assert differences(there | {"precision": "no"}, Config(), {"precision": "no"}) == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_that_is_shipped_is_valid_and_says_how_to_run_it(path: Path) -> None:
    assert load_config([str(path)]).run_dir == f"runs/{path.stem}"
    assert f"accelerate launch train.py configs/{path.name}" in path.read_text().partition("\n\n")[0]


def test_help_has_every_key_under_its_section_and_is_no_wider_than_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of_keys().splitlines()
    assert max(map(len, lines)) <= 80
    section, found = "", []
    for line in lines:
        if line and not line.startswith(" "):
            section = line.removesuffix("*") if line.endswith("*") else ""
        elif line.startswith("  ") and line[2] != " ":
            found.append(section + line.split()[0])
    assert found == [*KEYS]
    text = " ".join(help_of_keys().split())
    assert "batch_size images per optimizer step, over all ranks together (default 128; in [1, inf))." in text
    assert "schedule how the learning rate falls from its peak to 0 at the end (default cosine; cosine|linear)." in text
    assert "(default auto; a number or text). Only with data.name=folder|csv." in text


@pytest.mark.slow
def test_a_config_needs_no_torch() -> None:
    code = (
        "import sys; from distrib.command_line import load_config, help_of_keys; load_config([]); help_of_keys(); "
        "import distrib.data, distrib.models, distrib.training; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_what_applies_follows_the_other_keys() -> None:
    assert applies(load_config(["data.name=folder"]), "data.size")
    assert not applies(load_config([]), "data.size")
    assert applies(replace(Config(), data=replace(Config().data, name="own:mine")), "data.workers")
    assert not applies(replace(Config(), data=replace(Config().data, name="own:mine")), "data.size")
