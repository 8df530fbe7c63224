"""How the study was done, in sentences for the methods section of a paper; only what the store says of itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pnlac_fast.reporting import neurons, style, wording
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.runs import EQUAL_SHIFT

SITES = {
    "mlp_mid": "the input of the MLP\u2019s down projection",
    "mlp_out": "the output of the MLP\u2019s down projection",
    "resid": "the residual stream",
}
POSITIONS = {
    "last": "the last prompt position",
    "prompt": "all prompt positions",
    "completion": "all completion positions",
    "all": "all positions",
}


def protocol(contents: Contents) -> list[str]:
    """One sentence or two on each part: tuning, localization, patching, scoring, comparison."""
    origin: Mapping[str, Any] = contents.info.get("provenance", {})
    found = [
        _tuning(origin.get("tuned", {}), base_name(contents)),
        _located(contents),
        _patched(contents),
        _scored(contents),
        _compared(contents),
        _stored(contents),
    ]
    return [sentence for sentence in found if sentence]


def base_name(contents: Contents) -> str:
    """The base model as a reader knows it: its hub id, or the last part of a path."""
    source = str(contents.info.get("provenance", {}).get("base", {}).get("source") or "")
    return source if source.count("/") == 1 and not source.startswith((".", "/")) else source.rpartition("/")[2]


def recipe(record: Mapping[str, Any]) -> str:
    """The settings of a fine-tune in a few words; empty where it was not made by pnlac-fast."""
    if "steps" not in record:
        return ""
    kind = "all weights" if record.get("parameters") == "full" else "LoRA"
    return (
        f"{kind}, {record['steps']} steps of {record['batch_size']} completions, AdamW, learning rate "
        f"{record['learning_rate']:g}"
    )


def _tuning(tuned: Mapping[str, Mapping[str, Any]], base: str) -> str:
    made = [m for m in tuned.values() if recipe(m)]
    if not made:
        return ""
    topics, sides, seeds = (_all(m[name] for m in made) for name in ("tuned_topic", "side", "seed"))
    ways = list(dict.fromkeys(map(recipe, made)))
    how = ways[0] if len(ways) == 1 else f"{len(ways)} recipes, in the provenance below"
    return (
        f"{base if '/' in base else f'The base model {base}'.rstrip()} was tuned {wording.count(len(made))} times, on "
        f"{wording.listed(map(style.pretty, topics))}, with the {wording.listed(sides)} completions ({how}; "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {wording.listed(seeds)})."
    )


def _located(contents: Contents) -> str:
    if contents.contrast is None or contents.sets is None:
        return ""
    how, info = neurons.how_found(contents.sets), contents.info
    site = str(contents.sets["site"].values[0])
    kept = "and in no other\u2019s" if how.get("specific", "strict") == "strict" else "and not general"
    return (
        f"Neurons were located at {SITES.get(site, site)}, {POSITIONS.get(str(how.get('tokens')), 'all tokens')}, on "
        f"{info.get('questions')} questions of {len(info.get('topics', ()))} topics, by the contrast of base and tuned "
        f"on the same tokens, ranked by {how.get('score', 'rms')}. The top {style.percent(float(how.get('top', 0)))} "
        f"of all neurons are a topic\u2019s top set; general neurons are in all top sets, specific ones in their own "
        f"topic\u2019s {kept}."
    )


def _patched(contents: Contents) -> str:
    result = contents.results.get("patching")
    if result is None:
        return ""
    draws = len({int(d) for d in result["draw"].values if d >= 0})
    random = f", beside {wording.count(draws)} random sets with the same count in every layer" if draws else ""
    return (
        "Patching writes one model\u2019s activations at these neurons into the other on the same tokens"
        f"{random}; the recovered fraction is the share of the fine-tuning shift that this brings, on "
        f"{result.sizes['question']} questions."
    )


def _scored(contents: Contents) -> str:
    names = [n for n in contents.results if n == "stance" or n.startswith("stance_")]
    if not names:
        return ""
    first = contents.results[names[0]]
    scorers = [str(contents.results[n].attrs.get("scorer", n)) for n in names]
    asked = {str(k) for k in first["key"].values}
    shared = len(asked & contents.keys)
    apart = f"{shared} of them also located on" if shared else "none of them located on"
    known = f", {apart}" if contents.keys else ""
    words = ["paired log-probability of the completions" if s == "logprob" else f"the judge {s}" for s in scorers]
    return f"Stance was scored on {len(asked)} questions{known}, by {wording.listed(words)}."


def _compared(contents: Contents) -> str:
    result = contents.results.get("training")
    if result is None:
        return ""
    methods = {str(m) for m in result["method"].values}
    controls = sum(style.is_control(m) for m in methods)
    seeds = len({int(s) for s in result["seed"].values}) if "seed" in result.coords else 1
    topics = len({str(t) for t in result["tuned_topic"].values})
    shares = [style.percent(share) for share in sorted(EQUAL_SHIFT.values())]
    named = wording.count(len(methods) - controls).capitalize()
    random = f", {wording.count(controls)} of them with random neurons too," if controls else ""
    return (
        f"{named} {'way' if len(methods) - controls == 1 else 'ways'} of tuning{random} "
        f"{'was' if len(methods) == 1 else 'were'} compared over {wording.count(topics)} tuned "
        f"{'topic' if topics == 1 else 'topics'} and "
        f"{wording.count(seeds)} {'seed' if seeds == 1 else 'seeds'}, on {result.sizes['question']} probe questions "
        f"that were not tuned on, at equal steps and where each first reached {wording.listed(shares)} of "
        "plain\u2019s on-topic shift."
    )


def _stored(contents: Contents) -> str:
    """What the store takes, beside the activations that its statistics are of."""
    if contents.contrast is None or "bytes" not in contents.info:
        return ""
    n = contents.contrast["n"]
    tokens = int(n.sum("topic").max())
    sizes = contents.contrast.sizes
    raw = 2 * tokens * sizes["layer"] * sizes["neuron"] * sizes["site"] * (sizes["model"] + 1)
    return (
        f"The store takes {wording.size(contents.info['bytes'])}; the activations of base and {sizes['model']} tuned "
        f"models at the {tokens} positions that its statistics sum up would take {wording.size(raw)} in 16 bits."
    )


def _all(values: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(str(v) for v in values))
