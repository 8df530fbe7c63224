"""Adapters of every kind, alone and together, unmerged on the base's own weights, which stay as they are."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor

from pnlac_fast.adapters import quiet
from pnlac_fast.errors import UserError
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.models import Model

IDS = torch.tensor([[1, 5, 9, 12, 7]])
LORA: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", "down_proj"]}
KINDS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "one layer": LoraConfig(**LORA, layers_to_transform=[1]),
    "ia3": IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(**LORA),
    "lokr": LoKrConfig(**LORA),
    "oft": OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "down_proj"]),
    "vera": VeraConfig(r=3, target_modules=["q_proj"]),
    "biases": LoraConfig(**LORA, bias="all"),
    "saved head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "saved projection": LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["down_proj"]),
    "saved mlp": LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["mlp"]),
    "saved embeddings": LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "few tokens": LoraConfig(**LORA, trainable_token_indices=[5, 6]),
}
TOGETHER = ("lora", "dora", "rslora", "one layer")  # these share the base's own modules


@contextmanager
def tolerant() -> Iterator[None]:
    """PEFT warns of what is asked for here on purpose."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        yield


def logits(model: Model) -> Tensor:
    with torch.no_grad(), model.active() as hf:
        return hf(input_ids=IDS).logits


@pytest.fixture(scope="module")
def stored(model_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Random adapters of a Qwen2, whose attention has biases, and the logits of PEFT's own model with each."""
    root, found = tmp_path_factory.mktemp("kinds"), {}
    for kind, config in KINDS.items():
        with tolerant():
            peft: Any = get_peft_model(load_model(model_paths["qwen2"]).hf, config)
            draw = torch.Generator().manual_seed(len(found))
            with torch.no_grad():
                for parameter in peft.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
                found[kind] = root / kind, peft.eval()(input_ids=IDS).logits
            peft.save_pretrained(root / kind)
    return found


def middles(model: Model) -> list[Tensor]:
    seen: list[Tensor] = []
    with torch.no_grad(), model.active() as hf, model.tapped("mlp_mid", lambda _, a: seen.append(a.clone())):
        hf(input_ids=IDS)
    return seen


def test_each_kind_alone_and_all_at_once(model_paths, stored) -> None:
    base = load_model(model_paths["qwen2"])
    before, inside = logits(base), middles(base)
    tuned = {}
    for kind, (path, _) in stored.items():
        with tolerant():
            tuned[kind] = load_tuned(base, path, name=kind)
    for kind, (_, wanted) in reversed(stored.items()):
        assert torch.equal(logits(tuned[kind]), wanted), kind
        assert not torch.allclose(wanted, before, atol=1e-3)
        assert torch.equal(logits(base), before)
        assert (tuned[kind].hf is base.hf) == (kind in TOGETHER)
        seen = middles(tuned[kind])
        assert len(seen) == 3
        assert not torch.equal(seen[2], inside[2]) or kind == "saved head"
    assert all(torch.equal(a, b) for a, b in zip(middles(base), inside, strict=True))
    own = {p.data_ptr() for p in base.hf.parameters()}
    extra = sum(p.numel() for p in tuned["ia3"].hf.parameters() if p.data_ptr() not in own)
    assert extra == 3 * (48 + 16)  # one factor for each input of down and output of v: nothing else is copied


def test_an_adapter_with_other_targets_is_switched_too(model_paths, tmp_path: Path) -> None:
    """Also one that comes when others have been in use, on layers that had none until then."""
    base = load_model(model_paths["qwen2"])
    before = logits(base)
    for number, target in enumerate(("q_proj", "up_proj")):
        peft: Any = get_peft_model(load_model(model_paths["qwen2"]).hf, LoraConfig(r=3, target_modules=[target]))
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1, generator=draw)
        wanted = peft.eval()(input_ids=IDS).logits.detach()
        with tolerant():
            peft.save_pretrained(tmp_path / target)
            tuned = load_tuned(base, tmp_path / target, name=target)
        for _ in range(2):
            assert torch.equal(logits(tuned), wanted)
            assert torch.equal(logits(base), before)
        assert not torch.allclose(wanted, before, atol=1e-3)
        assert not any(p.requires_grad for p in base.hf.parameters())


def test_patches_reach_a_copy_that_an_adapter_brings(model_paths, stored) -> None:
    base = load_model(model_paths["qwen2"])
    with tolerant():
        tuned = load_tuned(base, stored["saved mlp"][0])
    seen: list[Tensor] = []
    with (
        torch.no_grad(),
        tuned.tapped("mlp_mid", lambda _, a: a * 0, [1]),
        tuned.tapped("mlp_out", lambda _, a: seen.append(a), [1]),
        tuned.active() as hf,
    ):
        hf(input_ids=IDS)
    assert (seen[0] == 0).all()


def test_an_adapter_that_changes_no_weights_is_refused(model_paths, tmp_path: Path) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with tolerant():
        get_peft_model(load_model(model_paths["llama"]).hf, config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is PREFIX_TUNING, which changes no weights: give a LoRA"):
        load_tuned(load_model(model_paths["llama"]), tmp_path)


def test_an_unknown_kind_is_a_sentence(model_paths, adapter_paths, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(adapter_paths["race"], tmp_path / "a")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config | {"peft_type": "NEW"}))
    with pytest.raises(UserError, match="cannot be read"):
        load_tuned(load_model(model_paths["llama"]), tmp_path / "a")
