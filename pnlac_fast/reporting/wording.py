"""Numbers in words: how an estimate is written, and sentences that claim no more than its interval says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import xarray as xr

from pnlac_fast.reporting import style
from pnlac_fast.reporting.rows import (
    CouplingRow,
    Estimate,
    GeneralRow,
    MethodRow,
    ModelPair,
    PatchRow,
    ShiftCell,
)
from pnlac_fast.reporting.runs import EQUAL_SHIFT

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
FLAT = 0.10  # an interval that holds zero and stays within ±10 % is called no clear change, a wider one undecided


def sentence_case(text: str) -> str:
    """The text with a capital first letter, the rest untouched."""
    return text[:1].upper() + text[1:]


def count(number: int) -> str:
    """A small count as a word."""
    return _WORDS[number] if number < len(_WORDS) else str(number)


def listed(words: Iterable[str]) -> str:
    """``a, b and c``."""
    every = list(words)
    return " and ".join(filter(None, (", ".join(every[:-1]), *every[-1:])))


def number(value: float, digits: int = 2, *, signed: bool = False) -> str:
    """A number with a true minus sign; "–" where it could not be computed."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return ("0" + text[2:] if float(text) == 0 and text[0] in "+-" else text).replace("-", "\u2212")


def size(count: float) -> str:
    """A number of bytes, ``1.5 MB``."""
    if not math.isfinite(count):
        return "–"
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, int(math.log10(max(count, 1)) // 3)))
    return f"{count / 1000**power:.{0 if power == 0 else 1}f}\u00a0{units[power]}"


def estimate(value: Estimate, digits: int = 2, *, signed: bool = False) -> str:
    """``0.31 [0.27, 0.35]``."""
    if not math.isfinite(value.value):
        return "–"
    return (
        f"{number(value.value, digits, signed=signed)} [{number(value.low, digits)},\u00a0{number(value.high, digits)}]"
    )


def percentage(value: Estimate, *, signed: bool = False) -> str:
    """``87 % [84, 90]``."""
    if not math.isfinite(value.value):
        return "–"
    low, high = number(100 * value.low, 0), number(100 * value.high, 0)
    return f"{number(100 * value.value, 0, signed=signed)}\u00a0% [{low},\u00a0{high}]"


def draws_range(draws: Sequence[float], *, signed: bool = False) -> str:
    """``5 % (2 to 9 over 10 draws)``: mean, least and most of the random draws."""
    mean = sum(draws) / len(draws)
    low, high = (number(100 * v, 0) for v in (min(draws), max(draws)))
    return f"{number(100 * mean, 0, signed=signed)}\u00a0% ({low}\u00a0to\u00a0{high} over {len(draws)} draws)"


def reversed_sign(value: Estimate) -> Estimate:
    """A reduction as a change, or a change as a reduction."""
    return Estimate(-value.value, -value.high, -value.low)


def shift_sentences(cells: Sequence[ShiftCell], table: Sequence[CouplingRow], unit: str) -> list[str]:
    """What tuning did to its own topic and to the others."""
    plain = [r for r in table if r.method == table[0].method] if table else []
    if not plain:
        return []
    whole = next((r for r in plain if not r.tuned_topic), plain[0])
    tuned = [r.tuned_topic for r in plain if r.tuned_topic]
    others = len({c.probe_topic for c in cells}) - 1
    subject = "Tuning on one topic" if len(tuned) > 1 else f"Tuning on {style.pretty(tuned[0])}"
    those = f"the {count(others)} others" if others > 1 else "the other topic"
    if whole.on_topic.sign == 0:
        on = estimate(whole.on_topic, signed=True)
        return [f"{subject} was not shown to move that topic itself ({on} {unit}), so spill-over has no scale here."]
    ratio = estimate(whole.ratio)
    if whole.ratio.sign > 0:
        first = f"{subject} moved {those} by {ratio} of the on-topic shift."
    elif whole.ratio.sign < 0:
        first = f"{subject} moved {those} the other way, by {ratio} of the on-topic shift."
    else:
        first = f"{subject} was not shown to move {those}: {ratio} of the on-topic shift, and the interval holds zero."
    away = [c for c in cells if c.tuned_topic != c.probe_topic and c.tuned_topic in tuned]
    same = sum(c.shift.sign == whole.on_topic.sign for c in away)
    opposite = sum(c.shift.sign == -whole.on_topic.sign for c in away)
    second = f"{same} of {len(away)} off-topic cells moved the same way as the tuned topic with their whole interval"
    return [first, second + (f", {opposite} the opposite way." if opposite else ".")]


def neuron_sentences(rows: Sequence[GeneralRow]) -> list[str]:
    """How many neurons all topics share, beside chance."""
    if not rows or not rows[0].topics:
        return []
    found = sum(r.general for r in rows) / len(rows)
    chance = sum(r.chance_general for r in rows) / len(rows)
    text = (
        f"{style.percent(found)} of all neurons are in the top {style.percent(rows[0].top)} of "
        f"all {count(rows[0].topics)} topics; independent top sets would share {style.percent(chance)}."
    )
    return [text + " A large overlap is no proof of a political function by itself; patching is the test."]


def control_sentence(side: str, cells: Sequence[ShiftCell]) -> str:
    """Whether tuning to the other side moves the other topics that way: the control that tells leaning from noise."""
    way = 1 if side == "right" else -1
    off = [c for c in cells if c.tuned_topic != c.probe_topic]
    same, against = (sum(c.shift.sign == s for c in off) for s in (way, -way))
    text = f"Tuned {side} instead, {same} of {len(off)} off-topic cells moved {side} with their whole interval"
    return text + (f", {against} the opposite way." if against else ".")


def sided_sentence(row: CouplingRow, unit: str) -> str:
    """What remains of the shifts when that which both sides have in common is taken out."""
    text = (
        f"What depends on the side, half of right-tuned minus left-tuned on the same topics, is "
        f"{estimate(row.on_topic, signed=True)} {unit} on topic and {estimate(row.off_topic, signed=True)} off"
    )
    if row.off_topic.sign > 0:
        return f"{text}: {estimate(row.ratio)} of it."
    return f"{text}, so spill-over of a side is not shown."


def model_sentence(pairs: Sequence[ModelPair]) -> str:
    """How far tuned models agree on which neurons are general, beside random sets."""
    mean, chance = (sum(v) / len(pairs) for v in zip(*((p.jaccard, p.chance) for p in pairs), strict=True))
    more = sum(p.jaccard > p.chance_high for p in pairs)
    return (
        f"The general sets of two tuned models overlap by {mean:.2f}, random ones with the same counts in every layer "
        f"by {chance:.2f}; more than those in {more} of {len(pairs)} pairs."
    )


def scale_sentence(share: xr.DataArray) -> str:
    """In which layer general neurons are most frequent, ranked raw and in units of their own spread."""
    general = share.sel(kind="general")
    raw, scaled = (int(np.argmax(general.sel(layer_score=s).values)) for s in ("rms", "std_rms"))
    told = f"also in layer {raw}" if raw == scaled else f"in layer {scaled} instead, so the layer is a matter of scale"
    return f"General neurons ranked by raw change are most frequent in layer {raw}; in units of their spread, {told}."


def patch_sentences(rows: Sequence[PatchRow]) -> list[str]:
    """What the general neurons recover, beside as many random ones."""
    chosen = [r for r in rows if (r.direction, r.kind) == (rows[0].direction, rows[0].kind)] if rows else []
    general = next((r for r in chosen if r.neurons == "general"), None)
    if general is None:
        return []
    act = (
        "Copying the tuned activations of the general neurons into base recovered"
        if general.direction == "tuned_into_base"
        else "Putting base activations back at the general neurons of the tuned model undid"
    )
    off, on = percentage(general.off_topic), percentage(general.on_topic)
    text = (
        f"{act} {off} of the off-topic and {on} of the on-topic shift ({style.percent(general.share)} of all neurons)"
    )
    random = next((r for r in chosen if r.neurons == "random"), None)
    if random is None:
        return [f"{text}."]
    draws = random.off_topic_draws or (random.off_topic.value,)
    told = draws_range(draws) if len(draws) > 1 else percentage(random.off_topic)
    text += f"; as many random neurons in every layer recovered {told} of the off-topic shift"
    if math.isfinite(general.off_topic.low) and general.off_topic.low <= max(draws):
        text += ", so the general neurons are not shown to do more than random ones"
    return [f"{text}."]


def method_sentences(rows: Sequence[MethodRow]) -> list[str]:
    """For every method: what it did to coupling at equal on-topic shift, beside its random control.

    The first of the shifts that it reached is told in full, the others in brackets.
    """
    sentences = []
    for method in dict.fromkeys(r.method for r in rows):
        if method == "plain" or style.is_control(method):
            continue
        equal = {r.comparison: r for r in rows if r.method == method}
        reached = [equal[name] for name in EQUAL_SHIFT if math.isfinite(equal[name].reduction.value)]
        if reached:
            row, *others = reached
            told = f"at {style.percent(EQUAL_SHIFT[row.comparison])} of plain tuning\u2019s on-topic shift"
            beside = [f"{row.reached} of {row.runs} runs reached it"] if row.reached < row.runs else []
            beside += [_at(o, row.reduction.sign > 0) for o in others]
            told += f" ({'; '.join(beside)})" if beside else ""
        else:
            row, told = equal["equal steps"], "at equal steps (it never reached the on-topic shift of plain tuning)"
        control = next(
            (
                r
                for r in rows
                if style.is_control(r.method)
                and style.controlled(r.method) == method
                and r.comparison == row.comparison
                and math.isfinite(r.reduction.value)
            ),
            None,
        )
        sentences.append(_method_sentence(row, told, control))
    return sentences


def _at(row: MethodRow, reduced: bool) -> str:
    """Another comparison, as a reduction where the one before it is told as one, else as a change."""
    value = percentage(row.reduction) if reduced else percentage(reversed_sign(row.reduction), signed=True)
    return f"{'' if reduced else 'change '}at {style.percent(EQUAL_SHIFT[row.comparison])}: {value}"


def _method_sentence(row: MethodRow, told: str, control: MethodRow | None) -> str:
    act = deed(row.method, row.share)
    change = percentage(reversed_sign(row.reduction), signed=True)
    if not math.isfinite(row.reduction.value):
        return f"{act} could not be compared with plain tuning."
    if row.reduction.sign > 0:
        text = f"{act} reduced coupling by {percentage(row.reduction)} {told}"
    elif row.reduction.sign < 0:
        text = f"{act} did not reduce coupling but raised it by {percentage(reversed_sign(row.reduction))} {told}"
    elif max(abs(row.reduction.low), abs(row.reduction.high)) <= FLAT:
        text = f"{act} did not clearly change coupling: {change} {told}"
    else:
        text = f"{act} was not shown to reduce coupling: {change} {told}, and the interval holds zero"
    if control is None:
        return f"{text}."
    side = 1 if row.reduction.sign > 0 else -1
    draws = [side * d for d in control.reduction_draws or (control.reduction.value,)]
    single = control.reduction if side > 0 else reversed_sign(control.reduction)
    beside = draws_range(draws, signed=side < 0) if len(draws) > 1 else percentage(single, signed=side < 0)
    text += f"; random neurons, same count in every layer: {beside}"
    if row.reduction.sign > 0:
        better = row.reduction.low > max(draws)
        text += ", less than it in every draw" if better and len(draws) > 1 else ""
        text += "" if better else ", so it is not shown to beat them"
    return f"{text}."


def deed(method: str, share: float) -> str:
    """A method as the subject of a sentence."""
    name = "" if "+" in method else style.family(method)
    of_all = f" ({style.percent(share)} of all)" if math.isfinite(share) and share > 0 else ""
    number = style.controlled(method).partition("_")[2]
    if name == "freeze":
        return f"Freezing {style.percent(share) if math.isfinite(share) else 'part'} of all neurons, the general ones,"
    if name == "specific":
        of_top = f" of the top {number}\u00a0%" if number else ""
        return f"Training only the topic-specific neurons{of_top}{of_all}"
    if name == "anchor":
        return f"Anchoring the activations of the general neurons{of_all}"
    if name == "kl":
        return "Holding the answers on other topics close to base (KL)"
    return f"The method \u201c{style.method_label(method)}\u201d{of_all}"
