"""Where the neurons are: general and specific shares per layer, and the score per layer, raw and scale-normalised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pnlac_fast.reporting import style
from pnlac_fast.reporting.rows import GeneralRow, LayerRow


def draw_neurons(rows: Sequence[LayerRow], general: Sequence[GeneralRow], strict: bool, width: float) -> Figure:
    """Shares of each layer that are general and specific; whiskers span the tuned models, dashes are chance."""
    wide = style.is_wide(width)
    figure = style.new_figure(width, 3.0 if wide else 4.8)
    panels = figure.subplots(1, 2, sharey=False) if wide else figure.subplots(2, 1, sharex=True)
    layers = np.array([r.layer for r in rows])
    chance = np.mean([[g.chance_general, g.chance_specific] for g in general], axis=0) if general else [0, 0]
    alone = "Specific: in one topic's top set only" if strict else "Specific: in a top set, not general"
    kinds = (("general", "General: in every topic's top set"), ("specific", alone))
    for axes, (kind, title), expected in zip(panels, kinds, chance, strict=True):
        tint = style.colour(kind)
        value = np.array([getattr(r, kind) for r in rows])
        least = np.array([getattr(r, f"{kind}_least") for r in rows])
        most = np.array([getattr(r, f"{kind}_most") for r in rows])
        axes.bar(layers, value, width=0.72, color=tint)
        if len(general) > 1 and len(rows) <= 40:
            spread = np.stack([value - least, most - value]).clip(0)
            axes.errorbar(layers, value, spread, fmt="none", ecolor=style.INK, elinewidth=0.9, capsize=2.5)
        axes.axhline(expected, color=style.INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(
            0.99, 0.99, f"dashes: chance, {style.percent(float(expected))}", transform=axes.transAxes,
            ha="right", va="top", fontsize=8,
        )  # fmt: skip
        axes.set_title(title, color=tint)
        axes.yaxis.set_major_formatter(lambda share, _: style.percent(share))
        axes.set_ylim(0, max(float(most.max()), float(expected)) * 1.2 or 0.01)
        _layer_axis(axes, layers)
    for axes in panels if not wide else panels[:1]:
        axes.set_ylabel("share of the layer's neurons")
    if not wide:
        panels[0].set_xlabel("")
    return figure


def draw_scores(rows: Sequence[LayerRow], width: float) -> Figure:
    """Median and 95th percentile of the score in each layer: raw, then divided by the neuron's own spread."""
    wide = style.is_wide(width)
    figure = style.new_figure(width, 2.9 if wide else 4.8)
    panels = figure.subplots(1, 2) if wide else figure.subplots(2, 1, sharex=True)
    layers = np.array([r.layer for r in rows])
    for axes, name, title, unit in (
        (panels[0], "rms", "Raw change", "rms of tuned \u2212 base\n[activation]"),
        (panels[1], "std_rms", "Change relative to the neuron's spread", "rms of tuned \u2212 base\n[std of base]"),
    ):
        median = np.array([getattr(r, f"{name}_median") for r in rows])
        top = np.array([getattr(r, f"{name}_top") for r in rows])
        axes.fill_between(layers, median, top, color="#B9CEDD", alpha=0.55, linewidth=0)
        axes.plot(layers, top, color="#4A6E8A", linewidth=1.4, marker="o", markersize=3.5)
        axes.plot(layers, median, color=style.INK, linewidth=1.8, marker="o", markersize=3.5)
        for line, text, tint in ((top, "95th percentile", "#4A6E8A"), (median, "median", style.INK)):
            at = int(np.nanargmax(line))
            side = "left" if at == 0 else "right" if at == len(layers) - 1 else "center"
            axes.annotate(
                text, (layers[at], line[at]), (0, 7), textcoords="offset points", ha=side, color=tint, fontsize=8.5
            )
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.set_ylim(0, float(np.nanmax(top)) * 1.18 or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y")
        _layer_axis(axes, layers)
    if not wide:
        panels[0].set_xlabel("")
    return figure


def draw_rankings(share: xr.DataArray, width: float) -> Figure:
    """Share of each layer in top sets and in general ones, (layer_score, kind, layer), by two rankings."""
    wide = style.is_wide(width)
    figure = style.new_figure(width, 3.0 if wide else 4.9)
    panels = figure.subplots(1, 2) if wide else figure.subplots(2, 1, sharex=True)
    layers = np.asarray(share["layer"].values if "layer" in share.coords else range(share.sizes["layer"]))
    looks = (("rms", "by raw change", "#4A6E8A", -0.19), ("std_rms", "in units of the spread", "#C4512D", 0.19))
    for axes, (kind, title) in zip(panels, (("top", "In a top set"), ("general", "In all top sets")), strict=True):
        for score, label, tint, offset in looks:
            axes.bar(layers + offset, share.sel(kind=kind, layer_score=score).values, 0.36, color=tint, label=label)
        axes.axhline(float(share.sel(kind=kind).mean()), color=style.INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.yaxis.set_major_formatter(lambda value, _: style.percent(value))
        axes.set_title(title)
        _layer_axis(axes, layers)
    panels[0].set_ylabel("share of the layer\u2019s neurons")
    if not wide:
        panels[0].set_xlabel("")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if wide else 1, frameon=False, fontsize=8.5)
    return figure


def _layer_axis(axes: Axes, layers: np.ndarray) -> None:
    axes.set_xlabel("layer")
    if len(layers) <= 12:
        axes.set_xticks(layers)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlim(layers.min() - 0.6, layers.max() + 0.6)
