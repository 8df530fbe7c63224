"""An inhibition that could not be exact, or has no effect, is an error that says what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from inhibited import HIDDEN, LAYERS, MLP, WIDTH, chosen, decoder, lora, rows, trainer
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pnlac_fast.errors import UserError
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.neurons import NeuronSet


@pytest.mark.parametrize("mode", ["freeze", "specific"])
def test_a_checkpoint_of_a_run_without_inhibition_is_refused(mode: str, tmp_path: Any) -> None:
    trainer(decoder(), [], tmp_path, save_strategy="steps", save_steps=3).train()
    made = trainer(decoder(), [InhibitFT(chosen(), mode)], tmp_path)
    with pytest.raises(UserError, match="resume with the same neurons"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def frozen_mlp() -> Any:
    model = decoder()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." not in name)
    return model


def tied_layers() -> Any:
    model = decoder()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


def trained_adapter() -> Any:
    model = lora(decoder())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    return model


def frozen_factor() -> Any:
    model = lora(decoder())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "neurons", "mode", "message"),
    [
        (
            lambda: lora(decoder(), ["q_proj", "v_proj"]),
            chosen(),
            "freeze",
            "LoRA on q_proj and v_proj only leaves noth",
        ),
        (frozen_mlp, chosen(), "freeze", "set requires_grad on gate_proj"),
        (tied_layers, chosen(), "freeze", "one shared parameter"),
        (trained_adapter, chosen(), "freeze", "start from a fresh LoRA"),
        (frozen_factor, chosen(), "freeze", "A of a down_proj LoRA is frozen"),
        (lambda: lora(decoder(), use_dora=True), chosen(), "freeze", "LoRA variant Dora"),
        (
            lambda: lora(decoder(), MLP, layers_to_transform=[1]),
            chosen(),
            "specific",
            "Nothing trains in the MLP of lay",
        ),
        (decoder, NeuronSet("r", "general", np.ones((LAYERS, HIDDEN), bool), site="resid"), "freeze", "no weights of"),
        (decoder, chosen(layers=3), "freeze", "locate them again"),
        (decoder, NeuronSet("e", "general", np.zeros((LAYERS, WIDTH), bool)), "freeze", "is empty"),
        (decoder, chosen(), "frozen", "Did you mean 'freeze'"),
    ],
)
def test_what_cannot_be_exact_is_refused(
    model: Any, neurons: NeuronSet, mode: str, message: str, tmp_path: Any
) -> None:
    with pytest.raises(UserError, match=message):
        trainer(model(), [InhibitFT(neurons, mode)], tmp_path)


def test_a_callback_added_too_late_says_so(tmp_path: Any) -> None:
    late = trainer(decoder(), [], tmp_path)
    late.add_callback(InhibitFT(chosen(), "specific"))
    with pytest.raises(UserError, match="callbacks="):
        late.train()


def test_parameters_that_are_set_to_train_later_are_refused(tmp_path: Any) -> None:
    model = decoder()
    made = trainer(model, [InhibitFT(chosen(), "specific")], tmp_path)
    model.requires_grad_(True)
    with pytest.raises(UserError, match="do not change requires_grad"):
        made.train()


@pytest.mark.parametrize("mode", ["freeze", "specific"])
def test_an_optimizer_without_the_masked_weights_is_refused(mode: str, tmp_path: Any) -> None:
    model = decoder()
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    optimizer = torch.optim.SGD([model.model.embed_tokens.weight], lr=0.1)
    made = Trainer(
        model,
        arguments,
        train_dataset=rows(),
        callbacks=[InhibitFT(chosen(), mode)],
        optimizers=(optimizer, None),
    )
    with pytest.raises(UserError, match="The optimizer does not train"):
        made.train()


class Meddle(TrainerCallback):
    def __init__(self, row: int) -> None:
        self.row = row

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.gate_proj.weight[self.row, 0].add_(1e-6)


@pytest.mark.parametrize(("mode", "row"), [("freeze", 3), ("specific", 4)])
def test_weights_that_something_else_moves_are_an_error(mode: str, row: int, tmp_path: Any) -> None:
    with pytest.raises(RuntimeError, match=r"moved.*layers\.0\.mlp\.gate_proj"):
        trainer(decoder(), [InhibitFT(chosen(), mode), Meddle(row)], tmp_path).train()


class Silent(nn.Module):
    """An MLP that passes no gradient on to its weights."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("mode", ["freeze", "specific"])
def test_masks_and_slices_that_no_gradient_reaches_are_an_error(mode: str, tmp_path: Any) -> None:
    model = decoder()
    for block in model.model.layers[: 2 if mode == "freeze" else 1]:
        block.mlp = Silent(block.mlp)
    with pytest.raises(RuntimeError, match="had no effect"):
        trainer(model, [InhibitFT(chosen(), mode)], tmp_path).train()
