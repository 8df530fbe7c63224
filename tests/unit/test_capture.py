"""Statistics equal an independent float64 computation, whatever the batches, the padding and the shortcuts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from pnlac_fast import store as stores
from pnlac_fast.architecture import SITES
from pnlac_fast.caching import cache
from pnlac_fast.capture import accumulate
from pnlac_fast.datasets import Question
from pnlac_fast.loading import load_model, load_tuned
from pnlac_fast.models import Model
from pnlac_fast.passes import SHORTCUTS, usable
from pnlac_fast.prompts import TOKENS, encode
from pnlac_fast.raw import COLUMNS, choose_kept

TEMPLATE = "Q : {instruction} A :"


def activations(model: Model, ids: list[int]) -> dict[str, np.ndarray]:
    """Per site [layer, position, neuron] of one text, read with plain hooks and no padding."""
    seen: dict[str, list[np.ndarray]] = {site: [] for site in SITES}
    hooks = []

    def keep_mlp(_: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen["mlp_mid"].append(inputs[0][0].numpy())
        seen["mlp_out"].append(output[0].numpy())

    for block in model.blocks:
        hooks.append(block.mlp.down_proj.register_forward_hook(keep_mlp))
        hooks.append(block.register_forward_hook(lambda _, i, o: seen["resid"].append(o[0].numpy())))
    with torch.no_grad(), model.active() as hf:
        hf(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return {site: np.stack(values).astype(np.float64) for site, values in seen.items()}


def texts_of(model: Model, question: Question) -> list[tuple[list[int], dict[str, list[int]]]]:
    """(ids, counted positions by selector) of the texts of one question, from first principles."""

    def ids(text: str) -> list[int]:
        return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])

    front = [*([1] if model.tokenizer.bos_token else []), *ids("Q :")]
    instruction, tail = ids(f" {question.instruction}"), ids(" A :")
    prompt = [*front, *instruction, *tail]
    # a piece that is only the space in front of the instruction belongs to the template
    start = len(front) + (not model.tokenizer.decode(instruction[0]).strip())
    own = list(range(start, len(front) + len(instruction)))
    found = []
    for first, text in enumerate([*question.right, *question.left]):
        answer = ids(f" {text}")
        behind = list(range(len(prompt), len(prompt) + len(answer)))
        once, last = (own, [len(prompt) - 1]) if first == 0 else ([], [])
        counted = {"last": last, "prompt": once, "completion": behind, "all": once + behind}
        found.append(([*prompt, *answer], counted))
    return found


def statistics(pairs: list[tuple[np.ndarray, np.ndarray, list[int]]]) -> dict[str, np.ndarray]:
    """Two-pass statistics of (base, tuned, counted positions), each activation [layer, position, neuron]."""
    first, second = (np.concatenate([pair[i][:, pair[2]] for pair in pairs], 1) for i in (0, 1))
    d = second - first
    return {
        "n": np.array(first.shape[1]),
        "mean_base": first.mean(1),
        "std_base": first.std(1),
        "mean_tuned": second.mean(1),
        "std_tuned": second.std(1),
        "mean_diff": d.mean(1),
        "std_diff": d.std(1),
        "rms": np.sqrt((d**2).mean(1)),
    }


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_statistics_equal_an_independent_computation(model_paths, questions, tmp_path: Path, kind: str) -> None:
    base = load_model(model_paths[kind], dtype="float64", device="cpu")
    tuned = load_tuned(base, model_paths[f"{kind}_tuned"])
    out = tmp_path / "s.zarr"
    cache(
        base,
        {"t": tuned},
        questions,
        out,
        sites=SITES,
        tokens=TOKENS,
        template=TEMPLATE,
        batch_tokens=90,
        unit_tokens=150,
    )
    with xr.open_zarr(out, group="contrast") as stored:
        assert stored["rms"].dims == ("model", "topic", "site", "tokens", "layer", "neuron")
        for topic in ("race", "economy"):
            texts = [text for q in questions if q.topic == topic for text in texts_of(base, q)]
            seen = [(activations(base, ids), activations(tuned, ids), counted) for ids, counted in texts]
            for tokens in TOKENS:
                for site in SITES:
                    truth = statistics([(a[site], b[site], counted[tokens]) for a, b, counted in seen])
                    there = stored.sel(topic=topic, site=site, tokens=tokens, model="t")
                    assert int(there["n"]) == truth["n"]
                    for name in list(truth)[1:]:
                        value = there[name].values[:, : base.width(site)]
                        scale = np.abs(truth[name]).max()
                        assert np.allclose(value, truth[name], rtol=1e-5, atol=1e-6 * scale), (
                            topic,
                            tokens,
                            site,
                            name,
                        )


@pytest.mark.parametrize("shortcuts", [(), ("share", "pack", "stop")])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_batches_and_padding_do_not_matter(model_paths, questions, side, batch_tokens: int, shortcuts) -> None:
    base = load_model(model_paths["llama"], dtype="float32", device="cpu")
    tuned = load_tuned(base, model_paths["llama_tuned"])
    texts = encode(base.tokenizer, questions[:7], TEMPLATE, side="both")
    reference = accumulate(base, {"t": tuned}, texts, tokens=TOKENS, batch_tokens=1, shortcuts=())
    base.tokenizer.padding_side = side
    sums = accumulate(base, {"t": tuned}, texts, tokens=TOKENS, batch_tokens=batch_tokens, shortcuts=shortcuts)
    assert sums.counts.tolist() == reference.counts.tolist()
    for mine, theirs in ((sums.base, reference.base), (sums.tuned, reference.tuned)):
        scale = np.abs(theirs["mlp_mid"]).max(-1, keepdims=True)
        assert (np.abs(mine["mlp_mid"] - theirs["mlp_mid"]) <= 1e-5 * scale).all()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("sites", "side", "raw"),
    [
        (("mlp_mid",), "both", "none"),
        (("mlp_out", "mlp_mid"), "none", "full"),
        (SITES, "left", "last"),
        (("mlp_mid",), "both", "pooled"),
    ],
)
def test_every_shortcut_changes_rounding_only(model_paths, questions, kind: str, sites, side: str, raw: str) -> None:
    base = load_model(model_paths[kind], dtype="float32", device="cpu")
    tuned = {"t": load_tuned(base, model_paths[f"{kind}_tuned"]), "again": base}
    texts = encode(base.tokenizer, questions[:7], TEMPLATE, side=side, count_template=True)
    options: dict[str, Any] = {"sites": sites, "tokens": TOKENS, "batch_tokens": 70}
    options["keep"] = choose_kept(base, sites, raw)
    plain = accumulate(base, tuned, texts, shortcuts=(), **options)
    assert set(usable(base, SHORTCUTS, longest=40)) == set(SHORTCUTS) - {"fuse"}  # which saves nothing on a CPU
    for shortcuts in (list(SHORTCUTS), *([name] if name != "share" else ["pack", "share"] for name in SHORTCUTS)):
        sums = accumulate(base, tuned, texts, shortcuts=shortcuts, **options)
        assert sums.counts.tolist() == plain.counts.tolist()
        for site in sites:
            for mine, theirs in ((sums.base[site], plain.base[site]), (sums.tuned[site], plain.tuned[site])):
                scale = np.abs(theirs).max(-1, keepdims=True)
                assert (np.abs(mine - theirs) <= 1e-5 * scale).all()
            score, wanted = (s.tuned[site][0, :, 2].reshape(len(TOKENS), -1) for s in (sums, plain))
            top = score.shape[1] // 10
            for row, truth in zip(score, wanted, strict=True):
                assert set(np.argsort(-row)[:top]) == set(np.argsort(-truth)[:top])
        if raw == "none":
            continue
        order, other = (np.lexsort(list(s.rows["counts"].T) + [s.rows[c] for c in COLUMNS]) for s in (sums, plain))
        for column in sums.rows:
            assert sums.rows[column][order].tolist() == plain.rows[column][other].tolist()
        for key, truth in plain.raw.items():
            assert np.allclose(sums.raw[key][:, order], truth[:, other], rtol=0, atol=1e-5 * np.abs(truth).max())


def test_shortcuts_save_the_work_they_name(model_paths, questions, monkeypatch) -> None:
    base = load_model(model_paths["llama"])
    tuned = {name: load_tuned(base, model_paths["llama_tuned"], name=name) for name in ("t", "u")}
    texts = encode(base.tokenizer, questions[:7], TEMPLATE, side="both")
    seen: dict[str, int] = {}

    def count(name: str, model: Model, module: torch.nn.Module) -> None:
        def add(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name] = seen.get(name, 0) + inputs[0].shape[:-1].numel()

        module.register_forward_pre_hook(add)

    count("first", base, base.blocks[0].mlp.down_proj)
    count("last", base, base.blocks[-1].mlp.gate_proj)
    count("behind", base, base.blocks[-1].mlp.down_proj)
    count("head", base, base.hf.lm_head)
    count("tuned", tuned["u"], tuned["u"].blocks[0].mlp.down_proj)

    def rows(shortcuts: Sequence[str]) -> dict[str, int]:
        seen.clear()
        accumulate(base, tuned, texts, batch_tokens=10_000, shortcuts=shortcuts)
        return dict(seen)

    own = sum(len(t.ids) for t in texts)
    padded = len(texts) * max(len(t.ids) for t in texts)
    distinct = len({t.ids[: n + 1] for t in texts for n in range(len(t.ids))})
    assert distinct < own / 2 < own < padded
    assert rows(["base"]) == dict.fromkeys(("first", "last", "behind", "head", "tuned"), padded)
    assert rows([]) == {
        "first": 2 * padded,
        "last": 2 * padded,
        "behind": 2 * padded,
        "head": 2 * padded,
        "tuned": padded,
    }
    assert rows(["base", "pack"])["first"] == own
    assert rows(["base", "pack", "share"])["first"] == distinct
    stopped = rows(["base", "pack", "share", "stop"])
    assert stopped["last"] == 7  # the last prompt position of each question
    assert "head" not in stopped
    assert stopped["tuned"] == distinct


def test_adapters_are_contrasted_on_shared_weights(model_paths, adapter_paths, questions, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    cache(model_paths["llama"], adapter_paths, questions, out, tokens=("prompt",))
    stored = stores.open_contrast(out)
    assert list(stored["model"].values) == ["race", "science"]
    base = load_model(model_paths["llama"])
    for name in adapter_paths:
        tuned = load_tuned(base, adapter_paths[name])
        group = [q for q in questions if q.topic == "science"]
        texts = [base.tokenizer(q.instruction)["input_ids"] for q in group]
        d = [activations(tuned, t)["mlp_mid"][:, 1:] - activations(base, t)["mlp_mid"][:, 1:] for t in texts]
        rms = np.sqrt((np.concatenate(d, 1) ** 2).mean(1))
        assert np.allclose(stored["rms"].sel(model=name, topic="science").values[0, 0], rms, rtol=1e-4, atol=1e-7)


def test_base_against_itself_is_exactly_zero(model_paths, questions, tmp_path: Path) -> None:
    cache(model_paths["llama"], {"again": model_paths["llama"]}, questions, tmp_path / "s.zarr")
    stored = stores.open_contrast(tmp_path / "s.zarr")
    assert float(abs(stored["rms"]).max()) == 0.0
    assert float(stored["std_base"].min()) > 0.0


@pytest.mark.parametrize("raw", ["last", "full"])
def test_raw_activations_are_the_models_own(model_paths, questions, tmp_path: Path, raw: str) -> None:
    base = load_model(model_paths["llama"])
    out = tmp_path / "s.zarr"
    tokens = ("all",) if raw == "full" else ("last",)
    cache(
        base, {"t": model_paths["llama_tuned"]}, questions, out, raw=raw, tokens=tokens, batch_tokens=40, unit_tokens=60
    )
    tuned = load_tuned(base, model_paths["llama_tuned"])
    for name, model in (("base", base), ("t", tuned)):
        stored = stores.open_activations(out, name, "mlp_mid").load()
        for index in (0, 9, 20):
            question = questions[index]
            row = stored.isel(token=(stored["example"].values == index).nonzero()[0])
            prompt = base.tokenizer(question.instruction)["input_ids"]
            assert set(row["topic"].values) == {question.topic}
            if raw == "last":
                assert row["position"].values.tolist() == [len(prompt) - 1]
            at = row["position"].values < len(prompt)
            truth = activations(model, prompt)["mlp_mid"][:, row["position"].values[at]]
            assert np.allclose(row["activation"].values[:, at], truth, rtol=1e-4, atol=1e-6)
            assert row["token_id"].values[at].tolist() == [prompt[p] for p in row["position"].values[at]]
            if raw == "full":
                answers = sum(
                    len(base.tokenizer(t, add_special_tokens=False)["input_ids"])
                    for t in question.right + question.left
                )
                assert row.sizes["token"] == len(prompt) + answers


def test_a_layer_that_does_not_run_is_an_error(model_paths, questions, tmp_path: Path) -> None:
    base = load_model(model_paths["llama"])
    tuned = load_tuned(base, model_paths["llama_tuned"])
    tuned.blocks[2].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(RuntimeError, match="skipped or run twice"):
        cache(base, {"t": tuned}, questions, tmp_path / "s.zarr")
