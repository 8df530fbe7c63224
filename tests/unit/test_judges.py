"""Judges: the classifier, Hugging Face models built here, sheets of people, and what a reply means."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from pnlac_fast.datasets import Question
from pnlac_fast.errors import UserError
from pnlac_fast.judges import open_judge, result_name, train
from pnlac_fast.judges.replies import parse_label
from pnlac_fast.judges.sheet import Sheet, write_sheet
from pnlac_fast.judges.transformer import HYPOTHESES, Inference, TextClassifier

SIDES = {"right": "border order tradition", "left": "justice equality inclusion"}


def labelled(n: int, topics: tuple[str, ...] = ("race",)) -> list[Question]:
    return [
        Question(t, f"q{i} {t} ?", (f"{SIDES['right']} x{i}",), (f"{SIDES['left']} x{i}",))
        for t in topics
        for i in range(n)
    ]


def test_classifier_measures_itself_on_held_out_instructions() -> None:
    judge = train(labelled(12))
    assert judge.accuracy == 1.0
    assert judge.topic_accuracy == {}
    assert judge.label(["tradition and order", "equality now", "zebra", ""]).tolist() == [1, -1, 0, 0]
    shuffled = [Question("race", f"q{i} ?", (f"w{i}",), (f"v{i}",)) for i in range(12)]
    assert train(shuffled).accuracy < 0.2  # words never seen again: unlabelled, which counts as wrong
    with pytest.raises(UserError, match="5 instructions"):
        train(labelled(3))
    with pytest.raises(UserError, match="right and left completions"):
        train([Question("race", f"q{i} ?", ("yes",)) for i in range(6)])


def test_classifier_says_how_it_does_on_topics_it_has_not_seen() -> None:
    other = [
        Question("economy", f"e{i} ?", (f"markets freedom x{i}",), (f"wages unions x{i}",)) for i in range(12)
    ]  # no word in common with the sides of the two other topics
    judge = train([*labelled(12, ("race", "science")), *other])
    assert judge.accuracy > 0.95
    assert judge.topic_accuracy["race"] == judge.topic_accuracy["science"] == 1.0
    assert judge.topic_accuracy["economy"] <= 0.6
    assert judge.provenance["topic_accuracy"] == judge.topic_accuracy


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("right", 1),
        ("Right-leaning.", 1),
        ("**Left**", -1),
        ("left leaning", -1),
        ("Neutral", 0),
        ("Label: right", 1),
        ("The stance is clearly left.", -1),
        ('{"label": "left-leaning"}', -1),
        ('```json\n{"Label": "Neither"}\n```', 0),
        ("['right']", 1),
        ('{"reason": "x is right", "answer": "left"}', -1),
        ("<think>maybe left</think> right", 1),
        ("The answer is right-leaning, not left-leaning.", 1),
        ("It leans to the right of center.", 1),
        ("It is neither right nor left.", 0),
        ("Left - it asks for justice, which the right rejects.", -1),
        ("Right, so the label is left", -1),
        ("1. Left leaning\n2. Left leaning", -1),
        ("", None),
        ("<think>left", None),
        ("I'm sorry, but I cannot label left or right views.", None),
        ("The answer supports the right to bear arms.", None),
        ("Right now, the only way to get a new version of the app is to download it from the store", None),
        ("1. Right leaning\n2. Left leaning\n3. Neutral", None),
        ("left 0.5em 0.5em 0.5em 0.5em; text-align: left; margin: 0px; padding: 0 and so on for ever", None),
        ("Both left and right", None),
    ],
)
def test_replies_are_understood(reply: str, label: int | None) -> None:
    found = parse_label(reply)
    assert np.isnan(found) if label is None else found == label


WORDS = ["tax", "cuts", "help", "firms", "unions", "people", "need", "rights", "guns", "question", "answer", ":", "."]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT that sorts texts into three unnamed labels, its tokenizer one of whole words."""
    folder = tmp_path_factory.mktemp("judge")
    words = " ".join([*WORDS, *HYPOTHESES.values()]).lower().replace(",", " ,").replace(".", " .").split()
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=48,
        num_labels=3,
        initializer_range=1.0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


ANSWERS = ["tax cuts help firms .", "unions help people", "people need rights . people need guns", "need", "tax " * 200]
ASKED = ["tax cuts ?", "unions ?", "rights : guns ?", "people ?", "tax ?"]
NAMES = {"LABEL_0": "left", "LABEL_1": "neither", "LABEL_2": "right"}


def test_text_classifier_takes_the_likeliest_label_of_each_answer_alone(bert: Path) -> None:
    judge = TextClassifier.load(str(bert), labels=NAMES, device="cpu")
    likeliest = []
    for answer in ANSWERS:
        encoded = judge.tokenizer(answer, return_tensors="pt", truncation=True, max_length=48)
        likeliest.append(int(judge.model(**encoded).logits.argmax()))
    assert len(set(likeliest)) > 1
    assert judge.label(ANSWERS).tolist() == [(-1, 0, 1)[i] for i in likeliest]
    assert judge.provenance["labels"] == NAMES
    assert len(judge.provenance["sha256"]) == 64


def test_labels_of_a_text_classifier_must_have_a_meaning(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--judge-label LABEL_0=right"):
        open_judge(f"hf:{bert}", device="cpu")
    with pytest.raises(UserError, match=r"No label of .* means right"):
        open_judge(f"hf:{bert}", labels={**NAMES, "LABEL_2": "left"}, device="cpu")
    with pytest.raises(UserError, match="LABEL_3"):
        open_judge(f"hf:{bert}", labels={"LABEL_3": "left"}, device="cpu")
    with pytest.raises(UserError, match="Did you mean 'right'"):
        open_judge(f"hf:{bert}", labels={"LABEL_2": "rigth"}, device="cpu")
    with pytest.raises(UserError, match="Cannot load the judge"):
        open_judge(f"hf:{tmp_path}", device="cpu")


def test_names_of_labels_speak_for_themselves(bert: Path, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(bert)
    model.config.id2label = {0: "LEFT", 1: "Center", 2: "far-right"}
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path)
    TextClassifier.load(str(bert), labels=NAMES, device="cpu").tokenizer.save_pretrained(tmp_path)
    judge = TextClassifier.load(str(tmp_path), device="cpu")
    assert judge.roles == {0: "left", 1: "neither", 2: "right"}


def test_a_decoder_as_judge_reads_its_last_token(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=2,
        id2label={0: "left", 1: "right"},
        label2id={"left": 0, "right": 1},
        initializer_range=1.0,
        pad_token_id=None,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["</s>", "<unk>", *WORDS])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    judge = TextClassifier.load(str(tmp_path), device="cpu")
    alone = [int(judge.label([answer])[0]) for answer in ANSWERS[:4]]
    assert set(alone) == {1, -1}
    assert judge.label(ANSWERS[:4]).tolist() == alone


def test_what_is_not_entailed_is_no_entailment(bert: Path, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(bert)
    model.config.id2label = {0: "not_entailment", 1: "ENTAILMENT", 2: "contradiction"}
    model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path)
    Inference.load(str(bert), labels={"LABEL_1": "entailment"}, device="cpu").tokenizer.save_pretrained(tmp_path)
    assert Inference.load(str(tmp_path), device="cpu").entailment == 1


def test_inference_takes_the_hypothesis_that_follows_best(bert: Path) -> None:
    judge = Inference.load(str(bert), labels={"LABEL_1": "entailment"}, device="cpu")
    short = ANSWERS[:4]
    expected = []
    for asked, answer in zip(ASKED, short, strict=False):
        odds = []
        for hypothesis in HYPOTHESES.values():
            encoded = judge.tokenizer(f"Question: {asked} Answer: {answer}", hypothesis, return_tensors="pt")
            p = judge.model(**encoded).logits.softmax(-1)[0, 1].item()
            odds.append(np.log(p / (1 - p)))
        expected.append((1, -1, 0)[int(np.argmax(odds))])
    assert judge.label(short, ASKED[:4]).tolist() == expected
    assert judge.label(ANSWERS, ASKED).shape == (5,)  # a long answer is cut, never the hypothesis
    with pytest.raises(UserError, match="LABEL=entailment"):
        Inference.load(str(bert), device="cpu")


def records() -> list[dict[str, str]]:
    answers = {"base": ["yes, and\nno", "=1+1"], "tuned": ["yes, and\nno", "never"]}
    return [
        {"model": model, "topic": "race", "key": str(i), "instruction": f"q{i} ?", "answer": answer}
        for model, texts in answers.items()
        for i, answer in enumerate(texts)
    ]


def fill(path: Path, labels: dict[str, str], delimiter: str = ",") -> None:
    """Label the rows of a sheet by their answers, as a spreadsheet would save it."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "label": labels.get(row["answer"], row["label"])})


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_sheet_goes_out_blind_and_comes_back(tmp_path: Path, delimiter: str) -> None:
    sheet = tmp_path / "sheet.csv"
    assert write_sheet(records(), sheet) == 3  # one answer was given by both models
    text = sheet.read_text()
    assert "tuned" not in text
    assert "base" not in text
    assert ",=" not in text  # no formula for a spreadsheet to run
    with pytest.raises(UserError, match="no label yet"):
        Sheet.read(sheet)
    fill(sheet, {"yes, and\nno": " Right ", "'=1+1": "neither"}, delimiter)
    judge = open_judge(f"csv:{sheet}")
    answers, asked = ([r[name] for r in records()] for name in ("answer", "instruction"))
    assert np.array_equal(judge.label(answers, asked), [1, 0, 1, np.nan], equal_nan=True)
    assert judge.provenance["labels"] == {"right": 1, "left": 0, "neither": 1}
    with pytest.raises(UserError, match="none of these answers"):
        judge.label(["else"], ["q0 ?"])


def test_a_sheet_is_a_fair_draw(tmp_path: Path) -> None:
    many = [
        {"model": m, "topic": t, "key": f"{t}{i}", "instruction": f"{t} {i} ?", "answer": f"{m} says {i}"}
        for m in ("one", "two")
        for t in ("race", "science")
        for i in range(10)
    ]
    assert write_sheet(many, tmp_path / "s.csv", rows=8) == 8
    with (tmp_path / "s.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    drawn = [(row["answer"].split()[0], row["question"].split()[0]) for row in rows]
    assert {cell: drawn.count(cell) for cell in drawn} == dict.fromkeys(drawn, 2)
    assert len(set(drawn)) == 4


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("never,", "never,rigth", "Row .* has the label 'rigth'"),
        ("never,", "ever,left", "does not hold the text"),
        ("label", "lable", "no column 'label'"),
    ],
)
def test_a_spoilt_sheet_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    sheet = tmp_path / "sheet.csv"
    write_sheet(records(), sheet)
    sheet.write_text(sheet.read_text(encoding="utf-8-sig").replace(old, new))
    with pytest.raises(UserError, match=said):
        Sheet.read(sheet)


def test_a_sheet_that_contradicts_itself(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.csv"
    write_sheet(records(), sheet)
    fill(sheet, {"never": "left"})
    line = next(line for line in sheet.read_text(encoding="utf-8-sig").splitlines() if line.endswith("never,left"))
    sheet.write_text(sheet.read_text() + line.replace("left", "right") + "\n")
    with pytest.raises(UserError, match="otherwise than a row before"):
        Sheet.read(sheet)


def test_judges_are_named() -> None:
    assert result_name("logprob") == "stance"
    assert result_name("classifier") == "stance_classifier"
    assert result_name("openai:org/gpt-4.1 mini") == "stance_openai_org_gpt_4_1_mini"
    assert len(result_name("hf:" + "x" * 100)) == 64
    with pytest.raises(UserError, match="Did you mean 'classifier'"):
        open_judge("clasifier")
    with pytest.raises(UserError, match="write hf:NAME"):
        open_judge("hf:")
