"""The self-check holds on models that are as expected, and finds what is wrong with others."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from architectures import INTERFACELESS, LAYERS, decoder, opened, silu
from torch import Tensor

from pnlac_fast.checkup import certify, self_check
from pnlac_fast.errors import UserError
from pnlac_fast.loading import from_hf


@pytest.mark.parametrize("kind", ["llama", "phi3", "opt", "mixtral", "falcon"])
def test_the_self_check_holds(kind: str) -> None:
    report = self_check(opened(kind))
    assert all(check["holds"] and check["error"] < 1e-6 for check in report["checks"].values())
    halves = {"halves"} if kind == "phi3" else set()
    assert set(report["checks"]) == {"batch", "padding", "reading", "writing", "projection"} | halves
    assert report["widths"]["mlp_mid"] == opened(kind).width("mlp_mid")
    assert ("pack" in report["left_out"]) == (kind in INTERFACELESS)


def test_the_self_check_finds_a_model_that_mixes_texts() -> None:
    hf = copy.deepcopy(decoder("llama"))
    hf.model.layers[0].register_forward_hook(lambda _, __, stream: stream + stream.mean((0, 1)))
    report = self_check(from_hf(hf, None, name="mixer"))
    assert {name for name, check in report["checks"].items() if not check["holds"]} == {"batch", "padding"}
    assert "more than rounding" in report["left_out"]["pack"]
    with pytest.raises(UserError, match=r"'mixer' does not pass its self-check \(batch, padding\)"):
        certify(report, "mixer")


def test_the_self_check_finds_a_last_projection_that_is_not_used() -> None:
    hf = copy.deepcopy(decoder("llama"))
    down = hf.model.layers[LAYERS - 1].mlp.down_proj
    down.register_forward_hook(lambda _, __, out: torch.ones_like(out))
    checks = self_check(from_hf(hf, None))["checks"]
    assert not checks["writing"]["holds"]
    assert not checks["projection"]["holds"]


def test_the_self_check_finds_gates_and_ups_that_alternate() -> None:
    hf = copy.deepcopy(decoder("phi3"))

    def forward(mlp: Any, x: Tensor) -> Tensor:
        both = mlp.gate_up_proj(x)
        return mlp.down_proj(silu(both[..., ::2]) * both[..., 1::2])

    for layer in hf.model.layers:
        layer.mlp.forward = partial(forward, layer.mlp)
    checks = self_check(from_hf(hf, None))["checks"]
    assert [name for name, check in checks.items() if not check["holds"]] == ["halves"]


@pytest.mark.parametrize("way", ["whole", "in place", "a block"])
def test_a_compiled_model_is_refused(way: str) -> None:
    hf = copy.deepcopy(decoder("llama"))
    if way == "whole":
        hf = torch.compile(hf, backend="eager")
    else:
        (hf if way == "in place" else hf.model.layers[1]).compile(backend="eager")
    with pytest.raises(UserError, match="as it was before"):
        from_hf(hf, None)
