"""What the statistics cost on top of the passes: capture over the same passes on the same tokens without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pnlac_fast import capture
from pnlac_fast.benchmarking.agreement import TOKENS, TOLERANCE, distance, of_captures
from pnlac_fast.benchmarking.timing import interleaved, ratio
from pnlac_fast.benchmarking.workloads import Workload
from pnlac_fast.packing import packs
from pnlac_fast.passes import SHORTCUTS, run

BUDGET = 2048  # tokens of a pass
PLAIN = tuple(name for name in SHORTCUTS if name != "fuse")


def bare(workload: Workload) -> Callable[[], None]:
    """The passes that capture makes, over the same packs and as far as capture goes, with nothing read."""
    found = []
    for group in workload.texts.values():
        for pack in packs([text.ids for text in group], BUDGET, device=workload.device):
            chosen = [(group[i], rows) for i, rows in zip(pack.index, pack.rows, strict=True)]
            take = sorted({rows[p] for text, rows in chosen for name in TOKENS for p in text.positions(name)})
            found.append((pack, torch.tensor(take, device=workload.device)))

    def passes() -> None:
        for pack, take in found:
            for model in (workload.base, *workload.tuned.values()):
                run(model, pack, ["mlp_mid"], lambda *_: None, take=take, shortcuts=PLAIN)

    return passes


def capturing(workload: Workload, shortcuts: tuple[str, ...]) -> Callable[[], list[capture.Sums]]:
    """Capture, topic by topic."""

    def run_all() -> list[capture.Sums]:
        return [
            capture.accumulate(
                workload.base, workload.tuned, group, tokens=TOKENS, batch_tokens=BUDGET, shortcuts=shortcuts
            )
            for group in workload.texts.values()
        ]

    return run_all


def measure(workload: Workload, repeats: int = 5) -> dict[str, Any]:
    """Check that hooks and the fused kernel find the same, then time both over the bare passes, for one tuned model.

    Returns
    -------
    dict
        ``shape``; ``hooked``: capture by hooks over the bare passes; ``fused``: the same for capture whose sums are
        taken up while the MLP computes its product, by a kernel in place of torch's.

    Raises
    ------
    RuntimeError
        The two ways of capture disagree.
    """
    workload = workload.first(1)
    ways: dict[str, Callable[[], Any]] = {
        "bare": bare(workload),
        "hooked": capturing(workload, PLAIN),
        "fused": capturing(workload, tuple(SHORTCUTS)),
    }
    hooked, fused = (of_captures(ways[name]()).figures() for name in ("hooked", "fused"))
    apart = distance(hooked, fused)
    if not apart <= TOLERANCE[workload.base.hf.dtype]:
        raise RuntimeError(f"Hooks and the fused kernel differ by {apart:.1e} of what activations typically are.")
    seconds = interleaved(ways, repeats, workload.device)
    return {"shape": workload.shape} | {name: ratio(seconds[name], seconds["bare"]) for name in ("hooked", "fused")}
