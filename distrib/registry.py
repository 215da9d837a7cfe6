"""Registries: dicts from a name to module:object. A wrong name is found without importing torch."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from distrib.config import OWN
from distrib.errors import UserError


def refuse_unknown(registry: Mapping[str, str], name: str, key: str, what: str) -> None:
    """Raise UserError if `name`, the value of the key `key`, is not in `registry`."""
    refuse_own_object(name, key)
    if name not in registry:
        raise UserError(f"there is no {what} {name!r}: use one of {', '.join(registry)}")


def refuse_own_object(name: str, key: str) -> None:
    """Raise UserError if `name`, the value of the key `key`, stands for an object that a program passed to train()."""
    if name.startswith(OWN):
        raise UserError(f"{key} {name} was passed to train() by a program: run that program again")


def lookup(registry: Mapping[str, str], name: str) -> Any:
    """Import the object that a registry has under a name."""
    module, _, attribute = registry[name].partition(":")
    return getattr(import_module(module), attribute)
