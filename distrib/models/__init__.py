"""Networks by name: ours, imported on first use; every other name is looked up in torchvision."""

import re
from importlib.util import find_spec
from pathlib import Path

from distrib.errors import UserError
from distrib.registry import refuse_own_object

NETWORKS = {  # name: the class, as module:class
    "cnn": "distrib.models.cnn:CNN",
    "airbench": "distrib.models.airbench:Airbench",
}
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
    known = torchvision_names()  # reads files: only where it is needed
    if name not in known:
        raise UserError(f"there is no model {name!r}: use {' or '.join(NETWORKS)}, or one of torchvision: {', '.join(known)}")
