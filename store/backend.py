"""``xr.open_dataset(path, engine="pnlac", group=...)``: a store's groups in xarray, with bfloat16 decoded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

import xarray as xr
from xarray.backends import BackendEntrypoint

from pnlac_fast.store.activations import open_activations
from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.layout import BASE
from pnlac_fast.store.names import directory_name
from pnlac_fast.store.places import Location
from pnlac_fast.store.reader import info, open_contrast, open_examples, open_partials
from pnlac_fast.store.results import open_result, open_sets
from pnlac_fast.store.schema import ACTIVATIONS, CONTRAST, EXAMPLES, NEURON_SETS, PARTIALS, RESULTS


class PnlacBackend(BackendEntrypoint):
    """The engine "pnlac".

    ``group`` is the name of a group: ``contrast`` (the default), ``examples``, ``neuron_sets``, ``partials/<site>``,
    ``activations/<model>/<site>`` or ``results/<name>``, in which models and sites may be written plainly or as their
    directories are called.
    """

    description = "Stores of pnlac-fast: statistics, raw activations, neuron sets and results"
    url = "https://arxiv.org/abs/2508.02360"

    def open_dataset(  # type: ignore[override]
        self, filename_or_obj: Location, *, drop_variables: str | Iterable[str] | None = None, group: str = CONTRAST
    ) -> xr.Dataset:
        """Open a group; StoreError names those that there are if it is not."""
        dropped = [drop_variables] if isinstance(drop_variables, str) else list(drop_variables or ())
        return _open(filename_or_obj, group).drop_vars(dropped, errors="ignore")

    def open_groups_as_dict(  # type: ignore[override]
        self, filename_or_obj: Location, *, drop_variables: str | Iterable[str] | None = None, **kwargs: Any
    ) -> dict[str, xr.Dataset]:
        """Open all groups, by their paths."""
        if kwargs:
            raise TypeError(f"the engine pnlac takes no {', '.join(kwargs)}")
        return {"/": xr.Dataset()} | {
            f"/{group}": self.open_dataset(filename_or_obj, drop_variables=drop_variables, group=group)
            for group in groups(filename_or_obj)
        }

    def open_datatree(  # type: ignore[override]
        self, filename_or_obj: Location, *, drop_variables: str | Iterable[str] | None = None, **kwargs: Any
    ) -> xr.DataTree:
        """Open all groups as a tree."""
        return xr.DataTree.from_dict(self.open_groups_as_dict(filename_or_obj, drop_variables=drop_variables, **kwargs))


def groups(path: Location) -> list[str]:
    """Return the groups that the engine opens, in the order of the format."""
    known = info(path)
    found = [f"{RESULTS}/{name}" for name in known["results"]]
    if known["neuron_sets"]:
        found.insert(0, NEURON_SETS)
    if known["kind"] != "capture":
        return found
    sites = [directory_name(site) for site in known["sites"]]
    models = [directory_name(model) for model in (BASE, *known["models"])] if known["raw"]["tokens"] != "none" else []
    return [
        *([CONTRAST] if known["complete"] else []),
        *(f"{PARTIALS}/{site}" for site in sites),
        EXAMPLES,
        *(f"{ACTIVATIONS}/{model}/{site}" for model in models for site in sites),
        *found,
    ]


def _open(path: Location, group: str) -> xr.Dataset:
    name, *rest = group.strip("/").split("/")
    match name, [unquote(part) for part in rest]:
        case ("contrast", []):
            return open_contrast(path)
        case ("examples", []):
            return open_examples(path)
        case ("neuron_sets", []):
            return open_sets(path)
        case ("partials", [site]):
            return open_partials(path, site)
        case ("results", [result]):
            return open_result(path, result)
        case ("activations", [model, site]):
            return open_activations(path, model, site)
    raise StoreError(f"There is no group {group!r} in a store; it has {', '.join(groups(path))}.")
