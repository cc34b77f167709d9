"""Copies of other processes' shards, fetched from their agents into the own slot once they have sealed theirs.

A save is complete only when its copies are in place, so a process reports its seal after it has them. Where the
state is replicated over enough slices by nature there are none, and nothing is said or asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta

from emergency_ckpt.agent.gather import Target, gather
from emergency_ckpt.core.copies import copies_from, gives_copies
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.restore_plan import Take
from emergency_ckpt.errors import (
    CoordinationTimeoutError,
    LocalDirectoryError,
    PeerFailedError,
    PeerUnavailableError,
)
from emergency_ckpt.jaxio.coordination import Coordinator
from emergency_ckpt.runtime.job import Job, open_peer_slot
from emergency_ckpt.telemetry.metrics import Metric

_WITHHELD = b"withheld"
_THERE = "there"


class Copying:
    """The copies of one process, save after save. `prefix` is that of the keys of a save."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._sources = copies_from(job.device_layout, job.layout, job.process)
        self._gives = job.layout is not job.device_layout and gives_copies(
            job.device_layout, job.layout, job.process
        )

    def tell(self, prefix: str) -> None:
        """This process has sealed what its devices hold: others may fetch their copies."""
        if self._gives:
            self._job.peers.renew()  # They ask it now.
            self._job.coordinator.put_once(self._key(prefix, self._job.process), b"")

    def withhold(self, prefix: str) -> None:
        """This process abandons the save: nobody is to wait for it."""
        if self._gives:
            self._job.coordinator.put_once(self._key(prefix, self._job.process), _WITHHELD)

    def fetch(self, prefix: str, step: StepId) -> None:
        """Completes the sealed slot of `step` with the copies that belong into it.

        Raises CoordinationTimeoutError, PeerFailedError, PeerUnavailableError or LocalDirectoryError when one
        cannot be had; the save is then to be abandoned.
        """
        job = self._job
        if not self._sources:
            return
        await_sources(
            job.coordinator, f"{prefix}/{_THERE}", self._sources, step, job.settings.coordination_timeout
        )
        slot = job.local.begin_repair(step)
        if slot is None:
            raise LocalDirectoryError(f"{step} is not on this ramdisk any more and takes no copies")
        try:
            # Of shards without elements there is nothing to fetch.
            sizes = job.layout.shard_nbytes
            needed = {shard for shard in slot.missing if sizes[shard]}
            empty = set(slot.missing) - needed
            takes = [Take(p, job.layout.hash, p, shards) for p, shards in self._sources.items()]
            target = Target(step, job.layout, needed, slot.shard)
            found = gather(target, takes, lambda take: open_peer_slot(job, step, take))
            job.peers.forget(found.unreachable)
            job.log.metrics.add(Metric.COPIED_BYTES, sum(nbytes for _, nbytes in found.sources.values()))
            refused = job.local.repaired(slot, [*found.checksums, *empty], found.checksums)
            lacking = needed - set(found.checksums) | set(refused)
            if lacking:
                why = [*found.unreachable.values(), *(strike.why for strike in found.strikes)]
                raise PeerUnavailableError(
                    f"{len(lacking)} of {len(needed)} copies for {step} could not be fetched: {'; '.join(why)}"
                )
        finally:
            job.local.end_repair(slot)

    def _key(self, prefix: str, process: int) -> str:
        return f"{prefix}/{_THERE}/{process}"


def await_sources(
    coordinator: Coordinator, prefix: str, sources: Iterable[int], step: StepId, timeout: timedelta
) -> None:
    """Waits until all of these processes have sealed what others keep copies of, the time limit being for all.

    One after the other, since the service has no wait for any of several; who has abandoned the save already is
    not found out behind one who is silent. Raises CoordinationTimeoutError, PeerFailedError.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    said = coordinator.entries(prefix)
    for source in sorted(sources, key=lambda source: said.get(str(source)) != _WITHHELD):
        left = timedelta(seconds=max(deadline - time.monotonic(), 0.0))
        try:
            found = coordinator.get(f"{prefix}/{source}", left)
        except CoordinationTimeoutError as error:
            raise CoordinationTimeoutError(
                f"process {source} did not seal {step}, of which this process keeps a copy: {error}"
            ) from error
        if found == _WITHHELD:
            raise PeerFailedError(f"process {source} abandoned {step} and gives no copy")
