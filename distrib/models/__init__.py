"""Networks. Ours by name, imported when they are asked for; every other name is one of torchvision's."""

import re
from importlib.util import find_spec
from pathlib import Path

from distrib.errors import UserError
from distrib.registry import refuse_handed

NETWORKS = {  # name: the class, as module:class
    "cnn": "distrib.models.cnn:CNN",
    "airbench": "distrib.models.airbench:Airbench",
}
REGISTERED = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)", re.MULTILINE)


def torchvision_names() -> list[str]:
    """The classification networks of torchvision, read out of its files: to import it takes seconds."""
    found = find_spec("torchvision")
    files = Path(found.origin).parent.glob("models/*.py") if found and found.origin else ()
    return sorted(name for file in files for name in REGISTERED.findall(file.read_text(encoding="utf-8")))


def refuse_unknown_network(name: str) -> None:
    """Raise UserError if there is no network of this name."""
    refuse_handed(name, "model.name")
    known = [] if name in NETWORKS else torchvision_names()
    if name not in NETWORKS and name not in known:
        raise UserError(f"there is no model {name!r}: use {' or '.join(NETWORKS)}, or one of torchvision's: {', '.join(known)}")
