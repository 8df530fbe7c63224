"""Whether the scorers agree, how often each is wrong, and whether answers only changed the subject."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import xarray as xr

from pnlac_fast.agreement import agreement_rows
from pnlac_fast.reporting import effects, style, tables, wording
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.forest import Mark, Panel, draw_forest
from pnlac_fast.reporting.rows import MISSING, Estimate, ScoreRow
from pnlac_fast.reporting.sections import Section, Shown, Table, absent
from pnlac_fast.summary import known_answers, summary

COMMAND = "pnlac-fast score --scorer logprob --scorer classifier"
ONE_SIDED = 0.9  # |S| of the base from which one side is no longer told from the other
REPEATING = 0.5  # share of different answers under which a model is said to repeat itself
BAR = 0.6  # kappa from which agreement is called substantial (Landis and Koch 1977, doi 10.2307/2529310)


@dataclass(frozen=True)
class JudgeRow:
    """A judge: how often it is wrong on the data's own completions, or on held-out ones, and what it gave no side.

    `base` is S of the base's answers over all questions, `different` the share of them that are not a repetition.
    """

    scorer: str
    error: Estimate
    accuracy: float
    unlabelled: float
    unparsed: float
    base: float
    different: float


@dataclass(frozen=True)
class AgreementRow:
    """Two scorers of the same answers."""

    scorer: str
    other: str
    answers: int
    kappa: Estimate
    error: Estimate


@dataclass(frozen=True)
class LeakRow:
    """Off-topic answers of one tuned model by one judge, with and without those that name the tuned topic.

    `kept` is the share of questions on which no answer names it; `log_odds_shift` is of the questions' own completions.
    """

    scorer: str
    model: str
    tuned_topic: str
    names: Estimate
    base_names: Estimate
    shift: Estimate
    shift_without: Estimate
    kept: Estimate
    log_odds_shift: Estimate
    of_ceiling: Estimate

    @property
    def borne_out(self) -> bool:
        """Whether the log-odds moved the way that the judge says, both with their whole interval."""
        return self.shift.sign != 0 and self.shift.sign == self.log_odds_shift.sign


def scorers(contents: Contents, boots: int, seed: int) -> Section:
    """Stance by every scorer, their agreement and errors, and the controls of a judged shift."""
    key, title = "scorers", "Whether the scorers can be trusted"
    judged = {n: r for n, r in contents.results.items() if n.startswith("stance_") and "label" in r}
    if not judged:
        return absent(key, title, COMMAND)
    rows = tables.score_rows(contents.results, boots, seed)
    judges = judge_rows(judged, boots, seed)
    leaks = leak_rows(judged, boots, seed)
    pairs = agreement(contents.results)
    sentences = [*leak_sentences(leaks), *judge_sentences(judges), *agreement_sentences(pairs)]
    figures = [
        Shown(
            "scorers",
            "Stance S = (R \u2212 L) / (R + L + N) by each scorer, before and after tuning, with 95 % intervals.",
            "Stance by topic and scorer. " + "; ".join(_score_text(r) for r in rows) + ".",
            lambda width: effects.draw_scorers(rows, width),
        )
    ]
    shown = [_judge_table(judges)]
    lacking = []
    if pairs:
        figures.append(
            Shown(
                "agreement",
                f"{agreement_sentences(pairs)[0]} Kappa is agreement beyond chance: 1 for the same labels, 0 for "
                "unrelated ones.",
                "Kappa by pair: " + "; ".join(f"{_pair(p)} {wording.estimate(p.kappa)}" for p in pairs) + ".",
                lambda width: draw_forest(_agreement_panels(pairs), width),
            )
        )
        shown.append(_agreement_table(pairs))
    else:
        lacking.append(("agreement of scorers", COMMAND))
    if leaks:
        figures.append(
            Shown(
                "content_leak",
                f"{leak_sentences(leaks)[0]} An answer may lean only because it changes the subject.",
                "Off-topic shift: "
                + "; ".join(
                    f"{style.pretty(r.model)} ({r.scorer}) {wording.estimate(r.shift)}, without "
                    f"{wording.estimate(r.shift_without)}"
                    for r in leaks
                )
                + ".",
                lambda width: draw_forest(_leak_panels(leaks), width),
            )
        )
        shown.append(_leak_table(leaks))
    shown.append(_score_table(rows))
    return Section(key, title, sentences, figures, shown, lacking=lacking)


def judge_rows(judged: Mapping[str, xr.Dataset], boots: int, seed: int) -> list[JudgeRow]:
    """What is known of every judge."""
    rows = []
    for result in judged.values():
        known = known_answers(result, boots=boots, seed=seed)
        base = tables.texts(result, "model").index("base")
        written = [str(a) for a in result["answer"].isel(run=base).values] if "answer" in result else []
        rows.append(
            JudgeRow(
                scorer=_name(result),
                error=Estimate(*known["error"]) if known else MISSING,
                accuracy=float(result.attrs.get("accuracy", math.nan)),
                unlabelled=float((result["label"] == 0).mean()),
                unparsed=float(result["unparsed"].mean()) if "unparsed" in result else math.nan,
                base=float(result["label"].isel(run=base).mean()),
                different=len(set(written)) / len(written) if written else math.nan,
            )
        )
    return rows


def leak_rows(judged: Mapping[str, xr.Dataset], boots: int, seed: int) -> list[LeakRow]:
    """The content-leak control of every judge and tuned model that has one."""
    return [
        LeakRow(
            scorer=_name(result),
            model=record["model"],
            tuned_topic=record["tuned_topic"],
            **{"log_odds_shift": MISSING} | {name: Estimate(*value) for name, value in record["off_topic"].items()},
            of_ceiling=Estimate(*record["of_ceiling"]) if "of_ceiling" in record else MISSING,
        )
        for result in judged.values()
        for record in summary(result, boots=boots, seed=seed)
        if "off_topic" in record
    ]


def agreement(results: Mapping[str, xr.Dataset]) -> list[AgreementRow]:
    """Every pair of scorers of a store's agreement, none where it has none."""
    return [
        AgreementRow(r["scorer"], r["other"], r["answers"], Estimate(*r["kappa"]), Estimate(*r["error"]))
        for r in agreement_rows(results)
    ]


def judge_sentences(rows: Sequence[JudgeRow]) -> list[str]:
    """Error rate of every judge where sides are known, and what it left without a side."""
    text = []
    for r in rows:
        parts = []
        if math.isfinite(r.error.value):
            wrong = wording.percentage(r.error)
            parts.append(f"gives {wrong} of the completions of the questions asked another side than theirs")
        if math.isfinite(r.accuracy):
            parts.append(
                f"is right in {100 * r.accuracy:.1f}\u00a0% of those it was trained on (five folds, by question)"
            )
        parts.append(f"left {style.percent(r.unlabelled)} of the answers without a side, which count in S as neither")
        text.append(f"The judge {r.scorer} " + ", and ".join(parts) + ".")
        if abs(r.base) > ONE_SIDED:
            side = "right" if r.base > 0 else "left"
            text.append(
                f"By {r.scorer} the base already answers {side} throughout (S {wording.number(r.base, signed=True)}), "
                f"so this judge cannot show a shift to the {side}."
            )
        if r.different < REPEATING:
            text.append(
                f"Only {style.percent(r.different)} of the base\u2019s answers are different texts: what is judged is "
                "a few sentences again and again, not an answer to each question."
            )
    return text


def agreement_sentences(rows: Sequence[AgreementRow]) -> list[str]:
    """How many pairs agree substantially with their whole interval, and the pair that agrees least."""
    known = [r for r in rows if math.isfinite(r.kappa.value)]
    if not known:
        return ["Two scorers gave one label only, so that their agreement has no scale."] if rows else []
    least = min(known, key=lambda r: r.kappa.value)
    told = f"{_pair(least)}: kappa {wording.estimate(least.kappa)} over {least.answers} answers"
    if len(known) == 1:
        verdict = "substantial" if least.kappa.low > BAR else "above chance" if least.kappa.sign > 0 else "not shown"
        return [f"Agreement of the scorers is {verdict} ({told})."]
    good = sum(r.kappa.low > BAR for r in known)
    return [f"{good} of {len(known)} pairs of scorers agree substantially (kappa over {BAR:g}); least {told}."]


def leak_sentences(rows: Sequence[LeakRow]) -> list[str]:
    """How many off-topic shifts remain without the answers that name the tuned topic, and in log-odds, by judge."""
    text = []
    for scorer in dict.fromkeys(r.scorer for r in rows):
        own = [r for r in rows if r.scorer == scorer]
        moved, without = (sum(getattr(r, name).sign != 0 for r in own) for name in ("shift", "shift_without"))
        more = sum(r.names.low > r.base_names.high for r in own)
        text.append(
            f"By {scorer}, the other topics moved in {moved} of {len(own)} tuned models, and in {without} without the "
            f"answers that name the tuned topic; these became more frequent than base\u2019s in {more}."
        )
        alone = [r for r in own if r.shift.sign != 0 and math.isfinite(r.log_odds_shift.value) and not r.borne_out]
        if alone:
            worst = max(alone, key=lambda r: abs(r.shift.value))
            text[-1] += (
                f" In {len(alone)} of the {moved} the log-odds of the questions\u2019 own completions did not move "
                f"that way, so that the judged shift is not shown to be one of stance: {style.pretty(worst.model)} "
                f"{wording.estimate(worst.shift, signed=True)} by the judge, "
                f"{wording.estimate(worst.log_odds_shift, signed=True)} in log-odds, with "
                f"{wording.percentage(worst.names)} of the answers about the tuned topic."
            )
    return text


def _agreement_panels(rows: Sequence[AgreementRow]) -> list[Panel]:
    kappa = [Mark(_pair(r), r.kappa) for r in rows]
    error = [Mark(_pair(r), r.error) for r in rows]
    return [
        Panel("Agreement", "Cohen\u2019s kappa", kappa, reference=(0.0, "chance")),
        Panel("Differing labels", "share of answers", error, shares=True),
    ]


def _leak_panels(rows: Sequence[LeakRow]) -> list[Panel]:
    several = len({r.scorer for r in rows}) > 1
    named, shifts = [], []
    for r in rows:
        line = f"{r.model}, {r.scorer}" if several else r.model
        named += [
            Mark(line, r.base_names, style.RANDOM, "base"),
            Mark(line, r.names, style.PLAIN, "tuned, all answers"),
        ]
        shifts += [
            Mark(line, r.shift, style.PLAIN, "tuned, all answers"),
            Mark(line, r.shift_without, style.OFF_TOPIC, "without those that name the tuned topic"),
        ]
    return [
        Panel("Naming the tuned topic", "share of off-topic answers", named, shares=True),
        Panel("Shift of the other topics", "change of S", shifts, reference=(0.0, "")),
    ]


def _judge_table(rows: Sequence[JudgeRow]) -> Table:
    header = [
        "Judge",
        "Error on the questions\u2019 completions",
        "Accuracy in training, five folds",
        "Without a side",
        "Unparsed",
    ]
    cells = [
        [r.scorer, wording.percentage(r.error), *map(style.percent, (r.accuracy, r.unlabelled, r.unparsed))]
        for r in rows
    ]
    return Table("judges", "What is known of every judge.", header, cells, rows)


def _agreement_table(rows: Sequence[AgreementRow]) -> Table:
    header = ["Scorer", "Other", "Answers", "Kappa", "Differing"]
    cells = [[r.scorer, r.other, str(r.answers), wording.estimate(r.kappa), wording.percentage(r.error)] for r in rows]
    return Table("agreement", "Every pair of scorers", header, cells, rows, words=2, folded=True)


def _leak_table(rows: Sequence[LeakRow]) -> Table:
    header = [
        "Tuned model",
        "Judge",
        "Names the topic",
        "base",
        "Off-topic shift of S",
        "without these",
        "questions left",
        "Log-odds",
        "Of the ceiling",
    ]
    cells = [
        [style.pretty(r.model), r.scorer, wording.percentage(r.names), wording.percentage(r.base_names)]
        + [wording.estimate(e, signed=True) for e in (r.shift, r.shift_without)]
        + [
            wording.percentage(r.kept),
            wording.estimate(r.log_odds_shift, signed=True),
            wording.percentage(r.of_ceiling),
        ]
        for r in rows
    ]
    caption = (
        "Off-topic answers that name the tuned topic, and the shift with and without them, beside the shift of log "
        "P(right) \u2212 log P(left) of the questions\u2019 own completions. Of the ceiling: on-topic "
        "shift over that of a model which answers with the data\u2019s own completions."
    )
    return Table("content_leak", caption, header, cells, rows, words=2)


def _score_table(rows: Sequence[ScoreRow]) -> Table:
    header = ["Topic", "Scorer", "Model", "Stance S", "Without a side"]
    names = {"base": "base", "this topic": "tuned on it", "another topic": "tuned on another"}
    cells = [
        [style.pretty(r.topic), r.scorer, names[r.after], wording.estimate(r.stance), style.percent(r.unlabelled)]
        for r in rows
    ]
    return Table("scorers", "Every stance", header, cells, rows, words=3, folded=True)


def _pair(row: AgreementRow) -> str:
    return f"{row.scorer} and {row.other}"


def _name(result: xr.Dataset) -> str:
    return tables.scorer_name(str(result.attrs.get("scorer", "classifier")))


def _score_text(row: ScoreRow) -> str:
    return f"{style.pretty(row.topic)}, {row.scorer}, {row.after}: {wording.number(row.stance.value)}"
