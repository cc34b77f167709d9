"""Committing a step whose parts are written: merge, describe, publish.

Publishing comes last and is atomic (`placing`): whatever is interrupted before it leaves an attempt that no
reader sees.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from emergency_ckpt.core.extras import Item, ProcessExtras, joined_items
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.values import Value, captured
from emergency_ckpt.errors import CorruptDataError, PersistentStoreError
from emergency_ckpt.persistent.arrays import (
    WriteOptions,
    leaf_chunks,
    new_arrays,
    new_context,
    ocdbt,
)
from emergency_ckpt.persistent.attempts import Attempt, PersistentStep, part_store_name
from emergency_ckpt.persistent.chunks import chunk_count
from emergency_ckpt.persistent.files import Files
from emergency_ckpt.persistent.merging import Merge
from emergency_ckpt.persistent.orbax_values import OrbaxValues, orbax_values, tree_with_values
from emergency_ckpt.persistent.placing import StepCommittedError
from emergency_ckpt.persistent.step_files import (
    CHECKSUMS_FILE,
    CLAIM_FILE,
    EXTRAS_FILE,
    LAYOUT_FILE,
    OCDBT_MANIFEST,
    ORBAX_METRICS_FILE,
    ORBAX_STEP_FILE,
    ORBAX_STRINGS_FILE,
    ORBAX_TREE_FILE,
    PARTS_DIRECTORY,
    SideInfo,
    block_count,
    checksums_to_bytes,
    digest,
    extras_to_json,
    seal,
    side_file_name,
)
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.persistent.uploads import settle_upload
from emergency_ckpt.persistent.writer import PartReport


@dataclasses.dataclass(frozen=True)
class StepContent:
    """What a step holds beside its arrays.

    Attributes:
      values: the leaves that are not arrays, by name; all of `Layout.value_leaves`.
      custom_metadata, metrics: JSON of the user, readable by Orbax.
      started_nanoseconds: when the save began (Unix time), for Orbax's step metadata; None for now.
    """

    values: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    custom_metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    started_nanoseconds: int | None = None


def commit(
    store: PersistentStore,
    attempt: Attempt,
    layout: Layout,
    parts: Sequence[PartReport],
    content: StepContent | None = None,
    options: WriteOptions | None = None,
    claim: bytes | None = None,
) -> PersistentStep:
    """Makes a step of the parts. One process calls this, once per attempt.

    `claim`: bytes by which the caller knows his claim from any other's.

    Raises PersistentStoreError when the parts are not every shard exactly once or another committer is at work
    on the attempt, StaleGenerationError when a newer generation exists. After any error write the step again
    with another attempt.
    """
    if held := store.committed(attempt):
        store.abandon(attempt)
        return held
    stages = commit_stages(store, attempt, layout, parts, content, options, claim)
    while True:
        try:
            next(stages)
        except StopIteration as ended:
            return ended.value
        except (StepCommittedError, CorruptDataError):
            # Of an attempt that comes too late the stores are deleted, perhaps while they are being read.
            held = store.committed(attempt)
            if held is None:
                raise
            store.abandon(attempt)
            return held


def commit_stages(
    store: PersistentStore,
    attempt: Attempt,
    layout: Layout,
    parts: Sequence[PartReport],
    content: StepContent | None = None,
    options: WriteOptions | None = None,
    claim: bytes | None = None,
) -> Generator[str, None, PersistentStep]:
    """What `commit` does; yields the name of each stage when it is done."""
    content = content or StepContent()
    content = dataclasses.replace(content, values={n: captured(n, v) for n, v in content.values.items()})
    options = options or WriteOptions()
    files, records = store.attempt_files(attempt), store.attempt_records(attempt)
    store.check_generation(attempt)
    _check_parts(attempt, layout, parts)
    _check_values(attempt, layout, content)
    # Bytes of its own: where conditions do not count, two claims are told apart by them.
    if not records.create(CLAIM_FILE, claim or uuid.uuid4().hex.encode()):
        raise PersistentStoreError(
            f"{attempt}: another committer is, or was, at work in {files.locate()}."
            " If it is not alive, write the step again with another attempt."
        )
    yield "claimed"
    values = orbax_values(content.values)
    extras = _joined_extras(attempt, parts)
    items = _items_of(extras)
    written = _orbax_files(attempt, layout, content, values, items)
    side_name = side_file_name(attempt.generation.number, attempt.generation.nonce)
    ours = _our_files(store, attempt, layout, parts, content, extras)
    manifest = f"{attempt.item}/{OCDBT_MANIFEST}"
    placement = store.place(attempt, [manifest, *written, *ours])
    yield "place found"
    context = new_context()
    stores = [part_store_name(attempt, part.part) for part in parts if part.shards]
    if values.numbers:
        stores.append(part_store_name(attempt, "values"))
        _write_numbers(files, f"{attempt.item}/{stores[-1]}", attempt, values.numbers, context, options)
        yield "values written"
    merged = Merge(files, attempt, context, options.timeout_seconds)
    root = merged.merge(stores)
    yield "merged"
    chunks = leaf_chunks(layout, parts[0].max_chunk_bytes if parts else options.max_chunk_bytes)
    merged.check(
        2 * len(values.numbers) + sum(1 + chunk_count(leaf.shape, chunks[leaf.name]) for leaf in layout.leaves)
    )
    yield "merge checked"
    placement.write(manifest, root)
    yield "merge written"
    for name in items:
        files.make_directory(name)
    for path, data in written.items():
        placement.write(path, data)
    yield "Orbax's metadata written"
    for path, data in ours.items():
        placement.write(path, data)
    yield "side files written"
    records.delete_tree(PARTS_DIRECTORY)
    yield "part markers deleted"
    return store.commit(attempt, placement, {side_name: digest(ours[side_name]), manifest: digest(root)})


def _check_parts(attempt: Attempt, layout: Layout, parts: Sequence[PartReport]) -> None:
    kinds = {(p.layout_hash, p.max_chunk_bytes, p.compression) for p in parts}
    if len(kinds) > 1 or any(p.layout_hash != layout.hash for p in parts):
        raise PersistentStoreError(
            f"{attempt}: its parts were written by different layouts or options: {sorted(kinds)};"
            f" expected layout {layout.hash} and one set of options in all processes."
        )
    writers: list[list[int]] = [[] for _ in layout.shards]
    for part in parts:
        for shard, checksums in zip(part.shards, part.checksums, strict=True):
            writers[shard].append(part.part)
            if len(checksums) != block_count(layout.shard_nbytes[shard]):
                raise CorruptDataError(
                    f"part {part.part} of {attempt} lacks checksums of {layout.shards[shard]}"
                )
    wrong = [(layout.shards[i], found) for i, found in enumerate(writers) if len(found) != 1]
    if wrong:
        some = "; ".join(f"{shard} by parts {found}" for shard, found in wrong[:3])
        raise PersistentStoreError(
            f"{attempt}: {len(wrong)} of {len(layout.shards)} shards are not written exactly once ({some})."
            " Write the step again with another attempt."
        )


def _check_values(attempt: Attempt, layout: Layout, content: StepContent) -> None:
    if set(content.values) != set(layout.value_leaves):
        raise PersistentStoreError(
            f"{attempt}: values were given for {sorted(content.values)},"
            f" the layout has {list(layout.value_leaves)}"
        )


def _write_numbers(
    files: Files,
    directory: str,
    attempt: Attempt,
    numbers: Mapping[str, np.ndarray],
    context: ts.Context,
    options: WriteOptions,
) -> None:
    what = f"writing the {len(numbers)} scalars of {attempt}"
    kvstore = ocdbt(files.kvstore(directory))
    transaction = ts.Transaction()
    leaves = [(LeafSpec(name, (), number.dtype.name), ()) for name, number in numbers.items()]
    opened = new_arrays(kvstore, leaves, "none", context, transaction, what, options.timeout_seconds)
    nbytes = sum(number.nbytes for number in numbers.values())
    settle_upload(
        [array.write(data).copy for array, data in zip(opened, numbers.values(), strict=True)],
        what,
        options,
        nbytes,
        in_bucket=files.is_bucket,
    )
    settle_upload([transaction.commit_async()], what, options, nbytes, in_bucket=files.is_bucket)


def _joined_extras(attempt: Attempt, parts: Sequence[PartReport]) -> dict[str, bytes]:
    extras: dict[str, bytes] = {}
    for part in parts:
        for key, data in part.extras.items():
            if extras.setdefault(key, data) != data:
                raise CorruptDataError(f"{attempt}: the parts hold different extras under {key!r}")
    return extras


def _items_of(extras: Mapping[str, bytes]) -> Mapping[str, Item]:
    """The items of all processes, which Orbax has in directories of the step."""
    in_order = sorted(extras.items(), key=lambda owned: int(owned[0]))
    return joined_items(ProcessExtras.from_text(data.decode()) for _, data in in_order)


def _step_metadata(layout: Layout, content: StepContent, items: Mapping[str, Item]) -> bytes:
    """Orbax's step metadata: the layout's, with the items, times, and what the user gave."""
    raw = json.loads(dict(layout.metadata_files).get(ORBAX_STEP_FILE, b"{}"))
    now = time.time_ns()
    raw["init_timestamp_nsecs"] = content.started_nanoseconds or now
    raw["commit_timestamp_nsecs"] = now
    raw["custom_metadata"] = dict(content.custom_metadata)
    if not content.metrics:
        raw.get("item_handlers", {}).pop("metrics", None)
    raw.setdefault("item_handlers", {}).update({name: item.handler for name, item in items.items()})
    return json.dumps(raw).encode()


def _orbax_files(
    attempt: Attempt,
    layout: Layout,
    content: StepContent,
    values: OrbaxValues,
    items: Mapping[str, Item],
) -> dict[str, bytes]:
    """The files that Orbax reads, by path, but for the arrays'."""
    found: dict[str, bytes] = {}
    for path, data in layout.metadata_files:
        if path != ORBAX_STEP_FILE:
            described = tree_with_values(data, values) if path == ORBAX_TREE_FILE else data
            found[f"{attempt.item}/{path}"] = described
    if values.strings:
        found[f"{attempt.item}/{ORBAX_STRINGS_FILE}"] = json.dumps(values.strings).encode()
    if content.metrics:
        found[ORBAX_METRICS_FILE] = json.dumps(content.metrics).encode()
    for name, item in items.items():
        found.update({f"{name}/{path}": data for path, data in item.files.items()})
    found[ORBAX_STEP_FILE] = _step_metadata(layout, content, items)
    return found


def _our_files(
    store: PersistentStore,
    attempt: Attempt,
    layout: Layout,
    parts: Sequence[PartReport],
    content: StepContent,
    extras: Mapping[str, bytes],
) -> dict[str, bytes]:
    """The files of ours, by path; the side file, which has the checksums of the others, is the last."""
    checksums: list[tuple[int, ...]] = [()] * len(layout.shards)
    for part in parts:
        for shard, found in zip(part.shards, part.checksums, strict=True):
            checksums[shard] = found
    written = {LAYOUT_FILE: layout.to_bytes(), CHECKSUMS_FILE: checksums_to_bytes(checksums)}
    if extras:
        written[EXTRAS_FILE] = seal({"extras": extras_to_json(extras)})
    side = SideInfo(
        run_id=store.run_id(),
        step_id=attempt.step_id,
        nonce=attempt.generation.nonce,
        item=attempt.item,
        layout_hash=layout.hash,
        max_chunk_bytes=parts[0].max_chunk_bytes if parts else 1,
        compression=parts[0].compression if parts else "none",
        values=content.values,
        custom_metadata=content.custom_metadata,
        metrics=content.metrics,
        digests={name: digest(data) for name, data in written.items()},
    )
    return {**written, side_file_name(attempt.generation.number, attempt.generation.nonce): side.to_bytes()}
