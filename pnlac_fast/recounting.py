"""Statistics of other tokens, sides or topics from the raw activations in a store; no model is run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from tqdm import tqdm

from pnlac_fast import store as stores
from pnlac_fast.datasets import SIDES
from pnlac_fast.errors import Interrupted, UserError, unknown
from pnlac_fast.provenance import provenance
from pnlac_fast.store import NO_RAW, Layout
from pnlac_fast.store.activations import kept_selectors
from pnlac_fast.store.layout import BASE, SELECTORS
from pnlac_fast.store.places import place_of
from pnlac_fast.store.schema import capture_layout

COMPLETIONS = {"completion", "all"}  # the selectors for which the side of a completion matters
KEPT = ("base", "tuned", "data", "template", "count_template")  # settings that hold for the new store as well
_AT_ONCE = 64 << 20  # bytes of float64 activations of one model in memory


def recount(
    source: str | Path,
    out: str | Path,
    *,
    tokens: Sequence[str] = ("last",),
    side: str = "both",
    topics: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Write a store of the statistics that :func:`pnlac_fast.cache` would find, from raw activations.

    Parameters
    ----------
    source
        A finished store that keeps raw activations of all layers and neurons.
    out
        The store to write: statistics and the sums of every unit, for ``locate``, ``patch`` and all that reads those of
        ``cache``. One that was interrupted is resumed.
    tokens
        Which positions count, as in :func:`pnlac_fast.cache`. The source must keep all of them: "last" is in stores
        of ``raw="last"`` and "full", the others in "full" where completions were read, and in "selected" where they
        were selected.
    side
        Which completions count: "right", "left" or "both".
    topics
        Of these topics only, in this order.
    overwrite
        Start anew where a store exists.
    progress
        Show a bar on stderr. Default: on a terminal only.

    Returns
    -------
    dict
        ``store``, ``source``, ``units``, ``models``, ``topics``, and ``counted``, the tokens by selector.

    Raises
    ------
    UserError, StoreError
        The source does not keep what is asked for, or is not finished; nothing already in a store is lost.
    Interrupted
        Stopped: the same call goes on from the last finished unit.

    Notes
    -----
    The sums are taken in float64 of what is stored, so that they are those of ``cache`` up to the rounding of the
    stored dtype.
    """
    old = capture_layout(place_of(source))
    chosen = tuple(topics or old.topics)
    _check(source, out, old, tokens, side, chosen)
    read = side if COMPLETIONS & set(tokens) else "none"
    taken = [number for topic in chosen for number, unit in enumerate(old.units) if unit.topic == topic]
    layout = Layout(
        topics=chosen,
        models=old.models,
        sites=old.sites,
        tokens=tuple(tokens),
        layers=old.layers,
        widths=old.widths,
        units=tuple(replace(old.units[number], rows=0) for number in taken),
        raw=NO_RAW,
        settings={name: old.settings[name] for name in KEPT if name in old.settings}
        | {"side": read, "recounted": {"layout": old.fingerprint(), "dtype": old.raw.dtype}},
    )
    rows = {
        (model, site): stores.open_activations(source, model, site)
        for model in (BASE, *old.models)
        for site in old.sites
    }
    ends = np.cumsum([unit.rows for unit in old.units]).tolist()
    counts = _counts(next(iter(rows.values())), tokens, read)
    if (counts.sum(0) == 0).any():
        silent = tokens[int(np.argmin(counts.sum(0)))]
        raise UserError(f"'{source}' keeps no row that {silent} counts: choose other tokens or another side.")
    examples = stores.open_examples(source)
    examples = examples.isel(example=np.flatnonzero(np.isin(examples["topic"].values, chosen)))
    before = stores.info(source)["provenance"]
    origin = provenance(
        **{name: before[name] for name in ("base", "tuned", "data") if name in before},
        source={"path": str(source), "layout": old.fingerprint(), "provenance": before},
    )
    columns = {str(name): column.values.tolist() for name, column in examples.data_vars.items()}
    with stores.open_writer(out, layout, provenance=origin, examples=columns, overwrite=overwrite) as writer:
        bar = tqdm(
            writer.pending,
            desc="recount",
            unit="unit",
            initial=len(taken) - len(writer.pending),
            total=len(taken),
            disable=None if progress is None else not progress,
        )
        try:
            for number in bar:
                unit = taken[number]
                of = slice(ends[unit] - old.units[unit].rows, ends[unit])
                writer.commit(number, *_sums(old, rows, of, counts[of]))
            writer.finish()
        except KeyboardInterrupt as error:
            raise Interrupted(f"Stopped. Run the same command again to go on with '{out}'.") from error
    return {
        "store": str(out),
        "source": str(source),
        "units": len(taken),
        "models": list(old.models),
        "topics": list(chosen),
        "counted": {name: int(stores.open_contrast(out)["n"].sel(tokens=name).sum()) for name in tokens},
    }


def _check(
    source: str | Path, out: str | Path, old: Layout, tokens: Sequence[str], side: str, topics: Sequence[str]
) -> None:
    """Raise UserError where the source cannot give what is asked for."""
    for kind, given, known in (("token selector", tokens, SELECTORS), ("topic", topics, old.topics)):
        if not given or len(set(given)) != len(given):
            raise UserError(f"Give each {kind} once, and at least one.")
        for name in given:
            if name not in known:
                raise unknown(kind, name, known)
    if side not in ("both", *SIDES):
        raise unknown("side", side, ("both", *SIDES))
    if place_of(source).name == place_of(out).name or (
        Path(source).exists() and Path(out).exists() and os.path.samefile(source, out)
    ):
        raise UserError("The statistics go into a store of their own: give another --out.")
    raw, whole = old.raw, "make one with cache --raw full, all layers and all neurons"
    if raw.tokens == "none":
        raise UserError(f"'{source}' keeps no raw activations to count anew: {whole}.")
    if raw.tokens == "pooled":
        raise UserError(f"'{source}' keeps means over tokens, which do not tell how these spread: {whole}.")
    if raw.neurons or len(raw.layers) < old.layers:
        kept = "chosen neurons" if raw.neurons else f"{len(raw.layers)} of {old.layers} layers"
        raise UserError(f"'{source}' keeps raw activations of {kept} only, and statistics are of all: {whole}.")
    kept_tokens = kept_selectors(old)
    for name in tokens:
        if name not in kept_tokens:
            raise UserError(
                f"'{source}' does not keep every row that {name} counts, only those of {', '.join(kept_tokens)}: "
                "choose among these, or make a store with cache --raw full --tokens all."
            )
    if COMPLETIONS & set(tokens) and old.settings.get("side", "both") not in ("both", side):
        raise UserError(
            f"'{source}' has read {old.settings['side']} completions only: give --side {old.settings['side']}."
        )
    found = stores.info(source)
    done, units = found["units_done"], found["units_total"]
    if done < units:
        raise UserError(f"'{source}' is unfinished ({done} of {units} units): run its cache command again.")


def _counts(rows: xr.Dataset, tokens: Sequence[str], side: str) -> np.ndarray:
    """How often each selector counts each row, int64 [row, tokens]."""
    counts = rows["counts"].sel(selector=list(tokens)).values.astype(np.int64)
    if side in SIDES:
        counts[rows["side"].values == 1 - SIDES.index(side)] = 0
    return counts


def _sums(
    layout: Layout, rows: Mapping[tuple[str, str], xr.Dataset], of: slice, counts: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What a unit adds, as `Writer.commit` takes it: tokens counted, and the sums of base and of the tuned models.

    ``of`` are the unit's rows, and ``counts`` int64 [row, tokens] says how often each counts.
    """
    counted = np.flatnonzero(counts.any(1))
    base, tuned = {}, {}
    for site, width in layout.widths.items():
        shape = counts.shape[1], layout.layers, width
        base[site] = np.zeros((shape[0], 2, *shape[1:]))
        tuned[site] = np.zeros((len(layout.models), shape[0], 3, *shape[1:]))
        size = max(1, _AT_ONCE // (8 * width))
        for start in range(0, len(counted), size):
            some = counted[start : start + size]
            weights = counts[some].T.astype(np.float64)

            def read(model: str, layer: int, some: np.ndarray = some, site: str = site) -> np.ndarray:
                activation = rows[model, site]["activation"].isel(token=of.start + some, layer=layer)
                return activation.values.astype(np.float64)

            for layer in range(layout.layers):
                a = read(BASE, layer)
                base[site][:, :, layer] += np.stack([weights @ a, weights @ a**2], 1)
                for m, model in enumerate(layout.models):
                    b = read(model, layer)
                    tuned[site][m][:, :, layer] += np.stack([weights @ b, weights @ b**2, weights @ (b - a) ** 2], 1)
    return counts.sum(0), base, tuned
