"""Add units to a store, each exactly once whatever happens in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pnlac_fast.store.checks import check_files, check_rows, check_sums
from pnlac_fast.store.errors import StoreError, writing
from pnlac_fast.store.journal import Files, commit_unit, done_units, read_journal, unit_key
from pnlac_fast.store.layout import SELECTORS, Layout
from pnlac_fast.store.merging import merge_units
from pnlac_fast.store.places import Bytes, Place
from pnlac_fast.store.schema import (
    PARTIALS,
    TOKEN_COLUMNS,
    TOKENS,
    activations_path,
    partials_grid,
    partials_path,
    raw_grid,
    slots_of,
)
from pnlac_fast.store.shards import encode_chunk, shard_pieces

File: TypeAlias = tuple[str, Iterable[Bytes]]


class Writer:
    """The one writer of a store, or of a worker's units; `open_writer` makes it. As a context manager it closes itself.

    Attributes
    ----------
    place : Place
        Where the store is.
    layout : Layout
        The store's layout.
    """

    def __init__(
        self,
        place: Place,
        layout: Layout,
        topics: Sequence[str],
        worker: tuple[int, int],
        part: int,
        held: ExitStack,
    ) -> None:
        self.place, self.layout = place, layout
        self._topics, self._worker, self._part, self._held = topics, worker, part, held
        self._closed = False
        self._tried: set[int] = set()  # an attempt that failed may have left its line
        try:
            sizes = place.sizes()
            committed = read_journal(place, layout, sizes)
            check_files(place, layout, committed, sizes)
        except BaseException:
            held.close()
            raise
        self._done = done_units(committed, layout)
        self._own = {record.unit for record in committed if record.part == part}

    @property
    def pending(self) -> tuple[int, ...]:
        """The units of this worker that are not committed, in order."""
        worker, workers = self._worker
        return tuple(unit for unit in range(worker, len(self.layout.units), workers) if unit not in self._done)

    def commit(
        self,
        unit: int,
        counts: npt.NDArray[np.int64],
        base: Mapping[str, npt.NDArray[np.float64]],
        tuned: Mapping[str, npt.NDArray[np.float64]],
        rows: Mapping[str, npt.NDArray[np.int32]] | None = None,
        raw: Mapping[tuple[str, str], npt.NDArray[Any]] | None = None,
    ) -> None:
        """Write a unit; when this returns it is on the disk and counts, and before that it does not.

        Parameters
        ----------
        unit : int
            Index of the unit in the layout; one of `pending`.
        counts : int64 array (tokens,)
            Tokens summed, by token selector.
        base : dict of site to float64 array (tokens, 2, layer, neuron)
            Sums of a and a^2, of this writer's part of the neurons.
        tuned : dict of site to float64 array (model, tokens, 3, layer, neuron)
            Sums of b, b^2 and (b - a)^2.
        rows : dict of int32 arrays (row,), optional
            What each raw row is: `example` (index into the examples), `side` (0 right, 1 left) and `completion` (index
            among those of its side; both -1 for a row of the prompt), `position` and `token_id` (both -1 for a mean
            over tokens); and `counts` (row, selector), how often each of `SELECTORS` counts it.
        raw : dict of (model or "base", site) to array (layer, row, neuron) or (row, selected), optional
            The raw activations, as `shards.to_stored` gives them.

        Raises
        ------
        StoreError
            If a sum is not finite, the disk refuses, or another writer has committed the unit; the store is then as
            before.
        ValueError
            If an array is missing or has another shape or dtype, or the unit is committed already.
        """
        if self._closed:
            raise ValueError("this writer is closed; open another one")
        if unit not in self.pending:
            raise ValueError(f"unit {unit} is committed already, does not exist or is not this worker's")
        check_sums(self.layout, unit, counts, base, tuned)
        check_rows(self.layout, unit, rows, raw, self._topics)
        if unit in self._own:  # of this unit, only another part was missing
            return self._note(unit)
        with writing(f"Unit {unit} of {self.place.name}"):
            if unit not in self._tried and self.place.read(unit_key(unit, self._part)) is not None:
                raise self._taken(unit)
            self._tried.add(unit)
            files = _write_all(self.place, self._files(unit, counts, base, tuned, rows, raw))
            self.place.sync()
            if not commit_unit(self.place, self.layout, unit, self._part, files):
                raise self._taken(unit)
        return self._note(unit)

    def _note(self, unit: int) -> None:
        self._own.add(unit)
        self._done.add(unit)

    def _taken(self, unit: int) -> StoreError:
        return StoreError(
            f"Another process has just committed unit {unit} of {self.place.name}: two of them work on the same units. "
            "Let one go on, or give every process a --worker i/n of its own with one n."
        )

    def _files(self, unit: int, counts: Any, base: Any, tuned: Any, rows: Any, raw: Any) -> Iterator[File]:
        layout = self.layout
        if self._part == 0:
            yield f"{PARTIALS}/n/c.{unit}.0", [encode_chunk(counts[None])]
        for site in layout.sites:
            first = self._part * (layout.widths[site] // layout.parts)
            for name, sums in (("base", base[site]), ("tuned", tuned[site])):
                if sums.size:
                    grid = partials_grid(layout, site, name)
                    at = (unit, *(0,) * (len(grid.shape) - 2), first)
                    yield grid.key(f"{partials_path(site)}/{name}", at), [encode_chunk(sums[None])]
        if layout.units[unit].rows:
            yield from self._raw_files(unit, rows, raw)

    def _raw_files(self, unit: int, rows: Any, raw: Any) -> Iterator[File]:
        layout, slot = self.layout, slots_of(self.layout).rows
        count = layout.units[unit].rows
        if self._part == 0:
            for column in TOKEN_COLUMNS:
                padded = np.full(slot, -1, np.int32)
                padded[:count] = rows[column]
                yield f"{TOKENS}/{column}/c.{unit}", [encode_chunk(padded)]
            often = np.zeros((slot, len(SELECTORS)), np.int32)
            often[:count] = rows["counts"]
            yield f"{TOKENS}/counts/c.{unit}.0", [encode_chunk(often)]
        for (model, site), values in raw.items():
            grid, path = raw_grid(layout, site), f"{activations_path(model, site)}/activation"
            if layout.raw.neurons:
                pieces = shard_pieces(values, grid.file, grid.chunk, layout.raw.dtype)
                yield grid.key(path, (unit * slot, 0)), pieces
                continue
            first = self._part * (layout.widths[site] // layout.parts)
            for layer in range(0, len(values), grid.file[0]):
                block = values[layer : layer + grid.file[0]]
                key = grid.key(path, (layer, unit * slot, first))
                yield key, shard_pieces(block, grid.file, grid.chunk, layout.raw.dtype)

    def finish(self) -> None:
        """Add up the units and write /contrast; where that is done already, only make sure that it can be seen.

        Raises
        ------
        StoreError
            If units are missing, or a committed unit's files are damaged.
        """
        if self._closed:
            raise ValueError("this writer is closed; open another one")
        merge_units(self.place, self.layout)

    def close(self) -> None:
        """Give the right to write back; closing twice does nothing."""
        self._closed = True
        self._held.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write_all(place: Place, files: Iterable[File]) -> Files:
    """Write files, as many at a time as the place takes; they are encoded piece by piece while they are written."""
    if place.threads == 1:
        return {key: place.write(key, pieces) for key, pieces in files}
    with ThreadPoolExecutor(place.threads) as pool:
        waiting = [(key, pool.submit(place.write, key, pieces)) for key, pieces in files]
        return {key: future.result() for key, future in waiting}
