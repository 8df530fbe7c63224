"""Is what a unit brings what the layout asks for, and are the files of committed units still there?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.journal import Committed
from pnlac_fast.store.layout import BASE, Layout
from pnlac_fast.store.schema import TOKEN_COLUMNS


def check_sums(
    layout: Layout,
    unit: int,
    counts: npt.NDArray[Any],
    base: Mapping[str, npt.NDArray[Any]],
    tuned: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Raise ValueError where sums have the wrong shape or dtype, StoreError where they are not finite."""
    tokens, models, layers = len(layout.tokens), len(layout.models), layout.layers
    _check_array("counts", counts, (tokens,), "int64")
    if counts.min() < 0:
        raise ValueError("counts must not be negative")
    _check_keys("base", base, layout.sites)
    _check_keys("tuned", tuned, layout.sites)
    for site, width in layout.widths.items():
        _check_array(f"base[{site!r}]", base[site], (tokens, 2, layers, width), "float64")
        _check_array(f"tuned[{site!r}]", tuned[site], (models, tokens, 3, layers, width), "float64")
        _check_finite(layout, unit, "base model", site, base[site])
        for m, model in enumerate(layout.models):
            _check_finite(layout, unit, f"tuned model {model!r}", site, tuned[site][m])


def _check_finite(layout: Layout, unit: int, model: str, site: str, sums: npt.NDArray[Any]) -> None:
    if not np.isfinite(sums).all():
        layer = int(np.argwhere(~np.isfinite(sums))[:, -2].min())
        raise StoreError(
            f"The activations of the {model} at {site}, layer {layer}, are not finite in unit {unit} "
            f"({layout.units[unit]}); try another dtype such as float32, or check the model's weights."
        )


def check_rows(
    layout: Layout,
    unit: int,
    rows: Mapping[str, npt.NDArray[Any]] | None,
    raw: Mapping[tuple[str, str], npt.NDArray[Any]] | None,
    topics: Sequence[str],
) -> None:
    """Raise ValueError where raw rows are not those that the layout promised; `topics` are those of the examples."""
    count = layout.units[unit].rows
    if not count:
        if any(len(column) for column in (rows or {}).values()) or any(values.size for values in (raw or {}).values()):
            raise ValueError(f"unit {unit} brings raw rows, but its layout says that it has none")
        return
    _check_keys("rows", rows or {}, TOKEN_COLUMNS)
    _check_keys("raw", raw or {}, [(model, site) for model in (BASE, *layout.models) for site in layout.sites])
    assert rows is not None
    assert raw is not None
    for name, column in rows.items():
        _check_array(f"rows[{name!r}]", column, (count,), "int32")
    for (model, site), values in raw.items():
        _check_array(f"raw[{model!r}, {site!r}]", values, (layout.layers, count, layout.widths[site]), "float32")
    example = rows["example"]
    if example.min() < 0 or example.max() >= len(topics):
        raise ValueError(f"rows['example'] must lie between 0 and {len(topics) - 1}")
    if {topics[index] for index in example.tolist()} != {layout.units[unit].topic}:
        raise ValueError(f"unit {unit} brings rows of examples that are not of its topic")


def check_files(root: Path, layout: Layout, committed: Iterable[Committed]) -> None:
    """Raise StoreError where a file of a committed unit is missing or has another length; it names the unit."""
    for unit, files in committed:
        for name, (size, _) in files.items():
            path = root / name
            found = path.stat().st_size if path.exists() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise StoreError(
                    f"Unit {unit} ({layout.units[unit]}) is damaged: {path} {what}; "
                    "restore the file from a copy, or start again with --overwrite."
                )


def _check_keys(what: str, given: Mapping[Any, Any], wanted: Iterable[Any]) -> None:
    if set(given) != set(wanted):
        raise ValueError(f"{what} must have the keys {sorted(wanted)}, not {sorted(given)}")


def _check_array(what: str, array: npt.NDArray[Any], shape: tuple[int, ...], dtype: str) -> None:
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(f"{what} must be {dtype} {shape}, not {array.dtype} {array.shape}")
