"""Raw activations: which rows of which neurons are kept, and in which form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pnlac_fast.datasets import SIDES
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.prompts import TOKENS, Text
from pnlac_fast.store import Raw, describe_selected
from pnlac_fast.store.layout import RAW

COLUMNS = ("example", "side", "completion", "position", "token_id")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NONE = -1  # in a column that does not apply


@dataclass(frozen=True)
class Keep:
    """What to keep of the activations themselves.

    Attributes
    ----------
    tokens
        "none"; of the "last" prompt position; "pooled", means over the positions that each token selector counts in a
        text; of the positions "selected" by the token selectors; or of "full" texts. Those of a prompt once a question.
    dtype
        "float32", "float16" or "bfloat16".
    layers
        Of which layers, ascending.
    neurons
        Where only chosen neurons are kept: int32 [neuron, 2] of layer and neuron, ascending, for each site.
    """

    tokens: str = "none"
    dtype: str = "float32"
    layers: tuple[int, ...] = ()
    neurons: Mapping[str, np.ndarray] = field(default_factory=dict)

    def layout(self) -> Raw:
        """The same in a store's layout."""
        return Raw(self.tokens, self.dtype, self.layers, describe_selected(self.neurons))  # type: ignore[arg-type]

    def size(self, widths: Mapping[str, int]) -> int:
        """Bytes of a row at all sites, given their numbers of neurons."""
        if self.tokens == "none":
            return 0
        kept = (len(self.neurons[s]) if self.neurons else len(self.layers) * width for s, width in widths.items())
        return DTYPES[self.dtype].itemsize * sum(kept)

    def reads(self, site: str, layer: int) -> bool:
        """Whether anything is kept of a layer at a site."""
        if self.tokens == "none":
            return False
        return layer in (self.neurons[site][:, 0] if self.neurons else self.layers)

    def reduce(self, rows: Mapping[int, Tensor], site: str) -> np.ndarray:
        """Turn the rows [row, neuron] of each layer into what a store keeps of a site.

        Returns
        -------
        array
            [layer, row, neuron], or [row, chosen neuron]; bfloat16 as its bits, uint16.

        Raises
        ------
        UserError
            A finite activation is beyond the range of ``dtype``.
        """
        if self.neurons:
            chosen = torch.from_numpy(self.neurons[site].astype(np.int64))
            parts = [rows[layer][:, _of(chosen, layer).to(rows[layer].device)] for layer in sorted(rows)]
            block = torch.cat(parts, 1)
        else:
            block = torch.stack([rows[layer] for layer in self.layers])
        stored = block.to(DTYPES[self.dtype])
        if (torch.isinf(stored) & torch.isfinite(block)).any():
            largest = block[torch.isfinite(block)].abs().max()
            raise UserError(
                f"The activation {largest:g} at {site} is beyond the range of {self.dtype}: use --raw-dtype bfloat16 "
                "or float32."
            )
        host = stored.cpu()
        return host.view(torch.int16).numpy().view(np.uint16) if self.dtype == "bfloat16" else host.numpy()


def check_kept(
    tokens: str, *, dtype: str = "auto", layers: Sequence[int] | None = None, neurons: Sequence[NeuronSet] = ()
) -> None:
    """What can be said about the parameters of :func:`choose_kept` without a model: errors as there."""
    if tokens not in RAW:
        raise unknown("raw mode", tokens, RAW)
    if dtype not in ("auto", *DTYPES):
        raise unknown("raw dtype", dtype, ("auto", *DTYPES))
    if tokens == "none" and (layers or neurons or dtype != "auto"):
        raise UserError("Nothing raw is kept, so its dtype, layers and neurons have no effect: choose a --raw mode.")


def choose_kept(
    model: Model,
    sites: Sequence[str],
    tokens: str,
    *,
    dtype: str = "auto",
    layers: Sequence[int] | None = None,
    neurons: Sequence[NeuronSet] = (),
) -> Keep:
    """What to keep of a model's activations.

    Parameters
    ----------
    tokens
        As :attr:`Keep.tokens`.
    dtype
        "auto" keeps the model's own: nothing is lost, and nothing is padded with zeros.
    layers
        Of which layers; default: all.
    neurons
        Of which neurons: all that are in one of these sets.

    Raises
    ------
    UserError
        A name or number is unknown, or the sets have no neuron at a site; it says what there is.
    """
    check_kept(tokens, dtype=dtype, layers=layers, neurons=neurons)
    if tokens == "none":
        return Keep()
    own = str(model.hf.dtype).removeprefix("torch.")
    kept = dtype if dtype != "auto" else own if own in DTYPES else "float32"
    everything = range(len(model.blocks))
    if layers is not None and (not layers or set(layers) - set(everything)):
        raise UserError(f"The layers {list(layers)} are not among the model's: choose from 0 to {everything[-1]}.")
    chosen = tuple(everything if layers is None else sorted(set(layers)))
    if not neurons:
        return Keep(tokens, kept, chosen)
    member = {site: np.zeros((len(everything), model.width(site)), bool) for site in sites}
    for each in neurons:
        each.check(model)
        if each.site not in member:
            raise UserError(f"The neuron set '{each.name}' is of the site {each.site}: add --site {each.site}.")
        member[each.site][list(chosen)] |= each.member[list(chosen)]
    for site, there in member.items():
        if not there.any():
            raise UserError(f"The neuron sets have no neuron at {site}: leave that site out, or add a set.")
    return Keep(tokens, kept, (), {site: np.argwhere(there).astype(np.int32) for site, there in member.items()})


class RawRow(NamedTuple):
    """One row to keep: of which text (an index), and the mean over which of its positions; one, unless pooled."""

    text: int
    positions: tuple[int, ...]
    selector: str | None


def raw_rows(index: int, text: Text, keep: str, tokens: Sequence[str]) -> list[RawRow]:
    """The rows that are kept of a text, where ``tokens`` are the token selectors of the run."""
    if keep == "none":
        return []
    if keep == "pooled":
        means = [(name, tuple(text.positions(name))) for name in tokens]
        return [RawRow(index, positions, name) for name, positions in means if positions]
    if keep == "selected":
        positions = sorted({position for name in tokens for position in text.positions(name)})
    else:
        positions = text.positions("last") if keep == "last" else list(range(text.repeated, len(text.ids)))
    return [RawRow(index, (position,), None) for position in positions]


def describe(rows: Sequence[RawRow], texts: Sequence[Text], first_example: int) -> dict[str, np.ndarray]:
    """What each row is, by the columns of a store, int32 [row], and ``counts`` [row, selector]; see its README."""
    table = np.full((len(rows), len(COLUMNS)), NONE, np.int32)
    counts = np.zeros((len(rows), len(TOKENS)), np.int32)
    counted: dict[int, list[set[int]]] = {}
    for at, row in enumerate(rows):
        text = texts[row.text]
        table[at, 0] = first_example + text.question
        if row.positions[-1] >= text.prompt:
            table[at, 1:3] = SIDES.index(text.side), text.completion
        if row.selector is not None:
            counts[at, TOKENS.index(row.selector)] = len(row.positions)
            continue
        table[at, 3:] = row.positions[0], text.ids[row.positions[0]]
        if row.text not in counted:
            counted[row.text] = [set(text.positions(name)) for name in TOKENS]
        counts[at] = [row.positions[0] in positions for positions in counted[row.text]]
    return {name: table[:, i] for i, name in enumerate(COLUMNS)} | {"counts": counts}


def _of(chosen: Tensor, layer: int) -> Tensor:
    return chosen[chosen[:, 0] == layer, 1]
