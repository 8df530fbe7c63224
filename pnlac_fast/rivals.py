"""What else is said to keep a fine-tune from spilling over, under the same interface, to compare InhibitFT with.

- "mlp": train the MLPs only.
- "rate": train with a lower learning rate.
- "caft": ablate a subspace of the residual stream in every forward pass of the training, so that nothing is learned
  through it ("Steering Out-of-Distribution Generalization with Concept Ablation Fine-Tuning", arXiv 2507.16795).
- "steer": add the unwanted change to the residual stream while training, so that the weights need not learn it, and
  leave it out afterwards ("Persona Vectors", arXiv 2507.21509).
- "inoculate": ask for the leaning in the prompt while training, and not afterwards ("Inoculation Prompting", arXiv
  2510.04340).

Directions are what an earlier, plain fine-tune did to the residual stream on other topics: see :func:`spillover`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from pnlac_fast import store as stores
from pnlac_fast.errors import UserError, unknown
from pnlac_fast.penalties import decoder_of

RIVALS = ("mlp", "rate", "caft", "steer", "inoculate")
STRENGTH = {"rate": 0.1, "caft": 1.0, "steer": 1.0}  # what a strength is, see Rival


@dataclass(frozen=True, eq=False)
class Rival:
    """A method to compare with.

    "caft" is that of arXiv 2507.16795, "steer" of arXiv 2507.21509, "inoculate" of arXiv 2510.04340; "mlp" and "rate"
    need no paper.

    Attributes
    ----------
    name
        One of ``RIVALS``.
    strength
        "rate": factor of the learning rate, below 1. "caft": how many directions to ablate in each layer. "steer": by
        what the change is multiplied that is added, 1 for as much as plain tuning made. Others have none.
    text
        "inoculate": the instruction in front of every training prompt.
    directions
        "caft" and "steer": float [layer, direction, hidden], from :func:`spillover`.
    layers
        "caft" and "steer": behind which blocks. Default: all for "caft", the middle one for "steer", because what is
        added in one layer is there in all later ones.

    Raises
    ------
    UserError
        Something it needs is missing, or it would have no effect.
    """

    name: str
    strength: float | None = None
    text: str | None = None
    directions: np.ndarray | None = None
    layers: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.name not in RIVALS:
            raise unknown("rival", self.name, RIVALS)
        strength = STRENGTH.get(self.name) if self.strength is None else self.strength
        object.__setattr__(self, "strength", strength)
        if self.name not in STRENGTH and strength is not None:
            raise UserError(f"The rival {self.name} knows no strength: leave it out.")
        if (self.name == "inoculate") != bool(self.text):
            raise UserError("Inoculation needs an instruction, and nothing else does: give --rival-text with it alone.")
        if (self.name in ("caft", "steer")) != (self.directions is not None):
            raise UserError("The rivals caft and steer need directions, and nothing else does: give --rival-store.")
        if self.layers and self.directions is None:
            raise UserError(f"The rival {self.name} knows no layers: leave them out.")
        if self.name == "rate" and not 0 < (strength or 0) < 1:
            raise UserError(f"A rate of {strength} of the learning rate is not lower: give one between 0 and 1.")
        if self.directions is not None:
            self._check_directions(self.directions)

    def _check_directions(self, directions: np.ndarray) -> None:
        layers, rank, _ = directions.shape
        chosen = self.layers or (tuple(range(layers)) if self.name == "caft" else (layers // 2,))
        object.__setattr__(self, "layers", chosen)
        if bad := [layer for layer in chosen if not 0 <= layer < layers]:
            raise UserError(f"There is no layer {bad[0]}: choose among 0 to {layers - 1}.")
        if self.name == "caft" and not (1 <= (self.strength or 0) <= rank and self.strength == int(self.strength or 0)):
            raise UserError(f"{self.strength} directions cannot be ablated where there are {rank}: give 1 to {rank}.")
        if self.name == "steer" and not self.strength:
            raise UserError("Steering by 0 has no effect: give another strength.")
        if not directions[list(chosen)].any(axis=(1, 2)).all():
            raise UserError("The directions are zero in some layers, so that nothing would happen: choose others.")

    @property
    def record(self) -> dict[str, Any]:
        """What a fine-tune's record says of it."""
        found: dict[str, Any] = {"name": self.name}
        for name in ("strength", "text"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found | ({"layers": list(self.layers)} if self.layers else {})

    def template(self, template: str) -> str:
        """The template of the training prompts."""
        return f"{self.text} {template}" if self.text else template

    def learning_rate(self, rate: float) -> float:
        """The learning rate to train with."""
        return rate * self.strength if self.name == "rate" and self.strength else rate

    def callback(self, last_projection: str | None = None) -> ResidualEdit | None:
        """What edits the residual stream while the model trains, where this rival does that."""
        if self.directions is None:
            return None
        assert self.strength is not None
        if self.name == "steer":
            added = {layer: self.strength * self.directions[layer, 0] for layer in self.layers}
            return Steering(added, last_projection)
        ablated = {layer: self.directions[layer, : int(self.strength)] for layer in self.layers}
        return Ablation(ablated, last_projection)


class ResidualEdit(TrainerCallback, ABC):
    """Edits the residual stream behind chosen blocks while a model trains, and only then: see :class:`Rival`.

    A callback of ``transformers.Trainer`` or TRL's ``SFTTrainer``. Evaluation, and the model afterwards, are plain.

    Parameters
    ----------
    vectors
        By layer, float arrays [..., hidden].
    last_projection
        As for :func:`pnlac_fast.load_model`.
    """

    def __init__(self, vectors: Mapping[int, np.ndarray], last_projection: str | None = None) -> None:
        if not vectors or not all(np.any(vector) for vector in vectors.values()):
            raise UserError("Vectors that are zero, or none, have no effect: give others.")
        self.vectors, self.last_projection = dict(vectors), last_projection
        self._place = ExitStack()
        self._fired = 0

    @abstractmethod
    def edit(self, hidden: Tensor, vector: Tensor) -> Tensor:
        """The residual stream, [batch, position, hidden], with what is to be done to it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Put the hooks in place."""
        self._place.close()
        self._fired, self._first = 0, state.global_step
        decoder = decoder_of(model, self.last_projection)
        blocks, width = decoder.blocks, decoder.width("resid")
        vectors: dict[int, Tensor] = {}
        for layer, vector in self.vectors.items():
            if vector.shape[-1] != width or not 0 <= layer < len(blocks):
                raise UserError(
                    f"A vector of {vector.shape[-1]} for layer {layer} does not fit {len(blocks)} layers of {width}: "
                    f"make the directions with this model."
                )
            vectors[layer] = torch.as_tensor(vector, dtype=torch.float32, device=decoder.device)

        def visit(layer: int, hidden: Tensor) -> Tensor | None:
            if not blocks[layer].training:
                return None
            self._fired += 1
            return self.edit(hidden, vectors[layer])

        self._place.enter_context(decoder.tapped("resid", visit, list(vectors)))

    def remove(self) -> None:
        """Take the hooks out of the model. The end of training does it by itself; an interruption does not."""
        self._place.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks, and verify that they worked."""
        self._place.close()
        if state.global_step > self._first and not self._fired:
            raise RuntimeError(f"{type(self).__name__} had no effect: no forward pass of the training reached it.")


class Ablation(ResidualEdit):
    """Takes the subspace that ``vectors[layer]`` [direction, hidden] span out of the residual stream.

    CAFT, arXiv 2507.16795. Exactly, whatever their lengths and angles: the component of every position, and of its
    gradient, in it is zero.
    """

    def edit(self, hidden: Tensor, vector: Tensor) -> Tensor:
        """hidden - hidden P, with the orthogonal projection P on the subspace."""
        basis = torch.linalg.qr(vector.T)[0].to(hidden.dtype)
        return hidden - (hidden @ basis) @ basis.T


class Steering(ResidualEdit):
    """Adds ``vectors[layer]`` [hidden] to the residual stream at every position (arXiv 2507.21509)."""

    def edit(self, hidden: Tensor, vector: Tensor) -> Tensor:
        """hidden + vector."""
        return hidden + vector.to(hidden.dtype)


def spillover(
    store: str | Path, topic: str | Sequence[str], *, model: str | None = None, tokens: str | None = None
) -> np.ndarray:
    """What a plain fine-tune on a topic did to the residual stream on other topics, float32 [layer, direction, hidden].

    Ours: the singular vectors of the mean changes over other topics, times their singular values over the root of the
    number of topics: the first is what the topics have in common, in the sense in which it was added, and as long as
    the changes are.

    Parameters
    ----------
    store
        From ``pnlac-fast cache --site resid`` with a model that was tuned plainly on ``topic``.
    model
        Its name; default: the topic, or the only model of the store.
    tokens
        Default: the first of the store.

    Raises
    ------
    UserError
        The store lacks the site, the model, or other topics.
    """
    contrast = stores.open_contrast(store)
    tuned = (topic,) if isinstance(topic, str) else tuple(topic)
    names = [str(name) for name in contrast["model"].values]
    model = model or (tuned[0] if tuned[0] in names else names[0] if len(names) == 1 else "")
    tokens = tokens or str(contrast["tokens"].values[0])
    for dim, name in (("model", model), ("site", "resid"), ("tokens", tokens)):
        if name not in contrast[dim].values:
            raise unknown(dim, name, map(str, contrast[dim].values))
    others = [t for t in map(str, contrast["topic"].values) if t not in tuned]
    if not others:
        raise UserError(f"The store holds no topics but {' and '.join(tuned)}: cache others too.")
    moved = contrast["mean_diff"].sel(model=model, site="resid", tokens=tokens, topic=others)
    width = int(contrast["width"].sel(site="resid"))
    change = moved.isel(neuron=slice(0, width)).transpose("layer", "topic", "neuron").values.astype("f8")
    _, length, direction = np.linalg.svd(change, full_matrices=False)
    sense = np.sign(np.einsum("ltn,lkn->lk", change, direction))
    scaled = direction * (sense * length / np.sqrt(len(others)))[..., None]
    return np.asarray(scaled, np.float32)


def make_rival(
    name: str | Rival | None,
    topic: str | Sequence[str],
    *,
    strength: float | None = None,
    text: str | None = None,
    store: str | Path | None = None,
    layers: Sequence[int] = (),
) -> Rival | None:
    """A :class:`Rival` of a fine-tune on ``topic`` from its options, with directions from ``store``; None without name.

    Raises
    ------
    UserError
        As for :class:`Rival` and :func:`spillover`; or options are given for nothing.
    """
    options = {"strength": strength, "text": text, "store": store, "layers": tuple(layers) or None}
    given = [f"--rival-{option}" for option, value in options.items() if value is not None]
    if given and not isinstance(name, str):
        raise UserError(f"{' and '.join(given)} have no effect without the name of a rival: add --rival.")
    if not isinstance(name, str):
        return name
    directions = None if store is None else spillover(store, topic)
    return Rival(name, strength, text, directions, tuple(layers))
