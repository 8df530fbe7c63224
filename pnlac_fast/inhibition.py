"""InhibitFT: a fine-tune in which chosen neurons keep their weights, or in which only chosen neurons train.

After "Understanding and Mitigating Political Stance Cross-topic Generalization in Large Language Models"
(arXiv 2508.02360). It is a callback of ``transformers.Trainer``, and so of TRL's ``SFTTrainer``::

    trainer = Trainer(model, args, train_dataset=rows, callbacks=[InhibitFT(neurons)])
    trainer.train()

:mod:`pnlac_fast.masks` says which weights belong to a neuron. With LoRA (W + B A) the rows of B and columns of A that
belong to it are held at zero, so that the merged change is exactly zero there.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from pnlac_fast.errors import UserError, unknown
from pnlac_fast.masks import MODES, Mask, Masks, find_masks
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.optimizers import MaskedStep, mask_step, why_not_masked
from pnlac_fast.slices import Slices, slice_neurons

_EXTRA = (
    "{} parameters that do not belong to the chosen neurons would train: do not change requires_grad after the Trainer "
    "is made."
)


class InhibitFT(TrainerCallback):
    """Fine-tune with chosen neurons frozen (mode "freeze"), or with nothing but them training (mode "specific").

    Give it to the Trainer as ``callbacks=[InhibitFT(neurons)]``; a callback that is added later misses the moment
    before the optimizer is made, and says so. Exact for any optimizer. AdamW and SGD skip the still entries
    (:func:`pnlac_fast.optimizers.mask_step`), which costs nothing. With any other optimizer their gradients are zeroed,
    and after each step their values are put back. Where gradients are clipped, those of still entries are zeroed in any
    case, so that they do not count in the norm. The values are kept once, on the parameters' device, to verify at the
    end that none has moved; in the mode "specific" with LoRA that is nearly a copy of the adapter's factors on the
    chosen layers.

    Without LoRA the mode "specific" trains neuron slices (:mod:`pnlac_fast.slices`): until training ends, parameters of
    their own, and the only ones with gradient and optimizer state. Checkpoints are ordinary ones all the time.

    Parameters
    ----------
    neurons
        Neurons of site ``mlp_mid`` or ``mlp_out``.
    mode
        "freeze" or "specific".
    factor
        With "freeze", the share of each step that the neurons' weights still take, in [0, 1]: 0 freezes them, 1 is
        plain tuning. In between, their moments are those of plain tuning, and the change of their weights, decay
        included, is multiplied by it; their gradients count when they are clipped. With LoRA this holds for rows of B.
        Columns of A are multiplied by the factor at the start too, because B acts on them from the first step: so the
        merged change of a neuron's weights is ``factor`` times what the same steps would else give. Above 0 it needs
        AdamW or SGD.

    Attributes
    ----------
    masks
        What is held still; None until the Trainer is made, and where slices train.
    slices
        What alone trains, in the mode "specific" without LoRA, once the Trainer is made; else None.
    steps
        Optimizer steps taken under these masks or on these slices.

    Notes
    -----
    InhibitFT, arXiv 2508.02360, is the mode "freeze"; "specific" takes its aim by the letter.

    On the project's testbed (14 runs that had no part in choosing the settings; neurons specific in the top 10 %, 2 to
    3 % of all, as many steps as plain tuning, a rate of 4e-3) training only these coupled 85 to 96 % less where the
    on-topic shift is 80 % of plain's, and its final shift was 86 to 147 % of plain's; as many random neurons in every
    layer coupled 53 to 88 % less (12 runs). With three times the steps the shift on held-out questions may fall again.
    Freezing general neurons did not reduce coupling where all weights train.
    """

    def __init__(self, neurons: NeuronSet, mode: str = "freeze", factor: float = 0.0) -> None:
        if mode not in MODES:
            raise unknown("inhibit mode", mode, MODES)
        if not 0 <= factor <= 1:
            raise UserError(f"An inhibit factor of {factor} is outside [0, 1]: 0 freezes neurons, 1 does nothing.")
        if factor and mode != "freeze":
            raise UserError(f"Mode '{mode}' knows no inhibit factor: choose mode 'freeze', or leave the factor out.")
        self.neurons, self.mode, self.factor = neurons, mode, factor
        self.masks: Masks | None = None
        self.slices: Slices | None = None
        self.steps = 0
        self._model: nn.Module | None = None
        self._values: list[Tensor] = []
        self._fired: list[int] = []
        self._step: MaskedStep | None = None
        self._hooks: list[Any] = []
        self._frozen: list[tuple[str, nn.Parameter, int]] = []

    def prepare(self, model: nn.Module) -> Masks | Slices:
        """Set the model up for training: must come before the optimizer is made. The Trainer does it by itself.

        Columns of LoRA's A that belong to still entries are multiplied by the factor, by zero unless one is given; this
        changes nothing while B is zero. In the mode "specific" all parameters that do not belong to the chosen neurons
        get ``requires_grad=False``; without LoRA the model gets neuron slices.

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
            if mask.low_rank and (mask.dim == 1 or not self.factor) and mask.values().any():
                if _change_of(mask, model).any():
                    raise UserError(
                        f"The adapter already changes inhibited weights ({mask.name}): start from a fresh LoRA, whose "
                        f"B is zero."
                    )
                mask.put(self.factor * mask.values() if self.factor else 0.0)
        if self.mode == "specific":
            trains = {id(p) for p in (*(m.parameter for m in masks.entries), *masks.whole)}
            for parameter in model.parameters():
                if id(parameter) not in trains:
                    parameter.requires_grad_(False)
        self._model, self.masks = model, masks
        if not self.factor:
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
            self._begin_slices(self.slices, args, optimizer)
            return
        assert self.masks is not None
        self._check(model, optimizer)
        self._begin_masks(self.masks, optimizer, clips=bool(args.max_grad_norm))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks, and verify that they worked and that nothing has moved."""
        self._remove()
        if self.slices is not None:
            self._end_slices(self.slices, args, state)
            return
        if self.masks is None or state.global_step == self._first:
            return
        counts = self._step.counts if self._step else self._fired
        idle = [m.name for m, n in zip(self.masks.entries, counts, strict=True) if not n]
        if idle or not self.steps:
            raise RuntimeError(f"InhibitFT had no effect: {self.steps} optimizer steps, no gradient reached {idle}.")
        if moved := self._moved():
            raise RuntimeError(f"Inhibited weights moved after the optimizer's step: {', '.join(moved)}.")

    def _begin_masks(self, masks: Masks, optimizer: Any, clips: bool) -> None:
        reason = why_not_masked(optimizer, [mask.parameter for mask in masks.entries])
        if any(mask.first is not None for mask in masks.entries):
            reason = "each expert has other neurons"
            if self.factor:
                raise UserError("Neurons of experts can be frozen but not slowed: leave the inhibit factor at 0.")
        if reason and self.factor:
            raise UserError(f"An inhibit factor above 0 needs AdamW or SGD, {reason}: use one of these, or 0.")
        self._step = None if reason else mask_step(optimizer, [mask.on_step(self.factor) for mask in masks.entries])
        self._hooks += [optimizer.register_step_post_hook(self._count_step), *([self._step] if self._step else [])]
        if not self._step:
            self._hooks.append(optimizer.register_step_post_hook(self._restore))
        self._fired = [0] * len(masks.entries)
        if not self.factor and (clips or not self._step):
            for i, mask in enumerate(masks.entries):
                hook = mask.parameter.register_post_accumulate_grad_hook(lambda _, i=i, mask=mask: self._still(i, mask))
                self._hooks.append(hook)

    def _begin_slices(self, slices: Slices, args: Any, optimizer: Any) -> None:
        if not slices.installed and args.world_size > 1:
            raise UserError(
                "Several processes do not train merged slices again, because their copies were made without them: make "
                "a new Trainer with a new InhibitFT."
            )
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

    def _still(self, index: int, mask: Mask) -> None:
        self._fired[index] += 1
        mask.zero_gradient()

    def _restore(self, *_: Any) -> None:
        assert self.masks is not None
        for mask, values in zip(self.masks.entries, self._values, strict=True):
            mask.put(values)

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _moved(self) -> list[str]:
        """Names of the parameters whose still entries have other bits than before training; none with a factor."""
        assert self.masks is not None
        if self.factor:
            return []
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


def _change_of(mask: Mask, model: nn.Module) -> Tensor:
    """What makes an adapter's change at still entries differ from zero: B for columns of A, else the entries."""
    if mask.dim == 0:
        return mask.values()
    return model.get_parameter(mask.name.replace("lora_A", "lora_B")).detach()
