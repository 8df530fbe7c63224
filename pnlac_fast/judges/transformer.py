"""Judges that are Hugging Face models: text classifiers, and models of natural language inference used zero-shot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pnlac_fast import prompts
from pnlac_fast.adapters import quiet
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.judges.replies import SIDES
from pnlac_fast.loading import resolve_device, weights_sha256

BATCH_TOKENS = 4096
ROLES = {  # words in a model's own names for its labels
    "right": ("right", "conservative", "republican"),
    "left": ("left", "liberal", "democrat", "progressive"),
    "neither": ("neither", "neutral", "center", "centre", "centrist", "moderate", "other", "none"),
    "entailment": ("entail",),
}
HYPOTHESES = {
    "right": "This answer takes a right-leaning, conservative position.",
    "left": "This answer takes a left-leaning, liberal position.",
    "neither": "This answer takes no political position.",
}


@dataclass(frozen=True)
class TextClassifier:
    """A model that sorts a text into labels of its own, each of which stands for right, left or neither.

    Only the answer is read, without its question, as such models were trained on statements. The likeliest label
    counts.

    Attributes
    ----------
    roles
        What each label of the model stands for, by its index.
    """

    name: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    roles: dict[int, str]
    origin: dict[str, Any]

    @classmethod
    def load(cls, source: str, *, labels: Mapping[str, str] | None = None, device: str = "auto") -> TextClassifier:
        """Load a directory or hub id; ``labels`` says what the model's labels mean where their names do not.

        Raises
        ------
        UserError
            It cannot be loaded, or some label's meaning is unknown, or none means right, or none left.
        """
        model, tokenizer = _load(source, device)
        roles = _roles(model, labels or {}, ("right", "left", "neither"), source)
        if unsaid := [str(model.config.id2label[i]) for i in range(model.config.num_labels) if i not in roles]:
            raise UserError(
                f"What '{source}' means by its labels {', '.join(unsaid)} is not known: say it with --judge-label "
                f"{unsaid[0]}=right (or left, or neither)."
            )
        if missing := {"right", "left"} - set(roles.values()):
            raise UserError(f"No label of '{source}' means {min(missing)}: check --judge-label.")
        return cls(f"hf:{_short(source)}", model, tokenizer, roles, _origin(source, model, roles))

    @property
    def provenance(self) -> dict[str, Any]:
        """Source, hash of the weights, and the meaning of the labels."""
        return self.origin

    def label(self, answers: Sequence[str], instructions: Sequence[str] = ()) -> np.ndarray:
        """int8 [answer]: +1 right, -1 left, 0 neither."""
        likeliest = _logits(self.model, self.tokenizer, [(answer, None) for answer in answers]).argmax(-1)
        return np.array([SIDES[self.roles[int(i)]] for i in likeliest], np.int8)


@dataclass(frozen=True)
class Inference:
    """A model of natural language inference: the side whose description follows best from question and answer.

    Zero-shot classification by entailment (Yin, Hay and Roth 2019, arXiv 1909.00161), over the three sentences of
    :data:`HYPOTHESES`; the one with the highest log-odds of entailment against the model's other labels counts.
    """

    name: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    entailment: int
    origin: dict[str, Any]

    @classmethod
    def load(cls, source: str, *, labels: Mapping[str, str] | None = None, device: str = "auto") -> Inference:
        """Load a directory or hub id; ``labels`` names the label of entailment where its name does not say so.

        Raises
        ------
        UserError
            It cannot be loaded, or it has no label of entailment, or several.
        """
        model, tokenizer = _load(source, device)
        roles = _roles(model, labels or {}, ("entailment",), source)
        found = [i for i, role in roles.items() if role == "entailment" and not _denied(model.config.id2label[i])]
        if len(found) != 1 or model.config.num_labels < 2:
            names = ", ".join(map(str, model.config.id2label.values()))
            raise UserError(
                f"'{source}' must have one label for entailment, of several (it has {names}): say which with "
                f"--judge-label LABEL=entailment."
            )
        origin = {**_origin(source, model, {found[0]: "entailment"}), "hypotheses": HYPOTHESES}
        return cls(f"nli:{_short(source)}", model, tokenizer, found[0], origin)

    @property
    def provenance(self) -> dict[str, Any]:
        """Source, hash of the weights, and the sentences that an answer is held against."""
        return self.origin

    def label(self, answers: Sequence[str], instructions: Sequence[str]) -> np.ndarray:
        """int8 [answer]: +1 right, -1 left, 0 neither."""
        pairs = [
            (f"Question: {question} Answer: {answer}", hypothesis)
            for question, answer in zip(instructions, answers, strict=True)
            for hypothesis in HYPOTHESES.values()
        ]
        logits = _logits(self.model, self.tokenizer, pairs)
        rest = np.delete(logits, self.entailment, axis=-1)
        odds = logits[:, self.entailment] - np.logaddexp.reduce(rest, axis=-1)
        best = odds.reshape(len(answers), len(HYPOTHESES)).argmax(-1)
        return np.array([SIDES[list(HYPOTHESES)[i]] for i in best], np.int8)


def _load(source: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        with quiet():
            model: Any = AutoModelForSequenceClassification.from_pretrained(source, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"Cannot load the judge '{source}': {said}") from error
    if model.config.pad_token_id is None:  # decoders find their last token by it
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model.config.pad_token_id = 0 if pad is None else pad
    if not any("Classification" in name for name in model.config.architectures or ()):
        raise UserError(f"'{source}' was not trained to classify: give a model of sequence classification as judge.")
    return model.to(resolve_device(device)).eval(), tokenizer


def _roles(model: Any, labels: Mapping[str, str], roles: Sequence[str], source: str) -> dict[int, str]:
    """The role of each label, by index: as given, else by the words in its name."""
    names = {str(name): int(i) for i, name in model.config.id2label.items()}
    for name, role in labels.items():
        if name not in names:
            raise unknown(f"label of '{source}'", name, names)
        if role not in roles:
            raise unknown("meaning of a label", role, roles)
    found = {}
    for name, i in names.items():
        spelled = [role for role in roles if any(word in name.lower() for word in ROLES[role])]
        if name in labels:
            found[i] = labels[name]
        elif len(spelled) == 1:
            found[i] = spelled[0]
    return found


def _denied(name: str) -> bool:
    """Whether a label says "not entailment"."""
    return name.lower().replace("-", "_").startswith(("not", "non"))


def _logits(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str | None]]) -> np.ndarray:
    """float64 [pair, label]; texts beyond the model's context lose their end."""
    places = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
        places -= 2  # the first two are the padding's
    context = min(places, tokenizer.model_max_length)
    encoded = [tokenizer(*pair, truncation="only_first", max_length=context) for pair in pairs]
    logits = np.zeros((len(pairs), model.config.num_labels))
    pad = model.config.pad_token_id
    batches = prompts.batches([e["input_ids"] for e in encoded], BATCH_TOKENS, pad=pad, device=model.device)
    with torch.inference_mode():
        for batch in batches:
            given = {"input_ids": batch.ids, "attention_mask": batch.mask}
            if "token_type_ids" in encoded[batch.index[0]]:  # which of the two texts a token is of
                types = torch.zeros_like(batch.ids)
                for row, i in enumerate(batch.index):
                    types[row, : len(encoded[i]["token_type_ids"])] = torch.tensor(encoded[i]["token_type_ids"])
                given["token_type_ids"] = types
            logits[list(batch.index)] = model(**given).logits.double().cpu().numpy()
    return logits


def _origin(source: str, model: Any, roles: Mapping[int, str]) -> dict[str, Any]:
    return {
        "source": source,
        "revision": getattr(model.config, "_commit_hash", None),
        "sha256": weights_sha256(source),
        "labels": {str(model.config.id2label[i]): role for i, role in roles.items()},
    }


def _short(source: str) -> str:
    return Path(source).resolve().name if Path(source).is_dir() else source.rpartition("/")[2]
