"""The benchmarks measure what they say: the same statistics, questions as described, ratios within a round."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pnlac_fast.benchmarking import baselines, contrast_kernel, localise, memory, overhead, peers
from pnlac_fast.benchmarking.agreement import Statistics, distance, of_captures
from pnlac_fast.benchmarking.timing import interleaved, ratio, use_clock
from pnlac_fast.benchmarking.workloads import OWN, SHAPES, TOPICS, Workload, make_questions, make_workload
from pnlac_fast.errors import UserError
from pnlac_fast.models import Model
from pnlac_fast.ops import engines


@pytest.fixture(scope="module")
def workload() -> Workload:
    return make_workload("test", tuned=2, questions=3)


def test_prompts_are_like_those_of_ideoinst() -> None:
    work = make_workload("test", tuned=1, questions=40)
    assert tuple(work.texts) == TOPICS
    unknown = work.base.tokenizer.unk_token_id
    for group in work.texts.values():
        prefix = next(n for n in range(200) if len({text.ids[: n + 1] for text in group}) > 1)
        assert prefix == 76
        own = [len(text.ids) - prefix for text in group]
        assert OWN[0] <= min(own) < max(own) <= OWN[1]
        assert all(unknown not in text.ids for text in group)
    first = [group[0].ids for group in work.texts.values()]
    assert next(n for n in range(200) if len({ids[: n + 1] for ids in first}) > 1) < 10  # topics share next to nothing
    assert make_questions(2) == make_questions(2) != make_questions(2, seed=1)


def test_the_same_arguments_make_the_same_models(workload: Workload) -> None:
    again = make_workload("test", tuned=2, questions=3)
    for name in workload.tuned:
        mine, other = (w.tuned[name].hf.state_dict() for w in (workload, again))
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    one, two = (model.hf.model.layers[0].mlp.up_proj.weight for model in workload.tuned.values())
    base = workload.base.hf.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(one, two)
    assert float((one - base).std() / base.std()) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_all_ways_find_the_same(kind: str) -> None:
    work = make_workload("test", tuned=1, questions=3, kind=kind)
    ways = {"released": baselines.released(work), "ours": localise.ours(work)}
    localise.check(work, ways)
    change = np.sqrt(of_captures(ways["ours"]()).sums[0, :, 0, 4])
    assert change.min() > 0  # the tuned model differs from base, or the comparison would say little


def test_the_paper_s_way_is_right_from_first_principles(workload: Workload) -> None:
    found = baselines.released(workload.first(1, 1))()
    text = workload.texts["race"][0]
    rows = list(text.positions("prompt"))
    seen: list[list[torch.Tensor]] = []
    for model in (workload.base, workload.tuned["tuned-crime"]):
        seen.append([])
        with torch.no_grad(), model.tapped("mlp_mid", lambda _, a: seen[-1].append(a[0].double())):
            model.hf(input_ids=torch.tensor([text.ids]))
    for layer, (a, b) in enumerate(zip(*seen, strict=True)):
        a, b = a[rows], b[rows]
        expected = torch.stack([a.sum(0), b.sum(0), (a * a).sum(0), (b * b).sum(0), ((b - a) ** 2).sum(0)])
        assert np.allclose(found.sums[0, TOPICS.index("race"), 0, :, layer], expected, rtol=1e-9, atol=1e-12)
    assert found.counts[TOPICS.index("race")].tolist() == [len(rows), 1]


def test_a_way_that_finds_something_else_is_not_timed(workload: Workload) -> None:
    def wrong() -> Statistics:
        right = of_captures(localise.ours(workload)())
        sums = right.sums.copy()
        sums[0, 1, 0, 4, 1, 5] *= 1.5
        return dataclasses.replace(right, sums=sums)

    with pytest.raises(RuntimeError, match=r"'wrong' differs by .* no timing"):
        localise.check(workload, {"ours": localise.ours(workload), "wrong": wrong})


def test_distance_sees_each_figure_and_is_nan_for_nan(workload: Workload) -> None:
    figures = of_captures(localise.ours(workload)()).figures()
    assert distance(figures, figures) == 0
    for name in figures:
        other = figures | {name: figures[name] * 1.01 + 1e-3}
        assert distance(figures, other) > 1e-4
    assert np.isnan(distance(figures, figures | {"rms": figures["rms"] * np.nan}))


def hooked(scale: float) -> Callable[[Model], peers.Reader]:
    """A peer that is plain hooks; ``scale`` other than 1 makes it wrong."""

    def wrap(model: Model) -> peers.Reader:
        def read(batch: baselines.Padded) -> list[torch.Tensor]:
            seen: list[torch.Tensor] = []
            with model.tapped("mlp_mid", lambda _, a: seen.append(scale * a)):
                model.hf(**batch.inputs())
            return seen

        return read

    return wrap


def broken(model: Model) -> peers.Reader:
    raise AttributeError("LlamaModel has no h\nsecond line")


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_peers_that_run_and_agree_are_timed_and_the_others_say_why_not(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    named = {"json": hooked(1), "csv": hooked(1.01), "ast": broken, "no_such_module": hooked(1)}
    monkeypatch.setattr(peers, "PACKAGES", named)  # the names of modules that exist, and of one that does not
    work = make_workload("test", tuned=1, questions=7, kind=kind)  # 42 prompts: the second batch is a small one
    found = localise.measure(work, repeats=1)["peers"]
    assert found["json"]["repeats"] == 1
    assert found["no_such_module"] == "not installed"
    assert found["ast"] == "AttributeError: LlamaModel has no h"
    assert "'csv' differs by" in found["csv"]


@pytest.mark.parametrize("name", peers.PACKAGES)
def test_an_installed_peer_agrees(name: str, workload: Workload) -> None:
    pytest.importorskip(name)
    ready, absent = peers.prepare(workload.first(1))
    assert name not in absent
    localise.check(workload.first(1), {"ours": localise.ours(workload.first(1)), name: ready[name]})


def test_the_floor_runs_both_models_over_every_token_with_the_head(workload: Workload) -> None:
    seen: list[torch.Size] = []
    models = (workload.base, workload.tuned["tuned-crime"])
    hooks = [m.hf.lm_head.register_forward_hook(lambda _, i, o: seen.append(o.shape)) for m in models]
    baselines.floor(workload)()
    for hook in hooks:
        hook.remove()
    longest = max(len(text.ids) for group in workload.texts.values() for text in group)
    assert seen == [torch.Size([18, longest, SHAPES["test"].vocabulary])] * 2


def test_the_bare_passes_run_every_token_that_capture_runs(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    one = workload.first(1)
    models = [m.hf.model for m in (one.base, *one.tuned.values())]
    for model in models:
        real = model.forward

        def counted(*args: object, real: Callable[..., object] = real, **kwargs: object) -> object:
            read.append(tuple(kwargs["input_ids"].flatten().tolist()))  # type: ignore[attr-defined]
            return real(*args, **kwargs)

        monkeypatch.setattr(model, "forward", counted)
    passes: list[list[tuple[int, ...]]] = []
    for way in (overhead.bare(one), overhead.capturing(one, overhead.PLAIN)):
        read: list[tuple[int, ...]] = []
        way()
        passes.append(read)
    assert passes[0] == passes[1]
    assert sum(map(len, passes[0])) < 2 * one.tokens  # shared fronts once


def test_capture_that_disagrees_with_the_fused_kernel_is_not_timed(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = overhead.capturing

    def wrong(work: Workload, shortcuts: tuple[str, ...]) -> Callable[[], object]:
        return real(work if "fuse" in shortcuts else work.first(1, 1), shortcuts)

    monkeypatch.setattr(overhead, "capturing", wrong)
    with pytest.raises(RuntimeError, match="Hooks and the fused kernel differ"):
        overhead.measure(workload, repeats=1)


def test_every_way_runs_once_a_round_and_none_is_always_first() -> None:
    ran: list[str] = []
    ways = {name: lambda name=name: ran.append(name) for name in "abc"}
    seconds = interleaved(ways, 3)
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab"
    assert {len(s) for s in seconds.values()} == {3}
    ran.clear()
    assert interleaved({"a": lambda: ran.append("a")}, 1, before=lambda: time.sleep(0.2))["a"][0] < 0.2
    interleaved(ways, 1, before=lambda: ran.append("-"), warm=False)
    assert "".join(ran) == "aa-a-b-c"


def test_the_clock_can_be_the_processor_s() -> None:
    with use_clock("cpu"):
        asleep = interleaved({"a": lambda: time.sleep(0.2)}, 1, warm=False)["a"][0]
    awake = interleaved({"a": lambda: time.sleep(0.2)}, 1, warm=False)["a"][0]
    assert asleep < 0.2 <= awake


def test_a_ratio_is_taken_within_each_round() -> None:
    assert ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "repeats": 3}
    assert ratio([1.0], [2.0], factor=3)["median"] == 1.5


def test_the_contrast_kernel_is_compared_in_both_dtypes() -> None:
    found = contrast_kernel.measure(repeats=2, device="cpu", rows=40, neurons=70, groups=3)
    for dtype in ("float32", "bfloat16"):
        beside = {"read_vs_ours"} if engines()["cpp"] == "available" else set()
        assert found[dtype].keys() == {"torch_vs_ours", "numpy_vs_ours"} | beside
        assert all(figures["repeats"] == 2 for figures in found[dtype].values())


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = contrast_kernel.contrast

    def wrong(base: torch.Tensor, tuned: torch.Tensor, *rest: torch.Tensor) -> None:
        real(base, tuned.roll(1, 0), *rest)

    monkeypatch.setattr(contrast_kernel, "contrast", wrong)
    with pytest.raises(RuntimeError, match=r"The contrast of 'ours' in float32"):
        contrast_kernel.measure(repeats=1, device="cpu", rows=40, neurons=70, groups=3)


def test_memory_is_that_of_the_run_alone() -> None:
    peak = memory._in_a_process("floor", 2, "cpu", "float32", 1)
    logits = 2 * 36 * SHAPES["tiny"].vocabulary * 4 / memory.MIB  # two prompts of at least 36 tokens
    assert 0 <= peak < 100 + logits  # the process itself, with torch and two models, takes several hundred


def test_memory_is_compared_at_the_largest_input(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {("floor", 10): 200.04, ("ours", 10): 210.0, ("ours", 30): 215.01}
    monkeypatch.setattr(memory, "_in_a_process", lambda way, prompts, *_: peaks[way, prompts])
    found = memory.measure(prompts=(10, 30))
    assert found == {
        "unit": "MiB",
        "floor": 200.0,
        "ours": {"10": 210.0, "30": 215.0},
        "ours_above_floor": 15.0,
        "ours_growth": 5.0,
    }


def test_a_failing_process_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"measuring the memory of 'ours' failed: [^$]*nowhere"):
        memory._in_a_process("ours", 2, "nowhere", "auto", 1)


@pytest.mark.parametrize(
    "given", [{"shape": "tinny"}, {"shape": "test", "kind": "lora"}, {"shape": "test", "questions": 0}]
)
def test_a_workload_that_does_not_exist_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(UserError):
        make_workload(**given)  # type: ignore[arg-type]
