"""What launchers put into the environment: the rank, the number of ranks, and accelerate's settings."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from distrib.config import Config
from distrib.errors import UserError
from distrib.schema import AUTO

# Settings of accelerate for other kinds of training than distrib's.
OTHER_WAYS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
HONOURED = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
WAY_OUT = "change them with `accelerate config`, or by flags of accelerate launch"


def from_environment(*names: str, default: int) -> int:
    """The value of the first of these variables that is set."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)


def env_rank() -> int:
    """This process's rank; works before `connect`."""
    return from_environment("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", default=0)


def env_world_size() -> int:
    """The number of ranks; works before `connect`."""
    of_slurm = [] if in_shell_of_srun() else ["SLURM_STEP_NUM_TASKS"]
    return from_environment("WORLD_SIZE", *of_slurm, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", default=1)


def in_shell_of_srun() -> bool:
    """Whether this process was started by hand, in the shell that `srun --pty bash` gives, and not by srun itself."""
    return "SLURM_PTY_PORT" in os.environ and os.environ.get("SLURM_TASK_PID") != str(os.getpid())


def env_local_rank() -> int:
    """This process's rank among those on its machine."""
    return from_environment("LOCAL_RANK", default=0)


def env_local_world_size() -> int:
    """The number of ranks on this machine."""
    return from_environment("LOCAL_WORLD_SIZE", default=1)


def refuse_unconnected_processes() -> None:
    """Raise UserError if several processes were started without the variables that connect them."""
    started = env_world_size()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if started > 1 and missing:
        raise UserError(
            f"{started} processes were started, but {', '.join(missing)} is not set, so each would train alone: "
            "start them with accelerate launch, torchrun or launch/slurm.sbatch, or export these variables"
            + ("; if this is the only process, unset SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "")
        )


def warn_of_one_rank() -> list[str]:
    """A line if accelerate launch was asked for several processes and started one: on CPUs, it needs --multi_gpu too."""
    launcher = psutil.Process().parent()
    words = launcher.cmdline() if launcher and env_world_size() == 1 else []
    asked = re.search(r" --num[_-]processes[ =](\d+) ", " ".join([*words, ""]))
    if not asked or asked[1] in "01" or not any("accelerate" in word for word in words[:3]):
        return []
    return [f"warning: accelerate launch --num_processes {asked[1]} has started one rank: add --multi_gpu, on CPUs too"]


def threads_of_a_rank(local_ranks: int) -> int:
    """The CPU threads of a rank: what the user set as OMP_NUM_THREADS, or else its cores."""
    return threads_of_user() or cores_of_a_rank(local_ranks)


def threads_of_user() -> int:
    """OMP_NUM_THREADS; 0 if it is not set, or if it is 1 under a launcher: torchrun and accelerate set that."""
    threads = from_environment("OMP_NUM_THREADS", default=0)
    launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    return 0 if threads == 1 and launched else threads


def cores_of_a_rank(local_ranks: int) -> int:
    """The CPU cores of a rank: SLURM's number if the ranks are its tasks, else an even part of the cores of this process."""
    if from_environment("SLURM_STEP_NUM_TASKS", default=0) == env_world_size():
        return from_environment("SLURM_CPUS_PER_TASK", default=1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(cores, cgroup_quota())) // local_ranks)


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """The CPUs that this process may use at once, by the cgroups that it is in; infinite without a limit.

    `docker --cpus=4` sets such a limit. In a container, the file `own` may have paths that are not visible: then `root` counts.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return math.inf
    folders = [root]
    for _, controllers, path in lines:
        if "cpu" in controllers.split(","):  # cgroups v1
            folders = [root / "cpu", *folders]
        if not controllers or "cpu" in controllers.split(","):
            relative = Path(path.lstrip("/"))
            folders += [folders[0] / each for each in (relative, *relative.parents)]
    return min(map(quota_of, folders), default=math.inf)


def quota_of(folder: Path) -> float:
    """The CPUs that a cgroup may use at once: v2 has cpu.max, v1 a quota and a period."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if quota not in ("max", "-1") else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def with_accelerate_settings(config: Config) -> tuple[Config, list[str]]:
    """`config` with the values of accelerate's settings in keys that are auto, and a line that says so.

    Raises UserError if a setting is not supported, or contradicts a key.
    """
    for variable, name in OTHER_WAYS.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes"):
            raise UserError(f"accelerate's settings ask for {name}, and distrib trains with DDP: {WAY_OUT}")
    precision = setting("mixed_precision", "ACCELERATE_MIXED_PRECISION", ("no", "bf16", "fp16"))
    backend = setting("dynamo_backend", "ACCELERATE_DYNAMO_BACKEND", ("no", "inductor"))
    mode = setting("dynamo_mode", "ACCELERATE_DYNAMO_MODE", ("default", "reduce-overhead", "max-autotune"))
    parts = setting("gradient_accumulation_steps", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", tuple(map(str, range(1, 10_000))))
    asked: dict[str, Any] = {}
    if precision != "no":
        asked["precision"] = precision
    if backend != "no":
        asked["compile"] = mode
    if parts != "1":
        asked["micro_batches"] = int(parts)
    for key, value in asked.items():
        if getattr(config, key) not in (AUTO, value):
            raise UserError(f"{key}={getattr(config, key)}, but accelerate's settings ask for {value}: {WAY_OUT}")
    words = ", ".join(f"{key}={value}" for key, value in asked.items())
    return replace(config, **asked), [f"as accelerate's settings say: {words}"] if asked else []


def setting(name: str, variable: str, known: tuple[str, ...]) -> str:
    """A setting of accelerate; the default is the first of `known`. Raises UserError if it is not in `known`."""
    value = os.environ.get(variable, "").lower() or known[0]
    if value not in known:
        words = f"{', '.join(known[:5])}{', ...' if len(known) > 5 else ''}"
        raise UserError(f"accelerate's settings ask for {name} {value}, and distrib has {words}: {WAY_OUT}")
    return value


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        os.environ |= {} if before is None else {name: before}


@contextmanager
def accelerate_settings_hidden() -> Iterator[None]:
    """Hide these settings from accelerate: the config has their values already."""
    hidden = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith(HONOURED)}
    try:
        yield
    finally:
        os.environ.update(hidden)
