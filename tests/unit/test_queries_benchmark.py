"""The benchmarks of queries and of writing while computing: figures of what is right, and none of what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pnlac_fast.benchmarking import queries, stall
from pnlac_fast.errors import UserError

SIZES = queries.Sizes(layers=3, width=40, raw_layers=2, rows=5)


def test_every_query_has_its_figure(tmp_path: Path) -> None:
    found = queries.measure(repeats=2, folder=tmp_path, sizes=SIZES)
    for name in ("top", "top_cold", "neuron", "prompt", "topic_means", "text", "stance"):
        assert found[name]["repeats"] == 2
        assert found[name]["min"] > 0
    assert (found["tokens"], found["neurons"], found["raw_layers"]) == (30, 40, 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["neuron", "prompt", "topic_means", "top_neurons"])
def test_a_query_that_is_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = getattr(queries.stores, name)
    changed = "value" if name == "top_neurons" else "activation"

    def wrong(*arguments: object, **options: object) -> object:
        found = right(*arguments, **options)
        return found.assign({changed: found[changed] + 1}) if hasattr(found, "data_vars") else found + 1

    monkeypatch.setattr(queries.stores, name, wrong)
    with pytest.raises(RuntimeError, match="no timing"):
        queries.measure(repeats=1, folder=tmp_path, sizes=SIZES)


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1}))
    with pytest.raises(UserError, match="run it on a disk with more room"):
        queries.measure(repeats=1, folder=tmp_path)


def test_waiting_is_a_share_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "UNIT_TOKENS", 300)
    found = stall.measure(repeats=1, device="cpu", shape="test", questions=4, folder=tmp_path)
    for name in ("overlapped_vs_run", "waiting_vs_run"):
        assert 0 < found[name]["median"] < 1
    assert found["units"] > 6
    assert found["prompts"] == 24


def test_two_stores_that_differ_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = iter([[np.zeros(1)], [np.ones(1)]])
    monkeypatch.setattr(stall, "_content", lambda path: next(contents))
    with pytest.raises(RuntimeError, match="writes something else"):
        stall.measure(repeats=1, device="cpu", shape="test", questions=1, folder=tmp_path)
