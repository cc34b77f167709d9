"""The layout: the global table of leaves, boxes and holders that all processes of one job shape share.

Every process derives the same layout from the shardings alone, so nothing is sent to agree on it; its hash
names it in manifests. The bytes of Orbax's metadata files travel in it ready-made, so that a process which
has no jax can write a checkpoint that Orbax reads.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash

from emergency_ckpt.core.shards import Box, Shard, dtype_of
from emergency_ckpt.errors import CorruptDataError

FORMAT_VERSION = 1
ARRAY_METADATA_FILE = "array_metadatas/process_0"
SHARD_ALIGNMENT = 4096


def key_implementations(array_metadata: bytes) -> dict[str, str]:
    """PRNG implementation by leaf, from Orbax's file of that name: as stored, typed keys are plain integers.

    Raises ValueError, TypeError, KeyError or AttributeError for a file that is damaged.
    """
    raw: Any = json.loads(array_metadata)
    described = [entry["array_metadata"] for entry in raw.get("array_metadatas", [])]
    return {
        str(entry["param_name"]): str(entry["ext_metadata"]["random_key_impl"])
        for entry in described
        if entry["ext_metadata"] and entry["ext_metadata"].get("random_key_impl")
    }


@dataclasses.dataclass(frozen=True, slots=True)
class LeafSpec:
    """One array of the state: its name (Orbax's parameter name), global shape and dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True, slots=True)
class SlotEntry:
    """Where one shard lies in a slot: index into `Layout.shards`, byte offset and length."""

    shard: int
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which shards exist and which process holds which.

    Attributes:
      leaves: every array leaf, sorted by name.
      shards: every distinct shard, sorted by (leaf, box).
      process_shards: per process index, the ascending indices into `shards` that it holds
        (in-process duplicates count once).
      process_slice: per process index, its slice.
      value_leaves: names of leaves that are not arrays (Python scalars, strings): their values
        travel in the manifest.
      metadata_files: (relative path, content) of Orbax's metadata files for this state.
    """

    leaves: tuple[LeafSpec, ...]
    shards: tuple[Shard, ...]
    process_shards: tuple[tuple[int, ...], ...]
    process_slice: tuple[int, ...]
    value_leaves: tuple[str, ...] = ()
    metadata_files: tuple[tuple[str, bytes], ...] = ()

    @classmethod
    def build(
        cls,
        leaves: Iterable[LeafSpec],
        holders: Mapping[int, Iterable[Shard]],
        process_slice: tuple[int, ...],
        value_leaves: Iterable[str] = (),
        metadata_files: Mapping[str, bytes] | None = None,
    ) -> Layout:
        """The layout in which each process of `holders` holds the shards given for it."""
        shards = sorted({shard for held in holders.values() for shard in held})
        index = {shard: i for i, shard in enumerate(shards)}
        return cls(
            leaves=tuple(sorted(leaves, key=lambda leaf: leaf.name)),
            shards=tuple(shards),
            process_shards=tuple(
                tuple(sorted({index[s] for s in holders.get(p, ())})) for p in range(len(process_slice))
            ),
            process_slice=process_slice,
            value_leaves=tuple(sorted(value_leaves)),
            metadata_files=tuple(sorted((metadata_files or {}).items())),
        )

    @property
    def process_count(self) -> int:
        return len(self.process_slice)

    @property
    def slice_count(self) -> int:
        return max(self.process_slice, default=-1) + 1

    @functools.cached_property
    def leaf(self) -> Mapping[str, LeafSpec]:
        """Leaf by name."""
        return {leaf.name: leaf for leaf in self.leaves}

    @functools.cached_property
    def key_implementations(self) -> Mapping[str, str]:
        """PRNG implementation by leaf, of those that are typed keys."""
        return key_implementations(dict(self.metadata_files).get(ARRAY_METADATA_FILE, b"{}"))

    @functools.cached_property
    def shard_index(self) -> Mapping[Shard, int]:
        return {shard: i for i, shard in enumerate(self.shards)}

    @functools.cached_property
    def shard_nbytes(self) -> tuple[int, ...]:
        """Bytes of each shard in memory and in slots (C order, one byte per sub-byte element)."""
        itemsize = {leaf.name: dtype_of(leaf.dtype).itemsize for leaf in self.leaves}
        return tuple(shard.box.size * itemsize[shard.leaf] for shard in self.shards)

    @functools.cached_property
    def shard_holders(self) -> tuple[tuple[int, ...], ...]:
        """Per shard, the processes that hold it, ascending."""
        holders: list[list[int]] = [[] for _ in self.shards]
        for process, held in enumerate(self.process_shards):
            for shard in held:
                holders[shard].append(process)
        return tuple(map(tuple, holders))

    def slot_entries(self, process: int) -> tuple[SlotEntry, ...]:
        """Where each shard of `process` lies in its slot; equal shard sets give equal offsets."""
        entries: list[SlotEntry] = []
        at = 0
        for shard in self.process_shards[process]:
            nbytes = self.shard_nbytes[shard]
            entries.append(SlotEntry(shard, at, nbytes))
            at += -(-nbytes // SHARD_ALIGNMENT) * SHARD_ALIGNMENT
        return tuple(entries)

    def typed(self, shard: int, data: np.ndarray) -> np.ndarray:
        """Flat uint8 bytes of a shard, as a view in its dtype and shape."""
        of = self.shards[shard]
        return data.view(dtype_of(self.leaf[of.leaf].dtype)).reshape(of.box.shape)

    def data_bytes(self, process: int) -> int:
        """Bytes of the data region of a slot of `process`."""
        entries = self.slot_entries(process)
        return (
            -(-(entries[-1].offset + entries[-1].nbytes) // SHARD_ALIGNMENT) * SHARD_ALIGNMENT if entries else 0
        )

    @functools.cached_property
    def hash(self) -> str:
        """Name of this layout: 128-bit xxh3 of its canonical bytes, hexadecimal."""
        return xxhash.xxh3_128_hexdigest(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Canonical serialisation (JSON): equal layouts give equal bytes."""
        boxes = [[shard.leaf, list(shard.box.start), list(shard.box.stop)] for shard in self.shards]
        return json.dumps(
            {
                "format": FORMAT_VERSION,
                "leaves": [[leaf.name, list(leaf.shape), leaf.dtype] for leaf in self.leaves],
                "shards": boxes,
                "process_shards": [list(held) for held in self.process_shards],
                "process_slice": list(self.process_slice),
                "value_leaves": list(self.value_leaves),
                "metadata_files": [[p, base64.b64encode(b).decode()] for p, b in self.metadata_files],
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Layout:
        """Parses and checks what `to_bytes` wrote; raises CorruptDataError for anything else."""
        try:
            return cls._parse(json.loads(data))
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
            raise CorruptDataError(f"a layout file is damaged or of another version: {error}") from error

    @classmethod
    def _parse(cls, raw: Any) -> Layout:
        if raw["format"] != FORMAT_VERSION:
            raise ValueError(f"format version {raw['format']}, this package reads {FORMAT_VERSION}")
        layout = cls(
            leaves=tuple(
                LeafSpec(str(name), tuple(int(n) for n in shape), str(dtype))
                for name, shape, dtype in raw["leaves"]
            ),
            shards=tuple(
                Shard(str(leaf), Box(tuple(map(int, start)), tuple(map(int, stop))))
                for leaf, start, stop in raw["shards"]
            ),
            process_shards=tuple(tuple(map(int, held)) for held in raw["process_shards"]),
            process_slice=tuple(map(int, raw["process_slice"])),
            value_leaves=tuple(map(str, raw["value_leaves"])),
            metadata_files=tuple(
                (str(p), base64.b64decode(b, validate=True)) for p, b in raw["metadata_files"]
            ),
        )
        layout._check()
        return layout

    def _check(self) -> None:
        if len(self.leaf) != len(self.leaves) or len(self.shard_index) != len(self.shards):
            raise ValueError("a leaf or a shard appears twice")
        for leaf in self.leaves:
            dtype_of(leaf.dtype)
        for shard in self.shards:
            if not Box.whole(self.leaf[shard.leaf].shape).contains(shard.box):
                raise ValueError(f"shard {shard} lies outside its leaf")
        if len(self.process_shards) != len(self.process_slice):
            raise ValueError("process_shards and process_slice differ in length")
        if min(self.process_slice, default=0) < 0:
            raise ValueError("process_slice has a negative slice")
        for held in self.process_shards:
            if list(held) != sorted(set(held)) or any(not 0 <= s < len(self.shards) for s in held):
                raise ValueError("process_shards is not an ascending list of shard indices")
        for path, _ in self.metadata_files:
            if path.startswith("/") or ".." in path.split("/"):
                raise ValueError(f"metadata file path {path!r} leaves the checkpoint")
