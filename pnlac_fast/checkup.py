"""Whether a model is read and written as this package thinks, tried on the model itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pnlac_fast import prompts
from pnlac_fast.architecture import SITES
from pnlac_fast.errors import UserError, first_line
from pnlac_fast.models import Model
from pnlac_fast.passes import SHORTCUTS, UnvisitedError, run, tolerance, unusable

TEXTS = (9, 5, 7)  # tokens of the texts that are tried


def dry_run(model: Model) -> None:
    """Run a text of four tokens and its first two, and refuse a model that is not read as it should be.

    A site must run once in every layer, as wide as it should be; and what a block says of the first two tokens must not
    depend on those that follow.

    Raises
    ------
    UserError
        It names the site.
    """
    seen: dict[str, list[int]] = {site: [] for site in SITES}
    first: list[Tensor] = []
    tokens = _tokens(model, 4)
    (batch,) = prompts.batches([tokens, tokens[:2]], 8, device=model.device)

    def visit(site: str, layer: int, activation: Tensor, _: bool) -> None:
        seen[site].append(activation.shape[1])
        if site == "resid" and not layer:
            first.extend(activation[rows[:2]] for rows in batch.rows)

    try:
        run(model, batch, SITES, visit, shortcuts=())
    except UnvisitedError as error:
        if waiting := getattr(model.hf.config.get_text_config(), "cross_attention_layers", None):
            raise UserError(
                f"Layers of '{model.name}' run only beside an image (cross_attention_layers in its config: "
                f"{', '.join(map(str, waiting))}), so a text has no activations there: give a model of text alone."
            ) from error
        raise UserError(
            f"The sites of '{model.name}' do not run as its blocks are built ({error}): name the MLP's last projection "
            f"with --last-projection."
        ) from error
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"'{model.name}' (model type '{model.hf.config.model_type}') does not run on a few tokens here "
            f"({first_line(error)}): try --dtype float32, or check its config."
        ) from error
    for site, widths in seen.items():
        streams = getattr(model.hf.config.get_text_config(), "hc_mult", None)
        if set(widths) != {model.width(site)} and site == "resid" and streams:
            raise UserError(
                f"The blocks of '{model.name}' (model type '{model.hf.config.model_type}') pass on {streams} streams "
                f"for each token (hc_mult in its config), and no single residual stream: give another decoder."
            )
        if set(widths) != {model.width(site)} and site == "resid":
            raise UserError(
                f"The blocks of '{model.name}' (model type '{model.hf.config.model_type}') do not give one vector of "
                f"{model.width(site)} for each token, so there is no residual stream to read: give another decoder."
            )
        if set(widths) != {model.width(site)}:
            raise UserError(
                f"Site {site} of '{model.name}' ran with {sorted(set(widths))} neurons, expected {model.width(site)}: "
                f"name the MLP's last projection with --last-projection."
            )
    if _relative(*first) > tolerance(model):
        raise UserError(
            f"'{model.name}' (model type '{model.hf.config.model_type}') lets tokens look ahead, or mixes the texts of "
            f"a batch: give a causal decoder, with is_decoder in its config where there is such a field."
        )


def self_check(model: Model) -> dict[str, Any]:
    """Try on a model, in a few passes over short random texts, what every command takes for granted.

    Parameters
    ----------
    model
        From :func:`pnlac_fast.load_model` or :func:`pnlac_fast.loading.from_hf`.

    Returns
    -------
    dict
        ``layers``, ``blocks`` (their path), ``read`` (numbers of the blocks that are layers here, where not all are),
        ``mlp`` (paths of the projections, the last one at the end), ``unread`` (paths of other MLPs in the same blocks,
        whose neurons are no sites, where there are any), ``experts`` (of a block, 0 for none) and ``widths``
        (neurons of each site in a layer); ``shortcuts`` that ``cache`` takes, and why others are ``left_out``;
        ``checks``, for each its ``error``, the largest difference over the largest value of a site and layer, what is
        ``allowed`` in the model's dtype, and whether it ``holds``:

        batch
            A text in a batch gives the activations that it gives alone.
        padding
            Padding on the left and on the right give the same.
        reading
            Reading every site leaves the logits as they are.
        writing
            What is written to ``mlp_mid`` of the last layer changes ``mlp_out``, in proportion.
        halves
            Where gate and up are one linear layer: a change of the two outputs that are taken for a neuron's changes
            this neuron and no other.
        projection
            ``mlp_out`` is the last projection of ``mlp_mid``, computed here in float64. Left out where the weights are
            not plain tensors of this process: adapters, quantisation, tensor parallelism, biases of experts.

    Raises
    ------
    UserError
        As for :func:`dry_run`.
    """
    start = time.perf_counter()
    dry_run(model)
    texts = [_tokens(model, length, seed) for seed, length in enumerate(TEXTS)]
    alone = [_states(model, [text])[0] for text in texts]
    right, left = (_states(model, texts, side) for side in ("right", "left"))
    errors = {
        "batch": max(_error(a, b) for a, b in zip(alone, right, strict=True)),
        "padding": max(_error(a, b) for a, b in zip(right, left, strict=True)),
        "reading": _reading(model, texts[0]),
        "writing": _writing(model, texts[0]),
    }
    if model.architecture.projections[0].copies > 1 and not model.architecture.experts:
        errors["halves"] = _halves(model, texts[0])
    if (error := _projection(model, alone[0])) is not None:
        errors["projection"] = error
    allowed = tolerance(model)
    found, barred = model.architecture, unusable(model, SHORTCUTS, longest=max(TEXTS))
    return {
        "layers": len(model.blocks),
        "blocks": found.blocks,
        **({} if len(found.read) == len(model.hf.get_submodule(found.blocks)) else {"read": list(found.read)}),
        "mlp": [f"{part.path}.{part.name}" if found.experts else part.path for part in found.projections],
        **({"unread": list(found.unread)} if found.unread else {}),
        "experts": found.experts,
        "widths": {site: model.width(site) for site in SITES},
        "shortcuts": [name for name in SHORTCUTS if name not in barred],
        "left_out": barred,
        "checks": {n: {"error": e, "allowed": allowed, "holds": e <= allowed} for n, e in errors.items()},
        "seconds": round(time.perf_counter() - start, 2),
    }


def certify(report: Mapping[str, Any], name: str) -> None:
    """Refuse a model of which a check of :func:`self_check` does not hold.

    Raises
    ------
    UserError
        It names the checks.
    """
    failed = [check for check, found in report["checks"].items() if not found["holds"]]
    if failed == ["padding"]:
        raise UserError(
            f"'{name}' says something else where its texts are padded on the left: set padding_side to right in its "
            f"tokenizer, and judge it by log-probabilities rather than by answers that are generated in batches."
        )
    if failed:
        raise UserError(
            f"'{name}' does not pass its self-check ({', '.join(failed)}): try --dtype float32; if that does not help, "
            f"its figures would be wrong."
        )


_States = dict[tuple[str, int], Tensor]  # by site and layer, [position, neuron]


def _tokens(model: Model, count: int, seed: int = 0) -> list[int]:
    vocabulary = model.hf.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _states(model: Model, texts: Sequence[Sequence[int]], side: str = "right") -> list[_States]:
    """The activations of every text, all in one batch."""
    (batch,) = prompts.batches(texts, 1 << 20, padding_side=side, device=model.device)
    states: list[_States] = [{} for _ in texts]

    def visit(site: str, layer: int, activation: Tensor, _: bool) -> None:
        for i, rows in zip(batch.index, batch.rows, strict=True):
            states[i][site, layer] = activation[rows[0] : rows[-1] + 1].clone()

    run(model, batch, SITES, visit, shortcuts=())
    return states


def _error(truth: Mapping[tuple[str, int], Tensor], found: Mapping[tuple[str, int], Tensor]) -> float:
    return max(_relative(truth[key], found[key]) for key in truth)


def _relative(truth: Tensor, found: Tensor) -> float:
    """Largest difference over the largest value, infinite where either is not finite."""
    error = float((truth.double() - found.double()).abs().max() / truth.double().abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")


def _reading(model: Model, text: Sequence[int]) -> float:
    (batch,) = prompts.batches([text], len(text), device=model.device)
    with torch.inference_mode(), model.active() as hf:
        plain_logits = hf(**batch.inputs(), use_cache=False).logits
        with model.tapped("mlp_mid", lambda *_: None), model.tapped("resid", lambda *_: None):
            return _relative(plain_logits, hf(**batch.inputs(), use_cache=False).logits)


def _writing(model: Model, text: Sequence[int]) -> float:
    """How far the last MLP's output is from linear in what is written to its middle; infinite where it stays put."""
    (batch,) = prompts.batches([text], len(text), device=model.device)
    last, out = len(model.blocks) - 1, []
    for factor in (0.0, 1.0, 2.0):

        def write(_: int, activation: Tensor) -> Tensor:
            return activation * factor  # noqa: B023

        def read(_: int, activation: Tensor) -> None:
            out.append(activation.double().clone())

        with torch.inference_mode(), model.active() as hf, ExitStack() as taps:
            taps.enter_context(model.tapped("mlp_mid", write, [last]))
            taps.enter_context(model.tapped("mlp_out", read, [last]))
            hf(**batch.inputs(), use_cache=False)
    zero, once, twice = out
    moved = (once - zero).abs().max()
    return float((twice - 2 * once + zero).abs().max() / moved) if moved else float("inf")


def _halves(model: Model, text: Sequence[int]) -> float:
    """How much other neurons move, over how much one does, when its two outputs of a fused projection do."""
    (batch,) = prompts.batches([text], len(text), device=model.device)
    last, fused = len(model.blocks) - 1, model.architecture.projections[0]
    neuron = model.architecture.width // 3
    index, _ = fused.place(torch.tensor([neuron]), model.architecture.width)
    seen: list[Tensor] = []

    def add(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out.index_add(-1, index.to(out.device), torch.ones_like(out[..., : len(index)]))

    for change in (False, True):
        with torch.inference_mode(), model.active() as hf, ExitStack() as taps:
            if change:
                taps.callback(model.projection(last, fused.name).register_forward_hook(add).remove)
            taps.enter_context(model.tapped("mlp_mid", lambda _, a: seen.append(a.double().clone()), [last]))
            hf(**batch.inputs(), use_cache=False)
    moved = (seen[1] - seen[0]).abs().amax((0, 1))
    own = float(moved[neuron])
    moved[neuron] = 0
    return float(moved.max()) / own if own else float("inf")


@torch.inference_mode()
def _projection(model: Model, states: Mapping[tuple[str, int], Tensor]) -> float | None:
    errors = []
    for layer, block in enumerate(model.blocks):
        found = _weights(model, block.get_submodule(model.architecture.down.path))
        if found is None:
            return None
        weight, bias = found
        middle = states["mlp_mid", layer].double() @ weight.double()
        errors.append(_relative(states["mlp_out", layer], middle if bias is None else middle + bias.double()))
    return max(errors)


def _weights(model: Model, module: Any) -> tuple[Tensor, Tensor | None] | None:
    """The last projection, [neuron, output], and its bias; None where they are not plain tensors of this process."""
    weight = getattr(module, "down_proj" if model.architecture.experts else "weight", None)
    if model.part.ranks > 1 or type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta:
        return None
    if model.architecture.experts:
        wide = weight if module.is_transposed else weight.transpose(1, 2)
        return None if module.has_bias else (wide.flatten(0, 1), None)
    if isinstance(module, nn.Linear | Conv1D):
        return weight if isinstance(module, Conv1D) else weight.T, module.bias
    return None
