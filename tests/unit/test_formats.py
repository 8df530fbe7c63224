"""Checkpoints as they come: precisions, shards, tied weights, weights spread over places, quantised bases."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pnlac_fast import finetune
from pnlac_fast.capture import Sums, accumulate
from pnlac_fast.checkup import self_check
from pnlac_fast.datasets import Question
from pnlac_fast.errors import UserError
from pnlac_fast.loading import from_hf, load_model, load_tuned, weights_sha256
from pnlac_fast.models import Model
from pnlac_fast.packing import packs
from pnlac_fast.passes import SHORTCUTS, usable
from pnlac_fast.prompts import encode


def sums(base: Model, tuned: Model, questions: tuple[Question, ...]) -> Sums:
    texts = encode(base.tokenizer, questions[:5], "Q : {instruction} A :", side="both")
    taken = usable(base, SHORTCUTS, longest=40)
    return accumulate(base, {"t": tuned}, texts, sites=("mlp_mid", "resid"), tokens=("all",), shortcuts=taken)


def close(mine: Sums, theirs: Sums, tolerance: float) -> bool:
    pairs = [(getattr(mine, who)[site], getattr(theirs, who)[site]) for who in ("base", "tuned") for site in mine.base]
    return all((np.abs(a - b) <= tolerance * np.abs(b).max(-1, keepdims=True)).all() for a, b in pairs)


@pytest.fixture(scope="module")
def reference(model_paths: dict[str, Path], questions: tuple[Question, ...]) -> Sums:
    base = load_model(model_paths["llama"])
    return sums(base, load_tuned(base, model_paths["llama_tuned"]), questions)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-9), ("bfloat16", 0.3), ("float16", 0.05)])
def test_precisions(model_paths, questions, reference, dtype: str, tolerance: float) -> None:
    base = load_model(model_paths["llama"], dtype=dtype)
    tuned = load_tuned(base, model_paths["llama_tuned"])
    assert base.origin["dtype"] == tuned.origin["dtype"] == dtype
    assert all(check["holds"] for check in self_check(base)["checks"].values())
    assert close(sums(base, tuned, questions), reference, tolerance)


def test_shards_are_one_model_and_one_fingerprint(model_paths, questions, reference, tmp_path: Path) -> None:
    base = load_model(model_paths["llama"])
    base.hf.save_pretrained(tmp_path / "s", max_shard_size="20KB")
    for file in model_paths["llama"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "s")
    shards = sorted((tmp_path / "s").glob("model-*.safetensors"))
    assert len(shards) > 2
    sharded = load_model(tmp_path / "s")
    assert close(sums(sharded, load_tuned(sharded, model_paths["llama_tuned"]), questions), reference, 1e-9)
    before = weights_sha256(str(tmp_path / "s"))
    raw = bytearray(shards[-1].read_bytes())
    raw[-1] ^= 1
    shards[-1].write_bytes(raw)
    assert weights_sha256(str(tmp_path / "s")) != before


def test_tied_embeddings(model_paths, questions, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(model_paths["llama"], tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for file in model_paths["llama"].glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    base = load_model(tmp_path)
    assert base.hf.lm_head.weight is base.hf.model.embed_tokens.weight
    found = sums(base, base, questions)
    assert (found.tuned["mlp_mid"][0, :, 2] == 0).all()  # base against itself
    assert found.counts[0] > 0


def test_weights_on_other_places(model_paths, adapter_paths, questions, reference, tmp_path: Path) -> None:
    spread = load_model(model_paths["llama"], device_map="auto")
    tuned = load_tuned(spread, model_paths["llama_tuned"])
    assert close(sums(spread, tuned, questions), reference, 1e-9)
    places = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    hf: Any = AutoModelForCausalLM.from_pretrained(model_paths["llama"], device_map=places, offload_folder=tmp_path)
    assert hf.model.layers[1].mlp.up_proj.weight.is_meta
    offloaded = from_hf(hf, spread.tokenizer)
    assert close(sums(offloaded, tuned, questions), reference, 1e-9)
    report = self_check(offloaded)
    assert all(check["holds"] for check in report["checks"].values())
    assert "projection" not in report["checks"]  # its weights are not here
    with pytest.raises(UserError, match="not both"):
        load_model(model_paths["llama"], device="cpu", device_map="auto")
    moved = next(packs([[1, 2, 3], [1, 2, 4, 5]], 100)).on(torch.device("meta"))
    assert {t.device.type for s in moved for t in (s.queries, s.keys, s.lengths, s.real, s.rows)} == {"meta"}


def test_a_quantised_base_without_its_library_is_a_sentence(model_paths, tmp_path: Path) -> None:
    shutil.copytree(model_paths["llama"], tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    quantised = {"quant_method": "aqlm", "nbits_per_codebook": 8}
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(UserError, match=r"Cannot load the model .*aqlm"):
        load_model(tmp_path / "m")


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _bitsandbytes() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


QUANTISED = [
    pytest.param(made, name, marks=pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed"))
    for made, name in ((_torchao, "torchao"), (_bitsandbytes, "bitsandbytes"))
]


@pytest.mark.filterwarnings("ignore")  # of the libraries that quantise, about themselves
@pytest.mark.parametrize(("made", "name"), QUANTISED)
def test_quantised_bases_are_read(model_paths, questions, tmp_path: Path, made: Any, name: str) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    LlamaForCausalLM(LlamaConfig.from_pretrained(model_paths["llama"], **shape)).save_pretrained(tmp_path / "plain")
    for file in model_paths["llama"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "plain")
    plain = load_model(tmp_path / "plain", dtype="bfloat16")
    peft: Any = get_peft_model(
        plain.hf, LoraConfig(r=2, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    )
    peft.save_pretrained(tmp_path / "adapter")
    plain = load_model(tmp_path / "plain", dtype="bfloat16")
    hf: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=made(), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    hf.save_pretrained(tmp_path / "small")
    for file in model_paths["llama"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "small")
    found = []
    for base in (plain, from_hf(hf, plain.tokenizer), load_model(tmp_path / "small")):
        if base is not plain:
            assert base.origin["dtype"].endswith(f", {name}")
        assert all(check["holds"] for check in self_check(base)["checks"].values())
        found.append(sums(base, load_tuned(base, tmp_path / "adapter", name="t"), questions))
    for quantised in found[1:]:
        assert quantised.counts.tolist() == found[0].counts.tolist()
        pair = [s.tuned["mlp_mid"][0, 0, 2].ravel() for s in (quantised, found[0])]
        assert np.corrcoef(pair)[0, 1] > 0.9
    tuned = finetune(load_model(tmp_path / "small"), questions, "race", "right", steps=1, batch_size=2).model
    assert not tuned.hf.lm_head.weight.requires_grad
