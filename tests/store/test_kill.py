"""SIGKILL at any moment: what was acknowledged is there, whole, and nothing else counts."""

import json
import random
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np

from pnlac_fast.store import StoreError, info, open_activations, open_contrast
from pnlac_fast.store.journal import read_journal
from pnlac_fast.store.places import place_of

SCRIPT = Path(__file__).with_name("kill_loop.py")
KILLS, UNITS = 20, 16


def test_kill_loop(tmp_path, tree):
    loop = runpy.run_path(str(SCRIPT))
    loop["write"](tmp_path / "undisturbed.zarr", lambda unit: None)
    want = tree(tmp_path / "undisturbed.zarr" / "contrast")
    rows = [loop["unit_of"](unit)[4]["m", "s"] for unit in range(UNITS)]
    path, acknowledged, kills, rng = tmp_path / "killed.zarr", set(), 0, random.Random(0)
    command = [sys.executable, str(SCRIPT), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while True:
            if kills < KILLS // 4:
                life = 0, rng.uniform(0, 0.1)  # dies while the store is made
            elif kills < KILLS:
                life = rng.choice((1, 1, 2)), rng.uniform(0, 0.006)  # dies around its first commits
            else:
                life = UNITS + 2, 0
            process.stdin.write("{} {}\n".format(*life))
            process.stdin.flush()
            life = json.loads(process.stdout.readline())
            assert not life["failed"]
            assert acknowledged.isdisjoint(life["acknowledged"])  # exactly once
            acknowledged.update(life["acknowledged"])
            if life["finished"]:
                break
            kills += 1
            try:
                done = info(path)["units_done"]
            except StoreError:
                assert not acknowledged
                continue
            assert len(acknowledged) <= done
            acknowledged = committed_of(path, loop["LAYOUT"], acknowledged)
            if acknowledged:
                seen = open_activations(path, "m", "s")["activation"].values
                np.testing.assert_array_equal(seen, np.concatenate([rows[unit] for unit in sorted(acknowledged)], 1))
        process.stdin.close()
    assert kills >= KILLS // 2
    assert tree(path / "contrast") == want
    assert open_contrast(path)["n"].values.tolist() == [[24], [24]]
    assert not list(path.rglob("*.partial"))


def committed_of(path, layout, acknowledged):
    """Return the committed units: those acknowledged, and at most one that was killed before it could say so."""
    committed = {record.unit for record in read_journal(place_of(path), layout)}
    assert acknowledged <= committed
    assert len(committed - acknowledged) <= 1
    return committed
