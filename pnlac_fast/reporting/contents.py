"""What a store holds that a report can show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xarray as xr

from pnlac_fast import store as stores
from pnlac_fast.errors import UserError


@dataclass(frozen=True)
class Contents:
    """The parts of a store, None or absent where a command has not been run yet.

    Attributes
    ----------
    name
        File name of the store.
    info
        What :func:`pnlac_fast.store.info` says of it.
    contrast
        (model, topic, site, tokens, layer, neuron), statistics of base and tuned.
    sets
        ``member`` bool (neuron_set, layer, neuron).
    results
        Those that exist, by name.
    keys
        Keys of the questions that the statistics were read on.
    """

    name: str
    info: Mapping[str, Any]
    contrast: xr.Dataset | None = None
    sets: xr.Dataset | None = None
    results: Mapping[str, xr.Dataset] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()


def read_contents(path: str | Path) -> Contents:
    """Open every part of a store that a report shows; statistics stay on disk until they are drawn.

    Raises
    ------
    UserError
        The store holds nothing to report.
    pnlac_fast.store.StoreError
        There is no readable store at ``path``.
    """
    info = stores.info(path)
    contrast = stores.open_contrast(path) if info.get("models") and info.get("complete", True) else None
    contents = Contents(
        name=Path(path).name,
        info=info,
        contrast=contrast,
        sets=stores.open_sets(path) if info.get("neuron_sets") else None,
        results={name: stores.open_result(path, name) for name in stores.list_results(path)},
        keys=frozenset(map(str, stores.open_examples(path)["key"].values)) if contrast is not None else frozenset(),
    )
    if contents.contrast is None and contents.sets is None and not contents.results:
        raise UserError(f"The store '{path}' has nothing to report yet: run pnlac-fast cache or score on it first.")
    return contents
