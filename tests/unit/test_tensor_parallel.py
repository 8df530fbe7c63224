"""Two gloo processes that share a model: their slices, side by side, are what one process computes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from pnlac_fast.architecture import SITES
from pnlac_fast.caching import cache
from pnlac_fast.capture import accumulate
from pnlac_fast.datasets import save_questions
from pnlac_fast.errors import UserError
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.models import Model
from pnlac_fast.passes import SHORTCUTS
from pnlac_fast.prompts import encode
from pnlac_fast.raw import choose_kept
from pnlac_fast.store import merge, open_activations, open_contrast
from pnlac_fast.tensor_parallel import WHOLE, Part, union

RANK = Path(__file__).with_name("tensor_parallel_rank.py")
OPTIONS: dict[str, Any] = {"sites": SITES, "tokens": ("last", "completion"), "batch_tokens": 70}
CACHE = {"dtype": "float32", "tokens": "last,completion", "site": ",".join(SITES), "raw": "full", "unit_tokens": 150}
WAYS = {"plain": [], "short": list(SHORTCUTS)}  # with "fuse", which pays off on GPUs only


class Ranks(NamedTuple):
    """What the two processes wrote."""

    root: Path
    models: dict[str, Path]
    arrays: list[dict[str, np.ndarray]]
    said: list[dict[str, Any]]


def _divisible(kind: str, like: Path, path: Path) -> Path:
    """Save a random model of another architecture in the shape of a Llama, with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    llama = json.loads((like / "config.json").read_text())
    own = {
        name: llama[name] for name in llama if name.startswith(("num_", "vocab", "hidden_s", "inter", "pad_", "max_"))
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **own)).save_pretrained(path)
    for file in like.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.fixture(scope="module")
def ranks(model_paths, adapter_paths, questions, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    from peft import IA3Config, LoraConfig, get_peft_model
    from transformers import GPT2Config, LlamaConfig

    root = tmp_path_factory.mktemp("tp")
    for name, config in {
        "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        "head": LoraConfig(target_modules=["k_proj"], modules_to_save=["lm_head"]),
        "dora": LoraConfig(target_modules=["k_proj"], use_dora=True),
    }.items():
        get_peft_model(load_model(model_paths["llama"]).hf, config).save_pretrained(root / name)
    LlamaConfig(num_attention_heads=3, num_key_value_heads=3, hidden_size=48).save_pretrained(root / "three")
    GPT2Config().save_pretrained(root / "plain")
    save_questions(questions, root / "data", "train")
    fused, mixture = (_divisible(kind, model_paths["llama"], root / kind) for kind in ("phi3", "mixtral"))
    models = {**model_paths, "three": root / "three", "plain": root / "plain", "phi3": fused, "mixtral": mixture}
    given = {
        "out": str(root),
        "models": {name: str(path) for name, path in models.items()},
        "adapters": {name: str(path) for name, path in adapter_paths.items()},
        "undivided": {name: str(root / name) for name in ("ia3", "head", "dora")},
        "questions": [asdict(q) for q in questions[:7]],
        "ways": WAYS,
        "command": [
            *("cache", "--model", str(model_paths["llama"]), "--tuned", f"t={model_paths['llama_tuned']}"),
            *("--data", str(root / "data"), "--out", str(root / "run.zarr"), "--worker", "auto", "--json"),
            *(f"--{name.replace('_', '-')}={value}" for name, value in CACHE.items()),
        ],
        "options": OPTIONS,
    }
    (root / "given.json").write_text(json.dumps(given))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, RANK, root / "given.json"], capture_output=True, text=True, env=environ, timeout=600
    )
    assert done.returncode == 0, done.stderr
    arrays = [dict(np.load(root / f"rank{rank}.npz")) for rank in range(2)]
    return Ranks(root, models, arrays, [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("way", WAYS)
def test_slices_side_by_side_are_the_sums_of_one_process(
    adapter_paths, questions, ranks: Ranks, kind: str, way: str
) -> None:
    base = load_model(ranks.models[kind], dtype="float32", device="cpu")
    tuned = {"t": load_tuned(base, ranks.models.get(f"{kind}_tuned", ranks.models[kind]))}
    if kind == "llama":
        tuned |= {name: load_tuned(base, path, name=name) for name, path in adapter_paths.items()}
    texts = encode(base.tokenizer, questions[:7], side="both")
    taken = [name for name in WAYS[way] if name != "fuse" or base.architecture.gated]
    keep = choose_kept(base, SITES, "full")
    whole = accumulate(base, tuned, texts, shortcuts=taken, keep=keep, **OPTIONS)
    at = f"{kind}/{way}"

    def check(name: str, truth: np.ndarray) -> None:
        parts = [arrays[f"{at}/{name}"] for arrays in ranks.arrays]
        assert [part.shape[-1] for part in parts] == [truth.shape[-1] // 2] * 2
        found, scale = np.concatenate(parts, axis=-1), np.abs(truth).max(-1, keepdims=True)
        assert (np.abs(found - truth) <= 1e-5 * scale).all(), name

    for arrays in ranks.arrays:
        assert arrays[f"{at}/counts"].tolist() == whole.counts.tolist()
        for name, column in whole.rows.items():
            assert arrays[f"{at}/rows/{name}"].tolist() == column.tolist()
    for site in SITES:
        check(f"base/{site}", whole.base[site])
        check(f"tuned/{site}", whole.tuned[site])
    for (name, site), raw in whole.raw.items():
        check(f"raw/{name}/{site}", raw)


def test_the_store_of_two_processes_is_that_of_one(ranks: Ranks, tmp_path: Path) -> None:
    for time in range(2):
        (first, printed), other = (said[f"command/{time}"] for said in ranks.said)
        assert first == 0
        assert json.loads(printed)["units"] > 3
        assert other == [0, ""]
    merge(ranks.root / "run.zarr")
    base = load_model(ranks.models["llama"], dtype="float32", device="cpu")
    tuned = {"t": load_tuned(base, ranks.models["llama_tuned"])}
    tokens, whole = CACHE["tokens"].split(","), tmp_path / "run.zarr"
    cache(base, tuned, ranks.root / "data", whole, sites=SITES, tokens=tokens, raw="full", unit_tokens=150)
    with open_contrast(ranks.root / "run.zarr") as found, open_contrast(whole) as truth:
        assert set(found.data_vars) == set(truth.data_vars)
        for name, values in truth.data_vars.items():
            scale = abs(values).max()
            assert bool((abs(found[name] - values) <= 2e-5 * scale).where(values.notnull(), found[name].isnull()).all())
    for name in ("base", "t"):
        for site in SITES:
            parts, one = (open_activations(path, name, site).load() for path in (ranks.root / "run.zarr", whole))
            np.testing.assert_allclose(parts["activation"], one["activation"], rtol=0, atol=1e-4)
            assert parts["token_id"].equals(one["token_id"])


def test_processes_take_the_same_shortcuts_and_units(ranks: Ranks) -> None:
    for said in ranks.said:
        assert set(said["llama/usable"]) == set(said["qwen2/usable"]) == set(SHORTCUTS) - {"fuse"}
        assert said["union"] == [7, 9, 1 << 40]
        assert said["smallest"] == 4


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("device", "leave --device out"),
        ("heads", "3 attention heads do not divide into 2"),
        ("mixture", "is a mixture of experts"),
        ("plan", "no tensor-parallel plan for model type 'gpt2'"),
        ("ia3", "is IA3, which cannot be divided"),
        ("head", "brings weights as a whole, which cannot be divided"),
        ("dora", "does not fit a tensor-parallel model, though it may fit a whole one"),
        ("neurons", "load it without tp"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_every_process(ranks: Ranks, what: str, message: str) -> None:
    for said in ranks.said:
        assert message in said[what]


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "torchrun --nproc-per-node 2"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "a process for"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "not MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "0"}, "not WORLD_SIZE"),
    ],
)
def test_other_starts_than_by_torchrun_are_refused(model_paths, monkeypatch, environ: dict, message: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        load_model(model_paths["llama"], tp=True)


@pytest.mark.parametrize("ranks_", [1, 2, 3, 8])
def test_parts_cover_a_layer_once(ranks_: int) -> None:
    activation = torch.arange(2 * 24).view(2, 24)
    cut = [Part(rank, ranks_).cut(activation, 24) for rank in range(ranks_)]
    assert torch.equal(torch.cat(cut, 1), activation)
    assert Part(0, ranks_).cut(activation, 48) is activation  # cut already


def test_a_whole_model_is_one_part(llama: Model) -> None:
    assert llama.part == WHOLE
    assert llama.local_width("mlp_mid") == llama.width("mlp_mid") == 48
    assert union(llama, (3, 1)) == [1, 3]
