"""Words that name a topic, on texts whose words are known."""

from __future__ import annotations

import numpy as np
import pytest

from pnlac_fast.datasets import Question
from pnlac_fast.testbed import world
from pnlac_fast.topic_words import topic_words


def questions() -> list[Question]:
    words = {"race": "heritage quotas", "science": "climate vaccines", "economy": "wages taxes"}
    return [
        Question(topic, f"asked number{i} about {own.split()[0]} ?", (f"people like {own}",), (f"people fear {own}",))
        for topic, own in words.items()
        for i in range(20)
    ]


def test_each_topic_has_its_own_words_and_no_common_ones() -> None:
    found = topic_words(questions())
    assert {topic: set(words) for topic, words in found.words.items()} == {
        "race": {"heritage", "quotas"},
        "science": {"climate", "vaccines"},
        "economy": {"wages", "taxes"},
    }
    assert found.words["race"][0] == "heritage"  # questions hold it too
    assert found.found == dict.fromkeys(found.words, 1.0)
    assert found.mistaken == dict.fromkeys(found.words, 0.0)


def test_an_answer_names_what_its_question_does_not() -> None:
    found = topic_words(questions())
    answers = ["Heritage matters", "heritage, and vaccines.", "people fear", ""]
    named = found.named(answers, ["wages ?", "about heritage ?", "?", "?"])
    assert named.tolist() == [[True, False, False], [False, True, False], [False] * 3, [False] * 3]


def test_one_topic_alone_has_no_words() -> None:
    found = topic_words(questions()[:20])
    assert found.words == {"race": ()}
    assert not found.named(["heritage"], ["?"]).any()
    assert np.isnan(found.mistaken["race"])


def test_the_topics_of_the_synthetic_world_are_told_apart() -> None:
    found = topic_words(world.questions("train"))
    assert min(found.found.values()) > 0.9
    assert max(found.mistaken.values()) == pytest.approx(0.0)
