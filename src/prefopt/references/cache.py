"""The score cache: log-probs of completions under a frozen model, on disk, found again by content.

    <root>/<scorer key>/manifest.json     who scored: weights, tokenizer and template, dtype, quantisation, version
    <root>/<scorer key>/<name>.npz        records, written once, whole or absent, never changed

A scorer's key hashes everything that alters a score and nothing else, so a run with another learning rate, beta or
output folder finds the scores of the last one, and a run with other weights or another template cannot. Every process
writes its own chunk files under names that no other process can choose, so any number of writers may share a folder,
and a killed one loses at most the records that it had not yet flushed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.files import atomic_path, content_hash, read_object, user_path, write_json

MANIFEST = "manifest.json"
FORMAT = 1
SCORER_VERSION = 1  # of the scoring code: raise it whenever the same model would give other scores
FLUSH_RECORDS = 2048
UNSCORABLE = 2**31 - 1  # length of a text that the scorer cannot take under any limit
SIDES = ("chosen", "rejected")
_RECORD = np.dtype(
    [
        ("logps", np.float32),
        ("tokens", np.int32),
        ("bytes", np.int32),
        ("length", np.int32),
        ("truncated", np.bool_),
        ("ids", np.uint64),
    ]
)
_COLUMNS = tuple(_RECORD.names or ())
_RECORD_BYTES = _RECORD.itemsize + 16  # with its key

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error)


def default_folder() -> Path:
    """Return where scores are kept unless a recipe names a folder: under PREFOPT_CACHE, or ~/.cache/prefopt."""
    return user_path(os.environ.get("PREFOPT_CACHE", "~/.cache/prefopt")) / "reference_scores"


@dataclass(frozen=True)
class Scorer:
    """Everything about a model that alters the scores it gives.

    Attributes:
        name: for people; not part of the key, so a moved folder keeps its scores.
        weights: fingerprint of config and weights (`fingerprints`).
        tokenizer: fingerprint of vocabulary, merges, special tokens and chat template; "" where rows come as token
            ids.
        dtype: of the weights and of the computation, such as "bfloat16".
        quantization: "" or a description such as "bnb-nf4".
        settings: anything else that alters a score (JSON).
        version: of the scoring code.
    """

    name: str
    weights: str
    tokenizer: str
    dtype: str
    quantization: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    version: int = SCORER_VERSION

    @property
    def key(self) -> str:
        """Name of the folder that holds this scorer's records."""
        return content_hash({k: v for k, v in asdict(self).items() if k != "name"})[:32]


@dataclass
class Scores:
    """N records as columns; `found` says which of the N keys have one (the other rows hold zeros).

    Attributes:
        logps: float32, summed log-probs in nats.
        tokens: scored tokens, in the scorer's own vocabulary.
        bytes: UTF-8 bytes of the completion's text.
        length: tokens of prompt and completion together (`UNSCORABLE`: beyond the scorer's context, or its template
            refuses it).
        truncated: the scorer would have had to cut the text, and did not score it (`logps` is NaN).
        ids: 64-bit digest of the token ids that were scored.
    """

    logps: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    length: np.ndarray
    truncated: np.ndarray
    ids: np.ndarray
    found: np.ndarray


def text_key(row_id: str, side: str) -> bytes:
    """Return the key of a completion scored as text: of the row's id (a hash of all its text) and its side."""
    return hashlib.sha256(f"{row_id} {side}".encode()).digest()[:16]


def text_keys(row_ids: Sequence[str]) -> list[list[bytes]]:
    """Return the keys of the chosen and of the rejected completions of rows."""
    return [[text_key(row_id, side) for row_id in row_ids] for side in SIDES]


def ids_key(
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    num_bytes: int,
    skipped: Sequence[Sequence[int]] = (),
) -> bytes:
    """Return the key of a completion scored as token ids: of the truncated ids and the bytes that the record holds.

    Where some of the ids are not scored, their ranges count as well.
    """
    digest = hashlib.sha256(num_bytes.to_bytes(8, "little"))
    ranges = [edge for each in skipped for edge in each]
    for ids in (prompt_ids, completion_ids, *([ranges] if ranges else ())):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.asarray(ids, dtype=np.int64).tobytes())
    return digest.digest()[:16]


def ids_digest(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> int:
    """Return 64 bits of the token ids, kept in a record so that a tokenizer that splits otherwise is noticed."""
    return int.from_bytes(ids_key(prompt_ids, completion_ids, 0)[:8], "little")


class ScoreCache:
    """The records of one scorer.

    Args:
        root: folder of all scorers; with several nodes it must be on a disk that they share.
        scorer: whose records.

    Raises:
        ValueError: the scorer's folder is damaged or holds something else.
    """

    def __init__(self, root: str | Path, scorer: Scorer) -> None:
        self.scorer = scorer
        self.folder = Path(root) / scorer.key
        self._chunks: set[str] = set()  # names of the files that have been read
        self._parts = [np.zeros(0, _RECORD)]  # their records, joined at the next lookup
        self._index: dict[bytes, int] = {}  # key -> place among all records
        self._scored: set[bytes] = set()
        self._pending: list[tuple[bytes, tuple[Any, ...]]] = []
        if self.folder.exists() and any(self.folder.glob("*.npz")):
            self._check_manifest()
        self.refresh()

    def __len__(self) -> int:
        return len(self._index)

    def _check_manifest(self) -> None:
        path = self.folder / MANIFEST
        if not path.exists():
            raise ValueError(f"{self.folder} holds scores but no {MANIFEST}: delete the folder to score again.")
        if _read_manifest(path).key != self.scorer.key:
            raise ValueError(f"{path} describes another scorer than its folder's name: delete the folder.")

    def check_writable(self, records: int) -> None:
        """Raise a ValueError where the folder cannot be written or has no room for so many more records."""
        with _writing(self.folder, records):
            self._write_manifest()
            probe = self.folder / f".{uuid.uuid4().hex}.probe"
            probe.write_bytes(bytes(1024))
            probe.unlink()
            if shutil.disk_usage(self.folder).free < records * _RECORD_BYTES:
                raise OSError("the disk is full")

    def _write_manifest(self) -> None:
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            write_json(manifest, {"format": FORMAT, "scorer": asdict(self.scorer)})

    def refresh(self) -> None:
        """Read the chunks that other processes have written since the last call."""
        # sorted, and a key's first record wins: where two writers scored it, every fresh reader takes the same one
        for name in sorted(path.name for path in self.folder.glob("*.npz")):
            if name not in self._chunks:
                self._read_chunk(self.folder / name)

    def _read_chunk(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as stored:
                owner, keys = str(stored["scorer"]), stored["keys"]
                records = np.zeros(len(keys), _RECORD)
                for name in _COLUMNS:
                    if len(stored[name]) != len(keys):
                        raise ValueError("columns differ in length")
                    records[name] = stored[name]
        # RuntimeError: a flipped bit says that it is encrypted, or compressed in a way that zipfile does not know
        except (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, *_ZIP_ERRORS) as error:
            raise ValueError(f"{path} is damaged ({error}): delete this file to score its rows again.") from error
        if owner != self.scorer.key:
            raise ValueError(f"{path} was written by another scorer ({owner}): move this file out of the folder.")
        start = sum(map(len, self._parts))
        for place, (key, truncated) in enumerate(zip(map(bytes, keys), records["truncated"]), start):
            # a score replaces the note that the text was too long for a smaller limit
            if truncated:
                self._index.setdefault(key, place)
            elif key not in self._scored:
                self._index[key] = place
                self._scored.add(key)
        self._parts.append(records)
        self._chunks.add(path.name)

    def lookup(self, keys: Sequence[bytes]) -> Scores:
        """Return the records of `keys`; see `Scores.found` for the keys without one."""
        self._parts = [np.concatenate(self._parts)]
        places = np.array([self._index.get(key, -1) for key in keys], dtype=np.int64)
        found = places >= 0
        records = np.zeros(len(keys), _RECORD)
        records[found] = self._parts[0][places[found]]
        return Scores(**{name: records[name].copy() for name in _COLUMNS}, found=found)

    def add(
        self,
        key: bytes,
        *,
        logps: float,
        tokens: int,
        num_bytes: int,
        length: int,
        truncated: bool = False,
        ids: int = 0,
    ) -> None:
        """Add one record; it reaches the disk with the next `flush`, at the latest after 2,048 records."""
        self._pending.append((key, (logps, tokens, num_bytes, length, truncated, ids)))
        if len(self._pending) >= FLUSH_RECORDS:
            self.flush()

    def flush(self) -> None:
        """Write the pending records as one new chunk file, whole or not at all."""
        if not self._pending:
            return
        keys, values = zip(*self._pending)
        records = np.array(list(values), _RECORD)
        columns: dict[str, Any] = {name: records[name] for name in _COLUMNS}
        columns["keys"] = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16)
        path = self.folder / f"{uuid.uuid4().hex}.npz"
        with _writing(self.folder, len(keys)):
            self._write_manifest()
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, allow_pickle=False, scorer=np.array(self.scorer.key), **columns)
        self._pending.clear()
        self._read_chunk(path)


def describe_scorers(root: str | Path) -> list[Scorer]:
    """Return the scorers that have records under `root`.

    Raises:
        ValueError: a manifest is damaged.
    """
    return [_read_manifest(path) for path in sorted(Path(root).glob(f"*/{MANIFEST}"))]


def _read_manifest(path: Path) -> Scorer:
    remedy = f"delete the folder {path.parent} to score its rows again"
    manifest = read_object(path, remedy=remedy)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is of format {manifest.get('format')!r}, expected {FORMAT}: use another folder.")
    try:
        scorer = Scorer(**manifest["scorer"])
        assert scorer.key and isinstance(scorer.name, str)
    except (KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): {remedy}.") from error
    return scorer


@contextmanager
def _writing(folder: Path, records: int) -> Iterator[None]:
    """Turn errors of the disk into one sentence that says which folder, what is needed, and how to continue."""
    try:
        yield
    except OSError as error:
        needed = f"about {max(records * _RECORD_BYTES, 2**20) / 2**20:.0f} MiB for {records} scores"
        raise ValueError(
            f"The score cache cannot be written: {error.filename or folder}: {error.strerror or error}. It needs "
            f"{needed}: free space, allow writing, or set `ref_logps_dir` to another folder. What was written is "
            "kept, and the same command continues."
        ) from error


def explain_missing(root: str | Path, scorer: Scorer) -> str:
    """Say what differs between `scorer` and a scorer under `root` that has the same name or weights."""
    for other in describe_scorers(root):
        if other.name != scorer.name and other.weights != scorer.weights:
            continue
        mine, theirs = asdict(scorer), asdict(other)
        words = {
            "weights": "the weights",
            "tokenizer": "the vocabulary, the chat template or the transformers version",
            "dtype": "the dtype",
        }
        changed = [words.get(k, k) for k in mine if k != "name" and mine[k] != theirs[k]]
        if changed:
            return f"{' and '.join(changed)} changed since it was scored"
    return "it was never scored there"
