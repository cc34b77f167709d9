"""The layout: the global table of leaves, boxes and holders that all processes of one job shape share.

Every process derives the same layout from the shardings alone, so nothing is sent to agree on it; its hash
names it in manifests. The bytes of Orbax's metadata files travel in it ready-made, so that a process which
has no jax can write a checkpoint that Orbax reads.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from emergency_ckpt.core.box_table import BoxTable, Numbers
from emergency_ckpt.core.holders import ShardHolders
from emergency_ckpt.core.layout_format import (
    FORMAT_VERSION,
    READABLE_VERSIONS,
    shards_from_json,
    shards_to_json,
)
from emergency_ckpt.core.shard_table import HeldShards, ShardIndex, ShardTable
from emergency_ckpt.core.shards import Box, Shard, dtype_of
from emergency_ckpt.errors import CorruptDataError

ARRAY_METADATA_FILE = "array_metadatas/process_0"
SHARD_ALIGNMENT = 4096
_MOST_LEAF_BYTES = 1 << 62  # What is computed from it fits 64 bits.


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


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class SlotPlaces:
    """Where the shards of a slot lie, as numbers: indices into `Layout.shards`, byte offsets and lengths."""

    shards: Numbers
    offsets: Numbers
    sizes: Numbers


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
      format: version of the serialisation that names this layout; those read from older files keep theirs.

    `shards` and `process_shards` may be given as any sequences; they are kept as compact tables.
    """

    leaves: tuple[LeafSpec, ...]
    shards: Sequence[Shard]
    process_shards: Sequence[tuple[int, ...]]
    process_slice: tuple[int, ...]
    value_leaves: tuple[str, ...] = ()
    metadata_files: tuple[tuple[str, bytes], ...] = ()
    format: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not isinstance(self.shards, ShardTable):
            object.__setattr__(self, "shards", ShardTable.of(self.shards))
        if not isinstance(self.process_shards, HeldShards):
            object.__setattr__(self, "process_shards", HeldShards.of(self.process_shards))

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
        boxes: dict[str, dict[int, list[Box]]] = {}
        for process, held in holders.items():
            for shard in held:
                boxes.setdefault(shard.leaf, {}).setdefault(process, []).append(shard.box)
        return cls.build_from_boxes(leaves, boxes, process_slice, value_leaves, metadata_files)

    @classmethod
    def build_from_boxes(
        cls,
        leaves: Iterable[LeafSpec],
        boxes: Mapping[str, Mapping[int, Iterable[Box]]],
        process_slice: tuple[int, ...],
        value_leaves: Iterable[str] = (),
        metadata_files: Mapping[str, bytes] | None = None,
    ) -> Layout:
        """The layout in which of each leaf each process holds the boxes given for it.

        Leaves that share one mapping are worked out once: in a large job most are cut like many others.
        """
        known: dict[int, tuple[BoxTable, Numbers, Numbers]] = {}
        cuts: dict[str, tuple[BoxTable, Numbers, Numbers]] = {}
        for leaf, held in sorted(boxes.items()):
            cut = known.get(id(held)) or known.setdefault(id(held), _cut(held, len(process_slice)))
            if len(cut[0]):
                cuts[leaf] = cut
        shards = ShardTable(cuts, (table for table, _, _ in cuts.values()))
        none = np.empty(0, np.int64)
        owners = np.concatenate([none, *(processes for _, processes, _ in cuts.values())])
        firsts = zip(shards.first, cuts.values(), strict=False)
        indices = np.concatenate([none, *(rows + first for first, (_, _, rows) in firsts)])
        return cls(
            leaves=tuple(sorted(leaves, key=lambda leaf: leaf.name)),
            shards=shards,
            process_shards=HeldShards.of_pairs(range(len(process_slice)), owners, indices),
            process_slice=process_slice,
            value_leaves=tuple(sorted(value_leaves)),
            metadata_files=tuple(sorted((metadata_files or {}).items())),
        )

    @property
    def table(self) -> ShardTable:
        """`shards` as the table that they are."""
        assert isinstance(self.shards, ShardTable)
        return self.shards

    @property
    def held(self) -> HeldShards:
        """`process_shards` as the table that they are."""
        assert isinstance(self.process_shards, HeldShards)
        return self.process_shards

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
        return ShardIndex(self.table)

    @functools.cached_property
    def shard_sizes(self) -> Numbers:
        """Bytes of each shard in memory and in slots (C order, one byte per sub-byte element)."""
        table = self.table
        sizes = [
            boxes.sizes * dtype_of(self.leaf[leaf].dtype).itemsize
            for leaf, boxes in zip(table.leaves, table.boxes, strict=True)
        ]
        return np.concatenate(sizes) if sizes else np.empty(0, np.int64)

    @functools.cached_property
    def shard_nbytes(self) -> tuple[int, ...]:
        """The same as plain numbers."""
        return tuple(self.shard_sizes.tolist())

    @functools.cached_property
    def shard_holders(self) -> ShardHolders:
        """Per shard, the processes that hold it, ascending."""
        return ShardHolders(self.held, len(self.shards))

    def slot_places(self, process: int) -> SlotPlaces:
        """Where each shard of `process` lies in its slot; equal shard sets give equal offsets."""
        held = self.held.of_process(process)
        sizes = self.shard_sizes[held]
        room = -(-sizes // SHARD_ALIGNMENT) * SHARD_ALIGNMENT
        return SlotPlaces(held, np.cumsum(room) - room, sizes)

    def slot_entries(self, process: int) -> tuple[SlotEntry, ...]:
        """The same, shard by shard."""
        places = self.slot_places(process)
        rows = zip(places.shards.tolist(), places.offsets.tolist(), places.sizes.tolist(), strict=True)
        return tuple(itertools.starmap(SlotEntry, rows))

    def typed(self, shard: int, data: np.ndarray) -> np.ndarray:
        """Flat uint8 bytes of a shard, as a view in its dtype and shape."""
        of = self.shards[shard]
        return data.view(dtype_of(self.leaf[of.leaf].dtype)).reshape(of.box.shape)

    def data_bytes(self, process: int) -> int:
        """Bytes of the data region of a slot of `process`."""
        places = self.slot_places(process)
        if not len(places.shards):
            return 0
        return -(-int(places.offsets[-1] + places.sizes[-1]) // SHARD_ALIGNMENT) * SHARD_ALIGNMENT

    @functools.cached_property
    def hash(self) -> str:
        """Name of this layout: 128-bit xxh3 of its canonical bytes, hexadecimal."""
        return xxhash.xxh3_128_hexdigest(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Canonical serialisation (JSON): equal layouts give equal bytes."""
        return json.dumps(
            {
                "format": self.format,
                "leaves": [[leaf.name, list(leaf.shape), leaf.dtype] for leaf in self.leaves],
                **shards_to_json(self.table, self.held, self.format),
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
        version: Any = raw["format"]
        if type(version) is not int or version not in READABLE_VERSIONS:
            raise ValueError(f"format version {version!r:.40}, this package reads {READABLE_VERSIONS}")
        shards, held = shards_from_json(raw, version)
        layout = cls(
            leaves=tuple(
                LeafSpec(str(name), tuple(int(n) for n in shape), str(dtype))
                for name, shape, dtype in raw["leaves"]
            ),
            shards=shards,
            process_shards=held,
            process_slice=tuple(map(int, raw["process_slice"])),
            value_leaves=tuple(map(str, raw["value_leaves"])),
            metadata_files=tuple(
                (str(p), base64.b64decode(b, validate=True)) for p, b in raw["metadata_files"]
            ),
            format=version,
        )
        layout._check()
        return layout

    def _check(self) -> None:
        if len(self.leaf) != len(self.leaves):
            raise ValueError("a leaf appears twice")
        for leaf in self.leaves:
            if math.prod(leaf.shape) * dtype_of(leaf.dtype).itemsize >= _MOST_LEAF_BYTES:
                raise ValueError(f"leaf {leaf.name!r:.80} is larger than any memory")
        room = self.shard_sizes.sum(dtype=np.float64) + SHARD_ALIGNMENT * len(self.shards)
        if room >= _MOST_LEAF_BYTES:
            raise ValueError("its shards are larger than any memory")
        for name, boxes in zip(self.table.leaves, self.table.boxes, strict=True):
            shape = np.array(self.leaf[name].shape, np.int64)
            if boxes.dimensions != len(shape) or (boxes.rows[:, boxes.dimensions :] > shape).any():
                raise ValueError(f"shards of {name!r:.80} lie outside of it")
        if len(self.process_shards) != len(self.process_slice):
            raise ValueError("process_shards and process_slice differ in length")
        if min(self.process_slice, default=0) < 0:
            raise ValueError("process_slice has a negative slice")
        for held in self.held.lists:
            if len(held) and (held[0] < 0 or held[-1] >= len(self.shards)):
                raise ValueError("process_shards has indices of shards that there are not")
        for path, _ in self.metadata_files:
            if path.startswith("/") or ".." in path.split("/"):
                raise ValueError(f"metadata file path {path!r} leaves the checkpoint")


def _cut(held: Mapping[int, Iterable[Box]], process_count: int) -> tuple[BoxTable, Numbers, Numbers]:
    """The boxes of one leaf, and who holds which: processes ascending, the rows of each ascending."""
    by_process = {p: frozenset(boxes) for p, boxes in sorted(held.items()) if 0 <= p < process_count}
    table = BoxTable.of(sorted({box for boxes in by_process.values() for box in boxes}))
    rows = {
        p: sorted(row for box in boxes if (row := table.find(box)) is not None)
        for p, boxes in by_process.items()
    }
    owners = np.repeat(np.array(list(rows), np.int64), [len(each) for each in rows.values()])
    return table, owners, np.array([row for each in rows.values() for row in each], np.int64)
