"""A step that a restore seals anew in another cut: whenever the job dies, the ramdisks hold all of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from emergency_ckpt.core.checksums import copy_and_checksum, shard_seed
from emergency_ckpt.core.flush import Copy, choose_flush
from emergency_ckpt.core.inventory import Holding, Inventory
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import Activation, StepId
from emergency_ckpt.core.other_layouts import OtherLayout
from emergency_ckpt.core.planner import Planner
from emergency_ckpt.core.shards import Box, Shard
from emergency_ckpt.core.slots import Outcome
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.slot_views import OpenSlot
from emergency_ckpt.local.store import LocalStore, StoreOptions
from tests.local.test_store import NO_WAIT

HOSTS, SIZE, LEAVES = 2, 8, ("v", "w")
STEP = StepId(1, 5)


def cut(axis: int) -> Layout:
    """Two squares of which each host holds half of the rows, or of the columns, and no two the same."""
    half = SIZE // HOSTS
    boxes = [Box((0, 0), (SIZE, SIZE)) for _ in range(HOSTS)]
    for host in range(HOSTS):
        start, stop = [0, 0], [SIZE, SIZE]
        start[axis], stop[axis] = host * half, (host + 1) * half
        boxes[host] = Box(tuple(start), tuple(stop))
    held = {host: [Shard(leaf, box) for leaf in LEAVES] for host, box in enumerate(boxes)}
    return Layout.build([LeafSpec(leaf, (SIZE, SIZE), "uint8") for leaf in LEAVES], held, (0,) * HOSTS)


ROWS, COLUMNS = cut(0), cut(1)


def saved(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 256, (SIZE, SIZE), np.uint8)


def fill(slot: OpenSlot, layout: Layout, host: int) -> Manifest:
    slot.wait_ready()
    checksums = [
        copy_and_checksum(
            np.ascontiguousarray(saved(slot.step.step)[layout.shards[entry.shard].box.slices()]).reshape(-1),
            slot.data[entry.offset : entry.offset + entry.nbytes],
            shard_seed(slot.step.generation, layout, entry.shard),
        )
        for entry in layout.slot_entries(host)
    ]
    return Manifest("run-a", "n", slot.step, layout.hash, host, HOSTS, tuple(checksums))


class Hosts:
    """The ramdisks of a job, and what lies on them from one start to the next."""

    def __init__(self, root: Path, slots: int) -> None:
        self._root, self._slots = root, slots
        self.stores: list[LocalStore] = []

    def start(self, layout: Layout) -> list[LocalStore]:
        self.stop()
        for host in range(HOSTS):
            directory = self._root / str(host)
            directory.mkdir(exist_ok=True)
            options = StoreOptions(directory, max_to_keep=1, wanted_slots=self._slots, least_slots=2)
            self.stores.append(LocalStore(options, "run-a", layout, host, lambda _: None))
        return self.stores

    def stop(self) -> None:
        for store in self.stores:
            store.close()
        self.stores = []

    def save(self, step: StepId, layout: Layout) -> None:
        for host, store in enumerate(self.stores):
            slot, reason = store.begin(step, NO_WAIT)
            assert slot is not None, reason
            store.seal(slot, fill(slot, layout, host))
        for store in self.stores:
            store.settle(step, Outcome.COMPLETE)

    def holdings(self) -> dict[int, tuple[Holding, ...]]:
        return {host: store.verify() for host, store in enumerate(self.stores)}


@pytest.fixture(params=[2, 3])
def hosts(ramdisk: Path, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    found = Hosts(ramdisk, request.param)
    yield found
    found.stop()


def assert_restorable(hosts: Hosts, wanted: Layout) -> None:
    """By a job of this shape, with the bytes that were saved; and by agents, which know no trainer."""
    holdings = hosts.holdings()
    known = {layout.hash: layout for layout in (ROWS, COLUMNS)}
    others = {name: OtherLayout(layout) for name, layout in known.items() if name != wanted.hash}
    inventories = tuple(Inventory(host, found) for host, found in holdings.items())
    planner = Planner(wanted, tuple((host,) for host in range(HOSTS)), inventories, (), others=others)
    plan, reason = planner.plan()
    assert plan is not None, reason
    assert plan.step == STEP
    for host, own in enumerate(plan.processes):
        state = {leaf: np.zeros((SIZE, SIZE), np.uint8) for leaf in LEAVES}
        missing = hosts.stores[host].sealed_slots(STEP)[0].missing
        kept = tuple(shard for shard in wanted.process_shards[host] if shard not in missing)
        slots = [(host, wanted.hash, host, kept)] if own.in_place else []
        slots += [(take.process, take.layout, take.position, take.shards) for take in own.takes]
        for process, layout, position, shards in slots:
            (slot,) = [
                each
                for each in hosts.stores[process].sealed_slots(STEP)
                if (each.manifest.layout, each.manifest.position) == (layout, position)
            ]
            for shard in shards:
                of = slot.layout.shards[shard]
                state[of.leaf][of.box.slices()] = slot.shard(shard).reshape(of.box.shape)
        for shard in map(wanted.shards.__getitem__, wanted.process_shards[host]):
            inside = shard.box.slices()
            np.testing.assert_array_equal(state[shard.leaf][inside], saved(STEP.step)[inside])
    copies = [
        Copy(host, h.step, h.layout, h.position, h.digest, not h.missing)
        for host, found in holdings.items()
        for h in found
    ]
    flush, reason = choose_flush(copies, known, None)
    assert flush is not None, reason
    assert flush.step == STEP


def restore_in_columns(hosts: Hosts, settled: Sequence[int]) -> None:
    """A job that is cut in columns holds the state; these hosts have sealed it anew when all die."""
    stores = hosts.start(COLUMNS)
    assert all(len(found) for found in hosts.holdings().values())
    for store in stores:
        store.activate([Activation(2, STEP.step)])
        store.settle(STEP, Outcome.COMPLETE)
    for host in settled:
        seal_in_columns(hosts, host)


def seal_in_columns(hosts: Hosts, host: int) -> None:
    slot, reason = hosts.stores[host].begin_anew(STEP, NO_WAIT)
    assert slot is not None, reason
    hosts.stores[host].seal_beside(slot, fill(slot, COLUMNS, host))


ORDERS = [order for count in range(HOSTS + 1) for order in itertools.permutations(range(HOSTS), count)]


@pytest.mark.parametrize("settled", ORDERS, ids=str)
@pytest.mark.parametrize("wanted", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_whoever_has_sealed_the_new_cut_when_all_die_the_step_is_whole_for_every_job_and_for_agents(
    hosts: Hosts, settled: Sequence[int], wanted: Layout
) -> None:
    hosts.start(ROWS)
    hosts.save(StepId(1, 4), ROWS)
    hosts.save(STEP, ROWS)
    restore_in_columns(hosts, settled)
    hosts.start(wanted)
    assert_restorable(hosts, wanted)


@pytest.mark.parametrize("wanted", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_the_next_save_finds_room_and_one_cut_is_whole_until_it_is_complete(
    hosts: Hosts, wanted: Layout
) -> None:
    """In two slots it takes that of the cut which is not the job's, and only then."""
    hosts.start(ROWS)
    hosts.save(StepId(1, 4), ROWS)
    hosts.save(STEP, ROWS)
    restore_in_columns(hosts, range(HOSTS))
    for host, store in enumerate(hosts.stores):
        assert store.sealed_steps()[-1:] == (STEP,)
        slot, reason = store.begin(StepId(2, 6), NO_WAIT)
        assert slot is not None, reason
        assert store.sealed_slots(STEP)[0].layout.hash == COLUMNS.hash
        fill(slot, COLUMNS, host)  # All die here.
    hosts.start(wanted)
    assert_restorable(hosts, wanted)
    hosts.start(COLUMNS)
    for store in hosts.stores:
        store.settle(STEP, Outcome.COMPLETE)
    for number in range(6, 9):
        hosts.save(StepId(2, number), COLUMNS)
    assert {len(store.sealed_slots(STEP)) for store in hosts.stores} == {0}


def test_the_other_cut_is_a_source_where_that_of_the_job_is_damaged(hosts: Hosts) -> None:
    hosts.start(ROWS)
    hosts.save(StepId(1, 4), ROWS)
    hosts.save(STEP, ROWS)
    restore_in_columns(hosts, range(HOSTS))
    damaged, _ = hosts.stores[0].sealed_slots(STEP)
    assert damaged.layout.hash == COLUMNS.hash
    damaged.data[3] ^= 1
    hosts.start(COLUMNS)
    assert_restorable(hosts, COLUMNS)
    assert [len(slot.missing) for slot in hosts.stores[0].sealed_slots(STEP)] == [1, 0]


def test_sealing_a_step_anew_takes_no_slot_that_holds_it_in_any_cut(hosts: Hosts) -> None:
    hosts.start(ROWS)
    hosts.save(StepId(1, 4), ROWS)
    hosts.save(STEP, ROWS)
    restore_in_columns(hosts, range(HOSTS))
    store = hosts.stores[0]
    slot, _ = store.begin_anew(STEP, NO_WAIT)
    assert (slot is None) == (store.slot_count == 2)
    if slot is not None:
        store.seal_beside(slot, fill(slot, COLUMNS, 0))
    cuts = [each.layout.hash for each in store.sealed_slots(STEP)]
    assert cuts == [COLUMNS.hash, ROWS.hash], "a slot of the same cut is replaced, those of others are not"


@pytest.mark.parametrize("damaged", [COLUMNS, ROWS], ids=["the job's cut", "the other"])
def test_of_two_cuts_the_next_save_leaves_the_one_that_lacks_nothing(hosts: Hosts, damaged: Layout) -> None:
    hosts.start(ROWS)
    hosts.save(StepId(1, 4), ROWS)
    hosts.save(STEP, ROWS)
    restore_in_columns(hosts, range(HOSTS))
    store = hosts.stores[0]
    (bad,) = [slot for slot in store.sealed_slots(STEP) if slot.layout.hash == damaged.hash]
    bad.data[3] ^= 1
    store.verify()
    store.learn_restorable([STEP])
    for number in range(6, 6 + store.slot_count - 1):
        slot, reason = store.begin(StepId(2, number), NO_WAIT)
        assert slot is not None, reason
    (left,) = store.sealed_slots(STEP)
    assert (left.layout.hash, left.missing) == (({ROWS.hash, COLUMNS.hash} - {damaged.hash}).pop(), ())
    slot, reason = store.begin(StepId(2, 9), NO_WAIT)
    assert slot is None, "the last slot of the newest complete step stays"
    assert "no newer step is known to be complete" in reason


def test_a_host_that_could_not_seal_the_new_cut_keeps_the_old_one_until_a_newer_step_is_complete(
    hosts: Hosts,
) -> None:
    """It has nothing else of the step, and its saves take every other slot but this one."""
    hosts.start(ROWS)
    hosts.save(StepId(1, 4), ROWS)
    hosts.save(STEP, ROWS)
    restore_in_columns(hosts, [1])
    store = hosts.stores[0]
    lost, reason = store.begin_anew(STEP, NO_WAIT)
    assert lost is not None, reason
    store.discard(lost)  # No room, or an error.
    begun = [store.begin(StepId(2, number), NO_WAIT)[0] for number in range(6, 10)]
    assert [slot is not None for slot in begun].count(True) == store.slot_count - 1
    assert [slot.layout.hash for slot in store.sealed_slots(STEP)] == [ROWS.hash]
    hosts.start(COLUMNS)
    assert_restorable(hosts, COLUMNS)
