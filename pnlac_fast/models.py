"""A decoder as this package sees it, and where each site of it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pnlac_fast.adapters import Weights
from pnlac_fast.architecture import ACTIVATIONS, SITES, blocks_of
from pnlac_fast.errors import unknown
from pnlac_fast.tensor_parallel import Part


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder as this package sees it: shared weights, the adapter to switch on, a tokenizer, and its origin.

    Attributes
    ----------
    name
        Short name, used in stores and reports.
    tokenizer
        The Hugging Face tokenizer.
    origin
        What provenance records: source, revision or sha256 of the weights, type, dtype, and for a tuned model what
        ``pnlac-fast finetune`` wrote beside it (``tuned_topic``, ``side``, method).
    adapter
        Name of the adapter that is on while this model runs; None for the weights alone.
    """

    weights: Weights
    tokenizer: Any
    name: str
    origin: dict[str, Any]
    adapter: str | None = None

    @property
    def hf(self) -> Any:
        """The Hugging Face model. Switch the adapter with :meth:`active` before calling it."""
        return self.weights.hf

    @property
    def device(self) -> torch.device:
        """Device of the embeddings, where token ids go."""
        return self.hf.get_input_embeddings().weight.device

    @property
    def part(self) -> Part:
        """Which slice of the neurons this process has; all of them unless the model was loaded with ``tp``."""
        return self.weights.part

    @property
    def tuned_topic(self) -> str:
        """The topic this model was tuned on, "" where that is not known."""
        return str(self.origin.get("tuned_topic") or "")

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, in order."""
        return blocks_of(self.hf)

    @property
    def context(self) -> int:
        """Longest sequence the model takes, in tokens."""
        return int(getattr(self.hf.config.get_text_config(), "max_position_embeddings", 1 << 30))

    def width(self, site: str) -> int:
        """Number of neurons of a site in one layer."""
        if site not in SITES:
            raise unknown("site", site, SITES)
        down = self.projection(0, "down_proj")
        down = getattr(down, "base_layer", down)  # PEFT's wrapper of a part tells the width of that part
        return int(down.in_features if site == "mlp_mid" else down.out_features)

    def local_width(self, site: str) -> int:
        """Number of these neurons that this process has: its :attr:`part`."""
        own = self.part.of(self.width(site))
        return own.stop - own.start

    def projection(self, layer: int, name: str) -> Any:
        """``gate_proj``, ``up_proj`` or ``down_proj`` of a layer (with an adapter attached: PEFT's wrapper of it)."""
        return getattr(self.blocks[layer].mlp, name)

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Yield the Hugging Face model with this model's adapter on (or all off); may be nested for other adapters."""
        before = self.weights.on
        self.weights.switch(self.adapter)
        try:
            yield self.hf
        finally:
            self.weights.switch(before)

    @contextmanager
    def tapped(
        self, site: str, visit: Callable[[int, Tensor], Tensor | None], layers: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Call ``visit(layer, activation)`` for each layer of every forward pass inside the block.

        Parameters
        ----------
        site
            ``mlp_mid`` (input of the down projection), ``mlp_out`` (its output) or ``resid`` (output of the block).
        visit
            Gets the activation, [batch, position, neuron] in the model's dtype; a tensor that it returns takes the
            activation's place.
        layers
            The layers to visit, all by default.
        """
        if site not in SITES:
            raise unknown("site", site, SITES)
        taps = []
        try:
            for layer in range(len(self.blocks)) if layers is None else layers:
                taps.append(self._tap(site, layer, visit))
            yield
        finally:
            for tap in taps:
                tap.remove()

    @contextmanager
    def trimmed(self, layer: int, rows: Tensor) -> Iterator[None]:
        """Let the MLP of a layer compute only ``rows``, int64 [kept], of all rows of its batch, as [1, kept, neuron].

        What comes behind that MLP does not fit any more, so the pass must end in it.
        """

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].flatten(0, 1).index_select(0, rows)[None], *args[1:])

        mlp: Any = self.blocks[layer].mlp
        hook = mlp.register_forward_pre_hook(before)
        try:
            yield
        finally:
            hook.remove()

    @property
    def activation(self) -> str | None:
        """The activation of the MLPs, by its name in :func:`pnlac_fast.ops.swiglu`.

        None if it is not there, or if something has replaced the forward function of an MLP.
        """
        names = {ACTIVATIONS.get(type(getattr(block.mlp, "act_fn", None)).__name__) for block in self.blocks}
        replaced = any("forward" in vars(block.mlp) for block in self.blocks)
        return names.pop() if len(names) == 1 and not replaced else None

    @contextmanager
    def gated(self, middle: Callable[[int, Tensor, Tensor, str], Tensor]) -> Iterator[None]:
        """Let ``middle(layer, gate, up, activation)`` compute act(gate) * up of every MLP, each [row, neuron]."""
        activation = self.activation
        assert activation is not None

        def forward(mlp: Any, layer: int, x: Tensor) -> Tensor:
            # No name for gate and up, so that they are gone when the last projection asks for memory.
            mid = middle(layer, mlp.gate_proj(x).flatten(0, -2), mlp.up_proj(x).flatten(0, -2), activation)
            return mlp.down_proj(mid.view(*x.shape[:-1], mid.shape[-1]))

        mlps: list[Any] = [block.mlp for block in self.blocks]
        try:
            for layer, mlp in enumerate(mlps):
                mlp.forward = partial(forward, mlp, layer)
            yield
        finally:
            for mlp in mlps:
                vars(mlp).pop("forward", None)

    def _tap(self, site: str, layer: int, visit: Callable[[int, Tensor], Tensor | None]) -> Any:
        if site == "mlp_mid":

            def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
                new = visit(layer, args[0])
                return None if new is None else (new, *args[1:])

            return self.projection(layer, "down_proj").register_forward_pre_hook(before)

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            inner = isinstance(output, tuple)
            new = visit(layer, output[0] if inner else output)
            return None if new is None else (new, *output[1:]) if inner else new

        module = self.projection(layer, "down_proj") if site == "mlp_out" else self.blocks[layer]
        return module.register_forward_hook(after)
