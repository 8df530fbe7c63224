"""Read parts of an array in shards: only the inner chunks that are needed, and each of them checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pnlac_fast.store.decoding import decode_chunk, read_index
from pnlac_fast.store.errors import ShardError
from pnlac_fast.store.files import Files, Part
from pnlac_fast.store.sharding import Sharding
from pnlac_fast.store.shards import LEFT_OUT, from_stored

Positions = range | npt.NDArray[np.intp]
Place = tuple[int, ...]


class _Run(NamedTuple):
    """What one chunk has of a selection along one dimension: the chunk, where in it, and where in the result."""

    chunk: int
    inside: slice | npt.NDArray[np.intp]
    result: slice


class _Piece(NamedTuple):
    """A chunk of a shard that is needed, and what of it goes where."""

    key: str
    place: Place
    start: int
    length: int
    runs: tuple[_Run, ...]

    @property
    def part(self) -> Part:
        return Part(self.key, self.start, self.length)


def read_region(
    files: Files,
    sharding: Sharding,
    selection: Sequence[int | slice | npt.NDArray[Any]],
    *,
    array: str,
    missing_as_fill: bool = False,
) -> npt.NDArray[Any]:
    """Read a part of an array.

    Parameters
    ----------
    files : Files
        Where its shards are.
    sharding : Sharding
        What its metadata says.
    selection : sequence of int, slice or one-dimensional array of int
        One for each dimension, independent of each other; an int drops its dimension.
    array : str
        What to call the array in errors.
    missing_as_fill : bool
        Take a shard that is not there for NaN.

    Returns
    -------
    array
        float32; float16 where that is stored. Chunks that were left out are NaN.

    Raises
    ------
    ShardError
        A shard is missing, cut off, or has another checksum than it should.
    IndexError
        A position is outside the array.
    """
    axes = [_positions(chosen, size) for chosen, size in zip(selection, sharding.shape, strict=True)]
    numbers = np.empty([len(positions) for positions, _ in axes], sharding.read_dtype)
    if numbers.size:
        runs = [list(_runs(positions, length)) for (positions, _), length in zip(axes, sharding.chunk, strict=True)]
        pieces = list(_pieces(files, sharding, itertools.product(*runs), numbers, array, missing_as_fill))
        for piece, content in zip(pieces, files.read(piece.part for piece in pieces), strict=True):
            where = f"chunk {piece.place}"
            if content is None or content.size != piece.length:
                raise ShardError(array, piece.key, f"it ends before {where}")
            values = _select(
                decode_chunk(content, sharding, array, piece.key, where), [run.inside for run in piece.runs]
            )
            numbers[tuple(run.result for run in piece.runs)] = from_stored(values)
    for axis, (_, order) in enumerate(axes):
        if order is not None:
            numbers = numbers.take(order, axis)
    return numbers.reshape([n for n, chosen in zip(numbers.shape, selection, strict=True) if not _is_int(chosen)])


def _pieces(
    files: Files,
    sharding: Sharding,
    wanted: Iterable[tuple[_Run, ...]],
    numbers: npt.NDArray[Any],
    array: str,
    missing_as_fill: bool,
) -> Iterator[_Piece]:
    """Look up where the chunks are, shard by shard in the order of the file; those left out are filled at once."""
    grid = sharding.grid
    shards: dict[Place, list[tuple[_Run, ...]]] = {}
    for runs in wanted:
        shard = tuple(run.chunk // count for run, count in zip(runs, grid, strict=True))
        shards.setdefault(shard, []).append(runs)
    keys = [sharding.key(shard) for shard in shards]
    tails = files.read(Part(key, None, sharding.index_bytes) for key in keys)
    for key, inside, tail in zip(keys, shards.values(), tails, strict=True):
        if tail is None and not missing_as_fill:
            raise ShardError(array, key, "it is missing")
        index = None if tail is None else read_index(tail, sharding, array, key)
        found = []
        for runs in inside:
            place = tuple(run.chunk % count for run, count in zip(runs, grid, strict=True))
            start, length = (LEFT_OUT, LEFT_OUT) if index is None else map(int, index[place])
            if start == length == LEFT_OUT:
                numbers[tuple(run.result for run in runs)] = np.nan
            else:
                found.append(_Piece(key, place, start, length, runs))
        yield from sorted(found, key=lambda piece: piece.start)


def _select(values: npt.NDArray[Any], inside: list[slice | npt.NDArray[np.intp]]) -> npt.NDArray[Any]:
    values = values[tuple(own if isinstance(own, slice) else slice(None) for own in inside)]
    for axis, own in enumerate(inside):
        if not isinstance(own, slice):
            values = values.take(own, axis)
    return values


def _is_int(chosen: Any) -> bool:
    return not isinstance(chosen, slice) and np.ndim(chosen) == 0


def _positions(chosen: Any, size: int) -> tuple[Positions, Any]:
    """Return ascending positions, and which of them makes up each place of the result (None: they are in order)."""
    if isinstance(chosen, slice):
        positions = range(*chosen.indices(size))
        return (positions, None) if positions.step > 0 else (positions[::-1], np.arange(len(positions))[::-1])
    given = np.asarray(chosen)
    if given.ndim > 1 or given.dtype.kind not in "iu":
        raise IndexError(f"positions are whole numbers along one dimension, not {given.dtype} of shape {given.shape}")
    given = given.astype(np.intp)
    if given.size and not (given.min() >= -size and given.max() < size):
        raise IndexError(f"positions {given.min()} to {given.max()} are not all within a dimension of {size}")
    absolute = np.where(given < 0, given + size, given)
    if absolute.ndim == 0:
        return range(int(absolute), int(absolute) + 1), None
    if (np.diff(absolute) >= 0).all():
        return absolute, None
    return np.unique(absolute, return_inverse=True)


def _runs(positions: Positions, length: int) -> Iterator[_Run]:
    """Cut ascending positions where chunks of `length` end."""
    if isinstance(positions, range):
        for chunk in range(positions[0] // length, positions[-1] // length + 1):
            first = max(0, -(-(chunk * length - positions.start) // positions.step))
            stop = min(len(positions), -(-((chunk + 1) * length - positions.start) // positions.step))
            if first < stop:
                own = positions[first:stop]
                inside = slice(own[0] - chunk * length, own[-1] - chunk * length + 1, own.step)
                yield _Run(chunk, inside, slice(first, stop))
        return
    chunks, starts = np.unique(positions // length, return_index=True)
    for chunk, first, stop in zip(
        chunks.tolist(), starts.tolist(), [*starts[1:].tolist(), len(positions)], strict=True
    ):
        yield _Run(chunk, positions[first:stop] - chunk * length, slice(first, stop))
