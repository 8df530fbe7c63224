"""Decoders: loading, adapters, and where each site is read. Only this file knows architectures."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pnlac_fast.errors import UserError, unknown

SITES = ("mlp_mid", "mlp_out", "resid")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
FINETUNE_FILE = "pnlac.json"  # written beside every fine-tuned model: what it was tuned on, and how
SLICES_FILE = "neuron_slices.safetensors"  # beside a full fine-tune of a few neurons: these alone


@dataclass(eq=False)
class Weights:
    """One copy of a decoder's weights, shared by the base model and every adapter attached to it."""

    hf: Any
    peft: Any = None
    attached: list[str] = field(default_factory=list)
    on: str | None = None

    def switch(self, adapter: str | None) -> None:
        """Switch one adapter on, or all of them off."""
        if self.peft is None or adapter == self.on:
            return
        if adapter is None:
            self.peft.base_model.disable_adapter_layers()
        else:
            self.peft.base_model.enable_adapter_layers()
            self.peft.set_adapter(adapter)
        self.on = adapter


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
    def tuned_topic(self) -> str:
        """The topic this model was tuned on, "" where that is not known."""
        return str(self.origin.get("tuned_topic") or "")

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, in order."""
        return _blocks(self.hf)

    @property
    def context(self) -> int:
        """Longest sequence the model takes, in tokens."""
        return int(getattr(self.hf.config.get_text_config(), "max_position_embeddings", 1 << 30))

    def width(self, site: str) -> int:
        """Number of neurons of a site in one layer."""
        if site not in SITES:
            raise unknown("site", site, SITES)
        down = self.projection(0, "down_proj")
        return int(down.in_features if site == "mlp_mid" else down.out_features)

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


def load_model(
    source: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Model:
    """Load a decoder from a Hugging Face id or a local directory, in evaluation mode.

    Parameters
    ----------
    source
        Hub id, or a directory with ``config.json``, safetensors weights and a tokenizer.
    name
        Name to use in stores; default: the last part of ``source``.
    revision
        Hub revision.
    dtype
        "auto" (as stored), "float32", "bfloat16", "float16" or "float64".
    device
        "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
    trust_remote_code
        Whether code from the model repository may run. Off by default.

    Raises
    ------
    UserError
        The model cannot be loaded, has no safetensors weights, or its blocks have no gated MLP.
    """
    from transformers import AutoModelForCausalLM

    source = str(source)
    if dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise unknown("dtype", dtype, ("auto", "float32", "bfloat16", "float16", "float64"))
    if (Path(source) / "adapter_config.json").is_file():
        raise UserError(f"'{source}' is an adapter: give its base model as --model and the adapter as --tuned.")
    place = resolve_device(device)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        with quiet():
            hf: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"Cannot load the model '{source}': {_first_line(error)}") from error
    hf.to(place)
    hf.eval()
    _blocks(hf)
    tokenizer = _load_tokenizer(source, options)
    origin = {
        "source": source,
        "revision": getattr(hf.config, "_commit_hash", None) or revision,
        "sha256": weights_sha256(source),
        "type": hf.config.model_type,
        "dtype": str(hf.dtype).removeprefix("torch."),
        **_finetune_record(source),
    }
    return Model(Weights(hf), tokenizer, name or _short_name(source), origin)


def load_tuned(base: Model, source: str | Path, *, name: str | None = None) -> Model:
    """Load a tuned model: a PEFT adapter onto ``base``'s own weights, unmerged, or a full checkpoint beside it.

    Raises
    ------
    UserError
        The adapter was made for a base of another shape, is not stored as safetensors, or the checkpoint's layers
        or vocabulary differ from the base's.
    """
    source, name = str(source), name or _short_name(str(source))
    if not (Path(source) / "adapter_config.json").is_file():
        dtype = str(base.hf.dtype).removeprefix("torch.")
        tuned = load_model(source, name=name, dtype=dtype, device=str(base.device))
        for what, mine, theirs in (
            ("layers", len(base.blocks), len(tuned.blocks)),
            ("MLP neurons", base.width("mlp_mid"), tuned.width("mlp_mid")),
            ("tokens in the vocabulary", base.hf.config.vocab_size, tuned.hf.config.vocab_size),
        ):
            if mine != theirs:
                raise UserError(
                    f"'{source}' has {theirs} {what}, the base model {mine}: give a model tuned from this base."
                )
        return tuned
    if not (Path(source) / "adapter_model.safetensors").is_file():
        raise UserError(f"The adapter '{source}' has no adapter_model.safetensors: save it with safetensors.")
    _attach(base.weights, source, name)
    origin = {"source": source, "sha256": weights_sha256(source), "type": "adapter", **_finetune_record(source)}
    return Model(base.weights, base.tokenizer, name, origin, adapter=name)


def open_models(model: Model | str | Path, tuned: Mapping[str, Model | str | Path]) -> tuple[Model, dict[str, Model]]:
    """The base model and the tuned ones by name; what is not loaded yet is loaded with default settings.

    Raises
    ------
    UserError
        A tuned model is called "base", or cannot be loaded.
    """
    base = model if isinstance(model, Model) else load_model(model)
    if "base" in tuned:
        raise UserError("A tuned model cannot be called 'base': name it with --tuned NAME=PATH.")
    return base, {name: t if isinstance(t, Model) else load_tuned(base, t, name=name) for name, t in tuned.items()}


def topic_of(model: Model, name: str, topics: Collection[str]) -> str:
    """What a model was tuned on: as recorded beside it, else its name where that is one of ``topics``, else ""."""
    return model.tuned_topic or (name if name in topics else "")


def weights_sha256(source: str) -> str | None:
    """sha256 over the weights of a local directory, None for a hub id (its revision says as much).

    Over its safetensors files and, for an adapter, its configuration, which scales the weights.
    """
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    files = [file for file in files if file.name != SLICES_FILE]
    if not files:
        return None
    files += sorted(Path(source).glob("adapter_config.json"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence two libraries on the normal path: a bar per load, and PEFT using a name that transformers renamed."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def _attach(weights: Weights, source: str, name: str) -> None:
    """Put an adapter on shared weights; PEFT's silence about weights that found no place becomes an error."""
    from peft import PeftModel
    from safetensors import safe_open

    if name in weights.attached:
        raise UserError(f"Two tuned models are called '{name}': name them apart with --tuned NAME=PATH.")
    with safe_open(Path(source) / "adapter_model.safetensors", framework="pt") as file:
        stored = {key for key in sorted(file.keys()) if ".lora_" in key or ".ia3_" in key}
    try:
        with quiet():
            if weights.peft is None:
                peft = PeftModel.from_pretrained(weights.hf, source, adapter_name=name)
            else:
                peft = weights.peft
                peft.load_adapter(source, adapter_name=name)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"The adapter '{source}' does not fit this base model: {_first_line(error)}") from error
    placed = sum(f".{name}." in f"{key}." and (".lora_" in key or ".ia3_" in key) for key in peft.state_dict())
    if placed != len(stored):
        raise UserError(
            f"The adapter '{source}' holds {len(stored)} tensors but {placed} have a place in this base model: "
            f"give the base that it was trained on."
        )
    peft.eval()
    peft.requires_grad_(False)
    weights.peft, weights.on = peft, name
    weights.attached.append(name)
    weights.switch(None)


def _blocks(hf: Any) -> nn.ModuleList:
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


def resolve_device(name: str) -> torch.device:
    """The device of a name, "auto" being CUDA where there is one; refused where it cannot hold a tensor."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"The device '{name}' cannot be used here ({_first_line(error)[:60]}): give --device cpu, cuda or cuda:N."
        ) from error


def _load_tokenizer(source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"Cannot load a tokenizer from '{source}': {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer of '{source}' gives no character offsets: install its fast version.")
    return tokenizer


def _finetune_record(source: str) -> dict[str, Any]:
    file = Path(source) / FINETUNE_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def _short_name(source: str) -> str:
    return Path(source).resolve().name if Path(source).exists() else source.rsplit("/", 1)[-1]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
