"""On a GPU the whole way, from cached statistics to a fine-tune with frozen neurons, gives what the CPU gives.

With TRITON_INTERPRET=1 the kernels run on the CPU instead, which tries the tests themselves.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from pnlac_fast import anchoring
from pnlac_fast.benchmarking.mixture_step import make_mixture
from pnlac_fast.benchmarking.workloads import make_workload
from pnlac_fast.caching import cache
from pnlac_fast.capture import accumulate
from pnlac_fast.datasets import Question
from pnlac_fast.loading import load_model
from pnlac_fast.localize import locate
from pnlac_fast.neurons import NeuronSet
from pnlac_fast.passes import SHORTCUTS
from pnlac_fast.slices import slice_neurons
from pnlac_fast.training import finetune

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("torch finds no CUDA device here", allow_module_level=True)

DEVICE = "cpu" if INTERPRETED else "cuda"
# Where, and by which engine.
PLACES = {"cpu": ("cpu", "torch"), "gpu": (DEVICE, "triton")}
FROZEN = {0: [1, 5, 40], 2: [0, 47]}


def chosen() -> NeuronSet:
    member = np.zeros((3, 48), bool)
    for layer, neurons in FROZEN.items():
        member[layer, neurons] = True
    return NeuronSet("some", "general", member)


def contrasts(paths: dict[str, Path], kind: str, place: str, questions: tuple[Question, ...], out: Path) -> xr.Dataset:
    device, engine = PLACES[place]
    base, tuned = (load_model(paths[name], dtype="float32", device=device) for name in (kind, f"{kind}_tuned"))
    cache(base, {"race": tuned}, questions, out, tokens=("last", "all"), engine=engine)
    return xr.open_zarr(out, group="contrast").load()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_statistics_and_neurons_are_those_of_the_cpu(
    kind: str, model_paths: dict[str, Path], questions: tuple[Question, ...], tmp_path: Path
) -> None:
    stores = {place: tmp_path / f"{place}.zarr" for place in PLACES}
    found = {place: contrasts(model_paths, kind, place, questions, out) for place, out in stores.items()}
    for name in found["cpu"].data_vars:
        wanted, got = found["cpu"][name].values, found["gpu"][name].values
        if np.issubdtype(wanted.dtype, np.floating):
            # TF32 is off unless someone turns it on; float32 in another order differs in the last digits.
            np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5, err_msg=str(name))
        else:
            np.testing.assert_array_equal(got, wanted, err_msg=str(name))
    sets = [locate(out, top=0.3, tokens="all")["race"].top for out in stores.values()]
    for topic, top in sets[0].items():
        # A neuron on the edge may fall to either side.
        assert (top.member != sets[1][topic].member).mean() < 0.02


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_fine_tune_freezes_the_same_neurons_and_ends_where_the_cpu_does(
    method: str, model_paths: dict[str, Path], questions: tuple[Question, ...]
) -> None:
    ends = []
    for device, _ in PLACES.values():
        base = load_model(model_paths["llama"], dtype="float32", device=device)
        made = finetune(base, questions, "race", "right", method=method, steps=4, inhibit=chosen())
        ends.append({name: p.detach().cpu() for name, p in made.model.hf.named_parameters()})
        if method == "full":
            for layer, neurons in FROZEN.items():
                for name in ("gate_proj", "up_proj"):
                    before = base.hf.model.layers[layer].mlp.get_submodule(name).weight.detach().cpu()
                    after = ends[-1][f"model.layers.{layer}.mlp.{name}.weight"]
                    assert torch.equal(after[neurons], before[neurons])
                    assert not torch.equal(after, before)
    same(*ends)


@pytest.mark.parametrize("mode", ["anchor", "anchor from the host", "kl", "specific", "specific,nullspace"])
def test_every_other_mode_ends_where_the_cpu_does(
    mode: str, model_paths: dict[str, Path], questions: tuple[Question, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "anchor from the host":
        monkeypatch.setattr(anchoring, "ON_DEVICE", 0)
    moved = []
    for device, _ in PLACES.values():
        base = load_model(model_paths["llama"], dtype="float32", device=device)
        made = finetune(
            base,
            questions,
            "race",
            "right",
            method="full",
            steps=4,
            inhibit=None if mode == "kl" else chosen(),
            inhibit_mode=mode.split()[0],
            other_texts="prompts",  # answers are sampled, and other devices draw others
        )
        pairs = zip(made.model.hf.parameters(), base.hf.parameters(), strict=True)
        moved.append(torch.cat([(after - old).detach().flatten().cpu() for after, old in pairs]))
    # As a whole: AdamW moves an entry whose gradient is all rounding as far as any other.
    assert float((moved[1] - moved[0]).norm()) < 0.02 * float(moved[0].norm())
    assert moved[0].any()


@pytest.mark.skipif(INTERPRETED, reason="no kernel of this package is in it")
@pytest.mark.parametrize("length", [3, 128])  # with few tokens some experts have none
def test_slices_of_experts_have_the_gradients_of_the_cpu(length: int) -> None:
    hf, neurons, batch = make_mixture("test", device="cpu", dtype="float32", share=0.2)
    found = []
    for device in ("cpu", DEVICE):
        model = copy.deepcopy(hf).to(device)
        slices = slice_neurons(model, neurons)
        model(**{name: ids[:2, :length].to(device) for name, ids in batch.items()}).loss.backward()
        found.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
        assert len(found[-1]) == len(slices.parameters()) > 0
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-3, atol=1e-6)


def test_adapters_are_switched_as_on_the_cpu() -> None:
    """Six adapters on one copy of the weights, read in turn with packs and without."""
    found = []
    for device in ("cpu", DEVICE):
        work = make_workload("test", questions=3, device="cpu", dtype="float32", kind="adapter")
        work.base.hf.to(device)
        for text in work.texts.values():
            sums = accumulate(work.base, work.tuned, text, tokens=("last", "all"), shortcuts=tuple(SHORTCUTS))
            found.append(sums.tuned["mlp_mid"])
            plain = accumulate(work.base, work.tuned, text, tokens=("last", "all"), shortcuts=())
            np.testing.assert_allclose(found[-1], plain.tuned["mlp_mid"], rtol=1e-3, atol=1e-5)
    half = len(found) // 2
    for on_cpu, on_gpu in zip(found[:half], found[half:], strict=True):
        np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-3, atol=1e-5)
        assert len({row.tobytes() for row in on_gpu}) == len(on_gpu)  # every adapter has activations of its own


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, wanted in one.items():
        torch.testing.assert_close(other[name], wanted, rtol=1e-2, atol=1e-3)
