"""The launch examples are valid for their launchers, and start commands of ours that share all units."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pnlac_fast.cli import commands
from pnlac_fast.workers import parse_worker, units_of

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"
GIVEN = {"MODEL": "base", "TUNED": "tuned/race", "DATA": "train", "OUT": "some dir/run.zarr"}
UNITS = 29
# Stands in for a program: notes its name and arguments.
STUB = """#!/bin/sh
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n'; } >> "$CALLS"
"""


def calls(script: str, folder: Path) -> list[list[str]]:
    """What a script runs of torchrun, srun and pnlac-fast, in its order."""
    for name in ("torchrun", "srun", "pnlac-fast"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    environ = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls"), **GIVEN}
    subprocess.run(["bash", LAUNCH / script], env=environ, check=True, cwd=folder, capture_output=True)
    return [line.removesuffix("\0").split("\0") for line in (folder / "calls").read_text().splitlines()]


def parsed(words: list[str]) -> dict[str, Any]:
    """The values of a command line of ours, as the command would get them; a mistake raises."""
    program, name, *arguments = words
    assert program == "pnlac-fast"
    return {"command": name, **commands.commands[name].make_context(name, arguments).params}


def comments(script: str) -> list[list[str]]:
    """The commands in the comments of a script."""
    lines = re.findall(r"^#   (.*)$", (LAUNCH / script).read_text(), flags=re.MULTILINE)
    return [shlex.split(re.sub(r"\$(\w+)", lambda m: GIVEN.get(m[1], m[1]), line), comments=True) for line in lines]


def torchrun(words: list[str]) -> list[str]:
    """What torchrun would start, by its own parser."""
    from torch.distributed.run import get_args_parser

    assert words[0] == "torchrun"
    given = get_args_parser().parse_args(words[1:])
    assert given.no_python
    assert given.standalone
    return [given.training_script, *given.training_script_args]


def covers(environments: list[dict[str, str]]) -> bool:
    """Whether the workers of these environments take every unit once."""
    workers = [parse_worker("auto", environ=environ) for environ in environments]
    return sorted(unit for worker in workers for unit in units_of(worker, UNITS)) == list(range(UNITS))


@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCH.iterdir() if p.suffix != ".yaml"))
def test_scripts_are_bash_and_say_what_they_miss(script: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    done = subprocess.run(["bash", LAUNCH / script], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 1
    assert "MODEL: a hub id or directory" in done.stderr


@pytest.mark.parametrize(
    ("script", "worker", "tp"), [("torchrun.sh", "auto", False), ("tensor_parallel.sh", "0/1", True)]
)
def test_torchrun_starts_a_process_a_gpu_and_merges(tmp_path: Path, script: str, worker: str, tp: bool) -> None:
    start, merge = calls(script, tmp_path)
    cached = parsed(torchrun(start))
    assert cached["command"] == "cache"
    assert (cached["out"], cached["worker"], cached["tp"]) == (GIVEN["OUT"], worker, tp)
    assert cached["tuned"] == {"race": "tuned/race"}
    merged = parsed(merge)
    assert (merged["command"], merged["store"]) == ("merge", GIVEN["OUT"])
    assert os.access(LAUNCH / script, os.X_OK)


def test_accelerate_starts_workers_too() -> None:
    from accelerate.commands.launch import launch_command_parser

    (words,) = comments("torchrun.sh")
    assert words[:2] == ["accelerate", "launch"]
    given = launch_command_parser().parse_args(words[2:])
    assert given.no_python
    cached = parsed([given.training_script, *given.training_script_args])
    assert (cached["command"], cached["worker"]) == ("cache", "auto")
    assert covers([{"RANK": str(i), "WORLD_SIZE": str(given.num_processes)} for i in range(given.num_processes)])


def test_tasks_of_the_slurm_array_share_all_units(tmp_path: Path) -> None:
    text = (LAUNCH / "slurm_array.sbatch").read_text()
    head = text.split("set -euo")[0]  # sbatch reads none behind the first command
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", head, flags=re.MULTILINE))
    assert len(options) == text.count("#SBATCH")
    first, last = map(int, options["array"].split("-"))
    tasks = {"MIN": first, "MAX": last, "STEP": 1, "COUNT": last - first + 1}
    array = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in tasks.items()}
    size = int(options["ntasks"])
    steps = [{"SLURM_PROCID": str(i), "SLURM_STEP_NUM_TASKS": str(size)} for i in range(size)]
    ids = [{"SLURM_ARRAY_TASK_ID": str(task)} for task in range(first, last + 1)]
    assert covers([{**array, **task, **step} for task in ids for step in steps])

    ((srun, *words),) = calls("slurm_array.sbatch", tmp_path)
    assert (srun, parsed(words)["worker"], parsed(words)["out"]) == ("srun", "auto", GIVEN["OUT"])
    export, submit, merge = comments("slurm_array.sbatch")
    assert {word.split("=")[0] for word in export[1:]} == set(GIVEN)
    assert " ".join(submit) == "cache=$(sbatch --parsable slurm_array.sbatch)"
    assert merge[:3] == ["sbatch", "--dependency=afterok:cache", "--wrap"]
    merged = parsed(shlex.split(merge[3]))
    assert (merged["command"], merged["store"]) == ("merge", GIVEN["OUT"])


def test_pods_of_the_kubernetes_job_share_all_units() -> None:
    cache, merge = yaml.safe_load_all((LAUNCH / "kubernetes_job.yaml").read_text())
    for job in (cache, merge):
        assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "OnFailure"  # else a job's pods are not run again
        (container,) = job["spec"]["template"]["spec"]["containers"]
        (volume,) = job["spec"]["template"]["spec"]["volumes"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] == volume["name"]
    spec = cache["spec"]
    assert spec["completionMode"] == "Indexed"
    (container,) = spec["template"]["spec"]["containers"]
    cached = parsed([*container["command"], *container["args"]])
    assert (cached["command"], cached["worker"]) == ("cache", "auto")
    environ = {e["name"]: e["value"] for e in container["env"]}
    assert covers([{**environ, "JOB_COMPLETION_INDEX": str(i)} for i in range(spec["completions"])])
    (container,) = merge["spec"]["template"]["spec"]["containers"]
    merged = parsed([*container["command"], *container["args"]])
    assert (merged["command"], merged["store"]) == ("merge", cached["out"])
