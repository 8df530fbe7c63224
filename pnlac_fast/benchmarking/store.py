"""Writing raw activations against the disk's own rate, and reading them along both axes; other formats beside it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pnlac_fast.benchmarking.formats import Format, Rows, Shape, installed, open_ours, write_ours, write_plain
from pnlac_fast.benchmarking.timing import interleaved, ratio, use_clock
from pnlac_fast.errors import UserError
from pnlac_fast.store.local import sync_directory
from pnlac_fast.store.shards import from_stored, shard_pieces, to_stored

FULL = Shape()
BATCHES = 4  # read; as many again are written
READS = 5  # a read takes milliseconds, so there are more rounds of them


def make_batches(shape: Shape, batches: int = BATCHES) -> list[Rows]:
    """Float32 activations as a gated MLP has them, silu(gate) * up, of neurons of different scales."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(0, 1, shape.width)).astype(np.float32)
    made = []
    for _ in range(batches):
        gate, up = (rng.standard_normal(shape.batch, np.float32) for _ in range(2))
        made.append(gate / (1 + np.exp(-gate)) * up * scale)
    return made


def encode(batches: Sequence[Rows], shape: Shape) -> Callable[[], int]:
    """Encode bfloat16 in one thread that is not the main one, as writers do; returns the bytes that come out."""
    pool = ThreadPoolExecutor(1)  # Blosc takes several threads of its own in the main thread only

    def run() -> int:
        return sum(
            len(piece) for batch in batches for piece in shard_pieces(batch, shape.batch, shape.chunk, "bfloat16")
        )

    return lambda: pool.submit(run).result()


def check(formats: dict[str, Format], folder: Path) -> None:
    """Write a few activations in every format and compare what is read with them.

    Raises
    ------
    RuntimeError
        A format gives back something else.
    """
    shape = Shape(12, 20, (4, 5))
    batches = make_batches(shape, 3)
    whole = np.concatenate(batches)
    rounded = [to_stored(batch, "bfloat16") for batch in batches]
    write_plain(folder / "plain", batches, shape)
    written = {"plain": np.fromfile(folder / "plain" / "plain", np.float32).reshape(whole.shape)}
    for name, way in formats.items():
        way.write(folder / name, batches, shape)
        select = way.open(folder / name)
        written[name] = select((slice(None), slice(None)))
        for selection in ((7, slice(None)), (slice(None), 13)):
            _same(name, select(selection), whole[selection])
    for name, found in written.items():
        _same(name, found, whole)
    write_ours(folder / "bfloat16", rounded, shape, "bfloat16")
    _same("bfloat16", open_ours(folder / "bfloat16")((slice(None), slice(None))), from_stored(np.concatenate(rounded)))


def measure(*, repeats: int = 5, folder: Path | None = None, shape: Shape = FULL) -> dict[str, Any]:
    """Check every format, then time writing and reading side by side.

    Parameters
    ----------
    repeats
        Rounds of writing; there are five times as many of reading.
    folder
        Where to write, on the disk that is to be measured. Default: the working directory.
    shape
        Of one batch; eight are written, four are read.

    Returns
    -------
    dict
        ``write_rate_vs_plain``: rate of each format over that of a plain sequential write with fdatasync, everything on
        the disk at the end of both; ``bfloat16`` counts the bytes of bfloat16. ``bfloat16_encode_gb_per_s``: the same
        bytes by one thread in a second of processor time, no disk; ``bfloat16_packed``: bytes over those of the shards.
        ``neuron_vs_tensorstore``, ``token_vs_tensorstore``: time to read one neuron of all tokens, or all neurons of
        one token, from the page cache, over tensorstore's on the file of ours. ``plain_gb_per_s``, ``neuron_ms``,
        ``token_ms``: the figures behind the ratios. ``tokens``, ``neurons``: of what is read.

    Raises
    ------
    UserError
        There is no room for the files.
    RuntimeError
        A format gives back something else than was written.
    """
    formats, absent = installed()
    batches = make_batches(shape)
    size = sum(batch.nbytes for batch in batches)
    folder = folder or Path.cwd()
    if shutil.disk_usage(folder).free < 6 * size:
        raise UserError(
            f"Measuring the store takes {6 * size / 1e9:.1f} GB in {folder}: run it on a disk with more room."
        )
    with tempfile.TemporaryDirectory(prefix="pnlac-bench-", dir=folder) as made:
        check(formats, Path(made))
        result = _write(formats, batches, shape, Path(made) / "written", repeats)
        result |= _read(formats, batches, shape, Path(made) / "read", repeats)
    for name in ("write_rate_vs_plain", "neuron_vs_tensorstore", "token_vs_tensorstore"):
        result[name] |= absent
    return result | {"tokens": BATCHES * shape.rows, "neurons": shape.width}


def _write(
    formats: dict[str, Format], batches: Sequence[Rows], shape: Shape, folder: Path, repeats: int
) -> dict[str, Any]:
    all_batches = [*batches, *batches]
    rounded = [to_stored(batch, "bfloat16") for batch in batches]
    encoding = encode(rounded, shape)
    gigabytes = sum(batch.nbytes for batch in all_batches) / 1e9

    def afresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        sync_directory(folder)  # what is removed is then removed from the disk as well, and not while others write

    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: write_plain(folder / "plain", all_batches, shape),
        **{name: partial(way.write, folder / name, all_batches, shape) for name, way in formats.items()},
        "bfloat16": lambda: write_ours(folder / "bfloat16", [*rounded, *rounded], shape, "bfloat16"),
    }
    seconds = interleaved(ways, repeats, before=afresh)
    afresh()
    with use_clock("cpu"):
        encoded = interleaved({"encode": encoding}, repeats)["encode"]
    plain = seconds["plain"]
    rates = {name: ratio(plain, seconds[name], factor=0.5 if name == "bfloat16" else 1) for name in ways}
    return {
        "write_rate_vs_plain": {name: rate for name, rate in rates.items() if name != "plain"},
        "plain_gb_per_s": ratio([gigabytes] * repeats, plain),
        "bfloat16_encode_gb_per_s": ratio([gigabytes / 4] * repeats, encoded),
        "bfloat16_packed": sum(batch.nbytes for batch in rounded) / encoding(),
    }


def _read(
    formats: dict[str, Format], batches: Sequence[Rows], shape: Shape, folder: Path, repeats: int
) -> dict[str, Any]:
    folder.mkdir()
    opened = {}
    for name, way in formats.items():
        path = folder / ("ours" if name == "tensorstore" else name)
        if not path.exists():
            way.write(path, batches, shape)
        opened[name] = way.open(path)
    result: dict[str, Any] = {}
    middle = (BATCHES * shape.rows // 2, shape.width // 2)
    for what, selection in (("neuron", (slice(None), middle[1])), ("token", (middle[0], slice(None)))):
        seconds = interleaved({name: partial(select, selection) for name, select in opened.items()}, READS * repeats)
        reference = seconds.get("tensorstore")
        ratios = {name: ratio(taken, reference) for name, taken in seconds.items() if reference}
        result[f"{what}_vs_tensorstore"] = {name: found for name, found in ratios.items() if name != "tensorstore"}
        result[f"{what}_ms"] = {name: ratio(taken, [1e-3] * len(taken)) for name, taken in seconds.items()}
    return result


def _same(name: str, found: Rows, expected: Rows) -> None:
    if not np.array_equal(found, expected):
        raise RuntimeError(f"'{name}' does not give back what was written: no timing")
