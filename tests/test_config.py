"""The config: what is taken, what is refused, and in what words."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from distrib.config import Config, OptimConfig, UserError, help_text, load_config, to_yaml


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["optim.lrr=1"], "no key optim.lrr: did you mean optim.lr?"),
        (["lr=1"], "no key lr: did you mean optim.lr?"),
        (["nonsense=1"], "no key nonsense: --help lists the keys"),
        (["batch_size=2.5"], "batch_size: Value '2.5' of type 'float' could not be converted to Integer"),
        (["batch_size=many"], "batch_size: Value 'many'"),
        (["batch_size="], "batch_size: Incompatible value 'None'"),
        (["batch_size=0"], "batch_size is 0, not in [1, inf): images per optimizer step"),
        (["epochs=nan"], "epochs is nan, not in (0, inf)"),
        (["optim.momentum=1"], "optim.momentum is 1.0, not in [0, 1)"),
        (["keep=1"], "keep is 1, not in [2, inf)"),
        (["optim.name=adam"], "optim.name: Invalid value 'adam', expected one of ['sgd', 'adamw', 'muon']"),
        (["optim=3"], "optim: Merge error"),
        (["seed=[1"], "'seed=[1' is not key=value"),
        (["seed=${x}"], "seed: Interpolation key 'x' not found"),
        (["nowhere.yaml"], "no config file nowhere.yaml"),
        (["a.yaml", "b.yaml"], "what is 'b.yaml'? Give at most one CONFIG.yaml"),
        (["--epochs", "3"], "what is '--epochs'?"),
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
        ("- a\n- list", "is a list, not a config"),
        ("a: [1", "no YAML file that can be read"),
        ("seed: 1\nseed: 2", "found duplicate key seed"),
        ("just words", "no key just words"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        load_config([str(path)])
    assert str(path) in str(told.value)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 5\nbatch_size: 32\nprecision: no\n")
    config = load_config([str(path), "epochs=7", "optim.lr=1e-3"])
    assert config == Config(run_dir="runs/mine", epochs=7, batch_size=32, precision="no", optim=replace(OptimConfig(), lr=1e-3))


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert load_config([str(path)]) == Config(run_dir="runs/empty")
    assert load_config([]) == Config(run_dir="runs/digits")


def test_a_config_survives_being_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    config = load_config(["precision=no", "run_dir=/a folder/with blanks", "data.flip=random", "optim.schedule=linear"])
    path.write_text(to_yaml(config))
    assert load_config([str(path)]) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_that_is_shipped_is_valid_and_says_how_to_run_it(path: Path) -> None:
    assert load_config([str(path)]).run_dir == f"runs/{path.stem}"
    assert f"accelerate launch train.py configs/{path.name}" in path.read_text().partition("\n\n")[0]


def test_help_gives_type_default_and_meaning_of_every_key() -> None:
    text = " ".join(help_text().split())
    assert "batch_size int 128 images per optimizer step, over all ranks together [1, inf)" in text
    assert "optim.schedule cosine|linear cosine how the learning rate falls" in text
    assert all(line.count(":") > 0 for line in to_yaml(Config()).splitlines())
