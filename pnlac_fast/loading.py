"""Loading decoders: base models, full checkpoints and adapters, with their tokenizer and their origin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pnlac_fast.adapters import Weights, attach, quiet, sharing
from pnlac_fast.checkup import dry_run
from pnlac_fast.errors import UserError, first_line, unknown
from pnlac_fast.hub import local
from pnlac_fast.models import Model
from pnlac_fast.tensor_parallel import WHOLE, check, joined, sharding

FINETUNE_FILE = "pnlac.json"  # written beside every fine-tuned model: what it was tuned on, and how
SLICES_FILE = "neuron_slices.safetensors"  # beside a full fine-tune of a few neurons: these alone


def load_model(
    source: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    tp: bool = False,
    last_projection: str | None = None,
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
    device_map
        Spread the blocks over devices, as accelerate does: "auto", "balanced", or a device by module. Sums are kept
        where the embeddings are.
    trust_remote_code
        Whether code from the model repository may run. Off by default.
    tp
        Tensor parallel: load this process's part of the model (:attr:`Model.part`), one of as many equal ones as
        torchrun has started processes. transformers chooses the devices.
    last_projection
        Path of the MLP's last projection in a block, such as "mlp.down_proj", for architectures that are not
        recognised; of experts that of their module, such as "mlp.experts".

    Returns
    -------
    Model
        Checked by :func:`pnlac_fast.checkup.dry_run`: every site runs once in every layer.

    Raises
    ------
    UserError
        The model cannot be loaded, has no safetensors weights, cannot be divided, or its MLPs are not found; see
        :func:`pnlac_fast.architecture.architecture`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = str(source)
    if dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise unknown("dtype", dtype, ("auto", "float32", "bfloat16", "float16", "float64"))
    if (Path(source) / "adapter_config.json").is_file():
        base = json.loads((Path(source) / "adapter_config.json").read_text()).get("base_model_name_or_path")
        raise UserError(
            f"'{source}' is an adapter: give its base model{f' ({base})' if base else ''} as --model and the adapter "
            f"as --tuned."
        )
    if tp and (device != "auto" or device_map is not None):
        raise UserError("A tensor-parallel model is placed by transformers: leave --device out, and --device-map.")
    if device_map is not None and device != "auto":
        raise UserError("Give --device or --device-map, not both.")
    part, place = joined() if tp else WHOLE, resolve_device(device)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, **options)
            where: dict[str, Any] = {}
            if tp:
                where["distributed_config"] = sharding(config, part)
            elif device_map is not None:
                where["device_map"] = device_map
            elif getattr(config, "quantization_config", None) is not None:
                where["device_map"] = {"": place}  # what is quantised cannot be moved afterwards
            hf: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, **options, **where
            )
    except SafetensorError as error:
        raise UserError(f"The weights of '{source}' are damaged ({first_line(error)}): copy them anew.") from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"Cannot load the model '{source}': {first_line(error)}") from error
    if not where:
        hf.to(place)
    hf.eval()
    weights = Weights(hf, part=part, last_projection=last_projection)
    tokenizer = _load_tokenizer(source, options)
    origin = {
        "source": source,
        "revision": getattr(hf.config, "_commit_hash", None) or revision,
        "sha256": weights_sha256(source),
        "type": hf.config.model_type,
        "dtype": _dtype(hf),
        **({"last_projection": weights.last_projection} if weights.last_projection else {}),
        **_finetune_record(source),
    }
    model = Model(weights, tokenizer, name or _short_name(source), origin)
    _eager_in_double(model)
    if tp:
        check(model)
    else:
        dry_run(model)
    return model


def from_hf(hf: Any, tokenizer: Any, *, name: str = "", last_projection: str | None = None) -> Model:
    """A decoder that is loaded already, by whatever means: quantised, spread over devices, or made from scratch.

    Parameters
    ----------
    hf
        The Hugging Face causal model, without adapters. It is put into evaluation mode and otherwise left as it is.
    tokenizer
        Its fast tokenizer.
    name
        Name to use in stores; default: the last part of where it was loaded from.
    last_projection
        As for :func:`load_model`.

    Returns
    -------
    Model
        As :func:`load_model` returns it; ``hf`` is what was given.

    Raises
    ------
    UserError
        It is compiled, or its MLPs are not found.
    """
    if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in hf.modules()):
        raise UserError("A compiled model would be compiled anew for all that is read: give it as it was before that.")
    weights = Weights(hf.eval(), last_projection=last_projection)
    source = str(hf.name_or_path or "given")
    origin = {
        "source": source,
        "revision": getattr(hf.config, "_commit_hash", None),
        "sha256": weights_sha256(source),
        "type": hf.config.model_type,
        "dtype": _dtype(hf),
        **({"last_projection": weights.last_projection} if weights.last_projection else {}),
        **_finetune_record(source),
    }
    model = Model(weights, tokenizer, name or _short_name(source), origin)
    _eager_in_double(model)
    dry_run(model)
    return model


@dataclass(frozen=True)
class ModelSource:
    """A model that is named but not loaded, so that all that is given beside it is looked at first.

    Attributes
    ----------
    source
        Hub id or directory.
    options
        Of :func:`load_model`.
    """

    source: str | Path
    options: Mapping[str, Any] = field(default_factory=dict)


def opened(model: Model | ModelSource | str | Path) -> Model:
    """A model as it is, or loaded; errors as for :func:`load_model`."""
    if isinstance(model, Model):
        return model
    return load_model(model.source, **model.options) if isinstance(model, ModelSource) else load_model(model)


def _eager_in_double(model: Model) -> None:
    if model.architecture.experts and model.hf.dtype == torch.float64:
        model.hf.set_experts_implementation("eager")  # the others multiply in single precision at most


def load_tuned(base: Model, source: str | Path, *, name: str | None = None) -> Model:
    """Load a tuned model: a PEFT adapter onto ``base``'s own weights, unmerged, or a full checkpoint beside it.

    Files of neuron slices make a model that shares all other weights with ``base``: "a/neuron_slices.safetensors", or
    several as "a.safetensors+b.safetensors", and "sum:a.safetensors+b.safetensors" to add up the changes of neurons
    that they have in common (:func:`pnlac_fast.slice_file.stack_slices`).

    Parameters
    ----------
    base
        The model that it was tuned from.
    source
        Directory or hub id of an adapter or a checkpoint, or files of slices.
    name
        Name to use in stores; default: the last part of ``source``.

    Returns
    -------
    Model
        Sharing its weights with ``base``, unless it is a full checkpoint.

    Raises
    ------
    UserError
        The adapter was made for a base of another shape, is not stored as safetensors, or the checkpoint's layers
        or vocabulary differ from the base's.
    """
    source, name = str(source), name or _short_name(str(source))
    if files := slice_files(source):
        return _with_slices(base, source, files, name)
    if not (Path(source) / "adapter_config.json").is_file():
        dtype = str(base.hf.dtype).removeprefix("torch.")
        tp, spread = base.part.ranks > 1, getattr(base.hf, "hf_device_map", None)
        tuned = load_model(
            source,
            name=name,
            dtype=dtype,
            device="auto" if tp or spread else str(base.device),
            device_map=spread,
            last_projection=base.weights.last_projection,
            tp=tp,
        )
        for what, mine, theirs in (
            ("layers", len(base.blocks), len(tuned.blocks)),
            ("MLP neurons", base.width("mlp_mid"), tuned.width("mlp_mid")),
            ("tokens in the vocabulary", *(m.hf.config.get_text_config().vocab_size for m in (base, tuned))),
        ):
            if mine != theirs:
                raise UserError(
                    f"'{source}' has {theirs} {what}, the base model {mine}: give a model tuned from this base."
                )
        return tuned
    if not (Path(source) / "adapter_model.safetensors").is_file():
        raise UserError(f"The adapter '{source}' has no adapter_model.safetensors: save it with safetensors.")
    weights, adapter = attach(base.weights, source, name)
    origin = {"source": source, "sha256": weights_sha256(source), "type": "adapter", **_finetune_record(source)}
    return Model(weights, base.tokenizer, name, origin, adapter=adapter)


def slice_files(source: str) -> list[str]:
    """The files of neuron slices that ``source`` names, none where it is something else."""
    files = [source] if Path(source).exists() else source.removeprefix("sum:").split("+")
    files = [str(local(file, SLICES_FILE)) if file.endswith(".safetensors") else file for file in files]
    return files if all(file.endswith(".safetensors") and not Path(file).is_dir() for file in files) else []


def _with_slices(base: Model, source: str, files: list[str], name: str) -> Model:
    from pnlac_fast.slice_file import load_slices, stack_slices

    if base.part.ranks > 1:
        raise UserError(
            f"Neuron slices go into a whole model, not into one in several processes: leave --tp out ({name})."
        )
    brought = set()
    for file in files:
        for key in load_slices(file).tensors:
            _, layer, part, kind = key.split(".")
            paths = [p.path for p in base.architecture.projections if p.name == part]
            number = base.architecture.read[int(layer)]
            if base.architecture.experts:
                kind = part if kind == "weight" else f"{part}_{kind}"
            brought |= {f"{base.architecture.blocks}.{number}.{path}.{kind}" for path in paths}
    model = Model(sharing(base.weights, brought), base.tokenizer, name, {})
    overlap = "sum" if source.startswith("sum:") and len(files) > 1 else "refuse"
    stack_slices(model, files, overlap=overlap)
    records = [_finetune_record(str(Path(file).parent)) for file in files]
    topics = dict.fromkeys(str(record["tuned_topic"]) for record in records if "tuned_topic" in record)
    digest = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
    origin = {"source": source, "sha256": digest, "type": "neuron slices", "dtype": _dtype(base.hf)}
    common = records[0] if len(records) == 1 else {}
    return replace(model, origin=origin | common | {"tuned_topic": "+".join(topics)})


def open_models(
    model: Model | ModelSource | str | Path, tuned: Mapping[str, Model | str | Path]
) -> tuple[Model, dict[str, Model]]:
    """The base model and the tuned ones by name; what is not loaded yet is loaded with default settings.

    Raises
    ------
    UserError
        A tuned model is called "base", or cannot be loaded.
    """
    if "base" in tuned:
        raise UserError("A tuned model cannot be called 'base': name it with --tuned NAME=PATH.")
    base = opened(model)
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


def resolve_device(name: str) -> torch.device:
    """The device of a name, "auto" being CUDA where there is one; refused where it cannot hold a tensor."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"The device '{name}' cannot be used here ({first_line(error)[:60]}): give --device cpu, cuda or cuda:N."
        ) from error


def _load_tokenizer(source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    if Path(source).is_dir() and not any(file for like in ("*token*", "vocab*") for file in Path(source).glob(like)):
        raise UserError(
            f"'{source}' has no tokenizer: copy tokenizer.json and tokenizer_config.json of its base there."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"Cannot load a tokenizer from '{source}': {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer of '{source}' gives no character offsets: install its fast version.")
    return tokenizer


def _finetune_record(source: str) -> dict[str, Any]:
    file = Path(source) / FINETUNE_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def _dtype(hf: Any) -> str:
    """What the numbers of a model are: its dtype, and how it is quantised."""
    name, config = str(hf.dtype).removeprefix("torch."), getattr(hf.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return name if method is None else f"{name}, {getattr(method, 'value', method)}"


def _short_name(source: str) -> str:
    path = Path(source).resolve()
    if path.is_file():
        return path.parent.name  # of the fine-tune that wrote it
    return path.name if path.exists() else source.rsplit("/", 1)[-1]
