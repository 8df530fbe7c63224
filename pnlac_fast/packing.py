"""Sequences in one row without padding, what they share at the front computed once.

A causal model gives a token the same activations in every sequence that begins with the same tokens. So sequences are
laid out as a tree: each one adds only the tokens behind what it shares with the sequences before it, at any depth, and
attends to the rows of its whole path. Keys and values of a shared front are computed once a layer and read by all that
share it; no cache outlives a pass. Everything outside attention sees one long row of tokens that are all different.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "pnlac_packed"
STEP = 16  # own lengths that differ by less attend together; inside attention only, the shorter ones are padded


@dataclass(frozen=True, eq=False)
class Segments:
    """Sequences of a pack whose own tokens are about equally many, so that they attend in one call.

    Attributes
    ----------
    queries, keys
        int64 [sequence, query] and [sequence, key]: rows of the pack, right-aligned; padding points at row 0.
    lengths
        int64 [sequence]: how many keys are real.
    real, rows
        int64 [own token]: where the own tokens stand among the flattened queries, and their rows in the pack.
    """

    queries: Tensor
    keys: Tensor
    lengths: Tensor
    real: Tensor
    rows: Tensor
    _masks: dict[tuple[torch.dtype, int | None], Tensor] = field(default_factory=dict)

    def mask(self, dtype: torch.dtype, window: int | None) -> Tensor:
        """[sequence, 1, query, key], what a query may read: bool, or of a floating dtype to be added to the logits."""
        if (dtype, window) not in self._masks:
            query, key = self.queries.shape[1], self.keys.shape[1]
            before_end = torch.arange(key, device=self.keys.device) - key  # -1 is the last key, and the last query
            at = torch.arange(query, device=self.keys.device)[:, None] - query
            seen = before_end <= at
            if window is not None:
                seen &= before_end > at - window
            allowed = (seen & (before_end >= -self.lengths[:, None, None]))[:, None]
            if dtype != torch.bool:
                added = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
                allowed = added.masked_fill_(~allowed, torch.finfo(dtype).min)
            self._masks[dtype, window] = allowed
        return self._masks[dtype, window]


@dataclass(frozen=True, eq=False)
class Pack:
    """Sequences as one row of tokens.

    Attributes
    ----------
    index
        Which sequences these are.
    rows
        For each of them the row of every position, front first.
    ids, positions
        int64 [1, row]: token ids, and the position of each in its sequences.
    segments
        Who attends to what.
    """

    index: tuple[int, ...]
    rows: tuple[Sequence[int], ...]
    ids: Tensor
    positions: Tensor
    segments: tuple[Segments, ...]
    _elsewhere: dict[torch.device, tuple[Segments, ...]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Segments, ...]:
        """The segments on a device, for blocks that are not where the first one is."""
        if device == self.ids.device:
            return self.segments
        if device not in self._elsewhere:
            self._elsewhere[device] = tuple(
                Segments(
                    s.queries.to(device), s.keys.to(device), s.lengths.to(device), s.real.to(device), s.rows.to(device)
                )
                for s in self.segments
            )
        return self._elsewhere[device]

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a Hugging Face forward pass inside :func:`attending`."""
        return {"input_ids": self.ids, "position_ids": self.positions}


def packs(
    sequences: Sequence[Sequence[int]], budget: int, *, share: bool = True, device: torch.device | str = "cpu"
) -> Iterator[Pack]:
    """Token id lists as packs of about ``budget`` tokens at most, all of about one size.

    The order is that of the ids, so that sequences with a common front stand together; the same sequences always make
    the same packs. Without ``share`` every sequence is computed whole.
    """
    order, shared = in_order(sequences, share=share)
    total = sum(map(len, sequences)) - sum(shared)
    longest = max(map(len, sequences), default=0)
    limit = min(budget, total // max(1, -(-total // budget)) + longest)  # so that the last pack is no remnant
    first = size = 0
    for n, i in enumerate(order):
        own = len(sequences[i]) - shared[n]
        if n > first and size + own > limit:
            yield _pack(sequences, order[first:n], shared[first:n], device)
            first = n
        size = size + own if n > first else len(sequences[i])
    if order:
        yield _pack(sequences, order[first:], shared[first:], device)


def in_order(sequences: Sequence[Sequence[int]], *, share: bool = True) -> tuple[list[int], list[int]]:
    """Indices of sequences in the order of their ids, and how many tokens each shares with the one before it.

    The sum of lengths less the sum of shared tokens is the number of tokens that differ in their path.
    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    shared = [0] * len(order)
    if share:
        for n in range(1, len(order)):
            shared[n] = _common(sequences[order[n - 1]], sequences[order[n]])
    return order, shared


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share at the front."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _pack(
    sequences: Sequence[Sequence[int]], index: Sequence[int], shared: Sequence[int], device: torch.device | str
) -> Pack:
    """Lay sequences out that are in the order of their ids; ``shared`` counts what each has in common with the last."""
    ids: list[int] = []
    positions: list[int] = []
    paths: list[list[int]] = []
    groups: dict[int, list[int]] = {}
    for n, i in enumerate(index):
        front = shared[n] if n else 0
        own = sequences[i][front:]
        paths.append([*(paths[-1][:front] if n else ()), *range(len(ids), len(ids) + len(own))])
        positions += range(front, len(sequences[i]))
        ids += own
        if own:
            groups.setdefault(-(-len(own) // STEP), []).append(n)
    segments = tuple(
        _segments([paths[n] for n in group], [len(paths[n]) - (shared[n] if n else 0) for n in group], device)
        for _, group in sorted(groups.items())
    )

    def row(values: list[int]) -> Tensor:
        return torch.tensor([values], dtype=torch.int64).to(device)

    return Pack(tuple(index), tuple(paths), row(ids), row(positions), segments)


def _segments(paths: Sequence[list[int]], own: Sequence[int], device: torch.device | str) -> Segments:
    query, key = max(own), max(map(len, paths))
    queries, keys = torch.zeros(len(paths), query, dtype=torch.int64), torch.zeros(len(paths), key, dtype=torch.int64)
    for n, path in enumerate(paths):
        keys[n, key - len(path) :] = torch.tensor(path)
        queries[n, query - own[n] :] = torch.tensor(path[-own[n] :])
    lengths = torch.tensor([len(path) for path in paths])
    is_own = torch.arange(query) >= query - torch.tensor(own)[:, None]
    real = is_own.flatten().nonzero()[:, 0]
    queries, keys, lengths, real = (t.to(device) for t in (queries, keys, lengths, real))
    return Segments(queries, keys, lengths, real, queries.flatten()[real])


_running: ContextVar[tuple[Pack, bool]] = ContextVar("pack")  # the pack, and whether the model attends by "eager"
_set_aside: dict[int, str] = {}  # how models inside of ``packed`` attend outside, by the id of their configurations


@contextmanager
def packed(hf: Any) -> Iterator[None]:
    """Let a Hugging Face model attend as packs say, for any number of passes inside the block; may be nested.

    To say so once a pass would cost two walks over all modules, 12 ms with adapters on 32 layers.
    """
    key, before = id(hf.config), hf.config._attn_implementation
    if key in _set_aside:
        yield
        return
    _set_aside[key] = before
    try:
        hf.set_attn_implementation(NAME)
        yield
    finally:
        hf.set_attn_implementation(before)
        del _set_aside[key]


@contextmanager
def attending(hf: Any, pack: Pack) -> Iterator[None]:
    """Let a Hugging Face model attend as a pack says, inside the block; its next inputs must be those of the pack."""
    with packed(hf):
        token = _running.set((pack, _set_aside[id(hf.config)] == "eager"))
        try:
            yield
        finally:
            _running.reset(token)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of one layer over the current pack: query, key and value [1, head, row, width], as transformers asks.

    The model's own function computes it, a few segments at a time, so that scale, soft cap and the like are its own.
    Where that is a fused kernel for whole batches, torch's scaled_dot_product_attention takes its place.
    """
    pack, eager = _running.get()
    attend = sys.modules[type(module).__module__].eager_attention_forward if eager else ALL_ATTENTION_FUNCTIONS["sdpa"]
    q, k, v = (stream[0].transpose(0, 1) for stream in (query, key, value))  # [row, head, width]
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    for part in pack.on(q.device):
        mask = part.mask(q.dtype if eager else torch.bool, options.get("sliding_window"))
        streams = (x[index].transpose(1, 2) for x, index in ((q, part.queries), (k, part.keys), (v, part.keys)))
        attended, _ = attend(module, *streams, mask, **options)  # [sequence, query, head, width]
        out.index_copy_(0, part.rows, attended.flatten(0, 1)[part.real])
    return out[None], None


AttentionInterface.register(NAME, _attend)
