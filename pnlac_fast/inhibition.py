"""InhibitFT: a fine-tune in which chosen neurons keep their weights, or in which only chosen neurons train.

After "Understanding and Mitigating Political Stance Cross-topic Generalization in Large Language Models"
(arXiv 2508.02360). It is a callback of ``transformers.Trainer``, and so of TRL's ``SFTTrainer``::

    trainer = Trainer(model, args, train_dataset=rows, callbacks=[InhibitFT(neurons)])
    trainer.train()

Neuron j of ``mlp_mid`` is row j of gate and up, weights and biases, and column j of down. Coordinate i of ``mlp_out``
is row i of down and its bias. With LoRA (W + B A) the same rows of B and columns of A are held at zero, so that the
merged change is exactly zero there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback

from pnlac_fast.errors import UserError, unknown
from pnlac_fast.models import Model, Weights
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.slices import PARTS, Slices, slice_neurons

MODES = ("freeze", "specific")
_EXTRA = (
    "{} parameters that do not belong to the chosen neurons would train: do not change requires_grad after the Trainer "
    "is made."
)


@dataclass(frozen=True, eq=False)
class Mask:
    """Entries of one trainable parameter that must not move: ``parameter.index_select(dim, still)``.

    Attributes
    ----------
    name
        The parameter's name in the model.
    still
        int64 [index], on the parameter's device.
    low_rank
        Whether the parameter is a LoRA factor, whose still entries are zero; else they are the base model's weights.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    still: Tensor
    low_rank: bool

    def values(self) -> Tensor:
        """A copy of the entries."""
        return self.parameter.detach().index_select(self.dim, self.still)

    def put(self, values: Tensor | float) -> None:
        """Overwrite the entries."""
        with torch.no_grad():
            if isinstance(values, Tensor):
                self.parameter.index_copy_(self.dim, self.still, values)
            else:
                self.parameter.index_fill_(self.dim, self.still, values)

    def zeroed(self, gradient: Tensor) -> Tensor:
        """A gradient without these entries; filled, not multiplied, so that infinities of a scaled loss go too."""
        return gradient.index_fill(self.dim, self.still, 0)


@dataclass(frozen=True, eq=False)
class Masks:
    """What InhibitFT does to a model's parameters.

    This is the seam between the method and the optimizer: a masked optimizer needs ``entries`` and nothing else.

    Attributes
    ----------
    entries
        Trainable parameters with the entries to keep still.
    whole
        Parameters without a mask of their own that train in the mode "specific": the other LoRA factor.
    covered
        In how many layers each projection is trained and masked, such as ``{"down_proj": 32}``; what is not listed does
        not train at all.
    """

    entries: tuple[Mask, ...]
    whole: tuple[nn.Parameter, ...]
    covered: dict[str, int]


def find_masks(model: nn.Module, neurons: NeuronSet, mode: str = "freeze") -> Masks:
    """Find the trainable parameters that belong to neurons, and which of their entries must not move.

    Parameters
    ----------
    model
        A Hugging Face decoder with gated MLPs, or a PEFT model with LoRA on one. It is not changed.
    mode
        "freeze": the chosen neurons stay as they are. "specific": all others do.

    Raises
    ------
    UserError
        The neurons are of another model or site, no trainable weight belongs to them, or it cannot be masked exactly.
    """
    if mode not in MODES:
        raise unknown("inhibit mode", mode, MODES)
    if neurons.site not in PARTS:
        raise UserError(
            f"Neurons of site '{neurons.site}' have no weights of their own to inhibit: locate neurons of "
            f"{' or '.join(PARTS)}."
        )
    hf = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = Model(Weights(hf), None, getattr(hf, "name_or_path", "") or "given", {})
    neurons.check(decoder)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    entries: list[Mask] = []
    whole: list[nn.Parameter] = []
    covered = Counter[str]()
    for layer in range(len(decoder.blocks)):
        chosen = neurons.member[layer]
        if not chosen.any():
            continue
        still = torch.from_numpy(chosen if mode == "freeze" else ~chosen).nonzero()[:, 0]
        before = len(entries)
        for part, dim in PARTS[neurons.site].items():
            own, shared = _tensors(decoder.projection(layer, part), dim)
            whole += shared
            for parameter, at, low_rank in own:
                known = names[id(parameter)]
                if len(known) > 1:
                    raise UserError(
                        f"{' and '.join(known)} are one shared parameter, of which no neuron can be inhibited alone: "
                        f"choose neurons of other layers."
                    )
                entries.append(Mask(known[0], parameter, at, still.to(parameter.device), low_rank))
            covered[part] += bool(own)
        if mode == "specific" and len(entries) == before:
            raise UserError(f"Nothing trains in the MLP of layer {layer}, which has chosen neurons: {_remedy(model)}.")
    if not entries:
        raise UserError(f"{_found(model)} leaves nothing to inhibit: {_remedy(model)}.")
    return Masks(tuple(entries), tuple(whole), {part: n for part, n in covered.items() if n})


class InhibitFT(TrainerCallback):
    """Fine-tune with chosen neurons frozen (mode "freeze"), or with nothing but them training (mode "specific").

    Give it to the Trainer as ``callbacks=[InhibitFT(neurons)]``; a callback that is added later misses the moment
    before the optimizer is made, and says so. Exact for any optimizer: gradients of the still entries are zero, so they
    count neither in momentum nor in the norm that clipping measures, and after each optimizer step their values are
    put back, which undoes weight decay. The values are kept once, on the parameters' device; in the mode "specific"
    with LoRA that is nearly a copy of the adapter's factors on the chosen layers.

    Without LoRA the mode "specific" trains neuron slices (:mod:`pnlac_fast.slices`): until training ends, parameters of
    their own, and the only ones with gradient and optimizer state. Checkpoints are ordinary ones all the time.

    Parameters
    ----------
    neurons
        Neurons of site ``mlp_mid`` or ``mlp_out``.
    mode
        "freeze" or "specific".

    Attributes
    ----------
    masks
        What is held still; None until the Trainer is made, and where slices train.
    slices
        What alone trains, in the mode "specific" without LoRA, once the Trainer is made; else None.
    steps
        Optimizer steps taken under these masks or on these slices.
    """

    def __init__(self, neurons: NeuronSet, mode: str = "freeze") -> None:
        if mode not in MODES:
            raise unknown("inhibit mode", mode, MODES)
        self.neurons, self.mode = neurons, mode
        self.masks: Masks | None = None
        self.slices: Slices | None = None
        self.steps = 0
        self._model: nn.Module | None = None
        self._values: list[Tensor] = []
        self._fired: list[int] = []
        self._hooks: list[Any] = []
        self._frozen: list[tuple[str, nn.Parameter, int]] = []

    def prepare(self, model: nn.Module) -> Masks | Slices:
        """Set the model up for training: must come before the optimizer is made. The Trainer does it by itself.

        Columns of LoRA's A that belong to still entries become zero, which changes nothing while B is zero. In the mode
        "specific" all parameters that do not belong to the chosen neurons get ``requires_grad=False``; without LoRA the
        model gets neuron slices.

        Raises
        ------
        UserError
            As for :func:`find_masks` or :func:`pnlac_fast.slices.slice_neurons`, or the adapter has already been
            trained without these masks.
        """
        if self._model is model:
            prepared = self.slices or self.masks
            assert prepared is not None
            return prepared
        if self.mode == "specific" and not isinstance(model, PeftModel):
            self.slices, self._model = slice_neurons(model, self.neurons), model
            return self.slices
        masks = find_masks(model, self.neurons, self.mode)
        for mask in masks.entries:
            if mask.low_rank and mask.values().any():
                if _change_of(mask, model).any():
                    raise UserError(
                        f"The adapter already changes inhibited weights ({mask.name}): start from a fresh LoRA, whose "
                        f"B is zero."
                    )
                mask.put(0.0)
        if self.mode == "specific":
            trains = {id(p) for p in (*(m.parameter for m in masks.entries), *masks.whole)}
            for parameter in model.parameters():
                if id(parameter) not in trains:
                    parameter.requires_grad_(False)
        self._model, self.masks = model, masks
        self._values = [mask.values() for mask in masks.entries]
        return masks

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Prepare the model; at this point the Trainer has made no optimizer and read no checkpoint."""
        self.prepare(model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Check that what will train is what was prepared, and put the hooks in place."""
        if self._model is None or self._model is not model:
            raise UserError(
                "InhibitFT has not seen this model before its optimizer was made: give it to the Trainer as "
                "callbacks=[InhibitFT(neurons)], with the model itself instead of a model_init."
            )
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self._remove()
        self.steps, self._first = 0, state.global_step
        if self.slices is not None:
            self._begin_slices(self.slices, optimizer)
            return
        assert self.masks is not None
        self._check(model, optimizer)
        self._fired = [0] * len(self.masks.entries)
        for i, mask in enumerate(self.masks.entries):
            self._hooks.append(mask.parameter.register_hook(lambda g, i=i, mask=mask: self._still(i, mask, g)))
        self._hooks.append(optimizer.register_step_post_hook(self._restore))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks, and verify that they worked and that nothing has moved."""
        self._remove()
        if self.slices is not None:
            self._end_slices(self.slices, args, state)
            return
        if self.masks is None or state.global_step == self._first:
            return
        idle = [m.name for m, n in zip(self.masks.entries, self._fired, strict=True) if not n]
        if idle or not self.steps:
            raise RuntimeError(f"InhibitFT had no effect: {self.steps} optimizer steps, no gradient reached {idle}.")
        if moved := self._moved():
            raise RuntimeError(f"Inhibited weights moved after the optimizer's step: {', '.join(moved)}.")

    def _begin_slices(self, slices: Slices, optimizer: Any) -> None:
        slices.install()  # training may have ended before, and begin again with the same optimizer
        trained = _trained(optimizer)
        own = {id(p) for p in slices.parameters()}
        if own - trained:
            raise UserError("The optimizer does not train all neuron slices: let the Trainer make the optimizer.")
        if extra := len(trained - own):
            raise UserError(_EXTRA.format(extra))
        self._fired = [0] * len(slices.parts)
        for i, part in enumerate(slices.parts):
            self._hooks.append(part.weight.register_hook(lambda _, i=i: self._count(i)))
        self._hooks.append(optimizer.register_step_post_hook(self._count_step))
        self._frozen = [(n, p, p._version) for n, p in slices.model.named_parameters() if id(p) not in own]

    def _end_slices(self, slices: Slices, args: Any, state: Any) -> None:
        slices.merge()
        if state.global_step == self._first:
            return
        idle = [part.name for part, n in zip(slices.parts, self._fired, strict=True) if not n]
        if idle or not self.steps:
            raise RuntimeError(f"InhibitFT had no effect: {self.steps} optimizer steps, no gradient reached {idle}.")
        # A slice is written past its weight's version, so only someone else's writing counts here; the Trainer's own,
        # when it goes back to the best checkpoint, was compared as it was loaded.
        moved = [name for name, p, version in self._frozen if p._version != version]
        if moved and not args.load_best_model_at_end:
            raise RuntimeError(f"Inhibited weights moved while the slices were trained: {', '.join(moved)}.")

    def _count_step(self, *_: Any) -> None:
        self.steps += 1

    def _count(self, index: int) -> None:
        self._fired[index] += 1

    def _still(self, index: int, mask: Mask, gradient: Tensor) -> Tensor:
        self._fired[index] += 1
        return mask.zeroed(gradient)

    def _restore(self, *_: Any) -> None:
        assert self.masks is not None
        self.steps += 1
        for mask, values in zip(self.masks.entries, self._values, strict=True):
            mask.put(values)

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _moved(self) -> list[str]:
        """Names of the parameters whose still entries have other bits than before training."""
        assert self.masks is not None
        pairs = zip(self.masks.entries, self._values, strict=True)
        return [m.name for m, v in pairs if not torch.equal(m.values().view(torch.uint8), v.view(torch.uint8))]

    def _check(self, model: nn.Module, optimizer: Any) -> None:
        assert self.masks is not None
        trained = _trained(optimizer)
        present = {id(p) for p in model.parameters()}
        for mask in self.masks.entries:
            if id(mask.parameter) not in present & trained:
                raise UserError(
                    f"The optimizer does not train {mask.name}, which InhibitFT masks: let the Trainer make the "
                    f"optimizer, and do not replace or shard weights after the Trainer is made."
                )
        allowed = {id(p) for p in (*(m.parameter for m in self.masks.entries), *self.masks.whole)}
        if self.mode == "specific" and (extra := len(trained - allowed)):
            raise UserError(_EXTRA.format(extra))
        if moved := self._moved():
            raise UserError(
                f"The checkpoint to resume from was made without these inhibited neurons ({moved[0]} differs): resume "
                f"with the same neurons and mode, or start anew."
            )


def _trained(optimizer: Any) -> set[int]:
    """Identities of the parameters that an optimizer trains."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"InhibitFT needs a torch optimizer, not {type(optimizer).__name__}: train without DeepSpeed.")
    return {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}


def _tensors(module: Any, dim: int) -> tuple[list[tuple[nn.Parameter, int, bool]], list[nn.Parameter]]:
    """Trainable parameters of a projection whose neurons are its outputs (``dim`` 0) or its inputs (1).

    First those with a row or column for each neuron: parameter, dimension, whether it is a LoRA factor. Then the LoRA
    factors that all neurons share.
    """
    linear = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(linear, nn.Linear) or not isinstance(module, (nn.Linear, LoraLayer)):
        raise UserError(f"InhibitFT masks linear layers and LoRA, not {type(module).__name__}: tune with one of those.")
    own: list[tuple[Any, int, bool]] = [(linear.weight, dim, False)]
    shared: list[Any] = []
    if dim == 0:
        own.append((linear.bias, 0, False))
    lora: Any = module
    for name in getattr(lora, "lora_A", ()):
        a, b, bias = lora.lora_A[name].weight, lora.lora_B[name].weight, lora.lora_B[name].bias
        if name in lora.lora_variant and (a.requires_grad or b.requires_grad):
            variant = type(lora.lora_variant[name]).__name__.removesuffix("LinearVariant")
            raise UserError(f"The LoRA variant {variant} moves every neuron of a layer together: use LoRA without it.")
        if dim == 1 and b.requires_grad and not a.requires_grad:
            raise UserError("A of a down_proj LoRA is frozen, its B trains: let both train, so that A can be masked.")
        own += [(b, 0, True), (bias, 0, True)] if dim == 0 else [(a, 1, True)]
        shared.append(a if dim == 0 else b)
    return [t for t in own if t[0] is not None and t[0].requires_grad], [p for p in shared if p.requires_grad]


def _change_of(mask: Mask, model: nn.Module) -> Tensor:
    """What makes an adapter's change at still entries differ from zero: B for columns of A, else the entries."""
    if mask.dim == 0:
        return mask.values()
    return model.get_parameter(mask.name.replace("lora_A", "lora_B")).detach()


def _found(model: nn.Module) -> str:
    if isinstance(model, PeftModel):
        targets = {t.rsplit(".", 1)[-1] for t in model.targeted_module_names}
        return f"LoRA on {' and '.join(sorted(targets))} only"
    return "A model whose MLP projections are all frozen"


def _remedy(model: nn.Module) -> str:
    if isinstance(model, PeftModel):
        return "add gate_proj, up_proj and down_proj to target_modules"
    return "set requires_grad on gate_proj, up_proj and down_proj"
