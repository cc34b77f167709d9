"""Our own files in a step directory, beside Orbax's: their names and their bytes.

Each is sealed by a checksum, so that a damaged one is refused and never half believed. The side file's name
carries the generation: which steps exist is known from names alone.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.shards import BLOCK_BYTES, block_ranges
from emergency_ckpt.core.values import Value, values_from_json, values_to_json
from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.persistent.fields import UNUSABLE, parsed, step_id, typed, whole_number
from emergency_ckpt.persistent.files import Files

ITEM_NAMES = ("default", "state", "items")
ORBAX_TREE_FILE = "_METADATA"
ORBAX_STEP_FILE = "_CHECKPOINT_METADATA"
ORBAX_STRINGS_FILE = "_strings.json"
ORBAX_COMMIT_FILE = "commit_success.txt"
ORBAX_METRICS_FILE = "metrics/metrics"
LAYOUT_FILE = "emergency_ckpt.layout.json"
CHECKSUMS_FILE = "emergency_ckpt.checksums"
EXTRAS_FILE = "emergency_ckpt.extras.json"
PARTS_DIRECTORY = "emergency_ckpt.parts"
CLAIM_FILE = "emergency_ckpt.committer"
OCDBT_MANIFEST = "manifest.ocdbt"  # the root of an OCDBT store

# Those of ours whose names are the same in every step.
OUR_FILES = (LAYOUT_FILE, CHECKSUMS_FILE, EXTRAS_FILE, CLAIM_FILE)

_FORMAT_VERSION = 1
_STEP_ADVICE = "The step is not usable; restore another one, or this file from a backup."
_SIDE_FILE = re.compile(r"emergency_ckpt\.([1-9]\d*)\.([0-9a-f]+)\.json")


@dataclasses.dataclass(frozen=True)
class SideInfo:
    """What a checkpoint of ours knows beyond Orbax's format.

    Attributes:
      run_id: the run that saved it.
      step_id: generation and step; `nonce` is the generation's.
      item: name of the item directory.
      layout_hash: hash of the layout in `LAYOUT_FILE`, of which the checksums table is a column.
      max_chunk_bytes, compression: how arrays were written.
      values: the leaves that are not arrays.
      custom_metadata, metrics: JSON of the user.
      digests: file name → checksum of our other files.
    """

    run_id: str
    step_id: StepId
    nonce: str
    item: str
    layout_hash: str
    max_chunk_bytes: int
    compression: str
    values: Mapping[str, Value]
    custom_metadata: Mapping[str, Any]
    metrics: Mapping[str, Any]
    digests: Mapping[str, str]

    def to_bytes(self) -> bytes:
        raw = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        raw["step_id"] = [self.step_id.generation, self.step_id.step]
        raw["values"] = values_to_json(self.values)
        return seal(raw)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> SideInfo:
        return parsed(unseal(data, where, _STEP_ADVICE), cls._parse, where, _STEP_ADVICE)

    @classmethod
    def _parse(cls, raw: Any) -> SideInfo:
        return cls(
            run_id=typed(raw["run_id"], str),
            step_id=step_id(raw["step_id"]),
            nonce=typed(raw["nonce"], str),
            item=_item_name(raw["item"]),
            layout_hash=typed(raw["layout_hash"], str),
            max_chunk_bytes=whole_number(raw["max_chunk_bytes"]),
            compression=typed(raw["compression"], str),
            values=values_from_json(raw["values"]),
            custom_metadata=typed(raw["custom_metadata"], dict),
            metrics=typed(raw["metrics"], dict),
            digests={name: typed(found, str) for name, found in typed(raw["digests"], dict).items()},
        )


@dataclasses.dataclass(frozen=True)
class Mark:
    """What the commit marker of a step on an object store says: which attempt the step is.

    `digests`: the checksums of its side file and of the root of its array store, by path.
    """

    step_id: StepId
    nonce: str
    ordinal: int
    digests: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        step = [self.step_id.generation, self.step_id.step]
        return {"step_id": step, "nonce": self.nonce, "ordinal": self.ordinal, "digests": dict(self.digests)}

    def to_bytes(self) -> bytes:
        return seal(self.to_json())

    @classmethod
    def read(cls, files: Files) -> Mark | None:
        """The mark of the step whose files these are; None where the marker is another program's, or none.

        Raises CorruptDataError, PersistentStoreError.
        """
        try:
            data = files.read(ORBAX_COMMIT_FILE)
        except FileNotFoundError:
            return None
        if not data.startswith(b"{"):
            return None
        where = files.locate(ORBAX_COMMIT_FILE)
        return parsed(unseal(data, where, _STEP_ADVICE), cls.from_json, where, _STEP_ADVICE)

    def speaks_of(self, files: Files) -> bool:
        """Whether the chief files of a step are those of this mark."""
        try:
            return all(digest(files.read(path)) == expected for path, expected in self.digests.items())
        except FileNotFoundError:
            return False

    @classmethod
    def from_json(cls, raw: Any) -> Mark:
        """Raises KeyError, TypeError, ValueError for what is no mark."""
        return cls(
            step_id(raw["step_id"]),
            typed(raw["nonce"], str),
            whole_number(raw["ordinal"]),
            {path: typed(found, str) for path, found in typed(raw["digests"], dict).items()},
        )


def read_side_info(files: Files, names: Iterable[str], directory_step: int | None = None) -> SideInfo | None:
    """What the side file among `names` says of the step whose files these are; None where there is none.

    `directory_step` is the step that the name of the directory stands for, None where that is not known.
    Raises CorruptDataError for a side file that is damaged, gone, or of another step than its name or that of
    the directory says; PersistentStoreError.
    """
    listed = list(names)
    mark = Mark.read(files) if ORBAX_COMMIT_FILE in listed else None
    if mark is not None:
        listed = [side_file_name(mark.step_id.generation, mark.nonce)]
    known = [(said, name) for name in listed if (said := parse_side_file_name(name))]
    if not known:
        return None
    said, name = max(known)
    where = files.locate(name)
    try:
        data = files.read(name)
        side = SideInfo.from_bytes(data, where)
        if mark is not None:
            _check_marked(files, mark, name, data)
    except FileNotFoundError as error:
        raise CorruptDataError(
            f"{where} was listed and cannot be opened: the step was deleted just now, or is damaged."
            " Restore another one."
        ) from error
    if said != (side.step_id.generation, side.nonce):
        raise CorruptDataError(
            f"{where} was saved by generation {side.step_id.generation} ({side.nonce}): it was renamed or"
            f" copied. {_STEP_ADVICE}"
        )
    if directory_step not in (None, side.step_id.step):
        raise CorruptDataError(
            f"{files.locate()} holds {side.step_id}, its directory says {directory_step}: it was renamed or"
            " copied. Give it its own name again, or delete it."
        )
    return side


def _check_marked(files: Files, mark: Mark, side_name: str, side: bytes) -> None:
    """The chief objects must be those of the attempt that the marker names."""
    for path, expected in mark.digests.items():
        found = digest(side if path == side_name else files.read(path))
        if found != expected:
            raise CorruptDataError(
                f"{files.locate(path)} is not of the attempt that {files.locate(ORBAX_COMMIT_FILE)} says was"
                f" committed: its checksum is {found}, expected {expected}. {_STEP_ADVICE}"
            )


def commit_text(step: StepId) -> bytes:
    """The commit marker of a step on a file system, where the name of the directory is what counts."""
    return f"{step} was committed.\n".encode()


def side_file_name(generation: int, nonce: str) -> str:
    return f"emergency_ckpt.{generation}.{nonce}.json"


def parse_side_file_name(name: str) -> tuple[int, str] | None:
    """Generation and nonce, or None for another file."""
    match = _SIDE_FILE.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def seal(content: Mapping[str, Any]) -> bytes:
    """JSON in one line and its checksum in another."""
    body = json.dumps({"format": _FORMAT_VERSION, **content}, separators=(",", ":")).encode()
    return body + b"\n" + digest(body).encode() + b"\n"


def unseal(data: bytes, where: str, advice: str) -> dict[str, Any]:
    """The content of a sealed file; raises CorruptDataError naming `where` if it is not what was written.

    `advice` ends the message: what the file is, where that does not go without saying, and what to do.
    """
    body, _, rest = data.partition(b"\n")
    if rest != digest(body).encode() + b"\n":
        raise CorruptDataError(
            f"{where} is damaged: its checksum does not match its {len(data)} bytes. {advice}"
        )
    try:
        content = typed(json.loads(body), dict)
        version = content.pop("format")
    except UNUSABLE as error:
        raise CorruptDataError(
            f"{where} is not a file of ours: {type(error).__name__}: {error}. {advice}"
        ) from error
    if version != _FORMAT_VERSION:
        raise CorruptDataError(
            f"{where} has format {version}, this package reads {_FORMAT_VERSION}."
            " Use the version of the package that wrote it."
        )
    return content


def digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def block_count(nbytes: int) -> int:
    """How many checksums a shard of `nbytes` has."""
    return len(block_ranges(nbytes, BLOCK_BYTES))


def checksums_to_bytes(checksums: Sequence[Sequence[int]]) -> bytes:
    """The table of block checksums, shard after shard in the order of `Layout.shards`."""
    return np.array([c for shard in checksums for c in shard], dtype="<u8").tobytes()


def checksums_from_bytes(data: bytes, layout: Layout, where: str) -> tuple[tuple[int, ...], ...]:
    counts = [block_count(nbytes) for nbytes in layout.shard_nbytes]
    if len(data) != 8 * sum(counts):
        raise CorruptDataError(f"{where} has {len(data)} bytes, its layout needs {8 * sum(counts)}")
    flat = np.frombuffer(data, dtype="<u8").tolist()
    ends = np.cumsum([0, *counts]).tolist()
    return tuple(tuple(flat[a:b]) for a, b in itertools.pairwise(ends))


def extras_to_json(extras: Mapping[str, bytes]) -> dict[str, str]:
    return {key: base64.b64encode(data).decode() for key, data in sorted(extras.items())}


def extras_from_json(raw: Any) -> dict[str, bytes]:
    """Raises what `fields.parsed` expects for anything that `extras_to_json` did not write."""
    return {str(int(key)): base64.b64decode(data, validate=True) for key, data in typed(raw, dict).items()}


def _item_name(raw: Any) -> str:
    if "/" in typed(raw, str) or raw in (".", ".."):
        raise ValueError(f"expected the name of an item, found {raw!r:.40}")
    return raw
