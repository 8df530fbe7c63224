"""Questions to a store: each takes Datasets that the store's functions or ``engine="pnlac"`` open, and gives such.

All of them read no more than they need, from plain arrays, lazy ones and dask's alike. In the examples::

    contrast = open_contrast("run.zarr")
    rows = open_activations("run.zarr", "race", "mlp_mid")
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import xarray as xr

from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.names import unknown_name

Rows = TypeVar("Rows", xr.Dataset, xr.DataArray)

_AT_ONCE = 128 << 20  # bytes of float64 that a mean has in memory beside its result


def top_neurons(
    contrast: xr.Dataset | xr.DataArray,
    n: int = 10,
    *,
    share: float | None = None,
    score: str = "rms",
    **where: Any,
) -> xr.Dataset:
    """Find the neurons with the highest score, for every model and topic.

    Parameters
    ----------
    contrast : Dataset or DataArray
        Statistics; or any score of every neuron, such as ``pnlac_fast.scores.scores(contrast, "cohens_d")``.
    n : int
        How many neurons.
    share : float, optional
        Instead of `n`: this share of all neurons of the site, and at least one.
    score : str
        Which of the statistics ranks them, where a Dataset is given.
    **where
        Choices along other dimensions, such as ``model="race"`` or ``topic=["science", "economy"]``. The site and the
        token selector are the first of the store unless given.

    Returns
    -------
    Dataset
        `layer` and `neuron`, int, and `value`, float, in the unit of the score, on ``rank`` (0 the highest) and what is
        not chosen of ``model`` and ``topic``; what is chosen as attributes. Equal scores stand in the order of layer
        and neuron; infinity is the highest, NaN is left out.

    Raises
    ------
    StoreError
        A name is not there, or there are fewer neurons than asked for.

    Examples
    --------
    >>> top_neurons(contrast, 5, model="race", topic="science").to_dataframe()
    >>> top_neurons(contrast, share=0.01)["layer"].sel(model="race", topic="science")
    """
    scored = contrast if isinstance(contrast, xr.DataArray) else _variable(contrast, score)
    first = {dim: scored[dim].values[0] for dim in ("site", "tokens") if dim in scored.dims and dim not in where}
    scored = _choose(scored, where | first)
    if "width" in scored.coords and scored["width"].ndim == 0:
        scored = scored.isel(neuron=slice(0, int(scored["width"])))
    outer: list[Hashable] = [dim for dim in scored.dims if dim not in ("layer", "neuron")]
    scored = scored.transpose(*outer, "layer", "neuron")
    layers, width = scored.shape[-2:]
    if share is not None:
        n = max(1, round(share * layers * width))
    found = [_highest(values, n) for values in scored.values.reshape(-1, layers * width)]
    shape, dims = (*scored.shape[:-2], n), [*outer, "rank"]
    index = np.array([index for index, _ in found]).reshape(shape)
    value = np.array([value for _, value in found]).reshape(shape)
    numbers = scored["layer"].values if "layer" in scored.coords else np.arange(layers)
    chosen = {name: coord.item() for name, coord in scored.coords.items() if not coord.ndim and name != "width"}
    return xr.Dataset(
        {"layer": (dims, numbers[index // width]), "neuron": (dims, index % width), "value": (dims, value)},
        coords={d: scored[d].variable for d in outer} | {"rank": np.arange(n)},
        attrs={"score": str(scored.name or score), **chosen},
    )


def neuron(rows: xr.Dataset, layer: int, neuron: int) -> xr.DataArray:
    """Return one neuron's activation in every row that a store keeps, lazily.

    Parameters
    ----------
    rows : Dataset
        Raw activations.
    layer, neuron : int
        Which neuron.

    Returns
    -------
    DataArray
        [token], in units of the activation, with everything that is known of the rows as coordinates.

    Raises
    ------
    StoreError
        The store does not keep this neuron.

    Examples
    --------
    >>> neuron(rows, 3, 1207).to_dataframe().nlargest(10, "activation")
    """
    activation = rows["activation"]
    if "selected" in activation.dims:
        at = np.flatnonzero((rows["layer"].values == layer) & (rows["neuron"].values == neuron))
        if not at.size:
            raise StoreError(f"The store keeps chosen neurons, and layer {layer}, neuron {neuron} is none of them.")
        return activation.isel(selected=int(at[0]))
    layers = rows["layer"].values.tolist()
    if layer not in layers or not 0 <= neuron < activation.sizes["neuron"]:
        raise StoreError(
            f"There is no layer {layer}, neuron {neuron} in the store: it keeps the layers {layers} of "
            f"{activation.sizes['neuron']} neurons."
        )
    return activation.isel(layer=layers.index(layer), neuron=neuron).assign_coords(neuron=neuron)


def prompt(rows: xr.Dataset, example: int) -> xr.Dataset:
    """Return the rows of one question at all layers, lazily: its prompt's by position, then those of each completion.

    Parameters
    ----------
    rows : Dataset
        Raw activations.
    example : int
        The question's row in `open_examples`.

    Returns
    -------
    Dataset
        ``activation`` (layer, token, neuron) and what is known of the rows.

    Raises
    ------
    StoreError
        The store keeps no row of this question.

    Examples
    --------
    >>> abs(prompt(rows, 0)["activation"]).max("neuron")  # of each layer and token
    """
    at = np.flatnonzero(rows["example"].values == example)
    if not at.size:
        raise StoreError(f"The store keeps no row of example {example}; open_examples lists the questions.")
    order = np.lexsort([rows[name].values[at] for name in ("position", "completion", "side")])
    return rows.isel(token=at[order])


def topic_means(rows: xr.Dataset, tokens: str) -> xr.DataArray:
    """Average activations over the tokens of each topic, block by block, in float64.

    Parameters
    ----------
    rows : Dataset
        Raw activations, or any choice of their rows, layers and neurons.
    tokens : str
        The token selector that says how often each row counts.

    Returns
    -------
    DataArray
        float64 (topic, layer, neuron), or (topic, selected), in units of the activation, with the coordinate `n`
        (topic), tokens counted.

    Raises
    ------
    StoreError
        The store does not keep all tokens of the selector, or none of the rows given counts.

    Examples
    --------
    >>> topic_means(rows, "last").sel(topic="science", layer=3)
    """
    if tokens not in rows.attrs["selectors"]:
        raise StoreError(
            f"The store does not keep all rows that {tokens!r} counts, only those of "
            f"{', '.join(rows.attrs['selectors'])}; choose among these, or make a store with cache --raw full."
        )
    weight = rows["counts"].sel(selector=tokens).values.astype(np.float64)
    topics, place = np.unique(rows["topic"].values.astype(str), return_inverse=True)
    n = np.bincount(place, weight, len(topics))
    if not n.any():
        raise StoreError(f"None of these rows counts for {tokens!r}; choose another token selector.")
    counted = np.flatnonzero(weight)
    weights = np.zeros((len(topics), len(counted)))
    weights[place[counted], np.arange(len(counted))] = weight[counted]
    activation = rows["activation"].isel(token=counted)
    dims = [dim for dim in activation.dims if dim != "token"]
    sums = _sums(weights, activation)
    means = sums / np.where(n > 0, n, np.nan).reshape(-1, *(1,) * len(dims))
    coords = {
        name: coord.variable for name, coord in activation.coords.items() if not {"token", "selector"} & {*coord.dims}
    }
    coords |= {"topic": topics.astype(object), "n": ("topic", n.astype(np.int64))}
    return xr.DataArray(means, coords, ("topic", *dims), "activation", {"tokens": tokens})


def with_text(rows: Rows, examples: xr.Dataset) -> Rows:
    """Add the questions' `instruction` and `key` to rows, as coordinates on ``token``.

    Parameters
    ----------
    rows : Dataset or DataArray
        Raw activations, or what `neuron` and `prompt` make of them.
    examples : Dataset
        What `open_examples` returns for the same store.

    Returns
    -------
    Dataset or DataArray
        The rows with `instruction` and `key`, text (token).

    Examples
    --------
    >>> with_text(neuron(rows, 3, 1207), open_examples("run.zarr")).to_dataframe()
    """
    of = examples[["instruction", "key"]].isel(example=xr.DataArray(rows["example"].values, dims="token"))
    return rows.assign_coords({name: ("token", of[name].values) for name in ("instruction", "key")})


def with_result(rows: xr.Dataset, result: xr.Dataset) -> xr.Dataset:
    """Join rows with what a result says of their questions, such as the stance of each run on them.

    Parameters
    ----------
    rows : Dataset
        Raw activations `with_text`; or anything else with a coordinate `key` along a dimension.
    result : Dataset
        With a dimension ``question`` and the coordinate `key` on it: what ``score`` writes.

    Returns
    -------
    Dataset
        The rows whose question is in the result, with the result's variables, ``question`` in them replaced by the
        dimension of the rows.

    Raises
    ------
    StoreError
        No question is in both, or a name or a key is there twice.

    Examples
    --------
    >>> stance = open_result("run.zarr", "stance")
    >>> joined = with_result(with_text(rows, open_examples("run.zarr")), stance)
    >>> xr.corr(joined["activation"], joined["margin"].sel(run=1), "token")  # of each layer and neuron
    """
    (dim,) = rows["key"].dims
    doubled = sorted({*map(str, result.data_vars)} & {*map(str, rows.variables)})
    if doubled:
        raise StoreError(f"Both the rows and the result have {doubled[0]!r}; rename one of them.")
    places = {key: place for place, key in enumerate(result["key"].values.tolist())}
    if len(places) < result.sizes["question"]:
        raise StoreError("The result has the key of a question twice; choose one of them.")
    keys = rows["key"].values.tolist()
    there = np.array([key in places for key in keys], bool)
    if not there.any():
        raise StoreError("No question is both among the rows and in the result; score the questions of this store.")
    at = xr.DataArray([places[key] for key in keys if key in places], dims=[dim])
    of = result.isel(question=at)
    coords = {name: coord for name, coord in of.coords.items() if dim not in coord.dims and name not in rows.coords}
    variables = {name: variable.variable for name, variable in of.data_vars.items()}
    return rows.isel({dim: np.flatnonzero(there)}).assign(variables).assign_coords(coords)


def _sums(weights: npt.NDArray[np.float64], activation: xr.DataArray) -> npt.NDArray[np.float64]:
    """Return weights [topic, token] times activation, [topic, ...], without having all of the latter in memory."""
    dims = [dim for dim in activation.dims if dim != "token"]
    if activation.chunks is not None:  # dask goes chunk by chunk, whatever they are
        weighted = xr.dot(xr.DataArray(weights, dims=("topic", "token")), activation.astype(np.float64), dim="token")
        return np.asarray(weighted.transpose("topic", *dims).values)
    inner = [activation.sizes[dim] for dim in dims]
    by_layer = dims[:1] == ["layer"]  # no chunk holds two
    size = max(1, _AT_ONCE // (8 * max(1, math.prod(inner[by_layer:]))))
    sums = np.zeros((len(weights), *inner))
    for layer in range(inner[0]) if by_layer else [...]:
        of = activation.isel(layer=layer) if by_layer else activation
        for start in range(0, activation.sizes["token"], size):
            some = slice(start, start + size)
            # Loaded first: of what is lazy, xarray makes an index of every element where it is to be transposed.
            block = of.isel(token=some).load().transpose("token", ...)
            sums[:, layer] += weights[:, some] @ block.values.astype(np.float64)
    return sums


def _variable(ds: xr.Dataset, name: str) -> xr.DataArray:
    if name not in ds:
        raise unknown_name("statistic", name, [str(known) for known in ds.data_vars])
    return ds[name]


def _choose(array: xr.DataArray, where: dict[str, Any]) -> xr.DataArray:
    for dim, names in where.items():
        if dim not in array.dims:
            raise unknown_name("dimension", dim, [str(known) for known in array.dims])
        known = array[dim].values.tolist()
        for name in [names] if np.ndim(names) == 0 else names:
            if name not in known:
                raise unknown_name(dim, str(name), [str(each) for each in known])
    return array.sel(where)


def _highest(values: npt.NDArray[Any], n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Return the indices of the `n` highest values, highest first and equal ones in order, and these values."""
    index = np.flatnonzero(~np.isnan(values))
    if not 0 < n <= index.size:
        raise StoreError(f"There are {index.size} neurons with a score, so {n} of them cannot be the highest.")
    values = values[index]
    least = np.partition(values, -n)[-n]
    chosen = np.flatnonzero(
        values >= least
    )  # all that equal the last one too: the stable sort leaves the first of them
    order = chosen[np.argsort(-values[chosen], kind="stable")[:n]]
    return index[order], values[order]
