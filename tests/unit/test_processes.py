"""Processes end with whoever started them, however that happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from pnlac_fast.errors import Interrupted
from pnlac_fast.processes import pool

folder = Path(sys.argv[1])

def begin(where):
    globals()["folder"] = Path(where)

def task(number):
    (folder / f"{number}-{os.getpid()}").touch()
    if number < 2:
        time.sleep(600)
    elif number == 9:
        os._exit(1)
    return number

def stop(*_):
    raise KeyboardInterrupt

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    try:
        with pool(2, begin, (str(folder),)) as shared:
            for number in shared(task, map(int, sys.argv[2:])):
                print(number, flush=True)
    except KeyboardInterrupt:
        sys.exit(4)
    except Interrupted as error:
        print(error)
        sys.exit(5)
"""


def start(folder: Path, *tasks: int) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    (folder / "begun").mkdir()
    command = [sys.executable, str(script), str(folder / "begun"), *map(str, tasks)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def begun(folder: Path, count: int, run: subprocess.Popen[str]) -> list[int]:
    """Ids of the processes that have begun a task, once there are so many."""
    while len(found := list((folder / "begun").iterdir())) < count:
        assert run.poll() is None
        time.sleep(0.02)
    return [int(file.name.partition("-")[2]) for file in found]


@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_them_at_once(number: signal.Signals, everyone: bool, tmp_path: Path) -> None:
    """To the first process alone, as from a scheduler, or to all of them, as from a terminal; and again."""
    with start(tmp_path, 0, 1) as run:
        children = begun(tmp_path, 2, run)
        for _ in range(2):
            os.killpg(run.pid, number) if everyone else run.send_signal(number)
            time.sleep(0.05)
        _, said = run.communicate(timeout=120)
    assert run.returncode in (4, -number, 130), said  # a second signal may come as it ends
    assert not any(psutil.pid_exists(child) for child in children)


def test_one_signal_is_answered_without_a_traceback(tmp_path: Path) -> None:
    with start(tmp_path, 0, 1) as run:
        children = begun(tmp_path, 2, run)
        os.killpg(run.pid, signal.SIGINT)
        _, said = run.communicate(timeout=120)
    assert (run.returncode, said) == (4, "")
    assert not any(psutil.pid_exists(child) for child in children)


def test_one_that_ends_by_itself_is_said(tmp_path: Path) -> None:
    with start(tmp_path, 3, 4, 0, 9) as run:
        out, said = run.communicate(timeout=120)
    assert run.returncode == 5, said
    assert out.splitlines()[:2] == ["3", "4"]
    assert "fewer --jobs" in out
    assert "Traceback" not in said
