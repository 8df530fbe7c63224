"""Where the parts of a decoder are: its blocks, and in each of them the MLP and the weights of its neurons.

A scan finds them by shape. What it cannot tell apart it refuses, and the user names the last projection. Only this file
knows architectures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
# Parts of names of what mixes tokens, whose projections may look like an MLP's.
MIXERS = ("attn", "attention", "mamba")
# Model types that cannot be used, and why, in a clause.
BARRED = {"git": "writes captions, and its loss leaves out as many tokens as an image has"}
# Names of the module of an MLP, where a block has other pairs of linear layers beside it (low-rank ones, of Gemma 3n).
NAMES = ("mlp", "mlp_block", "feed_forward", "ffn")


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
    """Where the parts of a decoder are, the same in every block that is read.

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
    read
        Numbers of the blocks that hold this MLP: all of them, unless the user has chosen one of several kinds.
    unread
        Paths of the last projections, or of the experts, beside it in these blocks: their neurons are no sites here.
    """

    blocks: str
    mlp: str
    projections: tuple[Projection, ...]
    width: int
    hidden: int
    experts: int = 0
    read: tuple[int, ...] = ()
    unread: tuple[str, ...] = ()

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
        Blocks without it, such as the dense ones of a mixture, are not read.

    Raises
    ------
    UserError
        The scan finds no MLP, several, or not the same in every block; it names the paths to choose from.
    """
    kind, count = hf.config.model_type, getattr(hf.config.get_text_config(), "num_hidden_layers", None)
    if kind in BARRED:
        raise UserError(f"Model type '{kind}' {BARRED[kind]}: give a decoder of text alone.")
    decoder = backbone(hf)
    front = next(name for name, module in hf.named_modules() if module is decoder)
    lists = {name: len(module) for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    name = next((name for name, length in lists.items() if length == count), None)
    if getattr(hf.config, "is_encoder_decoder", False) or name is None:
        there = ", ".join(f"{name} ({length})" for name, length in lists.items() if name.count(".") < 2)
        raise UserError(
            f"Model type '{kind}' has no list of {count} blocks (num_hidden_layers) but {there or 'none'}: "
            f"give a decoder-only causal model whose blocks run once, one after another."
        )
    path = ".".join(part for part in (front, name) if part)
    candidates: dict[str, dict[Architecture, list[int]]] = {}  # by path of the last projection
    unknown: dict[str, set[int]] = {}
    alone = True
    for layer, block in enumerate(hf.get_submodule(path)):
        found, others = _of_block(block, path, last_projection)
        alone &= len(found) == 1 and not others
        for at in others:
            unknown.setdefault(at, set()).add(layer)
        for at, mlp in found.items():
            candidates.setdefault(at, {}).setdefault(mlp, []).append(layer)
    if last_projection is None and alone and len(candidates) == 1:
        chosen = next(iter(candidates.values()))
    else:
        chosen = candidates.get(last_projection or "", {})
    if len(chosen) == 1:
        mlp, layers = next(iter(chosen.items()))
        beside = {at: {layer for on in each.values() for layer in on} for at, each in candidates.items()} | unknown
        unread = tuple(at for at, on in beside.items() if at != mlp.down.path and on & set(layers))
        return replace(mlp, read=tuple(layers), unread=unread)
    raise _refusal(kind, last_projection, candidates, [*unknown], _linears(hf.get_submodule(path)[0]))


def _refusal(
    kind: str,
    last: str | None,
    candidates: dict[str, dict[Architecture, list[int]]],
    unknown: list[str],
    linears: list[str],
) -> UserError:
    """What is found in the blocks where that is not one MLP, and what to do."""
    at = f" at '{last}'" if last is not None else ""
    if not candidates:
        return UserError(
            f"The MLP of model type '{kind}' is not found by its shape{at}: name its last projection, a path in each "
            f"block, with --last-projection. There are {', '.join((unknown or linears)[:8]) or 'no linear layers'}."
        )
    shapes = [f"{n} ({m.neurons} neurons, {_layers(on)})" for n, ms in candidates.items() for m, on in ms.items()]
    shapes += [f"{name} (experts without transformers' experts interface, which cannot be read)" for name in unknown]
    held = f"The blocks of model type '{kind}' hold {' and '.join(shapes)}"
    if len(candidates[last] if last in candidates else min(candidates.values(), key=len)) > 1:
        return UserError(f"{held}. Only MLPs of one width are read together: give a model whose blocks are alike.")
    return UserError(
        f"{held}{f', and no MLP{at}' if at else ''}: name the one to read with --last-projection; blocks without it, "
        f"and neurons of the others, are left out."
    )


def backbone(hf: Any) -> Any:
    """What holds the blocks of a Hugging Face model, without the head: what ``stop`` runs."""
    decoder = hf.get_decoder()
    return decoder if any(isinstance(m, nn.ModuleList) for m in decoder.modules()) else hf.base_model


def plain(module: Any) -> Any:
    """A module without the adapter around it."""
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            return module


def _of_block(block: nn.Module, path: str, last: str | None) -> tuple[dict[str, Architecture], list[str]]:
    """The MLPs of a block by path of their last projection, and experts that are not known."""
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
    if not found and not unknown:  # the projections may be in modules of their own, as in BERT
        every = {name: widths for linears in groups.values() for name, widths in linears.items()}
        if (mlp := _mlp("", every, path, last)) is not None:
            found[mlp.down.path] = mlp
    named = {at for at, mlp in found.items() if mlp.experts or mlp.mlp.rpartition(".")[2] in NAMES}
    if any(not found[at].experts for at in named) and last is None:
        found = {at: mlp for at, mlp in found.items() if at in named}
    return found, unknown


def _linears(block: nn.Module) -> list[str]:
    return sorted(name for name, module in _outside_attention(block) if _widths(plain(module)) is not None)


def _outside_attention(block: nn.Module, front: str = "") -> Iterator[tuple[str, Any]]:
    """Modules of a block that are not part of :data:`MIXERS`, outermost first; not what is inside a projection."""
    for name, child in block.named_children():
        if any(part in name.lower() for part in MIXERS):
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
            short = {name: name.rpartition(".")[2] for name in linears}
            if len(set(short.values())) < len(short):  # BERT calls both dense
                short = {name: name.replace(".", "_") for name in linears}
            parts = [Projection(short[name], name, True, copies) for name in into]
            first = group or next(iter(into))
            return Architecture(path, first, (*parts, Projection(short[down], down, False)), width, hidden)
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
