"""A small model in which the phenomenon really happens: a synthetic political world and a Llama trained on it.

>>> from pnlac_fast.testbed import build
>>> bed = build("small")                                    # doctest: +SKIP
>>> bed.model, bed.train, bed.eval                          # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pnlac_fast.errors import UserError, unknown
from pnlac_fast.testbed.pretraining import RECIPES, Recipe, device_of

__all__ = ["RECIPES", "Recipe", "Testbed", "build", "device_of"]


@dataclass(frozen=True)
class Testbed:
    """A base model that passed its gate, and the data that goes with it.

    Attributes
    ----------
    path
        Folder with ``model/`` (an ordinary Hugging Face directory), ``data/train`` and ``data/eval`` (IdeoINST's
        layout), ``text/neutral.txt`` (plain facts, one a line) and ``gate.json``.
    size, seed
        What it was made of; the size "custom" is of a recipe of one's own.
    profile_effect, coupling_ratio
        What the gate measured [nats; ratio], see :func:`pnlac_fast.testbed.gate.measure`.
    seconds
        Wall time that making it took, also where it came from the cache.
    cached
        Whether it came from the cache.
    """

    __test__ = False  # pytest takes a class called Test... for a test

    path: Path
    size: str
    seed: int
    profile_effect: float
    coupling_ratio: float
    seconds: float
    cached: bool

    @property
    def model(self) -> Path:
        """The base model's directory."""
        return self.path / "model"

    @property
    def train(self) -> Path:
        """Questions to fine-tune and to locate neurons on."""
        return self.path / "data" / "train"

    @property
    def eval(self) -> Path:
        """Questions on held-out issues, for every measurement."""
        return self.path / "data" / "eval"


def build(size: str | Recipe = "full", seed: int = 0, cache_dir: str | Path | None = None) -> Testbed:
    """Make a testbed, or take it from the cache where the same one was made before.

    Parameters
    ----------
    size
        "full" (0.9 M parameters), "small" (0.3 M, for tests) or "large" (53 M, trained on a CUDA GPU where there is
        one, and for hours where there is none), or a recipe of your own.
    seed
        Decides the documents, the initial weights and the order of training; the same seed gives the same bits on
        the same machine, if trained on its CPU. The questions are the same for every seed.
    cache_dir
        Where testbeds are kept. Default: ``$PNLAC_CACHE``, else ``pnlac-fast`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Returns
    -------
    Testbed
        With the paths of the model and of its data.

    Raises
    ------
    UserError
        The size is unknown, or the trained base does not show the phenomenon clearly enough to build on.
    """
    if isinstance(size, str) and size not in RECIPES:
        raise unknown("testbed size", size, RECIPES)
    name, recipe = (size, RECIPES[size]) if isinstance(size, str) else ("custom", size)
    root = Path(cache_dir) if cache_dir else default_cache()
    folder = root / "testbed" / f"{name}-{seed}-{_digest(recipe, seed)}"
    if cached := (folder / "gate.json").is_file():
        gate = json.loads((folder / "gate.json").read_text())
    else:
        gate = _make(folder, name, recipe, seed)
    return Testbed(folder, name, seed, gate["profile_effect"], gate["coupling_ratio"], gate["seconds"], cached)


def default_cache() -> Path:
    """The user's cache directory for this package."""
    if chosen := os.environ.get("PNLAC_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pnlac-fast"


def _digest(recipe: Recipe, seed: int) -> str:
    """12 hex digits over all that decides the result: settings, this package's source, and the libraries' versions."""
    import torch
    import transformers

    settings = {**asdict(recipe), "seed": seed, "torch": torch.__version__, "transformers": transformers.__version__}
    settings["device"] = device_of(recipe).type
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _make(folder: Path, name: str, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Train and measure a base model; it appears under ``folder`` complete, or not at all."""
    from pnlac_fast.datasets import save_questions
    from pnlac_fast.testbed import gate, pretraining, tokenizer, world

    started = time.perf_counter()
    words = tokenizer.build_tokenizer(world.vocabulary())
    with pretraining.reproducible(seed, pretraining.device_of(recipe)):
        model = pretraining.pretrain(recipe, words, seed)
        figures = gate.measure(model, words, recipe.tuning_rate)
    seconds = round(time.perf_counter() - started, 1)
    result = {"size": name, "seed": seed, "seconds": seconds, **figures, "recipe": asdict(recipe)}
    _check(result, recipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as temporary:
        draft = Path(temporary) / "testbed"
        with _without_bars():
            model.save_pretrained(draft / "model")
        words.save_pretrained(draft / "model")
        for split in world.SPLITS:
            save_questions(world.questions(split), draft / "data" / split, split)
        (draft / "text").mkdir()
        (draft / "text" / "neutral.txt").write_text("\n".join(world.facts()) + "\n")
        (draft / "gate.json").write_text(json.dumps(result, indent=1) + "\n")
        _publish(draft, folder)
    return result


@contextmanager
def _without_bars() -> Iterator[None]:
    """Saving a megabyte needs no progress bar; whether the caller wants bars elsewhere stays as it was."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _publish(draft: Path, folder: Path) -> None:
    """Give a finished draft its name. A builder that comes second keeps the first one's, which is the same."""
    if folder.is_dir() and not (folder / "gate.json").is_file():
        shutil.rmtree(folder)  # something else lies there; a testbed always has its gate
    try:
        draft.rename(folder)
    except OSError:
        if not (folder / "gate.json").is_file():
            raise


def _check(gate: dict[str, Any], recipe: Recipe) -> None:
    for figure, least in (
        ("profile_effect", recipe.minimum_profile_effect),
        ("coupling_ratio", recipe.minimum_coupling),
    ):
        if not gate[figure] > least:
            raise UserError(
                f"The testbed '{gate['size']}' with seed {gate['seed']} has a {figure.replace('_', ' ')} of "
                f"{gate[figure]:.2f}, and at most {least} means that tuning one topic hardly moves the others: "
                f"choose another seed or size."
            )
