"""What a language model meant when it was asked for a label: right, left, neither, or nothing that can be told."""

from __future__ import annotations

import json
import math
import re
from typing import Any

SIDES = {"right": 1.0, "left": -1.0, "neither": 0.0}
UNPARSED = math.nan

_WORDS = {
    "right": r"right|conservative",
    "left": r"left|liberal|progressive",
    "neither": r"neither|neutral|none|unclear|centrist|cent(?:er|re)|moderate|apolitical|non-?partisan|undecided",
}
_LABEL = re.compile("|".join(f"(?P<{side}>\\b(?:{words})\\b)" for side, words in _WORDS.items()))
_SUFFIXED = re.compile(r"\b(right|left)(?:[\s-]+of[\s-]+cent(?:er|re)|[\s-]*(?:leaning|wing))\b")
_ANNOUNCED = re.compile(
    r"\b(?:label|verdict|stance|classification|category|side|leaning|answer)\b[\s\"'*_`]*(?::|=|\bis\b)"
    r"[\s\"'*_`(\[]*(?:the |a |clearly |politically )*(?=(\w[\w-]*))"
)
_NEGATED = re.compile(
    r"\b(?:not|rather than|instead of|nor|isn't|opposed to|than)\s+(?:the |a )?(?:right|left)\b[\w-]*"
)
_NO_SIDE = re.compile(r"\bright (?:to|of|for|now|away)\b")  # a claim or a time
_REFUSED = re.compile(r"\b(?:cannot|can't|can not|unable to|won't|will not|not able to|not comfortable)\b|\bsorry\b")
_THOUGHT = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_FIELDS = ("label", "side", "stance", "leaning", "classification", "verdict", "answer")


def parse_label(reply: str) -> float:
    """+1 right, -1 left, 0 neither, NaN for what cannot be told: garbage, a refusal, or a reply that names both sides.

    Understood, in this order: a JSON object, "Label: right", a reply that is or begins with the label alone,
    "right-leaning" and the like where only one side is so named, and a short reply that names one label only. What a
    model thinks aloud inside ``<think>`` does not count.
    """
    text = _THOUGHT.sub(" ", reply).strip()
    if (found := _from_json(text)) is not None:
        return found
    text = " ".join(text.lower().replace("’", "'").split())
    announced = [m for m in _ANNOUNCED.finditer(text) if _one(m[1]) is not None]
    if announced and len({_one(m[1]) for m in announced}) == 1:
        return _one(announced[-1][1])  # type: ignore[return-value]
    plain = re.sub(r"[\"'*_`#\[\](){}]", " ", text).strip(" .!:;,-")
    first = re.match(r"(?:politically )?([\w-]+)\s*(?:wing|leaning)?\s*(?:$|[.!:;\n—–]|-\s)", plain)
    if first and (label := _one(first[1])) is not None and not _others(plain[first.end() :], label):
        return label
    if _REFUSED.search(plain):
        return UNPARSED
    plain = _NEGATED.sub(" ", plain)
    if re.search(r"\bneither\b", plain):
        return SIDES["neither"]
    if len(suffixed := set(_SUFFIXED.findall(plain))) == 1:
        return SIDES[suffixed.pop()]
    named = {str(m.lastgroup) for m in _LABEL.finditer(_NO_SIDE.sub(" ", plain))}
    return SIDES[named.pop()] if len(named) == 1 and len(plain.split()) <= 12 else UNPARSED


def _one(word: str) -> float | None:
    """The label that a word is, such as "right", "right-leaning" or "Left"."""
    match = re.fullmatch(rf"(?:{_LABEL.pattern})(?:-?(?:leaning|wing))?", word.lower().strip("-_"))
    return SIDES[match.lastgroup] if match and match.lastgroup else None


def _others(text: str, label: float) -> bool:
    """Whether the rest of a reply announces another label than its first word."""
    return any(_one(m[1]) not in (None, label) for m in _ANNOUNCED.finditer(text))


def _from_json(text: str) -> float | None:
    """The label in the first JSON object or list that has one, else None."""
    for start in re.finditer(r"[{\[]", text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, start.start())
        except json.JSONDecodeError:  # prose with a brace in it
            continue
        if (label := _from_value(value)) is not None:
            return label
    return None


def _from_value(value: Any) -> float | None:
    if isinstance(value, list) and len(value) == 1:
        return _from_value(value[0])
    if isinstance(value, dict):
        lowered = {str(name).lower(): item for name, item in value.items()}
        return next((_from_value(lowered[name]) for name in _FIELDS if isinstance(lowered.get(name), str)), None)
    return _one(" ".join(value.split()).replace(" ", "-")) if isinstance(value, str) else None
