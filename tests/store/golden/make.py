"""Make the golden stores of a format: ``python tests/store/golden/make.py FOLDER``.

They are made once for each minor version of the format, and every later version must open them. The numbers that are in
them are computed here with numpy alone and stand in ``expected.json``, by store, group and variable.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast.store import (
    Layout,
    Raw,
    Unit,
    create_results,
    describe_selected,
    open_writer,
    write_result,
    write_sets,
)
from pnlac_fast.store.names import directory_name
from pnlac_fast.store.shards import to_stored

MODEL, SITE, TOPICS = "org/tuned", "mlp_mid", ("race", "law & order")
LAYERS, WIDTH, TOKENS = 2, 3, 2
CHOSEN = np.array([[0, 2], [1, 0]], np.int32)
LAYOUT = Layout(
    topics=TOPICS,
    models=(MODEL,),
    sites=(SITE,),
    tokens=("last", "all"),
    layers=LAYERS,
    widths={SITE: WIDTH},
    units=tuple(Unit(topic, 0, 1) for topic in TOPICS),
    raw=Raw(),
    settings={"template": "{instruction}", "side": "right"},
)
EXAMPLES: dict[str, list[Any]] = {
    "topic": list(TOPICS),
    "instruction": ["Wie geht es, où?", "What about\nlaw?"],
    "key": ["00000000000000aa", "00000000000000bb"],
}


def activations(unit: int, model: str) -> np.ndarray:
    """Of base or tuned, (layer, token, neuron): quarters, which every dtype holds exactly."""
    base = np.arange(LAYERS * TOKENS * WIDTH, dtype=np.float32).reshape(LAYERS, TOKENS, WIDTH) / 4 - unit
    return base if model == "base" else base[::-1] * 2 + 0.5


def rows(unit: int) -> dict[str, np.ndarray]:
    """What the two rows of a unit are: the last position of a prompt, and one of a completion."""
    columns = {"example": [unit] * 2, "side": [-1, 0], "completion": [-1, 0], "position": [4, 5], "token_id": [7, 9]}
    table = {name: np.array(values, np.int32) for name, values in columns.items()}
    return table | {"counts": np.array([[1, 0, 1, 1], [0, 1, 0, 1]], np.int32)}


def write(path: Path, raw: Raw, units: int) -> None:
    """Write a capture of which the first `units` are there."""
    layout = replace(LAYOUT, raw=raw)
    selected = {SITE: CHOSEN} if raw.neurons else None
    if raw.tokens != "none":
        layout = replace(layout, units=tuple(replace(unit, rows=TOKENS) for unit in layout.units))
    with open_writer(path, layout, provenance={"made by": "make.py"}, examples=EXAMPLES, selected=selected) as writer:
        for unit in writer.pending[:units]:
            a, b = (activations(unit, model).astype(np.float64) for model in ("base", MODEL))
            of = [slice(0, 1), slice(0, 2)]  # last, all
            base = np.stack([[x[:, tokens].sum(1) for x in (a, a**2)] for tokens in of])
            tuned = np.stack([[x[:, tokens].sum(1) for x in (b, b**2, (b - a) ** 2)] for tokens in of])
            sums = np.array([1, 2], np.int64), {SITE: base}, {SITE: tuned[None]}
            if raw.tokens == "none":
                writer.commit(unit, *sums)
                continue
            kept = {model: to_stored(activations(unit, model), raw.dtype) for model in ("base", MODEL)}
            if raw.neurons:
                kept = {m: np.ascontiguousarray(values[CHOSEN[:, 0], :, CHOSEN[:, 1]].T) for m, values in kept.items()}
            writer.commit(unit, *sums, rows(unit), {(model, SITE): values for model, values in kept.items()})
        if units == len(TOPICS):
            writer.finish()


def contrast() -> dict[str, Any]:
    """The statistics, by variable."""
    a, b = (np.stack([activations(unit, model).astype(float) for unit in range(2)]) for model in ("base", MODEL))
    of = [slice(0, 1), slice(0, 2)]  # last, all

    def each(values: np.ndarray, take: Any) -> np.ndarray:
        return np.stack([take(values[:, :, tokens], 2) for tokens in of], 1)[:, None]

    tuned = {
        "mean_tuned": each(b, np.mean),
        "std_tuned": each(b, np.std),
        "mean_diff": each(b - a, np.mean),
        "std_diff": each(b - a, np.std),
        "rms": np.sqrt(each((b - a) ** 2, np.mean)),
    }
    found = {"mean_base": each(a, np.mean), "std_base": each(a, np.std)}
    found |= {name: values[None] for name, values in tuned.items()}
    return {name: values.tolist() for name, values in found.items()} | {"n": [[1, 2], [1, 2]]}


def stance() -> xr.Dataset:
    """A result with numbers, text, truth values, and what is missing."""
    return xr.Dataset(
        {
            "margin": (("run", "question"), np.array([[0.5, np.nan], [-1.25, np.inf]])),
            "answer": ("run", np.array(["", "zwölf"], object)),
            "unparsed": ("question", np.array([True, False])),
        },
        coords={"key": ("question", np.array(EXAMPLES["key"], object))},
        attrs={"scorer": "logprob"},
    )


def main(folder: Path) -> None:
    """Make all of them."""
    chosen = Raw("last", "float16", (), describe_selected({SITE: CHOSEN}))
    write(folder / "statistics.zarr", Raw(), 2)
    member = xr.Dataset(
        {"member": (("neuron_set", "layer", "neuron"), np.array([[[True, False, True], [False, False, True]]]))},
        coords={"name": ("neuron_set", np.array(["general"], object))},
    )
    write_sets(folder / "statistics.zarr", member)
    write(folder / "full-bfloat16.zarr", Raw("full", "bfloat16", (0, 1)), 1)
    write(folder / "chosen-float16.zarr", chosen, 1)
    create_results(folder / "results.zarr", provenance={"made by": "make.py"})
    write_result(folder / "results.zarr", "stance", stance())
    for hidden in folder.glob("*/.*"):
        shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()
    of = {directory_name(model): activations(0, model) for model in ("base", MODEL)}
    table = {name: values.tolist() for name, values in rows(0).items()}
    examples, sets = {"examples": EXAMPLES}, {"member": member["member"].values.tolist()}
    expected = {
        "statistics.zarr": examples | {"contrast": contrast(), "neuron_sets": sets},
        "full-bfloat16.zarr": examples
        | {f"activations/{m}/{SITE}": {"activation": values.tolist(), **table} for m, values in of.items()},
        "chosen-float16.zarr": examples
        | {
            f"activations/{m}/{SITE}": {"activation": values[CHOSEN[:, 0], :, CHOSEN[:, 1]].T.tolist(), **table}
            for m, values in of.items()
        },
        "results.zarr": {
            "results/stance": {name: variable.values.tolist() for name, variable in stance().variables.items()}
        },
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
