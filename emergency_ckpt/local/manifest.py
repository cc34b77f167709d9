"""The manifest: the commit record of a slot. A slot without a valid manifest does not exist.

It appears by rename after its data (invariant 3), is checksummed as a whole, and every field is checked before
it is used, because a ramdisk may hold anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from emergency_ckpt.core.arrangement import MeshPlace
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.core.shards import block_counts
from emergency_ckpt.core.values import Value, values_from_json, values_to_json
from emergency_ckpt.errors import CorruptDataError, UnsupportedStateError
from emergency_ckpt.local.small_files import read_file, replace_file

FORMAT = "emergency_ckpt manifest 2"
_ANY_FORMAT = re.compile(rb"(emergency_ckpt manifest \d{1,9})( .*)?")
_MAX_BYTES = 256 * 1024 * 1024
_T = TypeVar("_T")


class OtherFormatError(CorruptDataError):
    """A manifest that another version of this package wrote.

    Attributes:
      run, step: what it seems to be of, where that can be told; None otherwise.
    """

    run: str | None = None
    step: StepId | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a sealed slot holds.

    Attributes:
      run: run id. nonce: the generation's nonce.
      step: generation and step.
      layout: hash of the layout; `position` is the process index in it whose shards these are.
      checksums: per entry of `Layout.slot_entries(position)`, the checksums of its blocks.
      values: values of the leaves that are not arrays, by leaf name.
      extras: per owning process index, its extras (JSON); those of partners are kept here as well.
      listed: whether the step counts as a local step (False: it was due for the persistent tier only).
      activations: the restores this process knew of.
      metadata: custom metadata and metrics of the save.
      promised: the newest step that this process knew to be complete when it sealed.
      missing: ascending places among the entries, of those whose bytes are not there or not good. At least one
        entry is good. `checksums` are complete all the same, as saved.
      place: where in its mesh the process stood that sealed it; None in manifests of earlier versions.

    Raises ValueError for `missing` that is not so.
    """

    run: str
    nonce: str
    step: StepId
    layout: str
    position: int
    process_count: int
    checksums: tuple[tuple[int, ...], ...]
    values: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    extras: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    listed: bool = True
    activations: tuple[Activation, ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    promised: StepId | None = None
    missing: tuple[int, ...] = ()
    place: MeshPlace | None = None

    def __post_init__(self) -> None:
        if list(self.missing) != sorted(set(self.missing)):
            raise ValueError(f"the missing entries are not ascending: {self.missing!r:.80}")
        if self.missing and not 0 <= self.missing[0] <= self.missing[-1] < len(self.checksums):
            raise ValueError(f"of {len(self.checksums)} entries, {self.missing!r:.80} are said to be missing")
        if self.missing and len(self.missing) == len(self.checksums):
            raise ValueError("every entry is said to be missing: such a slot does not exist")

    def with_checksums(self, checksums: Mapping[int, tuple[int, ...]]) -> Manifest:
        """The same manifest with these checksums, by entry, of copies that had none."""
        known = tuple(each or checksums.get(place, ()) for place, each in enumerate(self.checksums))
        return dataclasses.replace(self, checksums=known)

    def with_missing(self, entries: Iterable[int]) -> Manifest:
        """The same manifest with these entries missing. Raises ValueError where nothing else is left."""
        return dataclasses.replace(self, missing=tuple(sorted(set(entries))))

    @property
    def digest(self) -> str:
        """One checksum over all block checksums and values: equal for replicas, whatever is missing in them."""
        values = json.dumps(values_to_json(self.values))
        return xxhash.xxh3_64_hexdigest(json.dumps(self.checksums).encode() + values.encode())

    def to_bytes(self) -> bytes:
        body = json.dumps(
            {
                "run": self.run,
                "nonce": self.nonce,
                "step": [self.step.generation, self.step.step],
                "layout": self.layout,
                "position": self.position,
                "process_count": self.process_count,
                "checksums": self.checksums,
                "values": values_to_json(self.values),
                "extras": {str(owner): extras for owner, extras in self.extras.items()},
                "listed": self.listed,
                "activations": [[a.generation, a.step] for a in self.activations],
                "metadata": self.metadata,
                "promised": [self.promised.generation, self.promised.step] if self.promised else None,
                "missing": self.missing,
                "place": [self.place.shape, self.place.positions] if self.place else None,
            },
            separators=(",", ":"),
        ).encode()
        return f"{FORMAT} {xxhash.xxh3_128_hexdigest(body)}\n".encode() + body

    @classmethod
    def from_bytes(cls, data: bytes, origin: str) -> Manifest:
        """Parses and checks; `origin` (a path or an address) goes into the error.

        Raises OtherFormatError for a manifest of another format, CorruptDataError for a damaged one.
        """
        header, _, body = data.partition(b"\n")
        said = _ANY_FORMAT.fullmatch(header)
        if said and said[1] != FORMAT.encode():
            raise _other_format(said[1].decode(), body, origin)
        if header != f"{FORMAT} {xxhash.xxh3_128_hexdigest(body)}".encode():
            raise CorruptDataError(
                f"the manifest {origin} is damaged: its first line is {header[:80]!r}, "
                f"expected '{FORMAT} <checksum of the rest>'. The slot is treated as empty."
            )
        try:
            return cls._parse(json.loads(body))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptDataError(
                f"the manifest {origin} has an unusable field: {type(error).__name__}: {error}. The slot is "
                "treated as empty."
            ) from error

    @classmethod
    def _parse(cls, raw: Any) -> Manifest:
        return cls(
            run=_typed(raw["run"], str),
            nonce=_typed(raw["nonce"], str),
            step=_step_id(raw["step"]),
            layout=_typed(raw["layout"], str),
            position=_number(raw["position"]),
            process_count=_number(raw["process_count"]),
            checksums=tuple(tuple(_number(c) for c in blocks) for blocks in _typed(raw["checksums"], list)),
            values=values_from_json(raw["values"]),
            extras={_number(int(owner)): extras for owner, extras in _typed(raw["extras"], dict).items()},
            listed=_typed(raw["listed"], bool),
            activations=tuple(
                Activation(_number(g), None if s is None else _number(s)) for g, s in raw["activations"]
            ),
            metadata=_typed(raw["metadata"], dict),
            # Manifests of earlier versions do not say these. Such a version takes a slot that lacks shards for
            # a damaged one, and gives it up.
            promised=_step_id(promised) if (promised := raw.get("promised")) is not None else None,
            missing=tuple(_number(entry) for entry in _typed(raw.get("missing", []), list)),
            place=_place(place) if (place := raw.get("place")) is not None else None,
        )

    def check_against(self, layout: Layout, data_bytes: int) -> None:
        """Whether this manifest and this layout belong together; raises CorruptDataError otherwise."""
        if layout.hash != self.layout or not 0 <= self.position < layout.process_count:
            raise CorruptDataError(f"the manifest of {self.step} names layout {self.layout}, not {layout.hash}")
        if layout.data_bytes(self.position) > data_bytes:
            raise CorruptDataError(
                f"the slot of {self.step} has {data_bytes} bytes, its layout asks for "
                f"{layout.data_bytes(self.position)}"
            )
        blocks = block_counts(layout.slot_places(self.position).sizes).tolist()
        # A copy that has not come yet has no checksums.
        to_come = {place for place in self.missing if place < len(self.checksums) and not self.checksums[place]}
        listed = [
            blocks[place] if place in to_come and place < len(blocks) else len(each)
            for place, each in enumerate(self.checksums)
        ]
        if listed != blocks:
            raise CorruptDataError(
                f"the manifest of {self.step} does not fit its layout: {len(self.checksums)} shards listed, "
                f"{len(blocks)} expected"
            )


def _other_format(found: str, body: bytes, origin: str) -> OtherFormatError:
    error = OtherFormatError(
        f"the manifest {origin} is in the format '{found}', this version of the package reads '{FORMAT}'"
    )
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raw = json.loads(body)
        error.run = _typed(raw["run"], str)
        error.step = _step_id(raw["step"])
    return error


def _step_id(raw: Any) -> StepId:
    generation, step = (_number(number) for number in _typed(raw, list))
    return StepId(generation, step)


def _place(raw: Any) -> MeshPlace:
    shape, positions = (tuple(map(_number, _typed(each, list))) for each in _typed(raw, list))
    return MeshPlace(shape, positions)


def _number(raw: Any) -> int:
    if type(raw) is not int or not 0 <= raw < 2**64:
        raise ValueError(f"expected a whole number from 0 to 2**64 - 1, found {raw!r:.40}")
    return raw


def _typed(raw: Any, kind: type[_T]) -> _T:
    if not isinstance(raw, kind):
        raise TypeError(f"expected a {kind.__name__}, found {raw!r:.40}")
    return raw


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Puts the manifest in place atomically; the data of all entries that are not missing must be there.

    Raises LocalDirectoryError, and UnsupportedStateError for a manifest that would not be read again; what was
    at `path` then stands as before.
    """
    data = manifest.to_bytes()
    if len(data) > _MAX_BYTES:
        raise UnsupportedStateError(
            f"the manifest of {manifest.step} has {len(data)} bytes, {_MAX_BYTES} at most: leaves that are not "
            "arrays of numbers travel in it. Convert large ones to such arrays, or keep them out of the state."
        )
    replace_file(path, data, f"the manifest of {manifest.step}")


def read_manifest(path: Path) -> Manifest | None:
    """The manifest at `path`, None where there is none.

    Raises CorruptDataError for a damaged one, LocalDirectoryError for what cannot be read.
    """
    data = read_file(path, "manifest", _MAX_BYTES)
    return None if data is None else Manifest.from_bytes(data, str(path))
