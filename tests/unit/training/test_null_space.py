"""The null space: what trains in gate and up never moves along what other topics' inputs have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import opened_for_gradients
from fine_tunes import chosen as chosen_of_base
from fine_tunes import questions, tune
from inhibited import LAYERS, chosen, decoder, lora, trainer, weights
from torch import Tensor

from pnlac_fast.errors import UserError
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.null_space import NullSpace, leading
from pnlac_fast.references import Reference

TEXTS = [Reference((5, 6, 7, 8), 2), Reference((9, 3, 11, 4, 5, 6), 3), Reference((2, 30), 1)]


def inputs(model: Any, texts: list[Reference] = TEXTS) -> list[Tensor]:
    """What each MLP gets where a counted token is predicted, [token, input] by layer, text by text."""
    found: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args, i=i: found[i].append(args[0][0].detach()))
        for i, block in enumerate(model.model.layers)
    ]
    for ids, first in texts:
        before = len(found[0])
        model(input_ids=torch.tensor([list(ids)]))
        for own in found:
            own[before] = own[before][first - 1 : -1]
    for hook in hooks:
        hook.remove()
    return [torch.cat(own) for own in found]


def spared(model: Any, share: float) -> list[Tensor]:
    """The projections on what is left alone, [input, input] by layer: singular vectors until they hold the share."""
    made = []
    for own in inputs(model):
        _, size, vectors = np.linalg.svd(own.double().numpy())
        energy = np.cumsum(size**2) / np.sum(size**2)
        kept = vectors[: int(np.searchsorted(energy, share)) + 1]
        made.append(torch.from_numpy(kept.T @ kept).float())
    return made


def test_leading_directions_are_the_fewest_that_hold_the_share() -> None:
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    moment = turn @ torch.diag(torch.tensor([6.0, 3.0, 1.0, 0.0])) @ turn.T
    for share, count in ((0.1, 1), (0.59, 1), (0.61, 2), (0.89, 2), (0.91, 3), (0.999, 3)):
        found = leading(moment, share)
        assert found.shape == (4, count)
        torch.testing.assert_close(found @ found.T, turn[:, :count] @ turn[:, :count].T)


@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_slices_learn_but_not_along_what_other_topics_use(kind: str, share: float, tmp_path: Path) -> None:
    model = decoder(kind)
    before, left_alone = weights(model), spared(model, share)
    space = NullSpace(TEXTS, share, batch_size=2)
    trainer(model, [space, InhibitFT(chosen(), "specific")], tmp_path).train()
    assert space.steps == 6
    for layer, projection in enumerate(left_alone):
        found = space.directions[layer]
        torch.testing.assert_close(found @ found.T, projection, atol=2e-5, rtol=0)
        own = torch.from_numpy(chosen().member[layer])
        for name, after in weights(model).items():
            if f"layers.{layer}.mlp." not in name or "down_proj" in name:
                continue
            moved = after - before[name]
            if name.endswith("bias"):  # its input is the same on every topic
                assert torch.equal(after, before[name])
            else:
                assert (moved[own] @ projection).abs().max() < 1e-5 < 1e-3 < moved[own].abs().max()
                assert torch.equal(after[~own], before[name][~own])
    down = "model.layers.0.mlp.down_proj.weight"
    assert (weights(model)[down] - before[down]).abs().max() > 1e-3


def test_a_step_is_the_plain_one_less_its_part_along_the_directions(tmp_path: Path) -> None:
    """Of gradient descent without clipping, and with the columns of down as they would be anyway."""
    found = []
    how = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0, "learning_rate": 0.5}
    for callbacks in ([], [NullSpace(TEXTS, 0.6)]):
        model = decoder("qwen2")
        before, left_alone = weights(model), spared(model, 0.6)
        trainer(model, [InhibitFT(chosen(), "specific"), *callbacks], tmp_path, **how).train()
        found.append({name: after - before[name] for name, after in weights(model).items()})
    plain, held = found
    for name, step in plain.items():
        if "gate_proj" in name or "up_proj" in name:
            step = step - step @ left_alone[int(name.split(".")[2])]
        torch.testing.assert_close(held[name], step, atol=1e-6, rtol=1e-5)
    assert any((held[name] - plain[name]).abs().max() > 1e-4 for name in plain)


@pytest.mark.parametrize("inhibited", [False, True])
def test_lora_changes_nothing_along_the_directions(inhibited: bool, tmp_path: Path) -> None:
    model = decoder()
    before, left_alone = weights(model), spared(model, 0.6)
    adapted = lora(model)
    callbacks: list[Any] = [InhibitFT(chosen(), "specific")] if inhibited else []
    trainer(adapted, [*callbacks, NullSpace(TEXTS, 0.6)], tmp_path).train()
    for name, after in weights(adapted).items():
        plain = name.replace("base_model.model.", "").replace("base_layer.", "")
        moved = after - before[plain]
        if "gate_proj.weight" in plain or "up_proj.weight" in plain:
            assert (moved @ left_alone[int(plain.split("layers.")[1][0])]).abs().max() < 1e-5 < 1e-4 < moved.abs().max()


def test_whole_weights_may_train_beside_it_or_frozen_neurons(tmp_path: Path) -> None:
    for callbacks in ([], [InhibitFT(chosen())]):
        model = decoder("qwen2")
        before, left_alone = weights(model), spared(model, 0.6)
        trainer(model, [*callbacks, NullSpace(TEXTS, 0.6)], tmp_path).train()
        for layer, projection in enumerate(left_alone):
            name = f"model.layers.{layer}.mlp.up_proj.weight"
            moved = weights(model)[name] - before[name]
            assert (moved @ projection).abs().max() < 2e-5 < 1e-3 < moved.abs().max()
            assert not callbacks or not moved[torch.from_numpy(chosen().member[layer])].any()


@pytest.mark.parametrize("kind", ["gpt2", "phi3", "mixtral", "gpt_oss"])
def test_every_way_to_write_an_mlp(kind: str, tmp_path: Path) -> None:
    """Rows, columns, both projections in one weight, and those of experts."""
    model = opened_for_gradients(kind)
    part = next(part for part in model.architecture.projections if part.inward)
    module = model.blocks[0].get_submodule(part.path)
    weight = getattr(module, part.name) if model.architecture.experts else module.weight
    transposed = kind == "gpt2" or getattr(module, "is_transposed", False)
    member = np.zeros((len(model.blocks), model.width("mlp_mid")), bool)
    member[:, ::3] = True
    space, before = NullSpace(TEXTS, 0.8), weight.detach().clone()
    specific = InhibitFT(NeuronSet("some", "specific", member), "specific")
    trainer(model.hf, [space, specific], tmp_path).train()
    moved = (weight.detach() - before).float()
    along = (moved.mT if transposed else moved) @ space.directions[0]
    assert along.abs().max() < 1e-5 < 1e-3 < moved.abs().max()


def test_of_a_fine_tune_it_is_a_mode_with_questions_of_other_topics(base: Model) -> None:
    options: dict[str, Any] = {"inhibit": chosen_of_base(), "inhibit_mode": "specific,nullspace", "null_share": 0.7}
    record = tune(base, **options, other_max_new_tokens=5).record
    assert record["method"] == "specific+nullspace"
    found = record["inhibit"]["nullspace"]
    assert (found["null_share"], found["topics"], found["on"], found["questions"]) == (0.7, ["science"], "answers", 20)
    assert list(found["directions"]) == ["0", "1"]
    assert all(0 < count < base.width("resid") for count in found["directions"].values())
    with pytest.raises(UserError, match="no questions of other topics"):
        tune(base, **options, other_data=questions(topics=("race",)))


def test_what_would_do_nothing_is_refused(base: Model, tmp_path: Path) -> None:
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="leaves nothing alone, or nothing to learn"):
            NullSpace(TEXTS, share)
    with pytest.raises(UserError, match="0 texts"):
        NullSpace([])
    with pytest.raises(UserError, match="add mode specific"):
        trainer(lora(decoder(), ["q_proj"]), [NullSpace(TEXTS)], tmp_path).train()
    trained = lora(decoder())
    trainer(trained, [], tmp_path).train()
    with pytest.raises(UserError, match="fresh LoRA"):
        trainer(trained, [NullSpace(TEXTS)], tmp_path).train()
    late = NullSpace(TEXTS)
    ready = trainer(decoder(), [], tmp_path)
    ready.add_callback(late)
    with pytest.raises(UserError, match="has not seen this model"):
        ready.train()
    assert not late._hooks
    assert len(decoder().model.layers) == LAYERS
