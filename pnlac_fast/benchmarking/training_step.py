"""One step of a fine-tune, timed by what trains (all, all but frozen neurons, MLPs, LoRA, slices) or is held."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pnlac_fast.adapters import quiet
from pnlac_fast.anchoring import Anchor
from pnlac_fast.architecture import MLP_PROJECTIONS
from pnlac_fast.base_activations import base_activations
from pnlac_fast.benchmarking.timing import interleaved, ratio
from pnlac_fast.benchmarking.workloads import DTYPES, SHAPES, make_model
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.loading import resolve_device
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.null_space import NullSpace
from pnlac_fast.references import Reference
from pnlac_fast.slices import slice_neurons

SHARE = 0.03  # of each layer's neurons, about what localising finds specific to a topic
SEQUENCES, LENGTH = 8, 128
RATE = 1e-4  # of AdamW, so what its first step moves a weight by
DIMS = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}  # where the neurons of mlp_mid are


@dataclass(eq=False)
class Step:
    """A model, what trains of it, and the optimizer: called, it makes one step on a batch."""

    model: Any
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    batch: Mapping[str, Tensor]
    space: NullSpace | None = None

    def __call__(self) -> None:
        """Forward, backward, clipping, AdamW."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model(**self.batch).loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def bytes(self) -> int:
        """What gradients, the optimizer's state and a null space take, after a step."""
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        moments = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        return gradients + sum(t.nbytes for t in moments) + (self.space.nbytes if self.space else 0)


def all_weights(hf: Any, neurons: NeuronSet) -> tuple[Any, list[nn.Parameter]]:
    """Everything trains."""
    return hf, list(hf.parameters())


def mlps(hf: Any, neurons: NeuronSet) -> tuple[Any, list[nn.Parameter]]:
    """The MLP projections train."""
    for name, parameter in hf.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    return hf, [p for p in hf.parameters() if p.requires_grad]


def lora(hf: Any, neurons: NeuronSet) -> tuple[Any, list[nn.Parameter]]:
    """PEFT's LoRA of rank 16 on the MLP projections trains."""
    from peft import LoraConfig, get_peft_model

    with quiet():
        model = get_peft_model(hf, LoraConfig(r=16, lora_alpha=32, target_modules=list(MLP_PROJECTIONS)))
    return model, [p for p in model.parameters() if p.requires_grad]


def slices(hf: Any, neurons: NeuronSet) -> tuple[Any, list[nn.Parameter]]:
    """The rows and columns of the chosen neurons train."""
    return hf, slice_neurons(hf, neurons).parameters()


def freeze(hf: Any, neurons: NeuronSet) -> tuple[Any, list[nn.Parameter]]:
    """Everything trains but the chosen neurons, by InhibitFT; :func:`prepare` masks the optimizer."""
    return hf, list(hf.parameters())


def anchor(hf: Any, neurons: NeuronSet) -> tuple[Any, list[nn.Parameter]]:
    """Everything trains, and the chosen neurons' activations are held; :func:`prepare` installs the penalty."""
    return hf, list(hf.parameters())


WAYS: dict[str, Callable[[Any, NeuronSet], tuple[Any, list[nn.Parameter]]]] = {
    "full": all_weights,
    "freeze": freeze,
    "anchor": anchor,
    "mlp": mlps,
    "lora": lora,
    "slices": slices,
    "null_space": slices,  # by :func:`prepare` kept out of other topics' directions
}


def choose_neurons(hf: Any, share: float = SHARE, seed: int = 0) -> NeuronSet:
    """Random neurons of ``mlp_mid``, as many in every layer."""
    layers, width = hf.config.num_hidden_layers, hf.config.intermediate_size
    member = np.zeros((layers, width), bool)
    generator = np.random.default_rng(seed)
    for row in member:
        row[generator.permutation(width)[: max(1, round(share * width))]] = True
    return NeuronSet("random", "random", member)


def place_of(shape: str, device: str, dtype: str, share: float) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a measurement whose options are these, once they are known to fit; see :func:`measure`."""
    if shape not in SHAPES:
        raise unknown("shape", shape, SHAPES)
    if dtype not in ("auto", *DTYPES):
        raise unknown("dtype", dtype, ("auto", *DTYPES))
    if not 0 < share <= 1:
        raise UserError(f"A share of {share:g} of the neurons cannot train: give one above 0, up to 1.")
    return resolve_device(device), DTYPES["float32" if dtype == "auto" else dtype]  # as finetune does full ones


def make_setting(
    shape: str, *, device: str = "auto", dtype: str = "auto", share: float = SHARE
) -> tuple[Any, NeuronSet, dict[str, Tensor]]:
    """A model with random weights, neurons of it, and a batch of 1024 random tokens; see :func:`measure`."""
    place, kind = place_of(shape, device, dtype, share)
    hf = make_model(SHAPES[shape], place, kind).hf.requires_grad_(True)
    ids = torch.randint(0, hf.config.vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    ids = ids.to(place)
    return hf, choose_neurons(hf, share), {"input_ids": ids, "labels": ids}


def prepare(hf: Any, neurons: NeuronSet, batch: Mapping[str, Tensor], way: str) -> Step:
    """A step on a copy of ``hf``."""
    model, parameters = WAYS[way](copy.deepcopy(hf), neurons)
    step = Step(model.train(), parameters, torch.optim.AdamW(parameters, lr=RATE, fused=True), batch)
    if way == "freeze":
        inhibition = InhibitFT(neurons)
        inhibition.prepare(model)
        arguments, state = SimpleNamespace(max_grad_norm=1.0), SimpleNamespace(global_step=0)
        inhibition.on_train_begin(arguments, state, None, model=model, optimizer=step.optimizer)
    if way == "null_space":
        texts = [Reference(tuple(ids), 1) for ids in batch["input_ids"].flip(1).tolist()]
        step.space = NullSpace(texts, batch_size=len(texts))
        step.space.prepare(model)
        step.space.on_train_begin(
            SimpleNamespace(n_gpu=1), SimpleNamespace(global_step=0), None, model=model, optimizer=step.optimizer
        )
    if way == "anchor":
        penalty = Anchor(neurons, base=base_activations(hf, batch["input_ids"].tolist(), neurons))
        penalty.on_train_begin(
            SimpleNamespace(gradient_accumulation_steps=1, n_gpu=1),
            SimpleNamespace(global_step=0),
            None,
            model=model,
            optimizer=step.optimizer,
        )
    return step


def check(hf: Any, neurons: NeuronSet, batch: Mapping[str, Tensor]) -> None:
    """Make one step with slices, and one of all weights, and compare.

    Raises
    ------
    RuntimeError
        Something besides the slices has moved, a slice has not, or its gradient is another than in the full step; or
        frozen neurons have moved, or others have not.
    """
    full, sliced = prepare(hf, neurons, batch, "full"), prepare(hf, neurons, batch, "slices")
    full()
    sliced()
    gradients = {name: p.grad for name, p in sliced.model.named_parameters() if p.grad is not None}
    after = sliced.model.state_dict()
    for name, before in hf.state_dict().items():
        moved = after[name].ne(before)
        if own := _own(name, neurons):
            dim, index = own
            expected = full.model.get_parameter(name).grad.index_select(dim, index.to(before.device))
            found = gradients[name.replace(".weight", ".slice_weight")]
            cosine = torch.cosine_similarity(expected.flatten().double(), found.flatten().double(), 0)
            if not cosine > 0.999:  # clipping scales them differently
                raise RuntimeError(f"The slice of {name} has another gradient than the full step ({cosine:.4f}).")
            if not moved.index_select(dim, index.to(before.device)).any():
                raise RuntimeError(f"The slice of {name} does not train.")
            moved.index_fill_(dim, index.to(before.device), False)
        if moved.any():
            raise RuntimeError(f"{name} has moved outside the slices.")


def check_anchor(hf: Any, neurons: NeuronSet, batch: Mapping[str, Tensor]) -> None:
    """Make two steps with anchored neurons, and two of all weights: the first moves them, the second pulls them back.

    Raises
    ------
    RuntimeError
        The penalty makes no difference.
    """
    anchored, full = (prepare(hf, neurons, batch, way) for way in ("anchor", "full"))
    for step in (anchored, anchored, full, full):
        step()
    down = next(name for name, _ in hf.named_parameters() if name.endswith("down_proj.weight"))
    if torch.equal(anchored.model.get_parameter(down), full.model.get_parameter(down)):
        raise RuntimeError("The anchor makes no difference.")


def check_null_space(hf: Any, neurons: NeuronSet, batch: Mapping[str, Tensor]) -> None:
    """Make one step with slices that are kept out of the null space, and one with slices that are not.

    Raises
    ------
    RuntimeError
        A gate has moved along a direction that is to be left alone, or would not have without the null space.
    """
    held, free = (prepare(hf, neurons, batch, way) for way in ("null_space", "slices"))
    assert held.space is not None
    held()
    free()
    for layer, directions in held.space.directions.items():
        name = f"model.layers.{layer}.mlp.gate_proj.weight"
        before, index = hf.get_parameter(name).detach(), neurons.layer(layer)
        along = [
            float(((step.model.state_dict()[name] - before)[index].float() @ directions).norm())
            for step in (held, free)
        ]
        # What is taken back of a weight is rounded to its dtype, along all directions alike.
        rounding = torch.finfo(before.dtype).eps * float(before[index].norm())
        if along[0] > 0.05 * along[1] + rounding * math.sqrt(directions.shape[1] / directions.shape[0] / 3):
            raise RuntimeError(f"{name} has moved along a direction of the null space ({along[0]:.2g}).")


def check_freeze(hf: Any, neurons: NeuronSet, batch: Mapping[str, Tensor]) -> None:
    """Make one step with frozen neurons.

    Raises
    ------
    RuntimeError
        A frozen weight has moved, or one that is not frozen moves nowhere.
    """
    frozen = prepare(hf, neurons, batch, "freeze")
    frozen()
    for name, before in hf.named_parameters():
        moved = frozen.model.get_parameter(name).detach().ne(before)
        if own := _own(name, neurons):
            dim, index = own
            if moved.index_select(dim, index.to(before.device)).any():
                raise RuntimeError(f"Frozen entries of {name} have moved.")
        if not moved.any() and before.add(RATE).ne(before).any():  # or no entry is so precise
            raise RuntimeError(f"{name} does not train.")


def measure(
    *,
    shape: str = "small",
    repeats: int = 5,
    device: str = "auto",
    dtype: str = "auto",
    share: float = SHARE,
) -> dict[str, Any]:
    """Check, then time a whole step of every way, side by side. Base activations for the anchor are read before.

    Returns
    -------
    dict
        ``freeze_vs_full``, ``anchor_vs_full``, ``slices_vs_full``, ``slices_vs_lora``,
        ``null_space_vs_full``, ``lora_vs_full``, ``mlp_vs_full``: ratios of seconds within a round;
        ``bytes_slices_vs_full``, ``bytes_null_space_vs_full``, ``bytes_lora_vs_full``: of gradients, optimizer state
        and what the null space keeps; ``shape``, ``dtype``, ``tokens``, ``share``.

    Raises
    ------
    UserError
        The shape or dtype is unknown, or the device cannot be used.
    RuntimeError
        See :func:`check`, :func:`check_freeze`, :func:`check_anchor` and :func:`check_null_space`.
    """
    hf, neurons, batch = make_setting(shape, device=device, dtype=dtype, share=share)
    check(hf, neurons, batch)
    check_freeze(hf, neurons, batch)
    check_anchor(hf, neurons, batch)
    check_null_space(hf, neurons, batch)
    steps = {way: prepare(hf, neurons, batch, way) for way in WAYS}
    seconds = interleaved(steps, repeats, hf.device)
    size = {way: step.bytes() for way, step in steps.items()}
    return {
        "shape": shape,
        "dtype": str(hf.dtype).removeprefix("torch."),
        "tokens": batch["input_ids"].numel(),
        "share": share,
        "freeze_vs_full": ratio(seconds["freeze"], seconds["full"]),
        "anchor_vs_full": ratio(seconds["anchor"], seconds["full"]),
        "slices_vs_full": ratio(seconds["slices"], seconds["full"]),
        "slices_vs_lora": ratio(seconds["slices"], seconds["lora"]),
        "null_space_vs_full": ratio(seconds["null_space"], seconds["full"]),
        "lora_vs_full": ratio(seconds["lora"], seconds["full"]),
        "mlp_vs_full": ratio(seconds["mlp"], seconds["full"]),
        "bytes_slices_vs_full": size["slices"] / size["full"],
        "bytes_null_space_vs_full": size["null_space"] / size["full"],
        "bytes_lora_vs_full": size["lora"] / size["full"],
    }


def _own(name: str, neurons: NeuronSet) -> tuple[int, Tensor] | None:
    """Dimension and index of the chosen neurons in a weight; None where it has none."""
    part = name.split(".")[-2]
    if ".mlp." not in name or part not in DIMS:
        return None
    return DIMS[part], torch.tensor(neurons.layer(int(name.split("layers.")[1].split(".")[0])))
