"""Small random models in the shape of real ones, questions, and an object store, made without a network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from pnlac_fast.datasets import Question
from pnlac_fast.loading import load_model
from pnlac_fast.models import Model

torch.set_num_threads(1)  # models this small lose by threads

WORDS = [
    *("taxes", "guns", "schools", "borders", "wages", "courts", "good", "bad", "fair", "free", "order", "equal"),
    *("strong", "weak", "right", "left", "what", "about", "the", "a", "of", "should", "we", "do", "think", "people"),
    *("state", "law", "Q", "A", ":", "?", "."),
]
TOPICS = ("race", "science", "economy")


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Whole words behind a BOS token for Llama; byte-level pieces without BOS for Qwen2, as its class insists."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if kind == "llama":
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(set("".join(WORDS)) | {"\u0120"})
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([" " + " ".join(WORDS)] * 3, trainer)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def build(kind: str, path: Path, seed: int = 0) -> Path:
    """Save a random model of one architecture, with layers of different scale so that mix-ups show."""
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    model.save_pretrained(path)
    tokenizer(kind).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def model_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of a random Llama and a random Qwen2, and of a tuned version of each (all weights moved a little)."""
    root = tmp_path_factory.mktemp("models")
    paths = {kind: build(kind, root / kind) for kind in ("llama", "qwen2")}
    for kind in ("llama", "qwen2"):
        tuned = load_model(paths[kind], device="cpu").hf
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        tuned.save_pretrained(root / f"{kind}_tuned")
        tokenizer(kind).save_pretrained(root / f"{kind}_tuned")
        paths[f"{kind}_tuned"] = root / f"{kind}_tuned"
    return paths


@pytest.fixture(scope="session")
def adapter_paths(model_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRA adapters of the random Llama, on all linear layers, with random weights."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("race", "science")):
        base = load_model(model_paths["llama"], device="cpu").hf
        peft = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in peft.named_parameters():
                if "lora_" in key:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        peft.save_pretrained(root / name)
    return {name: root / name for name in ("race", "science")}


@pytest.fixture
def llama(model_paths: dict[str, Path]) -> Model:
    return load_model(model_paths["llama"], dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def questions() -> tuple[Question, ...]:
    """Seven questions of three topics, of different lengths, with two pairs of completions each."""
    rows = []
    for t, topic in enumerate(TOPICS):
        for i in range(7):
            words = [WORDS[(3 * i + 5 * t + j) % len(WORDS)] for j in range(3 + (2 * i + t) % 6)]
            right = tuple(" ".join([WORDS[(i + t + k) % 16], "order", "."]) for k in range(2))
            left = tuple(" ".join([WORDS[(i + t + k + 3) % 16], "equal", "fair", "."][: 3 + k]) for k in range(2))
            rows.append(Question(topic, " ".join([*words, "?"]), right, left))
    return tuple(rows)


@pytest.fixture(scope="session")
def service() -> Iterator[str]:
    """The address of a server that speaks S3."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("obstore")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(service: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Give the URL of an empty bucket of a server that the environment names."""
    name = f"bucket-{abs(hash(request.node.nodeid))}"
    urllib.request.urlopen(urllib.request.Request(f"{service}/{name}", method="PUT")).close()
    for variable, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": service,
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(variable, value)
    return f"s3://{name}"
