"""The middle of a gated MLP and the contrast sums over it, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from pnlac_fast.ops import checks, reference
from pnlac_fast.ops.dispatch import PREFERRED, define, engines
from pnlac_fast.ops.swiglu import check_swiglu


def swiglu_contrast(
    gate: Tensor,
    up: Tensor,
    base: Tensor,
    base_rows: Tensor,
    counts: Tensor,
    sums: Tensor,
    activation: str = "silu",
    *,
    engine: str = "auto",
) -> Tensor:
    """What :func:`swiglu` returns, and the :func:`contrast` of it with kept activations, added up in the same pass.

    Parameters
    ----------
    gate, up, activation
        As for :func:`swiglu`, [row, neuron]. No gradient flows.
    base
        [kept, neuron], the base model's activations, dtype of ``gate``.
    base_rows
        [row] int64, the row of ``base`` that each row is contrasted with; -1 where no group counts the row.
    counts
        [group, row] float32, how often each group counts each row: whole numbers from 0. Where it is 0, nothing of the
        row reaches the sums of the group, not even NaN.
    sums
        [group, 5, neuron] float64, added to: the sums of :func:`contrast`, with the result in the place of ``tuned``
        and every row added as often as it counts.
    engine
        As for :func:`contrast`. Tiles are 64 successive rows here, so that the sums differ from those of
        :func:`contrast` by rounding.

    Returns
    -------
    Tensor
        [row, neuron], the activations, with the same bits as :func:`swiglu` gives them by the same engine.

    Raises
    ------
    UserError
        Activation or engine is unknown, or the engine is not available or does not run on the device.
    RuntimeError
        Shapes, dtypes or devices do not fit; a count is not a whole number from 0; a row of ``base`` does not exist.

    Examples
    --------
    >>> import torch
    >>> sums = torch.zeros(1, 5, 1, dtype=torch.float64)
    >>> x, one = torch.tensor([[100.0], [200.0]]), torch.ones(2, 1)
    >>> swiglu_contrast(x, one, 2 * one, torch.tensor([0, -1]), torch.tensor([[2.0, 0.0]]), sums)
    tensor([[100.],
            [200.]])
    >>> sums[0, :, 0].tolist()
    [4.0, 200.0, 8.0, 20000.0, 19208.0]
    """
    _check(gate, up, base, base_rows, counts, sums, activation)
    total = sums.contiguous()
    mid = _SWIGLU_CONTRAST.on(gate.device, engine)(
        checks.dense(gate),
        checks.dense(up),
        checks.dense(base),
        base_rows.contiguous(),
        counts.contiguous(),
        total,
        activation,
    )
    if not sums.is_contiguous():
        sums.copy_(total)
    return mid


def _check(
    gate: Tensor, up: Tensor, base: Tensor, base_rows: Tensor, counts: Tensor, sums: Tensor, activation: str
) -> None:
    check_swiglu("swiglu_contrast", gate, up, activation)
    checks.activations("swiglu_contrast", gate=gate, base=base)
    checks.one_width("swiglu_contrast", gate=gate, base=base)
    checks.indices("swiglu_contrast", base_rows=base_rows)
    rows = gate.shape[0]
    if base_rows.shape[0] != rows:
        raise RuntimeError(
            f"swiglu_contrast: base_rows must have an entry for each of the {rows} rows, not {base_rows.shape[0]}."
        )
    if counts.dim() != 2 or counts.dtype != torch.float32 or counts.shape[1] != rows:
        raise RuntimeError(
            f"swiglu_contrast: counts must be float32 [group, {rows}], not {counts.dtype} {list(counts.shape)}."
        )
    checks.sums("swiglu_contrast", sums, (counts.shape[0], 5, gate.shape[1]), "groups as in counts")
    checks.one_device("swiglu_contrast", gate=gate, base=base, base_rows=base_rows, counts=counts, sums=sums)


def _fake(
    gate: Tensor, up: Tensor, base: Tensor, base_rows: Tensor, counts: Tensor, sums: Tensor, activation: str
) -> Tensor:
    _check(gate, up, base, base_rows, counts, sums, activation)
    return gate.new_empty(gate.shape)


_SWIGLU_CONTRAST = define(
    "swiglu_contrast",
    "(Tensor gate, Tensor up, Tensor base, Tensor base_rows, Tensor counts, Tensor(a!) sums, str activation) -> Tensor",
    reference=reference.swiglu_contrast,
    check=_fake,
)


def fuses(device: torch.device, engine: str = "auto") -> bool:
    """Return whether computing the product and its sums in one pass saves time on ``device``, with ``engine``.

    It does where the sums are Triton's anyway, for want of a compiled kernel for CUDA, or because it is asked for. Not
    on the CPU: there a whole capture took 1.030 of the bare passes with it and 1.027 without (hidden 2048, float32, one
    thread, medians of five), since a row is still in cache when the sums come to it. Nor beside the kernel for CUDA: on
    an H100 1.13 [1.11, 1.28] with it and 1.00 [0.99, 1.10] without (shape of an 8B model with LoRAs, bfloat16, passes
    of about 900 tokens, medians of three). So small a pass is likely to wait for the host, which a launch of Triton
    keeps longer; larger ones have not been measured.
    """
    usable = [e for e in PREFERRED.get(device.type, ()) if engines()[e] == "available"]
    return engine in ("auto", "triton") and "triton" in (usable[:1] if engine == "auto" else usable)
