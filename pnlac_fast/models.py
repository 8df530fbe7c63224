"""A decoder as this package sees it, and where each site of it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pnlac_fast.adapters import Weights
from pnlac_fast.architecture import ACTIVATIONS, SITES, Architecture, plain
from pnlac_fast.errors import unknown
from pnlac_fast.mixtures import visited
from pnlac_fast.tensor_parallel import Part


@dataclass(frozen=True, eq=False)
class Model:
    """A decoder as this package sees it: shared weights, the adapter to switch on, a tokenizer, and its origin.

    Attributes
    ----------
    weights
        The Hugging Face model and where its parts are; a base and all its adapters share them.
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
        """Device of the embeddings, where token ids go; of any weight where the embeddings are kept elsewhere."""
        own = self.hf.get_input_embeddings().weight
        if not own.is_meta:
            return own.device
        return next((weight.device for weight in self.hf.parameters() if not weight.is_meta), torch.device("cpu"))

    @property
    def part(self) -> Part:
        """Which slice of the neurons this process has; all of them unless the model was loaded with ``tp``."""
        return self.weights.part

    @property
    def tuned_topic(self) -> str:
        """The topic this model was tuned on, "" where that is not known."""
        return str(self.origin.get("tuned_topic") or "")

    @property
    def identity(self) -> dict[str, Any]:
        """What of its origin decides the numbers: type, dtype, and the weights' sha256, or of a hub id its revision.

        Where it lies and when it was tuned does not.
        """
        weights = ("sha256",) if self.origin.get("sha256") else ("source", "revision")
        return {name: self.origin.get(name) for name in ("type", "dtype", *weights)}

    @property
    def architecture(self) -> Architecture:
        """Where the parts of the decoder are."""
        return self.weights.architecture

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks that are read, in order: layer i of everything is the i-th of them."""
        every, read = self.hf.get_submodule(self.architecture.blocks), self.architecture.read
        return every if len(read) == len(every) else nn.ModuleList(every[i] for i in read)

    @property
    def context(self) -> int:
        """Longest sequence the model takes, in tokens."""
        return int(getattr(self.hf.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)

    def width(self, site: str) -> int:
        """Number of neurons of a site in one layer; at ``mlp_mid`` of a mixture, those of all its experts."""
        if site not in SITES:
            raise unknown("site", site, SITES)
        return self.architecture.neurons if site == "mlp_mid" else self.architecture.hidden

    def local_width(self, site: str) -> int:
        """Number of these neurons that this process has: its :attr:`part`."""
        own = self.part.of(self.width(site))
        return own.stop - own.start

    def projection(self, layer: int, name: str) -> Any:
        """A projection of a layer by its name, such as ``down_proj`` (with an adapter attached: PEFT's wrapper)."""
        paths = {part.name: part.path for part in self.architecture.projections}
        if name not in paths:
            raise unknown("projection", name, paths)
        return self.blocks[layer].get_submodule(paths[name])

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
            ``mlp_mid`` (input of the MLP's last projection; see :mod:`pnlac_fast.mixtures` for a mixture of experts),
            ``mlp_out`` (its output; the sum over experts) or ``resid`` (output of the block).
        visit
            Gets the activation, [batch, position, neuron] in the model's dtype; a tensor that it returns takes the
            activation's place.
        layers
            The layers to visit, all by default.
        """
        if site not in SITES:
            raise unknown("site", site, SITES)
        chosen = range(len(self.blocks)) if layers is None else layers
        batches: list[torch.Size] = []
        with ExitStack() as taps, self.active():  # modules that an adapter keeps a copy of are found while it is on
            taps.callback(_observe(self.blocks[0], batches).remove)
            visits = [_batched(partial(visit, layer), batches) for layer in chosen]
            modules = [self._at(site, layer) for layer in chosen]
            if site == "mlp_mid" and self.architecture.experts:
                taps.enter_context(visited([plain(module) for module in modules], visits))
            else:
                tap = _tap_input if site == "mlp_mid" else _tap_output
                stream = getattr(self.hf.config.get_text_config(), "altup_active_idx", None)
                if site == "resid" and stream is not None:
                    visits = [_of_stream(one, stream) for one in visits]
                for module, one in zip(modules, visits, strict=True):
                    taps.callback(tap(module, one).remove)
            yield

    def _at(self, site: str, layer: int) -> Any:
        block = self.blocks[layer]
        return block if site == "resid" else block.get_submodule(self.architecture.down.path)

    @contextmanager
    def trimmed(self, layer: int, rows: Tensor) -> Iterator[None]:
        """Let the MLP of a layer compute only ``rows``, int64 [kept], of all rows of its batch, as [1, kept, neuron].

        What comes behind that MLP does not fit any more, so the pass must end in it.
        """

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0].flatten(0, -2).index_select(0, rows.to(args[0].device))
            return (x[None] if args[0].dim() == 3 else x, *args[1:])

        mlp = self.blocks[layer].get_submodule(self.architecture.mlp)
        hook = mlp.register_forward_pre_hook(before)
        try:
            yield
        finally:
            hook.remove()

    @property
    def activation(self) -> str | None:
        """The activation of gated MLPs, by its name in :func:`pnlac_fast.ops.swiglu`.

        None if it is not there, if the MLPs are others, or if something has replaced the forward function of one.
        """
        if not self.architecture.gated:
            return None
        mlps = [block.get_submodule(self.architecture.mlp) for block in self.blocks]
        names = {ACTIVATIONS.get(type(getattr(mlp, "act_fn", None)).__name__) for mlp in mlps}
        replaced = any("forward" in vars(mlp) for mlp in mlps)
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

        mlps: list[Any] = [block.get_submodule(self.architecture.mlp) for block in self.blocks]
        try:
            for layer, mlp in enumerate(mlps):
                mlp.forward = partial(forward, mlp, layer)
            yield
        finally:
            for mlp in mlps:
                vars(mlp).pop("forward", None)


_Visit = Callable[[Tensor], Tensor | None]


def _observe(block: Any, batches: list[torch.Size]) -> Any:
    """Note batch and positions of the pass that is running: some architectures flatten them before their MLP."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batches[:] = [(args[0] if args else kwargs["hidden_states"]).shape[:2]]

    return block.register_forward_pre_hook(before, with_kwargs=True)


def _batched(visit: _Visit, batches: list[torch.Size]) -> _Visit:
    """A visit that gets [batch, position, neuron] where the module has [row, neuron]; trimmed rows are one sequence."""

    def of_rows(activation: Tensor) -> Tensor | None:
        if activation.dim() != 2:
            return visit(activation)
        whole = batches[0].numel() == len(activation)
        new = visit(activation.view(*(batches[0] if whole else (1, len(activation))), -1))
        return None if new is None else new.flatten(0, 1)

    return of_rows


def _of_stream(visit: _Visit, index: int) -> _Visit:
    """A visit that gets one of the streams of Gemma 3n, [stream, batch, position, neuron]: what blocks compute."""

    def of_streams(activation: Tensor) -> Tensor | None:
        new = visit(activation[index])
        return None if new is None else activation.index_copy(0, torch.tensor([index], device=new.device), new[None])

    return of_streams


def _tap_input(module: nn.Module, visit: _Visit) -> Any:
    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        new = visit(args[0])
        return None if new is None else (new, *args[1:])

    return module.register_forward_pre_hook(before)


def _tap_output(module: nn.Module, visit: _Visit) -> Any:
    def after(_: nn.Module, __: Any, output: Any) -> Any:
        inner = isinstance(output, tuple | list)
        new = visit(output[0] if inner else output)
        return None if new is None else type(output)((new, *output[1:])) if inner else new

    return module.register_forward_hook(after)
