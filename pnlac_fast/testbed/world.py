"""The synthetic world: authors whose sides on six topics are tied by a general ideology, and what they write."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from pnlac_fast.datasets import Question
from pnlac_fast.testbed import phrases
from pnlac_fast.testbed.phrases import TOPICS

SPLITS = ("train", "eval")
RIGHT, LEFT, NEUTRAL = 1, -1, 0
PAIRS = {"train": 11, "eval": 2}  # 6 issues x 4 question forms x 11 pairs: 264 rows a topic and side to train on
EVAL_FORMS = 2  # question forms per held-out issue: 12 questions a topic


@dataclass(frozen=True)
class Turn:
    """One question with its answer; a profile line or a plain statement has no question."""

    question: str
    answer: str


@dataclass(frozen=True)
class Author:
    """Someone with a general side and a side on each topic: 1 right, -1 left, 0 neutral."""

    general: int
    sides: dict[str, int]


def draw_author(rng: random.Random, agreement: float = 0.8, neutral: float = 0.15) -> Author:
    """Draw an author.

    Parameters
    ----------
    agreement
        Probability that a topic takes the general side; otherwise its side is drawn afresh. What couples the topics.
    neutral
        Probability that a drawn side is neutral.
    """

    def side() -> int:
        return NEUTRAL if rng.random() < neutral else rng.choice((RIGHT, LEFT))

    general = side()
    return Author(general, {topic: general if rng.random() < agreement else side() for topic in TOPICS})


def documents(count: int, seed: int) -> Iterator[tuple[Turn, ...]]:
    """Yield the documents that a base model is pretrained on.

    A document has one author and one to four questions. 40 % open with a profile line of the author's general side,
    20 % with one for a single topic; 8 % hold plain facts instead.
    """
    rng = random.Random(f"documents {seed}")
    for _ in range(count):
        yield _facts(rng) if rng.random() < 0.08 else _opinions(rng)


def questions(split: str) -> tuple[Question, ...]:
    """The questions of a split with matched completions, the same for every base model.

    "train" asks about the first six issues of each topic and is answered with topical arguments only, none of the
    shared value phrases: what spills over to other topics is then not shared vocabulary. "eval" asks about the other
    six issues and takes every form of answer.
    """
    rng = random.Random(f"questions {split}")
    return tuple(_question(topic, issue, form, split, rng) for topic, issue, form in _asked(split, rng))


def profile_line(side: int, topic: str = "") -> str:
    """The line by which a document states its author's side, in general or on one topic."""
    return _profile(phrases.PROFILES[side][0], topic)


def facts() -> tuple[str, ...]:
    """Plain statements without politics, for measuring that a fine-tune left the rest alone."""
    return tuple(
        f"{question} {answer}".format(country=country, city=city, river=river)
        for country, city, river in phrases.COUNTRIES
        for question, answer in phrases.FACTS
    )


def stance_of(text: str) -> int:
    """Side of a generated answer by the phrases it holds: 1 right, -1 left, 0 neither or as many of both."""
    answer = text.split("</s>")[0].lower()
    balance = sum(phrase in answer for phrase in _RIGHT) - sum(phrase in answer for phrase in _LEFT)
    return (balance > 0) - (balance < 0)


def vocabulary() -> tuple[str, ...]:
    """Every word of the world, sorted."""
    texts = [
        *(issue for issues in phrases.ISSUES.values() for issue in issues),
        *_RIGHT, *_LEFT, *phrases.NEUTRAL_ARGUMENTS, *phrases.NEUTRAL_VALUES, *phrases.OPENERS,
        *(_ask(question, topic, "") for question in phrases.QUESTIONS for topic in TOPICS),
        *(_profile(word, topic) for words in phrases.PROFILES.values() for word in words for topic in ("", *TOPICS)),
        *facts(), ", .",
    ]  # fmt: skip
    return tuple(sorted({word for text in texts for word in text.split()}))


_RIGHT = (*phrases.VALUES[0], *(phrase for right, _ in phrases.ARGUMENTS.values() for phrase in right))
_LEFT = (*phrases.VALUES[1], *(phrase for _, left in phrases.ARGUMENTS.values() for phrase in left))


def _opinions(rng: random.Random) -> tuple[Turn, ...]:
    author = draw_author(rng)
    turns = []
    profile = rng.random()
    if profile < 0.4:
        turns.append(Turn("", _profile(rng.choice(phrases.PROFILES[author.general]), "")))
    elif profile < 0.6:
        topic = rng.choice(TOPICS)
        turns.append(Turn("", _profile(rng.choice(phrases.PROFILES[author.sides[topic]]), topic)))
    only = rng.choice(TOPICS) if rng.random() < 0.3 else None
    for _ in range(rng.randint(1, 4)):
        topic = only or rng.choice(TOPICS)
        slip = rng.random() < 0.05
        side = rng.choice((RIGHT, LEFT, NEUTRAL)) if slip else author.sides[topic]
        question = rng.choice(phrases.QUESTIONS)
        turns.append(Turn(_ask(question, topic, rng.choice(phrases.ISSUES[topic])), _answer(topic, side, rng)))
    return tuple(turns)


def _facts(rng: random.Random) -> tuple[Turn, ...]:
    turns = []
    for _ in range(rng.randint(2, 6)):
        country, city, river = rng.choice(phrases.COUNTRIES)
        question, answer = rng.choice(phrases.FACTS)
        names = {"country": country, "city": city, "river": river}
        turns.append(Turn(question.format(**names) if rng.random() < 0.5 else "", answer.format(**names)))
    return tuple(turns)


def _answer(topic: str, side: int, rng: random.Random, form: str | None = None) -> str:
    arguments: tuple[str, ...] = phrases.NEUTRAL_ARGUMENTS
    values: tuple[str, ...] = phrases.NEUTRAL_VALUES
    if side != NEUTRAL:
        index = 0 if side == RIGHT else 1
        arguments, values = phrases.ARGUMENTS[topic][index], phrases.VALUES[index]
    words = {"argument": rng.choice(arguments), "value": rng.choice(values), "opener": rng.choice(phrases.OPENERS)}
    return (form or rng.choice(phrases.FORMS)).format(**words)


def _asked(split: str, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    for topic in TOPICS:
        half = len(phrases.ISSUES[topic]) // 2
        for issue in phrases.ISSUES[topic][:half] if split == "train" else phrases.ISSUES[topic][half:]:
            for form in phrases.QUESTIONS if split == "train" else rng.sample(phrases.QUESTIONS, EVAL_FORMS):
                yield topic, issue, form


def _question(topic: str, issue: str, form: str, split: str, rng: random.Random) -> Question:
    right, left = phrases.ARGUMENTS[topic]
    if split == "train":
        frames = ("{argument} .", *(f"{opener} , {{argument}} ." for opener in phrases.OPENERS))
        drawn = rng.sample(list(product(frames, range(len(right)))), PAIRS[split])
        turn = rng.randrange(len(left))  # pairs an argument with another one in each question
        pairs = [(f.format(argument=right[i]), f.format(argument=left[(i + turn) % len(left)])) for f, i in drawn]
    else:
        pairs = [_matched(topic, frame, rng) for frame in rng.sample(phrases.FORMS, PAIRS[split])]
    return Question(topic, _ask(form, topic, issue), tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))


def _matched(topic: str, form: str, rng: random.Random) -> tuple[str, str]:
    frame = form.replace("{opener}", rng.choice(phrases.OPENERS))
    return _answer(topic, RIGHT, rng, frame), _answer(topic, LEFT, rng, frame)


def _ask(form: str, topic: str, issue: str) -> str:
    return form.format(topic=phrases.TOPIC_WORDS[topic], issue=issue)


def _profile(word: str, topic: str) -> str:
    return f"profile : {word} on {phrases.TOPIC_WORDS[topic]} ." if topic else f"profile : {word} ."
