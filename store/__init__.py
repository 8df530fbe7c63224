"""Stores: statistics, raw activations, neuron sets and results in one Zarr directory that any Zarr reader opens.

Needs numpy, zarr and xarray only, so that results open where torch is not installed. README.md here is the format.
"""

from __future__ import annotations

from pnlac_fast.store.activations import open_activations
from pnlac_fast.store.creation import create_results, describe_selected, open_writer
from pnlac_fast.store.errors import StoreError
from pnlac_fast.store.findings import Finding
from pnlac_fast.store.headers import settings_of
from pnlac_fast.store.layout import NO_RAW, Layout, Raw, Unit
from pnlac_fast.store.merging import merge
from pnlac_fast.store.queries import neuron, prompt, top_neurons, topic_means, with_result, with_text
from pnlac_fast.store.reader import info, open_contrast, open_examples, open_partials
from pnlac_fast.store.results import list_results, open_result, open_sets, write_result, write_sets
from pnlac_fast.store.verification import certify, verify
from pnlac_fast.store.writer import Writer

__all__ = [
    "NO_RAW",
    "Finding",
    "Layout",
    "Raw",
    "StoreError",
    "Unit",
    "Writer",
    "certify",
    "create_results",
    "describe_selected",
    "info",
    "list_results",
    "merge",
    "neuron",
    "open_activations",
    "open_contrast",
    "open_examples",
    "open_partials",
    "open_result",
    "open_sets",
    "open_writer",
    "prompt",
    "settings_of",
    "top_neurons",
    "topic_means",
    "verify",
    "with_result",
    "with_text",
    "write_result",
    "write_sets",
]
