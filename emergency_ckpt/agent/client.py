"""The peer client: fetches shards from an agent straight into their places, and verifies every block.

A shard that was fetched without an error is bit for bit what was saved. The connection is kept; several of
these in several threads share the work.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import xxhash

from emergency_ckpt.agent.block_ranges import Asked, BlockRange, gaps_behind
from emergency_ckpt.agent.connection import MOST_BUFFERS, Answer, PeerConnection
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.slot_id import SlotId
from emergency_ckpt.agent.slots_on_disk import MAX_LAYOUT_BYTES, MAX_MANIFEST_BYTES
from emergency_ckpt.core.checksums import shard_seed
from emergency_ckpt.core.layout import SHARD_ALIGNMENT, Layout, SlotPlaces
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.shards import BLOCK_BYTES, block_ranges
from emergency_ckpt.errors import CorruptDataError, CorruptShardsError, PeerUnavailableError
from emergency_ckpt.local.manifest import Manifest

TIMEOUT = timedelta(seconds=20)
_BATCH_BYTES = 256 * 1024 * 1024
_BATCH_RANGES = 4096
_CACHED_BYTES = 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class SlotHolding:
    """A slot that an agent says it has; nothing of it is verified.

    `bytes` is the size of its file, `missing` the number of shards that are not good in it, `extras_of` the
    processes whose extras are kept with it.
    """

    id: SlotId
    nonce: str
    digest: str
    listed: bool
    bytes: int
    missing: int = 0
    extras_of: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of a shard to be fetched into `target`, contiguous uint8 of just their bytes.

    `shard` is an index into the layout's shards; `count` None means all blocks from `first` on.
    """

    shard: int
    target: np.ndarray
    first: int = 0
    count: int | None = None


class PeerClient:
    """Asks one agent. Safe to use from any thread; one request at a time.

    Args:
      endpoint: where the agent is, and its token.
      timeout: for connecting, for an answer to begin, and for any pause in it.
      dial: the address to connect to, where it is not the endpoint's (an agent on this very host).

    Every method raises PeerUnavailableError for an agent that is gone, late, or answers something else.
    """

    def __init__(self, endpoint: Endpoint, timeout: timedelta = TIMEOUT, dial: str | None = None) -> None:
        self.endpoint = endpoint
        self._connection = PeerConnection(endpoint, timeout, dial)
        self._guard = threading.Lock()

    def close(self) -> None:
        """Closes the connection; another call opens it again."""
        with self._guard:
            self._connection.close()

    def give_up(self) -> None:
        """Ends what another thread is asking; every later call fails."""
        self._connection.give_up()

    def __enter__(self) -> PeerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def status(self) -> dict[str, Any]:
        """What the agent says of itself: `format`, `version`, `pid`, `directory`, `runs`, `trainers`, ..."""
        with self._guard:
            said = self._connection.read_json("GET", "/v1/status")
        if not isinstance(said, dict) or type(said.get("format")) is not int:
            raise self._nonsense("a status without a format version")
        return said

    def leave(self) -> None:
        """Asks the agent to end."""
        with self._guard:
            self._connection.read_json("POST", "/v1/leave")

    def inventory(self) -> tuple[SlotHolding, ...]:
        """The slots that the agent has, as their manifests say, of all runs. Unverified."""
        with self._guard:
            rows = self._connection.read_json("GET", "/v1/inventory")
        try:
            return tuple(_holding(row) for row in rows)
        except (TypeError, ValueError, KeyError) as error:
            raise self._nonsense(f"an inventory with an unusable row ({error})") from error

    def layout(self, layout_hash: str) -> Layout:
        """The layout of this hash. Raises CorruptDataError where the agent's file is damaged."""
        with self._guard:
            data = self._connection.read_bytes("GET", f"/v1/layouts/{layout_hash}", MAX_LAYOUT_BYTES)
        layout = Layout.from_bytes(data)
        if layout.hash != layout_hash:
            raise CorruptDataError(f"the agent at {self.endpoint} sent layout {layout.hash} for {layout_hash}")
        return layout

    def manifest(self, slot: SlotId) -> Manifest:
        """The manifest of a slot. Raises CorruptDataError for one that is damaged or not of this slot."""
        with self._guard:
            data = self._connection.read_bytes("GET", f"{slot.address}/manifest", MAX_MANIFEST_BYTES)
        manifest = Manifest.from_bytes(data, f"of {slot} from {self.endpoint}")
        found = SlotId(manifest.run, manifest.step, manifest.layout, manifest.position)
        if found != slot:
            raise CorruptDataError(f"the agent at {self.endpoint} sent the manifest of {found} for {slot}")
        return manifest

    def fetch(
        self, slot: SlotId, layout: Layout, manifest: Manifest, wanted: Iterable[tuple[int, np.ndarray]]
    ) -> int:
        """Fetches whole shards, `(index into layout.shards, place)` each; returns the number of bytes.

        A place is flat contiguous uint8 of the shard's size. `layout` and `manifest` are those of the slot.
        What lies in the places is defined only once this returned, and for shards not named by
        CorruptShardsError.

        Raises:
          CorruptShardsError: some shards do not match their checksums; all others are good.
          PeerUnavailableError: the agent is gone, or the step is no longer there.
          ValueError: a shard that this slot does not have, or a place of another size.
        """
        return self.fetch_blocks(slot, layout, manifest, [Blocks(shard, place) for shard, place in wanted])

    def fetch_blocks(self, slot: SlotId, layout: Layout, manifest: Manifest, wanted: Iterable[Blocks]) -> int:
        """Like `fetch`, for those who need only some blocks (of `BLOCK_BYTES`) of a shard."""
        if (manifest.layout, manifest.position) != (layout.hash, slot.position) or slot.layout != layout.hash:
            raise ValueError(f"layout {layout.hash} and the manifest of {manifest.step} are not of {slot}")
        places = layout.slot_places(manifest.position)
        place_of = {shard: place for place, shard in enumerate(places.shards.tolist())}
        whole: dict[int, _Piece] = {}
        parts: list[_Piece] = []
        for blocks in wanted:
            for piece in _cut(blocks, layout, manifest, place_of):
                if piece.is_whole and piece.shard not in whole:
                    whole[piece.shard] = piece
                else:
                    parts.append(piece)
        bad: set[int] = set()
        pieces = [whole[shard] for shard in sorted(whole)] + parts
        with self._guard:
            for batch in _batches(pieces):
                bad |= self._fetch_batch(slot, batch, places)
        if bad:
            self._raise_corrupt(slot, layout, manifest, bad)
        return sum(piece.target.nbytes for piece in pieces)

    def _fetch_batch(self, slot: SlotId, batch: Sequence[_Piece], places: SlotPlaces) -> set[int]:
        """One request, whole shards first; returns the shards that are not what they should be."""
        whole = [piece.shard for piece in batch if piece.is_whole]
        parts = batch[len(whole) :]
        gaps = [*gaps_behind(whole, places), *(0 for _ in parts)]
        expected = sum(piece.target.nbytes for piece in batch) + sum(gaps)

        def read(answer: Answer) -> set[int]:
            if answer.length != expected:
                raise self._nonsense(f"{answer.length} bytes of shards where {expected} were asked for")
            return _receive(answer, zip(batch, gaps, strict=True))

        asked = Asked(whole, [BlockRange(piece.shard, piece.first, piece.count) for piece in parts])
        return self._connection.exchange(
            "POST", f"{slot.address}/shards", read, body=asked.to_bytes(), answer_bytes=expected
        )

    def _raise_corrupt(self, slot: SlotId, layout: Layout, manifest: Manifest, bad: set[int]) -> None:
        """Raises PeerUnavailableError where the slot was taken for another step while it was read."""
        if self.manifest(slot).digest != manifest.digest:
            raise PeerUnavailableError(
                f"the agent at {self.endpoint} holds {slot} with other content than before: it was saved "
                "again. What to do: plan again.",
                "slot_not_here",
            )
        shards = tuple(sorted(bad))
        named = ", ".join(str(layout.shards[shard]) for shard in shards[:5])
        more = f" and {len(shards) - 5} more" if len(shards) > 5 else ""
        raise CorruptShardsError(
            f"{len(shards)} shards of {slot} that came from the agent at {self.endpoint} do not match their "
            f"checksums: {named}{more}. Its memory or the way from there damages data; take them from another "
            "source.",
            shards,
        )

    def _nonsense(self, what: str) -> PeerUnavailableError:
        return PeerUnavailableError(
            f"the agent at {self.endpoint} answers with {what}. Another program may listen there, or another "
            "version of this package. What to do: read the endpoint again, or ask another process.",
            "nonsense",
        )


class _Piece(NamedTuple):
    """Consecutive blocks of a shard that travel in one answer, and what they must be."""

    shard: int
    is_whole: bool
    first: int
    count: int
    target: memoryview
    seed: int
    checksums: Sequence[int]


def _cut(blocks: Blocks, layout: Layout, manifest: Manifest, place_of: Mapping[int, int]) -> Iterator[_Piece]:
    """The pieces of what is wanted of a shard, none larger than a batch. Raises ValueError.

    `place_of`: of each shard of the slot, its place among them.
    """
    shard = blocks.shard
    entry = place_of.get(shard)
    if entry is None:
        raise ValueError(f"position {manifest.position} of layout {layout.hash} does not hold shard {shard}")
    nbytes = layout.shard_nbytes[shard]
    total = -(-nbytes // BLOCK_BYTES)
    last = total if blocks.count is None else blocks.first + blocks.count
    place = blocks.target.data
    # A view without elements cannot be cast.
    place = place.cast("B") if place.c_contiguous and place.nbytes else memoryview(bytearray())
    begin, end = blocks.first * BLOCK_BYTES, min(nbytes, last * BLOCK_BYTES)
    if not 0 <= blocks.first <= last <= total or place.nbytes != end - begin or place.readonly:
        raise ValueError(
            f"blocks {blocks.first} to {last} of shard {layout.shards[shard]} ({nbytes} bytes) do not fit a "
            f"contiguous, writable place of {place.nbytes} bytes"
        )
    checksums = manifest.checksums[entry]
    seed = shard_seed(manifest.step.generation, layout, shard)
    if place.nbytes == nbytes <= _BATCH_BYTES:
        if nbytes:
            yield _Piece(shard, True, 0, total, place, seed, checksums)
        return
    step = _BATCH_BYTES // BLOCK_BYTES
    for first in range(blocks.first, last, step):
        count = min(step, last - first)
        at = first * BLOCK_BYTES - begin
        target = place[at : min(at + count * BLOCK_BYTES, place.nbytes)]
        yield _Piece(shard, False, first, count, target, seed, checksums[first : first + count])


def _batches(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """In order, each within the limits of one request."""
    batch: list[_Piece] = []
    nbytes = 0
    for piece in pieces:
        if batch and (nbytes + piece.target.nbytes > _BATCH_BYTES or len(batch) == _BATCH_RANGES):
            yield batch
            batch, nbytes = [], 0
        batch.append(piece)
        nbytes += piece.target.nbytes
    if batch:
        yield batch


class _Part(NamedTuple):
    """A part of a block that is hashed at once, while it is in cache.

    `expected` is there for the last part of a block; `gap` bytes come behind it that nobody wants.
    """

    shard: int
    target: memoryview
    seed: int
    begins: bool
    expected: int | None
    gap: int


def _receive(answer: Answer, pieces: Iterable[tuple[_Piece, int]]) -> set[int]:
    """Puts all bytes into their places, hashing them while they are in cache; the shards that are not good.

    `pieces`: each with the number of bytes that come behind it and are dropped.
    """
    bad: set[int] = set()
    dropped = memoryview(bytearray(SHARD_ALIGNMENT))
    block = xxhash.xxh3_64()
    for group in _groups(pieces):
        targets: list[memoryview] = []
        for _, target, _, _, _, gap in group:
            targets.append(target)
            if gap:
                targets.append(dropped[:gap])
        answer.fill(targets)
        for shard, target, seed, begins, expected, _ in group:
            if begins and expected is not None:
                found = xxhash.xxh3_64_intdigest(target, seed)
            else:
                block = xxhash.xxh3_64(seed=seed) if begins else block
                block.update(target)
                found = None if expected is None else block.intdigest()
            if found != expected:
                bad.add(shard)
    return bad


def _groups(pieces: Iterable[tuple[_Piece, int]]) -> Iterator[list[_Part]]:
    """Parts of them, as many as lie in cache together and one system call fills."""
    group: list[_Part] = []
    nbytes = 0
    for piece, gap in pieces:
        for part in _parts(piece, gap):
            length = len(part.target)
            if group and (nbytes + length > _CACHED_BYTES or 2 * len(group) >= MOST_BUFFERS):
                yield group
                group, nbytes = [], 0
            group.append(part)
            nbytes += length
    if group:
        yield group


def _parts(piece: _Piece, gap: int) -> Iterable[_Part]:
    shard, _, _, count, target, seed, checksums = piece
    # No checksum is negative: what has too few or too many of them is bad.
    fits = len(checksums) == count
    if count == 1 and len(target) <= _CACHED_BYTES:
        return (_Part(shard, target, seed, True, checksums[0] if fits else -1, gap),)
    return _parts_of_large(piece, gap, fits)


def _parts_of_large(piece: _Piece, gap: int, fits: bool) -> Iterator[_Part]:
    shard, _, _, _, target, seed, checksums = piece
    for number, (begin, length) in enumerate(block_ranges(target.nbytes)):
        end, expected = begin + length, checksums[number] if fits else -1
        for at in range(begin, end, _CACHED_BYTES):
            until = min(at + _CACHED_BYTES, end)
            of_block = expected if until == end else None
            behind = gap if until == target.nbytes else 0
            yield _Part(shard, target[at:until], seed, at == begin, of_block, behind)


def _holding(row: Any) -> SlotHolding:
    numbers = [row[name] for name in ("generation", "step", "position", "bytes", "missing")]
    numbers += row["extras_of"]
    if any(type(number) is not int for number in numbers) or type(row["listed"]) is not bool:
        raise ValueError(f"not numbers: {row!r:.120}")
    generation, step, position, nbytes, missing, *extras_of = numbers
    slot = SlotId(str(row["run"]), StepId(generation, step), str(row["layout"]), position)
    nonce, digest = str(row["nonce"]), str(row["digest"])
    return SlotHolding(slot, nonce, digest, row["listed"], nbytes, missing, tuple(extras_of))
