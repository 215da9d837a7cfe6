"""The command `distrib`. It reports mistakes in the command line before it imports torch."""

import io
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from distrib.command_line import help_of_keys, load_config, to_yaml
from distrib.config import Config, refuse_uneven
from distrib.data import SOURCES
from distrib.errors import UserError
from distrib.models import refuse_unknown_network
from distrib.registry import refuse_unknown
from distrib.runtime import exits, signals
from distrib.runtime.environment import env_world_size
from distrib.training import OBJECTIVES

INTERRUPTED = 130  # exit code, as shells have it
BEGAN = time.time()  # about when this process started: the slow imports come later

USAGE = """\
usage: distrib COMMAND ...   (also python -m distrib COMMAND ...)

  distrib train [CONFIG.yaml] [key=value ...]   train on one device
  distrib evaluate RUN [data.KEY=value ...]     the accuracy of a run, by class
  distrib predict RUN PATH...                   the classes of image files
  distrib export RUN OUT.onnx                   the network as one file: .onnx, .pt2 or .safetensors
  distrib scan DATA [data.KEY=value ...]        check the images in a folder or a table
  distrib runs [FOLDER]                         list the runs in a folder
  distrib scale [CONFIG.yaml] [key=value ...]   predict training on many GPUs

On all devices of a machine: accelerate launch -m distrib train ...
distrib COMMAND --help tells more."""

TRAIN_USAGE = """\
usage: accelerate launch train.py [CONFIG.yaml] [key=value ...]
       distrib train [CONFIG.yaml] [key=value ...]    on one device
       --print-config shows the config that would be used

"""

EVALUATE_USAGE = """\
usage: distrib evaluate RUN [data.KEY=value ...] [--json]
       accelerate launch -m distrib evaluate RUN ...    on all devices of a machine

Evaluates the best checkpoint of the run folder RUN, or the checkpoint RUN, on the validation images of the run;
data.root=FOLDER names others with the same classes, and data.holdout=1 uses all images of class folders that are not
split. The result is exact on any number of ranks."""


def train(args: Sequence[str]) -> int:
    """Train a run, from its newest checkpoint if it has one."""
    if "--help" in args:
        return exits.print_once(TRAIN_USAGE + help_of_keys())
    signals.listen()  # before anything slow, so that no signal is missed
    config = load_config([arg for arg in args if arg != "--print-config"])
    refuse_mistakes(config)
    if "--print-config" in args:
        return exits.print_once(to_yaml(config))
    from distrib import run

    run.train(config, changes={arg.partition("=")[0] for arg in args}, began=BEGAN)
    return 0


def refuse_mistakes(config: Config) -> None:
    """Raise UserError for mistakes that can be found without torch."""
    refuse_unknown(SOURCES, config.data.name, "data.name", "data set")
    refuse_unknown_network(config.model.name)
    refuse_unknown(OBJECTIVES, config.objective.name, "objective.name", "objective")
    refuse_uneven(config.batch_size, env_world_size())


def evaluate(args: Sequence[str]) -> int:
    """Evaluate a run on its validation images, or on others."""
    if "--help" in args:
        return exits.print_once(EVALUATE_USAGE)
    words = [arg for arg in args if arg != "--json"]
    keys = keys_of_data(words[1:])
    if not words or keys is None:
        raise UserError("give a run folder or a checkpoint, and keys of data only: distrib evaluate RUN [data.root=FOLDER]")
    from distrib.inference import evaluate as inference

    found = inference.evaluate_classes(words[0], keys=keys)
    return exits.print_once(inference.as_json(found) if "--json" in args else "\n".join(inference.report(found)))


def keys_of_data(args: Sequence[str]) -> dict[str, str] | None:
    """The keys of data, as text; None if an argument is something else, or a key is there twice."""
    keys = dict(arg.split("=", 1) for arg in args if arg.startswith("data.") and "=" in arg)
    return keys if len(keys) == len(args) else None


def predict(args: Sequence[str]) -> int:
    """Classify image files."""
    from distrib.inference import predict as inference

    if "--help" in args:
        return exits.print_once(inference.USAGE)
    words, top = [arg for arg in args if arg != "--json"], "1"
    if "--top" in words:
        at = words.index("--top")
        _, top, *_ = [*words[at : at + 2], ""]
        del words[at : at + 2]
    odd = [word for word in words if word.startswith("--")]
    if odd or len(words) < 2 or not top.isdecimal() or int(top) < 1:
        mistake = f"unexpected argument {odd[0]!r}" if odd else "give a run and images"
        raise UserError(f"{mistake}: distrib predict RUN PATH... [--top K] [--json]")
    if env_world_size() > 1:
        raise UserError("distrib predict runs in one process: start it without a launcher")
    exits.print_lines(inference.lines(words[0], words[1:], int(top), as_json="--json" in args))
    return 0


def export(args: Sequence[str]) -> int:
    """Write a trained network as one file."""
    from distrib.inference import export as inference

    if "--help" in args:
        return exits.print_once(inference.USAGE)
    keys = keys_of_data(args[2:])
    if len(args) < 2 or keys is None:
        raise UserError("give a run and a file, and keys of data only: distrib export RUN OUT.onnx [data.root=FOLDER]")
    if env_world_size() > 1:
        raise UserError("distrib export runs in one process: start it without a launcher")
    exits.print_lines(inference.lines(args[0], args[1], keys))
    return 0


def runs(args: Sequence[str]) -> int:
    """List the runs in a folder."""
    from distrib.reporting.runs import table

    if "--help" in args:
        return exits.print_once(
            "usage: distrib runs [FOLDER]\n\nLists the runs in FOLDER (default: runs): state, step, last evaluation, time."
        )
    if len(args) > 1:
        raise UserError(f"unexpected argument {args[1]!r}: give one folder")
    return exits.print_once(table(args[0] if args else "runs"))


def scan(args: Sequence[str]) -> int:
    """Check the images of a data set; returns 1 if something is wrong."""
    from distrib.data.scan import USAGE as SCAN_USAGE
    from distrib.data.scan import scan as report

    if "--help" in args:
        return exits.print_once(SCAN_USAGE)
    lines, sound = report(args)
    exits.print_once("\n".join(lines))
    return 0 if sound else 1


def scale(args: Sequence[str]) -> int:
    """Predict what training would cost."""
    from distrib.scale.cluster import Cluster
    from distrib.scale.prediction import USAGE as SCALE_USAGE
    from distrib.scale.prediction import read, report

    if "--help" in args:
        return exits.print_once(SCALE_USAGE)
    return exits.print_once("\n".join(report(read(args, Cluster()), Cluster())))


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "scan": scan,
    "runs": runs,
    "scale": scale,
}


def main(args: Sequence[str]) -> int:
    """Run a command. Returns 0 if it completed or was stopped, 1 if it failed, 2 if the user made a mistake."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # a file name may be no text
    try:
        if not args or args[0] in ("--help", "-h", "help"):
            return exits.print_once(USAGE)
        if args[0] not in COMMANDS:
            raise UserError(f"there is no command {args[0]!r}: use {', '.join(COMMANDS)}, or --help")
        return COMMANDS[args[0]](args[1:])
    except KeyboardInterrupt:  # training listens to it
        return INTERRUPTED
    except Exception as error:
        return exits.report(error)


def run(*command: str) -> NoReturn:
    """Run the command `command`, with the arguments of this process, and exit."""
    exits.leave(main([*command, *sys.argv[1:]]))
