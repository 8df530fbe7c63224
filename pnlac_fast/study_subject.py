"""What a study is about: a base, its questions and a place; and which of its stages are done."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pnlac_fast.datasets import Question, fingerprint, load_questions
from pnlac_fast.loading import load_model
from pnlac_fast.models import Model
from pnlac_fast.prompts import DEFAULT_TEMPLATE
from pnlac_fast.study_plan import StudyPlan
from pnlac_fast.testbed import RECIPES, Testbed, device_of
from pnlac_fast.workplace import write_json

STAGES_FILE = "stages.json"
SMALL = 10_000_000  # parameters: on the CPU, matrices of such a model lose by threads


@dataclass(frozen=True, eq=False)
class Subject:
    """What one seed of a study is about, and where it is written; see :func:`pnlac_fast.study`.

    Attributes
    ----------
    tf32
        Whether a GPU may round the factors of float32 matrix products to TF32, as it does where the base was trained.
    """

    base: Model
    seed: int
    data: tuple[Question, ...]
    probe: tuple[Question, ...]
    out: Path
    text: str | Path | None = None
    template: str = DEFAULT_TEMPLATE
    jobs: int | None = None
    overwrite: bool = False
    progress: bool = True
    tf32: bool = False

    @property
    def origin(self) -> dict[str, Any]:
        """What decides every result besides the plan; not where the base and its texts lie."""
        texts = None if self.text is None else hashlib.sha256(Path(self.text).read_bytes()).hexdigest()
        known = {"data": fingerprint(self.data), "probe": fingerprint(self.probe), "text": texts}
        return {**self.base.identity, **known, "template": self.template}

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        """The stages that are there: a digest of what each was made from, and the seconds that it took."""
        file = self.out / STAGES_FILE
        return json.loads(file.read_text()) if file.is_file() else {}

    def once(self, stage: str, settings: Mapping[str, Any], make: Callable[[], Any]) -> None:
        """Do a stage, unless it was done with these settings."""
        said = json.dumps({**self.origin, **settings}, sort_keys=True, default=str)
        wanted = hashlib.sha256(said.encode()).hexdigest()
        if self.done.get(stage, {}).get("made_from") == wanted:
            return
        shown, started = None if self.progress else True, time.monotonic()
        with tqdm(total=1, desc=f"seed {self.seed}: {stage}", bar_format="{desc}: {elapsed}", disable=shown) as bar:
            make()
            bar.update()
        took = {"made_from": wanted, "seconds": round(time.monotonic() - started, 1)}
        write_json(self.out / STAGES_FILE, {**self.done, stage: took})

    @property
    def processes(self) -> int:
        """How many fine-tunes run at a time."""
        return self.jobs or (1 if self.base.device.type != "cpu" else min(4, os.cpu_count() or 1))

    @contextmanager
    def computing(self) -> Iterator[None]:
        """One thread where the model is small, so that other processes have the other cores; and TF32 where allowed."""
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        if self.base.device.type == "cpu" and sum(p.numel() for p in self.base.hf.parameters()) < SMALL:
            torch.set_num_threads(1)
        if self.tf32:
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)


def testbed_subject(bed: Testbed, out: Path, **options: Any) -> Subject:
    """The embedded testbed as what a study is about."""
    recipe = RECIPES[bed.size]
    # Fine-tunes run where the base was trained; on the CPU the bits are the same on every machine of a kind.
    base = load_model(bed.model, name="testbed", dtype="float32", device=device_of(recipe).type)
    data, probe = load_questions(bed.train), load_questions(bed.eval)
    options |= {"text": bed.path / "text" / "neutral.txt", "tf32": base.device.type == "cuda"}
    return Subject(base, bed.seed, data, probe, out, **options)


def testbed_plan(plan: StudyPlan, size: str) -> StudyPlan:
    """A plan with its learning rates, which are those of the full testbed, brought to another size."""
    factor = RECIPES[size].tuning_rate / RECIPES["full"].tuning_rate

    def scaled(options: Mapping[str, Any]) -> dict[str, Any]:
        if "learning_rate" not in options:
            return dict(options)
        rates = np.multiply(options["learning_rate"], factor).tolist()  # of one rate or a list
        return {**options, "learning_rate": rates}

    methods = {name: scaled(options) for name, options in plan.methods.items()}
    return replace(plan, finetune=scaled(plan.finetune), methods=methods)
