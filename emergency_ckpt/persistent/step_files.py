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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.shards import BLOCK_BYTES, block_ranges
from emergency_ckpt.core.values import Value, values_from_json, values_to_json
from emergency_ckpt.errors import CorruptDataError

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

_FORMAT_VERSION = 1
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
        raw = unseal(data, where)
        try:
            raw["step_id"] = StepId(*raw["step_id"])
            raw["values"] = values_from_json(raw["values"])
            return cls(**raw)
        except (TypeError, KeyError) as error:
            raise CorruptDataError(f"{where} has unexpected content: {error}") from error


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


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The content of a sealed file; raises CorruptDataError naming `where` if it is not what was written."""
    body, _, rest = data.partition(b"\n")
    if rest != digest(body).encode() + b"\n":
        raise CorruptDataError(
            f"{where} is damaged: its checksum does not match its {len(data)} bytes."
            " The step is not usable; restore another one, or the file from a backup."
        )
    try:
        content = json.loads(body)
        version = content.pop("format")
    except (ValueError, AttributeError, KeyError) as error:
        raise CorruptDataError(f"{where} is not a file of ours: {error}") from error
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


def extras_from_json(raw: Mapping[str, str], where: str) -> dict[str, bytes]:
    try:
        return {key: base64.b64decode(data, validate=True) for key, data in raw.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptDataError(f"{where} is damaged: {error}") from error
