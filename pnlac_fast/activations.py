"""The activations of one model at some positions of some texts, in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from pnlac_fast import prompts
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model
from pnlac_fast.packing import Pack, packs
from pnlac_fast.passes import SHORTCUTS, run
from pnlac_fast.prompts import Batch, Text


def read(
    model: Model,
    texts: Sequence[Text],
    tokens: str,
    *,
    site: str = "mlp_mid",
    batch_tokens: int = 2048,
    shortcuts: Collection[str] = tuple(SHORTCUTS),
) -> tuple[Tensor, list[int]]:
    """Activations at the positions that a token selector counts.

    Parameters
    ----------
    tokens
        One of :data:`pnlac_fast.prompts.TOKENS`.
    batch_tokens
        Tokens of one forward pass.
    shortcuts
        Those of :data:`pnlac_fast.passes.SHORTCUTS` that :func:`pnlac_fast.passes.usable` found the model to bear.

    Returns
    -------
    activation
        float32 (float64 of a float64 model), on the CPU, [layer, row, neuron]; rows by text, then by position.
    owner
        The text of each row.

    Raises
    ------
    UserError
        The model lies in several processes.
    """
    if model.part.ranks > 1:
        raise UserError(f"The neurons of '{model.name}' lie in several processes: load it without tp.")
    wanted = [text.positions(tokens) for text in texts]
    first = [0]
    for positions in wanted:
        first.append(first[-1] + len(positions))
    dtype = torch.promote_types(model.hf.dtype, torch.float32)
    activation = torch.empty(len(model.blocks), first[-1], model.width(site), dtype=dtype)
    for batch in _batches(model, texts, batch_tokens, shortcuts):
        rows = [batch.rows[n][p] for n, i in enumerate(batch.index) for p in wanted[i]]
        if not rows:
            continue
        place = torch.cat([torch.arange(first[i], first[i + 1]) for i in batch.index])
        take = torch.tensor(sorted(set(rows)), device=model.device)
        among = torch.searchsorted(take, torch.tensor(rows, device=model.device))

        def visit(
            _: str,
            layer: int,
            seen: Tensor,
            taken: bool,
            place: Tensor = place,
            take: Tensor = take,
            among: Tensor = among,
        ) -> None:
            rows = among if taken else take[among]
            activation[layer, place] = seen[rows.to(seen.device)].to("cpu", dtype)

        run(model, batch, (site,), visit, take=take, shortcuts=shortcuts)
    return activation, [i for i, positions in enumerate(wanted) for _ in positions]


def _batches(
    model: Model, texts: Sequence[Text], budget: int, shortcuts: Collection[str]
) -> Iterator[Batch] | Iterator[Pack]:
    ids = [text.ids for text in texts]
    if "pack" in shortcuts:
        return packs(ids, budget, share="share" in shortcuts, device=model.device)
    side = getattr(model.tokenizer, "padding_side", "right")
    return prompts.batches(ids, budget, padding_side=side, device=model.device)
