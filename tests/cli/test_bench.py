"""``pnlac-fast bench`` prints what it promises; how fast anything is, is not tested."""

from __future__ import annotations

from typing import Any

import pytest

from pnlac_fast.benchmarking import suite

SPREAD = {"median", "min", "max", "repeats"}


@pytest.fixture(scope="module")
def localised(cli) -> Any:
    result = cli(
        "bench",
        "--shape",
        "test",
        "--only",
        "localise,overhead,contrast_kernel",
        "--repeats",
        2,
        "--questions",
        2,
        "--json",
    )
    assert (result.code, result.err) == (0, "")
    return result.json


def test_localise_has_its_ratios_with_their_spread(localised: Any) -> None:
    figures = localised["localise"]
    for ratio in (
        figures["one_tuned_vs_floor"],
        figures["six_tuned_vs_floor"],
        figures["released_way_vs_ours"],
        *figures["command"].values(),
    ):
        assert ratio.keys() == SPREAD
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert ratio["repeats"] == 2
    assert localised["by_shape"]["test"]["localise"] == figures
    assert (figures["shape"], figures["prompts"]) == ("test", 12)
    assert figures["tokens"] > 12 * 76
    assert all(isinstance(peer, str) or peer.keys() == SPREAD for peer in figures["peers"].values())


def test_parts_are_those_asked_for(localised: Any) -> None:
    assert localised["overhead"]["fused"].keys() == localised["overhead"]["hooked"].keys() == SPREAD
    assert localised["contrast_kernel"]["bfloat16"]["numpy_vs_ours"].keys() == SPREAD
    assert localised.keys() & set(suite.PARTS) == {"localise", "overhead", "contrast_kernel"}


def test_it_says_where_and_when(localised: Any) -> None:
    assert localised["machine"]
    assert (localised["device"], localised["dtype"], localised["threads"]) == ("cpu", "float32", 1)
    assert localised["clock"] == "wall"
    assert localised["provenance"]["versions"]["torch"]
    assert localised["provenance"]["created"]


def test_the_table(cli, localised: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"share": 0.03, "slices_vs_full": {"median": 0.5, "min": 0.4, "max": 0.6}, "bytes_slices_vs_full": 0.04}
    memory = {"unit": "MiB", "floor": 200.0, "ours": {"256": 210.0}}
    monkeypatch.setattr(suite, "bench", lambda **_: localised | {"memory": memory, "training_step": training})
    lines = cli("bench").out.splitlines()
    assert lines[0].split() == ["what", "shape", "median", "min", "max"]
    assert any(line.startswith("localise six tuned vs floor") for line in lines)
    assert any(line.split() == ["memory", "ours", "256,", "MiB", "210"] for line in lines)
    assert any(line.split() == ["training_step", "slices", "vs", "full", "0.5", "0.4", "0.6"] for line in lines)
    assert any(line.split() == ["training_step", "bytes", "slices", "vs", "full", "0.04"] for line in lines)
    assert not any("tokens" in line or " share" in line for line in lines)


@pytest.mark.parametrize("part", suite.PARTS)
def test_each_part_is_named_by_the_help_and_can_be_asked_for_alone(
    cli, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = {"median": 0.5, "min": 0.4, "max": 0.6, "repeats": 1}
    for module in (suite.contrast_kernel, suite.localise, suite.masked, suite.memory, suite.overhead, suite.store):
        monkeypatch.setattr(module, "measure", lambda *_, **__: {"a": spread})
    for module in (suite.training_step, suite.mixture_step, suite.queries, suite.stall):
        monkeypatch.setattr(module, "measure", lambda **_: {"a": spread})
    found = cli("bench", "--shape", "test", "--only", part, "--json").json
    assert found.keys() & set(suite.PARTS) == {part}
    assert found[part] == {"a": spread}
    assert part in cli("bench", "--help").out
    assert cli("bench", "--shape", "test", "--only", part).out.splitlines()[1].split()[0] == part


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "tinny"], "There is no shape 'tinny'. Did you mean 'tiny'?"),
        (["--only", "localize"], "There is no part 'localize'. Did you mean 'localise'?"),
        (["--dtype", "float23"], "There is no dtype 'float23'."),
        (["--clock", "sun"], "There is no clock 'sun'."),
        (["--repeats", 0], "raise --repeats"),
        (["--shape", "test", "--questions", 0], "give at least one"),
        (["--device", "tpu7"], "give --device cpu, cuda"),
    ],
)
def test_a_mistake_is_said_before_anything_is_measured(cli, options: list[object], said: str) -> None:
    result = cli("bench", *options)
    assert (result.code, result.out) == (3, "")
    assert said in result.err
