"""From the units of all workers to one result."""

from __future__ import annotations

from collections.abc import Iterable

from pnlac_fast.store.checks import check_files
from pnlac_fast.store.contrast import contrast_files
from pnlac_fast.store.errors import StoreError, writing
from pnlac_fast.store.groups import consolidate, replace_group
from pnlac_fast.store.journal import done_units, group_key, read_journal
from pnlac_fast.store.layout import Layout
from pnlac_fast.store.places import Location, Place, place_of
from pnlac_fast.store.schema import CONTRAST, capture_layout, read_header


def merge(path: Location) -> dict[str, int]:
    """Add up the units that workers have committed, and write the statistics.

    Parameters
    ----------
    path : str, PathLike or zarr Store
        The store.

    Returns
    -------
    dict
        ``units``, how many were added up.

    Raises
    ------
    StoreError
        If units are missing (the message lists them), or a committed unit's files are damaged.
    """
    place = place_of(path)
    layout = capture_layout(place)
    merge_units(place, layout)
    return {"units": len(layout.units)}


def merge_units(place: Place, layout: Layout) -> None:
    """Do what `merge` does, where place and layout are known."""
    sizes = place.sizes()
    committed = read_journal(place, layout, sizes)
    done = done_units(committed, layout)
    missing = [unit for unit in range(len(layout.units)) if unit not in done]
    if missing:
        raise StoreError(
            f"{len(missing)} of {len(layout.units)} units are missing from {place.name} ({_ranges(missing)}); "
            "run the same cache command again, with any number of workers."
        )
    check_files(place, layout, committed, sizes)
    with writing(f"The statistics of {place.name}"), place.changing():
        if place.read(group_key(CONTRAST)) is None:
            replace_group(place, CONTRAST, contrast_files(place.store, layout))
        else:
            consolidate(place, read_header(place).attributes)


def _ranges(units: Iterable[int]) -> str:
    """Return numbers as text: ``0-3, 7, 9-10``."""
    runs: list[list[int]] = []
    for unit in units:
        if runs and unit == runs[-1][1] + 1:
            runs[-1][1] = unit
        else:
            runs.append([unit, unit])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
