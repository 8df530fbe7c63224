"""Raw rows come back as they were given, with what each row is."""

import numpy as np
import pytest

from pnlac_fast.store import StoreError, open_activations, open_examples
from pnlac_fast.store.journal import read_journal, unit_key
from pnlac_fast.store.schema import even_split, slots_of


@pytest.fixture(params=[(256, 1024, 64 << 20), (3, 4, 1), (2, 8, 2 * 4 * 8 * 11)])
def chunks(request, monkeypatch):
    """Let chunks and shards be cut in several ways, so that edges of every kind are met."""
    for name, size in zip(("CHUNK_ROWS", "CHUNK_NEURONS", "SHARD_BYTES"), request.param, strict=True):
        monkeypatch.setattr(f"pnlac_fast.store.schema.{name}", size)
    return request.param


def test_rows_and_their_table(tmp_path, make_sample, chunks):
    sample = make_sample(raw="full")
    path = sample.fill(tmp_path / "s.zarr")
    units = range(len(sample.layout.units))
    examples = open_examples(path)
    for model in ("base", *sample.layout.models):
        for site in sample.layout.sites:
            ds = open_activations(path, model, site)
            want = np.concatenate([sample.raw(unit)[1][model, site] for unit in units], 1)
            assert ds["activation"].dims == ("layer", "token", "neuron")
            assert ds["activation"].dtype == np.float32
            np.testing.assert_array_equal(ds["activation"].values, want)
            for column in ("example", "side", "completion", "position", "token_id", "counts"):
                assert ds[column].values.tolist() == [i for u in units for i in sample.raw(u)[0][column].tolist()]
            assert ds["topic"].values.tolist() == examples["topic"].values[ds["example"].values].tolist()
            assert "token" not in ds.coords


def test_selections_are_lazy(finished_raw, make_sample):
    sample = make_sample(raw="last")
    ds = open_activations(finished_raw, "second", "mlp_mid")
    want = np.concatenate([sample.raw(unit)[1]["second", "mlp_mid"] for unit in range(6)], 1)
    of_topic = ds.sel(token=ds["topic"] == "schools & taxes")["activation"]
    assert not ds["activation"].variable._in_memory
    assert not of_topic.variable._in_memory
    np.testing.assert_array_equal(of_topic.isel(neuron=3, layer=1).values, want[1, 12:, 3])
    np.testing.assert_array_equal(ds["activation"].isel(token=-1).values, want[:, -1])


def test_only_committed_rows_are_seen(tmp_path, make_sample):
    sample = make_sample(raw="last")
    path = tmp_path / "s.zarr"
    with sample.open(path) as writer:
        assert open_activations(path, "base", "resid").sizes["token"] == 0
        sample.commit(writer, 5)
        sample.commit(writer, 0)
    ds = open_activations(path, "base", "resid")
    want = np.concatenate([sample.raw(unit)[1]["base", "resid"] for unit in (0, 5)], 1)
    np.testing.assert_array_equal(ds["activation"].values, want)


def test_leftovers_of_a_crash_do_not_show(tmp_path, make_sample, monkeypatch):
    sample = make_sample(raw="last")
    path = tmp_path / "s.zarr"
    with sample.open(path) as writer:

        def crash(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr("pnlac_fast.store.writer.commit_unit", crash)
            with pytest.raises(KeyboardInterrupt):
                sample.commit(writer, 0)
    (shard,) = (path / "activations/base/resid/activation").glob("c.0.0.0")
    shard.write_bytes(b"")  # what a power cut makes of a file that was never synced
    assert open_activations(path, "base", "resid").sizes["token"] == 0
    sample.fill(path)
    ds = open_activations(path, "base", "resid")
    np.testing.assert_array_equal(ds["activation"].values[:, :5], sample.raw(0)[1]["base", "resid"])


def test_every_unit_writes_files_of_its_own(tmp_path, make_sample, chunks):
    sample = make_sample(raw="full")
    path = tmp_path / "s.zarr"
    with sample.open(path) as writer:
        seen = {str(file) for file in path.rglob("*")}
        for unit in writer.pending:
            before = {file: file.stat().st_mtime_ns for file in path.rglob("c.*") if file.is_file()}
            sample.commit(writer, unit)
            assert before == {file: file.stat().st_mtime_ns for file in before}
            (record,) = [r for r in read_journal(writer.place, sample.layout) if r.unit == unit]
            now = {str(file) for file in path.rglob("*")}
            assert now - seen == {str(path / name) for name in (*record.files, unit_key(unit, 0))}
            seen = now


def test_wrong_rows_are_refused(tmp_path, make_sample):
    sample = make_sample(raw="last")
    sums, (rows, raw) = sample.sums(0), sample.raw(0)
    with sample.open(tmp_path / "s.zarr") as writer:
        for wrong, message in (
            ((None, None), "rows must have the keys"),
            ((rows, None), "raw must have the keys"),
            ((rows | {"position": rows["position"][1:]}, raw), "position"),
            ((rows | {"example": rows["example"] + 6}, raw), "not of its topic"),
            ((rows | {"example": rows["example"] - 1}, raw), "between 0 and 11"),
            ((rows, raw | {("base", "resid"): raw["base", "resid"].astype(np.float64)}), "float32"),
        ):
            with pytest.raises(ValueError, match=message):
                writer.commit(0, *sums, *wrong)
        with pytest.raises(ValueError, match="says that it has none"):
            writer.commit(1, *sample.sums(1), rows, raw)
        assert len(writer.pending) == 6


def test_unknown_names_and_stores_without_rows(finished, finished_raw):
    with pytest.raises(StoreError, match="--raw last"):
        open_activations(finished, "base", "resid")
    with pytest.raises(StoreError, match="has no model 'third'; it has base, org/first, second"):
        open_activations(finished_raw, "third", "resid")
    with pytest.raises(StoreError, match="has no site 'mlp_out'; it has mlp_mid, resid"):
        open_activations(finished_raw, "base", "mlp_out")


def test_slots_hold_the_largest_unit_in_whole_chunks(make_sample):
    for size, limit in ((1, 256), (256, 256), (257, 256), (300, 256), (14336, 1024), (1500, 1024)):
        length, pieces = even_split(size, limit)
        assert length <= limit
        assert size <= length * pieces < size + pieces
    slots = slots_of(make_sample(raw="last").layout)
    assert slots.rows == slots.chunk_rows == 7
