"""Writing one part of a step: some shards, through TensorStore, into a store of this writer's own.

A part counts only once its marker is there, which is written last and carries the checksums of its blocks.
Single-writer stores are safe on every kind of store; the committer merges them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from emergency_ckpt.core.checksums import block_seed, first_bad_block
from emergency_ckpt.core.layout import Layout
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.arrays import (
    WriteOptions,
    leaf_chunks,
    new_arrays,
    new_context,
    ocdbt,
    storage_dtype,
)
from emergency_ckpt.persistent.attempts import Attempt, part_store_name
from emergency_ckpt.persistent.fields import parsed, typed, whole_number
from emergency_ckpt.persistent.step_files import (
    PARTS_DIRECTORY,
    extras_from_json,
    extras_to_json,
    seal,
    unseal,
)
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.persistent.uploads import check_cut, settle_upload

_POLL_SECONDS = (0.02, 1.0)
_MAX_REASON = 4000


@dataclasses.dataclass(frozen=True)
class PartReport:
    """What one writer put into an attempt.

    Attributes:
      part: the writer's number.
      layout_hash, max_chunk_bytes, compression: what it was written by; equal in all parts of a step.
      shards: ascending indices into `Layout.shards`.
      checksums: their block checksums, in the same order.
      nbytes: bytes of these shards.
      extras: small per-process state (`core.extras` as text) by process index.
    """

    part: int
    layout_hash: str
    max_chunk_bytes: int
    compression: str
    shards: tuple[int, ...]
    checksums: tuple[tuple[int, ...], ...]
    nbytes: int
    extras: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def write_part(
    store: PersistentStore,
    attempt: Attempt,
    layout: Layout,
    part: int,
    shards: Iterable[int],
    read_shard: Callable[[int], np.ndarray],
    checksums: Callable[[int], Sequence[int]],
    options: WriteOptions | None = None,
    extras: Mapping[str, bytes] | None = None,
) -> PartReport:
    """Writes some shards of a step and then the marker. Each writer calls this with a `part` of its own.

    Args:
      shards: indices into `layout.shards`.
      read_shard: gives a shard in its dtype and shape, or as flat uint8 of the same bytes. The memory must
        keep its content until this returns; it is verified once TensorStore has read it.
      checksums: gives a shard's block checksums, bound to the attempt's generation; the bytes must match them.
      extras: small state of this process that is to be committed with the step.

    Raises CorruptDataError when a shard does not match its checksums, PersistentStoreError when the store
    fails.
    """
    options = options or WriteOptions()
    shards = tuple(sorted(set(shards)))
    check_cut()
    store.begin(attempt)
    files = store.attempt_files(attempt)
    found = {shard: tuple(checksums(shard)) for shard in shards}
    chunks = leaf_chunks(layout, options.max_chunk_bytes)
    kvstore = ocdbt(
        files.kvstore(f"{attempt.item}/{part_store_name(attempt, part)}"),
        options.target_data_file_bytes,
        in_bucket=files.is_bucket,
    )
    context = new_context()
    for batch in _batches(layout, shards, options.concurrent_bytes):
        transaction = ts.Transaction()
        what = f"writing {attempt}, part {part}, {len(batch)} shards from {layout.shards[batch[0]]}"
        leaves = [layout.leaf[layout.shards[index].leaf] for index in batch]
        opened = new_arrays(
            kvstore,
            [(leaf, chunks[leaf.name]) for leaf in leaves],
            options.compression,
            context,
            transaction,
            what,
            options.timeout_seconds,
        )
        given = [_flat_bytes(layout, index, read_shard(index), attempt) for index in batch]
        writes = [
            array[layout.shards[index].box.slices()]
            .write(_as_stored(layout, index, data), can_reference_source_data_indefinitely=True)
            .copy
            for array, index, data in zip(opened, batch, given, strict=True)
        ]
        nbytes = sum(data.nbytes for data in given)
        settle_upload(writes, what, options, nbytes, in_bucket=files.is_bucket)
        settle_upload([transaction.commit_async()], what, options, nbytes, in_bucket=files.is_bucket)
        # TensorStore reads the memory until here: checked any earlier, it could have changed under it.
        for index, data in zip(batch, given, strict=True):
            _verify(layout, index, data, found[index], attempt)
    report = PartReport(
        part=part,
        layout_hash=layout.hash,
        max_chunk_bytes=options.max_chunk_bytes,
        compression=options.compression,
        shards=shards,
        checksums=tuple(found[shard] for shard in shards),
        nbytes=sum(layout.shard_nbytes[shard] for shard in shards),
        extras=dict(extras or {}),
    )
    raw = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    store.attempt_records(attempt).write(_marker(part), seal({**raw, "extras": extras_to_json(report.extras)}))
    return report


def wait_for_parts(
    store: PersistentStore,
    attempt: Attempt,
    expected: Collection[int],
    timeout_seconds: float,
    stop: Callable[[], str | None] = lambda: None,
    own: int | None = None,
) -> list[PartReport]:
    """The reports of the expected parts, once all their markers are there.

    `stop` is asked between two looks; a reason that it returns ends the wait. `own`: a part that is written.
    Raises PersistentStoreError after `timeout_seconds`, naming the parts that are missing, or when stopped, or
    when the writer of a part reported that it failed, or when a part that was there is gone.
    """
    files = store.attempt_records(attempt)
    deadline = time.monotonic() + timeout_seconds
    pause = _POLL_SECONDS[0]
    while True:
        there = {entry.name for entry in files.entries(PARTS_DIRECTORY)}
        missing = [part for part in sorted(expected) if _marker_name(part) not in there]
        if not missing:
            try:
                return [read_part(store, attempt, part) for part in sorted(expected)]
            except FileNotFoundError as error:
                raise _taken_away(attempt) from error
        if own in missing:
            raise _taken_away(attempt)
        if failed := [part for part in missing if _failure_name(part) in there]:
            why = files.read(f"{PARTS_DIRECTORY}/{_failure_name(failed[0])}").decode(errors="replace")
            raise PersistentStoreError(f"{attempt} was given up by the writers of parts {failed[:20]}: {why}")
        if reason := stop():
            raise PersistentStoreError(
                f"{attempt} was given up while parts {missing[:20]} were missing: {reason}"
            )
        if time.monotonic() >= deadline:
            raise PersistentStoreError(
                f"{attempt}: {len(missing)} of {len(expected)} parts are missing after {timeout_seconds:g} s:"
                f" {', '.join(map(str, missing[:20]))}. Their writers died or are too slow: have others write"
                " these shards, or raise the time limit."
            )
        time.sleep(min(pause, max(deadline - time.monotonic(), 0)))
        pause = min(2 * pause, _POLL_SECONDS[1])


def _taken_away(attempt: Attempt) -> PersistentStoreError:
    return PersistentStoreError(
        f"{attempt}: parts that were written are gone: somebody else has committed or abandoned it. If there is"
        " no such step, write it again with another attempt."
    )


def report_failure(store: PersistentStore, attempt: Attempt, part: int, reason: str) -> None:
    """Tells whoever waits for a part that it will not come. Raises PersistentStoreError."""
    if store.is_open(attempt):
        files = store.attempt_records(attempt)
        files.write(f"{PARTS_DIRECTORY}/{_failure_name(part)}", reason[:_MAX_REASON].encode())


def read_part(store: PersistentStore, attempt: Attempt, part: int) -> PartReport:
    """The report of a finished part. Raises FileNotFoundError if it is not finished."""
    files = store.attempt_records(attempt)
    where = files.locate(_marker(part))
    advice = "Write the step again with another attempt."
    return parsed(unseal(files.read(_marker(part)), where, advice), _parse_report, where, advice)


def _parse_report(raw: Any) -> PartReport:
    report = PartReport(
        part=whole_number(raw["part"]),
        layout_hash=typed(raw["layout_hash"], str),
        max_chunk_bytes=whole_number(raw["max_chunk_bytes"]),
        compression=typed(raw["compression"], str),
        shards=tuple(whole_number(shard) for shard in typed(raw["shards"], list)),
        checksums=tuple(tuple(whole_number(c) for c in blocks) for blocks in typed(raw["checksums"], list)),
        nbytes=whole_number(raw["nbytes"]),
        extras=extras_from_json(raw["extras"]),
    )
    if len(report.shards) != len(report.checksums):
        raise ValueError(f"{len(report.shards)} shards have {len(report.checksums)} lists of checksums")
    return report


def _marker_name(part: int) -> str:
    return f"{part}.json"


def _failure_name(part: int) -> str:
    return f"{part}.failed"


def _marker(part: int) -> str:
    return f"{PARTS_DIRECTORY}/{_marker_name(part)}"


def _batches(layout: Layout, shards: Sequence[int], concurrent_bytes: int) -> Iterator[list[int]]:
    """Runs of shards of at most `concurrent_bytes` together, of one shard at least."""
    batch: list[int] = []
    nbytes = 0
    for shard in shards:
        if batch and nbytes + layout.shard_nbytes[shard] > concurrent_bytes:
            yield batch
            batch, nbytes = [], 0
        batch.append(shard)
        nbytes += layout.shard_nbytes[shard]
    if batch:
        yield batch


def _flat_bytes(layout: Layout, index: int, data: np.ndarray, attempt: Attempt) -> np.ndarray:
    """The bytes of a shard, a view where possible."""
    data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    expected = layout.shard_nbytes[index]
    if data.nbytes != expected:
        raise CorruptDataError(
            f"{layout.shards[index]} of {attempt} has {data.nbytes} bytes, expected {expected}"
        )
    return data


def _as_stored(layout: Layout, index: int, data: np.ndarray) -> np.ndarray:
    """A view of a shard's bytes as TensorStore takes it."""
    return layout.typed(index, data).view(storage_dtype(layout.leaf[layout.shards[index].leaf].dtype))


def _verify(layout: Layout, index: int, data: np.ndarray, checksums: tuple[int, ...], attempt: Attempt) -> None:
    shard = layout.shards[index]
    seed = block_seed(attempt.step_id.generation, shard, layout.leaf[shard.leaf].dtype)
    bad = first_bad_block(data.data, checksums, seed)
    if bad is not None:
        raise CorruptDataError(
            f"{shard} of {attempt}: block {bad} does not match its checksum, so this part of {attempt.item!r}"
            " does not count in the persistent tier. Have another holder of this shard upload it."
        )
