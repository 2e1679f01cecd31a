"""The score store: found by content, whole or absent, shared by writers, refused with a reason when it is not ours."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prefopt.references import cache as cache_module
from prefopt.references.cache import ScoreCache, Scorer, explain_missing, ids_digest, ids_key, text_key

SCORER = Scorer(name="tiny", weights="w" * 64, tokenizer="t" * 64, dtype="float32")


def key(number):
    return text_key(f"row-{number}", "chosen")


def fill(cache, numbers, offset=0.0):
    for n in numbers:
        cache.add(key(n), logps=-1.5 * n + offset, tokens=n + 1, num_bytes=4 * n, length=n + 9, ids=n)


def test_records_come_back_exactly(tmp_path):
    cache = ScoreCache(tmp_path, SCORER)
    cache.add(key(1), logps=-2000.125, tokens=7, num_bytes=30, length=12, ids=2**64 - 1)
    cache.add(key(2), logps=float("nan"), tokens=900, num_bytes=4000, length=1100, truncated=True)
    cache.flush()
    scores = ScoreCache(tmp_path, SCORER).lookup([key(2), key(3), key(1)])
    assert scores.found.tolist() == [True, False, True]
    assert scores.logps.dtype == np.float32 and scores.logps[2] == -2000.125 and np.isnan(scores.logps[0])
    assert (scores.tokens[2], scores.bytes[2], scores.length[2], scores.ids[2]) == (7, 30, 12, 2**64 - 1)
    assert scores.truncated.tolist() == [True, False, False]


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "v" * 64},
        {"tokenizer": "u" * 64},
        {"dtype": "bfloat16"},
        {"quantization": "bnb-nf4"},
        {"settings": {"anything": 1}},
        {"version": 2},
    ],
)
def test_whatever_alters_a_score_finds_nothing(tmp_path, change):
    cache = ScoreCache(tmp_path, SCORER)
    fill(cache, range(3))
    cache.flush()
    assert len(ScoreCache(tmp_path, replace(SCORER, **change))) == 0
    assert len(ScoreCache(tmp_path, replace(SCORER, name="moved/elsewhere"))) == 3


def test_keys_tell_contents_apart():
    base = ids_key([1, 2], [3], 5)
    others = [ids_key([1], [2, 3], 5), ids_key([1, 2], [3, 3], 5), ids_key([1, 2], [4], 5), ids_key([1, 2], [3], 6)]
    assert len({base, *others}) == 5 and base == ids_key((1, 2), (3,), 5)
    assert len({text_key("a", "chosen"), text_key("a", "rejected"), text_key("b", "chosen")}) == 3
    assert ids_digest([1, 2], [3]) != ids_digest([1], [2, 3])


def test_a_partial_cache_is_completed(tmp_path):
    first = ScoreCache(tmp_path, SCORER)
    fill(first, range(4))
    first.flush()
    second = ScoreCache(tmp_path, SCORER)
    assert second.lookup([key(n) for n in range(6)]).found.tolist() == [True] * 4 + [False] * 2
    fill(second, [4, 5])
    second.flush()
    assert ScoreCache(tmp_path, SCORER).lookup([key(n) for n in range(6)]).logps.tolist() == [
        -1.5 * n for n in range(6)
    ]


def test_two_writers_at_once_do_not_disturb_each_other(tmp_path):
    one, two = ScoreCache(tmp_path, SCORER), ScoreCache(tmp_path, SCORER)
    fill(one, range(6))
    fill(two, range(3, 9), offset=1e-4)  # the same rows with another rounding
    one.flush()
    two.flush()
    one.refresh()
    assert len(one) == 9
    fresh = [ScoreCache(tmp_path, SCORER).lookup([key(n) for n in range(9)]).logps.tolist() for _ in range(2)]
    assert fresh[0] == fresh[1]
    assert fresh[0] == pytest.approx([-1.5 * n for n in range(9)], abs=2e-4)


def test_a_score_replaces_the_note_that_a_text_was_too_long(tmp_path):
    for order in ((True, False), (False, True)):
        root = tmp_path / str(order[0])
        cache = ScoreCache(root, SCORER)
        for truncated in order:
            cache.add(
                key(0), logps=float("nan") if truncated else -3.0, tokens=1, num_bytes=1, length=9, truncated=truncated
            )
            cache.flush()
        assert cache.lookup([key(0)]).logps.tolist() == [-3.0]
        assert ScoreCache(root, SCORER).lookup([key(0)]).logps.tolist() == [-3.0]


def test_a_killed_writer_leaves_whole_chunks_only(tmp_path, monkeypatch):
    """Killed in the middle of a write: what was flushed before is there, the unfinished file is not read."""
    script = textwrap.dedent(f"""
        import os, signal
        from prefopt.references import cache as c
        scorer = c.Scorer(name="tiny", weights={"w" * 64!r}, tokenizer={"t" * 64!r}, dtype="float32")
        cache = c.ScoreCache({str(tmp_path)!r}, scorer)
        for n in range(3):
            cache.add(c.text_key(f"row-{{n}}", "chosen"), logps=-1.5 * n, tokens=1, num_bytes=1, length=1)
        cache.flush()
        def killed(file, **arrays):
            file.write(b"PK half a file")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        c.np.savez = killed
        cache.add(c.text_key("row-9", "chosen"), logps=-1.0, tokens=1, num_bytes=1, length=1)
        cache.flush()
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(Path(tmp_path).rglob("*.partial"))  # the half file is there
    cache = ScoreCache(tmp_path, SCORER)
    assert len(cache) == 3
    fill(cache, [9])
    cache.flush()
    assert ScoreCache(tmp_path, SCORER).lookup([key(9)]).found.all()


def test_long_fills_reach_the_disk_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "FLUSH_RECORDS", 4)
    cache = ScoreCache(tmp_path, SCORER)
    fill(cache, range(9))
    assert len(ScoreCache(tmp_path, SCORER)) == 8


def test_damage_and_foreign_files_are_refused_with_a_reason(tmp_path):
    cache = ScoreCache(tmp_path, SCORER)
    fill(cache, range(3))
    cache.flush()
    (chunk,) = cache.folder.glob("*.npz")
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"npz is damaged .*delete this file"):
        ScoreCache(tmp_path, SCORER)
    chunk.write_bytes(whole)
    other = ScoreCache(tmp_path, replace(SCORER, dtype="bfloat16"))
    fill(other, range(3))
    other.flush()
    (foreign,) = other.folder.glob("*.npz")
    (cache.folder / foreign.name).write_bytes(foreign.read_bytes())
    with pytest.raises(ValueError, match="written by another scorer"):
        ScoreCache(tmp_path, SCORER)
    (cache.folder / foreign.name).unlink()
    (cache.folder / "manifest.json").write_text((other.folder / "manifest.json").read_text())
    with pytest.raises(ValueError, match="describes another scorer"):
        ScoreCache(tmp_path, SCORER)
    (cache.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        ScoreCache(tmp_path, SCORER)


@pytest.mark.parametrize(
    ("header", "offset", "change"),
    [(b"PK\x01\x02", 8, 1), (b"PK\x01\x02", 10, 9), (b"PK\x03\x04", 2, 7), (b"PK\x05\x06", 16, 255)],
    ids=["encrypted", "compression", "local header", "directory"],
)
def test_a_flipped_byte_of_a_chunk_is_damage(tmp_path, header, offset, change):
    cache = ScoreCache(tmp_path, SCORER)
    fill(cache, range(3))
    cache.flush()
    (path,) = cache.folder.glob("*.npz")
    content = bytearray(path.read_bytes())
    content[content.index(header) + offset] ^= change
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"npz is damaged .*delete this file"):
        ScoreCache(tmp_path, SCORER)


def test_what_is_there_instead_is_explained(tmp_path):
    cache = ScoreCache(tmp_path, SCORER)
    fill(cache, range(3))
    cache.flush()
    assert "never scored" in explain_missing(tmp_path, replace(SCORER, name="b", weights="x"))
    assert "the weights changed" in explain_missing(tmp_path, replace(SCORER, weights="x"))
    assert "chat template" in explain_missing(tmp_path, replace(SCORER, tokenizer="x"))
    assert "the dtype" in explain_missing(tmp_path, replace(SCORER, name="renamed", dtype="bfloat16"))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "\x00\xff", '{"format": 1}', '{"format": 1, "scorer": {"name": 5}}',
     '{"format": 1, "scorer": {"name": "a", "weights": "b", "tokenizer": "c", "dtype": "d", "more": 1}}',
     '{"format": 1, "scorer": "x"}', '{"format": "1"}'],
)  # fmt: skip
def test_a_damaged_manifest_is_named_with_the_remedy(tmp_path, content):
    cache = ScoreCache(tmp_path, SCORER)
    fill(cache, range(2))
    cache.flush()
    manifest = cache.folder / "manifest.json"
    manifest.write_bytes(content.encode("latin-1"))
    for read in (lambda: ScoreCache(tmp_path, SCORER), lambda: explain_missing(tmp_path, replace(SCORER, dtype="x"))):
        with pytest.raises(ValueError, match=r"delete the folder|use another folder") as raised:
            read()
        assert str(manifest) in str(raised.value) and "\n" not in str(raised.value)


def test_a_cache_that_cannot_be_written_ends_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"score cache cannot be written: .*file.*2 scores.*`ref_logps_dir`"):
        ScoreCache(tmp_path / "file", SCORER).check_writable(2)
    cache = ScoreCache(tmp_path, SCORER)
    fill(cache, range(2))

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(ValueError, match=r"No space left on device\. It needs about 1 MiB.*the same command"):
            cache.flush()
    cache.flush()  # the records were kept
    assert ScoreCache(tmp_path, SCORER).lookup([key(0), key(1)]).found.all()


def test_a_full_disk_is_found_before_anything_is_scored(tmp_path):
    with pytest.raises(ValueError, match="the disk is full"):
        ScoreCache(tmp_path, SCORER).check_writable(10**15)
