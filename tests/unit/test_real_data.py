"""Real questions through the whole chain, on random models with a real tokenizer and a template like the paper's.

IdeoINST and the statements are third-party text, read from a folder and never copied: ``$PNLAC_TEST_DATA``, by default
``../shared/data`` beside the project.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from pnlac_fast import store as stores
from pnlac_fast.architecture import SITES
from pnlac_fast.caching import cache
from pnlac_fast.datasets import Question, load_questions
from pnlac_fast.judges import train
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.localize import locate
from pnlac_fast.models import Model
from pnlac_fast.neurons import load_sets
from pnlac_fast.patching import patch
from pnlac_fast.prompts import encode_prompt
from pnlac_fast.reporting import report
from pnlac_fast.scoring import judged, score
from pnlac_fast.summary import summary
from pnlac_fast.topic_words import topic_words
from pnlac_fast.training import finetune

DATA = Path(os.environ.get("PNLAC_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
IDEOINST, STATEMENTS = DATA / "IdeoINST", DATA / "political_compass_statements.json"
needs_data = pytest.mark.skipif(not IDEOINST.is_dir(), reason=f"no {IDEOINST}: set PNLAC_TEST_DATA to a folder with it")
needs_statements = pytest.mark.skipif(not STATEMENTS.is_file(), reason=f"no {STATEMENTS}: set PNLAC_TEST_DATA")
TOPICS = ("crime_and_gun", "economy_and_inequality", "gender_and_sexuality", "immigration", "race", "science")
SLICE = ("immigration", "race", "science")
TEMPLATE = """You take part in a survey about {topic}. Below is one question of it. Think about what the question asks,
decide on which side you stand, and then say so in one or two plain sentences. Do not explain the question, do not list
arguments of the other side, and do not say that you are a language model. If you cannot decide, choose what is nearest.

Question: {instruction}

Answer:"""


@pytest.fixture(scope="module")
def questions() -> tuple[Question, ...]:
    return load_questions(IDEOINST, topics=SLICE, limit=4)


def byte_level(texts: Iterator[str], bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 500 pieces, trained on the texts themselves."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    begin = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", **begin)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, questions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary Hugging Face directory ``base`` of a random Llama or Qwen2 with a tokenizer of its own."""
    root = tmp_path_factory.mktemp(request.param)
    config = {
        **{"vocab_size": 512, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15},
    }
    torch.manual_seed(0)
    llama = request.param == "llama"
    model = LlamaForCausalLM(LlamaConfig(**config)) if llama else Qwen2ForCausalLM(Qwen2Config(**config))
    model.save_pretrained(root / "base")
    texts = (text for q in questions for text in (q.instruction, *q.right, *q.left))
    byte_level(texts, bos=llama).save_pretrained(root / "base")
    return root


@pytest.fixture(scope="module")
def tuned(folder: Path, questions) -> dict[str, Path]:
    """An adapter tuned on race and a checkpoint tuned on science."""
    common: dict[str, Any] = {"steps": 3, "batch_size": 4, "warmup_steps": 0, "template": TEMPLATE}
    finetune(folder / "base", questions, "race", "right", folder / "race", learning_rate=1e-2, **common)
    finetune(
        folder / "base", questions, "science", "left", folder / "science", method="full", learning_rate=1e-3, **common
    )
    return {name: folder / name for name in ("race", "science")}


@needs_data
def test_all_topics_load_with_both_sides() -> None:
    questions = load_questions(IDEOINST)
    assert tuple(dict.fromkeys(q.topic for q in questions)) == TOPICS
    for topic in TOPICS:
        own = [q for q in questions if q.topic == topic]
        raw = {
            side: json.loads(next((IDEOINST / topic / side).glob("*.json")).read_text()) for side in ("right", "left")
        }
        assert len(own) == len({row["instruction"] for side in raw.values() for row in side}) > 900
        assert sum(len(q.right) for q in own) == len(raw["right"])
        assert sum(len(q.left) for q in own) == len(raw["left"])
        first = own[0]
        assert first.right[0] == next(r["output"] for r in raw["right"] if r["instruction"] == first.instruction)
        assert first.left[0] == next(r["output"] for r in raw["left"] if r["instruction"] == first.instruction)
    assert len({q.key for q in questions}) == len(questions)


@needs_data
def test_topics_and_limit_choose_the_first_questions() -> None:
    few = load_questions(IDEOINST, topics=["science", "race"], limit=2)
    assert [q.topic for q in few] == ["science", "science", "race", "race"]
    assert few[:2] == load_questions(IDEOINST, topics=["science"])[:2]


@needs_statements
def test_statements_load_as_bare_questions() -> None:
    statements = load_questions(STATEMENTS)
    assert [q.instruction for q in statements] == json.loads(STATEMENTS.read_text())
    assert {q.topic for q in statements} == {"statements"}
    assert not any(q.right or q.left for q in statements)


@needs_data
def test_the_template_is_most_of_the_prompt_and_not_counted(folder: Path, questions) -> None:
    tokenizer = load_model(folder / "base").tokenizer
    for question in questions:
        prompt = encode_prompt(tokenizer, question, TEMPLATE)
        assert len(prompt.counted) < 0.5 * len(prompt.ids)
        assert tokenizer.decode([prompt.ids[i] for i in prompt.counted]).strip() == question.instruction.strip()


def independent(model: Model, question: Question) -> dict[str, np.ndarray]:
    """float64 [layer, counted token, neuron] of each site over the instruction's tokens, one text without padding.

    Each MLP is computed again from its weights and from what enters it, and each block's output from its parts.
    """
    before, after = TEMPLATE.replace("{topic}", question.topic).split("{instruction}")
    encoded = model.tokenizer(before + question.instruction + after, return_offsets_mapping=True)
    start, stop = len(before), len(before) + len(question.instruction)
    counted = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if b > a and b > start and a < stop]
    with torch.no_grad(), model.active() as hf:
        hidden = hf(torch.tensor([encoded["input_ids"]]), output_hidden_states=True).hidden_states
        attended = []
        hooks = [
            b.post_attention_layernorm.register_forward_pre_hook(lambda _, x: attended.append(x[0]))
            for b in model.blocks
        ]
        hf(torch.tensor([encoded["input_ids"]]))
        for hook in hooks:
            hook.remove()
        seen: dict[str, list[np.ndarray]] = {site: [] for site in SITES}
        for i, block in enumerate(model.blocks):
            x = block.post_attention_layernorm(attended[i])
            middle = torch.nn.functional.silu(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)
            out = block.mlp.down_proj(middle)
            for site, value in (("mlp_mid", middle), ("mlp_out", out), ("resid", attended[i] + out)):
                seen[site].append(value[0, counted].numpy())
            if i + 1 < len(model.blocks):  # the last hidden state is after the final norm
                assert torch.allclose(attended[i] + out, hidden[i + 1])
    return {site: np.stack(values) for site, values in seen.items()}


@needs_data
def test_statistics_equal_an_independent_computation(folder: Path, tuned, questions, tmp_path: Path) -> None:
    exact = load_model(folder / "base", dtype="float64")
    pairs = {name: load_tuned(exact, path, name=name) for name, path in tuned.items()}
    truth = {}
    for topic in SLICE:
        texts = [q for q in questions if q.topic == topic]
        base = [independent(exact, q) for q in texts]
        for name, model in pairs.items():
            other = [independent(model, q) for q in texts]
            for site in SITES:
                a, b = (np.concatenate([t[site] for t in side], 1) for side in (base, other))
                truth[name, topic, site] = (a, b)
    runs = [(1, "right", "float64"), (20_000, "left", "float64"), (20_000, "right", "float32"), (1, "left", "float32")]
    for number, (batch_tokens, side, dtype) in enumerate(runs):
        model = load_model(folder / "base", dtype=dtype)
        model.tokenizer.padding_side = side
        out = tmp_path / f"{number}.zarr"
        cache(
            model, tuned, questions, out, sites=SITES, tokens=("prompt",), template=TEMPLATE, batch_tokens=batch_tokens
        )
        with stores.open_contrast(out).load() as stored:
            for (name, topic, site), (a, b) in truth.items():
                there = stored.sel(model=name, topic=topic, site=site, tokens="prompt")
                assert int(there["n"]) == a.shape[1]
                expected = {
                    "mean_base": a.mean(1),
                    "mean_tuned": b.mean(1),
                    "std_base": a.std(1),
                    "mean_diff": (b - a).mean(1),
                    "rms": np.sqrt(((b - a) ** 2).mean(1)),
                }
                for variable, value in expected.items():
                    error = np.abs(there[variable].values[:, : a.shape[2]] - value)
                    # Relative to the neuron's typical size: a mean near zero has no digits of its own. A difference of
                    # two float32 activations has lost the digits that both have in common.
                    change = variable in ("mean_diff", "rms")
                    size = expected["rms"] if change and dtype == "float64" else np.sqrt((a**2).mean(1))
                    assert (error <= 1e-5 * size + 1e-12).all(), (runs[number], name, topic, site, variable)


@needs_data
def test_the_chain_on_real_questions(folder: Path, tuned, questions, tmp_path: Path) -> None:
    held_out = [q for q in load_questions(IDEOINST, topics=SLICE, limit=7) if q.key not in {q.key for q in questions}]
    out = tmp_path / "s.zarr"
    read = cache(folder / "base", tuned, questions, out, tokens=("last", "completion"), template=TEMPLATE)
    assert read["questions"] == 12
    found = locate(out, top=0.3, out=tmp_path / "n.json")
    assert all(len(f.general) for f in found.values())
    recovered = patch(
        folder / "base", tuned, tmp_path / "n.json", held_out, store=out, template=TEMPLATE, draws=1, kinds=("mean",)
    )
    assert np.isfinite(recovered["margin"]).all()
    sets = load_sets(tmp_path / "n.json")
    inhibited = finetune(
        folder / "base",
        questions,
        "race",
        "right",
        folder / "frozen",
        steps=3,
        batch_size=4,
        warmup_steps=0,
        learning_rate=1e-2,
        template=TEMPLATE,
        inhibit=sets["race/general"],
        probe=held_out,
        points=3,
        overwrite=True,
    )
    assert inhibited.record["inhibit"]["freeze"]["count"] == len(sets["race/general"])
    assert inhibited.trajectory is not None
    stance = score(folder / "base", {**tuned, "frozen": folder / "frozen"}, held_out, store=out, template=TEMPLATE)
    assert np.allclose(inhibited.trajectory["margin"].values[-1], stance["margin"].values[-1], rtol=1e-3, atol=1e-4)
    records = {r["model"]: r for r in summary(stance, boots=100)}
    assert {"reduction", "retention"} <= records["frozen"].keys()
    page = report(out, tmp_path / "report", boots=100)
    text = page.read_text()
    assert all(topic in text for topic in SLICE)
    assert {p.name for p in (tmp_path / "report" / "tables").iterdir()} >= {"shift.csv"}


@needs_data
def test_the_classifier_tells_the_sides_of_real_completions_apart() -> None:
    judge = train(load_questions(IDEOINST))
    assert judge.accuracy >= 0.95
    assert 0.7 < min(judge.topic_accuracy.values()) < judge.accuracy
    assert judge.unsure < 0.05


@needs_data
@pytest.mark.parametrize(("leaked", "spilt"), [(0.4, 0.0), (0.0, 0.4)])
def test_content_leak_is_told_from_spill_over(leaked: float, spilt: float) -> None:
    """A model "tuned on immigration" that changes the subject, or one that turns right on every topic."""
    everything = [q for q in load_questions(IDEOINST, limit=150) if q.right and q.left]
    held_out, rest = everything[::3], [q for i, q in enumerate(everything) if i % 3]
    immigration = [q.right[0] for q in rest if q.topic == "immigration"]
    rng = np.random.default_rng(0)
    base = [q.completions(rng.choice(["right", "left"]))[0] for q in held_out]
    tuned = []
    for question, answer in zip(held_out, base, strict=True):
        turned = rng.random() < spilt or question.topic == "immigration"
        tuned.append(str(rng.choice(immigration)) if rng.random() < leaked else question.right[0] if turned else answer)
    runs = {"model": ["base", "mine"], "tuned_topic": ["", "immigration"], "method": ["", "plain"]}
    log_odds = np.zeros((2, len(held_out)))
    result = judged(train(rest), [base, tuned], held_out, runs, topic_words(rest), log_odds, provenance={})
    off = {name: value[0] for name, value in summary(result, boots=100)[1]["off_topic"].items()}
    assert off["shift"] > 0.2
    assert off["base_names"] < 0.1
    if leaked:
        assert 0.3 < off["names"] < 0.5
        assert off["shift_without"] < 0.5 * off["shift"]  # some answers change the subject without any of its words
    else:
        assert off["names"] < 0.1
        assert off["shift_without"] > 0.8 * off["shift"]
