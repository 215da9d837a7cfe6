"""What a launcher has put into the environment: this process's rank, the number of ranks, and settings of accelerate."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from distrib.config import AUTO, Config
from distrib.errors import UserError

# Settings with which accelerate would train in another way than distrib does.
OTHER_WAYS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
HONOURED = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
WAY_OUT = "change them with `accelerate config`, or by flags of accelerate launch"


def from_environment(*names: str, default: int) -> int:
    """The first of these variables that is set."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), default)


def launched_rank() -> int:
    """This process's rank, also before it has joined the others."""
    return from_environment("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", default=0)


def launched_world() -> int:
    """The number of ranks, also before this process has joined them."""
    return from_environment("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", default=1)


def local_rank() -> int:
    """This process's rank among those of its machine."""
    return from_environment("LOCAL_RANK", default=0)


def local_world() -> int:
    """The number of ranks on this machine."""
    return from_environment("LOCAL_WORLD_SIZE", default=1)


def refuse_lone_processes() -> None:
    """Raise UserError if a launcher started several processes without telling them how to find each other."""
    started = launched_world()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if started > 1 and missing:
        raise UserError(
            f"{started} processes were started, but without {', '.join(missing)} in the environment each would train alone: "
            "start them with accelerate launch, torchrun or launch/slurm.sbatch, or export these"
        )


def threads_of_a_rank(local_ranks: int) -> int:
    """This rank's part of the machine's cores: as SLURM says where a rank is one of its tasks, else an even one."""
    if from_environment("SLURM_STEP_NUM_TASKS", default=0) == launched_world():
        return from_environment("SLURM_CPUS_PER_TASK", default=1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_ranks)


def with_accelerate_settings(config: Config) -> tuple[Config, list[str]]:
    """`config` with what the user's settings of accelerate ask for, in keys that are auto, and a line that says so.

    Raises UserError if they ask for what distrib does not do, or for something else than a key does.
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
    """A setting of accelerate, by default the first that is known. Raises UserError if it is another."""
    value = os.environ.get(variable, "").lower() or known[0]
    if value not in known:
        words = f"{', '.join(known[:5])}{', ...' if len(known) > 5 else ''}"
        raise UserError(f"accelerate's settings ask for {name} {value}, and distrib has {words}: {WAY_OUT}")
    return value


@contextmanager
def accelerate_settings_hidden() -> Iterator[None]:
    """Keep accelerate from acting on those settings by itself: what they ask for has become the config's."""
    hidden = {name: os.environ.pop(name) for name in [*os.environ] if name.startswith(HONOURED)}
    try:
        yield
    finally:
        os.environ.update(hidden)
