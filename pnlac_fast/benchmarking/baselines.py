"""What localising is measured against: two bare forward passes, and a loop in the manner of the paper's code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pnlac_fast.benchmarking.agreement import TOKENS, Statistics, of_tensors
from pnlac_fast.benchmarking.workloads import Workload
from pnlac_fast.models import Model

BATCH = 32


@dataclass(frozen=True, eq=False)
class Padded:
    """A padded batch in the order of the questions: ``ids`` and ``mask``, int64 [sequence, position].

    Attributes
    ----------
    counted
        (topic, selector, rows): the flat rows that count towards the sums of a topic and a token selector.
    """

    ids: Tensor
    mask: Tensor
    counted: list[tuple[int, int, Tensor]]

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a Hugging Face forward pass."""
        return {"input_ids": self.ids, "attention_mask": self.mask}


def padded(workload: Workload, size: int = BATCH) -> list[Padded]:
    """The workload in plain batches of ``size`` prompts, padded on the right."""
    every = [(topic, text) for topic, group in enumerate(workload.texts.values()) for text in group]
    found = []
    for first in range(0, len(every), size):
        chosen = every[first : first + size]
        length = max(len(text.ids) for _, text in chosen)
        ids = torch.full((len(chosen), length), int(workload.base.tokenizer.pad_token_id))
        mask = torch.zeros_like(ids)
        rows: dict[tuple[int, int], list[int]] = {}
        for row, (topic, text) in enumerate(chosen):
            ids[row, : len(text.ids)] = torch.tensor(text.ids)
            mask[row, : len(text.ids)] = 1
            for selector, name in enumerate(TOKENS):
                rows.setdefault((topic, selector), []).extend(row * length + p for p in text.positions(name))
        counted = [(*key, torch.tensor(flat, device=workload.device)) for key, flat in rows.items()]
        found.append(Padded(ids.to(workload.device), mask.to(workload.device), counted))
    return found


def floor(workload: Workload) -> Callable[[], None]:
    """Two bare passes, base and the first tuned model, with the LM head and without statistics."""
    batches, models = padded(workload), (workload.base, _tuned(workload))

    def run() -> None:
        with torch.inference_mode():
            for batch in batches:
                for model in models:
                    with model.active() as hf:
                        hf(**batch.inputs(), use_cache=False)

    return run


def released(workload: Workload) -> Callable[[], Statistics]:
    """The manner of the paper's released code, for base and the first tuned model.

    Prompt by prompt: a pass with forward hooks that copy every layer's neurons to the host, sums in numpy's float64,
    and a call of ``generate`` besides.
    """
    layers, width = len(workload.base.blocks), workload.base.width("mlp_mid")

    def run() -> Statistics:
        totals = np.zeros((len(workload.texts), len(TOKENS), 5, layers, width))
        for topic, group in enumerate(workload.texts.values()):
            for text in group:
                ids = torch.tensor([text.ids], device=workload.device)
                a, b = (_copied(model, ids) for model in (workload.base, _tuned(workload)))
                for selector, name in enumerate(TOKENS):
                    for layer in range(layers):
                        x, y = (v[layer][text.positions(name)].astype(np.float64) for v in (a, b))
                        d = y - x
                        sums = (x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), (d * d).sum(0))
                        totals[topic, selector, :, layer] += sums
        return of_tensors(workload, torch.from_numpy(totals))

    return run


def _copied(model: Model, ids: Tensor) -> list[np.ndarray]:
    """Each layer's neurons on one prompt, copied to the host; and one token generated."""
    found: list[np.ndarray] = []
    hooks = [
        block.mlp.down_proj.register_forward_hook(  # type: ignore[union-attr]
            lambda _, inputs, __: found.append(inputs[0][0].detach().float().cpu().numpy())
        )
        for block in model.blocks
    ]
    with torch.no_grad(), model.active() as hf:
        hf(input_ids=ids)
        for hook in hooks:
            hook.remove()
        hf.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    return found


def _tuned(workload: Workload) -> Model:
    return next(iter(workload.tuned.values()))
