"""A slot that lost shards keeps the others: they are named as missing, protected, and never read."""

from __future__ import annotations

import dataclasses
import json

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.core.shards import BLOCK_BYTES, Box, Shard
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.errors import CorruptDataError
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.slot_views import SealedSlot
from tests.local.partial import (
    OWN,
    SHARDS,
    SOLID,
    STEP,
    assert_good,
    damaged_store,
    layout,
    manifest_on_disk,
    manifest_paths,
    spoil,
    write,
)
from tests.local.test_hostile_files import with_checksum
from tests.local.test_store import NO_WAIT, Directory, directory, fill, save

__all__ = ["directory"]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bad=st.sets(st.sampled_from(SOLID), min_size=1))
def test_every_damaged_shard_is_found_and_the_others_stay_readable(directory: Directory, bad: set[int]) -> None:
    store = directory.open(layout())
    store.delete(1)
    assert save(store, STEP)
    whole = manifest_on_disk(directory)
    spoil(directory, bad)
    (holding,) = store.verify()
    assert holding.missing == tuple(sorted(bad))
    assert holding.digest == whole.digest
    assert f"{len(bad)} of {SHARDS} shards of {STEP} in slot " in directory.messages[-1]
    assert manifest_on_disk(directory) == whole.with_missing(OWN.index(shard) for shard in bad)
    assert_good(store, set(OWN) - bad)
    slot = store.sealed(STEP)
    assert slot is not None
    assert slot.missing == holding.missing
    for shard in bad:
        with pytest.raises(CorruptDataError, match=r"is missing in slot \d"):
            slot.shard(shard)
        with pytest.raises(CorruptDataError, match="found damaged, or has not been fetched"):
            slot.checksums(shard)
    assert slot.find_all_damage() == ()
    said = len(directory.messages)
    assert store.verify() == (holding,)
    assert directory.open(layout()).verify() == (holding,), "it survives reopening"
    assert len(directory.messages) == said, "damage is said once"


def test_all_bad_shards_of_large_and_small_ones_are_found(directory: Directory) -> None:
    sizes = {"a": 2 * BLOCK_BYTES + 5, "b": 7, "c": BLOCK_BYTES, "d": 7}
    leaves = [LeafSpec(name, (size,), "uint8") for name, size in sizes.items()]
    shards = [Shard(leaf.name, Box.whole(leaf.shape)) for leaf in leaves]
    store = directory.open(Layout.build(leaves, {0: shards}, (0,)), wanted_slots=2)
    assert save(store, STEP)
    slot = store.sealed(STEP)
    assert slot is not None
    assert slot.find_all_damage() == ()
    for shard, at in ((0, 0), (0, -1), (2, 5), (3, 6)):
        slot.shard(shard)[at] ^= 1
    assert slot.find_all_damage() == (0, 2, 3)
    partial = SealedSlot(slot.index, slot.manifest.with_missing([0, 3]), slot.layout, slot.data)
    assert partial.find_all_damage() == (2,)
    assert partial.find_damage() == "block 0 of shard c[0:16777216] does not match its checksum"


def test_more_damage_is_added_to_what_was_missing(directory: Directory) -> None:
    store = damaged_store(directory, [SOLID[1]])
    spoil(directory, [SOLID[0], SOLID[2]])
    holding = store.verify_step(STEP)
    assert holding is not None
    assert holding.missing == SOLID[:3]
    assert "2 of 5 shards" in directory.messages[-1]
    assert store.verify_step(StepId(1, 9)) is None


def test_a_slot_in_which_nothing_is_good_is_given_up(directory: Directory) -> None:
    leaves = [LeafSpec("a", (5000,), "uint8"), LeafSpec("b", (10,), "uint8")]
    shards = [Shard(leaf.name, Box.whole(leaf.shape)) for leaf in leaves]
    store = directory.open(Layout.build(leaves, {0: shards}, (0,)))
    assert save(store, STEP)
    slot = store.sealed(STEP)
    assert slot is not None
    slot.data[:] = 0
    assert store.verify() == ()
    assert store.sealed(STEP) is None
    assert manifest_paths(directory) == {}
    assert "is damaged and given up: none of its 2 shards matches" in directory.messages[-1]


def test_a_pinned_slot_that_lost_shards_stays_and_serves_the_others(directory: Directory) -> None:
    store = directory.open(layout())
    assert save(store, STEP)
    pinned = store.pin(STEP)
    assert pinned is not None
    spoil(directory, [SOLID[0]])
    assert [h.missing for h in store.verify()] == [(SOLID[0],)]
    assert pinned.find_all_damage() == (SOLID[0],)
    store.unpin(pinned.index)
    assert_good(store, SOLID[1:])


def test_twins_of_the_same_bytes_leave_the_fuller_one_and_others_neither(directory: Directory) -> None:
    store = directory.open(layout())
    for number in (1, 2):
        assert save(store, StepId(1, number), outcome=None)
    directory.close()
    first, second = (manifest_paths(directory)[StepId(1, number)] for number in (1, 2))
    data = first.with_suffix(".data").read_bytes()
    for copy in (first.with_suffix(".manifest"), first.with_suffix(".data")):
        second.with_suffix(copy.suffix).write_bytes(copy.read_bytes())
    with first.with_suffix(".data").open("r+b") as file:
        file.write(bytes([data[0] ^ 1]))
    store = directory.open(layout())
    (holding,) = store.verify()
    assert holding.missing == ()
    assert_good(store, OWN)
    directory.close()
    manifest = Manifest.from_bytes(second.read_bytes(), "test")
    first.write_bytes(dataclasses.replace(manifest, values={"n": 1}).with_missing([0]).to_bytes())
    assert directory.open(layout()).verify() == ()


def test_a_step_that_is_sealed_in_another_cut_is_there_at_every_instant(directory: Directory) -> None:
    """Both slots are told, for other hosts may need either; that of the job's cut comes first."""
    here = layout()
    cut = Layout.build(here.leaves, {0: [here.shards[i] for i in SOLID[:2]], 1: here.shards}, (0, 0))
    store = directory.open(here)
    assert save(store, STEP)
    store = directory.open(cut)
    (old,) = store.verify()
    assert old.layout == here.hash
    assert store.begin(STEP, NO_WAIT)[0] is None
    slot, reason = store.begin_anew(STEP, NO_WAIT)
    assert slot is not None, reason
    assert store.begin_anew(STEP, NO_WAIT)[0] is None, "it is being written already"
    assert manifest_on_disk(directory).layout == here.hash
    store.seal_beside(slot, fill(store, slot))
    for _ in range(2):
        assert {holding.layout for holding in store.verify()} == {here.hash, cut.hash}
        assert store.sealed_steps() == (STEP,)
        first, second = store.sealed_slots(STEP)
        assert (first.layout.hash, second.layout.hash) == (cut.hash, here.hash)
        store = directory.open(cut)
    store.keep_own(STEP)
    assert [slot.layout.hash for slot in store.sealed_slots(STEP)] == [cut.hash]


def test_no_other_slot_is_taken_for_a_step_while_somebody_works_on_the_one_that_holds_it(
    directory: Directory,
) -> None:
    store = directory.open(layout())
    assert save(store, STEP)
    pinned = store.pin(STEP)
    assert pinned is not None
    slot, reason = store.begin_anew(STEP, NO_WAIT)
    assert slot is None
    assert "somebody works on it" in reason
    store.unpin(pinned.index)
    assert store.begin_anew(STEP, NO_WAIT)[0] is not None


def test_what_lacks_shards_is_protected_as_the_only_copy(directory: Directory) -> None:
    store = directory.open(layout(), wanted_slots=2)
    assert save(store, STEP)
    assert save(store, StepId(1, 2), outcome=None)
    spoil(directory, [SOLID[0]], StepId(1, 2))
    store = directory.open(layout(), wanted_slots=2)
    assert [h.step.step for h in store.verify()] == [1, 2]
    slot, reason = store.begin(StepId(1, 3), NO_WAIT)
    assert slot is None
    assert "no newer step is known to be complete" in reason
    assert store.begin(StepId(1, 2), NO_WAIT)[0] is None, "it is here already"
    assert_good(store, SOLID[1:], StepId(1, 2))


def test_damage_in_a_complete_step_protects_older_ones_until_it_is_known_what_can_be_restored(
    directory: Directory,
) -> None:
    for restorable in (True, False):
        store = directory.open(layout(), wanted_slots=2)
        store.activate([Activation(9, None)])
        for number in (1, 2):
            assert save(store, StepId(9, number))
        spoil(directory, [SOLID[0]], StepId(9, 2))
        assert [len(h.missing) for h in store.verify() if h.step.generation == 9] == [0, 1]
        assert store.complete_steps() == (StepId(9, 1),)
        assert not save(store, StepId(9, 3))
        both = {StepId(9, 1), StepId(9, 2)}
        store.learn_restorable(both if restorable else {StepId(9, 1)})
        assert (store.sealed(StepId(9, 2)) is not None) == restorable
        assert save(store, StepId(9, 3), outcome=None)
        assert (store.sealed(StepId(9, 1)) is None) == restorable
        assert store.complete_steps() == (() if restorable else (StepId(9, 1),)), "not where shards are missing"
        directory.close()
        for path in manifest_paths(directory).values():
            path.unlink()


def test_a_complete_step_that_nobody_can_restore_is_no_reason_to_overwrite_older_ones(
    directory: Directory,
) -> None:
    """Its damage lies on another process: here it is whole, and of no use."""
    store = directory.open(layout(), wanted_slots=2)
    for number in (1, 2):
        assert save(store, StepId(1, number))
    store.learn_restorable([StepId(1, 1)])
    assert store.sealed_steps() == (StepId(1, 1),)
    assert save(store, StepId(1, 3), outcome=None)
    assert not save(store, StepId(1, 4))
    assert_good(store, OWN, StepId(1, 1))


def test_a_hydrated_slot_may_be_sealed_with_what_is_there_so_far(directory: Directory) -> None:
    store = directory.open(layout())
    slot, _ = store.begin(STEP, NO_WAIT)
    assert slot is not None
    manifest = fill(store, slot)
    slot.data[: layout().shard_nbytes[OWN[0]]] = 0
    store.seal(slot, dataclasses.replace(manifest, process_count=2, missing=(0,)))
    store = directory.open(layout())
    assert [h.missing for h in store.verify()] == [(OWN[0],)]
    assert_good(store, OWN[1:])
    repair = store.begin_repair(STEP)
    assert repair is not None
    write(repair, OWN[0])
    assert store.repaired(repair, [OWN[0]]) == ()
    store.end_repair(repair)
    assert [h.missing for h in directory.open(layout()).verify()] == [()]
    assert_good(directory.store or store, OWN)


def test_where_the_manifest_cannot_be_rewritten_the_damage_is_known_all_the_same(directory: Directory) -> None:
    store = directory.open(layout())
    assert save(store, STEP)
    spoil(directory, [SOLID[0]])
    in_the_way = manifest_paths(directory)[STEP].with_suffix(".tmp")
    in_the_way.mkdir()  # What no file replaces.
    assert [h.missing for h in store.verify()] == [(SOLID[0],)]
    assert "could not be noted in its manifest" in directory.messages[-1]
    slot = store.sealed(STEP)
    assert slot is not None
    assert slot.missing == (SOLID[0],)
    in_the_way.rmdir()
    repair = store.begin_repair(STEP)
    assert repair is not None
    assert manifest_on_disk(directory).missing == (0,), "it is noted before anything is written"
    store.end_repair(repair)


entries = st.lists(st.integers(-1, 4), max_size=4)


@given(missing=entries, count=st.integers(0, 4))
def test_a_manifest_says_what_is_missing_or_is_refused(missing: list[int], count: int) -> None:
    sound = missing == sorted(set(missing)) and all(0 <= place < count for place in missing)
    sound = sound and (not missing or len(missing) < count)
    whole = Manifest("r", "n", STEP, "0" * 32, 0, 1, tuple((n,) for n in range(count)))
    body = json.loads(whole.to_bytes().partition(b"\n")[2])
    data = with_checksum(json.dumps(body | {"missing": missing}).encode())
    if sound:
        parsed = Manifest.from_bytes(data, "test")
        assert parsed == whole.with_missing(missing)
        assert Manifest.from_bytes(parsed.to_bytes(), "test") == parsed
        assert parsed.digest == whole.digest
    else:
        with pytest.raises(CorruptDataError, match="unusable field"):
            Manifest.from_bytes(data, "test")


def test_a_manifest_of_an_earlier_version_lacks_nothing() -> None:
    whole = Manifest("r", "n", STEP, "0" * 32, 0, 1, ((1,),))
    body = json.loads(whole.to_bytes().partition(b"\n")[2])
    del body["missing"]
    data = json.dumps(body).encode()
    header = whole.to_bytes().partition(b" 2 ")[0] + b" 2 " + xxhash.xxh3_128_hexdigest(data).encode() + b"\n"
    assert Manifest.from_bytes(header + data, "test") == whole


def test_an_abandoned_step_that_lacks_shards_is_emptied(directory: Directory) -> None:
    store = directory.open(layout())
    assert save(store, STEP, outcome=None)
    spoil(directory, [SOLID[0]])
    store.verify()
    store.settle(STEP, Outcome.ABANDONED)
    assert manifest_paths(directory) == {}
