"""Queries of a store in the shape of an 8B model: opening it and ranking, and each query of the raw activations."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast import store as stores
from pnlac_fast.benchmarking.timing import interleaved, ratio
from pnlac_fast.benchmarking.workloads import TOPICS
from pnlac_fast.errors import UserError
from pnlac_fast.store import Layout, Raw, Unit
from pnlac_fast.store.shards import from_stored, to_stored

MODEL, SITE, SHARE = "tuned", "mlp_mid", 0.01
RESULT = "stance"


@dataclass(frozen=True)
class Sizes:
    """What is queried: statistics of all layers; raw activations of the first `raw_layers`, `rows` of each topic."""

    layers: int = 32
    width: int = 14336
    raw_layers: int = 2
    rows: int = 683  # six topics: 4098 tokens

    @property
    def bytes(self) -> int:
        """Bytes of both stores together: partial sums, statistics, and raw activations of base and tuned."""
        neurons = self.width * len(TOPICS)
        return neurons * (self.layers * (8 * 5 + 4 * 7) + self.raw_layers * (8 * 5 + 4 * 7 + 2 * 2 * self.rows))


FULL = Sizes()


def measure(*, repeats: int = 5, folder: Path | None = None, sizes: Sizes = FULL) -> dict[str, Any]:
    """Write two stores through the writer, check what each query finds, then time the queries.

    Parameters
    ----------
    repeats
        Rounds.
    folder
        Where to write. Default: the working directory.

    Returns
    -------
    dict
        Milliseconds, each from the path to the numbers: ``top``, opening the statistics and the top 1 % of all neurons
        on every topic; ``top_cold``, the same after the store's files were dropped from the page cache; ``neuron``, one
        over all tokens; ``prompt``, one question at all layers kept; ``topic_means`` of all neurons kept; ``text`` and
        ``stance``, a neuron's rows joined with these. ``tokens``, ``neurons``, ``layers`` and ``raw_layers``.

    Raises
    ------
    UserError
        There is no room for the stores.
    RuntimeError
        A query finds something else than what was written.
    """
    folder = folder or Path.cwd()
    if shutil.disk_usage(folder).free < 1.2 * sizes.bytes:
        raise UserError(
            f"Measuring queries takes {1.2 * sizes.bytes / 1e9:.1f} GB in {folder}: run it on a disk with more room."
        )
    with tempfile.TemporaryDirectory(prefix="pnlac-bench-", dir=folder) as made:
        statistics, raw = Path(made) / "statistics.zarr", Path(made) / "raw.zarr"
        rms = _write_statistics(statistics, sizes)
        block = _write_raw(raw, sizes)
        ways = _ways(statistics, raw, sizes)
        _check({name: way() for name, way in ways.items()}, rms, block, sizes)
        seconds = interleaved(ways, repeats)
        seconds |= interleaved({"top_cold": ways["top"]}, repeats, before=lambda: _drop(statistics))
    result: dict[str, Any] = {name: ratio(taken, [1e-3] * len(taken)) for name, taken in seconds.items()}
    return (
        {"unit": "ms"}
        | result
        | {
            "tokens": len(TOPICS) * sizes.rows,
            "neurons": sizes.width,
            "layers": sizes.layers,
            "raw_layers": sizes.raw_layers,
        }
    )


def _ways(statistics: Path, raw: Path, sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """Every query, from the path of the store to its numbers."""
    layer, neuron, example = _middle(sizes)

    def one() -> Any:
        return stores.neuron(stores.open_activations(raw, MODEL, SITE), layer, neuron)

    def with_text() -> Any:
        return stores.with_text(one().to_dataset(), stores.open_examples(raw))

    return {
        "top": lambda: stores.top_neurons(stores.open_contrast(statistics), share=SHARE, model=MODEL),
        "neuron": lambda: one().values,
        "prompt": lambda: stores.prompt(stores.open_activations(raw, MODEL, SITE), example)["activation"].values,
        "topic_means": lambda: stores.topic_means(stores.open_activations(raw, MODEL, SITE), "all").values,
        "text": lambda: with_text().load(),
        "stance": lambda: stores.with_result(with_text(), stores.open_result(raw, RESULT)).load(),
    }


def _check(found: dict[str, Any], rms: np.ndarray, block: np.ndarray, sizes: Sizes) -> None:
    """Compare with ``rms`` [topic, layer, neuron] and the ``block`` that :func:`_write_raw` returns."""
    top = found["top"].transpose("topic", "rank")
    count = max(1, round(SHARE * sizes.layers * sizes.width))
    for t, values in enumerate(rms):
        best = np.sort(values, axis=None)[: -count - 1 : -1]
        at = values[top["layer"].values[t], top["neuron"].values[t]]
        if not (np.array_equal(top["value"].values[t], best) and np.array_equal(at, best)):
            raise RuntimeError("'top' does not find the highest neurons: no timing")
    layer, neuron, example = _middle(sizes)
    one = np.concatenate([np.roll(block[layer, :, neuron], t) for t in range(len(TOPICS))])
    given = {name: found[name]["activation"].values for name in ("text", "stance")}
    given |= {name: found[name] for name in ("neuron", "prompt")}
    for name, values in given.items():
        if not np.array_equal(values, np.roll(block, example, 1) if name == "prompt" else one):
            raise RuntimeError(f"'{name}' does not give back what was written: no timing")
    for means in found["topic_means"]:
        if not np.allclose(means, block.mean(1, dtype=np.float64), rtol=1e-9, atol=1e-12):
            raise RuntimeError("'topic_means' are not the means of what was written: no timing")


def _middle(sizes: Sizes) -> tuple[int, int, int]:
    """The layer, neuron and example that are asked for."""
    return sizes.raw_layers // 2, sizes.width // 2, len(TOPICS) // 2


def _layout(sizes: Sizes, layers: int, raw: Raw) -> Layout:
    rows = 0 if raw.tokens == "none" else sizes.rows
    return Layout(
        topics=TOPICS,
        models=(MODEL,),
        sites=(SITE,),
        tokens=("all",),
        layers=layers,
        widths={SITE: sizes.width},
        units=tuple(Unit(topic, 0, 1, rows) for topic in TOPICS),
        raw=raw,
        settings={},
    )


def _open(path: Path, layout: Layout) -> stores.Writer:
    examples = {
        "topic": list(TOPICS),
        "instruction": [f"What about {topic}?" for topic in TOPICS],
        "key": [f"{t:016x}" for t in range(len(TOPICS))],
    }
    return stores.open_writer(path, layout, provenance={}, examples=examples)


def _write_statistics(path: Path, sizes: Sizes) -> np.ndarray:
    """Write statistics of activations whose change is exponentially distributed; their rms [topic, layer, neuron]."""
    rng, shape, n = np.random.default_rng(0), (sizes.layers, sizes.width), 100
    squares = [rng.exponential(size=shape) for _ in TOPICS]
    with _open(path, _layout(sizes, sizes.layers, Raw())) as writer:
        for unit, square in enumerate(squares):
            base = np.stack([np.zeros(shape), np.full(shape, n)])
            tuned = np.stack([n * np.sqrt(square), n * (1 + square), n * square])
            counts = np.array([n], np.int64)
            writer.commit(unit, counts, {SITE: base[None]}, {SITE: tuned[None, None]})
        writer.finish()
    return np.sqrt(np.stack([n * square / n for square in squares])).astype(np.float32)


def _write_raw(path: Path, sizes: Sizes) -> np.ndarray:
    """Write normal activations in bfloat16; those of base, [layer, row, neuron].

    The tuned model's are the same, with the rows of topic t rolled by t.
    """
    rng, raw = np.random.default_rng(1), Raw("full", "bfloat16", tuple(range(sizes.raw_layers)))
    block = to_stored(rng.standard_normal((sizes.raw_layers, sizes.rows, sizes.width), np.float32), "bfloat16")
    layout, zeros = _layout(sizes, sizes.raw_layers, raw), np.zeros((sizes.raw_layers, sizes.width))
    with _open(path, layout) as writer:
        for unit in range(len(TOPICS)):
            rows = {name: np.full(sizes.rows, -1, np.int32) for name in ("side", "completion", "token_id")}
            rows |= {"example": np.full(sizes.rows, unit, np.int32), "position": np.arange(sizes.rows, dtype=np.int32)}
            rows["counts"] = np.tile(np.array([0, 0, 1, 1], np.int32), (sizes.rows, 1))
            sums = {SITE: np.stack([zeros] * 2)[None]}, {SITE: np.stack([zeros] * 3)[None, None]}
            activations = {("base", SITE): block, (MODEL, SITE): np.roll(block, unit, 1)}
            writer.commit(unit, np.array([sizes.rows], np.int64), *sums, rows, activations)
        writer.finish()
    keys = [f"{t:016x}" for t in reversed(range(len(TOPICS)))]
    margin = xr.Dataset(
        {"margin": (("run", "question"), rng.standard_normal((2, len(TOPICS))))},
        coords={"key": ("question", np.array(keys, object))},
    )
    stores.write_result(path, RESULT, margin)
    return from_stored(block)


def _drop(path: Path) -> None:
    """Let the page cache forget the files below a directory, where the system can."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
