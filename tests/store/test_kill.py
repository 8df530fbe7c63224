"""SIGKILL at any moment: what was acknowledged is there, whole, and nothing else counts.

A long run (PNLAC_LONG_TESTS) kills 200 times.
"""

import json
import os
import random
import runpy
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from pnlac_fast.store import StoreError, info, merge, open_activations, open_contrast, verify
from pnlac_fast.store.journal import read_journal
from pnlac_fast.store.places import place_of

SCRIPT = Path(__file__).with_name("kill_loop.py")
KILLS, UNITS = 200 if os.environ.get("PNLAC_LONG_TESTS") else 30, 16


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_loop(tmp_path, tree, workers):
    loop = runpy.run_path(str(SCRIPT))
    loop["write"](tmp_path / "undisturbed.zarr", lambda unit: None)
    want = tree(tmp_path / "undisturbed.zarr")
    rows = [loop["unit_of"](unit)[4]["m", "s"] for unit in range(UNITS)]
    kills, stores, rng = 0, 0, random.Random(workers)
    while kills < KILLS:  # a store is soon whole, so it takes several
        path, acknowledged, finished, lives = tmp_path / f"{stores}.zarr", set(), False, 0
        stores += 1
        with ExitStack() as opened:
            processes = [opened.enter_context(start(path, worker, workers)) for worker in range(workers)]
            while not finished:
                lives += 1
                for process in processes:
                    print(*choose(rng, lives, kills), file=process.stdin, flush=True)
                answers = [json.loads(process.stdout.readline()) for process in processes]
                assert not any(answer["failed"] for answer in answers)
                told = [unit for answer in answers for unit in answer["acknowledged"]]
                assert len(set(told)) == len(told)
                assert acknowledged.isdisjoint(told)  # exactly once
                acknowledged.update(told)
                finished = all(answer["finished"] for answer in answers)
                kills += sum(not answer["finished"] for answer in answers)
                acknowledged = look(path, loop["LAYOUT"], acknowledged, rows, workers)
            for process in processes:
                process.stdin.close()
        if workers > 1:
            merge(path)
        assert {name: content for name, content in tree(path).items() if not name.endswith(".partial")} == want
        assert open_contrast(path)["n"].values.tolist() == [[24], [24]]
        assert {finding.kind for finding in verify(path)} <= {"leftover"}
    assert kills >= KILLS


def start(path, worker, workers):
    command = [sys.executable, str(SCRIPT), str(path), str(worker), str(workers)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def choose(rng, lives, kills):
    """Return after how many events and seconds a life ends: while the store is made, or around its first commits."""
    if lives <= 3:
        return 0, rng.uniform(0, 0.1)
    if kills < KILLS and lives < 20:
        return rng.choice((1, 1, 2)), rng.uniform(0, 0.006)
    return UNITS + 2, 0


def look(path, layout, acknowledged, rows, workers):
    """Compare what readers see with what was acknowledged; return the units that are committed."""
    try:
        done = info(path)["units_done"]
    except StoreError:
        assert not acknowledged
        return acknowledged
    committed = {record.unit for record in read_journal(place_of(path), layout)}
    assert len(committed) == done
    assert acknowledged <= committed
    assert len(committed - acknowledged) <= workers  # killed before they could say so
    assert {finding.kind for finding in verify(path)} <= {"leftover"}
    if committed:
        seen = open_activations(path, "m", "s")["activation"].values
        np.testing.assert_array_equal(seen, np.concatenate([rows[unit] for unit in sorted(committed)], 1))
    return committed
