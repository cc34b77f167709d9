"""What goes into a step: verified shards only, each exactly once, from finished parts of one attempt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emergency_ckpt.core.extras import Item, ProcessExtras
from emergency_ckpt.core.shards import dtype_of
from emergency_ckpt.errors import (
    CorruptDataError,
    PersistentStoreError,
    StateMismatchError,
    UnsupportedStateError,
)
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.persistent import writer
from emergency_ckpt.persistent.arrays import WriteOptions, settle
from emergency_ckpt.persistent.attempts import Attempt
from emergency_ckpt.persistent.committer import StepContent, commit
from emergency_ckpt.persistent.reader import BoxRequest, StepReader
from emergency_ckpt.persistent.store import PersistentStore
from emergency_ckpt.persistent.writer import wait_for_parts, write_part
from tests.persistent.saving import (
    assert_same,
    checksums_of,
    layout_of,
    read_shards,
    read_whole,
    save,
    shard_array,
    small_state,
    write_parts,
)


@pytest.fixture
def store(tmp_path: Path) -> PersistentStore:
    return PersistentStore(tmp_path)


@pytest.fixture
def attempt(store: PersistentStore) -> Attempt:
    return Attempt(store.mint_generation(0, None), 10, "state")


def test_a_step_comes_back_with_everything_it_was_given(store: PersistentStore, attempt: Attempt) -> None:
    values = {
        "lr": 0.1,
        "n": 3,
        "on": True,
        "name": "x",
        "f": np.float32(0.3),
        "z": 1 + 2j,
        "inf": float("inf"),
    }
    content = StepContent(values, {"note": [1, {"a": None}]}, {"loss": 2.5})
    step = save(store, attempt, small_state(), content)
    assert store.steps() == [step]
    assert step.written_by_us
    reader = StepReader(step.location)
    assert reader.verified
    assert reader.step_id == attempt.step_id
    assert reader.side is not None
    assert reader.side.run_id == store.run_id()
    assert reader.side.custom_metadata == content.custom_metadata
    assert reader.side.metrics == content.metrics
    assert reader.values() == values
    assert {k: type(v) for k, v in reader.values().items()} == {k: type(v) for k, v in values.items()}
    assert_same(read_shards(reader), small_state())


ALL_DTYPES = (
    *(
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "int2",
        "int4",
        "uint2",
    ),
    *("uint4", "float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn"),
    *("float8_e5m2", "float8_e3m4", "float8_e4m3", "float8_e8m0fnu", "float8_e4m3b11fnuz", "float8_e4m3fnuz"),
    *("float8_e5m2fnuz", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"),
)


def test_every_dtype_and_shape_comes_back_bit_for_bit(store: PersistentStore, attempt: Attempt) -> None:
    bits = np.random.default_rng(0).integers(0, 256, 24 * 16, dtype=np.uint8)
    arrays = {}
    for name in ALL_DTYPES:
        dtype = dtype_of(name)
        if dtype.itemsize == 1:
            arrays[name] = (bits[:24].reshape(8, 3) % 4).astype(dtype)
        else:
            arrays[name] = bits[: 24 * dtype.itemsize].view(dtype).reshape(8, 3)
    arrays |= {"scalar": np.asarray(-0.0, np.float32), "empty": np.zeros((0, 3), np.float32)}
    arrays |= {"one": np.ones(1, np.int8), "deep": np.arange(24, dtype=np.int64).reshape(2, 3, 2, 2)}
    step = save(store, attempt, arrays)
    reader = StepReader(step.location)
    assert_same(read_shards(reader), arrays)
    assert_same({name: read_whole(reader, name) for name in arrays}, arrays)


def test_many_boxes_are_read_within_a_bound_of_bytes(store: PersistentStore, attempt: Attempt) -> None:
    arrays = {f"leaf{i}": np.full((16, 16), i, np.float32) for i in range(20)}
    options = WriteOptions(concurrent_bytes=3000, max_chunk_bytes=200)
    reader = StepReader(save(store, attempt, arrays, options=options).location)
    requests = [
        BoxRequest(shard.leaf, shard.box, np.empty(shard.box.shape, np.float32))
        for shard in reader.saved_checksums
    ]
    reader.read_boxes(requests, concurrent_bytes=1000)
    assert all((r.out == int(r.leaf.removeprefix("leaf"))).all() for r in requests)


def test_a_shard_that_does_not_match_its_checksum_does_not_count(
    store: PersistentStore, attempt: Attempt
) -> None:
    arrays = small_state()
    layout = layout_of(arrays)
    other = small_state(1)
    with pytest.raises(CorruptDataError, match=r"params.b\[0:5\] of attempt 0 at step 10 .* block 0"):
        write_part(
            store,
            attempt,
            layout,
            0,
            range(len(layout.shards)),
            lambda i: shard_array(other if layout.shards[i].leaf == "params.b" else arrays, layout, i),
            lambda i: checksums_of(arrays, layout, i, 1),
        )
    with pytest.raises(PersistentStoreError, match=r"1 of 1 parts are missing after 0 s: 0\."):
        wait_for_parts(store, attempt, [0], 0)


def test_memory_that_changes_while_it_is_written_is_noticed(
    store: PersistentStore, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = small_state()
    layout = layout_of(arrays)
    shards = [shard_array(arrays, layout, i) for i in range(len(layout.shards))]
    settled: list[str] = []

    def damage_after_opening(futures: Iterable[Any], what: str, *_: Any, **__: Any) -> list[Any]:
        settled.append(what)
        if len(settled) == 2:  # The arrays are open, and the shards were handed to TensorStore.
            shards[0].reshape(-1).view(np.uint8)[0] ^= 1
        return settle(futures, what, 60)

    monkeypatch.setattr(writer, "settle_upload", damage_after_opening)
    with pytest.raises(CorruptDataError, match="block 0 does not match its checksum"):
        write_part(
            store,
            attempt,
            layout,
            0,
            range(len(layout.shards)),
            shards.__getitem__,
            lambda i: checksums_of(arrays, layout, i, 1),
        )
    with pytest.raises(PersistentStoreError, match="parts are missing"):
        wait_for_parts(store, attempt, [0], 0)


def test_checksums_of_another_generation_are_not_accepted(store: PersistentStore, attempt: Attempt) -> None:
    arrays = small_state()
    layout = layout_of(arrays)
    with pytest.raises(CorruptDataError):
        write_part(
            store,
            attempt,
            layout,
            0,
            [0],
            lambda i: shard_array(arrays, layout, i),
            lambda i: checksums_of(arrays, layout, i, 2),
        )


def test_a_slot_that_lacks_a_shard_gives_every_part_but_the_one_with_that_shard(
    store: PersistentStore, attempt: Attempt
) -> None:
    arrays = small_state()
    layout, generation = layout_of(arrays), attempt.step_id.generation
    entries = layout.slot_entries(0)
    data = np.zeros(layout.data_bytes(0), np.uint8)
    for entry in entries:
        place = data[entry.offset : entry.offset + entry.nbytes]
        place[:] = shard_array(arrays, layout, entry.shard).reshape(-1).view(np.uint8)
    checksums = tuple(checksums_of(arrays, layout, entry.shard, generation) for entry in entries)
    manifest = Manifest("run", "n", attempt.step_id, layout.hash, 0, 4, checksums, missing=(1,))
    slot = SealedSlot(0, manifest, layout, data)
    good = [entry.shard for entry in entries if entry.shard not in slot.missing]
    report = write_part(store, attempt, layout, 0, good, slot.shard, slot.checksums)
    assert report.shards == tuple(good)
    with pytest.raises(CorruptDataError, match="is missing in slot 0"):
        write_part(store, attempt, layout, 1, slot.missing, slot.shard, slot.checksums)


def test_missing_parts_are_named_when_the_time_is_over(store: PersistentStore, attempt: Attempt) -> None:
    arrays = small_state()
    layout = layout_of(arrays)
    reports = write_parts(store, attempt, layout, arrays)
    assert wait_for_parts(store, attempt, range(4), 5) == reports
    with pytest.raises(PersistentStoreError, match=r"2 of 6 parts are missing .*: 4, 5\."):
        wait_for_parts(store, attempt, range(6), 0.1)


def test_a_damaged_part_marker_is_refused(store: PersistentStore, attempt: Attempt) -> None:
    arrays = small_state()
    write_parts(store, attempt, layout_of(arrays), arrays)
    marker = Path(store.attempt_files(attempt).locate("emergency_ckpt.parts/1.json"))
    marker.write_bytes(marker.read_bytes()[:-40])
    with pytest.raises(CorruptDataError, match=r"1\.json is damaged"):
        wait_for_parts(store, attempt, range(4), 1)


def test_parts_that_are_not_every_shard_once_are_refused(store: PersistentStore, attempt: Attempt) -> None:
    arrays = small_state()
    layout = layout_of(arrays)
    parts = write_parts(store, attempt, layout, arrays)
    again = dataclasses.replace(parts[0], part=9)
    wrong = {
        "shards are not written exactly once": [parts[1:], [*parts, again]],
        "different layouts or options": [
            [dataclasses.replace(parts[0], max_chunk_bytes=1), *parts[1:]],
            [dataclasses.replace(part, layout_hash="0") for part in parts],
        ],
        "lacks checksums": [
            [dataclasses.replace(parts[0], checksums=((),) * len(parts[0].shards)), *parts[1:]]
        ],
    }
    for message, cases in wrong.items():
        for case in cases:
            with pytest.raises((PersistentStoreError, CorruptDataError), match=message):
                commit(store, attempt, layout, case)
    assert store.steps() == []
    with pytest.raises(PersistentStoreError, match=r"values were given for \['x'\]"):
        commit(store, attempt, layout, parts, StepContent({"x": 1}))


def test_a_part_whose_data_is_gone_is_refused(store: PersistentStore, attempt: Attempt) -> None:
    arrays = small_state()
    layout = layout_of(arrays)
    parts = write_parts(store, attempt, layout, arrays)
    data = Path(store.attempt_files(attempt).locate(attempt.item))
    (manifest,) = data.glob("ocdbt.process_*p1/manifest.ocdbt")
    manifest.unlink()
    with pytest.raises(CorruptDataError, match=r"chunks and array descriptions, expected"):
        commit(store, attempt, layout, parts)
    assert store.steps() == []


def test_nothing_of_an_older_attempt_at_the_same_step_gets_in(store: PersistentStore, attempt: Attempt) -> None:
    """Not even where the new attempt lacks a shard that the old one wrote."""
    arrays = small_state()
    layout = layout_of(arrays)
    write_parts(store, attempt, layout, small_state(99))
    newer = Attempt(store.mint_generation(1, None), attempt.step, attempt.item)
    parts = write_parts(store, newer, layout, arrays)
    with pytest.raises(PersistentStoreError, match="not written exactly once"):
        commit(store, newer, layout, parts[1:])
    step = commit(store, newer, layout, parts)
    assert_same(read_shards(StepReader(step.location)), arrays)


def test_extras_of_all_parts_are_committed_with_the_step(store: PersistentStore, attempt: Attempt) -> None:
    arrays = small_state()
    layout = layout_of(arrays)
    parts = write_parts(store, attempt, layout, arrays)
    with_extras = [
        dataclasses.replace(part, extras={str(part.part): extras_text(part.part).encode()}) for part in parts
    ]
    step = commit(store, attempt, layout, with_extras)
    assert StepReader(step.location).extras == {str(i): extras_text(i).encode() for i in range(4)}
    assert {p.name: p.read_bytes() for p in (Path(step.location) / "data").iterdir()} == {
        "shared": b"of 0",
        **{f"own_{i}": bytes([i]) for i in range(4)},
    }
    described = json.loads((Path(step.location) / "_CHECKPOINT_METADATA").read_bytes())
    assert described["item_handlers"]["data"] == "some.Handler"


def extras_text(process: int) -> str:
    """Every process writes a file of its own and, against the rules of a shared directory, a common one."""
    files = {f"own_{process}": bytes([process]), "shared": f"of {process}".encode()}
    return ProcessExtras({"position": process}, {"data": Item("some.Handler", files)}).to_text()


def test_a_value_without_a_form_is_refused_by_name(store: PersistentStore, attempt: Attempt) -> None:
    with pytest.raises(UnsupportedStateError, match="leaf 'n' is of type object"):
        save(store, attempt, small_state(), StepContent({"n": object()}))  # type: ignore[dict-item]


def test_the_difference_to_a_wanted_state_is_told_leaf_by_leaf(
    store: PersistentStore, attempt: Attempt
) -> None:
    reader = StepReader(save(store, attempt, small_state()).location)
    leaves = list(reader.leaves.values())
    assert reader.check_leaves(leaves) == ()
    assert reader.check_leaves(leaves[1:]) == (leaves[0].name,)
    wanted = [dataclasses.replace(leaf, dtype="bfloat16") for leaf in leaves if leaf.name == "params.w"]
    wanted.append(dataclasses.replace(leaves[0], name="params.v"))
    with pytest.raises(StateMismatchError) as error:
        reader.check_leaves(wanted)
    assert "params.v: saved nothing, wanted int32[]" in str(error.value)
    assert "params.w: saved float32[8, 6], wanted bfloat16[8, 6]" in str(error.value)
    assert "Saved but not wanted: count, opt.zeros, params.b" in str(error.value)
