"""The benchmark of the store compares what it says, and times nothing that is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pnlac_fast.benchmarking import formats, store
from pnlac_fast.benchmarking.formats import FORMATS, Rows, Shape
from pnlac_fast.errors import UserError

SHAPE = Shape(12, 20, (4, 5))
PEERS = ["tensorstore", "zarr_sharded", "zarr", "safetensors", "memmap"]


def test_every_format_gives_back_what_was_written_and_has_its_figures(tmp_path: Path) -> None:
    found = store.measure(repeats=2, folder=tmp_path, shape=SHAPE)
    assert list(found["write_rate_vs_plain"]) == ["ours", *PEERS, "bfloat16"]
    for what in ("neuron", "token"):
        assert set(found[f"{what}_vs_tensorstore"]) == {"ours", *PEERS} - {"tensorstore"}
        assert found[f"{what}_ms"]["ours"]["repeats"] == 2 * store.READS
    assert found["bfloat16_packed"] > 0
    assert found["bfloat16_encode_gb_per_s"]["repeats"] == 2
    assert not list(tmp_path.iterdir())


def test_without_tensorstore_there_are_figures_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    found = store.measure(repeats=1, folder=tmp_path, shape=SHAPE)
    assert found["write_rate_vs_plain"]["tensorstore"] == "not installed"
    assert found["neuron_vs_tensorstore"] == {"tensorstore": "not installed"}
    assert set(found["neuron_ms"]) == {"ours", *PEERS} - {"tensorstore"}


def test_a_format_that_loses_something_is_not_timed(tmp_path: Path) -> None:
    def rounding(path: Path, batches: list[Rows], shape: Shape) -> None:
        FORMATS["memmap"].write(path, [batch.astype(np.float16).astype(np.float32) for batch in batches], shape)

    wrong = dataclasses.replace(FORMATS["memmap"], write=rounding)
    with pytest.raises(RuntimeError, match="'memmap' does not give back what was written"):
        store.check({"memmap": wrong}, tmp_path)


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1}))
    with pytest.raises(UserError, match="run it on a disk with more room"):
        store.measure(repeats=1, folder=tmp_path, shape=SHAPE)
