"""One process's share of a drain, wherever it runs: its part, and, in the committer, the commit.

Every block is verified once the store has it. The parts of others are awaited through markers in the store, and
who cannot give his says so there, so that a drain ends without the job that asked for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from emergency_ckpt.agent.orders import Destination, Life, Share
from emergency_ckpt.core.locations import is_url
from emergency_ckpt.core.upload_assignment import assign_uploads
from emergency_ckpt.errors import CorruptDataError, EmergencyCheckpointError, PersistentStoreError
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.persistent.arrays import WriteOptions
from emergency_ckpt.persistent.attempts import Attempt, StepNames
from emergency_ckpt.persistent.committer import StepContent, commit
from emergency_ckpt.persistent.records import Generation
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.persistent.writer import PartReport, report_failure, wait_for_parts, write_part

Stop = Callable[[], str | None]
"""Asked while others are waited for: a reason to give up, None to go on."""


def destination_of(
    store: PersistentStore,
    run: str,
    generation: Generation,
    item: str,
    options: WriteOptions,
    timeout_seconds: float,
) -> Destination:
    """Where a trainer's steps are drained to, in the words that an agent understands."""
    return Destination(
        life=Life(run, generation.number, generation.nonce),
        root=_resolved(store.files.locate()),
        item=item,
        prefix=store.names.prefix,
        digits=store.names.digits,
        concurrent_bytes=options.concurrent_bytes,
        max_chunk_bytes=options.max_chunk_bytes,
        compression=options.compression,
        target_data_file_bytes=options.target_data_file_bytes,
        timeout_seconds=timeout_seconds,
    )


def _resolved(location: str) -> str:
    return location if is_url(location) else os.path.realpath(location)


def open_store(destination: Destination) -> PersistentStore:
    """The persistent root that a destination names."""
    return PersistentStore(destination.root, StepNames(destination.prefix, destination.digits))


def check_life(store: PersistentStore, destination: Destination) -> None:
    """Raises StaleGenerationError where the run has a later life."""
    store.check_generation(_attempt(destination, 0, 0))


def _attempt(destination: Destination, step: int, ordinal: int) -> Attempt:
    life = destination.life
    return Attempt(Generation(life.generation, life.nonce), step, destination.item, ordinal)


def carry_out(
    store: PersistentStore,
    destination: Destination,
    share: Share,
    slot: SealedSlot,
    stop: Stop = lambda: None,
    waiting: Callable[[bool], None] = lambda _: None,
) -> int:
    """Writes a part from `slot`, which is pinned, and commits where that is asked for; returns its bytes.

    `waiting` is told when a wait for others begins, and when they are all there.

    Raises StaleGenerationError where the run has a newer life, CorruptDataError, PersistentStoreError. Others
    hear of a failure through the store, as far as that still takes anything.
    """
    attempt = _attempt(destination, share.step, share.ordinal)
    try:
        store.check_generation(attempt)
        if store.committed(attempt):
            return 0  # By an agent that died before it could say so, or by one that took over.
        report = _write(store, destination, share, attempt, slot)
        if share.commits:
            timeout = destination.timeout_seconds
            waiting(True)
            parts = wait_for_parts(store, attempt, share.holders, timeout, stop=stop)
            waiting(False)
            commit(store, attempt, slot.layout, parts, _content(slot), _options(destination))
        return report.nbytes
    except EmergencyCheckpointError as error:
        # What was written so far is invisible and of no use; where even this fails, the next life of the run
        # removes it.
        with contextlib.suppress(PersistentStoreError, OSError):
            if share.commits:
                store.abandon(attempt)
            else:
                report_failure(store, attempt, share.position, str(error))
        raise


def _write(
    store: PersistentStore, destination: Destination, share: Share, attempt: Attempt, slot: SealedSlot
) -> PartReport:
    manifest, layout = slot.manifest, slot.layout
    expected = (attempt.step_id, destination.life.nonce, share.layout, share.position)
    if (manifest.step, manifest.nonce, manifest.layout, manifest.position) != expected:
        raise CorruptDataError(f"the slot of {attempt} holds {manifest.step} of position {manifest.position}")
    plan = assign_uploads(layout, share.holders)
    if plan.shards is None:
        raise PersistentStoreError(f"{attempt} cannot be drained: {plan.reason}")
    # Where all are there each brings its own; otherwise also those that it keeps for others.
    alone = len(share.holders) == layout.process_count
    extras = {
        str(owner): text.encode()
        for owner, text in manifest.extras.items()
        if owner == share.position or not alone
    }
    return write_part(
        store,
        attempt,
        layout,
        share.position,
        plan.shards[share.position],
        slot.shard,
        slot.checksums,
        _options(destination),
        extras,
    )


def _options(destination: Destination) -> WriteOptions:
    return WriteOptions(
        concurrent_bytes=destination.concurrent_bytes,
        max_chunk_bytes=destination.max_chunk_bytes,
        compression=destination.compression,
        target_data_file_bytes=destination.target_data_file_bytes,
        timeout_seconds=destination.timeout_seconds,
    )


def _content(slot: SealedSlot) -> StepContent:
    metadata: Mapping[str, Any] = slot.manifest.metadata
    return StepContent(
        values=slot.manifest.values,
        custom_metadata=metadata.get("custom_metadata") or {},
        metrics=metadata.get("metrics") or {},
        started_nanoseconds=metadata.get("started_nanoseconds"),
    )
