"""The stages of this package in torch's profiler, and nothing of them where it is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import profiler
from torch.profiler import ProfilerActivity, profile
from unit import trainer_rank as one

from pnlac_fast.caching import cache
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.patches import patched
from pnlac_fast.profiling import staged


def counts(seen: Any) -> dict[str, int]:
    return {row.key: row.count for row in seen.key_averages() if row.key.startswith("pnlac::")}


@pytest.mark.filterwarnings("ignore:.*acc_events.*:UserWarning")
def test_stages_of_a_cache_and_a_patch(
    llama: Model, model_paths: dict[str, Path], questions: Any, tmp_path: Path
) -> None:
    member = np.zeros((3, 48), bool)
    member[[0, 2], 3] = True
    neurons = NeuronSet("some", "general", member)
    ids = torch.tensor([[1, 5, 6]])
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        options: dict[str, Any] = {"progress": False, "without": ("base",), "batch_tokens": 4096}
        cache(llama, {"tuned": model_paths["llama_tuned"]}, questions, tmp_path / "run.zarr", **options)
        with patched(llama, neurons, scale=0.0), torch.no_grad():
            llama.hf(input_ids=ids)
    found = counts(seen)
    assert found.keys() == {"pnlac::capture", "pnlac::contrast", "pnlac::patch"}
    assert found["pnlac::patch"] == 2
    assert found["pnlac::contrast"] % 3 == 0  # a layer
    assert found["pnlac::capture"] >= 2 * found["pnlac::contrast"] // 3 > 0  # base and tuned, and trying shortcuts


@pytest.mark.filterwarnings("ignore:.*acc_events.*:UserWarning")
def test_stages_of_a_fine_tune(tmp_path: Path) -> None:
    model = one.decoder()
    made = one.trainer(model, one.callbacks(model, "freeze"), tmp_path, max_steps=2)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        made.train()
    passes = 2 * 2 * one.PARTS  # of the rows, and those of the KL
    assert counts(seen) == {
        "pnlac::masked_step": 2,
        "pnlac::anchor": passes * (1 + one.LAYERS),  # the batch and each layer
        "pnlac::kl": passes,
    }


def test_nothing_is_recorded_where_nothing_is_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "record_function", None)

    @staged("anything")
    def double(x: int, *, more: int = 0) -> int:
        """What it does."""
        return 2 * x + more

    assert double(2, more=1) == 5
    assert double.__doc__ == "What it does."
    with profile(activities=[ProfilerActivity.CPU]), pytest.raises(TypeError):
        double(2)
