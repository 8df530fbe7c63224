"""Which tokens count, how completions are joined, and that padding changes nothing."""

from __future__ import annotations

import pytest
import torch

from pnlac_fast.datasets import Question
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model
from pnlac_fast.prompts import CHAT, Text, batches, encode, encode_completion, encode_prompt, load_template, rendered


def words(model: Model, ids: tuple[int, ...] | list[int]) -> str:
    return " ".join(model.tokenizer.convert_ids_to_tokens(list(ids)))


QUESTION = Question("race", "what about taxes ?", ("good .",), ("bad . .",))


def test_special_tokens_never_count(llama: Model) -> None:
    prompt = encode_prompt(llama.tokenizer, QUESTION)
    assert words(llama, prompt.ids) == "<s> what about taxes ?"
    assert prompt.counted == (1, 2, 3, 4)
    assert encode_prompt(llama.tokenizer, QUESTION, count_template=True).counted == (1, 2, 3, 4)


def test_template_text_counts_only_when_asked(llama: Model) -> None:
    template = "Q : {instruction} A :"
    prompt = encode_prompt(llama.tokenizer, QUESTION, template)
    assert words(llama, prompt.ids) == "<s> Q : what about taxes ? A :"
    assert prompt.counted == (3, 4, 5, 6)
    assert encode_prompt(llama.tokenizer, QUESTION, template, count_template=True).counted == tuple(range(1, 9))


def test_topic_in_the_template_is_template_text(llama: Model) -> None:
    prompt = encode_prompt(llama.tokenizer, Question("law", "good ?"), "the {topic} : {instruction}")
    assert words(llama, prompt.ids) == "<s> the law : good ?"
    assert prompt.counted == (4, 5)


def test_selectors(llama: Model) -> None:
    first, second = encode(llama.tokenizer, [QUESTION], "Q : {instruction} A :", side="both")
    assert words(llama, first.ids[first.prompt :]) == "good ."
    assert first.positions("last") == [8]  # the last template token: where the answer is about to start
    assert first.positions("prompt") == [3, 4, 5, 6]
    assert first.positions("completion") == [9, 10]
    assert first.positions("all") == [3, 4, 5, 6, 9, 10]
    assert second.positions("last") == second.positions("prompt") == []  # the prompt counts once per question
    assert second.positions("completion") == [9, 10, 11]


def test_end_of_sequence_is_appended_on_request(llama: Model) -> None:
    assert words(llama, encode_completion(llama.tokenizer, "good .", end=True)) == "good . </s>"


def test_a_tokenizer_that_appends_eos_does_not_end_the_prompt(llama: Model) -> None:
    from tokenizers import processors

    llama.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert words(llama, encode_prompt(llama.tokenizer, QUESTION).ids) == "<s> what about taxes ?"


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_hold_every_text_once_within_budget(side: str) -> None:
    texts = [list(range(1, n + 1)) for n in (5, 2, 9, 2, 7, 1)]
    seen = {}
    for batch in batches(texts, 14, padding_side=side):
        assert batch.ids.numel() <= 14 or len(batch.index) == 1
        for row, i in enumerate(batch.index):
            real = batch.mask[row].bool()
            seen[i] = batch.ids[row][real].tolist()
            assert torch.equal(batch.positions[row][real], torch.arange(len(texts[i])))
    assert [seen[i] for i in range(6)] == texts


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        (Question("race", "good ?"), {"side": "right"}, "no right completion"),
        (QUESTION, {"side": "up"}, "no side 'up'"),
        (QUESTION, {"context": 3}, "needs 5 tokens, the model's context is 3"),
        (QUESTION, {"template": "no slot"}, "exactly once"),
        (Question("race", "   "), {}, "no tokens"),
        (Question("race", "good ?", ("",), ("",)), {"side": "both"}, "completion is empty"),
    ],
)
def test_bad_questions_are_refused(llama: Model, question: Question, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode(llama.tokenizer, [question], **options)


def test_unknown_selector_and_missing_template(tmp_path) -> None:
    with pytest.raises(UserError, match="Did you mean 'last'"):
        Text(0, (1, 2), 2, (1,)).positions("lats")
    with pytest.raises(UserError, match="no template file"):
        load_template(tmp_path / "missing.txt")


TURNS = (
    "{{ bos_token }}{% for m in messages %} {{ 'Q' if m.role == 'user' else 'A' }} : {{ m.content }} </s> "
    "{% endfor %}{% if add_generation_prompt %} A :{{ '\n' }}{% endif %}"
)


def test_a_chat_template_is_a_template(llama: Model) -> None:
    llama.tokenizer.chat_template = TURNS
    prompt = encode_prompt(llama.tokenizer, QUESTION, CHAT + "the law {instruction}")
    assert words(llama, prompt.ids) == "<s> Q : the law what about taxes ? </s> A :"  # one <s>, not two
    assert prompt.counted == (5, 6, 7, 8)
    everything = encode_prompt(llama.tokenizer, QUESTION, CHAT + "the law {instruction}", count_template=True)
    assert everything.counted == (1, 2, 3, 4, 5, 6, 7, 8, 10, 11)  # special tokens never count, written out or added
    assert rendered(llama.tokenizer, "{instruction}") == "{instruction}"
    assert load_template(None, chat=True) == "{chat}{instruction}"
    (text,) = encode(llama.tokenizer, [QUESTION], CHAT + "{instruction}", side="right")
    assert words(llama, text.ids) == "<s> Q : what about taxes ? </s> A : good ."


def test_a_chat_template_joins_completions_by_its_own_end(llama: Model) -> None:
    class Characters:
        """Just enough of a tokenizer to see what it gets."""

        chat_template, bos_token, bos_token_id = "given", None, None

        def __init__(self, end: str) -> None:
            self.end = end

        def apply_chat_template(self, said, **_: object) -> str:
            return f"[{said[0]['content']}]{self.end}"

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    for end, joined in (("\n", "yes"), ("", " yes")):
        assert "".join(map(chr, encode_completion(Characters(end), "yes", CHAT + "{instruction}"))) == joined


def test_a_tokenizer_without_chat_template_is_a_sentence(llama: Model) -> None:
    with pytest.raises(UserError, match="no chat template: leave --chat-template out"):
        encode_prompt(llama.tokenizer, QUESTION, CHAT + "{instruction}")
    llama.tokenizer.chat_template = "{{ messages[0].content }} {{ messages[0].content }}"
    with pytest.raises(UserError, match="exactly once: write one with --template"):
        encode_prompt(llama.tokenizer, QUESTION, CHAT + "{instruction}")
