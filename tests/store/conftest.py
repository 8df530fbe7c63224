"""A small store whose numbers are known."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pnlac_fast.store import Layout, Raw, Unit, Writer, open_writer

ROWS = (5, 0, 7)  # raw rows of the units of each topic


class Tokens(NamedTuple):
    """What one unit saw: activations of each token at each site, and the raw rows it keeps of them."""

    base: dict[str, np.ndarray]  # (tokens, token, layer, neuron)
    tuned: dict[str, np.ndarray]  # (model, tokens, token, layer, neuron)


class Sample:
    """A layout, and for each of its units seeded activations."""

    def __init__(self, raw: str = "none", **changes: Any) -> None:
        self.topics = ("abortion", "schools & taxes")
        units = tuple(
            Unit(topic, 2 * index, 2, 0 if raw == "none" else rows)
            for topic in self.topics
            for index, rows in enumerate(ROWS)
        )
        fields: dict[str, Any] = {
            "topics": self.topics,
            "models": ("org/first", "second"),
            "sites": ("mlp_mid", "resid"),
            "tokens": ("last", "completion"),
            "layers": 3,
            "widths": {"mlp_mid": 11, "resid": 4},
            "units": units,
            "raw": Raw(raw, layers=() if raw == "none" else (0, 1, 2)),
            "settings": {"template": "{instruction}", "data": {"sha256": "0" * 8}, "limit": None},
        }
        self.layout = Layout(**fields | changes)
        questions = 2 * len(ROWS)
        self.examples = {
            "topic": [topic for topic in self.topics for _ in range(questions)],
            "instruction": [f"Frage {i}, où?" for i in range(len(self.topics) * questions)],
            "key": [f"{i:016x}" for i in range(len(self.topics) * questions)],
        }

    def tokens(self, unit: int) -> Tokens:
        layout, rng = self.layout, np.random.default_rng(unit)
        count = 4 + unit
        shape = (len(layout.tokens), count, layout.layers)
        base = {site: rng.normal(1, 2, (*shape, width)) for site, width in layout.widths.items()}
        models = len(layout.models)
        return Tokens(base, {site: a + rng.normal(0.1, 1, (models, *a.shape)) for site, a in base.items()})

    def sums(self, unit: int) -> tuple[Any, Any, Any]:
        seen = self.tokens(unit)
        counts = np.full(len(self.layout.tokens), 4 + unit, np.int64)
        base = {site: np.stack([a.sum(1), (a**2).sum(1)], 1) for site, a in seen.base.items()}
        tuned = {
            site: np.stack([b.sum(2), (b**2).sum(2), ((b - seen.base[site]) ** 2).sum(2)], 2)
            for site, b in seen.tuned.items()
        }
        return counts, base, tuned

    def raw(self, unit: int) -> tuple[dict[str, np.ndarray], dict[tuple[str, str], np.ndarray]]:
        layout, rng = self.layout, np.random.default_rng(1000 + unit)
        rows = layout.units[unit].rows
        first = self.topics.index(layout.units[unit].topic) * 2 * len(ROWS) + layout.units[unit].first
        table = {
            "example": (first + np.arange(rows) % 2).astype(np.int32),
            "side": np.full(rows, -1, np.int32),
            "completion": np.full(rows, -1, np.int32),
            "position": np.arange(rows, dtype=np.int32),
            "counts": rng.integers(0, 3, (rows, 4), np.int32),
            "token_id": rng.integers(0, 500, rows).astype(np.int32),
        }
        names = [(model, site) for model in ("base", *layout.models) for site in layout.sites]
        return table, {
            (model, site): rng.normal(size=(layout.layers, rows, layout.widths[site])).astype(np.float32)
            for model, site in names
        }

    def open(self, path: Path, **changes: Any) -> Writer:
        return open_writer(path, self.layout, **{"provenance": {"run": 1}, "examples": self.examples} | changes)

    def commit(self, writer: Writer, unit: int) -> None:
        if self.layout.raw.tokens == "none":
            writer.commit(unit, *self.sums(unit))
        else:
            writer.commit(unit, *self.sums(unit), *self.raw(unit))

    def fill(self, path: Path) -> Path:
        with self.open(path) as writer:
            for unit in writer.pending:
                self.commit(writer, unit)
            writer.finish()
        return path


@pytest.fixture
def sample() -> Sample:
    return Sample()


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    return Sample


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished stores, without and with raw rows, made once; tests get copies."""
    directory = tmp_path_factory.mktemp("made")
    return {raw: Sample(raw).fill(directory / f"{raw}.zarr") for raw in ("none", "last")}


@pytest.fixture
def finished(made: dict[str, Path], tmp_path: Path) -> Path:
    """Give a finished store of the default sample."""
    return Path(shutil.copytree(made["none"], tmp_path / "s.zarr"))


@pytest.fixture
def finished_raw(made: dict[str, Path], tmp_path: Path) -> Path:
    """Give a finished store of the sample with raw rows."""
    return Path(shutil.copytree(made["last"], tmp_path / "raw.zarr"))


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Give the content of every file below a directory."""
    return lambda root: {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    }
