"""A decoder spread over processes by transformers' tensor parallelism: each has one slice of the neurons of a layer.

Every process runs every pass, over the same tokens. It computes its slice of each MLP and reads it there; what the MLPs
and blocks give out is summed over the processes anyway, so that each has all of it and takes its slice from that.
Nothing is gathered to be read. (Models with gate and up in one weight gather the middle of an MLP for themselves.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from pnlac_fast import workers
from pnlac_fast.architecture import SITES, backbone
from pnlac_fast.errors import UserError

if TYPE_CHECKING:
    from pnlac_fast.models import Model

# What transformers' plans cut in equal parts, as configurations call it.
DIVIDED = {
    "intermediate_size": "MLP neurons",
    "hidden_size": "hidden neurons",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key and value heads",
}


@dataclass(frozen=True)
class Part:
    """Which slice of the neurons of every layer a process has: number ``rank`` of ``ranks`` equal ones."""

    rank: int = 0
    ranks: int = 1

    def of(self, width: int) -> slice:
        """The neurons of this part among ``width`` of a layer."""
        return slice(self.rank * width // self.ranks, (self.rank + 1) * width // self.ranks)

    def cut(self, activation: Tensor, width: int) -> Tensor:
        """This part of an activation, [row, neuron], of a site with ``width`` neurons; what is cut already stays."""
        whole = activation.shape[1] == width
        return activation[:, self.of(width)] if whole and self.ranks > 1 else activation


WHOLE = Part()


def joined() -> Part:
    """This process among those that share a model: of the process group there is, or of what torchrun has set.

    Raises
    ------
    UserError
        The process was not started by torchrun or the like, or it is alone.
    """
    if dist.is_available() and dist.is_initialized():
        part = Part(dist.get_rank(), dist.get_world_size())
    else:
        here = workers.of_group(meeting=True)
        part = Part(here.index, here.count) if here else WHOLE
    if part.ranks == 1:
        raise UserError(
            "A tensor-parallel model needs a process for each part of it: start with "
            "torchrun --nproc-per-node 2 --no-python pnlac-fast cache --tp ..., or leave --tp out."
        )
    return part


def sharding(config: Any, part: Part) -> Any:
    """What ``from_pretrained`` takes as ``distributed_config`` to load one part of a model.

    Parameters
    ----------
    config
        The Hugging Face configuration of the model.

    Raises
    ------
    UserError
        transformers is too old, has no plan for this model, or the model does not divide by the number of processes.
    """
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism  # noqa: F401  # since 5.17
    except ImportError as error:
        raise UserError("--tp needs transformers 5.17 or newer: pip install --upgrade transformers.") from error
    text = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise UserError(f"transformers has no tensor-parallel plan for model type '{text.model_type}': leave --tp out.")
    for name, what in DIVIDED.items():
        count = getattr(text, name, None)
        if isinstance(count, int) and count % part.ranks:
            raise UserError(
                f"{count} {what} do not divide into {part.ranks} equal parts: "
                f"start a number of processes that divides them."
            )
    return DistributedConfig(tp_size=part.ranks, tp_plan="auto")


def check(model: Model) -> None:
    """Refuse a mixture of experts, and a model of which two tokens show a site at another width than it should have.

    Raises
    ------
    UserError
        It names the site.
    """
    if model.architecture.experts:  # a slice of every expert is no slice of all their neurons
        raise UserError(f"'{model.name}' is a mixture of experts, which is not divided yet: leave --tp out.")
    seen: dict[str, set[int]] = {site: set() for site in SITES}
    with torch.inference_mode(), ExitStack() as stack:
        for site in SITES:
            stack.enter_context(model.tapped(site, lambda _, a, at=seen[site]: at.add(a.shape[-1])))  # type: ignore[misc]
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        backbone(model.hf)(input_ids=tokens, use_cache=False)
    for site, widths in seen.items():
        cut = {model.local_width(site)} if site == "mlp_mid" else set()
        if len(widths) != 1 or not widths <= {model.width(site), *cut}:
            raise UserError(
                f"Under tensor parallelism site {site} of '{model.name}' has {sorted(widths)} neurons in a process, "
                f"of {model.width(site)}: leave --tp out."
            )


def union(model: Model, numbers: Sequence[int]) -> list[int]:
    """The numbers that any of the processes gives that share a model, ascending, in all of them.

    They must run the same passes, but free memory, or what has been written, may look different to each.
    """
    found = set(numbers)
    for rank in range(model.part.ranks if model.part != WHOLE else 0):
        own = torch.tensor([*numbers], dtype=torch.int64, device=model.device)
        count = torch.tensor(len(own), device=model.device)
        dist.broadcast(count, src=rank)
        if rank != model.part.rank:
            own = own.new_empty(int(count))
        dist.broadcast(own, src=rank)
        found.update(own.tolist())
    return sorted(found)
