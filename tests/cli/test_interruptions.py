"""Ctrl-C and signals: exit code 4, one sentence, and the same command goes on to the same result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typed import MEND, STOPPED, refused

from pnlac_fast import store as stores


def test_ctrl_c_in_the_middle_of_cache(cli, cache, world: Path, tmp_path: Path, monkeypatch) -> None:
    real, calls = stores.Writer.commit, []

    def interrupted(self: Any, unit: int, *args: Any, **kwargs: Any) -> Any:
        calls.append(unit)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, unit, *args, **kwargs)

    cache += ["--tokens", "last,prompt", "--unit-tokens", 20]
    monkeypatch.setattr(stores.Writer, "commit", interrupted)
    refused(cli(*cache), STOPPED, "same command again", "s.zarr")
    held = cli("info", tmp_path / "s.zarr", "--json").json
    assert (held["complete"], held["units_done"]) == (False, 2)
    refused(cli("locate", tmp_path / "s.zarr"), MEND, "unfinished: 2 of", "same cache command again")
    assert cli(*cache).code == 0
    assert len(calls) == held["units_total"] + 1
    equal(tmp_path / "s.zarr", world / "run.zarr")


def test_ctrl_c_anywhere_else(cli, base, tuned, monkeypatch) -> None:
    from pnlac_fast import scoring

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "margins", interrupted)
    refused(cli("score", *base, *tuned), STOPPED, "Stopped", "same command again")


def test_ctrl_c_in_the_middle_of_the_demo(cli, tmp_path: Path, monkeypatch) -> None:
    import pnlac_fast.demonstration as demonstration

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demonstration.testbed, "build", interrupted)
    for _ in range(2):  # the same command again is not refused for what the first has left
        refused(cli("demo", "--out", tmp_path / "d"), STOPPED, "Stopped", "same command again")
    refused(cli("demo", "--out", tmp_path / "d", "--seed", 1), MEND, "exists already", "--overwrite")
    (tmp_path / "d" / demonstration.UNFINISHED).unlink()
    refused(cli("demo", "--out", tmp_path / "d"), MEND, "exists already", "--overwrite")


def test_ctrl_c_in_the_middle_of_a_finetune(cli, base, tmp_path: Path, monkeypatch) -> None:
    from pnlac_fast.trajectory import Trajectory

    data = ["--model", base[1], "--data", base[3], "--topic", "race", "--side", "left", "--limit", 3]
    probe = tmp_path / "probe.jsonl"
    probe.write_text('{"topic": "race", "instruction": "good law ?", "right": "good", "left": "bad"}\n')
    asked = ["finetune", *data, "--steps", 6, "--save-steps", 2, "--probe", probe, "--points", 4]
    assert cli(*asked, "--out", tmp_path / "whole").code == 0
    real: Callable[..., None] = Trajectory.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(Trajectory, "on_step_end", interrupted)
    refused(cli(*asked, "--out", tmp_path / "broken"), STOPPED, "step 5 of 6", "goes on from step 4")
    assert not (tmp_path / "broken").exists()
    monkeypatch.setattr(Trajectory, "on_step_end", real)
    refused(cli(*asked, "--out", tmp_path / "broken", "--seed", 1), MEND, "other settings (seed)", "--overwrite")
    assert cli(*asked, "--out", tmp_path / "broken").code == 0
    whole, broken = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert (tmp_path / "whole" / "trajectory.json").read_text() == (tmp_path / "broken" / "trajectory.json").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cache_and_the_same_command_goes_on(
    cli, base, tuned, world: Path, tmp_path: Path, number: signal.Signals
) -> None:
    rows = [{"topic": t, "instruction": f"law {'good ' * (i % 40)}?"} for t in ("race", "economy") for i in range(800)]
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    out = tmp_path / "s.zarr"
    options = ["cache", *base[:2], "--data", tmp_path / "many.jsonl", *tuned, "--unit-tokens", 60]
    command = [sys.executable, "-m", "pnlac_fast.cli", *map(str, options), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell starts what it puts into the background deaf to SIGINT, and that is inherited.
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, **pipes, env=environment, preexec_fn=heard) as run:
        deadline = time.monotonic() + 60
        while run.poll() is None and time.monotonic() < deadline and not committed(out):
            time.sleep(0.02)
        run.send_signal(number)
        printed, err = run.communicate(timeout=30)
    assert run.returncode == STOPPED, err
    assert printed == ""
    assert err.strip() == f"Error: Stopped. Run the same command again to go on with '{out}'."
    held = stores.info(out)
    assert 0 < held["units_done"] < held["units_total"]
    assert cli(*options, "--out", out).code == 0
    assert cli(*options, "--out", tmp_path / "whole.zarr").code == 0
    equal(out, tmp_path / "whole.zarr")


def committed(store: Path) -> bool:
    try:
        return bool(stores.info(store)["units_done"])
    except stores.StoreError:
        return False


def equal(store: Path, other: Path) -> None:
    """Two stores hold the same statistics, up to how sums were cut into units."""
    mine, theirs = stores.open_contrast(store), stores.open_contrast(other)
    assert np.array_equal(mine["n"], theirs["n"])
    for name in ("mean_base", "std_tuned", "rms"):
        assert np.allclose(mine[name].values, theirs[name].values, rtol=1e-5, atol=1e-6, equal_nan=True), name
