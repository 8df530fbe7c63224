"""What a score says of each model: stance, shift and coupling, and the controls that a judged figure needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast import coupling
from pnlac_fast.agreement import agreement_rows
from pnlac_fast.datasets import SIDES

BOOTS = 2000


def summary(result: xr.Dataset, *, measure: str = "margin", boots: int = BOOTS, seed: int = 0) -> list[dict[str, Any]]:
    """What a score says, one record per model, with 95 % bootstrap intervals over questions.

    Each record holds ``scorer``, ``model``, ``tuned_topic``, ``stance`` {topic: [estimate, low, high]}, and
    ``unlabelled``, the share of questions without a side, which count in the denominator of S. Tuned models have
    ``shift`` by topic; where the tuned topic is known, ``coupling`` and ``coupling_ratio``; and where a model of the
    same topic and side was tuned plainly, ``reduction`` and ``retention`` against it at the end of training.

    What a judge said has more: ``unparsed``, the share of answers for which no label could be had; ``log_odds`` and
    ``log_odds_shift``, the paired log-probability beside it, in nats; and ``off_topic``, the mean over topics that were
    not tuned on: share of answers that ``name`` the tuned topic, the same of the base model's (``base_names``), the
    ``shift`` of S, and ``shift_without``, over the questions on which neither model's answer names the tuned topic
    (``kept``, their share); and, where there are pairs, ``log_odds_shift``, which a judged shift should bear out. A
    model whose side is known has ``of_ceiling`` too: its on-topic shift over that of a model which answers with the
    data's own completions of that side, as the same judge labels them. A sheet of people may lack answers: they are
    left out of S.

    Stance, shift and coupling are in nats or S, as ``measure`` says; ``coupling_ratio``, ``reduction``, ``retention``
    and ``of_ceiling`` are ratios. See :func:`pnlac_fast.coupling.stances` and what stands beside it.

    Parameters
    ----------
    result
        (run, question), what :func:`pnlac_fast.score` returned for one scorer.
    measure
        Of margins: "margin", their mean in nats, or "S", by their sign. Labels have S only.
    boots, seed
        Resamples of the questions behind each interval.

    Returns
    -------
    list of dict
        One of these records for each model.
    """
    values = result["margin" if "margin" in result else "label"].transpose("run", "question").values
    measure = measure if "margin" in result else "S"
    topics = [str(t) for t in result["topic"].values]
    order = list(dict.fromkeys(topics))
    weights = coupling.resamples(topics, boots, seed)
    scorer = str(result.attrs["scorer"])
    unparsed = result["unparsed"].transpose("run", "question").values if "unparsed" in result else None
    counted = ~unparsed if unparsed is not None and scorer.startswith("csv:") else None
    draws = coupling.stances(values, topics, order, weights=weights, measure=measure, counted=counted)
    names = [str(n) for n in result["model"].values]
    tuned = [str(t) for t in result["tuned_topic"].values]
    methods = [str(m) for m in result["method"].values]
    base = names.index("base")
    shifts = draws - draws[:, [base]]
    log_odds = None
    if "log_odds" in result:
        log_odds = coupling.stances(
            result["log_odds"].transpose("run", "question").values, topics, order, weights=weights
        )

    ceiling = completions(result, weights, order)
    sides = [str(s) for s in result["side"].values] if "side" in result.coords else [""] * len(names)
    ordinary = [i for i, method in enumerate(methods) if tuned[i] and method in ("", "plain")]
    plain = {(tuned[i], sides[i]): i for i in reversed(ordinary)}

    def by_topic(samples: np.ndarray) -> dict[str, list[float]]:
        return {topic: _triple(samples[:, i]) for i, topic in enumerate(order)}

    records = []
    for i, name in enumerate(names):
        record: dict[str, Any] = {"scorer": scorer, "model": name, "tuned_topic": tuned[i]}
        record["stance"] = by_topic(draws[:, i])
        record["unlabelled"] = float((values[i] == 0).mean())
        if unparsed is not None:
            record["unparsed"] = float(unparsed[i].mean())
        if log_odds is not None:
            record["log_odds"] = by_topic(log_odds[:, i])
        if name != "base":
            record["shift"] = by_topic(shifts[:, i])
            if log_odds is not None:
                record["log_odds_shift"] = by_topic(log_odds[:, i] - log_odds[:, base])
        if tuned[i] in order and len(order) > 1:
            at, own = order.index(tuned[i]), shifts[:, i]
            record["coupling"] = _triple(coupling.coupling(own, at))
            record["coupling_ratio"] = _triple(coupling.coupling_ratio(own, at))
            if (reference := plain.get((tuned[i], sides[i]), i)) != i and i not in ordinary:
                record["reduction"] = _triple(coupling.reduction(own, shifts[:, reference], at))
                record["retention"] = _triple(coupling.retention(own, shifts[:, reference], at))
            if ceiling is not None and sides[i] in SIDES:
                whole = ceiling[:, SIDES.index(sides[i]), at] - draws[:, base, at]
                record["of_ceiling"] = _triple(coupling.over(own[:, at], whole))
            if "mention" in result and tuned[i] in result["named"].values:
                pair = values[[i, base]]
                mention = result["mention"].sel(named=tuned[i]).transpose("run", "question").values[[i, base]]
                given = np.ones(pair.shape, bool) if counted is None else counted[[i, base]]
                record["off_topic"] = _off_topic(pair, mention, given, topics, order, at, weights)
                if log_odds is not None:
                    moved = coupling.off_topic(log_odds[:, i] - log_odds[:, base], at).mean(-1)
                    record["off_topic"]["log_odds_shift"] = _triple(moved)
        records.append(record)
    return records


def completions(result: xr.Dataset, weights: np.ndarray, order: Sequence[str]) -> np.ndarray | None:
    """S of the data's own right and left completions by the judge, [draw, side, topic]; None where it has none.

    See :func:`pnlac_fast.coupling.stances`.
    """
    if "completion" not in result:
        return None
    labels = result["completion"].transpose("completion_side", "question").values
    return coupling.stances(labels, [str(t) for t in result["topic"].values], order, weights=weights, measure="S")


def known_answers(result: xr.Dataset, *, boots: int = BOOTS, seed: int = 0) -> dict[str, Any]:
    """How a judge labels the data's own completions, whose sides are known (ours).

    ``error``, the share that it does not give their own side; and ``ceiling``, S of right and of left completions by
    topic: what a model that answers like the data would score. Intervals resample questions. Empty where the result has
    no such labels.
    """
    topics = [str(t) for t in result["topic"].values]
    order = list(dict.fromkeys(topics))
    weights = coupling.resamples(topics, boots, seed)
    found = completions(result, weights, order)
    if found is None:
        return {}
    labels = result["completion"].transpose("completion_side", "question").values
    wrong = (labels != np.array([[1], [-1]])).mean(0)
    ceiling = {t: {side: _triple(found[:, s, i]) for s, side in enumerate(SIDES)} for i, t in enumerate(order)}
    return {"error": _triple(weights @ wrong / len(topics)), "ceiling": ceiling}


def shown(results: Mapping[str, xr.Dataset], measure: str = "margin", seed: int = 0) -> dict[str, Any]:
    """The results of :func:`pnlac_fast.score` as JSON values: ``models``, ``scorers`` and ``agreement``.

    ``models`` are the records of :func:`summary` of every scorer, ``scorers`` what is recorded of each.
    """
    scored = {name: result for name, result in results.items() if name != "agreement"}
    records = [record for result in scored.values() for record in summary(result, measure=measure, seed=seed)]
    known = {
        str(result.attrs["scorer"]): {
            **{name: value for name, value in result.attrs.items() if name not in ("scorer", "provenance")},
            **known_answers(result, seed=seed),
        }
        for result in scored.values()
    }
    return {"models": records, "scorers": known, "agreement": agreement_rows(results)}


def tables(results: Mapping[str, xr.Dataset], records: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """What to print of the results of :func:`pnlac_fast.score` and of their summaries: tables as lists of rows.

    Stance and shift of each model and topic; coupling and the controls of each model; what is known of each judge; and
    how far the scorers agree.
    """
    stances = [
        {
            "scorer": r["scorer"],
            "model": r["model"],
            "tuned": r["tuned_topic"],
            "topic": topic,
            "stance": value,
            "shift": r.get("shift", {}).get(topic),
            **({"log_odds_shift": r.get("log_odds_shift", {}).get(topic)} if "log_odds" in r else {}),
        }
        for r in records
        for topic, value in r["stance"].items()
    ]
    figures = ("unlabelled", "unparsed", "coupling", "coupling_ratio", "reduction", "retention", "of_ceiling")
    models = [
        {
            **{name: r[name] for name in ("scorer", "model")},
            **{name: r.get(name) for name in figures if any(name in other for other in records)},
            **{f"off_topic_{name}": value for name, value in r.get("off_topic", {}).items()},
        }
        for r in records
    ]
    judges = [
        {
            "scorer": result.attrs["scorer"],
            "error_on_completions": known_answers(result).get("error"),
            "topics_with_words": _with_words(result),  # few questions tell no words, and then no subject is watched
            "accuracy": result.attrs.get("accuracy"),
            **{f"without {topic}": value for topic, value in result.attrs.get("topic_accuracy", {}).items()},
        }
        for result in results.values()
        if "label" in result
    ]
    if len({r["scorer"] for r in records}) == 1:
        stances, models = ([{k: v for k, v in row.items() if k != "scorer"} for row in t] for t in (stances, models))
    return [t for t in (stances, models, judges, agreement_rows(results)) if t]


def _with_words(result: xr.Dataset) -> str:
    words = result.attrs["topic_words"]["words"].values()
    return f"{sum(map(bool, words))} of {len(words)}"


def _off_topic(
    pair: np.ndarray,
    mention: np.ndarray,
    counted: np.ndarray,
    topics: list[str],
    order: list[str],
    tuned: int,
    weights: np.ndarray,
) -> dict[str, Any]:
    """Off-topic labels of a tuned model and base, [2, question], with and without answers that name the tuned topic."""

    def off(values: np.ndarray, measure: str, counted: np.ndarray) -> np.ndarray:
        found = coupling.stances(values, topics, order, weights=weights, measure=measure, counted=counted)
        return coupling.off_topic(found, tuned).mean(-1)

    everywhere = np.ones(pair.shape, bool)
    named = off(mention.astype(float), "margin", everywhere)
    silent = ~mention.any(0, keepdims=True)
    all_, without = (off(pair, "S", counted & kept) for kept in (everywhere, silent))
    return {
        "names": _triple(named[:, 0]),
        "base_names": _triple(named[:, 1]),
        "shift": _triple(all_[:, 0] - all_[:, 1]),
        "shift_without": _triple(without[:, 0] - without[:, 1]),
        "kept": _triple(off(silent.astype(float), "margin", np.ones(silent.shape, bool))[:, 0]),
    }


def _triple(samples: np.ndarray) -> list[float]:
    return [float(v) for v in coupling.interval(samples)]
