"""Gathering gives each wanted shard its bytes, from slots of any cut, and keeps what the good sources gave."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emergency_ckpt.agent.client import Blocks
from emergency_ckpt.agent.endpoint import Endpoint
from emergency_ckpt.agent.gather import Gathered, Target, gather
from emergency_ckpt.agent.slot_id import SlotId
from emergency_ckpt.agent.slot_source import OwnSlot, PeerSlot, SlotSource
from emergency_ckpt.core.checksums import checksum_blocks, copy_and_checksum, first_bad_block, shard_seed
from emergency_ckpt.core.layout import Layout, LeafSpec
from emergency_ckpt.core.lineage import StepId
from emergency_ckpt.core.restore_plan import Take
from emergency_ckpt.core.shards import BLOCK_BYTES, Box, Shard
from emergency_ckpt.errors import LocalDirectoryError
from emergency_ckpt.local.manifest import Manifest
from emergency_ckpt.local.slot_views import SealedSlot
from emergency_ckpt.local.store import LocalStore, StoreOptions
from tests.agent.served import RUN, CuttingProxy, ending_agents, start

STEP = StepId(2, 30)
Shapes = dict[str, tuple[tuple[int, ...], str]]
SMALL: Shapes = {
    "w": ((12, 10), "float32"),
    "b": ((7,), "int8"),
    "step": ((), "int32"),
    "none": ((0, 3), "int8"),
}
# More than a block per row of the cut, so that only some blocks of a shard are needed.
LARGE: Shapes = {"w": ((6, BLOCK_BYTES // 2), "uint8")}


def whole(shapes: Shapes, name: str) -> np.ndarray:
    """All of a leaf, as saved."""
    shape, dtype = shapes[name]
    count = int(np.prod(shape))
    return (np.arange(count, dtype=np.uint64) * 2654435761 % 251).astype(dtype).reshape(shape)


def cut_layout(
    shapes: Shapes, cuts: dict[str, Sequence[Sequence[int]]], holders: Sequence[Sequence[int]]
) -> Layout:
    """Leaves cut at these places per dimension; each process holds the parts of these numbers of every leaf."""
    shards: dict[str, list[Shard]] = {}
    for name, (shape, _) in shapes.items():
        bounds = [
            sorted({0, size, *(at for at in at_each if at < size)})
            for size, at_each in _per_axis(shape, cuts, name)
        ]
        spans = [list(itertools.pairwise(each)) or [(0, 0)] for each in bounds]
        shards[name] = [
            Shard(name, Box(tuple(a for a, _ in part), tuple(b for _, b in part)))
            for part in itertools.product(*spans)
        ]
    held = {
        process: [shard for of in shards.values() for n, shard in enumerate(of) if n % 4 in numbers]
        for process, numbers in enumerate(holders)
    }
    leaves = [LeafSpec(name, shape, dtype) for name, (shape, dtype) in shapes.items()]
    return Layout.build(leaves, held, (0,) * len(holders))


def _per_axis(
    shape: tuple[int, ...], cuts: dict[str, Sequence[Sequence[int]]], name: str
) -> list[tuple[int, Sequence[int]]]:
    given_cuts = cuts.get(name, ())
    return [(size, given_cuts[axis] if axis < len(given_cuts) else ()) for axis, size in enumerate(shape)]


def piece(shapes: Shapes, shard: Shard) -> np.ndarray:
    return np.ascontiguousarray(whole(shapes, shard.leaf)[shard.box.slices()]).reshape(-1).view(np.uint8)


def memory_slot(shapes: Shapes, layout: Layout, position: int) -> SealedSlot:
    """A sealed slot in plain memory."""
    data = np.zeros(layout.data_bytes(position), np.uint8)
    return SealedSlot(0, fill(shapes, layout, position, data), layout, data)


def fill(shapes: Shapes, layout: Layout, position: int, data: np.ndarray) -> Manifest:
    checksums = [
        copy_and_checksum(
            piece(shapes, layout.shards[entry.shard]),
            data[entry.offset : entry.offset + entry.nbytes],
            shard_seed(STEP.generation, layout, entry.shard),
        )
        for entry in layout.slot_entries(position)
    ]
    count = layout.process_count
    return Manifest(RUN, "n", STEP, layout.hash, position, count, tuple(checksums), values={"note": "kept"})


class Wanted:
    """The places of the shards that one process wants."""

    def __init__(self, shapes: Shapes, layout: Layout, process: int = 0) -> None:
        self.shapes, self.layout = shapes, layout
        needed = [s for s in layout.process_shards[process] if layout.shard_nbytes[s]]
        self.places = {s: np.full(layout.shard_nbytes[s], 0xEE, np.uint8) for s in needed}

    def gather(self, takes: Sequence[Take], open_source: Callable[[Take], SlotSource]) -> Gathered:
        target = Target(STEP, self.layout, set(self.places), self.places.__getitem__)
        return gather(target, takes, open_source, streams=3)

    def assert_good(self, gathered: Gathered, shards: set[int] | None = None) -> None:
        """These shards (all by default), and no others, are there with the checksums of their bytes."""
        assert set(gathered.checksums) == (set(self.places) if shards is None else shards)
        for shard, checksums in gathered.checksums.items():
            assert bytes(self.places[shard]) == bytes(piece(self.shapes, self.layout.shards[shard]))
            seed = shard_seed(STEP.generation, self.layout, shard)
            assert checksum_blocks(self.places[shard], seed) == checksums


def everything_of(layout: Layout, process: int) -> Take:
    return Take(process, layout.hash, process, layout.process_shards[process])


@given(
    st.lists(st.lists(st.integers(1, 11), max_size=3), min_size=2, max_size=2),
    st.lists(st.lists(st.integers(1, 11), max_size=3), min_size=2, max_size=2),
    st.lists(st.sets(st.integers(0, 3)), min_size=1, max_size=3),
)
@settings(max_examples=60)
def test_shards_of_any_cut_are_put_together_from_slots_of_any_other_cut(
    saved_cuts: list[list[int]], wanted_cuts: list[list[int]], holders: list[set[int]]
) -> None:
    saved = cut_layout(SMALL, {"w": saved_cuts, "b": [[3]]}, [*map(sorted, holders), range(4)])
    wanted = Wanted(SMALL, cut_layout(SMALL, {"w": wanted_cuts, "b": [[5]]}, [range(4)]))
    slots = {p: memory_slot(SMALL, saved, p) for p in range(saved.process_count)}
    takes: list[Take] = []
    given_before: set[int] = set()
    for process in range(saved.process_count):  # Each shard comes from the first that has it.
        shards = tuple(s for s in saved.process_shards[process] if s not in given_before)
        given_before |= set(shards)
        takes.append(Take(process, saved.hash, process, shards))
    gathered = wanted.gather(takes, lambda take: OwnSlot(take.process, slots[take.process]))
    assert (gathered.strikes, gathered.unreachable) == ((), {})
    wanted.assert_good(gathered)
    assert all(manifest.values["note"] == "kept" for manifest in gathered.manifests.values())


def test_of_a_shard_that_is_needed_in_part_only_the_blocks_that_are_needed_are_read() -> None:
    saved = cut_layout(LARGE, {}, [range(4)])  # One shard of three blocks.
    wanted = Wanted(LARGE, cut_layout(LARGE, {"w": [[4]]}, [[1]]))  # The last two rows: its last block.
    slot = memory_slot(LARGE, saved, 0)
    gathered = wanted.gather([everything_of(saved, 0)], lambda _: OwnSlot(0, slot))
    wanted.assert_good(gathered)
    assert gathered.sources == {0: (1, BLOCK_BYTES)}


def test_a_damaged_block_costs_the_shards_that_need_it_and_no_others() -> None:
    saved = cut_layout(SMALL, {"w": [[6]]}, [range(4)])
    wanted = Wanted(SMALL, cut_layout(SMALL, {"w": [[3, 9]]}, [range(4)]))
    slot = memory_slot(SMALL, saved, 0)
    first = next(e for e in slot.layout.slot_entries(0) if saved.shards[e.shard].leaf == "w")
    slot.data[first.offset] ^= 1
    gathered = wanted.gather([everything_of(saved, 0)], lambda _: OwnSlot(0, slot))
    (strike,) = gathered.strikes
    assert (strike.process, strike.shards) == (0, frozenset({saved.shards[first.shard]}))
    shards = wanted.layout.shards
    wanted.assert_good(
        gathered, {s for s in wanted.places if shards[s].leaf != "w" or shards[s].box.start[0] >= 6}
    )


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[LocalStore, Endpoint]]]:
    """Three hosts, each with a slot of a layout in which all hold everything, and with an agent."""
    layout = fleet_layout()
    with contextlib.ExitStack() as stack:
        hosts = []
        for process in range(3):
            root = tmp_path_factory.mktemp(f"host{process}")
            stack.enter_context(ending_agents(root))
            store = LocalStore(StoreOptions(root, 1, 2, 2), RUN, layout, process, lambda _: None)
            stack.callback(store.close)
            slot, reason = store.begin(STEP, timedelta(0))
            assert slot is not None, reason
            slot.wait_ready()
            store.seal(slot, fill(SMALL, layout, process, slot.data))
            hosts.append((store, start(root)))
        yield hosts


def fleet_layout() -> Layout:
    return cut_layout(SMALL, {"w": [[3, 6, 9], [5]], "b": [[2, 4]]}, [range(4)] * 3)


def thirds(layout: Layout) -> list[Take]:
    shards = [s for s in layout.process_shards[0] if layout.shard_nbytes[s]]
    return [Take(p, layout.hash, p, tuple(shards[p::3])) for p in range(3)]


def from_agents(
    hosts: Sequence[tuple[LocalStore, Endpoint]], endpoints: dict[int, Endpoint] | None = None
) -> Callable[[Take], SlotSource]:
    def open_source(take: Take) -> SlotSource:
        endpoint = (endpoints or {}).get(take.process, hosts[take.process][1])
        slot = SlotId(RUN, STEP, take.layout, take.position)
        return PeerSlot(take.process, endpoint, slot, timeout=timedelta(seconds=10))

    return open_source


def test_a_host_gets_its_shards_from_several_agents_at_once(fleet: list[tuple[LocalStore, Endpoint]]) -> None:
    layout = fleet_layout()
    wanted = Wanted(SMALL, layout)
    gathered = wanted.gather(thirds(layout), from_agents(fleet))
    wanted.assert_good(gathered)
    assert {p: shards for p, (shards, _) in gathered.sources.items()} == {
        take.process: len(take.shards) for take in thirds(layout)
    }


def test_shards_of_another_cut_come_from_agents_too(fleet: list[tuple[LocalStore, Endpoint]]) -> None:
    wanted = Wanted(SMALL, cut_layout(SMALL, {"w": [[7], [2, 8]]}, [range(4)]))
    gathered = wanted.gather([everything_of(fleet_layout(), 1)], from_agents(fleet))
    wanted.assert_good(gathered)


@pytest.mark.parametrize("cut_after", [0, 150, 700, 1200])
def test_a_source_that_dies_in_the_middle_costs_only_what_it_had_not_given(
    fleet: list[tuple[LocalStore, Endpoint]], cut_after: int
) -> None:
    layout = fleet_layout()
    wanted = Wanted(SMALL, layout)
    with CuttingProxy(fleet[1][1], cut_after) as proxy:
        gathered = wanted.gather(thirds(layout), from_agents(fleet, {1: proxy.endpoint}))
    assert list(gathered.unreachable) == [1]
    assert not gathered.strikes, "nothing is known to be damaged"
    wanted.assert_good(gathered, set(wanted.places) - set(thirds(layout)[1].shards))
    again = wanted.gather([Take(2, layout.hash, 2, thirds(layout)[1].shards)], from_agents(fleet))
    assert set(again.checksums) == set(thirds(layout)[1].shards)


class Closing(OwnSlot):
    """Knows whether it was closed."""

    is_closed = False

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("moment", ["opening", "reading"])
def test_whatever_goes_wrong_every_source_is_closed(moment: str) -> None:
    """Also one that is opened, or is being read, only after another has failed in a way that nobody foresaw."""
    layout = fleet_layout()
    wanted, opened, failed = Wanted(SMALL, layout), list[Closing](), threading.Event()
    all_begun = threading.Barrier(3)

    def fail() -> None:
        failed.set()
        raise LocalDirectoryError("the ramdisk is gone")

    class Failing(Closing):
        def fetch(self, wanted: Sequence[Blocks]) -> None:
            fail()

    def open_source(take: Take) -> SlotSource:
        if moment == "opening":
            all_begun.wait(30)
            if take.process == 0:
                fail()
            assert failed.wait(30)
        kind = Failing if take.process == 0 else Closing
        opened.append(kind(take.process, memory_slot(SMALL, layout, take.process)))
        return opened[-1]

    with pytest.raises(LocalDirectoryError, match="the ramdisk is gone"):
        wanted.gather(thirds(layout), open_source)
    assert len(opened) == (2 if moment == "opening" else 3)
    assert all(source.is_closed for source in opened)


def test_a_slot_that_is_not_there_any_more_is_no_damage(fleet: list[tuple[LocalStore, Endpoint]]) -> None:
    layout = fleet_layout()
    wanted = Wanted(SMALL, layout)
    takes = thirds(layout)
    gathered = wanted.gather([*takes[:2], Take(2, layout.hash, 9, takes[2].shards)], from_agents(fleet))
    assert list(gathered.unreachable) == [2]
    assert "is not here" in gathered.unreachable[2] or "not_here" in gathered.unreachable[2]
    wanted.assert_good(gathered, set(takes[0].shards) | set(takes[1].shards))


def test_a_bit_that_flips_on_the_way_or_at_rest_strikes_that_shard_of_that_source(tmp_path: Path) -> None:
    layout = fleet_layout()
    with (
        ending_agents(tmp_path),
        contextlib.closing(
            LocalStore(StoreOptions(tmp_path, 1, 2, 2), RUN, layout, 0, lambda _: None)
        ) as store,
    ):
        slot, _ = store.begin(STEP, timedelta(0))
        assert slot is not None
        slot.wait_ready()
        store.seal(slot, fill(SMALL, layout, 0, slot.data))
        entry = max(layout.slot_entries(0), key=lambda each: each.nbytes)
        slot.data[entry.offset] ^= 8
        hosts = [(store, start(tmp_path))]
        wanted = Wanted(SMALL, layout)
        gathered = wanted.gather([everything_of(layout, 0)], from_agents(hosts))
    (strike,) = gathered.strikes
    assert strike.shards == frozenset({layout.shards[entry.shard]})
    wanted.assert_good(gathered, set(wanted.places) - {entry.shard})
    bad = first_bad_block(wanted.places[entry.shard], gathered.checksums.get(entry.shard, ()), 0)
    assert bad is not None
