"""Networks by name: ours, imported on first use; timm:NAME is timm's; every other name is looked up in torchvision."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from distrib.errors import UserError
from distrib.registry import refuse_own_object

NETWORKS = {  # name: the class, as module:class
    "cnn": "distrib.models.cnn:CNN",
    "airbench": "distrib.models.airbench:Airbench",
}
TIMM = "timm:"  # prefix of the name of a network of timm
REGISTERED = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)", re.MULTILINE)


def torchvision_names() -> list[str]:
    """The names of torchvision's classification networks, read from its source files, since importing it takes seconds."""
    found = find_spec("torchvision")
    files = Path(found.origin).parent.glob("models/*.py") if found and found.origin else ()
    return sorted(name for file in files for name in REGISTERED.findall(file.read_text(encoding="utf-8")))


def refuse_unknown_network(name: str) -> None:
    """Raise UserError if there is no network of this name."""
    refuse_own_object(name, "model.name")
    if name in NETWORKS:
        return
    if name.startswith(TIMM):
        if not find_spec("timm"):
            raise UserError(f"model.name={name} needs timm: pip install timm")
        return  # whether timm has it is found when the network is built: importing timm takes seconds
    known = torchvision_names()  # reads files: only where it is needed
    if name not in known:
        ours = ", ".join(NETWORKS)
        raise UserError(f"there is no model {name!r}: use {ours}, {TIMM}NAME, or one of torchvision: {', '.join(known)}")


def package_of(name: str) -> ModuleType:
    """The module that knows the package which a network that is not ours comes from."""
    return import_module("distrib.models.of_timm" if name.startswith(TIMM) else "distrib.models.of_torchvision")
