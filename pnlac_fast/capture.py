"""Run base and tuned models over the same tokens and fold their activations into additive sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pnlac_fast import ops, prompts
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model
from pnlac_fast.prompts import Text

RAW = ("none", "last", "full")
BASE, TUNED = [0, 2], [1, 3, 4]  # where ops.contrast keeps the sums of base, and those of tuned and difference


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
        int32 arrays [row] of the raw rows: ``example``, ``position``, ``token_id``; empty where none are kept.
    raw
        float32 [layer, row, neuron] by (model name or "base", site).
    """

    counts: np.ndarray
    base: dict[str, np.ndarray]
    tuned: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    raw: dict[tuple[str, str], np.ndarray]


def accumulate(
    base: Model,
    tuned: Mapping[str, Model],
    texts: Sequence[Text],
    *,
    sites: Sequence[str] = ("mlp_mid",),
    tokens: Sequence[str] = ("last",),
    raw: str = "none",
    batch_tokens: int = 4096,
    engine: str = "auto",
    first_example: int = 0,
) -> Sums:
    """Run base and every tuned model over ``texts`` and return their additive sums.

    Raises
    ------
    UserError
        An activation is NaN or infinite; it names model, site and layer.
    RuntimeError
        A site was not visited exactly once per layer and pass, or tokens were miscounted: the result would be wrong.
    """
    layers, groups = len(base.blocks), len(tokens)
    state = {
        site: torch.zeros(len(tuned), layers, groups, 5, base.width(site), dtype=torch.float64, device=base.device)
        for site in sites
    }
    counts = np.zeros(groups, np.int64)
    table: list[np.ndarray] = []
    kept: dict[tuple[str, str], list[np.ndarray]] = {}
    side = getattr(base.tokenizer, "padding_side", "right")
    packed = prompts.batches([t.ids for t in texts], batch_tokens, padding_side=side, device=base.device)
    for batch in packed:
        chosen = [texts[i] for i in batch.index]
        length = batch.ids.shape[1]
        shift = [length - len(t.ids) if side == "left" else 0 for t in chosen]
        selected = [
            [row * length + shift[row] + p for row, text in enumerate(chosen) for p in text.positions(name)]
            for name in tokens
        ]
        stored = [(row, p) for row, text in enumerate(chosen) for p in raw_positions(text, raw)]
        stored_flat = [row * length + shift[row] + p for row, p in stored]
        union = sorted({*stored_flat, *(flat for group in selected for flat in group)})
        if not union:
            continue
        place = {flat: i for i, flat in enumerate(union)}
        rows = torch.tensor([place[flat] for group in selected for flat in group], device=base.device)
        offsets = torch.tensor([0, *np.cumsum([len(g) for g in selected])], device=base.device)
        take = torch.tensor(union, device=base.device)
        keep = torch.tensor([place[flat] for flat in stored_flat], dtype=torch.int64, device=base.device)
        counts += [len(group) for group in selected]
        table.append(
            np.array([[first_example + chosen[r].question, p, chosen[r].ids[p]] for r, p in stored], np.int32).reshape(
                -1, 3
            )
        )

        reference = _read(base, batch, sites, take)
        for m, (name, model) in enumerate(tuned.items()):
            streams = _read(model, batch, sites, take)
            for (site, layer), b in streams.items():
                ops.contrast(reference[site, layer], b, rows, offsets, state[site][m, layer], engine=engine)
            if raw != "none":
                _keep(kept, name, streams, sites, layers, keep)
        if raw != "none":
            _keep(kept, "base", reference, sites, layers, keep)

    expected = [sum(len(text.positions(name)) for text in texts) for name in tokens]
    if counts.tolist() != expected:
        raise RuntimeError(f"counted {counts.tolist()} tokens, the texts have {expected}: please report this")
    for site, sums in state.items():
        if not torch.isfinite(sums).all():
            m, layer = (~torch.isfinite(sums)).nonzero()[0, :2].tolist()
            at_base = not torch.isfinite(sums[m, layer][:, BASE]).all()
            raise UserError(
                f"The activations of {'the base model' if at_base else repr(list(tuned)[m])} at {site}, layer {layer}, "
                f"are not finite: try --dtype float32, or check its weights."
            )
    host = {site: sums.cpu().numpy() for site, sums in state.items()}  # [model, layer, tokens, 5, neuron]
    rows_table = np.concatenate(table) if table else np.zeros((0, 3), np.int32)
    return Sums(
        counts,
        {site: sums[0][:, :, BASE].transpose(1, 2, 0, 3) for site, sums in host.items()},
        {site: sums[:, :, :, TUNED].transpose(0, 2, 3, 1, 4) for site, sums in host.items()},
        {name: rows_table[:, i] for i, name in enumerate(("example", "position", "token_id"))} if raw != "none" else {},
        {key: np.concatenate(parts, axis=1) for key, parts in kept.items()},
    )


def _read(model: Model, batch: prompts.Batch, sites: Sequence[str], take: Tensor) -> dict[tuple[str, int], Tensor]:
    """One forward pass without the LM head; the rows ``take`` of each site and layer, [row, neuron]."""
    seen: dict[tuple[str, int], Tensor] = {}
    visits = 0

    def visitor(site: str) -> Any:
        def visit(layer: int, activation: Tensor) -> None:
            nonlocal visits
            visits += 1
            seen[site, layer] = activation.flatten(0, 1).index_select(0, take)

        return visit

    with torch.inference_mode(), model.active() as hf, ExitStack() as taps:
        for site in sites:
            taps.enter_context(model.tapped(site, visitor(site)))
        hf.get_decoder()(**batch.inputs(), use_cache=False)
    if visits != len(sites) * len(model.blocks) or len(seen) != visits:
        raise RuntimeError(
            f"{visits} sites were visited in a pass of '{model.name}', expected {len(sites) * len(model.blocks)}: "
            f"its layers are skipped or run twice, so its statistics would be wrong"
        )
    return seen


def _keep(
    kept: dict[tuple[str, str], list[np.ndarray]],
    name: str,
    streams: Mapping[tuple[str, int], Tensor],
    sites: Sequence[str],
    layers: int,
    keep: Tensor,
) -> None:
    """Append the raw rows of one pass, float32 [layer, row, neuron], to what is kept of a model."""
    for site in sites:
        block = torch.stack([streams[site, layer].index_select(0, keep) for layer in range(layers)])
        kept.setdefault((name, site), []).append(block.float().cpu().numpy())


def raw_positions(text: Text, raw: str) -> Sequence[int]:
    """Positions whose raw activations are kept; those of a prompt once per question."""
    if raw == "none":
        return ()
    return text.positions("last") if raw == "last" else range(text.repeated, len(text.ids))
