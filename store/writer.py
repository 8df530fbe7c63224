"""Add units to a store, each exactly once whatever happens in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from pnlac_fast.store.checks import check_files, check_rows, check_sums
from pnlac_fast.store.contrast import write_contrast
from pnlac_fast.store.durable import DurableStore
from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.groups import consolidate, replace_group
from pnlac_fast.store.journal import Journal
from pnlac_fast.store.layout import Layout
from pnlac_fast.store.locks import changing_groups
from pnlac_fast.store.schema import (
    CONTRAST,
    PARTIALS,
    TOKEN_COLUMNS,
    TOKENS,
    activations_path,
    open_array,
    partials_path,
    slots_of,
)


class Writer:
    """The one writer of a store; `open_writer` makes it. It is a context manager that gives the lock back.

    Attributes
    ----------
    path : Path
        The store's directory.
    layout : Layout
        The store's layout.
    """

    def __init__(self, root: Path, layout: Layout, journal: Journal, topics: Sequence[str]) -> None:
        self.path, self.layout = root, layout
        self._journal, self._topics = journal, topics
        self._store = DurableStore(root)
        self._arrays: dict[str, zarr.Array[Any]] = {}
        committed = journal.committed(layout)
        check_files(root, layout, committed)
        self._done = {record.unit for record in committed}

    @property
    def pending(self) -> tuple[int, ...]:
        """The units that are not committed, in order."""
        return tuple(unit for unit in range(len(self.layout.units)) if unit not in self._done)

    def commit(
        self,
        unit: int,
        counts: npt.NDArray[np.int64],
        base: Mapping[str, npt.NDArray[np.float64]],
        tuned: Mapping[str, npt.NDArray[np.float64]],
        rows: Mapping[str, npt.NDArray[np.int32]] | None = None,
        raw: Mapping[tuple[str, str], npt.NDArray[np.float32]] | None = None,
    ) -> None:
        """Write a unit; when this returns it is on the disk and counts, and before that it does not.

        Parameters
        ----------
        unit : int
            Index of the unit in the layout; one of `pending`.
        counts : int64 array (tokens,)
            Tokens summed, by token selector.
        base : dict of site to float64 array (tokens, 2, layer, neuron)
            Sums of a and a^2.
        tuned : dict of site to float64 array (model, tokens, 3, layer, neuron)
            Sums of b, b^2 and (b - a)^2.
        rows : dict of int32 arrays (row,), optional
            `example` (index into the examples), `position` and `token_id` of each raw row.
        raw : dict of (model or "base", site) to float32 array (layer, row, neuron), optional
            The raw activations.

        Raises
        ------
        StoreError
            If a sum or an activation is not finite, or the disk refuses; the store is then as before.
        ValueError
            If an array is missing or has another shape or dtype, or the unit is committed already.
        """
        self._check_open()
        if unit not in self.pending:
            raise ValueError(f"unit {unit} is committed already or does not exist")
        check_sums(self.layout, unit, counts, base, tuned)
        check_rows(self.layout, unit, rows, raw, self._topics)
        try:
            self._store.written.clear()
            self._write(unit, counts, base, tuned, rows, raw)
            self._journal.commit(unit, self._store.flush())
        except OSError as error:
            raise StoreError(
                f"Unit {unit} could not be written to {self.path} ({error.strerror}); "
                "make room or mend the disk, and run the same command again: nothing is lost."
            ) from error
        self._done.add(unit)

    def _write(self, unit: int, counts: Any, base: Any, tuned: Any, rows: Any, raw: Any) -> None:
        self._array(f"{PARTIALS}/n")[unit] = counts
        for site in self.layout.sites:
            self._array(f"{partials_path(site)}/base")[unit] = base[site]
            if self.layout.models:
                self._array(f"{partials_path(site)}/tuned")[unit] = tuned[site]
        count = self.layout.units[unit].rows
        if not count:
            return
        slot = slots_of(self.layout).rows
        own = slice(unit * slot, (unit + 1) * slot)
        for column in TOKEN_COLUMNS:
            padded = np.full(slot, -1, np.int32)
            padded[:count] = rows[column]
            self._array(f"{TOKENS}/{column}")[own] = padded
        for (model, site), values in raw.items():
            array = self._array(f"{activations_path(model, site)}/activation")
            assert array.shards is not None
            for first in range(0, self.layout.layers, array.shards[0]):
                layers = slice(first, min(first + array.shards[0], self.layout.layers))
                whole = np.full((layers.stop - first, slot, values.shape[2]), np.nan, np.float32)
                whole[:, :count] = values[layers]
                array[layers, own] = whole

    def _array(self, path: str) -> zarr.Array[Any]:
        if path not in self._arrays:
            self._arrays[path] = open_array(self._store, path)
        return self._arrays[path]

    def finish(self) -> None:
        """Add up the units and write /contrast; where that is done already, only make sure that it can be seen.

        Raises
        ------
        StoreError
            If units are missing, or a committed unit's files are damaged.
        """
        self._check_open()
        missing = self.pending
        if missing:
            listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            raise StoreError(
                f"{len(missing)} of {len(self.layout.units)} units are missing from {self.path} ({listed}); "
                "run the same cache command again."
            )
        check_files(self.path, self.layout, self._journal.committed(self.layout))
        with changing_groups(self.path):
            if (self.path / CONTRAST).exists():
                consolidate(self.path)
            else:
                replace_group(self.path, CONTRAST, lambda new: write_contrast(self._store, new, self.layout))

    def _check_open(self) -> None:
        if self._journal.closed:
            raise ValueError("this writer is closed; open another one")

    def close(self) -> None:
        """Give the lock back."""
        self._journal.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
