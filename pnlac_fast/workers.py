"""Which share of the units a process takes: given as i/n, or found in what a launcher has set.

A launcher starts processes, a scheduler starts the jobs they run in; where both are there, each process of each job is
a worker. Read are, of schedulers,

- a SLURM job array: ``SLURM_ARRAY_TASK_ID``, ``_MIN``, ``_MAX``, ``_STEP``, ``_COUNT``;
- an indexed Kubernetes job: ``JOB_COMPLETION_INDEX``, with ``PNLAC_WORKERS`` set to its ``completions``, which
  Kubernetes does not tell;

the first of these that is set, and of launchers

- torchrun and accelerate: ``RANK`` and ``WORLD_SIZE``;
- srun: ``SLURM_PROCID`` and ``SLURM_STEP_NUM_TASKS``; a batch script has the first as well, but is one process.

Only this file reads them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pnlac_fast.errors import UserError

COUNT_VARIABLE = "PNLAC_WORKERS"
MEETING = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Worker:
    """Number ``index`` of ``count`` workers that share the units of a run."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def within(self, outer: Worker) -> Worker:
        """The worker among those of all jobs, if this one is among those of the job ``outer``."""
        return Worker(outer.index * self.count + self.index, outer.count * self.count)


def parse_worker(text: str, *, tp: bool = False, environ: Mapping[str, str] = os.environ) -> Worker:
    """A worker written i/n, or "auto" for what a launcher has set.

    Parameters
    ----------
    tp
        The processes of a launcher share one model (``--tp``), so that they are one worker together.

    Raises
    ------
    UserError
        It is neither, i is not in 0 .. n - 1, or the variables are missing or contradict each other.

    Examples
    --------
    >>> parse_worker("2/8")
    Worker(index=2, count=8)
    >>> jobs = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "3"}
    >>> parse_worker("auto", environ={**jobs, "RANK": "0", "WORLD_SIZE": "2"})
    Worker(index=2, count=6)
    """
    if text == "auto":
        return _found(environ, tp)
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"'{text}' is no worker: write i/n with i from 0 to n - 1, such as 0/4, or auto.")
    return Worker(int(index), int(count))


def units_of(worker: Worker, total: int) -> range:
    """The units, of ``total``, that a worker takes: every one whose number leaves its index when divided by the count.

    Examples
    --------
    >>> list(units_of(Worker(1, 3), 8))
    [1, 4, 7]
    """
    return range(worker.index, total, worker.count)


def of_group(environ: Mapping[str, str] = os.environ, *, meeting: bool = False) -> Worker | None:
    """This process among those that torchrun or accelerate has started; None if neither has.

    Parameters
    ----------
    meeting
        The processes will exchange tensors, so that where they meet must be set too.
    """
    here = _pair(environ, "RANK", "WORLD_SIZE", "start it with torchrun")
    if here and meeting and (missing := [name for name in MEETING if name not in environ]):
        raise UserError(f"RANK and WORLD_SIZE are set, but not {' and '.join(missing)}: start it with torchrun.")
    return here


def local_device(environ: Mapping[str, str] = os.environ) -> str:
    """The device of this process among those of its machine: a GPU of its own where there are several, else "auto"."""
    import torch

    local = environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID"))
    gpus = torch.cuda.device_count()
    if local is None or not gpus:
        return "auto"
    return f"cuda:{_number(environ, 'LOCAL_RANK' if 'LOCAL_RANK' in environ else 'SLURM_LOCALID') % gpus}"


def _found(environ: Mapping[str, str], tp: bool) -> Worker:
    job = _array(environ) or _indexed(environ)
    process = of_group(environ) or _step(environ)
    if tp and process:
        process = Worker()
    if job is None and process is None:
        raise UserError(
            f"--worker auto finds nothing that a launcher has set: start with torchrun, accelerate, srun or a SLURM "
            f"array, set {COUNT_VARIABLE} in an indexed Kubernetes job, or write --worker i/n."
        )
    return (process or Worker()).within(job or Worker())


def _array(environ: Mapping[str, str]) -> Worker | None:
    """This task among those of a SLURM array, whose numbers may begin anywhere and go up in steps."""
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return None
    task, first, count = (_number(environ, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "COUNT"))
    step = _number(environ, "SLURM_ARRAY_TASK_STEP", 1)
    last = _number(environ, "SLURM_ARRAY_TASK_MAX", first + step * (count - 1))
    if step < 1 or last != first + step * (count - 1) or task not in range(first, last + 1, step):
        raise UserError(
            f"The tasks of this SLURM array are not evenly spaced ({count} from {first} to {last}): "
            f"submit it with --array=0-{max(count, 1) - 1}."
        )
    return Worker((task - first) // step, count)


def _indexed(environ: Mapping[str, str]) -> Worker | None:
    """This pod among those of an indexed Kubernetes job; None if nobody has said how many these are."""
    if COUNT_VARIABLE not in environ:
        return None
    return _pair(environ, "JOB_COMPLETION_INDEX", COUNT_VARIABLE, "give the job completionMode: Indexed")


def _step(environ: Mapping[str, str]) -> Worker | None:
    """This task among those that srun has started; None outside."""
    if "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    return _pair(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "start it with srun")


def _pair(environ: Mapping[str, str], index: str, count: str, otherwise: str) -> Worker | None:
    """A worker from two variables; None without either."""
    if index not in environ and count not in environ:
        return None
    for name, other in ((index, count), (count, index)):
        if name not in environ:
            raise UserError(f"{other} is set, but not {name}: {otherwise}, or write --worker i/n.")
    worker = Worker(_number(environ, index), _number(environ, count))
    if worker.index >= worker.count:
        raise UserError(f"{index}={worker.index} is not below {count}={worker.count}: write --worker i/n.")
    return worker


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        said = f"is '{text}', not a number" if name in environ else "is not set"
        raise UserError(f"{name} {said}: start as the launcher does, or write --worker i/n.")
    return int(text)
