"""Files that are whole or absent, locks, and hashes."""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import subprocess
import sys

import pytest

from prefopt.files import (
    atomic_path,
    content_hash,
    file_hash,
    locked,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_folders_are_made_and_others_may_read(tmp_path):
    write_text(tmp_path / "b" / "c.txt", "Köln")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "b" / "c.txt").stat().st_mode) == 0o666 & ~umask
    assert (tmp_path / "b" / "c.txt").read_text(encoding="utf-8") == "Köln"


def test_json_and_rows_come_back(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1, None]})
    assert read_json(tmp_path / "a.json") == {"ä": [1, None]}
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        write_jsonl(tmp_path / name, [{"a": "é"}, {"a": None}])
        assert read_jsonl(tmp_path / name) == [{"a": "é"}, {"a": None}]
    assert gzip.decompress((tmp_path / "rows.jsonl.gz").read_bytes()) == (tmp_path / "rows.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n\n{"a"\n', "line 3: not JSON"),
        ("{}\n[1]\n", "line 2: expected a JSON object, found list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_jsonl(tmp_path / "rows.jsonl")
    assert str(tmp_path / "rows.jsonl") in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "rows.jsonl, after line [01]: not text in UTF-8"),
        ("rows.jsonl", b'{"a": 1}\n' + 100_000 * b"[", "rows.jsonl, line 2: JSON of too many levels"),
        ("rows.jsonl.gz", b'{"a": 1}\n', "rows.jsonl.gz, after line 0: the compressed file is damaged"),
        (
            "rows.jsonl.gz",
            gzip.compress(1000 * b'{"a": 1}\n', mtime=0)[:-20],
            "rows.jsonl.gz, after line [0-9]+: the compressed",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_jsonl(tmp_path / name)


def test_hashes(tmp_path):
    assert content_hash({"b": 1, "a": "ü"}) == content_hash({"a": "ü", "b": 1})
    assert content_hash(1) != content_hash("1")
    (tmp_path / "x").write_bytes(b"abc")
    assert file_hash(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


HOLD = """
import sys
from prefopt.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_keeps_others_out_until_its_holder_ends_or_is_killed(tmp_path):
    folder = tmp_path / "new"
    with locked(folder):
        with pytest.raises(ValueError, match=r"new: another command is at work there"), locked(folder):
            pass
        with locked(folder, name=".other"):
            pass
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another command"), locked(folder):
        pass
    holder.kill()
    holder.communicate()
    with locked(folder):
        pass


def test_what_a_killed_writer_left_half_written_is_removed_under_the_lock(tmp_path):
    (tmp_path / ".state.json.abc.partial").write_text("{")
    (tmp_path / "kept.partial").write_text("not ours")
    with locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "kept.partial"]
