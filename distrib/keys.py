"""The keys of a config by their dotted names: which apply, which changed, and which keep a run from going on. No torch."""

from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, cast, get_args

from distrib.config import OWN, Config
from distrib.errors import UserError
from distrib.schema import AUTO


class Key(NamedTuple):
    """A key of a config: dotted name, type, value, and the metadata that `key` was given."""

    name: str
    type: Any
    value: Any
    meta: Any


def keys_of(config: Any, section: str = "") -> Iterator[Key]:
    """Every key of a config, in order."""
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            yield from keys_of(value, f"{each.name}.")
        else:
            yield Key(section + each.name, each.type, value, each.metadata)


KEYS = {each.name: each for each in keys_of(Config())}  # with the defaults


class Unmet(NamedTuple):
    """Why a key does not apply: another key has this value, which is not one of `values`."""

    name: str
    values: list[str]
    value: str


def unmet(config: Config, name: str) -> Unmet | None:
    """The condition that keeps a key from having an effect, given the other keys of `config`; None if it has one."""
    condition = KEYS[name].meta["only"]
    if not condition:
        return None
    other, _, values = condition.partition("=")
    section, _, leaf = other.partition(".")
    value: str = getattr(getattr(config, section), leaf)
    found = Unmet(other, values.split("|"), value)
    # The other key must apply too.
    return unmet(config, other) or (None if ("own" if value.startswith(OWN) else value) in found.values else found)


def applies(config: Config, name: str) -> bool:
    """Whether a key has an effect, given the other keys of `config`."""
    return unmet(config, name) is None


def refuse_keys_that_do_not_apply(config: Config, given: set[str]) -> None:
    """Raise UserError if one of the `given` keys would be ignored."""
    idle = [(name, why) for name in KEYS if name in given and (why := unmet(config, name))]
    if idle:
        name, why = idle[0]
        values = "|".join(each for each in why.values if each != "own")
        raise UserError(
            f"{', '.join(each for each, _ in idle)} would be ignored: {name} applies to {why.name}={values} only, "
            f"and {why.name} is {why.value}; omit it"
        )


def keys_changed(config: Config) -> set[str]:
    """The keys that differ from their defaults."""
    return {each.name for each in keys_of(config) if each.value != KEYS[each.name].value}


def values_that_apply(config: Config) -> dict[str, Any]:
    """The value of each key that applies, under its dotted name."""
    return {each.name: each.value for each in keys_of(config) if applies(config, each.name)}


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as nested sections, as in a config file."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    return tree


def differences(
    there: dict[str, Any], now: Config, chosen: dict[str, Any] | None = None, changes: Collection[str] = ()
) -> list[str]:
    """The keys that prevent a run that was started with the keys `there` from resuming with `now`, in words.

    A key that is missing there had its default. `chosen` holds what the run chose for keys that were auto. A key that is auto
    now keeps the value that the run has. `changes` names keys that may differ if they may be changed midway.
    """
    current, had, found = {each.name: each.value for each in keys_of(now)}, there | (chosen or {}), list[str]()
    for name, after in current.items():
        before = had.get(name, KEYS[name].value)
        keeps = after == AUTO == KEYS[name].value
        allowed = KEYS[name].meta["free"] or keeps or (KEYS[name].meta["midway"] and name in changes)
        if before != after and there.get(name) != after and not allowed:
            found.append(f"{name} ({before} there, {after} now)")
    return found + [f"{name} ({there[name]} there, which this version does not know)" for name in there if name not in KEYS]


def changed_midway(there: dict[str, Any], now: Config) -> dict[str, tuple[Any, Any]]:
    """The keys that may be changed midway and differ from the keys `there`: their values there and now."""
    pairs = {each.name: (there.get(each.name, KEYS[each.name].value), each.value) for each in keys_of(now)}
    return {name: pair for name, pair in pairs.items() if KEYS[name].meta["midway"] and pair[0] != pair[1]}


def type_in_words(kind: Any) -> str:
    """The type of a key, as --help shows it."""
    words = {bool: "true|false", str: "text", int | str: "a number or text", float | str: "a number or text"}
    return words.get(kind) or "|".join(map(str, get_args(kind))) or cast(str, kind.__name__)
