"""Things by name: a registry is a dict from a name to module:object, so that a wrong name is found before torch is imported."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from distrib.config import OWN
from distrib.errors import UserError


def refuse_unknown(registry: Mapping[str, str], name: str, key: str, what: str) -> None:
    """Raise UserError if `name`, the value of `key`, is in no registry."""
    refuse_handed(name, key)
    if name not in registry:
        raise UserError(f"there is no {what} {name!r}: use one of {', '.join(registry)}")


def refuse_handed(name: str, key: str) -> None:
    """Raise UserError if `name`, the value of `key`, is that of an object, which no name can bring back."""
    if name.startswith(OWN):
        raise UserError(f"{key} {name} was handed to train() by a program: start that program again")


def lookup(registry: Mapping[str, str], name: str) -> Any:
    """What a registry has under a name."""
    module, _, attribute = registry[name].partition(":")
    return getattr(import_module(module), attribute)
