"""One report of everything, which several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_results import METHODS, TOPICS, capture, everything, sets_and_contrast, training_result

from pnlac_fast import store as stores
from pnlac_fast.reporting import report


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store with everything in it, and its report."""
    folder = tmp_path_factory.mktemp("report")
    store, few = folder / "all.zarr", TOPICS[:3]
    capture(store, few)
    stores.write_sets(store, sets_and_contrast(few, layers=3, width=40)[0])
    some = {name: METHODS[name] for name in ("plain", "freeze_5", "freeze_30", "specific_10")}
    results = everything(few, 6).results | {"training": training_result(few, 6, some)}
    for name, result in results.items():
        stores.write_result(store, name, result)
    page = report(store, folder / "out", title="A title", boots=100)
    assert page == folder / "out" / "index.html"
    return store, page
