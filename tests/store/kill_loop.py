"""Run by test_kill.py in a process of its own: writes a store in forked children, and kills each with SIGKILL.

Arguments are the store, the number of the worker, and how many there are. Each line of stdin is a number of events and
a delay in seconds: a fresh child is killed so long after so many events, the first being that the store is open and the
others commits. The answer is a JSON line: the units that the child said were committed, and whether it came to the end.
zarr starts its threads in the children only, so that forking is safe here, which it would not be in pytest's process.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np

from pnlac_fast.store import Layout, Raw, Unit, open_writer

UNITS = 16
OPENED = 255
LAYOUT = Layout(
    topics=("a", "b"),
    models=("m",),
    sites=("s",),
    tokens=("last",),
    layers=2,
    widths={"s": 300},
    units=tuple(Unit("ab"[index % 2], index, 1, 3) for index in range(UNITS)),
    raw=Raw("last", layers=(0, 1)),
    settings={},
)
EXAMPLES = {"topic": ["a", "b"], "instruction": ["?", "!"], "key": ["0", "1"]}


def unit_of(unit):
    """Return the arguments of `commit` for a unit; they follow from its index."""
    rng = np.random.default_rng(unit)
    rows = {name: np.full(3, unit % 2, np.int32) for name in ("example", "side", "completion", "position", "token_id")}
    rows["counts"] = np.zeros((3, 4), np.int32)
    raw = {(model, "s"): rng.normal(size=(2, 3, 300)).astype(np.float32) for model in ("base", "m")}
    return np.array([3]), {"s": rng.random((1, 2, 2, 300))}, {"s": rng.random((1, 1, 3, 2, 300))}, rows, raw


def write(path, acknowledge, worker=(0, 1)):
    """Go on with the store at `path` to its end; tell when it is open, and of each commit."""
    with open_writer(path, LAYOUT, provenance={}, examples=EXAMPLES, worker=worker) as writer:
        acknowledge(OPENED)
        for unit in writer.pending:
            writer.commit(unit, *unit_of(unit))
            acknowledge(unit)
        if worker == (0, 1):
            writer.finish()


def one_life(path, worker, events, delay):
    """Let a child write, kill it `delay` seconds after so many events, and return what it said."""
    read, said = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            write(path, lambda event: os.write(said, bytes([event])), worker)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(said)
    with os.fdopen(read, "rb", buffering=0) as pipe:
        heard = b""
        while len(heard) < events and (event := pipe.read(1)):
            heard += event
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        heard += pipe.read()
    return {
        "acknowledged": [event for event in heard if event != OPENED],
        "finished": status == 0,
        "failed": os.WIFEXITED(status) and status != 0,
    }


if __name__ == "__main__":
    store, worker = Path(sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3]))
    for line in sys.stdin:
        events, delay = line.split()
        print(json.dumps(one_life(store, worker, int(events), float(delay))), flush=True)
