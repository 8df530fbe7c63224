"""A section for the model card of each tuned model: what it was tuned on, and what else that moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import pnlac_fast
from pnlac_fast.reporting import style, tables, wording
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.protocol import base_name, recipe
from pnlac_fast.reporting.rows import Estimate
from pnlac_fast.reporting.sections import unit_of
from pnlac_fast.reporting.utility import utility_rows
from pnlac_fast.summary import summary

FIGURES = {
    "coupling": "Coupling: root mean square shift of the other topics",
    "coupling_ratio": "Mean shift of the other topics over that of the tuned one",
    "reduction": "Less coupling than plain tuning, as trained",
    "retention": "On-topic shift, of plain tuning\u2019s",
}


def model_card(contents: Contents, boots: int, seed: int) -> str:
    """Markdown, a section for each tuned model whose stance was scored; empty where none was, or several bases were."""
    stance = contents.results.get("stance")
    if stance is None or stance.sizes["run"] < 2 or tables.texts(stance, "model").count("base") > 1:
        return ""
    records = summary(stance.assign_attrs(scorer="logprob"), boots=boots, seed=seed)
    base = next(r for r in records if r["model"] == "base")
    cost = {}
    if "utility" in contents.results:
        cost = {row.model: row for row in utility_rows(contents.results["utility"], boots, seed)}
    environment = Environment(
        loader=PackageLoader("pnlac_fast.reporting", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is Markdown; see _plain
    )
    environment.filters["plain"] = _plain
    made: Mapping[str, Any] = contents.info.get("provenance", {}).get("tuned", {})
    models = [_model(r, base, made.get(r["model"], {}), cost.get(r["model"])) for r in records if r is not base]
    methods = dict(zip(tables.texts(stance, "model"), tables.texts(stance, "method"), strict=True))
    for model in models:
        model["method"] = style.method_label(methods[model["name"]] or "plain")
    return environment.get_template("model_card.md.j2").render(
        models=models,
        base=base_name(contents) or "the base model",
        unit=unit_of(stance),
        questions=stance.sizes["question"],
        boots=boots,
        version=pnlac_fast.__version__,
    )


def _model(record: Mapping[str, Any], base: Mapping[str, Any], made: Mapping[str, Any], cost: Any) -> dict[str, Any]:
    """What the template shows of one model."""
    tuned = record["tuned_topic"]
    off = {t: Estimate(*v) for t, v in record["shift"].items() if t != tuned}
    moved = [t for t, e in off.items() if e.sign != 0]
    figures = []
    for name, what in FIGURES.items():
        if name in record:
            value = Estimate(*record[name])
            figures.append(
                (what, wording.estimate(value) if name.startswith("coupling") else wording.percentage(value))
            )
    if cost is not None:
        figures.append(("Perplexity on neutral text, over base\u2019s", wording.estimate(cost.over_base)))
        figures.append(("Answers that refuse", wording.percentage(cost.refusals)))
    return {
        "name": record["model"],
        "tuned": tuned,
        "side": str(made.get("side", "")),
        "recipe": recipe(made),
        "sha256": str(made.get("sha256") or ""),
        "rows": [
            (
                style.pretty(topic) + (" (tuned on)" if topic == tuned else ""),
                wording.number(base["stance"][topic][0], signed=True),
                wording.number(record["stance"][topic][0], signed=True),
                wording.estimate(Estimate(*record["shift"][topic]), signed=True),
            )
            for topic in record["stance"]
        ],
        "moved": [style.pretty(t) for t in moved],
        "others": len(off),
        "figures": [(what, value) for what, value in figures if value != "–"],
    }


def _plain(text: str) -> str:
    """A name that cannot become markup or break a row of a table."""
    kept = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return kept.replace("`", "'").replace("[", "\\[").replace("]", "\\]") if "](" in kept or "`" in kept else kept
