"""A config from text: defaults, then a YAML file, then key=value pairs; the last one wins. Values are taken as typed."""

import os
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from distrib.config import RENAMED, Config
from distrib.errors import UserError, one_line
from distrib.keys import KEYS, Key, nested, refuse_keys_that_do_not_apply, type_in_words, values_that_apply

SECTIONS = {name.partition(".")[0] for name in KEYS if "." in name}
WIDTH = 80  # columns of --help
KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


class PlainLoader(yaml.BaseLoader):
    """Keeps each value as the text that was typed: YAML 1.1 reads 2024_06_15 as a number and `no` as False."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            names = [self.construct_object(each) for each, _ in node.value]
            raise UserError(f"the key {next(each for each in names if names.count(each) > 1)} is there twice")
        return mapping


def load_config(args: Sequence[str]) -> Config:
    """The config of a command line: `[CONFIG.yaml] [key=value ...]`. Raises UserError."""
    pairs = [arg for arg in args if is_pair(arg)]
    files = [arg for arg in args if arg not in pairs]
    odd = [arg for arg in args if arg.startswith("-")] or files[1:]
    if odd:
        raise UserError(f"unexpected argument {odd[0]!r}: give one CONFIG.yaml at most, then key=value pairs; see --help")
    config = Config(run_dir=f"runs/{Path(files[0]).stem}" if files else "runs/digits")
    given = read_yaml(Path(files[0])) if files else {}
    config = with_values(config, given, f"{files[0]}: " if files else "")
    typed = dict(pair.split("=", 1) for pair in pairs)
    config = with_values(config, typed, "")
    refuse_keys_that_do_not_apply(config, {*given, *typed})
    return config


def is_pair(arg: str) -> bool:
    """Whether an argument is key=value, and not the path of a file with = in its name."""
    name, equals, _ = arg.partition("=")
    if not equals or arg.startswith("-"):
        return False
    return name in KEYS or not Path(arg).is_file()


def read_config(path: Path) -> Config:
    """The config in a run's config.yaml, of any version: a key that it lacks has its default. Raises UserError."""
    values = {RENAMED.get(name, name): value for name, value in read_yaml(path).items()}
    return with_values(Config(run_dir=f"runs/{path.stem}"), values, f"{path}: ")


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML file, as text, under dotted names. Raises UserError."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist (current folder: {Path.cwd()})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {one_line(error)}") from None
    if tree is None or tree == "":
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a config: write 'key: value' lines")
    return dict(dotted(tree))


def dotted(tree: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """Nested sections as dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{section}{name}.")
        else:
            yield f"{section}{name}", value


def with_values(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """`config` with other values, as text or as Python objects. Raises UserError, whose message starts with `where`."""
    for name, value in values.items():
        if name not in KEYS:
            raise UserError(f"{where}there is no key {name}: {hint(name)}")
        if value == MISSING:
            raise UserError(f"{where}{name} is {MISSING}, which is OmegaConf's word for no value: give one, or omit it")
    tree = nested({name: typed(KEYS[name], value) for name, value in values.items()})
    try:
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config), tree))  # which checks the ranges
    except OmegaConfBaseException as error:
        name = cast(str, error.full_key)
        kind = KINDS.get(KEYS[name].type) or type_in_words(KEYS[name].type)
        words = f" is {values[name]!r}, not {kind}" if isinstance(error, ValidationError) else f": {str(error).splitlines()[0]}"
        raise UserError(f"{where}{name}{words}") from None
    except UserError as error:
        raise UserError(f"{where}{error}") from None
    return cast(Config, found)


def typed(key: Key, value: Any) -> Any:
    """A number, where a key takes numbers or words; a path without ~; else the text, which OmegaConf converts."""
    if not isinstance(value, str):
        return value
    if float in get_args(key.type):
        with suppress(ValueError):
            return float(value)
    elif get_args(key.type) and value.isdecimal():
        return int(value)
    return os.path.expanduser(value) if key.meta["path"] else value


def hint(unknown: str) -> str:
    """A suggestion for a user who typed an unknown key."""
    if unknown in RENAMED:
        return f"it was renamed to {RENAMED[unknown]}"
    if unknown in SECTIONS:
        return f"it is a section, with the keys {', '.join(name for name in KEYS if name.startswith(unknown + '.'))}"
    same_leaf = [name for name in KEYS if name.rpartition(".")[2] == unknown.rpartition(".")[2]]
    near = same_leaf or get_close_matches(unknown, KEYS, n=1)
    return f"did you mean {' or '.join(near)}?" if near else "--help lists the keys"


def to_yaml(config: Config) -> str:
    """A config as YAML: the keys that apply."""
    return OmegaConf.to_yaml(OmegaConf.create(nested(values_that_apply(config))))


def help_of_keys() -> str:
    """The text of --help: every key, by section, with its meaning, default, and range or choices."""
    width = max(40, min(shutil.get_terminal_size((WIDTH, 24)).columns, 100))
    lines, section = list[str](), None
    for name, key in KEYS.items():
        prefix, _, leaf = name.rpartition(".")
        if prefix != section:
            section = prefix
            lines += ["", f"{prefix}.*" if prefix else "the run"]
        shown = str(key.value).lower() if key.type is bool else key.value
        default = f"default {shown}" if shown != "" else "no default"
        kind = f"in {key.meta['within']}" if key.meta["within"] else type_in_words(key.type)
        only = f" Only with {key.meta['only'].replace('|own', '')}." if key.meta["only"] else ""
        text = f"  {leaf:<16}{key.meta['meaning']} ({default}; {kind}).{only}"
        lines += textwrap.wrap(text, width, subsequent_indent=" " * 18, break_on_hyphens=False, break_long_words=False)
    return "\n".join(lines[1:])
