"""A run that was cut off anywhere goes on, and ends in the same bytes."""

import errno
import os

import pytest

from pnlac_fast.store import StoreError, info, list_results, open_contrast, write_result
from pnlac_fast.store.journal import decode_line, encode_line, read_journal


def test_resuming_after_any_units_gives_the_same_bytes(tmp_path, make_sample, finished_raw, tree):
    sample = make_sample(raw="last")
    whole = tree(finished_raw)
    for done in ([0], [0, 1, 2], [4, 3, 5, 1, 0], list(range(6))):
        path = tmp_path / f"{len(done)}-{sum(done)}.zarr"
        with sample.open(path) as writer:
            for unit in done:
                sample.commit(writer, unit)
        with sample.open(path) as writer:
            assert writer.pending == tuple(unit for unit in range(6) if unit not in done)
            for unit in reversed(writer.pending):
                sample.commit(writer, unit)
            writer.finish()
            writer.finish()
        assert tree(path) == whole


def test_a_unit_is_committed_once(tmp_path, sample):
    with sample.open(tmp_path / "s.zarr") as writer:
        sample.commit(writer, 3)
        with pytest.raises(ValueError, match="committed already"):
            sample.commit(writer, 3)


def test_a_damaged_line_is_refused_and_named(tmp_path, sample):
    path = tmp_path / "s.zarr"
    with sample.open(path) as writer:
        for unit in (0, 1, 2):
            sample.commit(writer, unit)
    line = (path / "journal/unit.1.0.json").read_bytes()
    for damaged in (line.replace(b'"unit":1', b'"unit":4'), line[:-1], line[:40], b"", line + line):
        (path / "journal/unit.1.0.json").write_bytes(damaged)
        for look in (lambda: sample.open(path), lambda: info(path)):
            with pytest.raises(StoreError, match=r"journal/unit.1.0.json is damaged.*--repair"):
                look()


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("unit.0.0", {"unit": 0, "part": 0, "files": {}}),
        ("unit.0.0", {"unit": 1, "part": 0, "files": {}, "layout": None}),
        ("unit.6.0", {"unit": 6, "part": 0, "files": {}, "layout": None}),
        ("unit.0.1", {"unit": 0, "part": 1, "files": {}, "layout": None}),
        ("unit.0.0", {"unit": 0, "part": 0, "files": [], "layout": None}),
        ("unit.0.0", {"unit": 0, "part": 0, "files": {"a": ["x"]}, "layout": None}),
    ],
)
def test_sound_lines_that_make_no_sense_are_refused(tmp_path, sample, name, record):
    path = tmp_path / "s.zarr"
    sample.open(path).close()
    if "layout" in record:
        record = record | {"layout": sample.layout.fingerprint()}
    (path / "journal" / f"{name}.json").write_bytes(encode_line(record))
    with pytest.raises(StoreError, match="belongs to another store"):
        info(path)


def test_lines_of_another_store_are_refused(finished, finished_raw, sample):
    (finished_raw / "journal/unit.0.0.json").replace(finished / "journal/unit.0.0.json")
    with pytest.raises(StoreError, match="belongs to another store"):
        sample.open(finished)


def test_journal_line_survives_no_changed_byte():
    line = encode_line({"unit": 3, "files": {"a": [1, "00000000"]}})
    assert decode_line(line) == {"unit": 3, "files": {"a": [1, "00000000"]}}
    for index in range(len(line)):
        assert decode_line(line[:index] + bytes([line[index] ^ 1]) + line[index + 1 :]) is None
        assert decode_line(line[:index]) is None


def test_a_store_of_before_the_first_release_is_refused(finished, sample):
    (finished / "journal.jsonl").write_text("")
    with pytest.raises(StoreError, match="before the first release"):
        sample.open(finished, overwrite=True)


def test_missing_or_short_file_of_a_committed_unit_names_the_unit(tmp_path, make_sample):
    sample = make_sample(raw="full")
    path = tmp_path / "s.zarr"
    with sample.open(path) as writer:
        for unit in writer.pending:
            sample.commit(writer, unit)
        file = path / "partials/resid/base/c.2.0.0.0.0"
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with pytest.raises(
            StoreError, match=r"Unit 2 \(topic 'abortion', questions 4 to 5\) is damaged.*bytes instead"
        ):
            writer.finish()
    file.unlink()
    with pytest.raises(StoreError, match=r"Unit 2 .* is missing; run the cache command again with --repair"):
        sample.open(path)


@pytest.mark.parametrize("array", ["n", "mlp_mid/base", "resid/tuned"])
def test_flipped_bit_in_the_sums_names_the_unit(tmp_path, sample, array):
    path = tmp_path / "s.zarr"
    with sample.open(path) as writer:
        for unit in writer.pending:
            sample.commit(writer, unit)
        (file,) = (path / "partials" / array).glob("c.4.*")
        content = bytearray(file.read_bytes())
        content[3] ^= 4
        file.write_bytes(content)
        with pytest.raises(StoreError, match=r"sums of unit 4 \(topic 'schools & taxes'.* are damaged"):
            writer.finish()
    assert not (path / "contrast").exists()


def test_second_writer_is_refused_until_the_first_ends(tmp_path, sample):
    path = tmp_path / "s.zarr"
    with sample.open(path) as writer:
        for overwrite in (False, True):
            with pytest.raises(StoreError, match="Another process is writing"):
                sample.open(path, overwrite=overwrite)
        sample.commit(writer, 0)
    sample.open(path).close()


def test_other_settings_are_refused_with_every_difference(finished, make_sample):
    path = finished
    other = make_sample(layers=2, settings={"template": "{topic}", "data": {"sha256": "0" * 8}, "seed": 1})
    with pytest.raises(StoreError) as caught:
        other.open(path, examples=other.examples | {"key": ["x"] * 12})
    message = str(caught.value)
    for part in (
        "layers: stored 3, given 2",
        'settings.template: stored "{instruction}", given "{topic}"',
        "settings.limit: stored null, given not set",
        "settings.seed: stored not set, given 1",
        "examples (sha256)",
        "--overwrite",
    ):
        assert part in message
    assert "settings.data" not in message
    assert "widths" not in message


def test_overwrite_starts_anew(finished_raw, make_sample):
    path, sample = finished_raw, make_sample(layers=2)
    write_result(path, "stance", open_contrast(path)[["n"]])
    (path / "notes.txt").write_text("mine")
    with sample.open(path, overwrite=True) as writer:
        assert len(writer.pending) == 6
        assert list_results(path) == []
        assert not (path / "activations").exists()
        for unit in writer.pending:
            sample.commit(writer, unit)
        writer.finish()
    assert open_contrast(path).sizes["layer"] == 2
    assert (path / "notes.txt").read_text() == "mine"


def test_crash_while_creating(tmp_path, sample, finished, monkeypatch, tree):
    whole = tree(finished)
    path = tmp_path / "again.zarr"
    for step in ("encode_root", "write_dataset", "create_arrays", "listed", "encode_line", "consolidate"):
        with monkeypatch.context() as patched:

            def crash(*args, **kwargs):
                raise KeyboardInterrupt

            patched.setattr(f"pnlac_fast.store.creation.{step}", crash)
            with pytest.raises(KeyboardInterrupt):
                sample.open(path)
    assert tree(sample.fill(path)) == whole


def test_files_and_their_names_are_synced_before_the_journal(tmp_path, make_sample, monkeypatch):
    sample, path, synced, real = make_sample(raw="full"), tmp_path / "s.zarr", [], os.fsync

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_ino)  # a file keeps its inode when it is renamed
        real(descriptor)

    with sample.open(path) as writer:
        monkeypatch.setattr(os, "fsync", fsync)
        sample.commit(writer, 0)
        (record,) = read_journal(writer.place, sample.layout)
    files = [path / name for name in record.files]
    last = len(synced) - 2
    assert synced[-2:] == [(path / name).stat().st_ino for name in ("journal/unit.0.0.json", "journal")]
    for file in files:
        assert synced.index(file.stat().st_ino) < synced.index(file.parent.stat().st_ino) < last


def test_a_failed_unit_is_not_listed_with_the_next(tmp_path, sample, monkeypatch):
    path = tmp_path / "s.zarr"
    with sample.open(path) as writer:

        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("pnlac_fast.store.writer.commit_unit", full)
            with pytest.raises(StoreError, match=r"Unit 0 of .* could not be written .*No space left.*nothing is lost"):
                sample.commit(writer, 0)
            patched.setattr("pnlac_fast.store.local.sync_directory", full)
            with pytest.raises(StoreError, match=r"Unit 1 of .* could not be written"):
                sample.commit(writer, 1)
        sample.commit(writer, 2)
        (record,) = read_journal(writer.place, sample.layout)
    assert record.unit == 2
    assert len(record.files) == 5
    assert all("/c.2." in name for name in record.files)


def test_full_disk_loses_nothing(tmp_path, sample, finished, monkeypatch, tree):
    whole = tree(finished)
    path = tmp_path / "again.zarr"
    real, refused = os.fsync, 0
    with sample.open(path) as writer:
        for failing in range(8):
            calls = iter(range(failing, -1, -1))

            def full(descriptor, calls=calls):
                if next(calls, 1) == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                real(descriptor)

            unit = writer.pending[0]
            monkeypatch.setattr(os, "fsync", full)
            try:
                sample.commit(writer, unit)
            except StoreError as error:
                assert "No space left on device" in str(error)  # noqa: PT017
                assert "nothing is lost" in str(error)  # noqa: PT017
                assert unit in writer.pending
                refused += 1
            monkeypatch.setattr(os, "fsync", real)
        assert refused == 8
        for unit in writer.pending:
            sample.commit(writer, unit)
        writer.finish()
    assert tree(path) == whole
