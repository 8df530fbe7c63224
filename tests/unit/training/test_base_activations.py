"""Activations of base are those of each row alone, whether read from the model, the data or a store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from penalised import activations, chosen, decoder, models, rows, trained

from pnlac_fast.anchoring import Anchor
from pnlac_fast.base_activations import BaseActivations, base_activations, stored_activations
from pnlac_fast.caching import cache
from pnlac_fast.completions import encode_rows
from pnlac_fast.errors import UserError
from pnlac_fast.loading import load_model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.training import finetune


@pytest.mark.parametrize("batch_tokens", [9, 20, 4096])
def test_base_activations_are_those_of_each_row_alone(batch_tokens: int) -> None:
    model = decoder()
    model.train()
    held = base_activations(model, [*rows(), rows()[1]], chosen(), batch_tokens=batch_tokens)
    assert model.training
    assert len(held.values) == sum(len(ids) - 1 for ids in rows())
    for ids in rows():
        batch = torch.tensor([ids])
        mine = held.values[held.places(batch, torch.ones_like(batch))[0, :-1]]
        torch.testing.assert_close(mine, activations(model, ids[:-1], "mlp_mid").detach())
    everything = torch.cat([activations(model, ids[:-1], "mlp_mid") for ids in rows()]).detach()
    torch.testing.assert_close(held.std.double(), everything.std(0, correction=0), atol=1e-6, rtol=1e-6)


def test_places_know_either_padding(tmp_path: Any) -> None:
    held = base_activations(decoder(), rows(), chosen())
    ids = torch.tensor([[0, 0, *rows()[0]], [*rows()[1], 0, 0, 0, 0]])
    mask = torch.tensor([[0, 0] + [1] * 7, [1] * 5 + [0] * 4])
    assert held.places(ids, mask).tolist() == [[-1, -1, *range(6), -1], [*range(6, 10), *[-1] * 5]]


@pytest.mark.parametrize("chosen_only", [True, False])
def test_a_store_holds_what_the_model_would_give(
    chosen_only: bool, model_paths: dict[str, Any], questions: Any, tmp_path: Any
) -> None:
    """Read from a store or with the model, the fine-tune is the same."""
    questions = [q for q in questions if q.topic == "race"]
    base = load_model(model_paths["llama"], dtype="float32", device="cpu")
    member = np.zeros((3, 48), bool)
    member[0, [2, 9]] = member[2, [0, 40, 47]] = True
    neurons = NeuronSet("some", "general", member, base=base.origin)
    raw: dict[str, Any] = {"raw": "full", "tokens": ("all",), "side": "right", "progress": False}
    if chosen_only:
        raw["raw_neurons"] = [neurons]
    cache(base, {"tuned": model_paths["llama_tuned"]}, questions, tmp_path / "run.zarr", **raw)
    ids = [ids for ids, _ in encode_rows(base, questions, "right", "{instruction}")]
    mine, stored = base_activations(base, ids, neurons), stored_activations(tmp_path / "run.zarr", neurons)
    assert mine.starts.keys() == stored.starts.keys()
    for key, start in mine.starts.items():
        at, size = stored.starts[key], len(key) // 8
        torch.testing.assert_close(stored.values[at : at + size], mine.values[start : start + size])
    torch.testing.assert_close(stored.std, mine.std)
    settings: dict[str, Any] = {"method": "full", "steps": 3, "learning_rate": 3e-3, "inhibit_mode": "anchor"}
    one, other = (
        finetune(base, questions, "race", "right", inhibit=neurons, anchor_store=store, **settings)
        for store in (None, tmp_path / "run.zarr")
    )
    for a, b in zip(one.model.hf.parameters(), other.model.hf.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert one.record["anchor"][-1][1] == pytest.approx(other.record["anchor"][-1][1], rel=1e-2)
    with pytest.raises(UserError, match="no base activations"):
        finetune(base, questions, "race", "left", inhibit=neurons, anchor_store=tmp_path / "run.zarr", **settings)
    with pytest.raises(UserError, match="another base model"):
        stored_activations(tmp_path / "run.zarr", replace(neurons, base={"sha256": "0" * 64}))
    if chosen_only:
        more = replace(neurons, member=np.roll(member, 1, axis=1))
        with pytest.raises(UserError, match="keeps not all neurons"):
            stored_activations(tmp_path / "run.zarr", more)


def test_adapters_are_off_while_base_is_read() -> None:
    base, tuned, _ = models("llama", "lora")
    one, other = (base_activations(model, rows(), chosen()) for model in (base, tuned))
    torch.testing.assert_close(one.values, other.values)
    torch.testing.assert_close(one.std, other.std)


def test_base_is_read_from_the_data_where_it_is_not_given(tmp_path: Any) -> None:
    made = []
    for given in (True, False):
        model = decoder()
        held = base_activations(model, rows(), chosen()) if given else None
        trained(model, [anchor := Anchor(chosen(), 1.0, held)], tmp_path, max_steps=3)
        made.append(dict(model.named_parameters()))
        assert isinstance(anchor.base, BaseActivations)
    assert all(torch.allclose(made[0][name], made[1][name], atol=1e-12) for name in made[0])
