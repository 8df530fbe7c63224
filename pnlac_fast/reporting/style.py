"""The look of the figures: one palette, one type size, one way to name things, and how a figure becomes a PNG."""

from __future__ import annotations

import io
import math
import textwrap
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

# Okabe-Ito hues (told apart by colour-blind readers), two of them darkened so that text in them is legible on white.
GENERAL = "#0072B2"
SPECIFIC = "#D98A00"
RANDOM = "#8C8C8C"
PLAIN = "#222222"
ON_TOPIC = "#00795C"
OFF_TOPIC = "#B4558C"
INK = "#222222"
FAINT = "#6B6B6B"
GRID = "#E3E1DC"

_FAMILIES = {
    "plain": PLAIN,
    "freeze": GENERAL,
    "general": GENERAL,
    "specific": SPECIFIC,
    "random": RANDOM,
    "none": PLAIN,
    "tuned": PLAIN,
    "top": "#5F7A1F",
    "anchor": "#7A5AA6",
    "kl": "#8C5A2B",
    "nullspace": "#5F7A1F",
    "mlp": "#59636E",
    "rate": "#A03B5A",
    "caft": "#C4512D",
    "steer": "#4C9FC9",
    "inoculate": "#2F8F8B",
}
_SETS = {
    "specific": "Specific to the tuned topic",
    "top": "Whole top set of the tuned topic",
    "mean": "Highest mean score, all topics",
    "off_minus_on": "Highest score off minus on topic",
    "on_minus_off": "Highest score on minus off topic",
    "attribution": "Highest attribution, off minus on topic",
    "random": "Random, as many in every layer",
    "random_top": "Random ones of the top sets",
}
_SPARE = ("#C4512D", "#5F7A1F", "#4C9FC9", "#A03B5A", "#59636E")

DIVERGING = LinearSegmentedColormap.from_list("shift", ["#1F4E79", "#8DB0CF", "#FAF9F6", "#DDA08F", "#96302B"])
SEQUENTIAL = LinearSegmentedColormap.from_list("share", ["#FAF9F6", "#9CC3DD", GENERAL, "#083B5C"])

WIDE, NARROW = 8.4, 4.1  # inches; a reader on a telephone gets the narrow drawing, not a shrunken wide one
DPI = 200

RC: dict[str, object] = {
    "figure.dpi": DPI,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,  # a topic may be called "$1": names are text, never formulas
    "text.color": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9A9A9A",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#9A9A9A",
    "ytick.color": "#9A9A9A",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "figure.facecolor": "white",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
}


@dataclass(frozen=True)
class Picture:
    """One figure, drawn twice: for a wide page and for a telephone."""

    wide: bytes
    narrow: bytes


def is_wide(width: float) -> bool:
    """Whether panels go side by side at this figure width in inches."""
    return width > 6


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, laid out so that nothing is cut off."""
    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes at 200 dots per inch, the same bytes for the same drawing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def drawing_style() -> AbstractContextManager[None]:
    """The context in which every figure is drawn; restores the caller's settings."""
    return matplotlib.rc_context(cast(Any, RC))


def pretty(name: str) -> str:
    """A topic or model name as a reader would write it: ``crime_and_gun`` becomes "Crime and gun"."""
    words = " ".join(name.replace("_", " ").replace("-", " ").split())
    return words[:1].upper() + words[1:]


def set_label(kind: str) -> str:
    """What a set of neurons that is patched or attributed to consists of."""
    return _SETS.get(kind, pretty(kind))


def wrapped(name: str, width: int = 13) -> str:
    """A pretty name broken over lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(pretty(name), width)) or name


def is_control(method: str) -> bool:
    """Whether a method is a random control of another ("freeze_random_5")."""
    return "random" in method.partition("@")[0].split("_") and method != "random"


def controlled(method: str) -> str:
    """The method that a control belongs to: ``freeze_random_5`` gives "freeze_5"; others give themselves."""
    name, at, settings = method.partition("@")
    kept = "_".join(part for part in name.split("_") if part != "random") if is_control(method) else name
    return f"{kept}{at}{settings}"


def family(method: str) -> str:
    """The first word of a method or set of neurons, which decides its colour."""
    return method.replace("+", "_").split("_")[0]


def colour(name: str) -> str:
    """The colour of a method or set of neurons, the same in every figure; controls are grey."""
    if is_control(name):
        return RANDOM
    known = _FAMILIES.get(family(name))
    return known or _SPARE[sum(map(ord, family(name))) % len(_SPARE)]


def percent(share: float) -> str:
    """A share as a percentage with no more digits than it needs."""
    value = 100 * share
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0\u00a0%"
    if abs(value) < 0.01:
        return (
            f"{float(f'{value:.0e}'):.10f}".rstrip("0") + "\u00a0%" if abs(value) >= 1e-8 else "under 0.00000001\u00a0%"
        )
    whole = abs(value) >= 9.95 or (abs(value) >= 0.95 and abs(value - round(value)) < 0.05)
    digits = 0 if whole else 1 if abs(value) >= 0.095 else 2
    return f"{value:.{digits}f}\u00a0%".replace("-", "\u2212")


def method_label(method: str, share: float | None = None) -> str:
    """What a method does, in a few words; `share` is the share of all neurons it touches."""
    method, _, settings = method.partition("@")
    if settings:
        return f"{method_label(method, share)} ({settings.replace(',', ', ')})"
    if "+" in method:
        return " and ".join(method_label(part) for part in method.split("+")).replace("and null space", "in null space")
    name, *rest = controlled(method).split("_")
    before, weight = (rest[: rest.index("by")], rest[rest.index("by") + 1]) if "by" in rest else (rest, "")
    number = next((word for word in before if word[0].isdigit()), "")
    words = {
        "plain": "plain tuning",
        "freeze": "freeze general",
        "specific": f"train only specific (top {number}\u00a0%)" if number else "train only specific",
        "anchor": "anchor general",
        "kl": "KL to base",
        "nullspace": "null space",
        "mlp": "train only MLPs",
        "rate": f"{number} of the learning rate" if number else "a lower learning rate",
        "caft": "ablate directions while training (CAFT)",
        "steer": "steer while training",
        "inoculate": "inoculation prompting",
    }
    label = words.get(name, pretty(controlled(method)))
    if name in ("freeze", "anchor") and number:
        label += f" {number}\u00a0%"
    elif name in ("kl", "steer", "nullspace") and number:
        label += f" ({number})"
    if weight and name in ("anchor", "kl"):
        label += f", weight {weight}"
    if rest[-1:] == ["seen"]:
        label += ", judged on topics seen"
    if "lowest" in rest:
        label = label.replace("general", "lowest-ranked").replace("specific", "lowest-ranked")
    if is_control(method):
        return f"random instead of {label}" if name not in words else f"{label}: random neurons"
    return label if share is None or name == "plain" else f"{label}, {percent(share)} of neurons"


def method_lines(method: str, width: int) -> str:
    """What a method does, broken over lines of at most `width` characters, a number with its sign of percent."""
    label = method_label(method).replace("top ", "top\u00a0")
    return "\n".join(textwrap.wrap(label[:1].upper() + label[1:], width))


def spread_labels(positions: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart to at least `gap`, keeping their order and staying within [low, high]."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    placed = [min(max(positions[i], low), high) for i in order]
    for _ in range(200):
        moved = False
        for i in range(1, len(placed)):
            short = gap - (placed[i] - placed[i - 1])
            if short > 1e-9:
                placed[i - 1] -= short / 2
                placed[i] += short / 2
                moved = True
        placed = [min(max(p, low), high) for p in placed] if len(placed) * gap <= high - low else placed
        if not moved:
            break
    result = [0.0] * len(positions)
    for rank, i in enumerate(order):
        result[i] = placed[rank]
    return result


def bare(axes: Axes) -> None:
    """Leave out the frame and the tick marks (heat maps)."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
