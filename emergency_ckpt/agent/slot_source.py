"""A slot to take shards from: one of this host, or one that another host's agent serves.

Whatever it gives was verified block by block on the way.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Protocol

from emergency_ckpt.agent.client import TIMEOUT, Blocks, PeerClient
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.slot_id import SlotId
from emergency_ckpt.core.checksums import copy_and_checksum
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.core.shards import BLOCK_BYTES
from emergency_ckpt.errors import CorruptDataError, CorruptShardsError
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.slot_views import SealedSlot


class SlotSource(Protocol):
    """A sealed slot of `process`. Threads may fetch at once."""

    @property
    def process(self) -> int: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def manifest(self) -> Manifest: ...

    def checksums(self, shard: int) -> tuple[int, ...]:
        """Block checksums of a shard (an index into `layout.shards`)."""
        ...

    def fetch(self, wanted: Sequence[Blocks]) -> None:
        """Reads blocks of shards into their targets.

        Raises CorruptShardsError, naming all shards that are bad (the others are good), or
        PeerUnavailableError.
        """
        ...

    def interrupt(self) -> None:
        """Ends what other threads fetch, soon, with PeerUnavailableError."""
        ...

    def close(self) -> None: ...


class OwnSlot:
    """A slot of this process."""

    def __init__(self, process: int, slot: SealedSlot) -> None:
        self.process = process
        self._slot = slot

    @property
    def layout(self) -> Layout:
        return self._slot.layout

    @property
    def manifest(self) -> Manifest:
        return self._slot.manifest

    def checksums(self, shard: int) -> tuple[int, ...]:
        return self._slot.checksums(shard)

    def fetch(self, wanted: Sequence[Blocks]) -> None:
        bad: set[int] = set()
        for blocks in wanted:
            begin = blocks.first * BLOCK_BYTES
            data = self._slot.shard(blocks.shard)[begin : begin + blocks.target.nbytes]
            found = copy_and_checksum(data, blocks.target, self._slot.seed(blocks.shard))
            expected = self._slot.checksums(blocks.shard)[blocks.first :][: len(found)]
            if found != expected:
                bad.add(blocks.shard)
        if bad:
            named = ", ".join(str(self.layout.shards[shard]) for shard in sorted(bad)[:5])
            raise CorruptShardsError(
                f"{len(bad)} shards of {self.manifest.step} on this ramdisk do not match their checksums: "
                f"{named}",
                tuple(sorted(bad)),
            )

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass


class PeerSlot:
    """A slot that the agent of another process serves.

    Raises PeerUnavailableError or CorruptDataError at construction, where its manifest cannot be had.
    """

    def __init__(
        self,
        process: int,
        endpoint: Endpoint,
        slot: SlotId,
        layout: Layout | None = None,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        """`layout`: that of the slot, where it is known here already."""
        self.process = process
        self._endpoint = endpoint
        self._id = slot
        self._timeout = timeout
        self._idle: queue.SimpleQueue[PeerClient] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._asking: set[PeerClient] = set()
        self._is_interrupted = False
        with self._client() as client:
            self.layout = layout if layout is not None else client.layout(slot.layout)
            self.manifest = client.manifest(slot)
        try:
            self.manifest.check_against(self.layout, self.layout.data_bytes(slot.position))
        except CorruptDataError:
            self.close()  # Nobody else can.
            raise
        self._place = {shard: i for i, shard in enumerate(self.layout.process_shards[slot.position])}

    def checksums(self, shard: int) -> tuple[int, ...]:
        return self.manifest.checksums[self._place[shard]]

    def fetch(self, wanted: Sequence[Blocks]) -> None:
        with self._client() as client:
            client.fetch_blocks(self._id, self.layout, self.manifest, wanted)

    def interrupt(self) -> None:
        with self._guard:
            self._is_interrupted = True
            asking = list(self._asking)
        for client in asking:
            client.give_up()

    def close(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    @contextlib.contextmanager
    def _client(self) -> Iterator[PeerClient]:
        """A connection of one's own, kept for the next one who asks."""
        try:
            client = self._idle.get_nowait()
        except queue.Empty:
            client = PeerClient(self._endpoint, self._timeout)
        with self._guard:
            self._asking.add(client)
            is_interrupted = self._is_interrupted
        try:
            if is_interrupted:
                client.give_up()
            yield client
        except BaseException:
            client.close()
            raise
        finally:
            with self._guard:
                self._asking.discard(client)
        self._idle.put(client)
