"""What a key of a config is: a field with its meaning, its interval, and the condition under which it applies."""

from dataclasses import field, fields
from typing import Any, TypeVar, cast

from distrib.errors import UserError

T = TypeVar("T")

AUTO = "auto"


def key(
    default: T,
    meaning: str,
    within: str = "",
    *,
    free: bool = False,
    midway: bool = False,
    only: str = "",
    path: bool = False,
) -> T:
    """A key of the config.

    `within` is an interval such as "[0, 1)". A `free` key does not change what is learned: a run may resume with another value.
    A `midway` key may be changed on the command line of a run under way, which is recorded. `only` is the condition under which
    the key applies, such as "data.name=folder|own", where own stands for an object that was passed to train(). A `path` may
    start with ~.
    """
    return field(
        default=default,
        metadata={"meaning": meaning, "within": within, "free": free, "midway": midway, "only": only, "path": path},
    )


class Checked:
    """Raises UserError if a value is outside the interval of its key."""

    def __post_init__(self) -> None:
        for each in fields(cast(Any, self)):
            value, within = getattr(self, each.name), each.metadata.get("within")
            if within and value != AUTO and not (isinstance(value, int | float) and lies_within(value, within)):
                section = type(self).__name__.removesuffix("Config").lower()
                name = f"{section}.{each.name}" if section else each.name
                raise UserError(f"{name} is {value}, not in {within}: {each.metadata['meaning']}")


def lies_within(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    return (low <= value if interval[0] == "[" else low < value) and (value <= high if interval[-1] == "]" else value < high)
