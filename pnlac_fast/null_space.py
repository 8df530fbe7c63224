"""Null space: MLP rows that train while they keep to input directions that other topics hardly use.

A neuron that is trained on one topic answers others too, because their inputs have much in common: the rows of gate and
up move along what all prompts share. Taken out of every step, the leading directions of the base's MLP inputs on other
topics leave a neuron there what it was, while on the tuned topic it learns with the rest. Needs prompts of other
topics, but no labels. As for a KL to base, judge it on topics that it has not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from pnlac_fast.architecture import plain
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model
from pnlac_fast.penalties import adapter_off, decoder_of, require_whole
from pnlac_fast.references import Reference, predict
from pnlac_fast.sliced import Sliced


class NullSpace(TrainerCallback):
    """Keeps what trains in gate and up out of other topics' leading input directions, as a callback of a Trainer.

    Of ``transformers.Trainer`` or TRL's ``SFTTrainer``. For each layer it takes the eigenvectors of the second moments
    of the base's MLP inputs, from the highest on until they hold ``share`` of the trace; what a step moves along
    them is taken back, and what it moves in biases, whose input is the same on all topics. With LoRA the rows of gate's
    and up's A lose their part in them, at first too, which changes nothing while B is zero. What trains elsewhere is
    free, so it goes with :class:`pnlac_fast.inhibition.InhibitFT` in the mode "specific", or with LoRA on MLPs.

    Parameters
    ----------
    texts
        From :func:`pnlac_fast.references.references`; the inputs that predict their counted tokens are read.
    share
        The share, in (0, 1), of the mean squared input that lies in the directions which are left alone. More protects
        more and leaves less to learn with.
    batch_size
        Texts that are read together.
    last_projection
        As for :func:`pnlac_fast.load_model`.

    Attributes
    ----------
    directions
        By layer, float32 [input, direction], orthonormal, on the model's device, once the Trainer is made; none for
        layers in whose gate and up nothing trains.
    steps
        Optimizer steps that were projected.

    Notes
    -----
    After the null spaces of arXiv 2103.07113 (continual learning, where old tasks' inputs are spared) and 2410.02355
    (edits of facts); for neurons and topics it is ours. Before training it takes layers x input^2 x 4 bytes, and for
    each layer the eigenvectors of an input x input matrix.
    """

    name = "the null space"

    def __init__(
        self,
        texts: Sequence[Reference],
        share: float = 0.8,
        *,
        batch_size: int = 16,
        last_projection: str | None = None,
    ) -> None:
        if not 0 < share < 1:
            raise UserError(f"A null-space share of {share:g} leaves nothing alone, or nothing to learn: give 0.8.")
        if not texts or batch_size < 1:
            raise UserError(f"{len(texts)} texts in parts of {batch_size} show nothing: give at least one of each.")
        self.texts, self.share, self.batch_size = list(texts), share, batch_size
        self.last_projection = last_projection
        self.directions: dict[int, Tensor] = {}
        self.steps = 0
        self._model: nn.Module | None = None
        self._hooks: list[Any] = []
        self._held: list[tuple[_Trained, Tensor, Tensor]] = []

    @property
    def nbytes(self) -> int:
        """What the directions take, and what is kept beside the weights while they train."""
        return sum(d.nbytes for d in self.directions.values()) + sum(before.nbytes for *_, before in self._held)

    def prepare(self, model: nn.Module) -> None:
        """Read the base's inputs while the model still is the base. The Trainer does it by itself."""
        if self._model is not model:
            decoder = decoder_of(model, self.last_projection)
            layers = [i for i, modules in enumerate(_into(decoder)) if any(_trains(m) for _, m in modules)]
            with adapter_off(model):  # which takes the flags of what trains off, too
                moments = _moments(decoder, layers, self.texts, self.batch_size)
            self.directions = {layer: leading(moment, self.share) for layer, moment in moments.items()}
            self._model = model

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Prepare; at this point the Trainer has read no checkpoint."""
        self.prepare(model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Find what trains, and put the hooks on the optimizer's step."""
        require_whole(model, args, self.name)
        if self._model is not model:
            raise UserError(
                "NullSpace has not seen this model before it was trained: give it to the Trainer as callbacks=[...], "
                "with the model itself instead of a model_init."
            )
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self.remove()
        self.steps, self._first = 0, state.global_step
        # A LoRA's A is itself a change; of other weights a change is what they have moved since the step before.
        self._held = [
            (one, self.directions[one.layer], one.parameter.detach() * (1 if one.after is None else 0))
            for one in _trained(decoder_of(model, self.last_projection))
        ]
        if not self._held:
            raise UserError("Nothing trains in gate or up, so there is no null space: add mode specific, or leave it.")

        @torch.no_grad()
        def project(*_: Any) -> None:
            for one, directions, before in self._held:
                if one.inputs is None:
                    one.parameter.copy_(before)
                    continue
                rows = (one.parameter - before).movedim(one.inputs, -1).to(directions.dtype)
                along = (rows @ directions @ directions.T).movedim(-1, one.inputs)
                one.parameter.sub_(along.to(before.dtype))
                if one.after is None:
                    before.copy_(one.parameter)

        def count(*_: Any) -> None:
            self.steps += 1

        if not state.global_step:  # a checkpoint to resume from is projected already
            if any(one.after is not None and one.after.any() for one, *_ in self._held):
                raise UserError("The adapter has been trained without this null space: start from a fresh LoRA.")
            project()
        self._hooks = [optimizer.register_step_post_hook(hook) for hook in (project, count)]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks, and verify that they worked."""
        self.remove()
        if state.global_step > self._first and not self.steps:
            raise RuntimeError("The null space had no effect: no optimizer step was projected.")

    def remove(self) -> None:
        """Take the hooks off the optimizer. The end of training does it by itself; an interruption does not."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._held = [], []


def leading(moment: Tensor, share: float) -> Tensor:
    """The fewest directions that hold a share of the second moments, float32 [input, direction], orthonormal. Ours.

    Parameters
    ----------
    moment
        float32 [input, input], the sum of outer products of the inputs.
    share
        Of its trace, in (0, 1).
    """
    held, directions = torch.linalg.eigh(moment)
    held = held.flip(0).clamp(min=0).cumsum(0)
    count = int((held < share * held[-1]).sum()) + 1
    return directions[:, -count:].contiguous()


def _moments(model: Model, layers: Sequence[int], texts: Sequence[Reference], batch_size: int) -> dict[int, Tensor]:
    """Sums of the outer products of the MLP's inputs by layer, float32 [input, input]."""
    into = _into(model)
    seen: dict[int, Tensor] = {}
    moments: dict[int, Tensor] = {}
    training = [m for m in model.hf.modules() if m.training]
    with ExitStack() as place, torch.no_grad():
        for m in training:
            m.training = False
            place.callback(setattr, m, "training", True)
        for layer in layers:
            _, module = into[layer][0]

            def see(_: nn.Module, args: Any, layer: int = layer) -> None:
                seen[layer] = args[0].detach()

            place.callback(module.register_forward_pre_hook(see).remove)
        for start in range(0, len(texts), batch_size):
            _, counted = predict(model, texts[start : start + batch_size])
            for layer in layers:
                inputs = seen.pop(layer).flatten(0, -2)
                inputs = inputs[counted.flatten().to(inputs.device)].float()
                moments[layer] = moments.get(layer, 0) + inputs.T @ inputs
    return moments


class _Trained(NamedTuple):
    """A parameter of gate or up that trains."""

    layer: int
    parameter: nn.Parameter
    inputs: int | None  # which dimension is that of the inputs; None of a bias, whose input is 1 on every topic
    after: nn.Parameter | None  # B, where the parameter is A of a LoRA, and so itself a change


def _into(model: Model) -> list[list[tuple[str, Any]]]:
    """Gate and up, or what the MLP has in their place, by layer: names and modules, which all get the MLP's input."""
    parts = [part for part in model.architecture.projections if part.inward]
    return [[(part.name, block.get_submodule(part.path)) for part in parts] for block in model.blocks]


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _trained(model: Model) -> Iterator[_Trained]:
    for layer, modules in enumerate(_into(model)):
        for part, module in modules:
            inner = plain(module)
            linear = isinstance(inner, nn.Linear | Conv1D)
            if isinstance(module, Sliced):
                for name, place in module.places.items():
                    own = getattr(module, f"slice_{name}")
                    if name in ("bias", f"{part}_bias"):
                        yield _Trained(layer, own, None, None)
                    elif name in ("weight", part):
                        last = place.first is not None or place.dim == 0  # else of a Conv1D, [input, neuron]
                        yield _Trained(layer, own, -1 if last else 0, None)
            elif linear:
                if inner.weight.requires_grad:
                    yield _Trained(layer, inner.weight, -1 if isinstance(inner, nn.Linear) else 0, None)
                if inner.bias is not None and inner.bias.requires_grad:
                    yield _Trained(layer, inner.bias, None, None)
            for name, factor in getattr(module, "lora_A", {}).items():
                if factor.weight.requires_grad and not linear:
                    raise UserError("A LoRA on experts has no null space: tune in full, with mode specific.")
                if factor.weight.requires_grad:
                    yield _Trained(layer, factor.weight, -1, module.lora_B[name].weight)
