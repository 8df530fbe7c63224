"""One forward pass that reads sites, and the work it can do without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import Tensor

from pnlac_fast import ops, prompts
from pnlac_fast.architecture import SITES, backbone
from pnlac_fast.errors import first_line
from pnlac_fast.models import Model
from pnlac_fast.packing import Pack, attending, packs
from pnlac_fast.profiling import staged
from pnlac_fast.prompts import Batch

SHORTCUTS = {
    "share": "compute what texts have in common at the front once",
    "pack": "run texts as one row without padding",
    "fuse": "compute the product in the middle of an MLP, and its sums, in one pass (on a GPU, by Triton)",
    "stop": "compute nothing behind the last site, nor rows there that are not read",
    "base": "run the base model once for all tuned models",
    "overlap": "write one unit while the next is computed",
}
Visit = Callable[[str, int, Tensor, bool], None]
Middle = Callable[[int, Tensor, Tensor, str], Tensor]


class UnvisitedError(RuntimeError):
    """A pass in which a site did not run exactly once per layer."""


class _Stop(Exception):
    """Ends a pass once the last site is read."""


@staged("capture")
def run(
    model: Model,
    batch: Batch | Pack,
    sites: Sequence[str],
    visit: Visit,
    *,
    take: Tensor | None = None,
    middle: Middle | None = None,
    shortcuts: Collection[str] = SHORTCUTS,
) -> None:
    """Run a model over a batch and show the activations of each site and layer.

    Parameters
    ----------
    visit
        Called as ``visit(site, layer, activation, taken)`` with [row, neuron]; ``taken`` says that these are the rows
        ``take`` only, which can happen in the last layer.
    take
        int64 [kept]: the only rows of interest; None for all.
    middle
        Computes act(gate) * up in place of :func:`pnlac_fast.ops.swiglu`, as ``middle(layer, gate, up, activation)``,
        each [row, neuron]. Only with the shortcut "fuse".

    Raises
    ------
    UnvisitedError
        A site was not visited exactly once per layer.
    """
    last, final = len(model.blocks) - 1, max(sites, key=SITES.index)
    stop, home = "stop" in shortcuts, model.device
    trim = stop and final != "resid" and take is not None
    visits: Counter[tuple[str, int]] = Counter()

    def tap(site: str) -> Callable[[int, Tensor], None]:
        def read(layer: int, activation: Tensor) -> None:
            visits[site, layer] += 1
            visit(site, layer, activation.flatten(0, 1).to(home), trim and layer == last)
            if stop and layer == last and site == final:
                raise _Stop

        return read

    with torch.inference_mode(), model.active() as hf, ExitStack() as stack:
        for site in sites:
            stack.enter_context(model.tapped(site, tap(site)))
        if trim:
            assert take is not None
            stack.enter_context(model.trimmed(last, take))
        if "fuse" in shortcuts:
            stack.enter_context(model.gated(middle or _plain_middle))
        if isinstance(batch, Pack):
            stack.enter_context(attending(hf, batch))
        with suppress(_Stop):
            (backbone(hf) if stop else hf)(**batch.inputs(), use_cache=False)
    if dict(visits) != {(site, layer): 1 for site in sites for layer in range(last + 1)}:
        raise UnvisitedError(
            f"{visits.total()} sites were visited in a pass of '{model.name}', expected {len(sites) * (last + 1)}: "
            f"its layers are skipped or run twice, so its statistics would be wrong"
        )


def _plain_middle(layer: int, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ops.swiglu(gate, up, activation)


def usable(model: Model, shortcuts: Collection[str], *, longest: int, engine: str = "auto") -> list[str]:
    """The shortcuts that a model bears, in the order of :data:`SHORTCUTS`; see :func:`unusable`."""
    barred = unusable(model, shortcuts, longest=longest, engine=engine)
    return [name for name in SHORTCUTS if name in shortcuts and name not in barred]


def unusable(model: Model, shortcuts: Collection[str], *, longest: int, engine: str = "auto") -> dict[str, str]:
    """Those of ``shortcuts`` that a model does not bear or that would save nothing, and why, in a clause.

    "pack", "fuse" and "stop" change how a model is run. Each is tried on a few short texts, and kept if it gives the
    activations of the plain way, but for rounding: a model that mixes tokens by other means than attention, or whose
    MLP is another one than it looks, is run plainly.

    Parameters
    ----------
    longest
        Tokens of the longest text.
    engine
        Engine of the sums, which decides whether fusing saves anything: :func:`pnlac_fast.ops.fuses`.
    """
    reasons: dict[str, str] = {}
    chunk = getattr(model.hf.config.get_text_config(), "attention_chunk_size", None)
    if chunk is not None and longest > chunk:
        reasons["pack"] = f"it attends in chunks of {chunk} tokens, by masks of its own"
    elif not model.hf._can_set_attn_implementation():
        reasons["pack"] = "its attention is not behind transformers' interface"
    if model.activation is None:
        reasons["fuse"] = "its MLPs are not gated by projections of their own, or not by an activation of this package"
    elif not ops.fuses(model.device, engine):
        reasons["fuse"] = "it saves nothing here"
    for name in ("pack", "fuse", "stop"):
        if name not in shortcuts or name in reasons:
            continue
        try:
            if not agrees(model, name):
                reasons[name] = "it changes activations by more than rounding"
        except (RuntimeError, TypeError, ValueError) as error:  # such as attention with a bias by position
            reasons[name] = f"it does not run with it ({first_line(error)})"
    if "pack" not in shortcuts or "pack" in reasons:
        reasons["share"] = "it needs pack"
    return {name: reason for name, reason in reasons.items() if name in shortcuts}


def agrees(model: Model, shortcut: str) -> bool:
    """Whether "pack", "fuse" or "stop" gives the activations of the plain way, on a few short texts.

    Those compared are the last hidden states, and with "stop" the middle and the output of the last MLP.
    """
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.hf.config.get_text_config().vocab_size, (11,), generator=draw).tolist()
    texts = [tokens[:7], [*tokens[:4], *tokens[8:11]], [*tokens[:6], tokens[9]], tokens[5:10]]
    batch: Batch | Pack
    (plain,) = prompts.batches(texts, 100, device=model.device)
    (batch,) = packs(texts, 100, device=model.device) if shortcut == "pack" else (plain,)
    sites = ("mlp_mid", "mlp_out") if shortcut == "stop" else ("resid",)
    found = []
    for way, taken in ((plain, ()), (batch, (shortcut, "stop"))):
        take = torch.tensor(sorted(row for rows in way.rows for row in rows), device=model.device)
        states: dict[str, Tensor] = {}

        def visit(site: str, layer: int, activation: Tensor, trimmed: bool) -> None:
            states[site] = activation if trimmed else activation.index_select(0, take)  # noqa: B023

        run(model, way, sites, visit, take=take, shortcuts=taken)
        place = {row: i for i, row in enumerate(take.tolist())}
        rows = {i: [place[row] for row in rows] for i, rows in zip(way.index, way.rows, strict=True)}
        found.append([torch.cat([states[site][rows[i]] for i in range(len(texts))]).double() for site in sites])
    allowed = tolerance(model)
    # NaN is for the run itself to report
    return not any(bool((a - b).abs().max() > allowed * a.abs().max()) for a, b in zip(*found, strict=True))


def tolerance(model: Model) -> float:
    """How far activations may differ by rounding, over the largest of them, in a model's precision."""
    precise = model.hf.dtype in (torch.float32, torch.float64) and not getattr(model.hf, "is_quantized", False)
    return 1e-3 if precise else 0.05
