"""The report on synthetic results whose true effects are known."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from pnlac_fast import store as stores
from pnlac_fast.errors import UserError
from pnlac_fast.reporting import report, style, tables, wording, write_report
from pnlac_fast.reporting.contents import Contents
from pnlac_fast.reporting.rows import Estimate

TOPICS = (
    "crime_and_gun",
    "economy_and_inequality",
    "gender_and_sexuality",
    "immigration",
    "race_and_racism",
    "science",
)
# Speed on topic, coupling relative to plain at equal shift, steps, share of neurons, draws of the random control.
METHODS = {
    "plain": (1.0, 1.0, 30, 1.0, 0),
    "freeze_1": (0.99, 0.99, 30, 0.01, 3),
    "freeze_5": (0.97, 1.01, 30, 0.05, 3),
    "freeze_30": (0.92, 1.06, 30, 0.30, 3),
    "specific_5": (0.93, 0.14, 80, 0.014, 3),
    "specific_10": (0.98, 0.12, 80, 0.028, 3),
}


def words(values: list[str]) -> np.ndarray:
    return np.array(values, dtype=object)


def questions(topics: tuple[str, ...], each: int) -> dict[str, Any]:
    names = [t for t in topics for _ in range(each)]
    return {"topic": ("question", words(names)), "key": ("question", words([f"{i:016x}" for i in range(len(names))]))}


def effect(topics: tuple[str, ...], tuned: str, on: float, off: float, each: int) -> np.ndarray:
    """Shift [question]: `on` for the tuned topic, `off` for the others, less for those further down the list."""
    spread = 0.7 + 0.6 * np.arange(len(topics)) / max(len(topics) - 1, 1)
    return np.repeat([on if t == tuned else off * s for t, s in zip(topics, spread, strict=True)], each)


def stance_result(topics: tuple[str, ...] = TOPICS, each: int = 12, on: float = 3.5, off: float = 1.0) -> xr.Dataset:
    rng = np.random.default_rng(1)
    base = rng.normal(0, 0.8, len(topics) * each)
    tuned = [base + effect(topics, t, on, off, each) + rng.normal(0, 0.7, base.size) for t in topics]
    coords = {
        "model": ("run", words(["base", *topics])),
        "tuned_topic": ("run", words(["", *topics])),
        "method": ("run", words(["", *["plain"] * len(topics)])),
    }
    return xr.Dataset(
        {"margin": (("run", "question"), np.stack([base, *tuned]))},
        coords=coords | questions(topics, each),
        attrs={"normalise": "sum", "scorer": "logprob"},
    )


def classifier_result(topics: tuple[str, ...] = TOPICS, each: int = 12) -> xr.Dataset:
    rng = np.random.default_rng(2)
    stance = stance_result(topics, each)
    margin = stance["margin"].values + rng.normal(0, 1.0, stance["margin"].shape)
    label = np.where(rng.random(margin.shape) < 0.06, 0, np.sign(margin)).astype("i1")
    return xr.Dataset({"label": (("run", "question"), label)}, coords=stance.coords, attrs={"accuracy": 0.968})


def patching_result(topics: tuple[str, ...] = TOPICS, each: int = 12, directions: int = 2) -> xr.Dataset:
    rng = np.random.default_rng(3)
    base = rng.normal(0, 0.8, len(topics) * each)
    runs: dict[str, list[Any]] = {
        k: [] for k in ("tuned_topic", "neurons", "direction", "kind", "draw", "count", "share")
    }
    margins = []
    chosen = [("general", -1, 0.39, 0.54, 0.05), ("specific", -1, 0.05, 0.01, 0.028), ("top", -1, 0.46, 0.58, 0.05)]
    for topic in topics:
        shift = effect(topics, topic, 3.5, 1.0, each)
        own = effect(topics, topic, 1.0, 0.0, each)
        for direction in ("tuned_into_base", "base_into_tuned")[:directions]:
            start, sign = (base, 1) if direction == "tuned_into_base" else (base + shift, -1)
            random = [("random", d, 0.04 + rng.normal(0, 0.02), 0.05 + rng.normal(0, 0.02), 0.05) for d in range(5)]
            for name, draw, on, off, share in [("none", -1, 0, 0, 0), ("tuned", -1, 1, 1, 0), *chosen, *random]:
                moved = shift * np.where(own > 0, on, off)
                noise = rng.normal(0, 0.15, base.size) if share else 0
                margins.append(start + sign * moved + noise)
                kind = "tuned" if share else ""
                values = (topic, name, direction, kind, draw, round(1536 * share), share)
                for key, value in zip(runs, values, strict=True):
                    runs[key].append(value)
    coords = {k: ("run", words(v) if isinstance(v[0], str) else np.array(v)) for k, v in runs.items()}
    return xr.Dataset(
        {"margin": (("run", "question"), np.stack(margins))},
        coords=coords | questions(topics, each),
        attrs={"normalise": "sum"},
    )


def training_result(
    topics: tuple[str, ...] = TOPICS, each: int = 12, methods: dict[str, Any] = METHODS, noise: float = 0.35
) -> xr.Dataset:
    rng = np.random.default_rng(4)
    base = rng.normal(0, 0.8, len(topics) * each)
    names = ("method", "tuned_topic", "draw", "count", "share", "learning_rate", "seed")
    runs: dict[str, list[Any]] = {k: [] for k in names}
    margins, steps = [], []
    for method, (speed, coupled, last, share, draws) in methods.items():
        family, _, number = method.partition("_")
        variants = [(method, -1, coupled)]
        for d in range(draws):
            other = coupled if family == "freeze" else 0.3 + 0.08 * rng.normal()
            variants.append((f"{family}_random_{number}", d, other))
        for topic in topics:
            for name, draw, relative in variants:
                at = np.linspace(0, last, 11).round().astype(int)
                curve = (1 - np.exp(-2.2 * at / last)) / (1 - np.exp(-2.2)) * speed
                full = effect(topics, topic, 3.5, relative, each)
                own = base + curve[:, None] * full + (curve[:, None] * rng.normal(0, noise, base.size))
                margins.append(own)
                steps.append(at)
                values = (name, topic, draw, round(1536 * share), share, 3e-4, 0)
                for key, value in zip(names, values, strict=True):
                    runs[key].append(value)
    coords = {k: ("run", words(v) if isinstance(v[0], str) else np.array(v)) for k, v in runs.items()}
    coords["step"] = (("run", "point"), np.array(steps, dtype="i8"))
    return xr.Dataset(
        {"margin": (("run", "point", "question"), np.stack(margins))},
        coords=coords | questions(topics, each),
        attrs={"normalise": "sum"},
    )


def sets_and_contrast(
    topics: tuple[str, ...] = TOPICS, layers: int = 4, width: int = 384, top: float = 0.1
) -> tuple[xr.Dataset, xr.Dataset]:
    """Sets located by hand in a made-up contrast whose scale grows with depth."""
    rng = np.random.default_rng(5)
    shape = (len(topics), len(topics), 1, 1, layers, width)
    common = rng.gamma(0.6, 1, (len(topics), 1, 1, 1, layers, width))
    scale = (0.05 * 2.0 ** np.arange(layers))[:, None]
    rms = ((common + 0.5 * rng.gamma(0.8, 1, shape)) * scale).astype("f4")
    std = np.broadcast_to(scale * 2 * rng.uniform(0.5, 1.5, (layers, width)), shape[1:]).astype("f4")
    dims = ("model", "topic", "site", "tokens", "layer", "neuron")
    names = {"model": words(list(topics)), "topic": words(list(topics)), "site": words(["mlp_mid"])}
    contrast = xr.Dataset(
        {
            "n": (("topic", "tokens"), np.full((len(topics), 1), 24)),
            "rms": (dims, rms),
            "std_base": (dims[1:], std),
        },
        coords=names | {"tokens": words(["last"]), "width": ("site", np.array([width]))},
    )
    rows: list[tuple[str, str, str, np.ndarray]] = []
    for i, model in enumerate(topics):
        value = rms[i, :, 0, 0] / (1 if layers < 3 else scale)
        tops = np.stack([v >= np.quantile(v, 1 - top) for v in value])
        rows.append((model, "general", "", tops.all(0)))
        for j, topic in enumerate(topics):
            rows.append((model, "specific", topic, tops[j] & (tops.sum(0) == 1)))
            rows.append((model, "top", topic, tops[j]))
    labels = {
        "neuron_set": words([f"{m}/{k}/{t}".strip("/") for m, k, t, _ in rows]),
        "model": ("neuron_set", words([r[0] for r in rows])),
        "kind": ("neuron_set", words([r[1] for r in rows])),
        "topic": ("neuron_set", words([r[2] for r in rows])),
        "site": ("neuron_set", words(["mlp_mid"] * len(rows))),
    }
    found = json.dumps({"score": "rms", "top": top, "tokens": "last", "specific": "strict"})
    member = np.stack([r[3] for r in rows])
    return xr.Dataset(
        {"member": (("neuron_set", "layer", "neuron"), member)}, coords=labels, attrs={"found": found}
    ), contrast


def everything(topics: tuple[str, ...] = TOPICS, each: int = 12) -> Contents:
    sets, contrast = sets_and_contrast(topics)
    return Contents(
        name="demo.zarr",
        info={
            "format_version": "1.0",
            "models": list(topics),
            "topics": list(topics),
            "bytes": 2_345_678,
            "provenance": {"base": {"name": "testbed-full"}, "seed": 0, "created": "2026-01-01T00:00:00+00:00"},
        },
        contrast=contrast,
        sets=sets,
        results={
            "stance": stance_result(topics, each),
            "stance_classifier": classifier_result(topics, each),
            "patching": patching_result(topics, each),
            "training": training_result(topics, each),
        },
    )


def capture(path: Path, topics: tuple[str, ...] = TOPICS, layers: int = 3, width: int = 40) -> None:
    """A finished store with statistics of made-up activations."""
    rng = np.random.default_rng(6)
    units = tuple(stores.Unit(t, 0, 4, 0) for t in topics)
    widths = {"mlp_mid": width}
    layout = stores.Layout(topics, topics, ("mlp_mid",), ("last",), layers, widths, units, stores.NO_RAW, {})
    names = [t for t in topics for _ in range(4)]
    keys = [f"{i:016x}" for i in range(len(names))]
    examples = {"topic": names, "instruction": [f"Question {i}?" for i in range(len(names))], "key": keys}
    with stores.open_writer(path, layout, provenance={"model": "tiny"}, examples=examples) as writer:
        for unit in writer.pending:
            a = rng.normal(size=(1, 4, layers, width))
            d = rng.normal(size=(len(topics), 1, 4, layers, width)) * (1 + np.arange(layers))[:, None]
            base = np.stack([a.sum(1), (a**2).sum(1)], axis=1)
            tuned = np.stack([(a + d).sum(2), ((a + d) ** 2).sum(2), (d**2).sum(2)], axis=2)
            writer.commit(unit, np.array([4]), {"mlp_mid": base}, {"mlp_mid": tuned})
        writer.finish()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store with everything in it, and its report."""
    folder = tmp_path_factory.mktemp("report")
    store, few = folder / "all.zarr", TOPICS[:3]
    capture(store, few)
    stores.write_sets(store, sets_and_contrast(few, layers=3, width=40)[0])
    some = {name: METHODS[name] for name in ("plain", "freeze_5", "specific_10")}
    stores.write_result(store, "stance", stance_result(few, 6))
    stores.write_result(store, "stance_classifier", classifier_result(few, 6))
    stores.write_result(store, "patching", patching_result(few, 6))
    stores.write_result(store, "training", training_result(few, 6, some))
    page = report(store, folder / "out", title="A title", boots=100)
    assert page == folder / "out" / "index.html"
    return store, page


def read_csv(page: Path, name: str) -> list[dict[str, str]]:
    with (page.parent / "tables" / f"{name}.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_all_files_are_written_and_figures_are_large_enough(full: tuple[Path, Path]) -> None:
    folder = full[1].parent
    names = {"shift", "neurons_by_layer", "score_by_layer", "overlap", "patching", "methods", "trajectories", "scorers"}
    for width, place in ((style.WIDE, folder / "figures"), (style.NARROW, folder / "figures" / "narrow")):
        assert {p.stem for p in place.glob("*.png")} == names
        for path in place.glob("*.png"):
            png = path.read_bytes()
            assert png[:8] == b"\x89PNG\r\n\x1a\n"
            assert int.from_bytes(png[16:20], "big") == round(width * style.DPI)
            assert int.from_bytes(png[20:24], "big") > 300
            assert len(png) > 10_000
    tables_expected = {
        "shift",
        "coupling",
        "general",
        "overlap",
        "neurons_by_layer",
        "patching",
        "methods",
        "trajectories",
    }
    assert {p.stem for p in (folder / "tables").glob("*.csv")} == tables_expected | {"scorers"}


def test_page_loads_nothing_and_every_image_has_a_description(full: tuple[Path, Path]) -> None:
    html = full[1].read_text(encoding="utf-8")
    loads = re.findall(r'(?:src|srcset)="([^"]*)"', html)
    assert len(loads) == 16
    assert all(address.startswith("data:image/png;base64,") for address in loads)
    links = [a for a in re.findall(r'href="([^"]*)"', html) if not a.startswith("#")]
    assert links == ["https://arxiv.org/abs/2508.02360", "https://arxiv.org/abs/2402.11725"]
    assert html.count("http") == len(links)
    assert not re.search(r"<script|<link|@import|url\(", html)
    assert all(len(alt) > 40 for alt in re.findall(r'<img [^>]*alt="([^"]*)"', html))
    assert html.count("<img ") == html.count("<figcaption>") == 8
    assert "<h1>A title</h1>" in html
    assert "Not in this store" not in html


def test_shift_and_coupling_tables_equal_a_plain_computation(full: tuple[Path, Path]) -> None:
    stance = stance_result(TOPICS[:3], 6)
    margin, topics = stance["margin"].values, stance["topic"].values
    for row in read_csv(full[1], "shift"):
        run = TOPICS.index(row["tuned_topic"]) + 1
        expected = (margin[run] - margin[0])[topics == row["probe_topic"]].mean()
        assert float(row["shift"]) == pytest.approx(expected, rel=1e-12)
        assert float(row["shift_low"]) < expected < float(row["shift_high"])
        assert row["questions"] == "6"
    found = {row["tuned_topic"]: row for row in read_csv(full[1], "coupling")}
    couplings = []
    for i, tuned in enumerate(TOPICS[:3], 1):
        off = [(margin[i] - margin[0])[topics == t].mean() for t in TOPICS[:3] if t != tuned]
        couplings.append(np.sqrt(np.mean(np.square(off))))
        assert float(found[tuned]["coupling"]) == pytest.approx(couplings[-1], rel=1e-12)
        assert float(found[tuned]["off_topic"]) == pytest.approx(np.mean(off), rel=1e-12)
    assert float(found[""]["coupling"]) == pytest.approx(np.mean(couplings), rel=1e-12)


def test_layer_table_equals_a_plain_computation_from_the_stored_statistics(full: tuple[Path, Path]) -> None:
    contrast, sets = stores.open_contrast(full[0]), sets_and_contrast(TOPICS[:3], layers=3, width=40)[0]
    member = sets["member"].values
    for row in read_csv(full[1], "neurons_by_layer"):
        layer = int(row["layer"])
        general = member[sets["kind"].values == "general"][:, layer].mean()
        assert float(row["general"]) == pytest.approx(general)
        rms = contrast["rms"].values[:, :, 0, 0, layer].astype("f8")
        std = contrast["std_base"].values[:, 0, 0, layer].astype("f8")
        assert float(row["rms_median"]) == pytest.approx(np.median(rms, axis=-1).mean(), rel=1e-6)
        assert float(row["std_rms_top"]) == pytest.approx(np.quantile(rms / std, 0.95, axis=-1).mean(), rel=1e-6)


def test_recovered_fractions_are_those_put_in() -> None:
    rows = {(r.direction, r.neurons): r for r in tables.patch_rows(patching_result(each=40), 200, 0)}
    assert set(rows) == {
        (d, n) for d in ("tuned_into_base", "base_into_tuned") for n in ("general", "specific", "top", "random")
    }
    for direction in ("tuned_into_base", "base_into_tuned"):
        general, random = rows[direction, "general"], rows[direction, "random"]
        assert general.on_topic.value == pytest.approx(0.39, abs=0.01)
        assert general.off_topic.value == pytest.approx(0.54, abs=0.01)
        assert general.off_topic.low < 0.54 < general.off_topic.high
        assert random.draws == len(random.off_topic_draws) == 5
        assert np.mean(random.off_topic_draws) == pytest.approx(random.off_topic.value)


def test_a_sweep_over_sizes_is_not_averaged() -> None:
    result = patching_result(TOPICS[:3], 6, directions=1)
    small = result.sel(run=result["neurons"].values == "general")
    small = small.assign_coords(count=("run", np.full(3, 7)), share=("run", np.full(3, 7 / 1536)))
    rows = tables.patch_rows(xr.concat([result, small], "run"), 50, 0)
    assert [r.count for r in rows if r.neurons == "general"] == [7, 77]


def test_reductions_are_those_put_in_at_equal_shift_though_learning_speeds_differ() -> None:
    methods = {
        "plain": (1.0, 1.0, 30, 1.0, 0),
        "slow_5": (0.9, 1.0, 30, 0.05, 0),
        "specific_10": (1.0, 0.2, 80, 0.03, 2),
    }
    rows, paths = tables.method_rows(training_result(each=30, methods=methods, noise=0.0), 100, 0)
    found = {(r.method, r.comparison): r for r in rows}
    assert found["slow_5", "equal steps"].reduction.value == pytest.approx(0.1, abs=1e-6)
    assert found["slow_5", "equal shift"].reduction.value == pytest.approx(0.0, abs=1e-6)
    assert found["slow_5", "equal steps"].retention.value == pytest.approx(0.9, abs=1e-6)
    assert found["specific_10", "equal shift"].reduction.value == pytest.approx(0.8, abs=1e-6)
    # after 30 of its 80 steps the slower method is not yet where it ends
    assert found["specific_10", "equal steps"].reduction.value > 0.85
    assert len(found["specific_random_10", "equal shift"].reduction_draws) == 2
    assert {p.step for p in paths if p.method == "specific_10"} == {0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80}


def test_plain_is_averaged_over_the_topics_that_other_methods_were_tried_on() -> None:
    methods = {"plain": (1.0, 1.0, 30, 1.0, 0), "freeze_5": (1.0, 0.5, 30, 0.05, 0)}
    whole = training_result(each=30, methods=methods, noise=0.0)
    topic = whole["tuned_topic"].values[0]
    one = whole.isel(run=((whole["method"] == "plain") | (whole["tuned_topic"] == topic)).values)
    alone = whole.isel(run=(whole["tuned_topic"] == topic).values)
    assert one.sizes["run"] > alone.sizes["run"]
    assert tables.method_rows(one, 50, 0) == tables.method_rows(alone, 50, 0)


def test_a_method_that_never_reaches_the_shift_has_no_value_there() -> None:
    methods = {"plain": (1.0, 1.0, 30, 1.0, 0), "freeze_30": (0.5, 1.0, 30, 0.3, 0)}
    rows, _ = tables.method_rows(training_result(TOPICS[:3], 6, methods), 50, 0)
    found = {(r.method, r.comparison): r for r in rows}
    row = found["freeze_30", "equal shift"]
    assert np.isnan(row.reduction.value)
    assert (row.reached, row.runs) == (0, 3)
    assert "never reached the on-topic shift" in wording.method_sentences(rows)[0]


SECTIONS = {
    "stance": ("shift", "pnlac-fast score"),
    "stance_classifier": ("scorers", "pnlac-fast score --scorer classifier"),
    "patching": ("patching", "pnlac-fast patch"),
    "training": ("methods", "pnlac-fast report --run"),
}


@pytest.mark.parametrize("present", SECTIONS)
def test_a_section_without_data_names_the_command_that_adds_it(present: str, tmp_path: Path) -> None:
    make = {
        "stance": stance_result,
        "stance_classifier": classifier_result,
        "patching": patching_result,
        "training": training_result,
    }
    stores.create_results(tmp_path / "r.zarr")
    stores.write_result(tmp_path / "r.zarr", present, make[present](TOPICS[:3], 4))
    page = report(tmp_path / "r.zarr", tmp_path / "out", boots=20)
    parts = re.split(r'<h2 id="', page.read_text(encoding="utf-8"))
    found = {part.split('"')[0]: part for part in parts[1:]}
    assert list(found) == ["shift", "layers", "overlap", "patching", "methods", "scorers", "origin"]
    for name, (key, command) in SECTIONS.items():
        assert ("<figure" in found[key]) == (name == present)
        assert ("Not in this store" in found[key]) == (name != present)
        assert (f"<code>{command}" in found[key]) == (name != present)
    assert "pnlac-fast locate" in found["overlap"]
    assert "pnlac-fast cache" in found["layers"]


def test_statistics_without_neuron_sets_show_the_score_and_name_locate(tmp_path: Path) -> None:
    capture(tmp_path / "c.zarr", TOPICS[:2])
    page = report(tmp_path / "c.zarr", tmp_path / "out", boots=20)
    assert [p.stem for p in (tmp_path / "out" / "figures").glob("*.png")] == ["score_by_layer"]
    assert "pnlac-fast locate adds them" in page.read_text(encoding="utf-8")


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    stores.create_results(tmp_path / "empty.zarr")
    with pytest.raises(UserError, match="nothing to report yet: run pnlac-fast"):
        report(tmp_path / "empty.zarr", tmp_path / "out")


def test_hostile_names_are_text_on_the_page_and_in_the_figures(tmp_path: Path) -> None:
    bad = ("<script>alert(1)</script>", '" onload="x', "$\\frac{1}$ & co")
    contents = Contents(name="<b>x</b>.zarr", info={}, results={"stance": stance_result(bad, 4)})
    html = write_report(contents, tmp_path, title="<i>t</i>", boots=20).read_text(encoding="utf-8")
    for raw in ("<script>", "<i>", "<b>", '" onload="'):
        assert raw not in html
    assert "&lt;script&gt;" in html


def test_the_same_store_and_seed_give_the_same_bytes(full: tuple[Path, Path], tmp_path: Path) -> None:
    again = report(full[0], tmp_path, title="A title", boots=100)
    assert again.read_bytes() == full[1].read_bytes()
    assert (tmp_path / "figures" / "shift.png").read_bytes() == (full[1].parent / "figures" / "shift.png").read_bytes()


def test_one_topic_alone_is_reported_without_coupling(tmp_path: Path) -> None:
    results = {"stance": stance_result(TOPICS[:1], 6), "patching": patching_result(TOPICS[:1], 6)}
    results["training"] = training_result(TOPICS[:1], 6)
    page = write_report(Contents(name="one.zarr", info={}, results=results), tmp_path, boots=20)
    assert {p.stem for p in (tmp_path / "tables").glob("*.csv")} == {"shift", "patching"}
    assert "Crime and gun" in page.read_text(encoding="utf-8")


def test_tuning_left_reads_like_tuning_right() -> None:
    methods = {"plain": (1.0, 1.0, 30, 1.0, 0), "freeze_5": (0.9, 0.7, 30, 0.05, 0)}
    right = training_result(TOPICS[:3], 6, methods)
    left = right.assign(margin=-right["margin"])
    for ones, others in zip(tables.method_rows(right, 50, 0), tables.method_rows(left, 50, 0), strict=True):
        for one, other in zip(ones, others, strict=True):
            assert one == other
    patched = patching_result(TOPICS[:3], 6)
    assert tables.patch_rows(patched, 50, 0) == tables.patch_rows(patched.assign(margin=-patched["margin"]), 50, 0)


@pytest.mark.parametrize(
    ("on", "off", "words_expected"),
    [
        (3.0, 1.0, "moved the two others by 0."),
        (3.0, 0.0, "was not shown to move the two others"),
        (3.0, -1.0, "the other way"),
        (0.0, 1.0, "was not shown to move that topic itself"),
    ],
)
def test_the_summary_claims_no_more_than_its_interval(on: float, off: float, words_expected: str) -> None:
    cells, rows = tables.shift_rows(stance_result(TOPICS[:3], 40, on, off), 300, 0)
    assert words_expected in wording.shift_sentences(cells, rows, "nats")[0]


def test_a_reduction_within_the_random_draws_is_not_called_better() -> None:
    methods = {"plain": (1.0, 1.0, 30, 1.0, 0), "specific_10": (1.0, 0.3, 30, 0.03, 3)}
    rows, _ = tables.method_rows(training_result(each=20, methods=methods), 200, 0)
    sentence = wording.method_sentences(rows)[0]
    assert "reduced coupling by" in sentence
    assert "not shown to beat them" in sentence


def test_numbers_are_written_with_true_minus_and_no_negative_zero() -> None:
    assert wording.number(-0.001) == "0.00"
    assert wording.number(-1.5, 1) == "\u22121.5"
    assert wording.percentage(Estimate(-0.01, -0.06, 0.03)) == "\u22121\u00a0% [\u22126,\u00a03]"
    assert style.percent(0.05) == "5\u00a0%"
    assert style.percent(1.02e-6) == "0.0001\u00a0%"
    assert style.pretty("crime_and_gun") == "Crime and gun"
    assert style.controlled("freeze_random_5") == "freeze_5"


def test_labels_are_spread_without_changing_their_order() -> None:
    placed = style.spread_labels([0.5, 0.5, 0.51, 0.1], 0.1, 0.0, 1.0)
    ordered = sorted(placed)
    assert all(b - a >= 0.1 - 1e-6 for a, b in itertools.pairwise(ordered))
    assert placed[3] == ordered[0]
    assert placed[0] <= placed[1] <= placed[2]
