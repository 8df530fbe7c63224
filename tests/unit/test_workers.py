"""Which units a worker takes, as given and as launchers set it."""

from __future__ import annotations

import doctest

import pytest
import torch

from pnlac_fast import workers
from pnlac_fast.errors import UserError
from pnlac_fast.workers import Worker, local_device, parse_worker, units_of


def array(task: int, first: int, last: int, count: int, step: int | None = 1) -> dict[str, str]:
    """The variables that SLURM sets in a task of an array."""
    given = {"ID": task, "MIN": first, "MAX": last, "COUNT": count, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in given.items() if value is not None}


def torchrun(rank: int, size: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size)}


def srun(rank: int, size: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(size), "SLURM_NTASKS": str(size)}


def kubernetes(index: int, count: int) -> dict[str, str]:
    return {"JOB_COMPLETION_INDEX": str(index), "PNLAC_WORKERS": str(count)}


@pytest.mark.parametrize(("text", "worker"), [("0/1", Worker()), ("3/4", Worker(3, 4)), ("00/02", Worker(0, 2))])
def test_workers_are_written_as_fractions(text: str, worker: Worker) -> None:
    assert parse_worker(text, environ=torchrun(1, 7)) == worker
    assert parse_worker(str(worker)) == worker


@pytest.mark.parametrize(
    "text", ["", "1", "/", "1/", "/2", "4/4", "-1/4", "1/-4", "0/0", "1.0/2", "1/2/3", "a/b", "AUTO"]
)
def test_other_workers_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="write i/n"):
        parse_worker(text, environ={})


@pytest.mark.parametrize("total", [0, 1, 7, 24])
@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_every_unit_has_one_worker(total: int, count: int) -> None:
    taken = [unit for index in range(count) for unit in units_of(Worker(index, count), total)]
    assert sorted(taken) == list(range(total))


@pytest.mark.parametrize(
    ("environ", "worker"),
    [
        (torchrun(2, 4), Worker(2, 4)),
        (torchrun(0, 1), Worker(0, 1)),
        (srun(5, 6), Worker(5, 6)),
        (array(3, 0, 7, 8), Worker(3, 8)),
        (array(3, 1, 8, 8), Worker(2, 8)),
        (array(14, 2, 18, 5, step=4), Worker(3, 5)),
        (array(5, 5, 5, 1), Worker(0, 1)),  # one task that is submitted again takes what is left
        (kubernetes(6, 8), Worker(6, 8)),
        ({**array(1, 0, 2, 3), **srun(1, 2)}, Worker(3, 6)),
        ({**array(1, 0, 2, 3), **torchrun(3, 4), **srun(0, 1)}, Worker(7, 12)),  # torchrun started by srun
        ({**kubernetes(1, 2), **torchrun(1, 2)}, Worker(3, 4)),
        ({"JOB_COMPLETION_INDEX": "1", **torchrun(5, 8)}, Worker(5, 8)),  # one torchrun over all pods
        ({**array(1, 0, 2, 3), "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Worker(1, 3)),  # a batch script, without srun
    ],
)
def test_launchers_are_found(environ: dict[str, str], worker: Worker) -> None:
    assert parse_worker("auto", environ=environ) == worker


@pytest.mark.parametrize(
    "jobs", [[{}], [array(i, 10, 14, 3, step=2) for i in (10, 12, 14)], [kubernetes(0, 2), kubernetes(1, 2)]]
)
@pytest.mark.parametrize("start", [torchrun, srun])
def test_processes_of_jobs_share_all_units(jobs: list[dict[str, str]], start) -> None:
    found = [parse_worker("auto", environ={**job, **start(rank, 2)}) for job in jobs for rank in range(2)]
    assert sorted(unit for worker in found for unit in units_of(worker, 23)) == list(range(23))
    shared = {parse_worker("auto", tp=True, environ={**job, **start(rank, 2)}) for job in jobs for rank in range(2)}
    assert sorted(unit for worker in shared for unit in units_of(worker, 23)) == list(range(23))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "torchrun, accelerate, srun or a SLURM array, set PNLAC_WORKERS"),
        ({"JOB_COMPLETION_INDEX": "1"}, "set PNLAC_WORKERS"),
        ({"PNLAC_WORKERS": "2"}, "not JOB_COMPLETION_INDEX: give the job completionMode: Indexed"),
        ({"RANK": "1"}, "RANK is set, but not WORLD_SIZE"),
        (torchrun(4, 4), "RANK=4 is not below WORLD_SIZE=4"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', not a number"),
        (kubernetes(3, 2), "not below PNLAC_WORKERS=2"),
        (array(3, 1, 9, 3), "submit it with --array=0-2"),  # --array=1,3,9
        (array(4, 2, 8, 2, step=3), "submit it with --array=0-1"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN is not set"),
    ],
)
def test_missing_or_contradictory_variables_are_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_worker("auto", environ=environ)


@pytest.mark.parametrize(
    ("environ", "gpus", "device"),
    [
        ({}, 8, "auto"),
        ({"LOCAL_RANK": "3"}, 0, "auto"),
        ({"LOCAL_RANK": "3"}, 8, "cuda:3"),
        ({"SLURM_LOCALID": "3"}, 8, "cuda:3"),
        ({"SLURM_LOCALID": "3"}, 1, "cuda:0"),  # srun --gpus-per-task shows each its own
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "0"}, 2, "cuda:1"),
    ],
)
def test_each_process_takes_a_gpu_of_its_machine(monkeypatch, environ: dict[str, str], gpus: int, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert local_device(environ) == device


def test_examples_are_true() -> None:
    assert doctest.testmod(workers) == (0, 4)
