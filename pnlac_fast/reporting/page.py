"""The report itself: tables, figures and one page that needs nothing but itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import pnlac_fast
from pnlac_fast.reporting import intervention, observation, style, wording
from pnlac_fast.reporting.attributed import attribution
from pnlac_fast.reporting.contents import Contents, read_contents
from pnlac_fast.reporting.costs import costs
from pnlac_fast.reporting.drift import drift
from pnlac_fast.reporting.judges import scorers
from pnlac_fast.reporting.model_card import model_card
from pnlac_fast.reporting.protocol import protocol
from pnlac_fast.reporting.rows import to_csv
from pnlac_fast.reporting.runs import per_run
from pnlac_fast.reporting.sections import Section
from pnlac_fast.reporting.seeds import seeds
from pnlac_fast.reporting.stability import stability
from pnlac_fast.reporting.utility import utility
from pnlac_fast.store import write_result

PAPERS = (
    ("Understanding and Mitigating Political Stance Cross-topic Generalization in Large Language Models", "2508.02360"),
    ("How Susceptible are Large Language Models to Ideological Manipulation?", "2402.11725"),
)

# Sections with sentences at the head of the page, and how many: a sweep has one for every method.
FINDINGS = {"shift": 6, "layers": 6, "patching": 6, "attribution": 1, "methods": 6, "scorers": 1, "utility": 6}
ARROW = " \u203a "


def report(
    store: str | Path,
    out: str | Path,
    *,
    title: str | None = None,
    runs: Sequence[str | Path] = (),
    boots: int = 2000,
    seed: int = 0,
) -> Path:
    """Write what a store holds as tables (CSV), figures (PNG) and one self-contained HTML page.

    Parameters
    ----------
    store
        A store with any of ``/contrast``, ``/neuron_sets`` and ``/results``; parts that are missing are left out, and
        named at the end of the page with the command that adds them.
    out
        Folder for ``index.html``, ``tables/``, ``figures/`` (and ``figures/narrow/``, for telephones) and, where models
        were scored, ``model_card.md``, a section for the card of each; made where needed. Files of an earlier report
        with the same names are replaced.
    title
        Heading of the page.
    runs
        Directories of fine-tunes to compare at equal steps and at equal on-topic shift, made with ``--probe``. They are
        written into the store first, as ``/results/training``.
    boots, seed
        Number of bootstrap resamples over questions for the 95 % intervals, and their seed. The same store and seed
        give the same files.

    Returns
    -------
    pathlib.Path
        The page.

    Raises
    ------
    UserError
        There is nothing to report, or a result cannot be read as what its name says.
    """
    if runs:
        from pnlac_fast.comparison import collect

        write_result(store, "training", collect(runs))
    return write_report(read_contents(store), out, title=title, boots=boots, seed=seed)


def write_report(
    contents: Contents, out: str | Path, *, title: str | None = None, boots: int = 2000, seed: int = 0
) -> Path:
    """As :func:`report`, from contents already opened."""
    folder = Path(out)
    for name in ("tables", "figures/narrow"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    sections = build(contents, boots, seed)
    shown = [section for section in sections if section.shown]
    pictures = {}
    with style.drawing_style():
        for figure in (figure for section in shown for figure in section.figures):
            picture = style.Picture(*(style.png(figure.draw(width)) for width in (style.WIDE, style.NARROW)))
            (folder / "figures" / f"{figure.name}.png").write_bytes(picture.wide)
            (folder / "figures" / "narrow" / f"{figure.name}.png").write_bytes(picture.narrow)
            pictures[figure.name] = picture
    for table in (t for section in sections for t in section.tables):
        (folder / "tables" / f"{table.name}.csv").write_text(to_csv(table.rows))
    card = model_card(contents, boots, seed)
    if card:
        (folder / "model_card.md").write_text(card, encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("pnlac_fast.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        title=title or f"Cross-topic stance report: {contents.name}",
        name=contents.name,
        summary=summary(shown),
        sections=[numbered(section, i) for i, section in enumerate(shown, 1)],
        by_seed=study_seeds(contents),
        lacking=[row for section in sections for row in section.lacking],
        images={name: (inline(p.wide), inline(p.narrow), *size(p.wide)) for name, p in pictures.items()},
        origin=origin_rows(contents),
        synthetic=is_synthetic(contents),
        card=card,
        protocol=protocol(contents),
        papers=PAPERS,
        boots=boots,
        seed=seed,
        seeds=most_seeds(contents),
        version=pnlac_fast.__version__,
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def build(contents: Contents, boots: int, seed: int) -> list[Section]:
    """All sections in their order, computed but not yet drawn."""
    return [
        observation.shift(contents, boots, seed),
        observation.layers(contents),
        observation.overlap(contents),
        stability(contents, boots, seed),
        intervention.patching(contents, boots, seed),
        attribution(contents, boots, seed),
        intervention.methods(contents, boots, seed),
        seeds(contents),
        drift(contents),
        utility(contents, boots, seed),
        scorers(contents, boots, seed),
        costs(contents),
    ]


def summary(sections: Sequence[Section]) -> list[str]:
    """The plain-words findings, one list for the head of the page: of each section the first ones."""
    told = {section.key: section.sentences for section in sections}
    return [sentence for key, most in FINDINGS.items() for sentence in told.get(key, [])[:most]]


def numbered(section: Section, number: int) -> Section:
    """The section with its number in front of the title."""
    return replace(section, title=f"{number}. {section.title}")


def inline(png: bytes) -> str:
    """PNG bytes as a data address, so that the page carries its figures."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header of a PNG."""
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def most_seeds(contents: Contents) -> int:
    """The most seeds that one result has."""
    return max((len(set(per_run(r, "seed", 0))) for r in contents.results.values() if "run" in r.sizes), default=1)


def study_seeds(contents: Contents) -> list[int]:
    """The seeds of a study over whose stores this one is; none for any other store."""
    joined = contents.results.get("seed_overlap")
    return [] if joined is None else [int(s) for s in joined["base_seed"].values]


def is_synthetic(contents: Contents) -> bool:
    """Whether any part of the store says that it comes from the synthetic testbed."""
    said = [contents.info.get("provenance", {}), *(result.attrs for result in contents.results.values())]
    return "testbed" in json.dumps(said, default=str).lower()


def origin_rows(contents: Contents) -> list[tuple[str, str]]:
    """Where the numbers come from, flattened to (what, value) in the order of the store."""
    rows = [("store", contents.name)]
    for key, value in contents.info.items():
        if key in ("neuron_sets", "path"):  # hundreds of names; and the path is known to whoever made the page
            continue
        rows += _flat(key.replace("_", " "), value)
    said = {(what.split(ARROW)[-1], value) for what, value in rows}
    for name, result in contents.results.items():  # the same versions again would only hide what differs
        for what, value in _flat(f"result {name}", dict(result.attrs)):
            leaf = (what.split(ARROW)[-1], value)
            if leaf not in said:
                said.add(leaf)
                rows.append((what, value))
    return rows


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, str) and value[:1] in "{[":
        try:
            value = json.loads(value)
        except ValueError:
            return [(name, value)]
    if isinstance(value, Mapping):
        return [row for key, inner in value.items() for row in _flat(f"{name}{ARROW}{key}", inner)]
    if isinstance(value, list | tuple):
        return [(name, " ".join(map(str, value)) if "command" in name else ", ".join(map(str, value)))] if value else []
    if name.startswith("bytes") and isinstance(value, int):
        return [(name, f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB")]
    if isinstance(value, float):
        value = wording.number(value, 4)
    return [(name, str(value))] if value not in ("", None) else []
