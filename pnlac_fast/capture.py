"""Run base and tuned models over the same tokens and fold their activations into additive sums."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pnlac_fast import ops, prompts
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model
from pnlac_fast.packing import Pack, packed, packs
from pnlac_fast.passes import run
from pnlac_fast.profiling import staged
from pnlac_fast.prompts import Batch, Text
from pnlac_fast.raw import Keep, RawRow, describe, raw_rows

NOTHING = Keep()
BASE, TUNED = [0, 2], [1, 3, 4]  # where ops.contrast keeps the sums of base, and those of tuned and difference
MOST = 0.5  # share of read rows from which base keeps a whole activation rather than a copy of these rows
DENSE = 0.25  # share of counted rows from which the sums are taken up while the MLP computes them


@dataclass(frozen=True)
class Sums:
    """Additive sums over the counted tokens of some texts, all float64.

    Attributes
    ----------
    counts
        int64 [tokens]: tokens counted by each selector.
    base
        Per site [tokens, 2, layer, neuron]: sums of a and a^2.
    tuned
        Per site [model, tokens, 3, layer, neuron]: sums of b, b^2 and (b - a)^2.
    rows
        What the raw rows are, as :func:`pnlac_fast.raw.describe` gives it; empty where none are kept.
    raw
        What is kept, as :meth:`pnlac_fast.raw.Keep.reduce` gives it, by (model name or "base", site).
    """

    counts: np.ndarray
    base: dict[str, np.ndarray]
    tuned: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    raw: dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of an activation, int64.

    Attributes
    ----------
    counted
        [selected]: what the selectors count, one after another; a row that stands for several texts is there as often.
    kept
        [raw]: those that are stored raw.
    of_batch
        [row]: where each row of the batch is, -1 for one that does not count.
    """

    counted: Tensor
    kept: Tensor
    of_batch: Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """Which rows of a batch count, on the device of the model.

    Attributes
    ----------
    take
        int64 [kept], ascending: the rows that are read at all.
    short, whole
        The same rows in an activation of those taken, and in one of all rows of the batch.
    offsets
        int64 [tokens + 1]: where in ``Rows.counted`` each selector begins and ends.
    pool
        int64 [mean]: how many of ``Rows.kept`` each stored row is the mean of; None where each is stored itself.
    counts
        float32 [tokens, row]: how often each row of the batch counts; None where few rows do.
    """

    take: Tensor
    short: Rows
    whole: Rows
    offsets: Tensor
    pool: Tensor | None
    counts: Tensor | None

    def of(self, activation: Tensor) -> Rows:
        """Those of an activation that has the rows taken, or all."""
        return self.short if len(activation) == len(self.take) else self.whole


def accumulate(
    base: Model,
    tuned: Mapping[str, Model],
    texts: Sequence[Text],
    *,
    sites: Sequence[str] = ("mlp_mid",),
    tokens: Sequence[str] = ("last",),
    keep: Keep = NOTHING,
    batch_tokens: int = 2048,
    engine: str = "auto",
    first_example: int = 0,
    shortcuts: Collection[str],
) -> Sums:
    """Run base and every tuned model over ``texts`` and return their additive sums.

    Of a tensor-parallel model each process gets those of its :attr:`Model.part` of the neurons of every site, and all
    processes must make the same calls.

    Parameters
    ----------
    keep
        Which raw activations to keep beside the sums.
    batch_tokens
        Tokens of one forward pass.
    shortcuts
        Which of :data:`pnlac_fast.passes.SHORTCUTS` to take, as :func:`pnlac_fast.passes.usable` gives them. They save
        work and change results by rounding only.

    Raises
    ------
    UserError
        An activation is NaN or infinite; it names model, site and layer.
    RuntimeError
        A site was not visited exactly once per layer and pass, or tokens were miscounted: the result would be wrong.
    """
    layers, groups = len(base.blocks), len(tokens)
    state = {
        site: torch.zeros(
            len(tuned), layers, groups, 5, base.local_width(site), dtype=torch.float64, device=base.device
        )
        for site in sites
    }
    counts = np.zeros(groups, np.int64)
    stored: list[RawRow] = []
    kept: dict[tuple[str, str], list[np.ndarray]] = {}
    with ExitStack() as stack:
        for model in (base, *tuned.values()) if "pack" in shortcuts else ():
            stack.enter_context(packed(model.hf))
        for batch in _batches(base, texts, batch_tokens, shortcuts):
            chosen = [texts[i] for i in batch.index]
            flat = [[batch.rows[n][p] for n, t in enumerate(chosen) for p in t.positions(name)] for name in tokens]
            raw = [[(n, row) for row in raw_rows(i, texts[i], keep.tokens, tokens)] for n, i in enumerate(batch.index)]
            rows = [at for group in raw for at in group]
            pooled = [len(row.positions) for _, row in rows] if keep.tokens == "pooled" else None
            selection = _select(
                batch, flat, [batch.rows[n][p] for n, row in rows for p in row.positions], pooled, base.device
            )
            if not len(selection.take):
                continue
            counts += [len(group) for group in flat]
            stored += [row for _, row in rows]
            reference: dict[tuple[str, int], Tensor] = {}
            for m, (name, model) in enumerate(tuned.items()):
                if not m or "base" not in shortcuts:
                    reference = _read(base, batch, sites, selection, shortcuts)
                sums = {site: sums[m] for site, sums in state.items()}
                streams = _contrast(model, batch, sites, selection, reference, sums, engine, shortcuts, keep)
                _store(kept, name, streams, keep)
            if keep.tokens != "none":
                of_base = {
                    (site, layer): _kept(a, selection)
                    for (site, layer), a in reference.items()
                    if keep.reads(site, layer)
                }
                _store(kept, "base", of_base, keep)
            del reference
            _give_back(base.device)

    expected = [sum(len(text.positions(name)) for text in texts) for name in tokens]
    if counts.tolist() != expected:
        raise RuntimeError(f"counted {counts.tolist()} tokens, the texts have {expected}: please report this")
    _check_finite(state, list(tuned))
    host = {site: sums.cpu().numpy() for site, sums in state.items()}  # [model, layer, tokens, 5, neuron]
    return Sums(
        counts,
        {site: sums[0][:, :, BASE].transpose(1, 2, 0, 3) for site, sums in host.items()},
        {site: sums[:, :, :, TUNED].transpose(0, 2, 3, 1, 4) for site, sums in host.items()},
        describe(stored, texts, first_example) if keep.tokens != "none" else {},
        {key: np.concatenate(parts, axis=-2) for key, parts in kept.items()},
    )


def _batches(base: Model, texts: Sequence[Text], budget: int, shortcuts: Collection[str]) -> Iterator[Batch | Pack]:
    ids = [text.ids for text in texts]
    if "pack" in shortcuts:
        return packs(ids, budget, share="share" in shortcuts, device=base.device)
    # On the right, whatever the tokenizer does to generate: there it changes nothing in any model that looks back only.
    return prompts.batches(ids, budget, device=base.device)


def _select(
    batch: Batch | Pack,
    flat: Sequence[Sequence[int]],
    raw: Sequence[int],
    pooled: Sequence[int] | None,
    device: torch.device,
) -> Selection:
    """Where what the selectors count and what is stored raw, both given as rows of the batch, is in activations."""
    take = torch.tensor(sorted({*raw, *(row for group in flat for row in group)}), dtype=torch.int64)
    place = torch.full((batch.ids.numel(),), -1, dtype=torch.int64)
    place[take] = torch.arange(len(take))
    counted = torch.tensor([row for group in flat for row in group], dtype=torch.int64)
    kept = torch.tensor(raw, dtype=torch.int64)
    lengths = torch.tensor([len(group) for group in flat])
    counts = None
    if len(take) >= DENSE * len(place):
        counts = torch.zeros(len(flat), len(place))
        counts.index_put_((torch.arange(len(flat)).repeat_interleave(lengths), counted), torch.ones(1), accumulate=True)
        counts = counts.to(device)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    whole = torch.where(place < 0, -1, torch.arange(len(place)))
    return Selection(
        take.to(device),
        Rows(place[counted].to(device), place[kept].to(device), place.to(device)),
        Rows(counted.to(device), kept.to(device), whole.to(device)),
        offsets.to(device),
        None if pooled is None else torch.tensor(pooled, dtype=torch.int64, device=device),
        counts,
    )


def _read(
    model: Model, batch: Batch | Pack, sites: Sequence[str], selection: Selection, shortcuts: Collection[str]
) -> dict[tuple[str, int], Tensor]:
    """The rows of each site and layer in one pass, [row, neuron]: those taken, or all where most are taken anyway."""
    # All layers in one block of memory: one for each, between what comes and goes in a pass, would leave gaps that the
    # next pass, of another size, cannot use.
    shape = (len(model.blocks), len(selection.take))
    few = len(selection.take) < MOST * batch.ids.numel()
    blocks: dict[str, Tensor] = {}
    seen: dict[tuple[str, int], Tensor] = {}

    def visit(site: str, layer: int, activation: Tensor, taken: bool) -> None:
        activation = model.part.cut(activation, model.width(site))
        # What leaves an MLP or a block, other code may still change in place; nothing does what enters a projection.
        if taken or (site == "mlp_mid" and not few):
            seen[site, layer] = activation
            return
        if site not in blocks:
            blocks[site] = activation.new_empty(*shape, activation.shape[1])
        seen[site, layer] = torch.index_select(activation, 0, selection.take, out=blocks[site][layer])

    run(model, batch, sites, visit, take=selection.take, shortcuts=shortcuts)
    return seen


def _contrast(
    model: Model,
    batch: Batch | Pack,
    sites: Sequence[str],
    selection: Selection,
    reference: Mapping[tuple[str, int], Tensor],
    sums: Mapping[str, Tensor],
    engine: str,
    shortcuts: Collection[str],
    keep: Keep,
) -> dict[tuple[str, int], Tensor]:
    """Add what one pass contrasts with ``reference`` to ``sums`` [layer, tokens, 5, neuron]; the raw rows, if kept."""
    kept: dict[tuple[str, int], Tensor] = {}
    counts = selection.counts
    dense = counts is not None and "fuse" in shortcuts and "mlp_mid" in sites

    @staged("contrast")
    def middle(layer: int, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        assert counts is not None
        whole = len(gate) == counts.shape[1]
        base = reference["mlp_mid", layer]
        of_batch = selection.of(base).of_batch
        return ops.swiglu_contrast(
            gate,
            up,
            base,
            of_batch if whole else of_batch[selection.take],
            counts if whole else counts[:, selection.take],
            sums["mlp_mid"][layer],
            activation,
            engine=engine,
        )

    @staged("contrast")
    def visit(site: str, layer: int, activation: Tensor, taken: bool) -> None:
        activation, base = model.part.cut(activation, model.width(site)), reference[site, layer]
        if not (dense and site == "mlp_mid"):
            ops.contrast(
                base,
                activation,
                selection.of(activation).counted,
                selection.offsets,
                sums[site][layer],
                base_rows=selection.of(base).counted,
                engine=engine,
            )
        if keep.reads(site, layer):
            kept[site, layer] = _kept(activation, selection)

    run(model, batch, sites, visit, take=selection.take, middle=middle if dense else None, shortcuts=shortcuts)
    return kept


def _kept(activation: Tensor, selection: Selection) -> Tensor:
    """The rows of an activation to store, [row, neuron]."""
    read = activation[selection.of(activation).kept]
    if selection.pool is None:
        return read
    return torch.segment_reduce(read.float(), "mean", lengths=selection.pool)


def _store(
    kept: dict[tuple[str, str], list[np.ndarray]], name: str, streams: Mapping[tuple[str, int], Tensor], keep: Keep
) -> None:
    """Append the raw rows of one pass to what is kept of a model."""
    for site in sorted({site for site, _ in streams}):
        rows = {layer: stream for (where, layer), stream in streams.items() if where == site}
        kept.setdefault((name, site), []).append(keep.reduce(rows, site))


def _give_back(device: torch.device) -> None:
    """Give the host memory that is free back to the system.

    Passes differ in size by a text, so that glibc's heap fills with gaps into which the next does not fit: at hidden
    256 and 2048 prompts, 350 MiB were held where 180 are needed. It takes less than a hundredth of a pass.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if device.type == "cpu" and os.name == "posix" else None
    if trim is not None:
        trim(0)


def _check_finite(state: Mapping[str, Tensor], names: Sequence[str]) -> None:
    for site, sums in state.items():
        if not torch.isfinite(sums).all():
            m, layer = (~torch.isfinite(sums)).nonzero()[0, :2].tolist()
            at_base = not torch.isfinite(sums[m, layer][:, BASE]).all()
            raise UserError(
                f"The activations of {'the base model' if at_base else repr(names[m])} at {site}, layer {layer}, "
                f"are not finite: try --dtype float32, or check its weights."
            )
