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
from emergency_ckpt.errors import (
    CorruptDataError,
    EmergencyCheckpointError,
    PersistentStoreError,
    StoreThrottledError,
    StoreUnreachableError,
)
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.persistent.arrays import WriteOptions
from emergency_ckpt.persistent.attempts import Attempt, StepNames
from emergency_ckpt.persistent.committer import StepContent, commit
from emergency_ckpt.persistent.object_store.operations import Limits
from emergency_ckpt.persistent.ownership import Ownership
from emergency_ckpt.persistent.records import Generation
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.persistent.writer import PartReport, read_part, report_failure, wait_for_parts, write_part

Stop = Callable[[], str | None]
"""Asked while others are waited for: a reason to give up, None to go on."""


def destination_of(
    store: PersistentStore,
    run: str,
    generation: Generation,
    item: str,
    options: WriteOptions,
    timeout_seconds: float,
    *,
    stall_seconds: float = 60.0,
    tidies: bool = False,
    max_to_keep: int | None = None,
    keep_period: int | None = None,
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
        stall_seconds=stall_seconds,
        tidies=tidies,
        max_to_keep=max_to_keep,
        keep_period=keep_period,
    )


def _resolved(location: str) -> str:
    return location if is_url(location) else os.path.realpath(location)


def open_store(destination: Destination) -> PersistentStore:
    """The persistent root that a destination names."""
    names, limits = (
        StepNames(destination.prefix, destination.digits),
        Limits.of_stall(destination.stall_seconds),
    )
    return PersistentStore(destination.root, names, limits=limits)


def check_life(store: PersistentStore, destination: Destination) -> None:
    """Raises StaleGenerationError where the run has a later life, PersistentStoreError where nothing tells."""
    life = destination.life
    if store.newest_generation() is None:
        raise PersistentStoreError(
            f"{destination.root} has no record of any life of the run: it was emptied, or is not mounted here"
        )
    store.check_generation(Attempt(Generation(life.generation, life.nonce), 0, destination.item))


def _attempt(destination: Destination, share: Share) -> Attempt:
    life, of = destination.life, share.of
    own = Generation(life.generation, life.nonce)
    if of is None:
        return Attempt(own, share.step, destination.item, share.ordinal)
    if of.run != life.run or of.generation >= life.generation:
        raise PersistentStoreError(f"{life} does not drain steps of {of}")
    return Attempt(Generation(of.generation, of.nonce), share.step, destination.item, share.ordinal, own)


def carry_out(
    store: PersistentStore,
    destination: Destination,
    share: Share,
    slot: SealedSlot,
    stop: Stop = lambda: None,
    waiting: Callable[[bool], None] = lambda _: None,
    *,
    resumed: bool = False,
    resumable: Callable[[], bool] = lambda: False,
) -> int:
    """Writes a part from `slot`, which is pinned, and commits where that is asked for; returns its bytes.

    An attempt that fails is abandoned by whoever it belongs to: where an order was given twice because its
    answer was lost, two carry out the same share, and what one of them runs into ends only its own.

    `waiting` is told when a wait for others begins, and when they are all there. `resumed`: somebody who is
    dead may have written the part already. `resumable`: whether somebody goes on after a failure, so that
    nothing is taken back.

    Raises StaleGenerationError where the run has a newer life, CorruptDataError, PersistentStoreError. Others
    hear of a failure through the store, as far as that still takes anything.
    """
    attempt = _attempt(destination, share)
    ownership: Ownership | None = None
    report: PartReport | None = None
    try:
        store.check_generation(attempt)
        if store.committed(attempt):
            return 0  # By an agent that died before it could say so, or by one that took over.
        if share.commits:
            ownership = Ownership(store, attempt)
        report = _written(store, share, attempt) if resumed else None
        if report is None and resumed and not share.commits and store.is_claimed(attempt):
            return 0  # All parts were there when the commit began.
        if report is None:
            report = _write(store, destination, share, attempt, slot)
        if ownership is not None:
            timeout = destination.timeout_seconds
            waiting(True)
            parts = wait_for_parts(store, attempt, share.holders, timeout, stop=stop, own=share.position)
            waiting(False)
            commit(store, attempt, slot.layout, parts, _content(slot), _options(destination), ownership.claim)
        return report.nbytes
    except EmergencyCheckpointError as error:
        with contextlib.suppress(PersistentStoreError, OSError):
            if report is not None and store.committed(attempt):
                return report.nbytes  # By the other one.
        # What was written so far is invisible and of no use; where even this fails, the next life of the run
        # removes it.
        with contextlib.suppress(PersistentStoreError, OSError):
            # A store that does not answer is not asked more; who tries again tidies up.
            if resumable() or isinstance(error, StoreUnreachableError | StoreThrottledError):
                pass
            elif share.commits:
                # Whoever was at work before this one, and is known to be dead, has left it to this one.
                if resumed or (ownership is not None and ownership.is_mine()):
                    store.abandon(attempt)
            else:
                report_failure(store, attempt, share.position, str(error))
        raise


def _written(store: PersistentStore, share: Share, attempt: Attempt) -> PartReport | None:
    """The part, where it is there already."""
    try:
        return read_part(store, attempt, share.position)
    except (FileNotFoundError, CorruptDataError):
        return None


def _write(
    store: PersistentStore, destination: Destination, share: Share, attempt: Attempt, slot: SealedSlot
) -> PartReport:
    manifest, layout = slot.manifest, slot.layout
    expected = (attempt.step_id, share.layout, share.position)
    # A slot that was restored from others carries the nonce of the life that restored it.
    stranger = share.of is None and manifest.nonce != destination.life.nonce
    if stranger or (manifest.step, manifest.layout, manifest.position) != expected:
        raise CorruptDataError(f"the slot of {attempt} holds {manifest.step} of position {manifest.position}")
    plan = assign_uploads(layout, share.holders, share.leaving)
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
        stall_seconds=destination.stall_seconds,
    )


def _content(slot: SealedSlot) -> StepContent:
    metadata: Mapping[str, Any] = slot.manifest.metadata
    return StepContent(
        values=slot.manifest.values,
        custom_metadata=metadata.get("custom_metadata") or {},
        metrics=metadata.get("metrics") or {},
        started_nanoseconds=metadata.get("started_nanoseconds"),
    )
