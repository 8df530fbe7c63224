"""Append, commit, crash, reopen with another number of workers, read, replace results: as numpy arrays say it is."""

from __future__ import annotations

import os
import runpy
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pnlac_fast.store import (
    StoreError,
    info,
    list_results,
    merge,
    open_activations,
    open_contrast,
    open_partials,
    open_result,
    verify,
    write_result,
)

here = Path(__file__)
disk = runpy.run_path(str(here.with_name("faults.py")))["disk"]
Sample = runpy.run_path(str(here.with_name("conftest.py")))["Sample"]
NAMES = ("stance", "patching")
LONG = bool(os.environ.get("PNLAC_LONG_TESTS"))


class Crash(BaseException):
    """The process dies here."""


class Store(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / "s.zarr"
        self.sample = Sample("last", models=("m",), sites=("s",), tokens=("last",), widths={"s": 4})
        self.units: set[int] = set()
        self.maybe: set[int] = set()  # a crash came while they were committed
        self.results: dict[str, list[float]] = {}  # the values that each may have
        self.writers: list = []
        self.patch = pytest.MonkeyPatch()

    def teardown(self) -> None:
        self.close()
        shutil.rmtree(self.directory)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()
        self.writers = []

    @initialize()
    def create(self) -> None:
        self.sample.open(self.path).close()

    @rule(workers=st.integers(1, 3))
    def reopen(self, workers: int) -> None:
        self.close()
        self.writers = [self.sample.open(self.path, worker=(worker, workers)) for worker in range(workers)]
        pending = {unit for writer in self.writers for unit in writer.pending}
        assert pending.isdisjoint(self.units)
        assert pending | self.units | self.maybe == set(range(6))
        self.units, self.maybe = set(range(6)) - pending, set()

    @precondition(lambda self: any(writer.pending for writer in self.writers))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from([writer for writer in self.writers if writer.pending]))
        unit = data.draw(st.sampled_from(writer.pending))
        self.sample.commit(writer, unit)
        self.units.add(unit)

    @precondition(lambda self: any(writer.pending for writer in self.writers))
    @rule(data=st.data(), call=st.integers(0, 60))
    def crash_in_commit(self, data: st.DataObject, call: int) -> None:
        writer = data.draw(st.sampled_from([writer for writer in self.writers if writer.pending]))
        unit = data.draw(st.sampled_from(writer.pending))
        if self.crashes(call, lambda: self.sample.commit(writer, unit)):
            self.maybe.add(unit)
            self.reopen(1)
        else:
            self.units.add(unit)

    @rule(name=st.sampled_from(NAMES), value=st.integers(0, 9))
    def write(self, name: str, value: int) -> None:
        write_result(self.path, name, xr.Dataset({"x": ("a", np.full(3, float(value)))}))
        self.results[name] = [float(value)]

    @rule(name=st.sampled_from(NAMES), value=st.integers(0, 9), call=st.integers(0, 40))
    def crash_in_write(self, name: str, value: int, call: int) -> None:
        ds = xr.Dataset({"x": ("a", np.full(3, float(value)))})
        if self.crashes(call, lambda: write_result(self.path, name, ds)):
            self.results[name] = [*self.results.get(name, [np.nan]), float(value)]
        else:
            self.results[name] = [float(value)]

    @rule(call=st.integers(0, 120))
    def finish(self, call: int) -> None:
        try:
            if self.crashes(call, lambda: merge(self.path)):
                merge(self.path)
        except StoreError as error:
            assert "units are missing" in str(error)  # noqa: PT017
            assert self.units != set(range(6))
            return
        assert self.units | self.maybe == set(range(6))
        self.units, self.maybe = set(range(6)), set()

    def crashes(self, call: int, action) -> bool:
        with disk(self.patch, call, Crash()):
            try:
                action()
            except Crash:
                return True
        return False

    @invariant()
    def readers_see_what_was_committed(self) -> None:
        if not self.path.exists():
            return
        seen = open_partials(self.path, "s").load()
        units = set(seen["unit"].values.tolist())
        assert self.units <= units <= self.units | self.maybe
        assert info(self.path)["units_done"] == len(units)
        for unit in units:
            counts, base, tuned = self.sample.sums(unit)
            row = seen.sel(unit=unit)
            np.testing.assert_array_equal(row["n"].values, counts)
            np.testing.assert_array_equal(row["base"].values, base["s"])
            np.testing.assert_array_equal(row["tuned"].values, tuned["s"])
        rows = [self.sample.raw(unit)[1]["m", "s"] for unit in sorted(units)]
        if rows:
            raw = open_activations(self.path, "m", "s")["activation"].values
            np.testing.assert_array_equal(raw, np.concatenate(rows, 1))
        for name in list_results(self.path):
            assert open_result(self.path, name)["x"].values[0] in self.results[name]
        for name, values in self.results.items():
            assert len(values) > 1 or name in list_results(self.path)
        damaged = [found for found in verify(self.path) if found.kind != "leftover"]
        assert not [found for found in damaged if len(self.results.get(found.owner.rpartition("/")[2], ())) < 2]
        if info(self.path)["complete"]:
            assert int(open_contrast(self.path)["n"].sum()) == sum(4 + unit for unit in range(6))


TestStore = Store.TestCase
TestStore.settings = settings(max_examples=100 if LONG else 4, stateful_step_count=12, deadline=None)
