"""Train image classifiers on any number of ranks. A public name is imported on first use, since torch takes seconds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrib.config import Config
    from distrib.data.source import Arrays, Source
    from distrib.errors import RunError, UserError
    from distrib.inference.classifier import load
    from distrib.inference.evaluate import evaluate
    from distrib.inference.export import export
    from distrib.run import train
    from distrib.training.meters import Meter
    from distrib.training.objective import CrossEntropy, Objective

PUBLIC = {
    "Arrays": "distrib.data.source",
    "Config": "distrib.config",
    "CrossEntropy": "distrib.training.objective",
    "Meter": "distrib.training.meters",
    "Objective": "distrib.training.objective",
    "RunError": "distrib.errors",
    "Source": "distrib.data.source",
    "UserError": "distrib.errors",
    "evaluate": "distrib.inference.evaluate",
    "export": "distrib.inference.export",
    "load": "distrib.inference.classifier",
    "train": "distrib.run",
}

__all__ = [
    "Arrays", "Config", "CrossEntropy", "Meter", "Objective", "RunError", "Source", "UserError", "evaluate", "export", "load",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'distrib' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)
