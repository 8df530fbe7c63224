"""Which files a unit writes."""

from __future__ import annotations

from collections.abc import Iterator

from pnlac_fast.store.layout import BASE, Layout
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


def unit_files(layout: Layout, unit: int, part: int) -> Iterator[str]:
    """Yield the keys of the files that a part of a unit consists of; they follow from the layout."""
    if part == 0:
        yield f"{PARTIALS}/n/c.{unit}.0"
    for site, width in layout.widths.items():
        for name in ("base", "tuned") if layout.models else ("base",):
            grid = partials_grid(layout, site, name)
            at = (unit, *(0,) * (len(grid.shape) - 2), part * (width // layout.parts))
            yield grid.key(f"{partials_path(site)}/{name}", at)
    if not layout.units[unit].rows:
        return
    if part == 0:
        yield from (f"{TOKENS}/{column}/c.{unit}" for column in TOKEN_COLUMNS)
        yield f"{TOKENS}/counts/c.{unit}.0"
    first = unit * slots_of(layout).rows
    for site, width in layout.widths.items():
        grid = raw_grid(layout, site)
        places: list[tuple[int, ...]] = [(first, 0)]
        if not layout.raw.neurons:
            layers = range(0, len(layout.raw.layers), grid.file[0])
            places = [(layer, first, part * (width // layout.parts)) for layer in layers]
        for model in (BASE, *layout.models):
            path = f"{activations_path(model, site)}/activation"
            yield from (grid.key(path, at) for at in places)
