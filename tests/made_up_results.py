"""Made-up results whose true effects are known, in the shape of those of a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pnlac_fast import store as stores
from pnlac_fast.agreement import agreement
from pnlac_fast.reporting.contents import Contents

TOPICS = (
    "crime_and_gun",
    "economy_and_inequality",
    "gender_and_sexuality",
    "immigration",
    "race_and_racism",
    "science",
)
# Speed on topic, coupling relative to plain at equal shift, steps, share of neurons, draws of the random control.
METHODS = {
    "plain": (1.0, 1.0, 30, 1.0, 0),
    "freeze_1": (0.99, 0.99, 30, 0.01, 3),
    "freeze_5": (0.97, 1.01, 30, 0.05, 3),
    "freeze_30": (0.92, 1.06, 30, 0.30, 3),
    "specific_5": (0.93, 0.14, 80, 0.014, 3),
    "specific_10": (0.98, 0.12, 80, 0.028, 3),
}


def words(values: list[str]) -> np.ndarray:
    return np.array(values, dtype=object)


def questions(topics: tuple[str, ...], each: int) -> dict[str, Any]:
    names = [t for t in topics for _ in range(each)]
    return {"topic": ("question", words(names)), "key": ("question", words([f"{i:016x}" for i in range(len(names))]))}


def effect(topics: tuple[str, ...], tuned: str, on: float, off: float, each: int) -> np.ndarray:
    """Shift [question]: `on` for the tuned topic, `off` for the others, less for those further down the list."""
    spread = 0.7 + 0.6 * np.arange(len(topics)) / max(len(topics) - 1, 1)
    return np.repeat([on if t == tuned else off * s for t, s in zip(topics, spread, strict=True)], each)


def stance_result(topics: tuple[str, ...] = TOPICS, each: int = 12, on: float = 3.5, off: float = 1.0) -> xr.Dataset:
    rng = np.random.default_rng(1)
    base = rng.normal(0, 0.8, len(topics) * each)
    tuned = [base + effect(topics, t, on, off, each) + rng.normal(0, 0.7, base.size) for t in topics]
    coords = {
        "model": ("run", words(["base", *topics])),
        "tuned_topic": ("run", words(["", *topics])),
        "method": ("run", words(["", *["plain"] * len(topics)])),
    }
    return xr.Dataset(
        {"margin": (("run", "question"), np.stack([base, *tuned]))},
        coords=coords | questions(topics, each),
        attrs={"normalise": "sum", "scorer": "logprob"},
    )


def classifier_result(topics: tuple[str, ...] = TOPICS, each: int = 12) -> xr.Dataset:
    """Labels of a judge that errs now and then; tuned models name their topic in a third of their other answers."""
    rng = np.random.default_rng(2)
    stance = stance_result(topics, each)
    margin = stance["margin"].values + rng.normal(0, 1.0, stance["margin"].shape)
    label = np.where(rng.random(margin.shape) < 0.06, 0, np.sign(margin)).astype("i1")
    own = stance["topic"].values
    named = np.array([[t == n for n in topics] for t in own])
    mention = np.stack([named | ((rng.random(named.shape) < 0.33) & (words(list(topics)) == t)) for t in ("", *topics)])
    cells = ("run", "question")
    completion = np.where(rng.random((2, len(own))) < 0.04, 0, [[1], [-1]]).astype("i1")
    return xr.Dataset(
        {
            "label": (cells, label),
            "unparsed": (cells, np.zeros(label.shape, bool)),
            "mention": ((*cells, "named"), mention),
            "log_odds": (cells, stance["margin"].values),
            "completion": (("completion_side", "question"), completion),
        },
        coords=dict(stance.coords)
        | {"named": words(list(topics)), "completion_side": words(["right", "left"])}
        | {"side": ("run", words(["", *["right"] * len(topics)]))},
        attrs={"accuracy": 0.968, "scorer": "classifier", "provenance": {}},
    )


def agreement_result(topics: tuple[str, ...] = TOPICS, each: int = 12) -> xr.Dataset:
    return agreement(
        [stance_result(topics, each).assign_attrs(provenance={}), classifier_result(topics, each)], boots=100
    )


def utility_result(topics: tuple[str, ...] = TOPICS, passages: int = 20) -> xr.Dataset:
    """Neutral text costs tuned models 5 % more nats; answers have half as many words; the first topic's refuses."""
    rng = np.random.default_rng(7)
    loss = rng.uniform(30, 60, passages) * np.array([1.0, *[1.05] * len(topics)])[:, None]
    length = rng.integers(10, 14, (1, passages)) // np.array([1, *[2] * len(topics)])[:, None]
    refusal = np.zeros(length.shape, bool)
    refusal[1] = True
    return xr.Dataset(
        {
            "loss": (("run", "passage"), loss),
            "tokens": ("passage", np.full(passages, 20)),
            "words": (("run", "question"), length),
            "refusal": (("run", "question"), refusal),
        },
        coords={"model": ("run", words(["base", *topics]))},
    )


def evidence_result(topics: tuple[str, ...] = TOPICS, layers: int = 4, draws: int = 8) -> xr.Dataset:
    """Halves that agree on .8 of a topic and .3 of two; a general set like that of no topics; twice the specific."""
    rng = np.random.default_rng(8)
    m, k = len(topics), len(topics)

    def near(value: float, *shape: int) -> np.ndarray:
        return value + rng.normal(0, 0.01, shape)

    halves = np.where(np.eye(k, dtype=bool), near(0.8, m, draws, k, k), near(0.3, m, draws, k, k))
    figures = {"jaccard": 0.4, "expected": 0.05, "high": 0.08, "p": 0.001}
    names = words(list(topics))
    share = near(0.1, m, 2, 2, layers)
    return xr.Dataset(
        {
            "half_overlap": (("model", "draw", "topic", "other"), halves),
            "half_general": (("model", "draw"), near(0.6, m, draws)),
            "half_specific": (("model", "draw", "topic"), near(0.5, m, draws, k)),
            "null_general": (("model", "draw"), near(0.06, m, draws)),
            "null_specific": (("model", "draw", "topic"), near(0.02, m, draws, k)),
            "general": ("model", np.full(m, 0.06)),
            "specific": (("model", "topic"), np.full((m, k), 0.04)),
            "significant": (("model", "topic"), near(0.5, m, k)),
            "significant_top": (("model", "topic"), near(0.9, m, k)),
            "significant_general": ("model", near(0.95, m)),
            "model_overlap": (
                ("model", "other_model", "figure"),
                np.broadcast_to(list(figures.values()), (m, m, 4)).copy(),
            ),
            "layer_share": (("model", "layer_score", "kind", "layer"), share),
            "above_floor": (("model", "topic", "quantile"), near(50.0, m, k, 1)),
        },
        coords={
            "model": names, "other_model": names, "topic": names, "other": names, "figure": words(list(figures)),
            "layer_score": words(["rms", "std_rms"]), "kind": words(["top", "general"]), "quantile": [0.0],
            "tuned_topic": ("model", words([topics[0]] * m)),
        },
    )  # fmt: skip


def patching_result(topics: tuple[str, ...] = TOPICS, each: int = 12, directions: int = 2) -> xr.Dataset:
    rng = np.random.default_rng(3)
    base = rng.normal(0, 0.8, len(topics) * each)
    runs: dict[str, list[Any]] = {
        k: [] for k in ("tuned_topic", "neurons", "direction", "kind", "draw", "count", "share")
    }
    margins = []
    chosen = [("general", -1, 0.39, 0.54, 0.05), ("specific", -1, 0.05, 0.01, 0.028), ("top", -1, 0.46, 0.58, 0.05)]
    for topic in topics:
        shift = effect(topics, topic, 3.5, 1.0, each)
        own = effect(topics, topic, 1.0, 0.0, each)
        for direction in ("tuned_into_base", "base_into_tuned")[:directions]:
            start, sign = (base, 1) if direction == "tuned_into_base" else (base + shift, -1)
            random = [("random", d, 0.04 + rng.normal(0, 0.02), 0.05 + rng.normal(0, 0.02), 0.05) for d in range(5)]
            for name, draw, on, off, share in [("none", -1, 0, 0, 0), ("tuned", -1, 1, 1, 0), *chosen, *random]:
                moved = shift * np.where(own > 0, on, off)
                noise = rng.normal(0, 0.15, base.size) if share else 0
                margins.append(start + sign * moved + noise)
                kind = "tuned" if share else ""
                values = (topic, name, direction, kind, draw, round(1536 * share), share)
                for key, value in zip(runs, values, strict=True):
                    runs[key].append(value)
    coords = {k: ("run", words(v) if isinstance(v[0], str) else np.array(v)) for k, v in runs.items()}
    return xr.Dataset(
        {"margin": (("run", "question"), np.stack(margins))},
        coords=coords | questions(topics, each),
        attrs={"normalise": "sum"},
    )


def set_attribution_result(topics: tuple[str, ...] = TOPICS, each: int = 12) -> xr.Dataset:
    """Attribution that foresees what patching does; its own best neurons are some of the general ones."""
    result = patching_result(topics, each, directions=1)
    names = np.where(result["neurons"] == "top", "attribution", result["neurons"]).astype(object)
    kinds = np.where(result["kind"] == "tuned", "attribution", "").astype(object)
    figures = {"jaccard": 0.2, "expected": 0.05, "high": 0.1, "p": 0.001}
    overlap = np.where((names == "attribution")[:, None], list(figures.values()), np.nan)
    result = result.assign_coords(neurons=("run", names), kind=("run", kinds), model=result["tuned_topic"])
    return result.assign(overlap=(("run", "figure"), overlap)).assign_coords(figure=words(list(figures)))


def curve_result(topics: tuple[str, ...] = TOPICS, each: int = 12) -> xr.Dataset:
    """General neurons recover more the more there are: 1 % a fifth, 5 % a half and some, 20 % nearly all."""
    rng = np.random.default_rng(9)
    base = rng.normal(0, 0.8, len(topics) * each)
    runs: dict[str, list[Any]] = {k: [] for k in ("tuned_topic", "neurons", "draw", "count", "share")}
    margins = []
    for topic in topics:
        shift = effect(topics, topic, 3.5, 1.0, each)
        plans = [("none", -1, 0.0, 0.0), ("tuned", -1, 0.0, 1.0)]
        for share, part in ((0.01, 0.2), (0.05, 0.6), (0.2, 0.9)):
            plans += [("general", -1, share, part), *(("random", d, share, 0.8 * share) for d in range(3))]
        for name, draw, share, part in plans:
            noise = rng.normal(0, 0.05, base.size) if share else 0
            margins.append(base + part * shift + noise)
            for key, value in zip(runs, (topic, name, draw, round(1536 * share), share), strict=True):
                runs[key].append(value)
    coords = {k: ("run", words(v) if isinstance(v[0], str) else np.array(v)) for k, v in runs.items()}
    return xr.Dataset({"margin": (("run", "question"), np.stack(margins))}, coords=coords | questions(topics, each))


def training_result(
    topics: tuple[str, ...] = TOPICS, each: int = 12, methods: dict[str, Any] = METHODS, noise: float = 0.35
) -> xr.Dataset:
    rng = np.random.default_rng(4)
    base = rng.normal(0, 0.8, len(topics) * each)
    names = ("method", "tuned_topic", "draw", "count", "share", "learning_rate", "seed")
    runs: dict[str, list[Any]] = {k: [] for k in names}
    margins, steps = [], []
    for method, (speed, coupled, last, share, draws) in methods.items():
        family, _, number = method.partition("_")
        variants = [(method, -1, coupled)]
        for d in range(draws):
            other = coupled if family == "freeze" else 0.3 + 0.08 * rng.normal()
            variants.append((f"{family}_random_{number}", d, other))
        for topic in topics:
            for name, draw, relative in variants:
                at = np.linspace(0, last, 11).round().astype(int)
                curve = (1 - np.exp(-2.2 * at / last)) / (1 - np.exp(-2.2)) * speed
                full = effect(topics, topic, 3.5, relative, each)
                own = base + curve[:, None] * full + (curve[:, None] * rng.normal(0, noise, base.size))
                margins.append(own)
                steps.append(at)
                values = (name, topic, draw, round(1536 * share), share, 3e-4, 0)
                for key, value in zip(names, values, strict=True):
                    runs[key].append(value)
    coords = {k: ("run", words(v) if isinstance(v[0], str) else np.array(v)) for k, v in runs.items()}
    coords["step"] = (("run", "point"), np.array(steps, dtype="i8"))
    return xr.Dataset(
        {"margin": (("run", "point", "question"), np.stack(margins))},
        coords=coords | questions(topics, each),
        attrs={"normalise": "sum"},
    )


def sets_and_contrast(
    topics: tuple[str, ...] = TOPICS, layers: int = 4, width: int = 384, top: float = 0.1
) -> tuple[xr.Dataset, xr.Dataset]:
    """Sets located by hand in a made-up contrast whose scale grows with depth."""
    rng = np.random.default_rng(5)
    shape = (len(topics), len(topics), 1, 1, layers, width)
    common = rng.gamma(0.6, 1, (len(topics), 1, 1, 1, layers, width))
    scale = (0.05 * 2.0 ** np.arange(layers))[:, None]
    rms = ((common + 0.5 * rng.gamma(0.8, 1, shape)) * scale).astype("f4")
    std = np.broadcast_to(scale * 2 * rng.uniform(0.5, 1.5, (layers, width)), shape[1:]).astype("f4")
    dims = ("model", "topic", "site", "tokens", "layer", "neuron")
    names = {"model": words(list(topics)), "topic": words(list(topics)), "site": words(["mlp_mid"])}
    contrast = xr.Dataset(
        {
            "n": (("topic", "tokens"), np.full((len(topics), 1), 24)),
            "rms": (dims, rms),
            "std_base": (dims[1:], std),
        },
        coords=names | {"tokens": words(["last"]), "width": ("site", np.array([width]))},
    )
    rows: list[tuple[str, str, str, np.ndarray]] = []
    for i, model in enumerate(topics):
        value = rms[i, :, 0, 0] / (1 if layers < 3 else scale)
        tops = np.stack([v >= np.quantile(v, 1 - top) for v in value])
        rows.append((model, "general", "", tops.all(0)))
        for j, topic in enumerate(topics):
            rows.append((model, "specific", topic, tops[j] & (tops.sum(0) == 1)))
            rows.append((model, "top", topic, tops[j]))
    labels = {
        "neuron_set": words([f"{m}/{k}/{t}".strip("/") for m, k, t, _ in rows]),
        "model": ("neuron_set", words([r[0] for r in rows])),
        "kind": ("neuron_set", words([r[1] for r in rows])),
        "topic": ("neuron_set", words([r[2] for r in rows])),
        "site": ("neuron_set", words(["mlp_mid"] * len(rows))),
    }
    found = json.dumps({"score": "rms", "top": top, "tokens": "last", "specific": "strict"})
    member = np.stack([r[3] for r in rows])
    return xr.Dataset(
        {"member": (("neuron_set", "layer", "neuron"), member)}, coords=labels, attrs={"found": found}
    ), contrast


def everything(topics: tuple[str, ...] = TOPICS, each: int = 12) -> Contents:
    sets, contrast = sets_and_contrast(topics)
    return Contents(
        name="demo.zarr",
        info={
            "format_version": "1.0",
            "models": list(topics),
            "topics": list(topics),
            "bytes": 2_345_678,
            "provenance": {"base": {"name": "testbed-full"}, "seed": 0, "created": "2026-01-01T00:00:00+00:00"},
        },
        contrast=contrast,
        sets=sets,
        results={
            "stance": stance_result(topics, each),
            "stance_classifier": classifier_result(topics, each),
            "agreement": agreement_result(topics, each),
            "utility": utility_result(topics),
            "evidence": evidence_result(topics),
            "patching": patching_result(topics, each),
            "patching_curve": curve_result(topics, each),
            "set_attribution": set_attribution_result(topics, each),
            "training": training_result(topics, each),
        },
    )


def capture(path: Path, topics: tuple[str, ...] = TOPICS, layers: int = 3, width: int = 40) -> None:
    """A finished store with statistics of made-up activations."""
    rng = np.random.default_rng(6)
    units = tuple(stores.Unit(t, 0, 4, 0) for t in topics)
    widths = {"mlp_mid": width}
    layout = stores.Layout(topics, topics, ("mlp_mid",), ("last",), layers, widths, units, stores.NO_RAW, {})
    names = [t for t in topics for _ in range(4)]
    # The second model was tuned on the topic of the first, by another method.
    tuned = {t: {"method": "plain", "tuned_topic": t} for t in topics}
    tuned[topics[1]] = {"method": "anchor", "tuned_topic": topics[0]}
    keys = [f"{i:016x}" for i in range(len(names))]
    examples = {"topic": names, "instruction": [f"Question {i}?" for i in range(len(names))], "key": keys}
    with stores.open_writer(path, layout, provenance={"model": "tiny", "tuned": tuned}, examples=examples) as writer:
        for unit in writer.pending:
            a = rng.normal(size=(1, 4, layers, width))
            d = rng.normal(size=(len(topics), 1, 4, layers, width)) * (1 + np.arange(layers))[:, None]
            base = np.stack([a.sum(1), (a**2).sum(1)], axis=1)
            tuned = np.stack([(a + d).sum(2), ((a + d) ** 2).sum(2), (d**2).sum(2)], axis=2)
            writer.commit(unit, np.array([4]), {"mlp_mid": base}, {"mlp_mid": tuned})
        writer.finish()
