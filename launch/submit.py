"""Submits a run to SLURM: computes its resources, and refuses what cannot work before the job waits in the queue.

python launch/submit.py --nodes 2 --gpus-per-node 8 --time 24:00:00 --partition gpu -- configs/imagenet.yaml batch_size=2048

It needs `omegaconf` and no torch. Libraries that submit to SLURM (submitit, simple-slurm) pickle a function or write a batch
script; here, one sbatch command with the right numbers is enough.
"""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SCRIPT = "launch/slurm.sbatch"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distrib.command_line import load_config  # noqa: E402
from distrib.config import Config, refuse_uneven  # noqa: E402
from distrib.errors import UserError  # noqa: E402


class Nodes(NamedTuple):
    """Equal nodes of a partition."""

    partition: str
    number: int
    cpus: int
    gpus: int


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def parser() -> argparse.ArgumentParser:
    usage = "python launch/submit.py [options] [options of sbatch] -- [CONFIG.yaml] [key=value ...]"
    parser = argparse.ArgumentParser("submit.py", usage, allow_abbrev=False)
    parser.add_argument("--nodes", type=positive, default=1, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="a rank for each; 0: train on CPUs")
    parser.add_argument("--ranks-per-node", type=positive, default=1, metavar="N", help="without GPUs: ranks of a node")
    parser.add_argument("--cpus-per-task", type=positive, metavar="N", help="default: an even part of the node's CPUs")
    parser.add_argument("--time", metavar="T", help="time limit, after which the job is requeued and resumes")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    crashes = "crashes after which it is requeued; default: 3 of those that may pass (a lost rank, a hang, a disk), else 0"
    parser.add_argument("--max-crashes", type=int, metavar="N", help=crashes)
    parser.add_argument("--sweep", metavar="KEY=A,B,...", help="a job array, with an element and a run folder per value")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch command and have SLURM validate it")
    return parser


def nodes_of(partition: str | None) -> list[Nodes]:
    """The nodes of a partition (default: SLURM's default one) that is up. Raises UserError if there is none."""
    rows = [row.split("|") for row in tell("sinfo", "--noheader", "--format=%P|%D|%c|%G|%a").splitlines()]
    found = []
    for name, count, cpus, features, state in rows:
        if state == "up" and (name.rstrip("*") == partition if partition else name.endswith("*")):
            gpus = sum(map(int, re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", features)))
            found.append(Nodes(name.rstrip("*"), int(count), int(cpus.rstrip("+")), gpus))
    if not found:
        there = ", ".join(sorted({row[0].rstrip("*") for row in rows}))
        raise UserError(f"there is no partition {partition or 'that is the default'}: give --partition, one of {there}")
    return found


def tell(*command: str) -> str:
    """Run a SLURM command; returns its output. Raises UserError if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]} on this machine: submit on a node that has SLURM's commands") from None
    if done.returncode:
        words = " ".join(re.sub(r"^\w+: error: ", "", line) for line in done.stderr.splitlines())
        raise UserError(f"SLURM refuses: {words}")
    return done.stdout


def fitting(asked: argparse.Namespace, nodes: Sequence[Nodes]) -> list[Nodes]:
    """The nodes with enough GPUs and CPUs. Raises UserError if there are too few."""
    name, cpus = nodes[0].partition, ranks_of_a_node(asked) * (asked.cpus_per_task or 1)
    for what, wanted, most in (
        ("nodes", asked.nodes, sum(each.number for each in nodes)),
        ("GPUs on a node", asked.gpus_per_node, max(each.gpus for each in nodes)),
        ("CPUs on a node", cpus, max(each.cpus for each in nodes)),
    ):
        if wanted > most:
            raise UserError(f"{wanted} {what} are more than partition {name} has: {most}")
    fit = [each for each in nodes if each.gpus >= asked.gpus_per_node and each.cpus >= cpus]
    count = sum(each.number for each in fit)
    if asked.nodes > count:
        raise UserError(f"only {count} nodes of partition {name} have enough GPUs and CPUs, not {asked.nodes}")
    return fit


def ranks_of_a_node(asked: argparse.Namespace) -> int:
    ranks: int = asked.gpus_per_node or asked.ranks_per_node
    return ranks


def cpus_per_task(asked: argparse.Namespace, fit: Sequence[Nodes]) -> int:
    """The CPUs of a rank: an even part of its node's, by GPU if it has one."""
    return max(1, min(each.cpus // (each.gpus if asked.gpus_per_node else asked.ranks_per_node) for each in fit))


def elements(sweep: str | None, args: Sequence[str]) -> tuple[list[Config], list[str], int]:
    """The configs of the runs, the arguments of the script, and the number of elements of the job array (0: no array)."""
    run_dir, args = load_config(args).run_dir, [arg for arg in args if not arg.startswith("run_dir=")]
    if not sweep:
        args = [*args, f"run_dir={run_dir}"]
        return [load_config(args)], args, 0
    key, _, values = sweep.partition("=")
    if not all(values.split(",")):
        raise UserError(f"--sweep {sweep} is not KEY=A,B,...")
    base = f"{run_dir}/{key}_"
    configs = [load_config([*args, f"{key}={value}", f"run_dir={base}{value}"]) for value in values.split(",")]
    return configs, [*args, sweep, f"run_dir={base}%v"], len(configs)


def submission(asked: argparse.Namespace, passed: Sequence[str], args: Sequence[str]) -> tuple[list[str], list[Config]]:
    """The sbatch command, and the configs of its runs. Raises UserError if it cannot work."""
    configs, args, count = elements(asked.sweep, args)
    ranks = ranks_of_a_node(asked)
    fit = fitting(asked, nodes_of(asked.partition))
    for config in configs:
        refuse_uneven(config.batch_size, asked.nodes * ranks)
    output = Path(configs[0].run_dir).parent if count else Path(configs[0].run_dir)
    options = {
        "job-name": output.name,
        "output": output.resolve() / ("slurm-%A_%a.out" if count else "slurm-%j.out"),
        "partition": asked.partition,
        "account": asked.account,
        "time": asked.time,
        "array": f"0-{count - 1}" if count else None,
        "nodes": asked.nodes,
        "ntasks-per-node": ranks,
        "gpus-per-node": asked.gpus_per_node or None,
        "cpus-per-task": asked.cpus_per_task or cpus_per_task(asked, fit),
        "export": None if asked.max_crashes is None else f"ALL,MAX_CRASHES={asked.max_crashes}",
    }
    line = ["sbatch", *(f"--{name}={value}" for name, value in options.items() if value is not None), *passed]
    return [*line, SCRIPT, *args], configs


def main(argv: Sequence[str]) -> int:
    cut = argv.index("--") if "--" in argv else len(argv)
    asked, passed = parser().parse_known_args(argv[:cut])
    try:
        stray = next((each for each in passed if not each.startswith("-")), None)
        if stray:
            raise UserError(
                f"unexpected argument {stray!r}: a config and its keys follow '--', and options of sbatch are --name=value"
            )
        if not Path(SCRIPT).exists():
            raise UserError(f"there is no {SCRIPT} in {Path.cwd()}: submit in the project's folder")
        line, configs = submission(asked, passed, argv[cut + 1 :])
        tell("sbatch", "--test-only", *line[1:])
        print(shlex.join(line))
        if asked.dry_run:
            return 0
        for config in configs:
            Path(config.run_dir).mkdir(parents=True, exist_ok=True)  # SLURM makes no folder for its output
        job = tell("sbatch", "--parsable", *line[1:]).strip()
        output = next(each for each in line if each.startswith("--output="))
        print(f"job {job}: squeue --job {job}; its output is in {output.partition('=')[2].replace('%j', job)}")
        return 0
    except (UserError, OSError) as error:
        print(f"submit.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
