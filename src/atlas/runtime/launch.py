"""What this process is given: cores, and its place in a job by torchrun's environment or that of a SLURM step."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_TIMEOUT_SECONDS = 600.0
_FIRST_PORT, _PORTS = 12_000, 20_000  # below 32,768, where the ports of outgoing connections begin


@dataclass(frozen=True)
class Launch:
    """One process of a job of several."""

    rank: int
    world_size: int
    local_rank: int  # among the processes on its machine
    local_world_size: int
    address: str  # where rank 0 waits for the others
    port: int
    sees_own_gpus: bool = False  # and not those of the other processes on its machine
    own_cores: int | None = None  # which no other process has, if that is said


def read_launch(environment: Mapping[str, str]) -> Launch | None:
    """What torchrun or srun has said; None for a single plain process.

    Raises:
        ValueError: a variable is missing, or is not what it must be.
    """
    by_slurm = _is_slurm_step(environment) and "RANK" not in environment
    if by_slurm:
        environment = _from_slurm(environment) | dict(environment)
    elif "RANK" not in environment:
        return None
    rank, world_size = _number(environment, "RANK", 0), _number(environment, "WORLD_SIZE", 1)
    if rank >= world_size:
        raise ValueError(f"RANK={rank} is not below WORLD_SIZE={world_size}: ranks are counted from 0")
    if not environment.get("MASTER_ADDR"):
        raise ValueError(
            "RANK is set and MASTER_ADDR is not: start the ranks with torchrun, or say where rank 0 is, with its port "
            "in MASTER_PORT"
        )
    return Launch(
        rank,
        world_size,
        _number(environment, "LOCAL_RANK", 0) if "LOCAL_RANK" in environment else rank,
        _number(environment, "LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in environment else 1,
        environment["MASTER_ADDR"],
        _number(environment, "MASTER_PORT", 1, 2**16 - 1),
        by_slurm and _hides_gpus(environment),
        _number(environment, "SLURM_CPUS_PER_TASK", 1) if by_slurm and "SLURM_CPUS_PER_TASK" in environment else None,
    )


def share_of_cores(launch: Launch | None) -> int:
    """The cores of a process, at least one: its own, or its share of those that all of its machine may use."""
    cores = available_cores()
    if launch is None:
        return cores
    return min(cores, launch.own_cores) if launch.own_cores else max(1, cores // launch.local_world_size)


def read_timeout(environment: Mapping[str, str]) -> float:
    """How long a rank waits for another one that sends nothing. Raises: ValueError."""
    text = environment.get("ATLAS_TIMEOUT_SECONDS", str(DEFAULT_TIMEOUT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 1e8:
        raise ValueError(
            f"ATLAS_TIMEOUT_SECONDS={text} is not a number of seconds above 0: leave it out for "
            f"{DEFAULT_TIMEOUT_SECONDS:.0f}"
        )
    return seconds


def _number(environment: Mapping[str, str], name: str, least: int, most: int = 2**31) -> int:
    if name not in environment:
        raise ValueError(f"RANK is set and {name} is not: start the ranks with torchrun, or set both")
    text = environment[name].strip()
    if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise ValueError(f"{name}={text} is not a number from {least}{f' to {most}' if most < 2**31 else ''}")
    return int(text)


def _is_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether srun has started this process and others; not so in the script of a job, or in an interactive shell."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    return tasks.isdecimal() and int(tasks) > 1 and "SLURM_PROCID" in environment


def _hides_gpus(environment: Mapping[str, str]) -> bool:
    """Whether SLURM lets each task see only GPUs of its own."""
    return (
        "SLURM_GPUS_PER_TASK" in environment
        or "gres/gpu" in environment.get("SLURM_TRES_PER_TASK", "")
        or environment.get("SLURM_NTASKS_PER_GPU") == "1"
        or re.search("single:|per_task:|map_gpu:|mask_gpu:", environment.get("SLURM_GPU_BIND", "")) is not None
    )


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have said."""
    job, step = (environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    number = sum(int(text) * factor for text, factor in ((job, 1), (step, 7919)) if text.isdecimal())
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": _tasks_of_node(environment),
        "MASTER_ADDR": first_host(environment.get("SLURM_STEP_NODELIST", "")),
        "MASTER_PORT": str(_FIRST_PORT + number % _PORTS),
    }


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: `node[01-03,07],gpu5` -> `node01`."""
    first = re.match(r"(\[[^]]*\]|[^,[])*", nodes)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0]) if first else ""


def _tasks_of_node(environment: Mapping[str, str]) -> str:
    """How many processes of the step are on this machine, out of a list such as `8(x3),2`; "1" where it is not said."""
    counts: list[str] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d{1,6})\))?", part):
            counts += [found[1]] * int(found[2] or 1)
    node = environment.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else "1"


def available_cores() -> int:
    """The cores that this process may use: fewer than the machine has in many containers and jobs."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
