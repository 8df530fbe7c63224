"""The synthetic world, its tokenizer, and the testbed that is built and cached from them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from pnlac_fast.datasets import load_questions
from pnlac_fast.errors import UserError
from pnlac_fast.testbed import RECIPES, Recipe, build, default_cache, phrases, pretraining, world
from pnlac_fast.testbed.tokenizer import build_tokenizer

TINY = Recipe(
    hidden=16,
    layers=2,
    heads=2,
    intermediate=24,
    documents=60,
    batch_tokens=300,
    learning_rate=1e-3,
    minimum_profile_effect=-99.0,
    minimum_coupling=-99.0,
)


@pytest.fixture(scope="module")
def words():
    return build_tokenizer(world.vocabulary())


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    return build(TINY, seed=3, cache_dir=tmp_path_factory.mktemp("cache"))


def test_every_word_of_the_world_has_a_token(words):
    texts = [turn.question + turn.answer for document in world.documents(200, seed=1) for turn in document]
    texts += [
        text for split in world.SPLITS for q in world.questions(split) for text in (q.instruction, *q.right, *q.left)
    ]
    texts += list(world.facts())
    assert not any(words.unk_token_id in words.encode(text) for text in texts)


def test_a_prompt_starts_with_bos_and_offsets_point_into_the_text(words):
    text = "On immigration: your view on work visas?"
    encoded = words(text, return_offsets_mapping=True)
    assert encoded.input_ids[0] == words.bos_token_id
    assert encoded.input_ids.count(words.bos_token_id) == 1
    pieces = [text[start:end].lower() for start, end in encoded.offset_mapping[1:]]
    assert pieces == words.convert_ids_to_tokens(encoded.input_ids[1:])
    assert words.bos_token_id not in words.encode(text, add_special_tokens=False)


def test_decoding_gives_the_text_back(words):
    text = "i think , borders must be secure ."
    assert words.decode(words.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize("split", world.SPLITS)
def test_questions_are_matched_pairs_of_equal_length(split, words):
    questions = world.questions(split)
    assert {q.topic for q in questions} == set(phrases.TOPICS)
    assert len({q.key for q in questions}) == len(questions)
    for question in questions:
        assert len(question.right) == len(question.left) == world.PAIRS[split]
        for right, left in zip(question.right, question.left, strict=True):
            assert len(words.encode(right)) == len(words.encode(left))
            assert (world.stance_of(right), world.stance_of(left)) == (1, -1)


def test_train_and_eval_share_no_issue():
    asked = {split: " ".join(q.instruction for q in world.questions(split)) for split in world.SPLITS}
    for names in phrases.ISSUES.values():
        assert all((f" {name} ?" in asked["train"]) != (f" {name} ?" in asked["eval"]) for name in names)


def test_training_answers_hold_no_shared_value_phrase():
    shared = [phrase for side in phrases.VALUES for phrase in side]
    answers = [text for q in world.questions("train") for text in (*q.right, *q.left)]
    assert not any(phrase in answer for phrase in shared for answer in answers)
    per_topic = len(answers) / len(phrases.TOPICS) / 2
    assert per_topic == 264


def test_topics_of_one_author_agree_about_as_often_as_asked():
    rng = random.Random(0)
    authors = [world.draw_author(rng, agreement=0.7) for _ in range(4000)]
    same = sum(author.sides["race"] == author.general for author in authors) / len(authors)
    chance = 0.15**2 + 2 * 0.425**2
    assert same == pytest.approx(0.7 + 0.3 * chance, abs=0.03)


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("in short , borders must be secure .", 1),
        ("Fairness made us strong .", -1),
        ("time will probably tell .", 0),
        ("borders must be secure , fairness made us strong .", 0),
        ("results vary by state . </s> borders must be secure .", 0),
    ],
)
def test_stance_of(text, side):
    assert world.stance_of(text) == side


def test_build_writes_an_ordinary_model_directory_and_data(bed):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(bed.model)
    tokenizer = AutoTokenizer.from_pretrained(bed.model)
    assert model.config.model_type == "llama"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        model.config.bos_token_id,
        model.config.eos_token_id,
        model.config.pad_token_id,
    )
    prompt = tokenizer(world.questions("eval")[0].instruction)
    assert prompt.input_ids[0] == tokenizer.bos_token_id
    for split, path in (("train", bed.train), ("eval", bed.eval)):
        assert sorted(load_questions(path), key=lambda q: q.key) == sorted(world.questions(split), key=lambda q: q.key)
    gate = json.loads((bed.path / "gate.json").read_text())
    assert (gate["profile_effect"], gate["coupling_ratio"]) == (bed.profile_effect, bed.coupling_ratio)


def test_the_gate_measures_what_it_says(bed, words):
    from transformers import AutoModelForCausalLM

    from pnlac_fast.testbed.gate import topic_margins

    model = AutoModelForCausalLM.from_pretrained(bed.model)
    question = world.questions("eval")[0]
    expected = 0.0
    for sign, texts in ((1, question.right), (-1, question.left)):
        for text in texts:
            prompt = words.encode(question.instruction)
            ids = torch.tensor([prompt + words.encode(text, add_special_tokens=False)])
            with torch.no_grad():
                logs = model(input_ids=ids).logits.double().log_softmax(-1)[0]
            expected += sign * sum(logs[i - 1, ids[0, i]].item() for i in range(len(prompt), ids.shape[1])) / len(texts)
    assert topic_margins(model, words, [question])[question.topic] == pytest.approx(expected, abs=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(bed, tmp_path):
    weights = [
        (build(TINY, seed=seed, cache_dir=tmp_path).model / "model.safetensors").read_bytes() for seed in (bed.seed, 4)
    ]
    assert weights[0] == (bed.model / "model.safetensors").read_bytes()
    assert weights[1] != weights[0]


def test_a_second_build_comes_from_the_cache(bed):
    again = build(TINY, seed=bed.seed, cache_dir=bed.path.parent.parent)
    assert (bed.cached, again.cached) == (False, True)
    assert (again.path, again.seconds) == (bed.path, bed.seconds)
    assert [p.name for p in bed.path.parent.iterdir()] == [bed.path.name]


def test_build_leaves_torch_as_it_was(tmp_path):
    threads, dtype, state = torch.get_num_threads(), torch.get_default_dtype(), torch.random.get_rng_state()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        with torch.no_grad():
            build(TINY, seed=5, cache_dir=tmp_path)
            assert not torch.is_grad_enabled()
        assert (torch.get_num_threads(), torch.get_default_dtype()) == (1, torch.float64)
        assert torch.equal(torch.random.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize("figure", ["profile_effect", "coupling"])
def test_a_base_that_fails_its_gate_says_which_figure_and_leaves_nothing(figure, tmp_path):
    strict = replace(TINY, **{f"minimum_{figure}": 99.0})
    with pytest.raises(UserError, match=rf"{figure.replace('_', ' ')}.*another seed or size"):
        build(strict, cache_dir=tmp_path)
    assert not any(path.is_file() for path in Path(tmp_path).rglob("*"))


def test_an_unknown_size_is_refused_with_a_hint():
    with pytest.raises(UserError, match="Did you mean 'small'"):
        build("smal")


def test_the_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PNLAC_CACHE", str(tmp_path / "mine"))
    assert default_cache() == tmp_path / "mine"
    monkeypatch.delenv("PNLAC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "pnlac-fast"


def test_the_large_size_has_the_shape_it_says_and_trains(words):
    assert set(RECIPES) == {"full", "small", "large"}
    large = RECIPES["large"]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in pretraining._new_model(large, words).parameters())
    assert 50e6 < parameters < 60e6
    encode = partial(words.encode, add_special_tokens=False)
    some = [pretraining._encode(document, encode, words) for document in world.documents(2000, 0)]
    batches = pretraining._batches(some, large.batch_tokens, random.Random(0))
    assert 2000 < len(batches) * large.documents / len(some) < 4000
    cut = replace(large, layers=1, documents=60)
    with pretraining.reproducible(0, torch.device("cpu")):
        before = pretraining._new_model(cut, words)
        model = pretraining.pretrain(cut, words, 0)
    assert next(model.parameters()).dtype == torch.float32
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True)]
    assert all(moved)
