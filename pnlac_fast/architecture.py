"""Where the parts of a decoder are. Only this file knows architectures."""

from __future__ import annotations

from typing import Any

from torch import nn

from pnlac_fast.errors import UserError

SITES = ("mlp_mid", "mlp_out", "resid")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}


def blocks_of(hf: Any) -> nn.ModuleList:
    """The list of transformer blocks whose MLP is gated; any other architecture is refused."""
    layers = getattr(hf.get_decoder(), "layers", None)
    if isinstance(layers, nn.ModuleList) and all(
        all(isinstance(getattr(getattr(b, "mlp", None), p, None), nn.Module) for p in MLP_PROJECTIONS) for b in layers
    ):
        return layers
    raise UserError(
        f"Model type '{hf.config.model_type}' has no gated MLP with {', '.join(MLP_PROJECTIONS)} in every block: "
        f"give a model built like Llama, Mistral, Qwen2, Qwen3 or Gemma."
    )
