"""Where the parts of a decoder are: its blocks, and in each of them the MLP and the weights of its neurons.

A scan finds them by shape. What it cannot tell apart it refuses, and the user names the last projection. Only this file
knows architectures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from pnlac_fast.errors import UserError

SITES = ("mlp_mid", "mlp_out", "resid")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
# Names of last projections, for MLPs whose widths leave it open which one that is.
LAST = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "fc_out", "w2", "wo", "linear2", "ff_out", "down")


@dataclass(frozen=True)
class Projection:
    """One weight of the MLP of every block, and where its neurons stand in it.

    Attributes
    ----------
    name
        The last part of its path, such as "gate_proj", "c_fc" or, of experts, "gate_up_proj".
    path
        Path of its module in the block.
    inward
        Whether the neurons are what it gives (rows of a weight [out, in], and the bias), not what it takes.
    copies
        How often each neuron stands in it: twice where gate and up are one weight.
    interleaved
        Whether the copies of a neuron are neighbours; else all gates come before all ups.
    by_expert
        Whether its neurons are numbered over experts: neuron i of expert e is number e * width + i.
    """

    name: str
    path: str
    inward: bool
    copies: int = 1
    interleaved: bool = False
    by_expert: bool = False

    def place(self, neurons: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
        """Where neurons stand among the rows (or columns) of an MLP or expert ``width`` wide, and of which expert.

        Both int64 [chosen * copies], ascending where the neurons are; no experts where there is one MLP, or where the
        neurons are rows of all of them.
        """
        own = neurons % width if self.by_expert else neurons
        copy = torch.arange(self.copies, device=neurons.device)
        number = neurons // width
        if self.interleaved:
            index = own[:, None] * self.copies + copy
            expert = number[:, None].expand_as(index)
        else:
            index = own + width * copy[:, None]
            expert = number.expand_as(index)
        return index.flatten(), expert.flatten() if self.by_expert else None


@dataclass(frozen=True)
class Architecture:
    """Where the parts of a decoder are, the same in every block.

    Attributes
    ----------
    blocks
        Path of the list of blocks in the Hugging Face model.
    mlp
        Path, in a block, of the module whose input is the MLP's; of its first projection where the block itself holds
        these.
    projections
        The weights of the MLP, the last projection at the end.
    width
        Neurons of one MLP, or of one expert.
    hidden
        Width of the residual stream.
    experts
        How many there are in a block; 0 where every token takes the same MLP.
    """

    blocks: str
    mlp: str
    projections: tuple[Projection, ...]
    width: int
    hidden: int
    experts: int = 0

    @property
    def down(self) -> Projection:
        """The last projection."""
        return self.projections[-1]

    @property
    def neurons(self) -> int:
        """Neurons of a block. Neuron i of expert e is number e * width + i."""
        return self.width * max(1, self.experts)

    @property
    def gated(self) -> bool:
        """Whether the MLP has exactly the three projections of Llama's, under their names."""
        return not self.experts and tuple(p.name for p in self.projections) == MLP_PROJECTIONS

    def of(self, site: str) -> tuple[Projection, ...]:
        """The projections that hold weights of the neurons of a site; none for "resid"."""
        if site == "mlp_mid":
            return self.projections
        return (Projection(self.down.name, self.down.path, inward=True),) if site == "mlp_out" else ()


def architecture(hf: Any, last_projection: str | None = None) -> Architecture:
    """Find the parts of a Hugging Face decoder, with or without adapters on it.

    The blocks are the outermost list of as many modules as the configuration says. Outside of attention, the MLP of a
    block is the one module with a last projection to the residual width, and in front of it, from that width, either
    one projection (plain), two (gated) or one twice as wide (gate and up fused); or the experts of a mixture.

    Parameters
    ----------
    last_projection
        Path, in a block, of the last projection, or of the experts; for models where the scan finds several or none.

    Raises
    ------
    UserError
        The scan finds no MLP, several, or not the same in every block; it names the paths to choose from.
    """
    kind, config = hf.config.model_type, hf.config.get_text_config()
    decoder = hf.get_decoder()
    front = next(name for name, module in hf.named_modules() if module is decoder)
    count = getattr(config, "num_hidden_layers", None)
    lists = (n for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    if getattr(hf.config, "is_encoder_decoder", False) or (name := next(lists, None)) is None:
        raise UserError(
            f"Model type '{kind}' has no list of {count} blocks (num_hidden_layers): give a decoder-only causal model."
        )
    path = ".".join(part for part in (front, name) if part)
    found: dict[Architecture, list[int]] = {}
    for layer, block in enumerate(hf.get_submodule(path)):
        found.setdefault(_of_block(block, path, kind, last_projection), []).append(layer)
    if len(found) > 1:
        shapes = " and ".join(f"{a.down.path} with {a.neurons} neurons in {_layers(at)}" for a, at in found.items())
        raise UserError(
            f"The MLPs of model type '{kind}' differ: {shapes}. Every block must have the same: give a model without "
            f"mlp_only_layers, first_k_dense_replace and the like in its config."
        )
    return next(iter(found))


def plain(module: Any) -> Any:
    """A module without the adapter around it."""
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def _of_block(block: nn.Module, path: str, kind: str, last: str | None) -> Architecture:
    found: dict[str, Architecture] = {}
    unknown: list[str] = []
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    for name, module in _outside_attention(block):
        inner = plain(module)
        if (widths := _widths(inner)) is not None:
            groups.setdefault(name.rpartition(".")[0], {})[name] = widths
        elif not isinstance(inner, _ConvNd) and any(p.dim() == 3 for p in inner.parameters(recurse=False)):
            if (mixture := _experts(inner, path, name)) is not None:
                found[name] = mixture
            else:
                unknown.append(name)
    for group, linears in groups.items():
        if (mlp := _mlp(group, linears, path, last)) is not None:
            found[mlp.down.path] = mlp
    if last is not None and last in found:
        return found[last]
    if len(found) != 1 or unknown or last is not None:
        names = [*found, *unknown] or sorted({name for linears in groups.values() for name in linears})
        raise UserError(
            f"The MLP of model type '{kind}' is not found by its shape"
            + (f" at '{last}'" if last is not None else "")
            + f": name its last projection, a path in each block, with --last-projection. There are "
            f"{', '.join(names[:8]) or 'no linear layers'}."
        )
    return next(iter(found.values()))


def _outside_attention(block: nn.Module, front: str = "") -> Iterator[tuple[str, Any]]:
    """Modules of a block that are not part of attention, outermost first; not what is inside a projection."""
    for name, child in block.named_children():
        if "attn" in name.lower() or "attention" in name.lower():
            continue
        yield front + name, child
        if _widths(plain(child)) is None:
            yield from _outside_attention(plain(child), f"{front}{name}.")


def _widths(module: Any) -> tuple[int, int] | None:
    """Input and output width of a linear layer, whatever library made it; None for anything else."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    widths = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (widths[0], widths[1]) if isinstance(widths[0], int) and isinstance(widths[1], int) else None


def _mlp(group: str, linears: dict[str, tuple[int, int]], path: str, last: str | None) -> Architecture | None:
    """The MLP that the linear layers of one module make, if they make one and no layer is left over."""
    if last in linears:
        order = [last]
    else:
        known = [name for name in linears if name.rpartition(".")[2] in LAST]
        order = [*known, *(name for name in reversed(linears) if name not in known)]
    for down in order:
        width, hidden = linears[down]
        into = {name: out for name, (given, out) in linears.items() if name != down and given == hidden}
        copies = {(width,): 1, (width, width): 1, (2 * width,): 2}.get(tuple(into.values()))
        if copies is not None and len(into) == len(linears) - 1:
            parts = [Projection(name.rpartition(".")[2], name, True, copies) for name in into]
            first = group or next(iter(into))
            return Architecture(path, first, (*parts, Projection(down.rpartition(".")[2], down, False)), width, hidden)
    return None


def _experts(module: Any, path: str, name: str) -> Architecture | None:
    """Experts whose weights are 3-D parameters behind transformers' experts interface."""
    weights = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
    gated = getattr(module, "has_gate", True)
    halves, gate = getattr(module, "is_concatenated", None), getattr(type(module), "_apply_gate", None)
    if halves is None and gate is not None and gate.__name__ == "_default_apply_gate":
        halves = True  # transformers 5.0 does not say
    first = "gate_up_proj" if gated else "up_proj"
    interface = hasattr(module, "is_transposed") and hasattr(module, "has_bias") and halves is not None
    if not interface or set(weights) != {first, "down_proj"} or getattr(module, "has_post_expert_norm", False):
        return None
    count, *shape = weights["down_proj"].shape
    hidden, width = reversed(shape) if module.is_transposed else shape
    copies = 2 if gated else 1
    if math.prod(weights[first].shape) != count * copies * width * hidden:
        return None
    into = Projection(first, name, True, copies, interleaved=not halves, by_expert=True)
    down = Projection("down_proj", name, False, by_expert=True)
    return Architecture(path, name.rpartition(".")[0], (into, down), width, hidden, count)


def _layers(numbers: list[int]) -> str:
    named = ", ".join(map(str, numbers[:4])) + (", ..." if len(numbers) > 4 else "")
    return f"layer{'s' if len(numbers) > 1 else ''} {named}"
